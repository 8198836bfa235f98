"""The Triton kernels in Triton's interpreter against plain PyTorch in float64, and that they ran.

The interpreter must be chosen before triton is imported. So `test_kernels.py` starts this file in a
process of its own, with TRITON_INTERPRET=1 and MEISSONIC_KERNELS=triton; elsewhere it is skipped.
Uninitialised memory is filled with NaN, so that an output that no kernel writes is found. Products
of bfloat16 are not tested: the interpreter's are wrong.
"""
import importlib
import os

import pytest
import torch
from hypothesis import given, settings, strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels.py, in a process of its own", allow_module_level=True)

import kernels                                                        # noqa: E402


def module(name):
    """A module of kernels; some share their name with a function of the package."""
    return importlib.import_module(f"kernels.{name}")


attention = module("attention")
cross_entropy = module("cross_entropy")
gelu = module("gelu")
linear8 = module("linear8")
modulate = module("modulate")
qkv = module("qkv")
sampling = module("sampling")

sampling.GROUPS = 2                                                   # small tests cross the edges
torch.use_deterministic_algorithms(True)                              # fills torch.empty with NaN
few = settings(max_examples=4, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.float16])
SCALES = st.sampled_from([1e-3, 1.0, 1e2])
SEEDS = st.integers(0, 2 ** 16)


def cast(x, dtype):
    """Floating tensors of nested tuples in `dtype`, the rest as it is."""
    if isinstance(x, (tuple, list)):
        return type(x)(cast(y, dtype) for y in x)
    return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x


