"""engine/orders.py: orders of revealing, changes of guidance, and fewer unconditional passes.

Letters: as in meissonic.py.
"""
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from common import generator, masked_grid, random_conditioning, tiny_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_comments import ShapeComments

import meissonic
from engine import fast, orders, rerank
from meissonic import Schedule

SEED = st.integers(0, 2 ** 32 - 1)
SIDE = st.integers(1, 12)
MASK = 47                                                    # the tiny models' mask token
CODES = 40
SCHEDULE = Schedule(6, 3.0, (2.0, 0.0), "cosine", "rate")
some = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer(downsample=False)


ORDERS = {"confidence": meissonic.confidence, "halton": orders.halton, "random": orders.random}


def random_predictor(seed):
    """Logits that depend on nothing but the seed and the position."""
    table = 3 * torch.randn(1, 400, CODES, generator=generator(seed))                  # (1, N, V)

    def predict(step, ids, masked):
        return table.expand(len(ids), -1, -1).gather(1, masked[..., None].expand(-1, -1, CODES))
    return predict


def run(ids, order, seeds, schedule=SCHEDULE, logits=0):
    """Sample -> (ids, [positions masked before each step, (B, M)])."""
    seen = []
    plan = schedule.plan(int((ids[0] == MASK).sum()), ids[0].numel())
    done = meissonic.sample(random_predictor(logits), ids, MASK, seeds, plan,
                            lambda n, ids, masked, logits: seen.append(masked), order)
    return done, seen


# -------------------------------------------------------------------------------------------------
# Orders


@some
@given(st.sampled_from(sorted(ORDERS)), SEED, SIDE, SIDE, st.data())
def test_every_order_fills_in_what_is_masked(model, name, seed, h, w, data):
    """In text to image and inpainting, on any grid, with the counts of the plan."""
    unknown = data.draw(st.integers(1, h * w))
    ids = masked_grid(seed, 2, h, w, unknown, model)
    done, seen = run(ids, ORDERS[name], [seed, seed + 1])
    assert torch.equal(done[ids != MASK], ids[ids != MASK]) and (done < CODES).all()
    counts = [unknown, *meissonic.masked_counts(SCHEDULE.steps, unknown)]
    assert [masked.shape[1] for masked in seen] == [c for c in counts[:SCHEDULE.steps] if c]


@some
@given(SEED, SIDE, SIDE, st.data())
def test_halton_reveals_in_its_order(model, seed, h, w, data):
    """What is masked before a step comes later in the sequence than what was revealed before it,
    whatever the logits and the seed."""
    ids = masked_grid(seed, 2, h, w, data.draw(st.integers(1, h * w)), model)
    ranks = orders.halton_ranks(h, w, ids.device)
    for masked in run(ids, orders.halton, [seed, 3], logits=seed)[1]:
        for row in range(2):
            unknown = set((ids[row].flatten() == MASK).nonzero()[:, 0].tolist())
            later = set(masked[row].tolist())
            revealed = unknown - later
            assert later <= unknown
            if revealed:
                assert max(ranks[list(revealed)]) < min(ranks[list(later)])


def mirrored(index, base):
    """The digits of an index, mirrored at the point."""
    value, weight = Fraction(0), Fraction(1, base)
    while index:
        index, digit = divmod(index, base)
        value += digit * weight
        weight /= base
    return value


@some
@given(SIDE, SIDE)
def test_the_halton_order_is_that_of_its_points(h, w):
    """Points one by one, in exact arithmetic: a cell's turn is when the first one falls into it."""
    found, index = [], 1
    while len(found) < h * w:
        cell = int(mirrored(index, 2) * h) * w + int(mirrored(index, 3) * w)
        if cell not in found:
            found.append(cell)
        index += 1
    assert orders.halton_ranks(h, w, torch.device("cpu")).argsort().tolist() == found


