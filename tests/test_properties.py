"""What holds for every size, seed and schedule."""
import math
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import GOLDEN, random_text, tiny_transformer
from hypothesis import example, given, settings
from hypothesis import strategies as st

import clip
import data
import kernels
import meissonic
import train
import vq
from kernels.sampling import philox

settings.register_profile("here", deadline=None, max_examples=25)
settings.load_profile("here")

SEED = st.integers(0, 2 ** 32 - 1)
ANY_SEED = st.integers(-2 ** 63, 2 ** 63 - 1)
SCHEDULE = st.sampled_from(("cosine", "linear"))


@lru_cache(maxsize=None)
def model_of(downsample=True):
    return tiny_transformer(downsample)


@lru_cache(maxsize=None)
def golden_vq():
    return vq.VQModel.from_pretrained(GOLDEN / "plain" / "vqvae")


@lru_cache(maxsize=None)
def world_tokenizer():
    return train.train_tokenizer(train.world_captions(0, 3000), 32)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def masked_grid(seed, batch, h, w, unknown, model):
    """(batch, h, w) random codes, `unknown` of them in each picture replaced by the mask token."""
    g = generator(seed)
    tokens = torch.randint(model.config.codebook_size, (batch, h * w), generator=g)
    where = torch.rand(batch, h * w, generator=g).argsort(1)[:, :unknown]
    return tokens.scatter_(1, where, model.config.mask_token).view(batch, h, w)


# ---------------------------------------------------------------------------------------------------------
# Training masks


def kolmogorov_smirnov(values, cdf):
    """The largest distance between the empirical distribution of `values` and `cdf`."""
    values = np.sort(values)
    n, want = len(values), cdf(values)
    return max((np.arange(1, n + 1) / n - want).max(), (want - np.arange(n) / n).max())


