"""The kernels' plain references, the choice of path, and what needs a process of its own.

`test_kernels_interpreted.py` (Triton's interpreter) and `test_kernels_compiled.py` (machine code for each chip) are
started from here: the first needs TRITON_INTERPRET=1 before triton is imported, the second needs it unset.
"""
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels                                                                                       # noqa: E402
from kernels import sampling                                                                         # noqa: E402
from kernels._triton import no_launcher, triton                                                                   # noqa: E402
from kernels.attention import one_pass                                                               # noqa: E402

needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")


def python(*arguments, **environment):
    """A process with the given environment variables; None removes one -> its output, standard error included."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={k: v for k, v in env.items() if v is not None})
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---------------------------------------------------------------------------------------------------------
# Processes of their own


@needs_triton
def test_interpreted():
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels_interpreted.py",
           TRITON_INTERPRET="1", MEISSONIC_KERNELS="triton")


@needs_triton
def test_compiled():
    """Two processes at a time; the file says what is checked."""
    compile_for = lambda *targets: python("tests/test_kernels_compiled.py", *targets, TRITON_INTERPRET=None)
    with ThreadPoolExecutor(2) as pool:
        output = "".join(pool.map(lambda chips: compile_for(*chips), (("75", "80", "86", "89"), ("90", "100", "120"))))
    chips = Counter(line.split()[0] for line in output.splitlines())
    assert set(chips) == {"75", "80", "86", "89", "90", "100", "120"} and min(chips.values()) >= 8, output


def test_without_triton():
    """macOS and Windows have no triton: everything imports, and forcing it says why it cannot be."""
    script = "import sys; sys.modules['triton'] = None; import kernels; print(kernels.path('cpu'))"
    assert python("-c", script, MEISSONIC_KERNELS=None).strip() == "plain (cpu)"
    script += "\ntry: kernels.path('cpu')\nexcept RuntimeError as error: print(error)"
    script = script.replace("; print(kernels.path('cpu'))", "", 1)
    assert "triton is not installed" in python("-c", script, MEISSONIC_KERNELS="triton")


def test_bench_on_the_cpu():
    output = python("-m", "kernels.bench", "--only", "norm", TRITON_INTERPRET=None, MEISSONIC_KERNELS=None,
                    CUDA_VISIBLE_DEVICES="")
    assert "No GPU: the plain paths alone" in output and "| norm and rotation" in output


# ---------------------------------------------------------------------------------------------------------
# The choice


CUDA = torch.device("cuda", 0)


@needs_triton
@pytest.mark.parametrize("chip, dtype, expected", [
    ((7, 0), torch.float16, "plain (compute capability 7.0 is below 7.5)"),
    ((7, 5), torch.float16, "triton (compute capability 7.5)"),
    ((7, 5), torch.bfloat16, "plain (bfloat16 needs compute capability 8.0, not 7.5)"),
    ((9, 0), torch.bfloat16, "triton (compute capability 9.0)"),
    ((9, 0), torch.float32, "triton (compute capability 9.0)"),
    ((9, 0), torch.float64, "plain (there is no kernel for float64)")])
def test_path(chip, dtype, expected, monkeypatch):
    monkeypatch.delenv("MEISSONIC_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "capability", lambda device: chip)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setattr(kernels, "no_launcher", lambda: None)
    assert kernels.path(CUDA, dtype) == expected
    monkeypatch.setenv("MEISSONIC_KERNELS", "plain")
    assert kernels.path(CUDA, dtype) == "plain (MEISSONIC_KERNELS=plain)"
    monkeypatch.setenv("MEISSONIC_KERNELS", "triton")
    if expected.startswith("plain"):
        with pytest.raises(RuntimeError, match="MEISSONIC_KERNELS=triton, but"):
            kernels.path(CUDA, dtype)
    else:
        assert kernels.path(CUDA, dtype) == expected


@needs_triton
def test_without_a_c_compiler_the_path_is_plain(monkeypatch):
    monkeypatch.delenv("MEISSONIC_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "interpreted", lambda: False)

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(triton.runtime, "driver", Driver())
    no_launcher.cache_clear()
    assert kernels.path(CUDA, torch.float16) == "plain (Triton wants a C compiler and Python's headers (Failed to find C compiler.))"
    no_launcher.cache_clear()


def test_forcing(monkeypatch):
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setenv("MEISSONIC_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="not an NVIDIA GPU|not installed"):
        kernels.norm_modulate(torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.zeros(1, 4))
    monkeypatch.setenv("MEISSONIC_KERNELS", "fast")
    with pytest.raises(RuntimeError, match="auto, plain or triton"):
        kernels.path("cpu")


@pytest.mark.parametrize("chip, half, training, rows, expected", [
    ((9, 0), True, False, 512, True), ((9, 0), True, False, 513, False), ((8, 0), True, False, 1101, False),
    ((8, 9), True, False, 4173, True), ((8, 6), True, False, 4173, True), ((12, 0), True, False, 4173, True),
    ((8, 9), True, True, 100, False), ((8, 9), False, False, 100, False), ((7, 5), True, False, 100, False)])
def test_one_pass_or_two(chip, half, training, rows, expected):
    assert one_pass(chip, half, training, rows) == expected


@pytest.mark.parametrize("chip, dtype, rows, expected", [
    ((9, 0), torch.float16, 128 * 132, True), ((9, 0), torch.float16, 128 * 132 - 1, False),
    ((8, 9), torch.bfloat16, 64 * 132, True), ((9, 0), torch.float32, 10 ** 6, False), ((7, 5), torch.float16, 10 ** 6, False)])
def test_fused_head_or_product(chip, dtype, rows, expected, monkeypatch):
    properties = SimpleNamespace(major=chip[0], multi_processor_count=132)
    monkeypatch.setattr(sampling, "capability", lambda device: chip)
    monkeypatch.setattr(sampling, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert sampling.head_is_fused(torch.empty(0, dtype=dtype), rows) == expected


# ---------------------------------------------------------------------------------------------------------
# The noise and the law of the draw. The kernels draw the same tokens, which test_kernels_interpreted.py proves.


@pytest.mark.parametrize("counter, key, first", [                     # known answers published with Random123
    ((0, 0, 0, 0), 0, 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, -1, 0x408F276D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, 0xD16CFE09)])
def test_philox(counter, key, first):
    assert sampling.philox(torch.tensor(key), *map(torch.tensor, counter)) == first


def test_gumbel():
    bits = torch.tensor([0, 1, 2 ** 32 - 1])
    noise = sampling.gumbel(bits)
    assert noise.isfinite().all() and noise[0] > noise[1] > noise[2]
    noise = sampling.gumbel(torch.arange(0, 2 ** 32, 4099)).double()                     # evenly spaced u
    assert abs(noise.mean() - 0.5772157) < 1e-4 and abs(noise.var() - torch.pi ** 2 / 6) < 1e-3


def drawn(logits, rows, step=0, seed=1, **options):
    """Tokens and log p of `rows` positions that share logits (V,)."""
    shared = lambda x: x.expand(1, rows, -1)
    options = {k: shared(x) if torch.is_tensor(x) else x for k, x in options.items()}
    return (x[0] for x in sampling.sample_masked_plain(shared(logits), torch.arange(rows)[None], torch.tensor([seed]),
                                                       step, **options))


def chi_square(counts, expected):
    """Standardised: about normal(0, 1) under the law that `expected` states; cells with fewer than 5 go together."""
    small = expected < 5
    counts, expected = (torch.cat((x[~small], x[small].sum()[None])) for x in (counts.double(), expected.double()))
    counts, expected = counts[expected > 0], expected[expected > 0]
    free = len(counts) - 1
    return ((((counts - expected) ** 2 / expected).sum() - free) / (2 * free) ** 0.5).item()


@pytest.mark.parametrize("codes, options", [(3, {}), (300, dict(temperature=0.7)), (300, dict(guidance=2.5))])
def test_law_of_the_draw(codes, options):
    """Chi-square over 2e5 draws; 5 standard deviations: it passes by construction of the seed or never."""
    torch.manual_seed(codes)
    c, u = torch.randn(2, codes) * 2
    c[1] = -torch.inf
    x = c
    if "guidance" in options:
        options, x = dict(options, unconditional=u), u + options["guidance"] * (c - u)
    p = torch.softmax(x.double() / options.get("temperature", 1.0), -1)
    counts, rows = torch.zeros(codes), 20_000
    for step in range(10):
        tokens, logp = drawn(c, rows, step, **options)
        counts += torch.bincount(tokens, minlength=codes)
        assert (logp.double() - p.log()[tokens]).abs().max() < 1e-5
    assert counts[1] == 0
    assert abs(chi_square(counts, p * rows * 10)) < 5


def test_draws_are_independent():
    """Neighbouring positions, steps and seeds: the table of pairs against the product of the laws."""
    logits = torch.tensor([0.0, 0.5, 1.0, -0.5])
    p = torch.softmax(logits.double(), -1)
    rows = 50_000
    base = list(drawn(logits, rows))[0]
    for other in (base.roll(1), list(drawn(logits, rows, step=1))[0], list(drawn(logits, rows, seed=2))[0]):
        pairs = torch.bincount(base * 4 + other, minlength=16)
        assert abs(chi_square(pairs, (p[:, None] * p).flatten() * rows)) < 5
    assert torch.equal(base, list(drawn(logits, rows))[0])                               # a seed reproduces


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(-2 ** 63, 2 ** 63 - 1), st.integers(0, 2 ** 16))
def test_guidance_of_one_is_none(codes, seed, step):
    torch.manual_seed(step)
    c, u = torch.randn(2, codes)
    tokens, logp = drawn(c, 9, step, seed)
    guided_tokens, guided_logp = drawn(c, 9, step, seed, unconditional=u, guidance=1.0)
    assert torch.equal(tokens, guided_tokens) and torch.allclose(logp, guided_logp, atol=1e-5)


def test_one_allowed_code_is_always_drawn():
    logits = torch.full((200,), -torch.inf)
    logits[137] = 0.0
    tokens, logp = drawn(logits, 1000)
    assert (tokens == 137).all() and (logp == 0).all()


def test_remask():
    positions, logp = torch.tensor([[7, 3, 9, 4]]), torch.tensor([[-1.0, -3.0, -2.0, -0.5]])
    assert sorted(kernels.remask(positions, logp, torch.zeros(1, 4), 1.0, 2)[0].tolist()) == [3, 9]
    noise = torch.tensor([[0.0, 9.0, 0.0, -9.0]])
    assert kernels.remask(positions, logp, noise, 1.0, 1).tolist() == [[4]]
    assert kernels.remask(positions, logp, noise, 1.0, 0).shape == (1, 0)
