"""Linear layers in 8 bits: int8, or float8 (e4m3) on chips that multiply it (compute capability 8.9 up).

    y = (x_q w_q^T) * s_x * s_w + bias,     x_q = round(x / s_x),  s_x = max |x| / top,  top = 127 or 448

with one scale s_w for each row of the weight, made when the model is loaded, and one s_x for each row of x, made as it
comes: the dynamic scheme of LLM.int8 (Dettmers et al. 2022, section 2) without its outlier split, as the norms
before these layers keep rows even. Products are summed in int32 (exact) or float32.

Bytes, in units of an activation of 2 bytes: x read and x_q written, 1.5 + its reading 0.5; the weight 0.5 in place of 1;
the output is scaled while it is in registers, so that its int32 sums are never stored. Multiplications run at twice
bfloat16's rate. Not measured on a GPU; `python -m kernels.bench --only linear` does.

Letters: M rows, K inputs, N outputs.
"""
from __future__ import annotations

import torch

from kernels._triton import interpreted, jit, tl, triton

TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def round8(x, dtype):
    """(M, K) -> (M, K) of `dtype`, int8 or float8_e4m3fn, and (M, 1) float32 scales; x is about their product."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / TOP[dtype]
    y = x.float() / scale
    return (y.round() if dtype == torch.int8 else y).to(dtype), scale


def linear8_plain(x, weight, scale, bias):
    """The reference; see `kernels.linear8` for the arguments."""
    rows, x_scale = round8(x.flatten(0, -2), weight.dtype)
    if x.is_cuda and x.dtype == torch.bfloat16 and weight.dtype != torch.int8:        # holds float8 exactly
        y = (rows.to(x.dtype) @ weight.to(x.dtype).t()).float()
    elif weight.dtype == torch.int8 and (x.device.type == "cpu" or len(rows) > 16 and x.shape[-1] % 8 == len(weight) % 8 == 0):
        y = torch._int_mm(rows, weight.t()).float()
    else:
        y = rows.float() @ weight.float().t()
    y = (y * x_scale * scale.t() + (0 if bias is None else bias.float())).to(x.dtype)
    return y.unflatten(0, x.shape[:-1])


# ---------------------------------------------------------------------------------------------------------
# Triton


@jit
def round8_kernel(x, x_r, x8, x_scale,                 # (M, K), stride of M; out: (M, K) contiguous, (M,) float32
                  K, TOP: tl.constexpr, ROUND: tl.constexpr, KP: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    v = tl.load(x + row * x_r + k, mask=k < K, other=0.0).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(v), 0), 1e-12) / TOP
    v = tl.div_rn(v, s)
    if ROUND:                                          # to the nearest, ties to even: 1.5 * 2^23 leaves no bits for more
        v = (v + 12582912.0) - 12582912.0
    tl.store(x8 + row * K + k, v.to(x8.dtype.element_ty), mask=k < K)
    tl.store(x_scale + row, s)


@jit(do_not_specialize=["M"])
def linear8_kernel(x8, x_scale, w8, w_scale, bias, y,  # (M, K), (M,), (N, K), (N,), (N,) or unused, out: (M, N) contiguous
                   M, N, K, BIAS: tl.constexpr, SUM: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """A tile of y. Tiles are taken GROUP rows at a time, down before right, so that the cache serves x and w."""
    down, right = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    EXACT: tl.constexpr = None if SUM == tl.int32 else DEPTH    # float8 sums of Hopper have 14 bits: one block's, no more
    group, place = tl.program_id(0) // (GROUP * right), tl.program_id(0) % (GROUP * right)
    height = tl.minimum(down - group * GROUP, GROUP)
    row = (group * GROUP + place % height) * ROWS + tl.arange(0, ROWS)
    column = (place // height) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x8 += row[:, None].to(tl.int64) * K + k[None, :]
    w8 += column[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), SUM)
    for start in range(0, K, DEPTH):
        a = tl.load(x8 + start, mask=(row < M)[:, None] & (start + k < K)[None, :], other=0.0)
        b = tl.load(w8 + start, mask=(column < N)[None, :] & (start + k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total, out_dtype=SUM, max_num_imprecise_acc=EXACT)
    result = total.to(tl.float32) * tl.load(x_scale + row, mask=row < M, other=0.0)[:, None]
    result *= tl.load(w_scale + column, mask=column < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    to = row[:, None].to(tl.int64) * N + column[None, :]
    tl.store(y + to, result, mask=(row < M)[:, None] & (column < N)[None, :])


def tile(M):
    """Block sizes: 128 x 128 x 128 bytes, 8 warps; few rows take a tile of few."""
    if interpreted():
        return dict(ROWS=16, COLUMNS=32, DEPTH=32, GROUP=2)
    return dict(ROWS=128 if M > 64 else 64 if M > 16 else 16, COLUMNS=128, DEPTH=128, GROUP=8, num_warps=8, num_stages=3)


def linear8_triton(x, weight, scale, bias):
    """See `kernels.linear8` for the arguments."""
    rows = x.flatten(0, -2)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    (M, K), N, whole = rows.shape, weight.shape[0], weight.dtype == torch.int8
    rounded = torch.empty((M, K), dtype=weight.dtype, device=x.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=x.device)
    round8_kernel[(M,)](rows, rows.stride(0), rounded, x_scale, K, TOP[weight.dtype], whole, triton.next_power_of_2(K))
    y, block = torch.empty((M, N), dtype=x.dtype, device=x.device), tile(M)
    linear8_kernel[(triton.cdiv(M, block["ROWS"]) * triton.cdiv(N, block["COLUMNS"]),)](
        rounded, x_scale, weight, scale, scale if bias is None else bias, y, M, N, K, BIAS=bias is not None,
        SUM=tl.int32 if whole else tl.float32, **block)
    return y.unflatten(0, x.shape[:-1])
