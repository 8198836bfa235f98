"""Linear layers in 8 bits, for sampling: int8, or float8 (e4m3) from compute capability 8.9 on.

    x_q = round(x / s_x),  s_x = max |x| / top      one scale for each row of x, made at run time
    w_q = round(w / s_w),  s_w = max |w| / top      one scale for each row of w, made at loading
    y = (x_q w_q^T) * s_x * s_w + bias              top = 127 for int8, 448 for float8

This is the dynamic scheme of LLM.int8 (Dettmers et al. 2022, section 2) without the split for
outliers. Sums of products are int32 (exact) or float32. There is no backward pass.

Bytes. The weight takes 1 byte a number in place of 2. x is read (2), x_q written (1) and read (1),
in place of one reading (2). The output is scaled in registers: its int32 sums are never stored.

int8 has a Triton kernel. float8 uses the library's product with row-wise scales, torch._scaled_mm,
which needs bfloat16 output on some cards and K and N that are multiples of 16.

Letters: M rows, K inputs, N outputs.
"""
from __future__ import annotations

import torch

from kernels._triton import capability, interpreted, jit, tl, triton

TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


# -------------------------------------------------------------------------------------------------
# Plain PyTorch


def quantize_rows(x, dtype):
    """x (M, K), dtype int8 or float8_e4m3fn -> x_q (M, K), scale (M, 1) float32.

    x is about x_q * scale.
    """
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / TOP[dtype]         # (M, 1)
    y = x.float() / scale
    if dtype == torch.int8:
        y = y.round()
    return y.to(dtype), scale


def linear8_plain(x, weight, scale, bias):
    """The reference; see `kernels.linear8` for the arguments."""
    rows, row_scale = quantize_rows(x.flatten(0, -2), weight.dtype)              # (M, K), (M, 1)
    y = product_plain(rows, weight, x.dtype) * row_scale * scale.t()             # (M, N)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def product_plain(rows, weight, dtype):
    """rows (M, K), weight (N, K), both of 8 bits -> rows @ weight.T (M, N) float32."""
    if weight.dtype == torch.int8:
        M, K = rows.shape
        aligned = M > 16 and K % 8 == 0 and len(weight) % 8 == 0
        if not rows.is_cuda or aligned:               # what CUDA's int8 product asks for
            return torch._int_mm(rows, weight.t()).float()
    elif rows.is_cuda and dtype == torch.bfloat16:    # holds float8 exactly
        return (rows.to(dtype) @ weight.to(dtype).t()).float()
    return rows.float() @ weight.float().t()


# -------------------------------------------------------------------------------------------------
# Triton


