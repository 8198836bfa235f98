"""Adaptive norm (DiT's adaLN): LayerNorm without weights, shift and scale; and the gated residual.

    x' = x + gate * y     n = (x' - mean) r,  r = 1 / sqrt(var + eps)     h = n (1 + scale) + shift

One kernel computes the residual x' alone, the norm h alone (of x), or both in one pass. shift,
scale and gate belong to an item of the batch, not to a row. Backward, with g = dh (1 + scale):

    dx = dx' + r (g - mean(g) - n mean(g n))      dy = gate dx
    dscale = sum over rows of dh n                dshift = sum of dh             dgate = sum of dx y

Bytes, in units of one activation (B, S, C). Plain: gate * y and the sum 5, the norm 2, the product
2, the second sum 2, in all 11. The kernel: x and y read, x' and h written, 4; the residual alone 3.

Letters: B batch, S rows, C width.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._triton import interpreted, jit, tl, triton

EPS = 1e-6
HALF_MAX = 65504.0                                    # float16 residual streams are kept finite


# -------------------------------------------------------------------------------------------------
# Plain PyTorch


def norm_modulate_plain(x, shift, scale):
    """The reference; see `kernels.norm_modulate` for the arguments."""
    n = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return (n * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def gated_residual_plain(x, gate, y):
    """The reference; see `kernels.gated_residual` for the arguments."""
    x = (x + gate[:, None] * y).to(x.dtype)
    return x.clamp(-HALF_MAX, HALF_MAX) if x.dtype == torch.float16 else x


def residual_norm_modulate_plain(x, gate, y, shift, scale):
    """The reference; see `kernels.residual_norm_modulate` for the arguments."""
    x = gated_residual_plain(x, gate, y)
    return x, norm_modulate_plain(x, shift, scale)


# -------------------------------------------------------------------------------------------------
# Triton. Tiles are (ROWS, CP) float32, CP the power of two from C on; a tile holds whole rows.
# RESIDUAL: x' is computed; NORM: h is computed; arguments that only the other needs are not read


@jit
def layer_norm(x, inside, C, eps):
    """n (ROWS, CP) and r (ROWS, 1); 0 where `inside` is false."""
    x = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    r = tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    return x * r, r


@jit(do_not_specialize=["S"])
def modulate_kernel(x, x_b, x_r,                       # (B, S, C), strides of B and S
                    gate, gate_b, y, y_b, y_r,         # (B, C), stride of B; like x
                    shift, shift_b, scale, scale_b,    # (B, C), stride of B
                    x_new, h,                          # out: (B, S, C) contiguous
                    S, C, eps: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
                    CLAMP: tl.constexpr,
                    CP: tl.constexpr, ROWS: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)     # (ROWS, 1)
    c = tl.arange(0, CP)[None, :]                                                # (1, CP)
    inside = (row < S) & (c < C)
    to = (b * S + row) * C + c                                                   # (ROWS, CP)
    v = tl.load(x + b * x_b + row * x_r + c, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        g = tl.load(gate + b * gate_b + c, mask=c < C, other=0.0).to(tl.float32)
        v += g * tl.load(y + b * y_b + row * y_r + c, mask=inside, other=0.0).to(tl.float32)
        if CLAMP:
            v = tl.clamp(v, -65504.0, 65504.0)
        rounded = v.to(x_new.dtype.element_ty)         # the norm sees what the backward will read
        tl.store(x_new + to, rounded, mask=inside)
        v = rounded.to(tl.float32)
    if NORM:
        n, _ = layer_norm(v, inside, C, eps)
        one_scale = 1 + tl.load(scale + b * scale_b + c, mask=c < C, other=0.0).to(tl.float32)
        offset = tl.load(shift + b * shift_b + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(h + to, n * one_scale + offset, mask=inside)


@jit(do_not_specialize=["S"])
def modulate_backward_kernel(x, x_b, x_r,              # (B, S, C): x' with RESIDUAL, else x
                             gate, gate_b, y, y_b, y_r, scale, scale_b,          # as above
                             dx_new, dh,               # (B, S, C) contiguous
                             dx, dy,                   # out: (B, S, C) contiguous
                             parts,                    # out: (3, B, blocks, C) float32
                             S, C, eps: tl.constexpr, STEPS,
                             RESIDUAL: tl.constexpr, NORM: tl.constexpr,
                             CLAMP: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr):
    """A program takes STEPS tiles of one item of the batch; `parts` gets its sums of dshift, dscale
    and dgate."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CP)[None, :]                                                # (1, CP)
    if NORM:
        one_scale = 1 + tl.load(scale + b * scale_b + c, mask=c < C, other=0.0).to(tl.float32)
    if RESIDUAL:
        g = tl.load(gate + b * gate_b + c, mask=c < C, other=0.0).to(tl.float32)
    dshift = tl.zeros((1, CP), tl.float32)
    dscale = dshift
    dgate = dshift
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS
        row = row + tl.arange(0, ROWS)[:, None].to(tl.int64)                     # (ROWS, 1)
        inside = (row < S) & (c < C)
        at = (b * S + row) * C + c                                               # (ROWS, CP)
        v = tl.load(x + b * x_b + row * x_r + c, mask=inside, other=0.0).to(tl.float32)
        d = tl.zeros((ROWS, CP), tl.float32)
        if NORM:
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

    to = (b * tl.num_programs(0) + tl.program_id(0)) * C + c                     # (1, CP)
    other = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * C             # to the next part
    if NORM:
        tl.store(parts + to, dshift, mask=c < C)
        tl.store(parts + other + to, dscale, mask=c < C)
    if RESIDUAL:
        tl.store(parts + 2 * other + to, dgate, mask=c < C)


