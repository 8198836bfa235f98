"""Sampling: seeds, batches, masks, guidance, watch, re-masking, likelihoods, best of several.

On tiny random models with the reference predictor: what must hold whatever the weights are.
Letters: as in meissonic.py.
"""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from common import (GOLDEN, GOLDEN_MODEL, generator, masked_grid, random_conditioning,
                    tiny_transformer)
from common import KINDS as KINDS_OF_MODELS
from hypothesis import given, settings
from hypothesis import strategies as st

import meissonic
from engine import fast, rerank
from engine.pipeline import Pipeline
from engine.rerank import ABLATED_RATES, MAX_ABLATIONS, RATES
from meissonic import Conditioning, Schedule

SEED = st.integers(0, 2 ** 32 - 1)
ANY_SEED = st.integers(-2 ** 63, 2 ** 63 - 1)
KINDS = st.sampled_from(sorted(meissonic.MASK_SCHEDULES))
RATE_CONDITIONS = sorted(meissonic.RATE_CONDITIONS)
SCHEDULE = Schedule(5, 2.0, (2.0, 0.0), "cosine", "step")
MASK = 47                                                    # the tiny models' mask token
CODES = 40
some = settings(max_examples=10, deadline=None)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


def conditionings(model, batch, seed=0):
    """Two random Conditionings: prompt and negative prompt."""
    cond = random_conditioning(generator(seed), batch, model)
    return cond, random_conditioning(generator(seed + 1), batch, model)


def plan_for(ids, schedule=SCHEDULE):
    return schedule.plan((ids[0] == MASK).sum().item(), ids[0].numel())


def draw(model, ids, seeds, cond, uncond, schedule=SCHEDULE, passes=0, watch=None):
    """Sample, then re-mask `passes` times -> ids."""
    plan = plan_for(ids, schedule)
    predict = meissonic.reference_predictor(model, cond, uncond)
    drawn = meissonic.sample(predict, ids, MASK, seeds, plan, watch)
    unknown = meissonic.masked_positions(ids.flatten(1), MASK)
    return rerank.remask(predict, drawn, unknown, MASK, seeds, plan, passes, watch)


def all_masked(batch, h=4, w=4):
    return torch.full((batch, h, w), MASK)


# -------------------------------------------------------------------------------------------------
# Masks


@some
@given(SEED, st.integers(1, 3), st.integers(1, 3), st.data())
def test_only_masked_ids_change(model, seed, h, w, data):
    """Known ids never change, all ids are codes at the end, and before each step as many are
    masked as the schedule says, in the passes of re-masking as in its last steps."""
    total = 4 * h * w
    unknown = data.draw(st.integers(1, total))
    steps, passes = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 2))
    schedule = replace(SCHEDULE, steps=steps, mask_schedule=data.draw(KINDS))
    ids = masked_grid(seed, 2, 2 * h, 2 * w, unknown, model)
    before, seen = ids.clone(), []

    def watch(n, drawn, masked, logits):
        assert logits.shape == (2, masked.shape[1], CODES)
        seen.append(masked.shape[1])

    done = draw(model, ids, [seed, seed + 1], *conditionings(model, 2), schedule, passes, watch)
    assert torch.equal(ids, before)                          # the argument is left as it was
    assert torch.equal(done[ids != MASK], ids[ids != MASK])
    assert (done >= 0).all() and (done < CODES).all()
    counts = [unknown, *meissonic.masked_counts(steps, unknown, schedule.mask_schedule)]
    counts = [count for count in counts[:steps] if count]
    last = [count for count in counts if 4 * count <= unknown] or counts[-1:]
    assert seen == counts + passes * last


@pytest.mark.parametrize("batch", [1, 3])
def test_pictures_without_a_mask_stay_as_they_are(model, batch):
    ids = torch.randint(CODES, (batch, 4, 4), generator=generator())
    assert torch.equal(draw(model, ids, range(batch), *conditionings(model, batch), passes=2), ids)


def test_unequal_masks_in_a_batch_are_refused(model):
    ids = all_masked(2)
    ids[0, 0, 0] = 1
    with pytest.raises(ValueError, match="equal"):
        meissonic.sample(None, ids, MASK, [0, 1], SCHEDULE.plan(16, 16))


