"""Adaptive norm: LayerNorm without weights, shift and scale (DiT's adaLN), with the gated residual before it.

    x' = x + gate * y        n = (x' - mean) r,  r = 1 / sqrt(var + eps)        h = n (1 + scale) + shift

shift, scale and gate belong to an item of the batch, not to a row. Backward, with g = dh (1 + scale):

    dx = dx' + r (g - mean(g) - n mean(g n))      dy = gate dx
    dscale = sum over rows of dh n                dshift = sum of dh             dgate = sum of dx y

Bytes, in units of one activation (B, S, C): plain, x' is gate * y and a sum (5), h the norm (2), a product (2) and a
sum (2), 11 in all; here x and y are read, x' and h written, 4. The residual at the end of a block, where no norm
follows, is `torch.addcmul(x, gate, y)`: one pass already.

Letters: B batch, S rows, C width.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._triton import interpreted, jit, tl, triton

EPS = 1e-6
HALF_MAX = 65504.0                                    # float16 residual streams are kept finite


# ---------------------------------------------------------------------------------------------------------
# Plain PyTorch


def norm_modulate_plain(x, shift, scale):
    """The reference; see `kernels.norm_modulate` for the arguments."""
    return (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def residual_norm_modulate_plain(x, gate, y, shift, scale):
    """The reference; see `kernels.residual_norm_modulate` for the arguments."""
    x = (x + gate[:, None] * y).to(x.dtype)
    x = x.clamp(-HALF_MAX, HALF_MAX) if x.dtype == torch.float16 else x
    return x, norm_modulate_plain(x, shift, scale)


# ---------------------------------------------------------------------------------------------------------
# Triton. Tiles are (ROWS, CP) float32, CP the power of two from C on; a row is wholly in one tile


@jit
def layer_norm(x, inside, C, eps):
    """n (ROWS, CP) and r (ROWS, 1); 0 where `inside` is false."""
    x = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    r = tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    return x * r, r


@jit(do_not_specialize=["S"])
def modulate_kernel(x, x_b, x_r,                       # (B, S, C), strides of B and S
                    gate, gate_b, y, y_b, y_r,         # (B, C), stride of B; like x. Unused without RESIDUAL
                    shift, shift_b, scale, scale_b,    # (B, C), stride of B
                    x_new, h,                          # out: (B, S, C) contiguous; x_new only with RESIDUAL
                    S, C, eps, RESIDUAL: tl.constexpr, CLAMP: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, CP)[None, :]
    inside, to = (row < S) & (c < C), (b * S + row) * C + c                              # (ROWS, CP)
    v = tl.load(x + b * x_b + row * x_r + c, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        g = tl.load(gate + b * gate_b + c, mask=c < C, other=0.0).to(tl.float32)         # (1, CP)
        v += g * tl.load(y + b * y_b + row * y_r + c, mask=inside, other=0.0).to(tl.float32)
        if CLAMP:
            v = tl.clamp(v, -65504.0, 65504.0)
        rounded = v.to(x_new.dtype.element_ty)         # the norm sees what the backward will read
        tl.store(x_new + to, rounded, mask=inside)
        v = rounded.to(tl.float32)
    n, _ = layer_norm(v, inside, C, eps)
    one_scale = 1 + tl.load(scale + b * scale_b + c, mask=c < C, other=0.0).to(tl.float32)
    offset = tl.load(shift + b * shift_b + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(h + to, n * one_scale + offset, mask=inside)


@jit(do_not_specialize=["S"])
def modulate_backward_kernel(x, x_b, x_r,              # (B, S, C): x' with RESIDUAL, else x
                             gate, gate_b, y, y_b, y_r, scale, scale_b,                  # as in modulate_kernel
                             dx_new, dh,               # (B, S, C) contiguous; dx_new only with RESIDUAL
                             dx, dy,                   # out: (B, S, C) contiguous; dy only with RESIDUAL
                             shares,                   # out: (3, B, blocks, C) float32, of dshift, dscale, dgate
                             S, C, eps, STEPS, RESIDUAL: tl.constexpr, CLAMP: tl.constexpr,
                             CP: tl.constexpr, ROWS: tl.constexpr):
    """A program takes STEPS tiles of one item of the batch and sums their gradients of shift, scale and gate."""
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, CP)[None, :]
    one_scale = 1 + tl.load(scale + b * scale_b + c, mask=c < C, other=0.0).to(tl.float32)             # (1, CP)
    if RESIDUAL:
        g = tl.load(gate + b * gate_b + c, mask=c < C, other=0.0).to(tl.float32)
    dshift = tl.zeros((1, CP), tl.float32)
    dscale, dgate = dshift, dshift
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside, at = (row < S) & (c < C), (b * S + row) * C + c                          # (ROWS, CP)
        v = tl.load(x + b * x_b + row * x_r + c, mask=inside, other=0.0).to(tl.float32)
        n, r = layer_norm(v, inside, C, eps)
        d = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
        dshift += tl.sum(d, 0)[None, :]
        dscale += tl.sum(d * n, 0)[None, :]
        d *= one_scale
        d = r * (d - (tl.sum(d, 1) / C)[:, None] - n * (tl.sum(d * n, 1) / C)[:, None])
        if RESIDUAL:
            d += tl.load(dx_new + at, mask=inside, other=0.0).to(tl.float32)
            if CLAMP:
                d = tl.where(tl.abs(v) < 65504.0, d, 0.0)
            tl.store(dy + at, g * d, mask=inside)
            z = tl.load(y + b * y_b + row * y_r + c, mask=inside, other=0.0).to(tl.float32)
            dgate += tl.sum(tl.where(inside, d * z, 0.0), 0)[None, :]
        tl.store(dx + at, d, mask=inside)

    to = (b * tl.num_programs(0) + tl.program_id(0)) * C + c                             # (1, CP)
    other = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * C                     # from dshift to dscale to dgate
    tl.store(shares + to, dshift, mask=c < C)
    tl.store(shares + other + to, dscale, mask=c < C)
    tl.store(shares + 2 * other + to, dgate, mask=c < C)


# ---------------------------------------------------------------------------------------------------------
# Autograd and the public functions


def tile(width, numbers=4096):
    """Block sizes: as many rows as make up `numbers`, 16 for each thread of 8 warps, or one row."""
    CP = triton.next_power_of_2(width)
    return dict(CP=CP, ROWS=2 if interpreted() else max(1, numbers // CP), num_warps=8)


def backward_tile(width):
    """Half as many numbers: gradients and sums stand beside them in registers, and 4096 spill on 10.0."""
    return tile(width, 2048)


class Modulate(torch.autograd.Function):
    """(x', h) of (x, gate, y, shift, scale), or h if gate and y are None."""

    @staticmethod
    def forward(ctx, x, gate, y, shift, scale):
        (B, S, C), residual, block = x.shape, gate is not None, tile(x.shape[-1])
        h = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
        x_new = torch.empty_like(h) if residual else x
        gate_y = (gate, gate.stride(0), y, *y.stride()[:2]) if residual else (x, 0, x, 0, 0)
        modulate_kernel[(triton.cdiv(S, block["ROWS"]), B)](
            x, *x.stride()[:2], *gate_y, shift, shift.stride(0), scale, scale.stride(0), x_new, h, S, C, EPS,
            RESIDUAL=residual, CLAMP=x.dtype == torch.float16, **block)
        ctx.save_for_backward(x_new, gate, y, shift, scale)
        return (x_new, h) if residual else h

    @staticmethod
    def backward(ctx, *grads):
        x, gate, y, shift, scale = ctx.saved_tensors
        (B, S, C), residual, block = x.shape, gate is not None, backward_tile(x.shape[-1])
        steps = 2 if interpreted() else 16
        blocks = triton.cdiv(S, block["ROWS"] * steps)
        grads = [g.contiguous() for g in grads]
        dx = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
        dy = torch.empty((B, S, C), dtype=y.dtype, device=x.device) if residual else None
        shares = torch.empty((3, B, blocks, C), dtype=torch.float32, device=x.device)
        gate_y = (gate, gate.stride(0), y, *y.stride()[:2]) if residual else (x, 0, x, 0, 0)
        modulate_backward_kernel[(blocks, B)](
            x, *x.stride()[:2], *gate_y, scale, scale.stride(0), grads[0], grads[-1], dx, dy if residual else dx,
            shares, S, C, EPS, steps, RESIDUAL=residual, CLAMP=x.dtype == torch.float16, **block)
        dshift, dscale, dgate = shares.sum(2)                                            # (B, C) each
        dgate = dgate.to(gate.dtype) if residual else None
        return dx, dgate, dy, dshift.to(shift.dtype), dscale.to(scale.dtype)


def norm_modulate_triton(x, shift, scale):
    """See `kernels.norm_modulate` for the arguments."""
    return Modulate.apply(x, None, None, shift, scale)


def residual_norm_modulate_triton(x, gate, y, shift, scale):
    """See `kernels.residual_norm_modulate` for the arguments."""
    return Modulate.apply(x, gate, y, shift, scale)