@settings(max_examples=5)
@given(SEED)
def test_mask_rates_have_the_arccos_density(seed):
    """P(r < x) = 2/pi arcsin(x). 2.5 / sqrt(n) is exceeded with probability 7e-6; rounding to counts is undone by a
    uniform shift, but for the half of a count that is cut off at the steep end."""
    rng, batch, tokens = np.random.default_rng(seed), 10_000, 1024
    rates = np.concatenate([train.sample_mask(rng, 250, tokens)[1] for _ in range(batch // 250)])
    cdf = lambda x: 2 / np.pi * np.arcsin(np.clip(x, 0, 1))
    continuous = np.clip(rates + (rng.random(batch) - 0.5) / tokens, 0, 1)            # undo the rounding
    assert kolmogorov_smirnov(continuous, cdf) < 2.5 / math.sqrt(batch) + (1 - cdf(1 - 0.5 / tokens))


@given(SEED, st.integers(1, 40), st.integers(1, 200))
def test_mask_counts(seed, batch, tokens):
    """As many as the rate rounds to, at least one, the rate truncated to (0, 1]."""
    mask, rates = train.sample_mask(np.random.default_rng(seed), batch, tokens)
    assert mask.shape == (batch, tokens) and mask.dtype == bool and rates.shape == (batch,)
    assert (mask.sum(1) >= 1).all() and (rates <= 1).all()
    assert np.array_equal(mask.sum(1), np.round(rates * tokens)) and np.allclose(rates, mask.sum(1) / tokens)


@given(SEED, st.integers(1, 200))
def test_counts_round_the_drawn_rate(seed, tokens):
    r = np.cos(np.pi / 2 * np.random.default_rng(seed).random(16))                    # the generator's first draw
    mask, _ = train.sample_mask(np.random.default_rng(seed), 16, tokens)
    assert (np.abs(mask.sum(1) - np.maximum(r * tokens, 1)) <= 0.5).all()


def test_every_position_is_masked_equally_often(batch=20_000, tokens=16):
    mask, rates = train.sample_mask(np.random.default_rng(0), batch, tokens)
    spread = np.abs(mask.mean(0) - rates.mean())
    assert spread.max() < 5 * math.sqrt(0.25 / batch)


# ---------------------------------------------------------------------------------------------------------
# Shapes


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), SEED)
def test_compression_shapes(h, w, batch, seed):
    model = model_of()
    tokens = masked_grid(seed, batch, 2 * h, 2 * w, 1, model)
    x, grid = model.embed_image(tokens)
    assert x.shape == (batch, h * w, model.config.width) and tuple(grid) == (h, w)
    text = random_text(generator(seed), batch, model)
    logits = model(tokens, text.hidden, text.pooled, text.micro_conds, torch.zeros(1))
    assert logits.shape == (batch, 2 * h, 2 * w, model.config.codebook_size) and logits.isfinite().all()


@given(st.integers(1, 9), st.integers(1, 9))
def test_odd_grids(h, w):
    """Refused by name with compression, fine without."""
    for model in (model_of(True), model_of(False)):
        text = random_text(generator(0), 1, model)
        run = lambda: model(torch.zeros(1, h, w, dtype=torch.int64), text.hidden, text.pooled, text.micro_conds, torch.zeros(1))
        if model.config.compression == 2 and (h % 2 or w % 2):
            with pytest.raises(ValueError, match=f"{h}x{w}"):
                run()
        else:
            assert run().shape == (1, h, w, model.config.codebook_size)


@given(st.integers(5, 33), st.integers(5, 33))
def test_vq_shapes(height, width):
    model = golden_vq()
    f = model.config.f
    images = torch.rand(1, 3, height, width)
    if height % f or width % f:
        with pytest.raises(ValueError, match=f"{width}x{height}"):
            model.encode(images)
    else:
        tokens = model.encode(images)
        assert tokens.shape == (1, height // f, width // f) and tokens.dtype == torch.int64
        assert model.decode(tokens).shape == images.shape


# ---------------------------------------------------------------------------------------------------------
# The schedule


@settings(max_examples=200)
@example(10, 10, "linear")
@given(st.integers(1, 300), st.one_of(st.integers(1, 300), st.integers(1, 5000)), SCHEDULE)
def test_schedule(steps, tokens, schedule):
    """Something is revealed by every step while anything is masked, all is known after the last, and not before
    unless there are more steps than tokens."""
    counts = meissonic.masked_counts(steps, tokens, schedule)
    reveals = [a - b for a, b in zip([tokens] + counts, counts)]
    assert len(counts) == steps and all(type(c) is int for c in counts)
    assert all(r >= 1 or before == 0 for r, before in zip(reveals, [tokens] + counts))
    assert counts[-1] == 0 and sum(reveals) == tokens and min(reveals) >= 0
    assert steps > tokens or all(counts[:-1])


@given(st.integers(1, 60), st.integers(1, 2000))
def test_cosine_schedule_follows_its_formula(steps, tokens):
    """Within the one token that float32 may round away, wherever no step had to be forced to reveal."""
    counts = meissonic.masked_counts(steps, tokens)
    exact = [tokens * math.cos(math.pi / 2 * (i + 1) / steps) for i in range(steps)]
    for i, (count, share) in enumerate(zip(counts, exact)):
        free = tokens if i == 0 else counts[i - 1]
        assert count <= share + 1e-3 * tokens or count <= 1
        assert count >= math.floor(share - 1e-3) or count == max(free - 1, 0)


@pytest.mark.parametrize("steps, tokens, schedule", ((0, 5, "cosine"), (-1, 5, "cosine"), (5, 0, "linear"), (5, 5, "spiral")))
def test_schedules_that_make_no_sense(steps, tokens, schedule):
    with pytest.raises(ValueError):
        meissonic.masked_counts(steps, tokens, schedule)


@given(st.integers(1, 64), st.integers(1, 4096), st.data())
def test_timestep_conventions(steps, tokens, draw):
    step, masked = draw.draw(st.integers(0, steps - 1)), draw.draw(st.integers(1, tokens))
    level = round(1000 * masked / tokens)
    assert meissonic.timestep("step", step, steps, masked, tokens) == steps - 1 - step
    assert meissonic.timestep("rate", step, steps, masked, tokens) == level / 1000
    assert meissonic.timestep("rate1000", step, steps, masked, tokens) == level


def test_timestep_of_a_convention_that_does_not_exist():
    with pytest.raises((KeyError, ValueError)):
        meissonic.timestep("rates", 0, 8, 4, 4)


# ---------------------------------------------------------------------------------------------------------
# Sampling


def draw_pictures(model, tokens, seeds, text_seed=0, **options):
    text = random_text(generator(text_seed), len(tokens), model)
    negative = random_text(generator(text_seed + 1), len(tokens), model)
    return meissonic.sample(model, text, negative, tokens, seeds, **{"steps": 5, "guidance": 2.0, **options})


@given(SEED, st.integers(1, 3), st.integers(1, 3), st.data())
def test_sampling_fills_in_the_mask_alone(seed, h, w, draw):
    """Known tokens never change, none is masked at the end, and the counts of the schedule are what is revealed."""
    model, total = model_of(), 4 * h * w
    unknown, steps, redraws = draw.draw(st.integers(1, total)), draw.draw(st.integers(1, 9)), draw.draw(st.integers(0, 2))
    schedule, convention = draw.draw(SCHEDULE), draw.draw(st.sampled_from(("step", "rate", "rate1000")))
    tokens = masked_grid(seed, 2, 2 * h, 2 * w, unknown, model)
    start, mask, seen = tokens.clone(), model.config.mask_token, []
    run = model.run
    model.run = lambda t, *rest: (seen.append((t == mask).flatten(1).sum(1).tolist()), run(t, *rest))[1]
    try:
        out = draw_pictures(model, tokens, [seed, seed + 1], steps=steps, schedule=schedule, convention=convention, redraws=redraws)
    finally:
        del model.run
    assert torch.equal(tokens, start)                                             # the caller's tokens are untouched
    assert torch.equal(out[start != mask], start[start != mask])
    assert (out >= 0).all() and (out < model.config.codebook_size).all()
    before = [n for n in [unknown] + meissonic.masked_counts(steps, unknown, schedule) if n]
    before = before[:steps]
    again = [n for n in before if 4 * n <= unknown] or before[-1:]                # a quarter of what was drawn, or the least there is
    assert [s[0] for s in seen] == before + redraws * again
    assert all(s == [s[0]] * 4 for s in seen)                                     # both pictures, both passes


@pytest.mark.parametrize("batch", (1, 3))
def test_pictures_without_a_mask_stay_as_they_are(batch):
    tokens = torch.randint(40, (batch, 4, 4), generator=generator(0))
    assert torch.equal(draw_pictures(model_of(), tokens, range(batch)), tokens)


def test_unequal_masks_in_a_batch_are_refused():
    model = model_of()
    tokens = torch.full((2, 2, 2), model.config.mask_token)
    tokens[0, 0, 0] = 1
    with pytest.raises(ValueError, match="equal"):
        draw_pictures(model, tokens, [0, 1])


@given(SEED, ANY_SEED)
def test_same_seed_same_picture(text_seed, seed):
    model = model_of()
    tokens = torch.full((1, 4, 4), model.config.mask_token)
    first, again, other = (draw_pictures(model, tokens, [s], text_seed) for s in (seed, seed, seed ^ 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_prompts_matter():
    """Guards the tests of independence: other conditions do give other pictures."""
    model = model_of()
    tokens = torch.full((1, 4, 4), model.config.mask_token)
    assert not torch.equal(draw_pictures(model, tokens, [3], 1), draw_pictures(model, tokens, [3], 10))


@given(SEED, st.integers(2, 4), st.data())
def test_neighbours_do_not_matter(seed, batch, draw):
    """Picture i stays when every other picture of the batch gets another seed and other texts, or changes places."""
    model, g, draws = model_of(), generator(seed), draw.draw(st.integers(0, 2))
    tokens = torch.full((batch, 4, 4), model.config.mask_token)
    seeds = torch.randint(-2 ** 62, 2 ** 62, (batch,), generator=g)
    text, negative, others = (random_text(g, batch, model) for _ in range(3))
    run = lambda t, n, s: meissonic.sample(model, t, n, tokens, s, 5, 2.0, redraws=draws)
    alone = draw.draw(st.integers(0, batch - 1))
    mixed = lambda a: meissonic.Text(*(torch.where((torch.arange(batch) == alone).view(-1, *[1] * (x.dim() - 1)), x, y)
                                       for x, y in zip(vars(a).values(), vars(others).values())))
    whole = run(text, negative, seeds)
    replaced = run(mixed(text), mixed(negative), torch.where(torch.arange(batch) == alone, seeds, seeds + 1))
    assert torch.equal(whole[alone], replaced[alone]) and not torch.equal(whole, replaced)
    order = torch.tensor(draw.draw(st.permutations(range(batch))))
    assert torch.equal(run(text.rows(order), negative.rows(order), seeds[order]), whole[order])


@pytest.mark.parametrize("temperature", ((2.0, 0.0), (0.5, 4.0)))
@pytest.mark.parametrize("steps", (1, 2, 7))
def test_temperature_and_counts_of_each_step(monkeypatch, steps, temperature):
    """The temperature goes linearly from the first step's to the last's; one step uses the first."""
    seen, remask = [], kernels.remask
    monkeypatch.setattr(kernels, "remask", lambda p, l, n, heat, count: (seen.append((heat, count)), remask(p, l, n, heat, count))[1])
    tokens = torch.full((1, 4, 4), model_of().config.mask_token)
    draw_pictures(model_of(), tokens, [0], steps=steps, temperature=temperature)
    heats, counts = zip(*seen)
    assert np.allclose(heats, np.linspace(*temperature, steps)) and list(counts) == meissonic.masked_counts(steps, 16)


def test_redraws_mend_what_was_drawn_blindly(monkeypatch, pictures=200, side=4):
    """A world whose pictures have one colour. In four steps tokens of the same step do not know of each other, and few
    pictures are whole; drawn again beside the others, all come to be, in each colour as often."""
    model = SimpleNamespace(config=SimpleNamespace(mask_token=2), mlm_layer=SimpleNamespace(conv2=SimpleNamespace(weight=torch.eye(2)[..., None, None])))
    def majority(model, text, negative, times, guidance):
        lead = lambda tokens: ((tokens == 1).sum((1, 2)) - (tokens == 0).sum((1, 2))) / 2                    # (B,)
        return lambda i, tokens, positions: lead(tokens)[:, None, None] * torch.tensor([-1, 1]).expand(*positions.shape, 2)
    monkeypatch.setattr(meissonic, "fast_path", majority)
    ones = [meissonic.sample(model, None, None, torch.full((pictures, side, side), 2), range(pictures), 4, redraws=n).float().mean((1, 2))
            for n in (0, 20)]                                                                               # (B,) each
    whole = [((x == 0) | (x == 1)).float().mean().item() for x in ones]
    assert whole[0] < 0.6 and whole[1] > 0.95 and abs(ones[1].mean() - 0.5) < 0.1
    assert ((ones[0] > 0.5) == (ones[1] > 0.5))[(ones[0] - 0.5).abs() > 0.25].float().mean() > 0.9          # mended, not made anew


@given(SEED, st.integers(1, 50), st.data())
def test_remask_takes_the_lowest(seed, masked, draw):
    g, count = generator(seed), draw.draw(st.integers(0, masked))
    heat = draw.draw(st.floats(0, 5))
    positions = torch.stack([torch.randperm(100, generator=g)[:masked] for _ in range(2)])
    logp, noise = torch.randn(2, 2, masked, generator=g)
    chosen = kernels.remask(positions, logp, noise, heat, count)
    assert chosen.shape == (2, count)
    for row, p, confidence in zip(chosen, positions, logp + heat * noise):
        picked = torch.isin(p, row)
        assert picked.sum() == count
        if 0 < count < masked:
            assert confidence[picked].max() <= confidence[~picked].min()


# ---------------------------------------------------------------------------------------------------------
# Guidance


def guidance_inputs(seed, model, batch=2):
    g = generator(seed)
    tokens = masked_grid(seed, batch, 4, 4, 9, model)
    positions = torch.stack([(t == model.config.mask_token).nonzero()[:, 0] for t in tokens.flatten(1)])
    return tokens, positions, random_text(g, batch, model), random_text(g, batch, model)


def full_logits(model, tokens, positions, text, time):
    logits = model(tokens, text.hidden, text.pooled, text.micro_conds, torch.tensor([time])).flatten(1, 2)
    return logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


def guided_logits(model, tokens, positions, text, negative, time, scale):
    return model.mlm_layer.conv2(meissonic.fast_path(model, text, negative, [time], scale)(0, tokens, positions))


@given(SEED, st.floats(-2, 12), st.sampled_from((0.0, 0.5, 7.0)))
def test_guidance(seed, scale, time):
    """u + g (c - u) of the logits of two separate passes; the code forms it before the last projection."""
    model = model_of()
    tokens, positions, text, negative = guidance_inputs(seed, model)
    c, u = (full_logits(model, tokens, positions, t, time) for t in (text, negative))
    guided = guided_logits(model, tokens, positions, text, negative, time, scale)
    torch.testing.assert_close(guided, u + scale * (c - u), rtol=1e-4, atol=2e-4)
    assert not torch.allclose(c, u, atol=1e-2)


@given(SEED)
def test_guidance_one_is_the_conditional_pass(seed):
    model = model_of()
    tokens, positions, text, negative = guidance_inputs(seed, model)
    guided = guided_logits(model, tokens, positions, text, negative, 3.0, 1.0)
    torch.testing.assert_close(guided, full_logits(model, tokens, positions, text, 3.0), rtol=1e-4, atol=1e-4)
    near = guided_logits(model, tokens, positions, text, negative, 3.0, 1.0 + 1e-6)
    torch.testing.assert_close(guided, near, rtol=1e-3, atol=1e-3)                # nothing jumps at 1


@given(SEED)
def test_guidance_one_does_not_see_the_negative(seed):
    model = model_of()
    tokens = torch.full((1, 4, 4), model.config.mask_token)
    text, one, other = (random_text(generator(seed + i), 1, model) for i in range(3))
    a, b = (meissonic.sample(model, text, n, tokens, [seed], 4, 1.0) for n in (one, other))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------
# Rotary positions, through the attention that the model calls


AXES = (2, 6, 8)


def attend(seed, cos, sin):
    """Attention of random image rows without text -> (1, N, H * D)."""
    g, n, d = generator(seed), len(cos), sum(AXES)
    image = torch.randn(1, n, 3, 2, d, generator=g)
    norms = torch.rand(2, d, generator=g) + 0.5
    return kernels.attention(image[:, :0], image, tuple(norms), tuple(norms), cos, sin)


@given(SEED, st.integers(0, 8), st.integers(0, 8))
def test_rope_keeps_norms(seed, row, column):
    """With all rows at one position the rotation cancels from every product of q and k."""
    n = 5
    cos, sin = meissonic.rope_table(9, 9, AXES, torch.device("cpu"))
    here = row * 9 + column
    at = lambda table: table[here].expand(n, -1).contiguous()
    still = attend(seed, torch.ones(n, sum(AXES) // 2), torch.zeros(n, sum(AXES) // 2))
    torch.testing.assert_close(attend(seed, at(cos), at(sin)), still, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cos ** 2 + sin ** 2, torch.ones_like(cos))


@given(SEED, st.integers(0, 20), st.integers(0, 20), st.integers(1, 3), st.integers(2, 3))
def test_rope_depends_on_relative_positions_alone(seed, down, right, h, w):
    """A window of a large grid gives what the same window at the origin gives."""
    cos, sin = (t.view(24, 24, -1) for t in meissonic.rope_table(24, 24, AXES, torch.device("cpu")))
    window = lambda t, r, c: t[r:r + h, c:c + w].reshape(h * w, -1)
    origin = attend(seed, window(cos, 0, 0), window(sin, 0, 0))
    moved = attend(seed, window(cos, down, right), window(sin, down, right))
    torch.testing.assert_close(moved, origin, rtol=1e-4, atol=2e-5)
    mirrored = attend(seed, window(cos, 0, 0).flip(0), window(sin, 0, 0))
    assert not torch.allclose(mirrored, origin, atol=1e-4)


@pytest.mark.parametrize("h, w", ((1, 1), (3, 5), (32, 32), (48, 20)))
def test_rope_table(h, w, axes=(16, 56, 56)):
    """Position (0, row, column), 10000 ** (-2 i / d) radians for pair i of each axis."""
    cos, sin = meissonic.rope_table(h, w, axes, torch.device("cpu"))
    assert cos.shape == sin.shape == (h * w, 64) and cos.dtype == torch.float32
    for position in {0, h * w // 2, h * w - 1}:
        place = (0, position // w, position % w)
        angles = [p * 10000 ** (-2 * i / d) for p, d in zip(place, axes) for i in range(d // 2)]
        assert np.allclose(cos[position], np.cos(angles), atol=1e-6) and np.allclose(sin[position], np.sin(angles), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# Round trips


def words_of(tokenizer, ids):
    """Token ids -> text, word ends to spaces, special tokens left out."""
    special = {tokenizer.start, tokenizer.end, tokenizer.pad}
    return "".join(tokenizer.bpe.id_to_token(i) for i in ids if i not in special).replace("</w>", " ").strip()


@given(SEED)
def test_tokenizer_round_trip(seed):
    rng, tokenizer = np.random.default_rng(seed), world_tokenizer()
    text = data.caption(rng, data.sample_claim(rng))
    ids = tokenizer([text])[0].tolist()
    assert words_of(tokenizer, ids) == text.lower().replace(",", " ,")
    assert ids[0] == tokenizer.start and ids.count(tokenizer.start) == 1 and tokenizer.end in ids


@given(st.text(max_size=30))
def test_any_text_is_tokens(text):
    """Upper case and runs of white space do not matter; every row has the full length and one end."""
    tokenizer = clip.Tokenizer.from_pretrained(GOLDEN / "plain" / "tokenizer")
    ids, spaced = tokenizer([text, "  " + text.replace(" ", " \n\t ") + "  "])
    assert ids.shape == (77,) and ids.dtype == torch.int64 and torch.equal(ids, spaced)
    assert ids[0] == tokenizer.start and (ids == tokenizer.end).sum() == 1


def test_prompts_that_are_cut_say_what_was_dropped(capsys):
    tokenizer = world_tokenizer()
    words = [f"star{'s' * (i % 2)}" for i in range(40)]
    ids = tokenizer([" ".join(words), "a star"])
    dropped = capsys.readouterr().err
    assert dropped.count("dropped") == 1 and repr(" ".join(words[tokenizer.length - 2:])) in dropped
    assert ids[0, -1] == tokenizer.end and ids.shape == (2, tokenizer.length)


@given(SEED)
def test_codes_find_themselves(seed):
    model = golden_vq()
    tokens = torch.randint(64, (2, 3, 5), generator=generator(seed))
    assert torch.equal(model.tokens_of(model.vectors_of(tokens)), tokens)


@given(SEED, st.floats(0, 0.49))
def test_vectors_near_a_code_are_that_code(seed, share):
    """Anything nearer to a code than half its distance to the next belongs to it."""
    model, g = golden_vq(), generator(seed)
    book = model.quantize.embedding.weight
    gap = (torch.cdist(book, book) + 1e9 * torch.eye(len(book))).amin(1)
    tokens = torch.randint(64, (1, 4, 4), generator=g)
    push = torch.randn(1, len(book[0]), 4, 4, generator=g)
    push = push / push.norm(dim=1, keepdim=True) * share * gap[tokens][:, None]
    assert torch.equal(model.tokens_of(model.vectors_of(tokens) + push), tokens)


@given(SEED)
def test_nearest_is_nearest(seed):
    model, g = golden_vq(), generator(seed)
    book = model.quantize.embedding.weight
    latent = torch.randn(2, len(book[0]), 3, 3, generator=g) * book.std()
    distance = torch.cdist(latent.permute(0, 2, 3, 1).flatten(0, 2).double(), book.double())        # (M, V)
    chosen = distance.gather(1, model.tokens_of(latent).view(-1, 1))[:, 0]
    assert (chosen <= distance.amin(1) + 1e-6).all()


# ---------------------------------------------------------------------------------------------------------
# The draw


def chi_square(tokens, p):
    """Pearson's statistic of drawn tokens against probabilities p -> standard deviations above its mean. Codes that
    are expected fewer than 5 times count as one."""
    count, want = torch.bincount(tokens.flatten(), minlength=len(p)).double(), p * tokens.numel()
    often = want >= 5
    if not often.all():
        count, want = (torch.cat((x[often], x[~often].sum(0, keepdim=True))) for x in (count, want))
    freedom = len(want) - 1
    return (((count - want) ** 2 / want).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("codes, guidance, temperature", ((5, 1.0, 1.0), (300, 3.0, 1.0), (128, 1.0, 0.5)))
def test_draws_follow_the_softmax(codes, guidance, temperature, draws=100_000):
    """1e5 draws, guided and not, in one group of the kernel's and in several, against float64; 5 standard deviations
    of the chi-square statistic are exceeded with probability under 1e-4, and the seed is fixed."""
    g = generator(codes)
    c, u = 0.7 * torch.randn(2, codes, generator=g)
    expand = lambda x: x.expand(10, draws // 10, -1)
    positions = torch.arange(draws // 10).expand(10, -1)
    p = ((u + guidance * (c - u)).double() / temperature).softmax(0)
    other = dict(unconditional=expand(u), guidance=guidance) if guidance != 1 else {}
    tokens, logp = kernels.sample_masked(expand(c), positions, torch.arange(10), 3, temperature=temperature, **other)
    assert tokens.shape == logp.shape == (10, draws // 10) and logp.dtype == torch.float32
    assert chi_square(tokens, p) < 5
    torch.testing.assert_close(logp.double(), p.log()[tokens], rtol=0, atol=1e-5)


def test_rare_tokens_are_drawn_too(draws=50_000):
    """A code of probability 2e-4: about 10 of the draws."""
    logits = torch.tensor([0.0, math.log(2e-4)])
    tokens, _ = kernels.sample_masked(logits.expand(1, draws, 2), torch.arange(draws)[None], torch.tensor([0]), 0)
    assert 1 <= tokens.sum() <= 26                                # a Poisson of 10 is outside with probability 5e-5


@pytest.mark.parametrize("vary", ("seed", "step", "position"))
def test_draws_are_independent_of_each_other(vary, n=10_000):
    """Draws that differ in seed, step or position alone agree as often as independent ones."""
    logits = torch.zeros(1, n, 16)
    draw = lambda seed, step, first: kernels.sample_masked(logits, first + torch.arange(n)[None], torch.tensor([seed]), step)[0]
    a, b = draw(5, 2, 0), draw(*dict(seed=(6, 2, 0), step=(5, 3, 0), position=(5, 2, n))[vary])
    agree = (a == b).double().mean()
    assert abs(agree - 1 / 16) < 5 * math.sqrt(1 / 16 * 15 / 16 / n)


def test_confidence_noise_is_gumbel(n=100_000):
    """exp(-exp(-x)) of the noise is uniform, and it is not the noise of the draw."""
    noise = kernels.confidence_noise(torch.tensor([7]), 3, torch.arange(n)[None])[0]
    assert noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise.double())).numpy()
    assert kolmogorov_smirnov(uniform, lambda x: x) < 1.95 / math.sqrt(n)
    assert not torch.allclose(noise, kernels.confidence_noise(torch.tensor([7]), 4, torch.arange(n)[None])[0], atol=0.1)


@given(SEED, st.sampled_from((torch.float16, torch.bfloat16)))
def test_half_precision_logits_are_drawn_from_in_float32(seed, dtype):
    """The draw of 16-bit logits is the draw of the same numbers in float32, to the bit."""
    logits = (4 * torch.randn(2, 6, 200, generator=generator(seed))).to(dtype)
    positions, seeds = torch.arange(6).expand(2, 6), torch.tensor([seed, seed + 1])
    half, whole = (kernels.sample_masked(x, positions, seeds, 1) for x in (logits, logits.float()))
    assert torch.equal(half[0], whole[0]) and torch.equal(half[1], whole[1]) and half[1].dtype == torch.float32
    p = logits.double().log_softmax(-1).gather(-1, half[0][..., None])[..., 0]
    torch.testing.assert_close(half[1].double(), p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_models_sample(dtype, monkeypatch):
    """A whole run in 16 bits: log p reaches the schedule in float32, and the picture is complete."""
    seen, remask = [], kernels.remask
    monkeypatch.setattr(kernels, "remask", lambda p, logp, *rest: (seen.append(logp.dtype), remask(p, logp, *rest))[1])
    model = tiny_transformer().to(dtype)
    text, negative = (random_text(generator(i), 2, model) for i in (0, 1))
    cast = lambda t: meissonic.Text(t.hidden.to(dtype), t.pooled.to(dtype), t.micro_conds)
    out = meissonic.sample(model, cast(text), cast(negative), torch.full((2, 4, 4), 47), [1, 2], 4, 3.0)
    assert (out < 40).all() and set(seen) == {torch.float32}


def test_draws_of_probabilities_that_half_precision_cannot_hold(dtype=torch.float16):
    """8192 codes of which one has twice the weight of all others together: in float16 the sum of the others is lost."""
    logits = torch.zeros(1, 2000, 8192, dtype=dtype)
    logits[..., 7] = math.log(2 * 8191)
    tokens, _ = kernels.sample_masked(logits, torch.arange(2000)[None], torch.tensor([0]), 0)
    share = (tokens == 7).double().mean()
    exact = torch.tensor(math.log(2 * 8191)).half().double().exp()
    assert abs(share - exact / (exact + 8191)) < 5 * math.sqrt(2 / 9 / 2000)


@pytest.mark.parametrize("key, counter, word", (
    ((0, 0), (0, 0, 0, 0), 0x6627e8d5),
    ((0xffffffff,) * 2, (0xffffffff,) * 4, 0x408f276d),
    ((0xa4093822, 0x299f31d0), (0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344), 0xd16cfe09)))
def test_philox_known_answers(key, counter, word):
    """philox4x32-10 of Random123's kat_vectors; the first of its four words is what is used."""
    seed = key[0] | key[1] << 32
    seed -= 2 ** 64 if seed >= 2 ** 63 else 0
    assert philox(torch.tensor(seed), *(torch.tensor(c) for c in counter)).item() == word