@some
@given(SEED, st.sampled_from([0.0, 3.0]))
def test_the_least_confident_are_masked_again(seed, temperature):
    """Confidence: log p of the code that was drawn, plus the temperature times the noise."""
    logits = 3 * torch.randn(2, 16, CODES, generator=generator(seed))
    schedule = replace(SCHEDULE, temperature=(temperature, temperature))
    plan, seeds, seen = schedule.plan(16, 16), torch.tensor([seed, seed + 1]), []

    def predict(step, ids, masked):
        return logits.gather(1, masked[..., None].expand(-1, -1, CODES))

    meissonic.sample(predict, all_masked(2), MASK, seeds, plan, lambda *args: seen.append(args))
    noise = meissonic.kernels.gumbel_noise(seeds, list(range(5)), 16)                  # (T, B, N)
    for step, (_, ids, masked, _), (_, _, later, _) in zip(plan, seen, seen[1:]):
        log_p = logits.log_softmax(-1).gather(-1, ids.flatten(1)[..., None])[..., 0]      # (B, N)
        confidence = log_p + temperature * noise[step.number]
        for row in range(2):
            again = set(later[row].tolist())
            revealed = set(masked[row].tolist()) - again
            assert max(confidence[row, list(again)]) <= min(confidence[row, list(revealed)])


# -------------------------------------------------------------------------------------------------
# Seeds and batches


