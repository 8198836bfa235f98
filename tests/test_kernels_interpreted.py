"""The Triton kernels under Triton's interpreter, against plain PyTorch in float64: forward, backward, and that they ran.

The interpreter must be chosen before triton is imported, so `test_kernels.py` starts this file in a process of its
own, with TRITON_INTERPRET=1 and MEISSONIC_KERNELS=triton; elsewhere it skips itself. Uninitialised memory is filled
with NaN, so an output that a kernel does not write shows. bfloat16 is left out of products: the interpreter's are wrong.
"""
import importlib
import os

import pytest
import torch
from hypothesis import given, settings, strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels.py, in a process of its own", allow_module_level=True)

import kernels                                                        # noqa: E402  after the check above

attention, sampling = (importlib.import_module(f"kernels.{name}") for name in ("attention", "sampling"))
qkv, modulate, cross_entropy, linear8 = (importlib.import_module(f"kernels.{name}") for name in (
    "qkv", "modulate", "cross_entropy", "linear8"))

torch.use_deterministic_algorithms(True)                              # fills torch.empty with NaN
few = settings(max_examples=6, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.float16])
SCALES = st.sampled_from([1e-3, 1.0, 1e2])
SEEDS = st.integers(0, 2 ** 16)


def cast(x, dtype):
    if isinstance(x, (tuple, list)):
        return type(x)(cast(y, dtype) for y in x)
    return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x


def close(kernel, plain, exact, what):
    """The kernel's largest error is at most twice that of plain PyTorch in the same dtype, plus 1e-6 of the size in
    float32 and one rounding in half precision."""
    spread = exact.abs().max().item() if exact.numel() else 0.0
    error, allowed = ((x.double() - exact).abs().max().item() if exact.numel() else 0.0 for x in (kernel, plain))
    rounding = 1e-6 if kernel.dtype == torch.float32 else torch.finfo(kernel.dtype).eps
    assert kernel.shape == exact.shape and kernel.dtype == plain.dtype, what
    assert error <= 2 * allowed + rounding * max(spread, 1e-6), f"{what}: {error:.1e}, plain {allowed:.1e}, of {spread:.1e}"


