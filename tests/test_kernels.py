"""The kernels' references, the choice of path, and two files that need a process of their own.

`test_kernels_interpreted.py` (Triton's interpreter) needs TRITON_INTERPRET=1 before triton is
imported, `test_kernels_compiled.py` (machine code for each chip) needs it unset. Both are started
from here.
"""
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import kernels
from kernels import sampling
from kernels._triton import no_launcher, triton
from kernels.attention import attention_by_head, attention_plain, one_pass

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")


# -------------------------------------------------------------------------------------------------
# Processes of their own


def python(*arguments, **environment):
    """Output of a Python process with these environment variables; None removes one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env = {name: value for name, value in env.items() if value is not None}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_triton
def test_interpreted():
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels_interpreted.py",
           TRITON_INTERPRET="1", MEISSONIC_KERNELS="triton")


def compiled(*chips):
    """{compute capability: number of kernels compiled for it}"""
    lines = python("tests/test_kernels_compiled.py", *chips, TRITON_INTERPRET=None).splitlines()
    return Counter(line.split()[0] for line in lines)


@needs_triton
def test_compiled():
    assert compiled("80")["80"] >= 15


@needs_triton
@pytest.mark.slow
def test_compiled_for_all_chips():
    chips = "75", "80", "86", "89", "90", "100", "120"
    counts = compiled(*chips)
    assert set(counts) == set(chips) and min(counts.values()) >= 15


@pytest.mark.slow
def test_without_triton():
    """As on macOS and Windows: everything imports, and there is a reason for the plain path."""
    script = "import sys; sys.modules['triton'] = None; import kernels; "
    report = script + "print(kernels.path('cpu'))"
    assert python("-c", report, MEISSONIC_KERNELS=None).strip() == "plain (cpu)"
    forced = script + "print(kernels.obstacle(None, None))"
    assert python("-c", forced, MEISSONIC_KERNELS="triton").strip() == "triton is not installed"


# -------------------------------------------------------------------------------------------------
# The choice

CUDA = torch.device("cuda", 0)


@pytest.fixture
def chip(monkeypatch):
    """chip(version) pretends a CUDA device of this compute capability."""
    monkeypatch.delenv("MEISSONIC_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)

    def pretend(version, launcher=lambda: None):
        monkeypatch.setattr(kernels, "capability", lambda device: version)
        monkeypatch.setattr(kernels, "no_launcher", launcher)

    return pretend


@needs_triton
@pytest.mark.parametrize("version, dtype, expected", [
    ((7, 0), torch.float16, "plain (compute capability 7.0 is below 7.5)"),
    ((7, 5), torch.float16, "triton (compute capability 7.5)"),
    ((7, 5), torch.bfloat16, "plain (bfloat16 needs compute capability 8.0, not 7.5)"),
    ((9, 0), torch.bfloat16, "triton (compute capability 9.0)"),
    ((9, 0), torch.float32, "triton (compute capability 9.0)"),
    ((9, 0), torch.float64, "plain (there is no kernel for float64)")])
def test_path(version, dtype, expected, chip, monkeypatch):
    chip(version)
    assert kernels.path(CUDA, dtype) == expected
    monkeypatch.setenv("MEISSONIC_KERNELS", "plain")
    assert kernels.path(CUDA, dtype) == "plain (MEISSONIC_KERNELS=plain)"
    monkeypatch.setenv("MEISSONIC_KERNELS", "triton")
    if expected.startswith("triton"):
        assert kernels.path(CUDA, dtype) == expected
        return
    with pytest.raises(RuntimeError, match="MEISSONIC_KERNELS=triton, but"):
        kernels.path(CUDA, dtype)


@needs_triton
def test_without_a_c_compiler_the_path_is_plain(chip, monkeypatch):
    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.\nSpecify one via CC.")

    chip((9, 0), no_launcher)
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    no_launcher.cache_clear()
    assert kernels.path(CUDA, torch.float16) == (
        "plain (Triton needs a C compiler and Python's headers (Failed to find C compiler.))")
    no_launcher.cache_clear()


def test_forcing(monkeypatch):
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setenv("MEISSONIC_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="not an NVIDIA GPU|not installed"):
        kernels.norm_modulate(torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.zeros(1, 4))
    monkeypatch.setenv("MEISSONIC_KERNELS", "fast")
    with pytest.raises(RuntimeError, match="auto, plain or triton"):
        kernels.path("cpu")


@pytest.mark.parametrize("version, dtype, expected", [
    ((7, 5), torch.float16, False), ((8, 0), torch.bfloat16, False), ((8, 6), torch.bfloat16, True),
    ((8, 9), torch.float16, True), ((8, 9), torch.float32, False), ((9, 0), torch.float16, False),
    ((12, 0), torch.bfloat16, True)])
def test_one_pass_or_two(version, dtype, expected):
    assert one_pass(version, dtype) == expected


# -------------------------------------------------------------------------------------------------
# Noise and distribution of the draws. The Triton kernels draw the same codes, as
# test_kernels_interpreted.py shows


@pytest.mark.parametrize("counter, key, first", [                     # published with Random123
    ((0, 0, 0, 0), 0, 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, -1, 0x408F276D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, 0xD16CFE09)])
def test_philox(counter, key, first):
    assert sampling.philox(torch.tensor(key), *map(torch.tensor, counter)) == first


def test_gumbel():
    noise = sampling.gumbel(torch.tensor([0, 1, 2 ** 32 - 1]))
    assert noise.isfinite().all() and noise[0] > noise[1] > noise[2]
    noise = sampling.gumbel(torch.arange(0, 2 ** 32, 4099)).double()             # u evenly spaced
    assert abs(noise.mean() - 0.5772157) < 1e-4
    assert abs(noise.var() - torch.pi ** 2 / 6) < 1e-3


def test_gumbel_noise():
    """Each number depends on its seed, step and position only, and on all three."""
    seeds = torch.tensor([5, -1])
    table = kernels.gumbel_noise(seeds, [0, 7, 2 ** 31], 300)
    assert table.shape == (3, 2, 300) and table.dtype == torch.float32
    assert torch.equal(kernels.gumbel_noise(seeds[1:], [7], 20), table[1:2, 1:, :20])
    pairs = torch.corrcoef(table.flatten(0, 1)).triu(1)
    assert pairs.abs().max() < 0.25


def draw(logits, rows, step=0, seed=1):
    """Codes and log p of `rows` positions that share logits (V,)."""
    positions = torch.arange(rows)[None]
    logits = logits.expand(1, rows, -1)
    codes, log_p = kernels.sample_masked(logits, positions, torch.tensor([seed]), step)
    return codes[0], log_p[0]


def chi_square(counts, expected):
    """Standardised, about normal(0, 1) if `expected` is right. Cells below 5 are merged."""
    small = expected < 5
    counts = torch.cat((counts[~small], counts[small].sum()[None])).double()
    expected = torch.cat((expected[~small], expected[small].sum()[None])).double()
    counts = counts[expected > 0]
    expected = expected[expected > 0]
    free = len(counts) - 1
    return ((((counts - expected) ** 2 / expected).sum() - free) / (2 * free) ** 0.5).item()


@pytest.mark.parametrize("codes", [3, 300])
def test_distribution_of_the_draws(codes):
    """5e4 draws, 5 standard deviations: for fixed seeds it passes always or never."""
    torch.manual_seed(codes)
    logits = torch.randn(codes) * 2
    logits[1] = -torch.inf
    p = torch.softmax(logits.double(), -1)
    counts = torch.zeros(codes)
    for step in range(5):
        drawn, log_p = draw(logits, 10_000, step)
        counts += torch.bincount(drawn, minlength=codes)
        assert (log_p.double() - p.log()[drawn]).abs().max() < 1e-5
    assert counts[1] == 0
    assert abs(chi_square(counts, p * counts.sum())) < 5


def test_draws_are_independent():
    """Neighbouring positions, steps and seeds: counts of pairs against the product."""
    logits = torch.tensor([0.0, 0.5, 1.0, -0.5])
    p = torch.softmax(logits.double(), -1)
    rows = 20_000
    first, _ = draw(logits, rows)
    next_step, _ = draw(logits, rows, step=1)
    next_seed, _ = draw(logits, rows, seed=2)
    for other in (first.roll(1), next_step, next_seed):
        pairs = torch.bincount(first * 4 + other, minlength=16)
        assert abs(chi_square(pairs, (p[:, None] * p).flatten() * rows)) < 5
    assert torch.equal(first, draw(logits, rows)[0])                             # reproducible


def test_a_picture_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 300)
    positions = torch.randint(0, 4096, (3, 4))
    seeds = torch.tensor([5, -1, 7])
    codes, _ = kernels.sample_masked(logits, positions, seeds, 2)
    order = torch.tensor([3, 1, 0, 2])
    alone, _ = kernels.sample_masked(logits[1:2, order], positions[1:2, order], seeds[1:2], 2)
    assert torch.equal(alone, codes[1:2, order])


def test_the_only_allowed_code_is_always_drawn():
    logits = torch.full((200,), -torch.inf)
    logits[137] = 0.0
    codes, log_p = draw(logits, 1000)
    assert (codes == 137).all() and (log_p == 0).all()


# -------------------------------------------------------------------------------------------------
# Plain functions for a CPU


def test_attention_by_head():
    """In bfloat16 the error is at most twice that of the library's attention; it is what runs."""
    torch.manual_seed(0)
    text = torch.randn(2, 9, 3, 2, 32)
    image = torch.randn(2, 600, 3, 2, 32)
    norms = torch.rand(4, 32).unbind(0)
    angles = torch.rand(600, 16) * 6
    rest = norms[:2], norms[2:], angles.cos(), angles.sin()
    torch.testing.assert_close(attention_by_head(text, image, *rest),
                               attention_plain(text, image, *rest), rtol=1e-4, atol=1e-5)
    exact = attention_plain(text.double(), image.double(), *rest)
    half = text.bfloat16(), image.bfloat16(), *rest
    found = attention_by_head(*half)
    error = (found.double() - exact).abs().max()
    assert 0 < error <= 2 * (attention_plain(*half).double() - exact).abs().max()
    with torch.no_grad():
        assert torch.equal(kernels.attention(*half), found)


def test_gelu_compiled():
    """The sigmoid form that torch.compile gets is the same function, and so is its gradient."""
    x = torch.linspace(-9, 9, 101, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (torch.compile(kernels.gelu, backend="aot_eager"), kernels.gelu):
        y = function(x)
        results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