@some
@given(SEED, ANY_SEED)
def test_a_seed_makes_the_picture(model, text_seed, seed):
    cond, uncond = conditionings(model, 1, text_seed)
    first, again, other = (draw(model, all_masked(1), [s], cond, uncond)
                           for s in (seed, seed, seed ^ 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_prompts_matter(model):
    """Guards the next test: other conditions give other pictures."""
    one, other = (draw(model, all_masked(1), [3], *conditionings(model, 1, s)) for s in (1, 10))
    assert not torch.equal(one, other)


@some
@given(SEED, st.integers(2, 4), st.data())
def test_a_picture_does_not_depend_on_its_batch(model, seed, batch, data):
    """Picture `alone` stays when every other one gets another seed and other conditions, and
    when the pictures change places."""
    passes, alone = data.draw(st.integers(0, 2)), data.draw(st.integers(0, batch - 1))
    cond, uncond = conditionings(model, batch, seed)
    others, _ = conditionings(model, batch, seed + 2)
    seeds = torch.randint(-2 ** 62, 2 ** 62, (batch,), generator=generator(seed))

    def replace_others(cond):
        parts = []
        for mine, other in zip(vars(cond).values(), vars(others).values()):
            mixed = other.clone()
            mixed[alone] = mine[alone]
            parts.append(mixed)
        return Conditioning(*parts)

    whole = draw(model, all_masked(batch), seeds, cond, uncond, passes=passes)
    other_seeds = torch.where(torch.arange(batch) == alone, seeds, seeds + 1)
    mixed = draw(model, all_masked(batch), other_seeds, replace_others(cond),
                 replace_others(uncond), passes=passes)
    assert torch.equal(whole[alone], mixed[alone]) and not torch.equal(whole, mixed)
    order = torch.tensor(data.draw(st.permutations(range(batch))))
    moved = draw(model, all_masked(batch), seeds[order], cond.rows(order), uncond.rows(order),
                 passes=passes)
    assert torch.equal(moved, whole[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_sample(dtype):
    """The picture is complete, and the logits keep the model's dtype."""
    model, dtypes = tiny_transformer().to(dtype), set()
    cond, uncond = (Conditioning(c.hidden.to(dtype), c.pooled.to(dtype), c.micro_conds)
                    for c in conditionings(model, 2))

    def watch(n, ids, masked, logits):
        dtypes.add(logits.dtype)

    assert (draw(model, all_masked(2), [1, 2], cond, uncond, watch=watch) < CODES).all()
    assert dtypes == {dtype}


# -------------------------------------------------------------------------------------------------
# Guidance


def predict_once(model, cond, uncond, scale, seed=0):
    """Logits of one step with 9 of 16 ids masked -> (B, 9, V)."""
    ids = masked_grid(seed, len(cond.pooled), 4, 4, 9, model)
    masked = meissonic.masked_positions(ids.flatten(1), MASK)
    step = meissonic.Step(0, 0.5, 0.0, scale, 0)
    return meissonic.reference_predictor(model, cond, uncond)(step, ids, masked)


@some
@given(SEED, st.floats(-2, 12))
def test_guidance_is_its_formula(model, seed, scale):
    """u + scale (c - u) of the logits of two separate passes."""
    cond, uncond = conditionings(model, 2, seed)
    c = predict_once(model, cond, None, 1.0, seed)
    u = predict_once(model, uncond, None, 1.0, seed)
    guided = predict_once(model, cond, uncond, scale, seed)
    torch.testing.assert_close(guided, u + scale * (c - u), rtol=1e-4, atol=2e-4)
    assert not torch.allclose(c, u, atol=1e-2)
    near_one = predict_once(model, cond, uncond, 1 + 1e-6, seed)
    torch.testing.assert_close(near_one, c, rtol=1e-3, atol=1e-3)


def test_guidance_one_needs_no_negative(model):
    cond, _ = conditionings(model, 1)
    schedule = replace(SCHEDULE, cfg_scale=1)
    assert (draw(model, all_masked(1), [0], cond, None, schedule) < CODES).all()


# -------------------------------------------------------------------------------------------------
# watch


@some
@given(SEED, st.integers(1, 20), st.integers(1, 24))
def test_what_watch_sees(model, seed, steps, unknown):
    """One call a step: all that was to be drawn is masked at first, less each time; the ids that it
    sees are whole, and those that are not masked are the final ones."""
    seen, ids = [], masked_grid(seed, 2, 4, 6, unknown, model)
    schedule = replace(SCHEDULE, steps=steps)
    cond, uncond = conditionings(model, 2, seed)
    done = draw(model, ids, [seed, 1], cond, uncond, schedule, watch=lambda *a: seen.append(a))
    assert [n for n, _, _, _ in seen] == list(range(min(steps, unknown)))
    masked_before = ids == MASK
    for _, believed, masked, _ in seen:
        now = torch.zeros(2, 24, dtype=torch.bool).scatter(1, masked, True).view(2, 4, 6)
        assert (now <= masked_before).all()
        assert believed.max() < CODES and (believed[~now] == done[~now]).all()
        masked_before = now
    assert torch.equal(seen[0][2], meissonic.masked_positions(ids.flatten(1), MASK))
    assert torch.equal(seen[-1][1], done)
    assert torch.equal(draw(model, ids, [seed, 1], cond, uncond, schedule), done)


# -------------------------------------------------------------------------------------------------
# Re-masking


@pytest.mark.slow
def test_remasking_mends_what_was_drawn_blindly(pictures=80, side=4):
    """A world whose pictures have one colour. In four steps the tokens of a step do not know of
    each other, and few pictures have one colour. Drawn again beside the others nearly all do, and
    mostly the one that they had before."""
    def majority(step, ids, masked):
        lead = ((ids == 1).sum((1, 2)) - (ids == 0).sum((1, 2))) / 2                        # (B,)
        sign = torch.tensor([-1, 1]).expand(*masked.shape, 2)                           # (B, M, 2)
        return lead[:, None, None] * sign

    ids = torch.full((pictures, side, side), 2)
    plan, seeds = replace(SCHEDULE, steps=4).plan(16, 16), range(pictures)
    unknown = torch.arange(16).expand(pictures, -1)
    once = meissonic.sample(majority, ids, 2, seeds, plan)
    mended = rerank.remask(majority, once, unknown, 2, seeds, plan, 10)
    ones, ones_mended = (x.float().mean((1, 2)) for x in (once, mended))                    # (B,)
    whole, whole_mended = (((x == 0) | (x == 1)).float().mean() for x in (ones, ones_mended))
    assert whole < 0.6 and whole_mended > 0.95 and abs(ones_mended.mean() - 0.5) < 0.1
    clear = (ones - 0.5).abs() > 0.25
    assert ((ones > 0.5) == (ones_mended > 0.5))[clear].float().mean() > 0.9


def test_no_two_draws_share_their_noise(model):
    """Each step of each pass has a number of its own."""
    numbers, cond = [], conditionings(model, 1)[0]
    predict = meissonic.reference_predictor(model, cond, None)

    def noted(step, ids, masked):
        numbers.append(step.number)
        return predict(step._replace(cfg_scale=1), ids, masked)

    plan = SCHEDULE.plan(16, 16)
    ids = meissonic.sample(noted, all_masked(1), MASK, [0], plan)
    rerank.remask(noted, ids, torch.arange(16)[None], MASK, [0], plan, 3)
    assert len(numbers) > len(plan) and numbers == list(range(len(numbers)))


# -------------------------------------------------------------------------------------------------
# Likelihoods and saliency


@pytest.mark.parametrize("convention", RATE_CONDITIONS)
def test_likelihoods(model, convention):
    """With all masked they are the model's log-probabilities; a rate of a half leaves half of the
    ids out; the answer is the same in each call."""
    g = generator()
    conds = [random_conditioning(g, 2, model) for _ in range(2)]
    ids = torch.randint(CODES, (2, 6, 4), generator=g)
    found = rerank.log_likelihoods(model, ids, conds, (1.0, 0.5), convention)      # (2, R, B, N)
    assert found.shape == (2, 2, 2, 24)
    timestep = torch.tensor([47.0 if convention == "step" else
                             1.0 if convention == "rate" else 1000.0])
    for cond, whole in zip(conds, found[:, 0]):
        logits = model(all_masked(2, 6, 4), cond.hidden, cond.pooled, cond.micro_conds, timestep)
        log_p = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].flatten(1)
        torch.testing.assert_close(whole, log_p, rtol=1e-4, atol=1e-5)
    half = found[:, 1]
    assert (half.isnan().sum(-1) == 12).all() and half.nan_to_num().max() <= 0
    again = rerank.log_likelihoods(model, ids, conds, (1.0, 0.5), convention)
    assert torch.equal(found.nan_to_num(9), again.nan_to_num(9))


def test_the_mean_over_rates():
    """Of the rates at which an id was masked; 0 where none masked it."""
    nan = float("nan")
    log_p = torch.tensor([[[-1.0, -2, nan]], [[-3, nan, nan]]])                         # (R, 1, 3)
    assert rerank.mean_over_rates(log_p).tolist() == [[-2, -2, 0]]


@pytest.mark.parametrize("convention", RATE_CONDITIONS)
def test_saliency(model, convention):
    """Nothing between equal captions, the opposite the other way round, and each picture's own."""
    old, new = conditionings(model, 2)
    ids = torch.randint(CODES, (2, 6, 4), generator=generator())
    found = rerank.token_saliency(model, ids, old, new, convention)
    assert found.shape == ids.shape and found.isfinite().all() and found.abs().max() > 0.01
    assert rerank.token_saliency(model, ids, old, old, convention).abs().max() == 0
    back = rerank.token_saliency(model, ids, new, old, convention)
    torch.testing.assert_close(back, -found)
    order = [1, 0]
    swapped = rerank.token_saliency(model, ids[order], old.rows(order), new.rows(order), convention)
    torch.testing.assert_close(swapped[order], found, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# The best of several candidates


@given(st.lists(st.text("ab,", min_size=1, max_size=3), max_size=40))
@settings(deadline=None)
def test_a_prompt_without_each_of_its_parts(words):
    """Each part is left out once, alone. A part is one word as long as there are not too many."""
    rest = [prompt.split() for prompt in rerank.ablated_prompt("  ".join(words))]
    assert len(rest) == min(len(words), MAX_ABLATIONS)
    start = 0
    for kept in rest:
        stop = start + len(words) - len(kept)
        assert stop > start and kept == words[:start] + words[stop:]
        start = stop
    assert start == len(words)


def test_a_prompt_that_has_fewer_parts_is_whole():
    found = rerank.ablated_prompts(["a b", "", "c"])
    assert found == [["b", "", ""], ["a", "", "c"]]
    assert rerank.ablated_prompts([""]) == []


def test_the_candidates_of_a_seed():
    """64-bit seeds, all different, the 0th the picture's own; neighbours share none."""
    for seed in (0, -7, 2 ** 63 - 1, -2 ** 63):
        assert rerank.candidate_seed(seed, 0) == seed
    found = {rerank.candidate_seed(seed, k) for seed in range(100) for k in range(50)}
    assert len(found) == 5000 and all(-2 ** 63 <= seed < 2 ** 63 for seed in found)


def explicit_score(model, ids, cond, ablated):
    """rerank_score of one picture, spelt out."""
    def mean(cond, rates):
        log_p = rerank.log_likelihoods(model, ids, (cond,), rates, "rate")[0]
        return rerank.mean_over_rates(log_p).mean()

    score = mean(cond, RATES)
    told = mean(cond, RATES[:ABLATED_RATES])
    for without in ablated:
        score = score - 4 * F.relu(mean(without, RATES[:ABLATED_RATES]) - told)
    return score


@pytest.mark.parametrize("max_tokens", [4096, 40])
def test_the_candidate_of_the_best_score_is_kept(model, monkeypatch, max_tokens):
    """Each candidate is the picture of its own seed, in whatever batches they are drawn."""
    monkeypatch.setattr(rerank, "MAX_TOKENS", max_tokens)
    cond, uncond = conditionings(model, 2)
    ablated, seeds = [conditionings(model, 2, s)[0] for s in (5, 6)], [5, 2 ** 63 - 1]
    batches = []

    def fill(ids, cond, uncond, seeds):
        batches.append(len(ids))
        return draw(model, ids, seeds, cond, uncond)

    found = rerank.best_of(3, fill, model, all_masked(2), cond, uncond, seeds, ablated, "rate")
    assert batches == ([6] if max_tokens == 4096 else [2, 2, 2])
    places = []
    for i, seed in enumerate(seeds):
        drawn, scores = [], []
        for k in range(3):
            one = [cond.rows([i]), uncond.rows([i])]
            drawn.append(draw(model, all_masked(1), [rerank.candidate_seed(seed, k)], *one)[0])
            without = [c.rows([i]) for c in ablated]
            scores.append(explicit_score(model, drawn[-1][None], cond.rows([i]), without))
        places.append(torch.stack(scores).argmax().item())
        assert torch.equal(found[i], drawn[places[-1]])
    assert any(places)                                       # not simply the first of each


def test_ablated_prompts_lower_a_score_and_never_raise_it(model):
    cond, _ = conditionings(model, 3)
    ids = torch.randint(CODES, (3, 4, 4), generator=generator())
    alone = rerank.rerank_score(model, ids, cond, [], "rate")
    others = [conditionings(model, 3, s)[0] for s in (5, 6)]
    compared = rerank.rerank_score(model, ids, cond, others, "rate")
    assert (compared <= alone).all() and (compared < alone).any()
    torch.testing.assert_close(rerank.rerank_score(model, ids, cond, [cond], "rate"), alone)


# -------------------------------------------------------------------------------------------------
# What the pipeline tells the models


@pytest.mark.parametrize("kind", KINDS_OF_MODELS)
def test_the_pipeline_tells_the_model_the_size(kind, monkeypatch):
    """Micro conditions: width, height, no crop, score. The ids have as many rows as the height
    asks for."""
    seen = []

    def noted(model, cond, uncond, plan):
        seen.extend([cond, uncond])
        return predictor(model, cond, uncond, plan)

    predictor = fast.predictor
    monkeypatch.setattr(fast, "predictor", noted)
    pipe = Pipeline(GOLDEN / kind)
    schedule = replace(SCHEDULE, steps=1)
    ids = pipe.draw(["a star"], [0], size=(96, 64), score=4.5, schedule=schedule)
    assert ids.shape == (1, 64 // pipe.f, 96 // pipe.f)
    assert [c.micro_conds.tolist() for c in seen] == 2 * [[[96, 64, 0, 0, 4.5]]]
    image, = pipe.decode(ids)
    assert image.size == (96, 64)


def test_the_decoder_is_never_float16():
    """The published one overflows."""
    pipe = Pipeline(GOLDEN_MODEL, dtype=torch.float16)
    for model, dtype in ((pipe.vq, torch.float32), (pipe.transformer, torch.float16),
                         (pipe.text_encoder, torch.float16)):
        assert {p.dtype for p in model.parameters()} == {dtype}
