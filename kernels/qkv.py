"""QK-norm and rotary positions: packed projections of text and image -> q, k, v for any attention.

Each head's vector of q and k is divided by its root mean square and multiplied by a weight w: the
text stream's for text rows, the image stream's for image rows. Image rows are then rotated:

    n = x r,  r = 1 / sqrt(mean(x^2) + eps)        y = R(n * w)

R turns each pair of neighbours (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin). Text rows are at
position 0, where R is the identity. Backward, with g = R^T dy (rotation by the opposite angle):

    dw = sum over rows and heads of g * n          dx = r (g * w - n mean(g * w * n))

Bytes for each row and head, in units of one vector (2 D bytes in half precision). Plain: about 50,
because norm, rotation and concatenation each read and write q and k, two of them in float32, and v
is concatenated. `joint_qkv_triton`: 6, each of q, k and v is read and written once. `norm_rotate_`:
4, q and k are overwritten and v stays where it is; for inference only.

Letters: B batch, L text rows, N image rows, S = L + N, H heads, D head size.
"""
from __future__ import annotations

import torch

from kernels._triton import interpreted, jit, tl, triton

EPS = 1e-6


# -------------------------------------------------------------------------------------------------
# Plain PyTorch


def rms_norm(x, weight, eps=EPS):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (float64 stays float64)."""
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary positions. x (B, N, H, D), cos and sin (N, D/2) -> (B, N, H, D).

    Each pair of neighbours is multiplied as a complex number, which is faster on a CPU than taking
    the pairs apart. torch.compile does not support complex numbers but fuses the other form.
    """
    if torch.compiler.is_compiling():
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                             # 2 x (B, N, H, D/2)
        c = cos[:, None]                                                         # (N, 1, D/2)
        s = sin[:, None]
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2).to(x.dtype)
    dtype = torch.promote_types(x.dtype, torch.promote_types(cos.dtype, torch.float32))
    pairs = x.to(dtype).contiguous().unflatten(-1, (-1, 2))                      # (B, N, H, D/2, 2)
    turn = torch.complex(cos.to(dtype), sin.to(dtype))[:, None]                  # (N, 1, D/2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)


def joint_qkv_plain(text, image, text_norms, image_norms, cos, sin):
    """The reference; see `kernels.attention` for the arguments -> q, k, v, each (B, S, H, D)."""
    text_q, text_k, text_v = text.unbind(2)                                      # (B, L, H, D) each
    q, k, v = image.unbind(2)                                                    # (B, N, H, D) each
    q = rotate(rms_norm(q, image_norms[0]), cos, sin)
    k = rotate(rms_norm(k, image_norms[1]), cos, sin)
    q = torch.cat((rms_norm(text_q, text_norms[0]), q), 1)                       # (B, S, H, D)
    k = torch.cat((rms_norm(text_k, text_norms[1]), k), 1)
    return q, k, torch.cat((text_v, v), 1)


# -------------------------------------------------------------------------------------------------
# Pieces that the attention kernel uses too. DP is the power of two from D on


@jit
def locate(block, batch, text, text_b, text_r, text_p, text_h, image, image_b, image_r, image_p,
           image_h, L, N, SIZE: tl.constexpr):
    """The stream of `block`: blocks of SIZE of the text's L items, then of the image's N items.

    -> pointer to q of the batch item, int64 strides of row, part (q to k to v) and head, first item
    of the block, number of items of the stream, whether it is the text
    """
    blocks = tl.cdiv(L, SIZE)
    is_text = block < blocks
    if is_text:
        x = text + batch * text_b
        row = tl.cast(text_r, tl.int64)
        part = tl.cast(text_p, tl.int64)
        head = tl.cast(text_h, tl.int64)
        first = block * SIZE
        count = tl.cast(L, tl.int32)
    else:
        x = image + batch * image_b
        row = tl.cast(image_r, tl.int64)
        part = tl.cast(image_p, tl.int64)
        head = tl.cast(image_h, tl.int64)
        first = (block - blocks) * SIZE
        count = tl.cast(N, tl.int32)
    return x, row, part, head, first, count, is_text


