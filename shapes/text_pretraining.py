"""The text encoder learns what captions say of their scenes; no picture is drawn.

The paper takes the trained text encoder of CLIP. Here one is trained in minutes: from the pooled
text a linear layer predicts `world.scene_labels`. Learning the same through the transformer's loss
takes hours.

Which of two objects is "left" depends on the order of the words together with the relation. Either
alone tells nothing, so it gives no gradient. Therefore the first quarter of the steps has only
captions with a relation, and four of five relations are "left" or "above". There the order tells
something by itself. The encoder learns the order first, and from it the rest.

    settings = {"steps": 4000, "batch": 64, "lr": 1e-3}
    fit(run, text_task(run, text_encoder, tokenizer, settings, {"letters": 0.3}))

Letters: B captions, L text positions, Q questions.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.checkpoint import remove_prefix
from engine.data import Prefetch, worker_number
from engine.task import Task, decay_groups, save_half
from shapes import world

NUM_LABELS = len(world.scene_labels(world.Scene("red", ())))


class TextPretrainer(nn.Module):
    """A text encoder, and a linear layer that answers the questions of world.scene_labels. The
    linear layer is thrown away at the end."""

    def __init__(self, text_encoder):
        super().__init__()
        self.text_encoder = text_encoder
        self.answer = nn.Linear(text_encoder.config.projection_dim, NUM_LABELS)

    def forward(self, text_ids, labels):
        """text_ids (B, L) int64, labels (B, Q) -> binary cross-entropy, a scalar."""
        _, pooled = self.text_encoder(text_ids)                                    # (B, C)
        return F.binary_cross_entropy_with_logits(self.answer(pooled).float(), labels)


def text_task(run, text_encoder, tokenizer, settings, mixture):
    """The Task of stage "text". settings: steps, batch, lr; mixture: keywords of
    world.sample_example. Saves run.out/text_encoder."""
    module = TextPretrainer(text_encoder).to(run.device)
    steps, batch = settings["steps"], settings["batch"]

    def draw(step, attempt):
        rng = run.rng("text", step, attempt)
        captions, labels = sample_labels(rng, batch, step < steps // 4, mixture)
        return run.rank_slice(tokenizer(captions), labels)

    drawn = Prefetch(draw, steps, worker_number(run.device))

    def micro_batches(model, step, attempt):
        for text_ids, labels in drawn(step, attempt):
            with run.precision():
                loss = model(run.to_device(text_ids), run.to_device(labels))
            yield loss / run.accumulate, {}

    def save(state):
        save_half(run.out / "text_encoder", text_encoder, remove_prefix(state, "text_encoder."))

    return Task("text", module, lambda: decay_groups(module), micro_batches, steps, batch,
                settings["lr"], save)


def sample_labels(rng, batch, relations_only, mixture):
    """-> list of B captions, labels (B, Q) float32. Every other caption has a relation."""
    captions, labels = [], []
    for i in range(batch):
        task = "position" if relations_only or i % 2 else None
        mirrored = 0.2 if relations_only else 0.5
        caption, scene, _ = world.sample_example(rng, task, mirrored=mirrored,
                                                  **{"letters": 0.3} | mixture)
        captions.append(caption)
        labels.append(world.scene_labels(scene))
    return captions, torch.from_numpy(np.stack(labels))