# -------------------------------------------------------------------------------------------------
# Autograd and the public functions


def tile(width, numbers=4096):
    """Block sizes: as many rows as make up `numbers`, 16 for each thread of 8 warps, or one row."""
    CP = triton.next_power_of_2(width)
    rows = 2 if interpreted() else max(1, numbers // CP)
    return dict(CP=CP, ROWS=rows, num_warps=8)


def backward_tile(width):
    """Half as many numbers: gradients and sums are in registers too, and 4096 spill on 10.0."""
    return tile(width, 2048)


def launch(kernel, programs, x, gate, y, vectors, rest, block):
    """Both kernels take their arguments in the same order. None is not read: x takes its place."""
    B, S, C = x.shape
    residual = gate is not None
    gate_y = (gate, gate.stride(0), y, *y.stride()[:2]) if residual else (x, 0, x, 0, 0)
    arguments = []
    for vector in vectors:                            # shift and scale
        arguments += (x, 0) if vector is None else (vector, vector.stride(0))
    rest = [x if part is None else part for part in rest]
    kernel[(programs, B)](x, *x.stride()[:2], *gate_y, *arguments, *rest, RESIDUAL=residual,
                          NORM=vectors[-1] is not None, CLAMP=x.dtype == torch.float16, **block)


class Modulate(torch.autograd.Function):
    """(x, gate, y, shift, scale) -> x', h.

    Without gate and y (None) only h is computed, without shift and scale only x'.
    """

    @staticmethod
    def forward(ctx, x, gate, y, shift, scale):
        B, S, C = x.shape
        x_new = h = None
        if gate is not None:
            x_new = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
        if scale is not None:
            h = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
        block = tile(C)
        launch(modulate_kernel, triton.cdiv(S, block["ROWS"]), x, gate, y, (shift, scale),
               (x_new, h, S, C, EPS), block)
        ctx.save_for_backward(x if x_new is None else x_new, gate, y, shift, scale)
        if h is None:
            return x_new
        return h if x_new is None else (x_new, h)

    @staticmethod
    def backward(ctx, *gradients):                    # of x' and h
        x, gate, y, shift, scale = ctx.saved_tensors
        B, S, C = x.shape
        block = backward_tile(C)
        steps = 2 if interpreted() else 16
        blocks = triton.cdiv(S, block["ROWS"] * steps)
        dx = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
        dy = None if y is None else torch.empty((B, S, C), dtype=y.dtype, device=x.device)
        parts = torch.empty((3, B, blocks, C), dtype=torch.float32, device=x.device)
        dx_new = None if gate is None else gradients[0].contiguous()
        dh = None if scale is None else gradients[-1].contiguous()
        launch(modulate_backward_kernel, blocks, x, gate, y, (scale,),
               (dx_new, dh, dx, dy, parts, S, C, EPS, steps), block)
        dtype = (gate if scale is None else scale).dtype
        dshift, dscale, dgate = parts.sum(2).to(dtype)                           # (B, C) each
        if scale is None:
            return dx, dgate, dy, None, None
        return dx, None if gate is None else dgate, dy, dshift, dscale


def norm_modulate_triton(x, shift, scale):
    """See `kernels.norm_modulate` for the arguments."""
    return Modulate.apply(x, None, None, shift, scale)


def gated_residual_triton(x, gate, y):
    """See `kernels.gated_residual` for the arguments."""
    return Modulate.apply(x, gate, y, None, None)


def residual_norm_modulate_triton(x, gate, y, shift, scale):
    """See `kernels.residual_norm_modulate` for the arguments."""
    return Modulate.apply(x, gate, y, shift, scale)