@jit
def load_rotation(cos, sin, row, rotated, D, DP: tl.constexpr):
    """cos and sin (rows, DP / 2) float32 of `row`; the identity where `rotated` is false."""
    i = tl.arange(0, DP // 2)[None, :]
    at = row[:, None] * (D // 2) + i
    inside = rotated[:, None] & (i < D // 2)
    c = tl.load(cos + at, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    return c, s


@jit
def rotate_pairs(x, c, s):
    """x (rows, DP). Neighbours stay in one thread: no data moves between threads."""
    x0, x1 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))           # (rows, DP / 2)
    return tl.interleave(x0 * c - x1 * s, x1 * c + x0 * s)


@jit
def inverse_rms(x, D, eps):
    return tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]                         # (rows, 1)


# -------------------------------------------------------------------------------------------------
# Forward and backward: one program for SIZE vectors (row and head) of one stream and batch item.
# Heads of one row are side by side, so that cos and sin are loaded from memory once


@jit(do_not_specialize=["L", "N"])
def qkv_kernel(text, text_b, text_r, text_p, text_h,           # (B, L, 3, H, D), first four strides
               image, image_b, image_r, image_p, image_h,      # (B, N, 3, H, D), the same
               text_wq, text_wk, image_wq, image_wk,           # (D,) weights of the norms
               cos, sin,                                       # (N, D / 2)
               q, k, v,                                        # out: (B, S, H, D) contiguous
               L, N, H, D, eps: tl.constexpr,
               IN_PLACE: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr):
    """IN_PLACE: q and k go back to where they came from, v stays there; q, k, v are not used."""
    batch = tl.program_id(1).to(tl.int64)
    x, row_stride, part, head_stride, first, count, is_text = locate(
        tl.program_id(0), batch, text, text_b, text_r, text_p, text_h,
        image, image_b, image_r, image_p, image_h, L * H, N * H, SIZE)
    i = first + tl.arange(0, SIZE)
    row = i // H
    d = tl.arange(0, DP)[None, :]
    inside = (i < count)[:, None] & (d < D)
    x += row[:, None] * row_stride + (i % H)[:, None] * head_stride + d          # (SIZE, DP)
    xq = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    xk = tl.load(x + part, mask=inside, other=0.0).to(tl.float32)
    wq = tl.load((text_wq if is_text else image_wq) + d, mask=d < D, other=0.0).to(tl.float32)
    wk = tl.load((text_wk if is_text else image_wk) + d, mask=d < D, other=0.0).to(tl.float32)
    c, s = load_rotation(cos, sin, row, (i < count) & (is_text == 0), D, DP)
    xq = rotate_pairs(xq * inverse_rms(xq, D, eps) * wq, c, s)
    xk = rotate_pairs(xk * inverse_rms(xk, D, eps) * wk, c, s)
    if IN_PLACE:
        tl.store(x, xq, mask=inside)
        tl.store(x + part, xk, mask=inside)
    else:
        joint = batch * (L + N) * H + tl.where(is_text, i, i + L * H)            # vector of (B S H)
        to = joint[:, None] * D + d                                              # (SIZE, DP)
        tl.store(q + to, xq, mask=inside)
        tl.store(k + to, xk, mask=inside)
        tl.store(v + to, tl.load(x + 2 * part, mask=inside), mask=inside)


@jit
def norm_backward(x, dx, dy, w, dw, c, s, inside, d, D, eps):
    """Stores dx (pointers like x) and this block's part of dw (pointer to (D,)), from dy."""
    x = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    g = rotate_pairs(tl.load(dy, mask=inside, other=0.0).to(tl.float32), c, -s)
    r = inverse_rms(x, D, eps)
    n = x * r
    tl.store(dw + d, tl.sum(g * n, 0)[None, :], mask=d < D)
    g *= tl.load(w + d, mask=d < D, other=0.0)
    tl.store(dx, r * (g - n * (tl.sum(g * n, 1) / D)[:, None]), mask=inside)


@jit(do_not_specialize=["L", "N", "blocks"])
def qkv_backward_kernel(text, text_b, text_r, text_p, text_h,          # as in qkv_kernel
                        image, image_b, image_r, image_p, image_h,
                        text_wq, text_wk, image_wq, image_wk, cos, sin,
                        dq, dk, dv,                                    # (B, S, H, D) contiguous
                        dtext, dtext_b, dimage, dimage_b,              # out: like text, image
                        dw,                                            # out: (4, B, blocks, D)
                        L, N, H, D, eps: tl.constexpr, blocks,
                        DP: tl.constexpr, SIZE: tl.constexpr):
    """dtext, dimage: rows are contiguous, batch items need not be. dw begins as zeros and gets the
    sums of every block, of text q, text k, image q and image k."""
    batch = tl.program_id(1).to(tl.int64)
    x, row_stride, part, head_stride, first, count, is_text = locate(
        tl.program_id(0), batch, text, text_b, text_r, text_p, text_h,
        image, image_b, image_r, image_p, image_h, L * H, N * H, SIZE)
    i = first + tl.arange(0, SIZE)
    row = i // H
    d = tl.arange(0, DP)[None, :]
    inside = (i < count)[:, None] & (d < D)
    x += row[:, None] * row_stride + (i % H)[:, None] * head_stride + d          # (SIZE, DP)
    c, s = load_rotation(cos, sin, row, (i < count) & (is_text == 0), D, DP)
    joint = batch * (L + N) * H + tl.where(is_text, i, i + L * H)
    at = joint[:, None] * D + d                                                  # (SIZE, DP)
    dx = (dtext + batch * dtext_b) if is_text else (dimage + batch * dimage_b)
    dx += (row.to(tl.int64) * 3 * H + i % H)[:, None] * D + d
    other = tl.num_programs(1).to(tl.int64) * blocks * D                         # from q to k
    dw += (batch * blocks + first // SIZE) * D + tl.where(is_text, 0, 2 * other)
    wq = text_wq if is_text else image_wq
    wk = text_wk if is_text else image_wk
    norm_backward(x, dx, dq + at, wq, dw, c, s, inside, d, D, eps)
    norm_backward(x + part, dx + H * D, dk + at, wk, dw + other, c, s, inside, d, D, eps)
    tl.store(dx + 2 * H * D, tl.load(dv + at, mask=inside), mask=inside)


# -------------------------------------------------------------------------------------------------
# Autograd and the public functions


def block_size():
    """Vectors of a block: 32 of 128 numbers are 16 numbers for each thread of 8 warps."""
    return 16 if interpreted() else 32                # the interpreter's tests cross the edges


def launch(kernel, text, image, norms, cos, sin, *outputs, last=(), **options):
    """Both kernels share most arguments, their grid and their block sizes."""
    B, L, _, H, D = text.shape
    N = image.shape[1]
    size = block_size()
    programs = triton.cdiv(L * H, size) + triton.cdiv(N * H, size)
    kernel[(programs, B)](text, *text.stride()[:4], image, *image.stride()[:4], *norms, cos, sin,
                          *outputs, L, N, H, D, EPS, *last, SIZE=size,
                          DP=max(16, triton.next_power_of_2(D)), num_warps=8, **options)


def forward(text, image, norms, cos, sin):
    """-> q, k, v, each (B, S, H, D)."""
    B, L, _, H, D = text.shape
    q, k, v = (image.new_empty((B, L + image.shape[1], H, D)) for _ in range(3))
    launch(qkv_kernel, text, image, norms, cos, sin, q, k, v, IN_PLACE=False)
    return q, k, v


def backward(text, image, norms, cos, sin, dq, dk, dv, dtext, dimage):
    """Fills dtext and dimage -> gradients of the norms, (4, D)."""
    B, L, _, H, D = text.shape
    blocks = triton.cdiv(max(L, image.shape[1]) * H, block_size())
    dw = torch.zeros((4, B, blocks, D), dtype=torch.float32, device=image.device)
    launch(qkv_backward_kernel, text, image, norms, cos, sin, dq.contiguous(), dk.contiguous(),
           dv.contiguous(), dtext, dtext.stride(0), dimage, dimage.stride(0), dw, last=(blocks,))
    return dw.sum((1, 2)).to(norms[0].dtype)


class JointQKV(torch.autograd.Function):
    """(text, image, four norms, cos, sin) -> q, k, v."""

    @staticmethod
    def forward(ctx, text, image, text_wq, text_wk, image_wq, image_wk, cos, sin):
        norms = text_wq, text_wk, image_wq, image_wk
        ctx.save_for_backward(text, image, *norms, cos, sin)
        return forward(text, image, norms, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        text, image, *norms, cos, sin = ctx.saved_tensors
        dtext = torch.empty(text.shape, dtype=text.dtype, device=text.device)
        dimage = torch.empty(image.shape, dtype=image.dtype, device=image.device)
        dnorms = backward(text, image, norms, cos, sin, dq, dk, dv, dtext, dimage)
        return dtext, dimage, *dnorms, None, None


class PackedQKV(torch.autograd.Function):
    """(text and image in one tensor, length of the text, four norms, cos, sin) -> q, k, v.

    As JointQKV, but there is one gradient: slices would need two, padded with zeros, and their sum.
    """

    @staticmethod
    def forward(ctx, qkv, length, text_wq, text_wk, image_wq, image_wk, cos, sin):
        norms = text_wq, text_wk, image_wq, image_wk
        ctx.save_for_backward(qkv, *norms, cos, sin)
        ctx.length = length
        return forward(qkv[:, :length], qkv[:, length:], norms, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, *norms, cos, sin = ctx.saved_tensors
        L = ctx.length
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        dnorms = backward(qkv[:, :L], qkv[:, L:], norms, cos, sin, dq, dk, dv,
                          dqkv[:, :L], dqkv[:, L:])
        return dqkv, None, *dnorms, None, None


def joint_qkv_triton(text, image, text_norms, image_norms, cos, sin):
    """See `kernels.attention` for the arguments -> q, k, v, each (B, S, H, D)."""
    return JointQKV.apply(text, image, *text_norms, *image_norms, cos, sin)


def packed_qkv_triton(qkv, length, text_norms, image_norms, cos, sin):
    """See `kernels.attention_in_place` for the arguments -> q, k, v, each (B, S, H, D)."""
    return PackedQKV.apply(qkv, length, *text_norms, *image_norms, cos, sin)


def norm_rotate_(text, image, text_norms, image_norms, cos, sin):
    """Normalise and rotate q and k of `text` and `image` in place; without gradients."""
    norms = *text_norms, *image_norms
    launch(qkv_kernel, text, image, norms, cos, sin, image, image, image, IN_PLACE=True)
