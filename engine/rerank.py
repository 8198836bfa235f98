"""Around sampling: re-masking, and the best of several candidates by the model's own likelihood.

    ids = remask(predict, ids, unknown, mask_token, seeds, plan, passes=4)
    ids = best_of(8, fill, pipe.transformer, ids, cond, uncond, seeds, ablated, "rate")

Both wrap meissonic.sample from outside. NOTES.md has what they gain on the small model.

Letters: as in meissonic.py; K candidates, R masking rates.
"""
import math

import torch

import kernels
import meissonic
from engine import fast
from meissonic import Step

REMASKED_SHARE = 0.25                            # of the ids: about what a pass draws again
RATES = (0.95, 0.95, 0.9, 0.9, 0.85, 0.8, 0.75)  # masking rates of the likelihood; at 1 it says
                                                 # nothing of how the tokens fit each other
ABLATED_RATES = 4                                # number of RATES used for the ablated prompts
ABLATION_WEIGHT = 4.0
MAX_ABLATIONS = 16                               # parts of a prompt that are left out in turn
MAX_TOKENS = 4096                                # of the candidates that are drawn as one batch


# -------------------------------------------------------------------------------------------------
# Re-masking


def tail(plan, num_masked):
    """The last steps of a plan, from the first one that finds at most REMASKED_SHARE of num_masked
    masked -> (steps, how many are masked before them)."""
    before = [num_masked, *(step.num_masked for step in plan)]
    for i in range(len(plan)):
        if before[i] <= REMASKED_SHARE * num_masked:
            return plan[i:], before[i]
    return plan[-1:], before[len(plan) - 1]


def remask(predict, ids, unknown, mask_token, seeds, plan, passes, watch=None):
    """Extra passes after sampling: mask about a quarter of what was drawn, at random, and draw it
    again in the plan's last steps. What was drawn early then fits what came late (Wang et al. 2025,
    arXiv 2503.00307). A plan of fewer than 7 steps repeats its last one, whatever that masks.
    ids (B, h, w) whole; unknown (B, M) the positions that were drawn -> (B, h, w)."""
    if not plan:
        return ids
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=ids.device)
    steps, count = tail(plan, unknown.shape[1])
    total = len(plan) + passes * len(steps)
    for k in range(passes):
        first = len(plan) + k * len(steps)
        number = total + first                        # of no step: an independent random order
        chance = kernels.gumbel_noise(seeds, [number], ids[0].numel())[0]                 # (B, N)
        chosen = chance.gather(1, unknown).topk(count, largest=False, sorted=False).indices
        masked = unknown.gather(1, chosen)                                            # (B, count)
        ids = ids.flatten(1).scatter(1, masked, mask_token).view(ids.shape)
        again = [step._replace(number=first + i) for i, step in enumerate(steps)]
        ids = meissonic.sample(predict, ids, mask_token, seeds, again, watch)
    return ids


# -------------------------------------------------------------------------------------------------
# Likelihood


@torch.no_grad()
def log_likelihoods(model, ids, conds, rates, rate_condition):
    """How likely the ids of pictures are under several conditions: log p(id | visible, condition)
    of the ids masked at each rate, in nats. The masks are random, the same for all pictures,
    conditions and calls. ids (B, h, w), all known; conds, Conditionings of B rows each;
    rate_condition, one of meissonic.RATE_CONDITIONS -> (len(conds), R, B, h w) float32, NaN where
    visible."""
    B, count, generator = len(ids), ids[0].numel(), torch.Generator().manual_seed(0)
    flat, weight = ids.flatten(1), model.mlm_layer.conv2.weight.flatten(1)
    result = torch.full((len(conds), len(rates), B, count), torch.nan, device=ids.device)
    masks = []
    for rate in rates:
        chosen = torch.randperm(count, generator=generator)[:max(1, round(rate * count))]
        masks.append(chosen.to(ids.device).expand(B, -1))                             # (B, M)
    plan = [rate_step(rate, mask.shape[1], count, rate_condition)
            for rate, mask in zip(rates, masks)]
    together = fast.concatenate(*conds)
    text = model.embed_text(together.hidden).chunk(len(conds))                     # (B, L, C) each
    modulations = fast.precompute_modulations(model, together, [s.timestep for s in plan])
    for k, modulation in enumerate(modulations.chunk(len(conds), 1)):               # (R, B, W)
        for i, masked in enumerate(masks):
            masked_ids = flat.scatter(1, masked, model.config.mask_token).view(ids.shape)
            x = fast.features(model, masked_ids, text[k], modulation[i])            # (B, h, w, C)
            x = model.head_features(meissonic.gather_positions(x, masked))            # (B, M, C)
            targets = flat.gather(1, masked)
            loss = kernels.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())
            result[k, i].scatter_(1, masked, -loss.float().view(B, -1))
    return result


