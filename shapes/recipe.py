"""Training on the drawn world of shapes, and what helps a tiny model to learn it on two CPU cores.

train.py takes this recipe with --data shapes. The preset "cpu" uses all of it: a text encoder that
is trained on captions first, a computed codebook, and codes that share what they have in common.
"""
from functools import partial

import clip
from engine.recipe import FileRecipe
from shapes import codebook, score, text_pretraining, tied_codes, world

MIXTURE = ("concepts", "augment_prob", "letters")         # settings that training_example takes


class ShapesRecipe(FileRecipe):
    """The recipe of --data shapes."""

    def source(self, stage):
        settings = self.run.stages[stage]
        return world.ShapesSource(self.run.seed, stage, settings["size"], settings["pictures"],
                                  **self.mixture(stage))

    def mixture(self, stage):
        settings = self.run.stages[stage]
        return {name: settings[name] for name in MIXTURE if name in settings}

    def tokenizer_captions(self):
        return world.sample_captions(self.run.seed)

    def sheet_captions(self, stage):
        captions = []
        for task in world.TASKS[1:]:
            captions += [caption for caption, _ in world.test_prompts(task, 4, seed=1)]
        return captions

    def scores(self, pipe, number=16):
        return score.score_tasks(pipe, number, progress=iter)

    def text_task(self, text_encoder):
        tokenizer = clip.Tokenizer.from_pretrained(self.run.out / "tokenizer")
        settings = self.run.stages["text"]
        return text_pretraining.text_task(self.run, text_encoder, tokenizer, settings)

    @property
    def patch_codes(self):
        """(colours, outlines) of the computed codebook, or None if the preset trains one."""
        return self.run.stages.get("vq", {}).get("patch_codes")

    def set_codes(self):
        if not self.patch_codes:
            return None
        colours, outlines = self.patch_codes
        return partial(codebook.set_patch_codes, colours=colours, outlines=outlines)

    def prepare(self, transformer, fresh):
        if self.patch_codes:
            features = codebook.code_features(*self.patch_codes)                   # (V, F)
            if len(features) == transformer.config.codebook_size:     # --init may have other codes
                tied_codes.tie_codes(transformer, features, fresh)

    def plain_state(self, transformer, state):
        return tied_codes.untie(transformer, state)