def assert_close(kernel, plain, exact, what):
    """The kernel's largest error is at most twice that of plain PyTorch in the same dtype, plus one
    rounding (1e-6 in float32) of the largest value."""
    assert kernel.shape == exact.shape and kernel.dtype == plain.dtype, what
    if not exact.numel():
        return
    size = exact.abs().max().item()
    error = (kernel.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    rounding = 1e-6 if kernel.dtype == torch.float32 else torch.finfo(kernel.dtype).eps
    allowed = 2 * plain_error + rounding * max(size, 1e-6)
    assert error <= allowed, f"{what}: error {error:.1e}, plain {plain_error:.1e}, of {size:.1e}"


def outputs_and_gradients(function, inputs):
    """Outputs, then gradients of the floating inputs for a random downstream gradient."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    downstream = [torch.randn(y.shape).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], downstream)
    return [*(y.detach() for y in outputs), *gradients]


def check_both_ways(kernel, plain, inputs, what):
    """Forward and backward of `kernel` against `plain` in float64."""
    found = outputs_and_gradients(kernel, inputs)
    same_dtype = outputs_and_gradients(plain, inputs)
    exact = outputs_and_gradients(plain, cast(inputs, torch.float64))
    for i in range(len(exact)):
        assert_close(found[i], same_dtype[i], exact[i], f"{what}, outputs and gradients, {i}")


# -------------------------------------------------------------------------------------------------
# Attention


def attention_inputs(B, L, N, H, D, dtype, layout, scale, seed):
    """(text, image, text_norms, image_norms, cos, sin).

    layout: "two" tensors, "joint" in one buffer with other numbers beside them, or "apart": heads
    and batch outside, every second row.
    """
    torch.manual_seed(seed)
    if layout == "joint":
        packed = (torch.randn(B, L + N, 7 * H * D) * scale).to(dtype)
        packed = packed[..., :3 * H * D].unflatten(-1, (3, H, D))
        text, image = packed[:, :L], packed[:, L:]
    else:
        streams = []
        for rows in (L, N):
            if layout == "two":
                streams.append(torch.randn(B, rows, 3, H, D) * scale)
            else:
                stream = torch.randn(H, 3, B, 2 * rows, D) * scale
                streams.append(stream.permute(2, 3, 1, 0, 4)[:, ::2])
        text, image = (x.to(dtype) for x in streams)
    norms = torch.randn(4, D).unbind(0)
    angles = torch.randn(N, D // 2) * 3
    return text, image, norms[:2], norms[2:], angles.cos(), angles.sin()


shapes = dict(B=st.integers(1, 2), L=st.sampled_from([0, 1, 17]), N=st.sampled_from([1, 9, 20]),
              H=st.integers(1, 3), D=st.sampled_from([16, 24, 40, 64, 128]), dtype=DTYPES,
              layout=st.sampled_from(["two", "joint", "apart"]), scale=SCALES, seed=SEEDS)


@few
@given(**shapes)
def test_attention_forward(**shape):
    x = attention_inputs(**shape)
    exact = attention.attention_plain(*cast(x, torch.float64))
    plain = attention.attention_plain(*x)
    two_passes = attention.library_attention(*qkv.joint_qkv_triton(*x))
    assert_close(attention.attention_fused(*x), plain, exact, "one pass")
    assert_close(two_passes, plain, exact, "two passes")


@few
@given(**shapes)
def test_attention_backward(**shape):
    text, image, text_norms, image_norms, cos, sin = attention_inputs(**shape)

    def flat(function):
        def run(t, i, a, b, c, d):
            return function(t, i, (a, b), (c, d), cos.to(c.dtype), sin.to(c.dtype))
        return run

    inputs = text, image, *text_norms, *image_norms
    check_both_ways(flat(kernels.attention), flat(attention.attention_plain), inputs, shape)


@few
@given(**dict(shapes, layout=st.just("joint")))
def test_attention_in_place(**shape):
    """Same numbers as the reference; only q and k of the buffer change."""
    text, image, *rest = attention_inputs(**shape)
    L = shape["L"]
    qkv_joint = text.as_strided((text.shape[0], L + image.shape[1], *text.shape[2:]),
                                text.stride(), text.storage_offset())
    storage = qkv_joint.untyped_storage()
    before = torch.empty(0, dtype=text.dtype).set_(storage).clone()
    exact = attention.attention_plain(*cast((text, image, *rest), torch.float64))
    plain = attention.attention_plain(text, image, *rest)
    values = qkv_joint[:, :, 2].clone()
    with torch.no_grad():
        found = kernels.attention_in_place(qkv_joint, L, *rest)
    assert_close(found, plain, exact, shape)
    assert torch.equal(qkv_joint[:, :, 2], values)
    after = torch.empty(0, dtype=text.dtype).set_(storage)
    width = 3 * shape["H"] * shape["D"]                               # of 7 / 3 as many
    beside = before.view(*qkv_joint.shape[:2], -1)[..., width:]
    assert torch.equal(after.view(*qkv_joint.shape[:2], -1)[..., width:], beside)


def test_attention_in_place_backward():
    """With gradients nothing is overwritten."""
    text, image, *rest = attention_inputs(2, 3, 13, 2, 24, torch.float32, "two", 1.0, 0)
    joint = torch.cat((text, image), 1)
    before = joint.clone()

    def kernel(qkv, a, b, c, d):
        return kernels.attention_in_place(qkv, 3, (a, b), (c, d), *rest[2:])

    def plain(qkv, a, b, c, d):
        cos, sin = cast(tuple(rest[2:]), qkv.dtype)
        return attention.attention_plain(qkv[:, :3], qkv[:, 3:], (a, b), (c, d), cos, sin)

    check_both_ways(kernel, plain, (joint, *rest[0], *rest[1]), "in place")
    assert torch.equal(joint, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotation_in_half_precision(dtype):
    """cos and sin may have the dtype of the model; here q, k, v alone, also in bfloat16."""
    *x, cos, sin = attention_inputs(2, 3, 13, 2, 24, dtype, "two", 1.0, 0)
    x += [cos.to(dtype), sin.to(dtype)]
    exact = qkv.joint_qkv_plain(*cast(x, torch.float64))
    plain = qkv.joint_qkv_plain(*x)
    for name, found, same_dtype, y in zip("qkv", qkv.joint_qkv_triton(*x), plain, exact):
        assert_close(found, same_dtype, y, name)


# -------------------------------------------------------------------------------------------------
# Sampling


def sampling_inputs(B, M, V, dtype, scale, seed):
    """logits (B, M, V) with strides and a forbidden code, positions (B, M), seeds (B,)."""
    torch.manual_seed(seed)
    logits = (torch.randn(M, B, V + 3) * scale).to(dtype).transpose(0, 1)[..., :V]
    if V > 4:
        logits[:, :, 1] = -torch.inf
    seeds = torch.tensor([-1, 2 ** 63 - 1, 0x123456789ABCDEF])[torch.randint(3, (B,))]
    return logits, torch.randint(0, 4096, (B, M)), seeds


@few
@given(B=st.integers(1, 3), M=st.integers(0, 9), V=st.sampled_from([1, 5, 128, 300, 700]),
       dtype=DTYPES, scale=st.sampled_from([1e-2, 1.0, 30.0]), seed=SEEDS)
def test_sample_masked(B, M, V, dtype, scale, seed):
    """The same codes as the reference, and their log p."""
    logits, positions, seeds = sampling_inputs(B, M, V, dtype, scale, seed)
    codes, log_p = kernels.sample_masked(logits, positions, seeds, seed)
    plain_codes, plain_log_p = sampling.sample_masked_plain(logits, positions, seeds, seed)
    assert torch.equal(codes, plain_codes) and codes.dtype == torch.int64
    exact = sampling.sample_masked_plain(logits.double(), positions, seeds, seed)[1]
    assert_close(log_p, plain_log_p, exact, "log p")


def test_nan_logits_give_codes_in_range():
    logits, positions, seeds = sampling_inputs(1, 2, 130, torch.float32, 1.0, 0)
    assert kernels.sample_masked(logits * torch.nan, positions, seeds, 0)[0].max() < 130


# -------------------------------------------------------------------------------------------------
# Adaptive norm, GELU and cross-entropy


@few
@given(B=st.integers(1, 3), S=st.sampled_from([1, 2, 11, 35]), C=st.sampled_from([8, 24, 64, 200]),
       dtype=DTYPES, scale=st.sampled_from([1e-2, 1.0, 1e2]), seed=SEEDS)
def test_modulate(B, S, C, dtype, scale, seed):
    torch.manual_seed(seed)
    x = (torch.randn(B, S + 3, C) * scale).to(dtype)[:, 3:]
    y = (torch.randn(B, S, 2 * C) * scale).to(dtype)[..., :C]
    shift, scales, gate = torch.randn(B, 3 * C).to(dtype).chunk(3, -1)
    check_both_ways(kernels.residual_norm_modulate, modulate.residual_norm_modulate_plain,
                    (x, gate, y, shift, scales), "residual and norm")
    check_both_ways(kernels.norm_modulate, modulate.norm_modulate_plain, (x, shift, scales), "norm")
    check_both_ways(kernels.gated_residual, modulate.gated_residual_plain, (x, gate, y), "residual")


def test_float16_residuals_stay_finite():
    x = torch.full((1, 2, 8), 6e4, dtype=torch.float16)
    one = torch.ones(1, 8, dtype=torch.float16)
    largest = torch.full_like(x, 65504)
    assert torch.equal(kernels.residual_norm_modulate(x, one, x, one, one)[0], largest)
    assert torch.equal(kernels.gated_residual(x, one, x), largest)


@few
@given(B=st.integers(1, 2), S=st.sampled_from([1, 5]), C=st.sampled_from([1, 16, 24]),
       F=st.sampled_from([1, 40, 64]), dtype=DTYPES, scale=st.sampled_from([1e-2, 1.0, 10.0]),
       seed=SEEDS)
def test_concat_gelu(B, S, C, F, dtype, scale, seed):
    torch.manual_seed(seed)
    y = torch.randn(B, S, C).to(dtype)
    mlp = (torch.randn(B, S, 3 + F) * scale).to(dtype)[..., 3:]
    check_both_ways(kernels.concat_gelu, gelu.concat_gelu_plain, (y, mlp), "concat_gelu")


@few
@given(M=st.sampled_from([1, 4, 9]), C=st.sampled_from([1, 12, 40]),
       V=st.sampled_from([1, 16, 37, 200]), dtype=DTYPES, scale=st.sampled_from([1e-2, 1.0, 4.0]),
       seed=SEEDS)
def test_cross_entropy(M, C, V, dtype, scale, seed):
    torch.manual_seed(seed)
    hidden = (torch.randn(M, 2 * C) * scale).to(dtype)[:, :C]
    weight = torch.randn(V, C).to(dtype)
    check_both_ways(kernels.linear_cross_entropy, cross_entropy.linear_cross_entropy_plain,
                    (hidden, weight, torch.randint(0, V, (M,))), "cross-entropy")


def test_targets_out_of_range_give_nan():
    targets = torch.tensor([-1, 3])
    losses = kernels.linear_cross_entropy(torch.ones(2, 4), torch.ones(3, 4), targets)
    assert losses.isnan().all()


# -------------------------------------------------------------------------------------------------
# 8 bits


def linear8_inputs(M, K, N, dtype, kind, scale, biased, seed):
    """x (2, M, K) with rows apart and one row of zeros, weight, scale, bias."""
    torch.manual_seed(seed)
    x = (torch.randn(2, M, K + 3) * scale).to(dtype)[..., :K]
    x[0, 0] = 0
    weight, weight_scale = kernels.quantize_rows(torch.randn(N, K), kind)
    bias = torch.randn(N).to(dtype) if biased else None
    return x, weight, weight_scale, bias


def assert_linear8(x, weight, scale, bias):
    """Products of the quantised numbers are exact but for the rounding of the output."""
    y = kernels.linear8(x, weight, scale, bias)
    plain = linear8.linear8_plain(x, weight, scale, bias)
    rows, row_scale = kernels.quantize_rows(x, weight.dtype)
    exact = rows.double() @ weight.double().t() * row_scale.double() * scale.double().t()
    assert_close(y, plain, exact if bias is None else exact + bias.double(), "y")


@few
@given(M=st.sampled_from([1, 7, 33]), K=st.sampled_from([8, 40, 96]), N=st.sampled_from([16, 37]),
       dtype=DTYPES, scale=SCALES, biased=st.booleans(), seed=SEEDS)
def test_linear_int8(M, K, N, dtype, scale, biased, seed):
    assert_linear8(*linear8_inputs(M, K, N, dtype, torch.int8, scale, biased, seed))


@pytest.mark.parametrize("K, N, biased", [(32, 48, True), (16, 16, False), (24, 37, True)])
def test_linear_float8(K, N, biased):
    """By the library's product, or where sizes do not suit it by the plain one.

    The numbers of x are float8 already: the interpreter does not round to the nearest.
    """
    kind = torch.float8_e4m3fn
    x, *rest = linear8_inputs(5, K, N, torch.bfloat16, kind, 1.0, biased, 0)
    x = (x * 100).clamp(-448, 448).to(kind).to(torch.bfloat16)
    x[..., 0] = 448
    assert_linear8(x, *rest)


# -------------------------------------------------------------------------------------------------
# What ran


class Spy:
    """Takes the place of a kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    """launched() -> names of the kernels launched since the last call."""
    spies = {}
    for place in (attention, cross_entropy, gelu, linear8, modulate, qkv, sampling):
        for name in [name for name in vars(place) if name.endswith("_kernel")]:
            spies[name] = Spy(getattr(place, name))
            monkeypatch.setattr(place, name, spies[name])

    def call():
        names = {name for name, spy in spies.items() if spy.launches}
        for spy in spies.values():
            spy.launches = 0
        return names

    return call


def test_the_kernels_run(launched):
    x = attention_inputs(1, 2, 3, 1, 16, torch.float32, "two", 1.0, 0)
    one = torch.ones(1, 4, requires_grad=True)
    kernels.attention(*x)
    assert launched() == {"attention_kernel"}
    kernels.attention_in_place(torch.cat(x[:2], 1), 2, *x[2:])
    assert launched() == {"qkv_kernel"}
    kernels.attention(x[0].requires_grad_(), *x[1:]).sum().backward()
    assert launched() == {"qkv_kernel", "qkv_backward_kernel"}
    kernels.sample_masked(*sampling_inputs(1, 2, 5, torch.float32, 1.0, 0), 0)
    assert launched() == {"mass_kernel", "draw_kernel"}
    for function in (kernels.norm_modulate, kernels.gated_residual):
        arguments = (one, one) if function is kernels.norm_modulate else (one, torch.ones(1, 2, 4))
        function(torch.ones(1, 2, 4), *arguments).sum().backward()
        assert launched() == {"modulate_kernel", "modulate_backward_kernel"}
    kernels.concat_gelu(torch.ones(1, 2, 4), one[None]).sum().backward()
    assert launched() == {"concat_gelu_kernel", "gelu_backward_kernel"}
    kernels.linear_cross_entropy(one, torch.ones(5, 4), torch.tensor([2])).sum().backward()
    assert launched() == {"loss_kernel", "gradient_kernel"}
    kernels.linear8(torch.ones(1, 16), *kernels.quantize_rows(torch.ones(16, 16), torch.int8))
    assert launched() == {"quantize_kernel", "linear8_kernel"}
    assert kernels.path("cpu") == "triton (interpreter)"


def test_plain_runs_no_kernel(launched, monkeypatch):
    monkeypatch.setenv("MEISSONIC_KERNELS", "plain")
    kernels.attention(*attention_inputs(1, 2, 3, 1, 16, torch.float32, "two", 1.0, 0))
    assert launched() == set() and kernels.path("cpu") == "plain (MEISSONIC_KERNELS=plain)"