def rate_step(rate, masked, tokens, rate_condition, steps=48):
    """The Step of a 48-step run that has this masking rate; only its timestep is used."""
    step = min(round(steps * 2 / math.pi * math.acos(rate)), steps - 1)
    timestep = meissonic.RATE_CONDITIONS[rate_condition](step, steps, masked, tokens)
    return Step(0, timestep, 0.0, 1.0, 0)


def mean_over_rates(log_p):
    """(..., R, B, N) -> (..., B, N): the mean over the rates at which an id was masked, else 0."""
    return log_p.nanmean(-3).nan_to_num()


def token_saliency(model, ids, old, new, rate_condition):
    """How much less likely each id becomes when the caption changes from `old` to `new`
    (Conditioning), in nats, smoothed over 5 x 5 tokens -> (B, h, w). With everything masked a new
    background shows, which no lower rate finds; the lower ones show where a shape changes."""
    rates = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
    before, after = mean_over_rates(log_likelihoods(model, ids, (old, new), rates, rate_condition))
    change = (before - after).view(len(ids), 1, *ids.shape[1:])                    # (B, 1, h, w)
    return torch.nn.functional.avg_pool2d(change, 5, 1, 2, count_include_pad=False)[:, 0]


# -------------------------------------------------------------------------------------------------
# The best of several candidates


def rerank_score(model, ids, cond, ablated, rate_condition):
    """How well each picture fits its prompt -> (B,) in nats per token: its log-likelihood, less
    four times what each part of the prompt takes away from it. A picture that shows nothing of a
    word is likelier under the prompt without that word. ablated: the Conditionings of the prompt
    without one part each."""
    log_p = log_likelihoods(model, ids, (cond,), RATES, rate_condition)[0]           # (R, B, N)
    score = mean_over_rates(log_p).mean(-1)                                               # (B,)
    if ablated:
        rates = RATES[:ABLATED_RATES]
        told = mean_over_rates(log_p[:ABLATED_RATES]).mean(-1)                            # (B,)
        log_p = log_likelihoods(model, ids, ablated, rates, rate_condition)
        untold = mean_over_rates(log_p).mean(-1)                               # (len(ablated), B)
        score = score - ABLATION_WEIGHT * (untold - told).clamp(min=0).sum(0)
    return score


def ablated_prompt(prompt):
    """A prompt with one word left out in turn -> list of str. Stretches of words are left out where
    it has more than MAX_ABLATIONS."""
    words = prompt.split()
    parts = min(len(words), MAX_ABLATIONS)
    cuts = [len(words) * k // max(parts, 1) for k in range(parts + 1)]
    return [" ".join(words[:a] + words[b:]) for a, b in zip(cuts, cuts[1:])]


def ablated_prompts(prompts):
    """[the prompts without their first part, without their second, ...], lists of len(prompts). A
    prompt that has no k-th part is whole there, which costs it nothing."""
    ablations = [ablated_prompt(prompt) for prompt in prompts]
    result = []
    for k in range(max(len(a) for a in ablations)):
        result.append([a[k] if k < len(a) else p for a, p in zip(ablations, prompts)])
    return result


def candidate_seed(seed, k):
    """Seed of the k-th candidate; the 0th is the picture's own. Far apart, so that neighbouring
    seeds share no candidate. Signed 64 bits."""
    return (seed + k * 0x9E3779B97F4A7C15 + 2 ** 63) % 2 ** 64 - 2 ** 63


def best_of(number, fill, model, ids, cond, uncond, seeds, ablated, rate_condition):
    """Draw `number` candidates of each picture and keep the one of the highest rerank_score.
    fill(ids, cond, uncond, seeds) draws a batch; candidates are drawn and scored in batches of
    MAX_TOKENS tokens at most -> ids (B, h, w)."""
    rows = [i for i in range(len(ids)) for _ in range(number)]                              # B K
    seeds = [candidate_seed(int(seed), k) for seed in seeds for k in range(number)]
    size = max(1, MAX_TOKENS // ids[0].numel())
    drawn, scores = [], []
    for start in range(0, len(rows), size):
        part = rows[start:start + size]
        drawn.append(fill(ids[part], cond.rows(part), uncond.rows(part), seeds[start:start + size]))
        without = [c.rows(part) for c in ablated]
        scores.append(rerank_score(model, drawn[-1], cond.rows(part), without, rate_condition))
    best = torch.cat(scores).view(-1, number).argmax(1)                                     # (B,)
    drawn = torch.cat(drawn).unflatten(0, (-1, number))                               # (B, K, h, w)
    return drawn[torch.arange(len(best), device=best.device), best]

