"""The models compared with what the official implementation computed for two small checkpoints.

tests/golden holds the checkpoints, one with and one without compression layers, and the numbers.
"""
import math

import pytest
import torch
from common import GOLDEN, KINDS, expected, prompts

import clip
import kernels
import meissonic
import vq
from engine import fast


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def assert_close(actual, wanted):
    assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)


def assert_same_ids(actual, wanted):
    assert actual.dtype == wanted.dtype == torch.int64 and torch.equal(actual, wanted)


# -------------------------------------------------------------------------------------------------
# Models


def test_tokenizer(kind):
    tokenizer = clip.Tokenizer.from_pretrained(GOLDEN / kind / "tokenizer")
    assert_same_ids(tokenizer(prompts(kind)), expected(kind)["clip.input_ids"])


def test_text_encoder(kind):
    want = expected(kind)
    encoder = clip.TextEncoder.from_pretrained(GOLDEN / kind / "text_encoder")
    hidden, pooled = encoder(want["clip.input_ids"])
    assert_close(hidden, want["clip.hidden"])
    assert_close(pooled, want["clip.pooled"])


@pytest.mark.parametrize("n", (0, 1))
def test_vq_encoding(kind, n):
    want = expected(kind)
    model = vq.VQModel.from_pretrained(GOLDEN / kind / "vqvae")
    images = want[f"vq.{n}.image"]
    assert_close(model.encode_latents(images), want[f"vq.{n}.latent"])
    assert_same_ids(model.encode(images), want[f"vq.{n}.tokens"])


@pytest.mark.parametrize("strip", (vq.STRIP, 3000))
@pytest.mark.parametrize("n", (0, 1))
def test_vq_decoding(kind, n, strip, monkeypatch):
    """At once, and in strips of a few rows."""
    want = expected(kind)
    model = vq.VQModel.from_pretrained(GOLDEN / kind / "vqvae")
    monkeypatch.setattr(vq, "STRIP", strip)
    with torch.no_grad():
        assert_close(model.decode(want[f"vq.{n}.decode_tokens"]), want[f"vq.{n}.decoded"])


@pytest.mark.parametrize("n", (0, 1))
def test_transformer(kind, n, monkeypatch):
    """The CPU that computed the golden numbers rounded two of the 128 frequencies up where the
    nearest float32 is below. At timesteps up to 47,000 that changes the logits by 2e-4."""
    theirs = meissonic.sinusoid_frequencies("cpu").clone()
    theirs[[12, 106]] = theirs[[12, 106]].nextafter(torch.ones(2))
    monkeypatch.setattr(meissonic, "sinusoid_frequencies", lambda device: theirs)
    want = expected(kind)
    model = meissonic.Transformer.from_pretrained(GOLDEN / kind / "transformer")
    names = ("tokens", "hidden", "pooled", "micro_conds", "timestep")
    logits = model(*(want[f"tf.{n}.{name}"] for name in names))                     # (B, h, w, V)
    assert_close(logits.permute(0, 3, 1, 2), want[f"tf.{n}.logits"])


@pytest.mark.parametrize("n", (0, 1, 2))
def test_a_one_step_generator(n):
    """At timestep 0, with the noise and the sigma of the golden file."""
    want = expected("one_step")
    model = meissonic.Transformer.from_pretrained(GOLDEN / "compressed" / "transformer")
    noise = want[f"one.{n}.noise"].permute(0, 2, 3, 1)                              # (B, h, w, C)
    sigma = want[f"one.{n}.sigma"].item()
    names = ("hidden", "pooled", "micro_conds")
    cond = meissonic.Conditioning(*(want[f"one.{n}.{name}"] for name in names))
    for predictor in (meissonic.one_step_predictor, fast.one_step_predictor):
        logits = predictor(model, cond)(
            want[f"one.{n}.tokens"], lambda x: meissonic.perturb(x, noise, sigma))  # (B, N, V)
        assert_close(logits.mT.reshape_as(want[f"one.{n}.logits"]), want[f"one.{n}.logits"])


# -------------------------------------------------------------------------------------------------
# Sampling


def test_masked_counts(kind):
    want = {key: counts for key, counts in expected(kind).items() if key.startswith("schedule.")}
    assert len(want) == 30
    for key, counts in want.items():
        _, schedule, steps, tokens = key.split(".")
        ours = meissonic.masked_counts(int(steps), int(tokens), schedule)
        assert ours == counts.tolist(), key


def official_count(step, steps, tokens, masked):
    """Tokens masked after a step of the official loop. Computed here and not by masked_counts: the
    golden batches do not come from the steps before, so more tokens may be masked than planned."""
    if step == steps - 1:
        return 0
    count = math.floor(tokens * torch.tensor(math.pi / 2 * (step + 1) / steps).cos())      # float32
    return max(min(count, masked - 1), 1)


@pytest.mark.parametrize("time", (9, 4, 0))
def test_a_step_of_the_sampling_loop(kind, time, monkeypatch, steps=12):
    """With the official logits, draws and noise. The pictures of a golden batch have different
    numbers of masked tokens, so here each is a batch of one."""
    want = expected(kind)
    config = meissonic.Config.from_json(GOLDEN / kind / "transformer/config.json")
    names = ("logits", "in", "sampled", "uniform", "out")
    number = steps - 1 - time
    for picture in zip(*(want[f"step.{time}.{name}"].split(1) for name in names)):
        logits, before, drawn, uniform, after = picture       # (1, V, h, w), four (1, h, w)
        masked = int((before == config.mask_token).sum())
        count = official_count(number, steps, before.numel(), masked)
        temperature = 2 * (1 - number / (steps - 1))

        def sample_masked(logits, positions, seeds, step):
            codes = drawn.flatten(1).gather(1, positions)
            return codes, logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]

        def gumbel_noise(seeds, numbers, positions):
            return -torch.log(-torch.log(uniform.flatten(1)))[None]

        def predict(step, ids, positions):
            assert torch.equal(ids, before)
            return meissonic.gather_positions(logits.permute(0, 2, 3, 1), positions)
        monkeypatch.setattr(kernels, "sample_masked", sample_masked)
        monkeypatch.setattr(kernels, "gumbel_noise", gumbel_noise)
        step = meissonic.Step(number, float(time), temperature, 1.0, count)
        ids = meissonic.sample(predict, before, config.mask_token, [0], [step])
        assert_same_ids(ids, after)


@pytest.mark.parametrize("time", (9, 4))
def test_the_golden_steps_mask_tokens_again(kind, time):
    """The test above would prove little otherwise."""
    want = expected(kind)
    mask = meissonic.Config.from_json(GOLDEN / kind / "transformer/config.json").mask_token
    for before, after in zip(want[f"step.{time}.in"], want[f"step.{time}.out"]):
        assert 0 < (after == mask).sum() < (before == mask).sum() <= before.numel()
