"""Training on the drawn world of shapes, and what helps a tiny model to learn it on two CPU cores.

train.py takes this recipe with --data shapes. Pictures are drawn while training goes on, each once.
The presets "tiny" and "small" use all that is here: a text encoder that is trained on captions
first, a computed codebook, and codes that share what they have in common.

Settings of a stage in train.PRESETS, all optional:

    world         one of world.WORLDS, default "full"
    concepts      share of pictures with a single object; scale: how much larger than usual it is
    crowds        share of pictures without a caption, full of objects
    letters, cells, margin, max_objects, large, augment_prob    see world.py
    patch_codes   colours and outlines of a computed codebook, see codebook.py
    views         how many differently masked views of a picture a batch has, default 1

Letters: B pictures of a batch, H W pixels, h w tokens, L text positions, V codes, F features.
"""
from functools import partial

import numpy as np
import torch

import clip
import vq
from engine.checkpoint import UserError
from engine.data import to_float
from engine.recipe import FileRecipe
from shapes import codebook, score, text_pretraining, tied_codes, world

OF_PICTURES = ("concepts", "crowds", "scale", "augment_prob", "letters", "cells", "margin",
               "max_objects", "large")


class ShapesRecipe(FileRecipe):
    """The recipe of --data shapes."""

    def source(self, stage):
        return world.ShapesSource(self.run.seed, stage, self.run.stages[stage]["size"],
                                  **self.mixture(stage))

    def mixture(self, stage):
        """Keywords of world.training_example."""
        settings = self.run.stages[stage]
        own = {name: settings[name] for name in OF_PICTURES if name in settings}
        return world.WORLDS[settings.get("world", "full")] | own

    def dataset(self, stage):
        return DrawnTokens(self.run, self.source(stage), stage)

    def tokenizer_captions(self):
        return world.sample_captions(self.run.seed)

    def sheet_prompts(self, stage, number):
        """`number` held-out (task, caption, PromptSpec), of all tasks in turn."""
        words = world.words_of(self.run.stages[stage].get("world", "full"))
        each = -(-number // len(world.TASKS))
        prompts = []
        for task in world.TASKS:
            for caption, spec in world.test_prompts(task, each, seed=1, **words):
                prompts.append((task, caption, spec))
        order = np.arange(len(prompts)).reshape(len(world.TASKS), each).T.ravel()
        return [prompts[i] for i in order[:number]]

    def sheet_captions(self, stage, number):
        return [caption for _, caption, _ in self.sheet_prompts(stage, number)]

    def scores(self, stage, pictures):
        """{task: share of right pictures}, and "overall", the mean over the tasks."""
        right = {}
        for picture, (task, _, spec) in zip(pictures, self.sheet_prompts(stage, len(pictures))):
            right.setdefault(task, []).append(score.image_matches(picture, spec))
        scores = {task: float(np.mean(matches)) for task, matches in right.items()}
        return scores | {"overall": float(np.mean(list(scores.values())))}

    def text_task(self, text_encoder):
        tokenizer = clip.Tokenizer.from_pretrained(self.run.out / "tokenizer")
        settings = self.run.stages["text"]
        mixture = {name: value for name, value in self.mixture("text").items()
                   if name not in ("concepts", "crowds", "scale", "augment_prob")}
        return text_pretraining.text_task(self.run, text_encoder, tokenizer, settings, mixture)

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


class DrawnTokens:
    """Tokens of pictures that are drawn when they are asked for; see engine.data.TokenDataset.
    Worker processes draw them ahead of the training loop."""

    def __init__(self, run, source, stage):
        self.source = source
        self.views = run.stages[stage].get("views", 1)
        self.tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
        vq_model = vq.VQModel.from_pretrained(run.out / "vqvae")
        f = vq_model.config.f
        self.grid = source.size // f, source.size // f
        if codebook.has_patch_encoder(vq_model):
            self.shrink = f // 4                   # drawn at 4 pixels per token: as good, and quick
            self.encode = codebook.PatchEncoder(vq_model)
            source.size //= self.shrink
        else:
            self.shrink = 1
            self.encode = vq_model.encode

    def indices(self, seed, step, batch):
        if batch % self.views:
            raise UserError(f"a batch of {batch} does not divide by {self.views} views")
        index = np.random.default_rng([*seed, step]).integers(2 ** 48, size=batch // self.views)
        return np.tile(index, self.views)

    @torch.no_grad()
    def __getitem__(self, index):
        """(B,) array -> ids (B, h, w) int64, text_ids (B, L) int64, micro_conds (B, 5) float32."""
        different, place = np.unique(index, return_inverse=True)
        pictures, captions, micro_conds = zip(*[self.source[int(i)] for i in different])
        ids = self.encode(to_float(np.stack(pictures)))
        text_ids = self.tokenizer(list(captions), warn=False)
        micro_conds = torch.from_numpy(np.stack(micro_conds))
        micro_conds[:, :4] *= self.shrink
        return ids[place], text_ids[place], micro_conds[place]