@jit
def quantize_kernel(x, x_r,                            # (M, K), stride of M
                    x8, x_scale,                       # out: (M, K) contiguous, (M,) float32
                    K, TOP: tl.constexpr, ROUND: tl.constexpr, KP: tl.constexpr):
    """`quantize_rows`, one program for each row. KP is the power of two from K on."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    v = tl.load(x + row * x_r + k, mask=k < K, other=0.0).to(tl.float32)         # (KP,)
    scale = tl.maximum(tl.max(tl.abs(v), 0), 1e-12) / TOP
    v = tl.div_rn(v, scale)
    if ROUND:                                          # 1.5 * 2^23 leaves no fraction
        v = (v + 12582912.0) - 12582912.0
    tl.store(x8 + row * K + k, v.to(x8.dtype.element_ty), mask=k < K)
    tl.store(x_scale + row, scale)


@jit(do_not_specialize=["M"])
def linear8_kernel(x8, x_scale,                        # (M, K) int8, (M,) float32, contiguous
                   w8, w_scale,                        # (N, K) int8, (N,) float32, contiguous
                   bias,                               # (N,), or anything without BIAS
                   y,                                  # out: (M, N) contiguous
                   M, N, K, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """One tile of y. Tiles go down GROUP at a time before right: x and w stay in the cache."""
    down = tl.cdiv(M, ROWS)
    right = tl.cdiv(N, COLUMNS)
    group = tl.program_id(0) // (GROUP * right)
    place = tl.program_id(0) % (GROUP * right)
    height = tl.minimum(down - group * GROUP, GROUP)
    row = (group * GROUP + place % height) * ROWS + tl.arange(0, ROWS)
    column = (place // height) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x8 += row[:, None].to(tl.int64) * K + k[None, :]                             # (ROWS, DEPTH)
    w8 += column[None, :].to(tl.int64) * K + k[:, None]                          # (DEPTH, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, K, DEPTH):
        a = tl.load(x8 + start, mask=(row < M)[:, None] & (start + k < K)[None, :], other=0)
        b = tl.load(w8 + start, mask=(column < N)[None, :] & (start + k < K)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    result = total.to(tl.float32)
    result *= tl.load(x_scale + row, mask=row < M, other=0.0)[:, None]
    result *= tl.load(w_scale + column, mask=column < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    to = row[:, None].to(tl.int64) * N + column[None, :]                         # (ROWS, COLUMNS)
    tl.store(y + to, result, mask=(row < M)[:, None] & (column < N)[None, :])


def tile(M):
    """Block sizes of linear8_kernel for M rows."""
    if interpreted():                                 # small, so that tests cross the edges
        return dict(ROWS=16, COLUMNS=32, DEPTH=32, GROUP=2)
    rows = 128 if M > 64 else 64 if M > 16 else 16
    return dict(ROWS=rows, COLUMNS=128, DEPTH=128, GROUP=8, num_warps=8, num_stages=3)


# -------------------------------------------------------------------------------------------------
# The public function


def quantize_rows_triton(x, dtype):
    """See `quantize_rows`."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    M, K = x.shape
    x8 = torch.empty((M, K), dtype=dtype, device=x.device)
    scale = torch.empty((M, 1), dtype=torch.float32, device=x.device)
    quantize_kernel[(M,)](x, x.stride(0), x8, scale, K, TOP=TOP[dtype], ROUND=dtype == torch.int8,
                          KP=triton.next_power_of_2(K))
    return x8, scale


def has_product(x, weight):
    """Whether this device multiplies what is asked for; if not, linear8_plain runs."""
    version = capability(x.device)
    if weight.dtype == torch.int8:
        return version is None or version >= (8, 0)   # on 7.5 the library's product runs
    aligned = weight.shape[0] % 16 == weight.shape[1] % 16 == 0
    return (version is None or version >= (8, 9)) and x.dtype == torch.bfloat16 and aligned


def linear8_triton(x, weight, scale, bias):
    """See `kernels.linear8` for the arguments."""
    if not has_product(x, weight):
        return linear8_plain(x, weight, scale, bias)
    rows, row_scale = quantize_rows_triton(x.flatten(0, -2), weight.dtype)       # (M, K), (M, 1)
    if weight.dtype == torch.int8:
        y = product_triton(rows, row_scale, weight, scale, bias, x.dtype)        # (M, N)
    else:
        y = torch._scaled_mm(rows, weight.t(), row_scale, scale.t(), bias=bias, out_dtype=x.dtype)
    return y.unflatten(0, x.shape[:-1])


def product_triton(rows, row_scale, weight, scale, bias, dtype):
    """(M, K), (M, 1), (N, K), (N, 1), (N,) or None -> (M, N) of dtype."""
    M, K = rows.shape
    N = len(weight)
    y = torch.empty((M, N), dtype=dtype, device=rows.device)
    block = tile(M)
    tiles = triton.cdiv(M, block["ROWS"]) * triton.cdiv(N, block["COLUMNS"])
    linear8_kernel[(tiles,)](rows, row_scale, weight, scale, scale if bias is None else bias, y,
                             M, N, K, BIAS=bias is not None, **block)
    return y