def both_ways(kernel, plain, inputs, what):
    """Outputs, and gradients of all floating inputs for a random downstream gradient."""
    def run(function, dtype):
        leaves = [(x if dtype is None else cast(x, dtype)).detach().requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        downstream = [torch.randn(y.shape).to(y.dtype) for y in outputs]
        leaves = [x for x in leaves if x.requires_grad]
        return [y.detach() for y in outputs], torch.autograd.grad(outputs, leaves, downstream)
    for part, *triple in zip(("output", "gradient"), run(kernel, None), run(plain, None), run(plain, torch.float64)):
        for i, (x, y, exact) in enumerate(zip(*triple)):
            close(x, y, exact, f"{what} {part} {i}")


class Spy:
    """Stands for a kernel and counts its launches."""
    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def spies(monkeypatch):
    found = {}
    for module in (attention, qkv, sampling, modulate, cross_entropy):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            found[name] = Spy(getattr(module, name))
            monkeypatch.setattr(module, name, found[name])
    return lambda: {name for name, spy in found.items() if spy.launches}


# ---------------------------------------------------------------------------------------------------------
# Attention


def attention_inputs(B, L, N, H, D, dtype, layout, scale, seed):
    """(text, image, text_norms, image_norms, cos, sin). layout: two tensors, in line in one, or rows apart."""
    torch.manual_seed(seed)
    if layout == "two":
        text, image = (torch.randn(B, rows, 3, H, D) * scale for rows in (L, N))
    elif layout == "in line":                                         # a single-modal block's projection, MLP beside it
        packed = torch.randn(B, L + N, 7 * H * D) * scale
        packed = packed.to(dtype)[..., :3 * H * D].unflatten(-1, (3, H, D))
        text, image = packed[:, :L], packed[:, L:]
    else:                                                             # heads and batch outside, every second row
        text, image = ((torch.randn(H, 3, B, 2 * rows, D) * scale).permute(2, 3, 1, 0, 4)[:, ::2] for rows in (L, N))
    norms = torch.randn(4, D).unbind(0)
    angles = torch.randn(N, D // 2) * 3
    return text.to(dtype), image.to(dtype), norms[:2], norms[2:], angles.cos(), angles.sin()


shapes = dict(B=st.integers(1, 2), L=st.sampled_from([0, 1, 17]), N=st.sampled_from([1, 9, 20]),
              H=st.integers(1, 2), D=st.sampled_from([16, 24, 40, 64, 128]), dtype=DTYPES,
              layout=st.sampled_from(["two", "in line", "apart"]), scale=SCALES, seed=SEEDS)


@few
@given(**shapes)
def test_attention_forward(**shape):
    x = attention_inputs(**shape)
    exact, plain = attention.attention_plain(*cast(x, torch.float64)), attention.attention_plain(*x)
    close(attention.attention_fused(*x), plain, exact, "one pass")
    close(attention.library_attention(*qkv.joint_qkv_triton(*x)), plain, exact, "two passes")


@few
@given(**shapes)
def test_attention_backward(**shape):
    text, image, text_norms, image_norms, *rotation = attention_inputs(**shape)
    def flat(function):
        return lambda t, i, a, b, c, d: function(t, i, (a, b), (c, d), *(x.to(c.dtype) for x in rotation))
    both_ways(flat(kernels.attention), flat(attention.attention_plain), (text, image, *text_norms, *image_norms), shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_qkv_alone(dtype):
    x = attention_inputs(2, 3, 13, 2, 24, dtype, "in line", 1.0, 0)
    exact = qkv.joint_qkv_plain(*cast(x, torch.float64))
    for kernel, plain, y in zip(qkv.joint_qkv_triton(*x), qkv.joint_qkv_plain(*x), exact):
        close(kernel, plain, y, "q, k, v")


def test_values_in_line_are_not_copied():
    for layout, shared in (("in line", True), ("two", False)):
        text, image, *rest = attention_inputs(2, 3, 13, 2, 24, torch.float32, layout, 1.0, 0)
        v = qkv.joint_qkv_triton(text, image, *rest)[2]
        assert torch.equal(v, torch.cat((text[:, :, 2], image[:, :, 2]), 1))
        assert (v.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()) == shared


# ---------------------------------------------------------------------------------------------------------
# Sampling


def sampling_inputs(B, M, V, dtype, scale, seed):
    """logits, unconditional (B, M, V) strided, positions, seeds; some codes forbidden."""
    torch.manual_seed(seed)
    c, u = ((torch.randn(M, B, V + 3) * scale).to(dtype).transpose(0, 1)[..., :V] for _ in range(2))
    if V > 4:
        c[:, :, 1], u[0, 0, 3] = -torch.inf, -torch.inf
    seeds = torch.tensor([-1, 2 ** 63 - 1, 0x123456789ABCDEF])[torch.randint(3, (B,))]
    return c, u, torch.randint(0, 4096, (B, M)), seeds


@few
@given(B=st.integers(1, 3), M=st.integers(0, 9), V=st.sampled_from([1, 5, 128, 300, 2500]), dtype=DTYPES,
       scale=st.sampled_from([1e-2, 1.0, 30.0]), guided=st.booleans(), seed=SEEDS)
def test_sample_masked(B, M, V, dtype, scale, guided, seed):
    c, u, positions, seeds = sampling_inputs(B, M, V, dtype, scale, seed)
    options = dict(unconditional=u, guidance=3.0, temperature=0.7) if guided else {}
    tokens, logp = kernels.sample_masked(c, positions, seeds, seed, **options)
    plain_tokens, plain_logp = sampling.sample_masked_plain(c, positions, seeds, seed, **options)
    assert torch.equal(tokens, plain_tokens) and tokens.dtype == torch.int64
    exact = sampling.sample_masked_plain(c.double(), positions, seeds, seed, **options)[1]
    close(logp, plain_logp, exact, "log p")
    if scale <= 1:
        assert torch.allclose(logp.double(), exact, atol=1e-5, rtol=0)


@few
@given(B=st.integers(1, 2), M=st.integers(0, 20), V=st.sampled_from([3, 128, 300, 700]), C=st.sampled_from([1, 16, 40]),
       seed=SEEDS)
def test_sample_from_head(B, M, V, C, seed):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(B, 2 * M, C)[:, ::2], torch.randn(V, C + 5)[:, :C]
    _, _, positions, seeds = sampling_inputs(B, M, 1, torch.float32, 1.0, seed)
    inputs = hidden, weight, positions, seeds, seed, 0.8
    tokens, logp = kernels.sample_from_head(*inputs)
    plain_tokens, plain_logp = sampling.sample_from_head_plain(*inputs)
    assert torch.equal(tokens, plain_tokens)
    close(logp, plain_logp, sampling.sample_from_head_plain(hidden.double(), weight.double(), *inputs[2:])[1], "log p")


def test_block_sizes_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    _, _, positions, seeds = sampling_inputs(2, 21, 1, torch.float32, 1.0, 0)
    inputs = torch.randn(2, 21, 40), torch.randn(300, 40), positions, seeds, 5
    tokens = sampling.sample_from_head_triton(*inputs)[0]
    monkeypatch.setattr(sampling, "head_config", lambda _: dict(ROWS=32, BLOCK_C=64))
    assert torch.equal(tokens, sampling.sample_from_head_triton(*inputs)[0])


def test_a_picture_does_not_depend_on_its_neighbours():
    c, _, positions, seeds = sampling_inputs(3, 4, 300, torch.float32, 1.0, 0)
    tokens = kernels.sample_masked(c, positions, seeds, 2)[0]
    order = torch.tensor([3, 1, 0, 2])
    same = seeds[1:2].expand(3)                                       # stride 0
    assert torch.equal(kernels.sample_masked(c, positions, same, 2)[0][1], tokens[1])
    assert torch.equal(tokens[1:2, order], kernels.sample_masked(c[1:2, order], positions[1:2, order], seeds[1:2], 2)[0])


def test_nan_logits_still_give_tokens_in_range():
    c, _, positions, seeds = sampling_inputs(1, 2, 130, torch.float32, 1.0, 0)
    assert kernels.sample_masked(c * torch.nan, positions, seeds, 0)[0].max() < 130


# ---------------------------------------------------------------------------------------------------------
# Adaptive norm and cross-entropy


@few
@given(B=st.integers(1, 3), S=st.sampled_from([1, 2, 11, 35]), C=st.sampled_from([8, 24, 64, 200]), residual=st.booleans(),
       dtype=DTYPES, scale=st.sampled_from([1e-2, 1.0, 1e2]), seed=SEEDS)
def test_modulate(B, S, C, residual, dtype, scale, seed):
    torch.manual_seed(seed)
    x = (torch.randn(B, S + 3, C) * scale).to(dtype)[:, 3:]
    y = (torch.randn(B, S, 2 * C) * scale).to(dtype)[..., :C]
    shift, scales, gate = torch.randn(B, 3 * C).to(dtype).chunk(3, -1)
    if residual:
        both_ways(kernels.residual_norm_modulate, modulate.residual_norm_modulate_plain, (x, gate, y, shift, scales),
                  "residual, norm, modulate")
    else:
        both_ways(kernels.norm_modulate, modulate.norm_modulate_plain, (x, shift, scales), "norm, modulate")


def test_float16_residuals_stay_finite():
    x = torch.full((1, 2, 8), 6e4, dtype=torch.float16)
    one = torch.ones(1, 8, dtype=torch.float16)
    assert torch.equal(kernels.residual_norm_modulate(x, one, x, one, one)[0], torch.full_like(x, 65504))


@few
@given(M=st.sampled_from([1, 4, 9]), C=st.sampled_from([1, 12, 40]), V=st.sampled_from([1, 16, 37, 200]), dtype=DTYPES,
       scale=st.sampled_from([1e-2, 1.0, 4.0]), seed=SEEDS)
def test_cross_entropy(M, C, V, dtype, scale, seed):
    torch.manual_seed(seed)
    hidden, weight = (torch.randn(M, 2 * C) * scale).to(dtype)[:, :C], torch.randn(V, C).to(dtype)
    both_ways(kernels.linear_cross_entropy, cross_entropy.linear_cross_entropy_plain,
              (hidden, weight, torch.randint(0, V, (M,))), "cross-entropy")


def test_targets_out_of_range_show():
    losses = kernels.linear_cross_entropy(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([-1, 3]))
    assert losses.isnan().all()


# ---------------------------------------------------------------------------------------------------------
# What ran


def test_the_kernels_ran(spies):
    x = attention_inputs(1, 2, 3, 1, 16, torch.float32, "two", 1.0, 0)
    with torch.no_grad():
        kernels.attention(*x)
    assert spies() == {"attention_kernel"}
    kernels.attention(x[0].requires_grad_(), *x[1:]).sum().backward()
    assert spies() == {"attention_kernel", "qkv_kernel", "qkv_backward_kernel"}
    c, u, positions, seeds = sampling_inputs(1, 2, 5, torch.float32, 1.0, 0)
    kernels.sample_masked(c, positions, seeds, 0, u, 2.0)
    kernels.sample_from_head(torch.ones(1, 2, 4), torch.ones(5, 4), positions, seeds, 0)
    one = torch.ones(1, 4, requires_grad=True)
    kernels.norm_modulate(torch.ones(1, 2, 4), one, one).sum().backward()
    kernels.linear_cross_entropy(one, torch.ones(5, 4), torch.tensor([2])).sum().backward()
    assert spies() == {"attention_kernel", "qkv_kernel", "qkv_backward_kernel", "sample_kernel", "head_kernel",
                       "head_draw_kernel", "modulate_kernel", "modulate_backward_kernel", "loss_kernel", "gradient_kernel"}
    assert kernels.path("cpu") == "triton (interpreter)"


def test_plain_when_told(spies, monkeypatch):
    monkeypatch.setenv("MEISSONIC_KERNELS", "plain")
    kernels.attention(*attention_inputs(1, 2, 3, 1, 16, torch.float32, "two", 1.0, 0))
    assert spies() == set() and kernels.path("cpu") == "plain (MEISSONIC_KERNELS=plain)"


# ---------------------------------------------------------------------------------------------------------
# 8 bits


@few
@given(M=st.sampled_from([1, 7, 33]), K=st.sampled_from([8, 40, 96]), N=st.sampled_from([16, 37]), dtype=DTYPES,
       kind=st.sampled_from([torch.int8, torch.float8_e4m3fn]), scale=SCALES, biased=st.booleans(), seed=SEEDS)
def test_linear8(M, K, N, dtype, kind, scale, biased, seed):
    """Rounds as the plain function does, to the bit, and multiplies what is rounded exactly; rows may lie apart."""
    torch.manual_seed(seed)
    x = (torch.randn(2, M, K + 3) * scale).to(dtype)[..., :K]
    x[0, 0] = 0
    if kind == torch.float8_e4m3fn:                       # numbers that are float8 already: the interpreter rounds 127 to 64
        x = (x / scale * 100).clamp(-448, 448).to(kind).to(dtype)
        x[..., 0] = 448
    weight, w_scale = kernels.round8(torch.randn(N, K), kind)
    bias = torch.randn(N).to(dtype) if biased else None
    y = kernels.linear8(x, weight, w_scale, bias)
    plain = linear8.linear8_plain(x, weight, w_scale, bias)
    rows, x_scale = kernels.round8(x, kind)
    exact = rows.double() @ weight.double().t() * x_scale.double() * w_scale.double().t() + (bias.double() if biased else 0)
    close(y, plain, exact, "y")