@pytest.mark.parametrize("h, w", [(1, 1), (1, 200), (200, 1), (64, 64), (63, 65), (128, 96)])
def test_the_halton_order_has_every_position_once(h, w):
    ranks = orders.halton_ranks(h, w, torch.device("cpu"))
    assert ranks.shape == (h * w,) and len(ranks.unique()) == h * w


def test_halton_spreads_the_first_tokens():
    """Each of 4 x 3 parts of a 16 x 18 grid has one of the first 12 tokens, but for the shift by
    the point 0, which the sequence leaves out."""
    first = orders.halton_ranks(16, 18, torch.device("cpu")).argsort()[:12]
    parts = {(int(i) // 18 // 4, int(i) % 18 // 6) for i in first}
    assert len(parts) >= 11


def test_a_random_order_is_the_seeds():
    """Not the logits'; each position is in the first third about equally often."""
    ids = torch.full((200, 2, 3), MASK)
    schedule = replace(SCHEDULE, steps=2)                     # reveals 2, then 4
    _, seen = run(ids, orders.random, range(200), schedule)
    _, other = run(ids, orders.random, range(200), schedule, logits=1)
    assert torch.equal(seen[1].sort(1)[0], other[1].sort(1)[0])
    revealed = 200 - torch.bincount(seen[1].flatten(), minlength=6)                       # (N,)
    assert revealed.sum() == 400 and ((revealed - 400 / 6).abs() < 4 * 6.7).all()


def test_the_default_order_is_confidence(model):
    ids = masked_grid(0, 2, 4, 5, 17, model)
    plan = SCHEDULE.plan(17, 20)
    default = meissonic.sample(random_predictor(0), ids, MASK, [1, 2], plan)
    assert torch.equal(default, run(ids, meissonic.confidence, [1, 2])[0])
    for name in ("halton", "random"):
        assert not torch.equal(default, run(ids, ORDERS[name], [1, 2])[0])


# -------------------------------------------------------------------------------------------------
# Guidance over the steps


EDITS = {
    "constant": lambda plan: orders.constant_guidance(plan, 5.0),
    "between": lambda plan: orders.guidance_between(plan, 0.25, 0.75),
    "growing": orders.growing_guidance}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_guidance_alone(name):
    plan = SCHEDULE.plan(20, 20)
    before = list(plan)
    edited = EDITS[name](plan)
    assert plan == before and edited != plan
    assert [step._replace(cfg_scale=3.0) for step in edited] == plan


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_scales_of_the_edits(steps):
    plan = replace(SCHEDULE, steps=steps).plan(20, 20)
    growing = [step.cfg_scale for step in orders.growing_guidance(plan)]
    assert sum(growing) / steps == pytest.approx(3) and growing == sorted(growing)
    assert growing[0] >= 1 and growing[-1] <= 5
    halves = [[step.cfg_scale for step in orders.guidance_between(plan, *part)]
              for part in ((0, 0.5), (0.5, 1))]
    assert all({a, b} == {1, 3} for a, b in zip(*halves))     # every step is in one half
    assert halves[0].count(3) == (steps + 1) // 2


# -------------------------------------------------------------------------------------------------
# Fewer unconditional passes


def counted(predict, calls):
    def count(step, ids, masked):
        calls.append(step.number)
        return predict(step, ids, masked)
    return count


def draw(model, seed, plan, every, passes=0, unknown=17):
    """-> (ids drawn with orders.guided, numbers of the steps with a conditional pass, and with an
    unconditional one)."""
    cond, uncond = (random_conditioning(generator(seed + i), 2, model) for i in (0, 1))
    ids = masked_grid(seed, 2, 4, 5, unknown, model)
    calls = [], []
    predict = orders.guided(counted(orders.unguided(model, cond, plan), calls[0]),
                            counted(orders.unguided(model, uncond, plan), calls[1]), every)
    done = meissonic.sample(predict, ids, MASK, [1, 2], plan)
    positions = meissonic.masked_positions(ids.flatten(1), MASK)
    return rerank.remask(predict, done, positions, MASK, [1, 2], plan, passes), *calls


@settings(max_examples=5, deadline=None)
@given(SEED, st.integers(0, 2))
def test_with_every_pass_it_is_the_fast_predictor(model, seed, passes):
    plan = SCHEDULE.plan(17, 20)
    cond, uncond = (random_conditioning(generator(seed + i), 2, model) for i in (0, 1))
    ids = masked_grid(seed, 2, 4, 5, 17, model)
    masked = meissonic.masked_positions(ids.flatten(1), MASK)
    ours = orders.guided(orders.unguided(model, cond, plan), orders.unguided(model, uncond, plan))
    for step in plan[:3]:
        torch.testing.assert_close(ours(step, ids, masked),
                                   fast.predictor(model, cond, uncond, plan)(step, ids, masked),
                                   rtol=1e-4, atol=1e-4)
    _, with_prompt, without = draw(model, seed, plan, 1, passes)
    assert with_prompt == without and len(without) >= len(plan)


def test_steps_with_an_unconditional_pass(model):
    """Every k-th from the beginning of each pass over the picture; none without guidance."""
    plan = SCHEDULE.plan(17, 20)
    numbers = list(range(len(plan)))
    for every in (1, 2, 3, 10):
        _, with_prompt, without = draw(model, 0, plan, every)
        assert with_prompt == numbers and without == numbers[::every]
    early = orders.guidance_between(plan, 0, 0.5)
    assert draw(model, 0, early, 1)[2] == [0, 1, 2] and draw(model, 0, early, 2)[2] == [0, 2]
    late = orders.guidance_between(plan, 0.5, 1)
    assert draw(model, 0, late, 1)[2] == [3, 4, 5] and draw(model, 0, late, 2)[2] == [3, 5]
    assert draw(model, 0, orders.constant_guidance(plan, 1.0), 1)[2] == []


@some
@given(SEED, st.integers(1, 12), st.integers(1, 6), st.integers(0, 3), st.integers(1, 24))
def test_reused_logits_are_of_the_same_positions(seed, steps, every, passes, unknown):
    """Also through re-masking. The unconditional logits say where and when they are from, and
    guidance at scale 2 of conditional logits of 0 shows them."""
    asked = []

    def conditional(step, ids, masked):
        return torch.zeros(*masked.shape, 2, dtype=torch.float64)

    def unconditional(step, ids, masked):
        asked.append((step.number, masked))
        return torch.stack((masked, torch.full_like(masked, step.number)), -1).double()

    reuse = orders.guided(conditional, unconditional, every)

    def predict(step, ids, masked):
        logits = -reuse(step, ids, masked)                    # 0 + 2 (0 - u) + u = -u
        assert torch.equal(logits[..., 0].long(), masked)
        age = step.number - logits[..., 1].long()
        assert (age >= 0).all() and (age < every).all() and (age == age[0, 0]).all()
        return torch.zeros(*masked.shape, CODES)

    plan = replace(SCHEDULE, steps=steps, cfg_scale=2.0).plan(unknown, 24)
    ids = torch.full((2, 4, 6), MASK).flatten(1)
    where = torch.rand(2, 24, generator=generator(seed)).argsort(1)
    ids = ids.scatter(1, where[:, unknown:], 0).view(2, 4, 6)
    positions = meissonic.masked_positions(ids.flatten(1), MASK)
    done = meissonic.sample(predict, ids, MASK, [seed, 5], plan)
    rerank.remask(predict, done, positions, MASK, [seed, 5], plan, passes)
    assert asked[0][0] == 0


def test_shape_comments_are_true(model):
    ids = torch.full((2, 3, 4), MASK)
    with ShapeComments(orders, V=CODES) as comments:
        run(ids, orders.halton, [0, 1])
        draw(model, 0, SCHEDULE.plan(17, 20), 2)
    assert not comments.wrong and not comments.unseen()
