"""What each part of the model is worth: train a stage without it, and compare the losses.

    python -m tools.ablate none rope qk-norm --init runs/tiny --steps 700

none           the model as it is, to compare with
rope           learned positions in place of rotary ones
rate           the masking rate is not told
micro          the micro conditions are not told
qk-norm        queries and keys are not normalised
multimodal     single-modal blocks only, as many
compression    no compression layers

Takes the flags of train.py; the defaults are --preset tiny --stage 1 --out runs/ablate. Tokenizer,
VQ model and text encoder come from --init. Each run starts with the same fresh transformer, sees
the same pictures, and is logged under its name in the folder of --out. No model is kept.
"""
import itertools
import math
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch import nn

import kernels
import meissonic
import train
from engine import log, options
from engine.checkpoint import UserError
from engine.cli import say, script
from engine.model_folder import copy_init
from kernels.attention import library_attention
from kernels.qkv import rotate

PARTS = ("none", "rope", "rate", "micro", "qk-norm", "multimodal", "compression")
FROM_INIT = ("tokenizer", "vqvae", "text_encoder")
DEFAULTS = ["--preset", "tiny", "--stage", "1", "--out", "runs/ablate"]


# --------------------------------------------------------------------------------------------------
# Changes of a config or of a built model


def change_config(part, configs, compress):
    """An entry of train.MODELS, and whether a stage compresses -> the same without the part."""
    if part == "multimodal":
        c = meissonic.Config(**configs["transformer"])
        blocks = dict(num_layers=0, num_single_layers=c.num_layers + c.num_single_layers)
        configs = configs | dict(transformer=configs["transformer"] | blocks)
    return configs, compress and part != "compression"


def change_model(part, transformer):
    """Take a part out of a built transformer, in place."""
    if part == "rope":
        norm = LearnedPositions(transformer.project_to_hidden_norm, transformer.config.width)
        transformer.project_to_hidden_norm = norm
        for block in transformer.blocks:
            block.forward = without_rotation(block.forward)
    elif part == "rate":
        embed_timestep = transformer.embed_timestep
        transformer.embed_timestep = lambda timestep, dtype: embed_timestep(timestep * 0, dtype)
    elif part == "micro":
        embed_prompt = transformer.embed_prompt
        transformer.embed_prompt = lambda pooled, micro: embed_prompt(pooled, micro * 0)


class LearnedPositions(nn.Module):
    """norm(x + position): one learned vector for each row and one for each column. Square grids."""

    def __init__(self, norm, width, side=64):
        super().__init__()
        self.norm = norm
        self.rows = nn.Embedding(side, width, _weight=torch.zeros(side, width))
        self.columns = nn.Embedding(side, width, _weight=torch.zeros(side, width))

    def forward(self, x):                                                          # (B, N, C)
        side = math.isqrt(x.shape[1])
        positions = self.rows.weight[:side, None] + self.columns.weight[:side]     # (h, w, C)
        return self.norm(x + positions.flatten(0, 1))                              # (B, N, C)


def without_rotation(forward):
    """A block's forward with angles of zero."""
    def changed(x, text, temb, rope):
        cos, sin = rope
        return forward(x, text, temb, (torch.ones_like(cos), torch.zeros_like(sin)))
    return changed


def attention_without_norm(text, image, text_norms, image_norms, cos, sin):
    """kernels.attention, the plain path, without QK-norm."""
    text_q, text_k, text_v = text.unbind(2)                                        # (B, L, H, D)
    q, k, v = image.unbind(2)                                                      # (B, N, H, D)
    q = torch.cat((text_q, rotate(q, cos, sin)), 1)                                # (B, S, H, D)
    k = torch.cat((text_k, rotate(k, cos, sin)), 1)                                # (B, S, H, D)
    return library_attention(q, k, torch.cat((text_v, v), 1))


def attention_of(part):
    return attention_without_norm if part == "qk-norm" else kernels.attention


# --------------------------------------------------------------------------------------------------
# Runs


def train_without(run, recipe, stage, part):
    """Train a fresh transformer without a part -> the mean loss of the last fifth of the steps."""
    settings = run.stages[stage]
    configs, compress = change_config(part, train.MODELS[run.preset], settings["compress"])
    model = train.build_model(run, recipe, configs, settings["text_lr"], compress)
    change_model(part, model.transformer)
    task = train.transformer_task(run, recipe, stage, model.to(run.device))
    run.stages[part] = settings                   # the log and the checkpoints go by this name
    with mock.patch.object(kernels, "attention", attention_of(part)):
        train.fit(run, replace(task, name=part, save=keep_nothing, evaluate=None))
    entries = [entry for entry in log.read_log(run.out) if entry["stage"] == part]
    return np.mean([entry["loss"] for entry in entries if "loss" in entry
                    and entry["step"] > 0.8 * settings["steps"]])


def keep_nothing(state):
    """Task.save of a model that is not kept."""


@script("tools.ablate")
def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    parts = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    args = options.parse_arguments(train.PRESETS, train.STAGES, __doc__,
                                   DEFAULTS + argv[len(parts):], "tools.ablate")
    if not parts or set(parts) - set(PARTS):
        raise UserError(f"name some of {', '.join(PARTS)}, not {' '.join(parts) or 'nothing'}")
    run = options.open_run(args, train.PRESETS)
    recipe = train.choose_recipe(run)
    copy_init(run, FROM_INIT)
    log.LINE_EVERY = 10
    results = {part: train_without(run, recipe, args.stage, part) for part in parts}
    say("without          loss")
    for part, loss in results.items():
        say(f"{part:12} {loss:8.4f}")


if __name__ == "__main__":
    main()
