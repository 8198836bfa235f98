"""Other orders of revealing tokens, and guidance that costs fewer passes. None needs training.

    plan = growing_guidance(schedule.plan(num_masked=256, num_tokens=256))
    predict = guided(unguided(model, cond, plan), unguided(model, uncond, plan), every=2)
    ids = meissonic.sample(predict, ids, mask_token, seeds, plan, order=halton)

- An order takes the place of meissonic.confidence: a score for each token that was drawn. The step
  masks those with the lowest scores again.
- A change of guidance edits a plan: list of Step -> list of Step.
- `guided` makes the unconditional pass in guided steps only, or in every k-th of them.
Re-masking is in engine/rerank.py. `python -m tools.compare` compares them all.

Letters: as in meissonic.py; K positions of an earlier step.
"""
from functools import lru_cache

import numpy as np
import torch

from engine import fast
from meissonic import apply_cfg

# -------------------------------------------------------------------------------------------------
# Orders


def halton(step, log_p, noise, masked, grid):
    """A fixed order that spreads the tokens of each step over the picture, so that they depend
    little on each other: the 2-D Halton sequence (Besnier et al. 2025, arXiv 2503.17076)."""
    return -halton_ranks(*grid, masked.device)[masked]                                    # (B, M)


def random(step, log_p, noise, masked, grid):
    """Any token may be the next one: the order of training."""
    return noise


@lru_cache(maxsize=8)
def halton_ranks(h, w, device):
    """When the 2-D Halton sequence first enters each cell of an h x w grid -> (N,) int64, all of
    them different. Rows follow base 2 and columns base 3, as in the authors' code. Every cell of
    width 1/h holds an interval i/2^j to (i+1)/2^j with 2^j < 4h, likewise 3^k < 6w, and every such
    pair of intervals has one of 2^j 3^k points in a row. So 24 h w points enter all cells."""
    index = np.arange(1, 24 * h * w + 1)
    cells = van_der_corput(index, 2, h) * w + van_der_corput(index, 3, w)
    _, first = np.unique(cells, return_index=True)
    return torch.from_numpy(first).to(device)


def van_der_corput(index, base, cells):
    """The digits of an index, mirrored at the point, are a number in [0, 1). -> Which of `cells`
    equal parts of [0, 1) it is in. Integers: 1/3 of 3 cells must not be rounded."""
    numerator, denominator = np.zeros_like(index), 1
    while index.any():
        index, digit = divmod(index, base)
        numerator = numerator * base + digit
        denominator *= base
    return numerator * cells // denominator


# -------------------------------------------------------------------------------------------------
# Guidance over the steps


def constant_guidance(plan, scale):
    """Another scale; 1 is no guidance."""
    return [step._replace(cfg_scale=scale) for step in plan]


def guidance_between(plan, first, last):
    """Guidance in a part of the steps alone, from the share `first` of them to the share `last`
    (Kynkaanniemi et al. 2024, arXiv 2404.07724)."""
    result = []
    for i, step in enumerate(plan):
        inside = first <= i / len(plan) < last
        result.append(step if inside else step._replace(cfg_scale=1.0))
    return result


def growing_guidance(plan):
    """Guidance that grows linearly from 1; its mean is the plan's. Early tokens vary more, late
    ones follow the prompt (Muse, Chang et al. 2023, arXiv 2301.00704)."""
    result = []
    for i, step in enumerate(plan):
        growth = (2 * i + 1) / len(plan)                      # from 0 to 2
        result.append(step._replace(cfg_scale=1 + growth * (step.cfg_scale - 1)))
    return result


# -------------------------------------------------------------------------------------------------
# Fewer unconditional passes


def unguided(model, cond, plan):
    """fast.predictor of one Conditioning for the steps of a plan, without guidance."""
    return fast.predictor(model, cond, None, constant_guidance(plan, 1.0))


def guided(conditional, unconditional, every=1):
    """Two functions predict(step, ids, masked) -> one with guidance, that of fast.predictor but for
    rounding if `every` is 1. The unconditional pass runs in guided steps only, and of these in
    every k-th; its logits are kept. What is masked in the next steps was masked then, too. Only
    where a new pass over the picture begins (engine.rerank.remask) it was not. There, no fewer
    positions are masked than in the step before."""
    kept, age, before = None, 0, 0

    def predict(step, ids, masked):
        nonlocal kept, age, before
        logits = conditional(step, ids, masked)                                      # (B, M, V)
        is_new_pass = masked.shape[1] >= before
        age = every if is_new_pass else age + 1
        before = masked.shape[1]
        if step.cfg_scale == 1:
            return logits
        if age >= every:
            kept = masked, unconditional(step, ids, masked)
            age = 0
        negative = select_positions(*kept, masked, ids[0].numel()) if age else kept[1]
        return apply_cfg(logits, negative, step.cfg_scale)                           # (B, M, V)
    return predict


def select_positions(known, logits, masked, tokens):
    """logits (B, K, V) at positions `known` (B, K) of so many tokens -> at `masked` (B, M), which
    are among them, (B, M, V)."""
    B, K, V = logits.shape
    index = torch.arange(K, device=known.device).expand(B, K)
    row = known.new_zeros(B, tokens).scatter(1, known, index).gather(1, masked)           # (B, M)
    return logits.gather(1, row[..., None].expand(-1, -1, V))                        # (B, M, V)
