"""QK-norm and rotary positions: packed projections of text and image -> joint q, k, v, ready for any attention.

For each head, with rows of q and k normalised by their root mean square and weighted, text rows with the text
stream's weights w, image rows with the image stream's, and image rows then rotated by their position:

    n = x r,  r = 1 / sqrt(mean(x^2) + eps)        y = R(n * w)

R turns each adjacent pair (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin); text stands at position 0, where R is the
identity. Backward, with g = R^T dy (a rotation by the opposite angle):

    dw = sum over rows of g * n        dx = r (g * w - n mean(g * w * n))

Bytes for each row and head, d = 2 D of them in a vector of half precision. Plain: norm, rotation and concatenation
each read and write q and k, the norm and the rotation through float32, and v is concatenated: about 50 d. Here each
of q, k, v is read and written once, 6 d; v of two views that already lie in line in memory is not moved at all, 4 d.

Letters: B batch, L text rows, N image rows, S = L + N, H heads, D head size.
"""
from __future__ import annotations

import torch

from kernels._triton import interpreted, jit, tl, triton

EPS = 1e-6


# ---------------------------------------------------------------------------------------------------------
# Plain PyTorch


def rms_norm(x, weight, eps=EPS):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32 (float64 stays float64).
    Without a weight x itself."""
    if weight is None:
        return x
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary positions. x (B, N, H, D), cos and sin (N, D/2) -> (B, N, H, D). Neighbours are a complex number that is
    turned: on a CPU ten times faster than to part them and put them together again, unless torch.compile, which knows
    no complex numbers, fuses that with what stands beside it."""
    if torch.compiler.is_compiling():
        a, b, c, s = *x.unflatten(-1, (-1, 2)).unbind(-1), cos[:, None], sin[:, None]    # (B, N, H, D/2), (N, 1, D/2)
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2).to(x.dtype)
    dtype = torch.promote_types(x.dtype, cos.dtype)
    pairs = torch.view_as_complex(x.to(dtype).contiguous().unflatten(-1, (-1, 2)))       # (B, N, H, D/2)
    turn = torch.complex(cos.to(dtype), sin.to(dtype))[:, None]                          # (N, 1, D/2)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def joint_qkv_plain(text, image, text_norms, image_norms, cos, sin):
    """The reference; see `kernels.attention` for the arguments -> q, k, v, each (B, S, H, D)."""
    (tq, tk, tv), (iq, ik, iv) = text.unbind(2), image.unbind(2)                         # each (B, rows, H, D)
    iq, ik = (rotate(rms_norm(x, w), cos, sin) for x, w in zip((iq, ik), image_norms))
    tq, tk = (rms_norm(x, w) for x, w in zip((tq, tk), text_norms))
    return tuple(torch.cat(pair, 1) for pair in ((tq, iq), (tk, ik), (tv, iv)))


# ---------------------------------------------------------------------------------------------------------
# Pieces that the attention kernel uses too. Tiles are (ROWS, DP) float32, DP the power of two from D on


@jit
def locate(block, batch, head, text, text_b, text_r, text_p, text_h, image, image_b, image_r, image_p, image_h,
           L, N, ROWS: tl.constexpr):
    """Block `block` of the blocks of text rows, followed by those of image rows: (pointer to q of its stream, stride
    of rows, stride from q to k and from k to v, first row of the block, rows of the stream, is text)."""
    blocks = tl.cdiv(L, ROWS)
    is_text = block < blocks
    if is_text:
        x = text + batch * text_b + head * text_h
        stride, part = tl.cast(text_r, tl.int64), tl.cast(text_p, tl.int64)
        first, rows = block * ROWS, tl.cast(L, tl.int32)
    else:
        x = image + batch * image_b + head * image_h
        stride, part = tl.cast(image_r, tl.int64), tl.cast(image_p, tl.int64)
        first, rows = (block - blocks) * ROWS, tl.cast(N, tl.int32)
    return x, stride, part, first, rows, is_text


@jit
def load_rotation(cos, sin, row, rotated, D, DP: tl.constexpr):
    """cos and sin (ROWS, DP / 2) of rows (ROWS,); the identity where `rotated` (ROWS,) is false."""
    i = tl.arange(0, DP // 2)
    at, inside = row[:, None] * (D // 2) + i[None, :], rotated[:, None] & (i < D // 2)[None, :]
    return tl.load(cos + at, mask=inside, other=1.0), tl.load(sin + at, mask=inside, other=0.0)


@jit
def rotate_pairs(x, c, s):
    """Neighbours stay in one thread, so that neither split nor interleave moves data between threads."""
    x0, x1 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))                   # (ROWS, DP / 2) each
    return tl.interleave(x0 * c - x1 * s, x1 * c + x0 * s)


@jit
def inverse_rms(x, D, eps):
    return tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]                                 # (ROWS, 1)


# ---------------------------------------------------------------------------------------------------------
# Forward and backward: one program for a block of rows of one stream, one head, one item of the batch


@jit(do_not_specialize=["L", "N"])
def qkv_kernel(text, text_b, text_r, text_p, text_h,           # (B, L, 3, H, D), strides of B, L, 3, H
               image, image_b, image_r, image_p, image_h,      # (B, N, 3, H, D), the same
               text_wq, text_wk, image_wq, image_wk,           # (D,) weights of the norms
               cos, sin,                                       # (N, D / 2) float32
               q, k, v,                                        # out: (B, S, H, D) contiguous
               L, N, H, D, eps, COPY_V: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    x, stride, part, first, rows, is_text = locate(tl.program_id(0), batch, head, text, text_b, text_r, text_p, text_h,
                                                   image, image_b, image_r, image_p, image_h, L, N, ROWS)
    row, d = first + tl.arange(0, ROWS), tl.arange(0, DP)[None, :]
    x += row[:, None] * stride + d                                                       # (ROWS, DP)
    inside = (row < rows)[:, None] & (d < D)
    joint = batch * (L + N) + tl.where(is_text, row, row + L)                            # row of (B S)
    to = (joint * H + head)[:, None] * D + d                                             # (ROWS, DP)
    wq = text_wq if is_text else image_wq
    wk = text_wk if is_text else image_wk
    c, s = load_rotation(cos, sin, row, (row < rows) & (is_text == 0), D, DP)

    y = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    y = y * inverse_rms(y, D, eps) * tl.load(wq + d, mask=d < D, other=0.0)
    tl.store(q + to, rotate_pairs(y, c, s), mask=inside)
    y = tl.load(x + part, mask=inside, other=0.0).to(tl.float32)
    y = y * inverse_rms(y, D, eps) * tl.load(wk + d, mask=d < D, other=0.0)
    tl.store(k + to, rotate_pairs(y, c, s), mask=inside)
    if COPY_V:
        tl.store(v + to, tl.load(x + 2 * part, mask=inside), mask=inside)


@jit
def norm_backward(x, dx, dy, w, dw, c, s, inside, d, D, eps):
    """dx (pointers like x) and this block's share of dw (pointer to (D,)) from dy."""
    x = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    g = rotate_pairs(tl.load(dy, mask=inside, other=0.0).to(tl.float32), c, -s)
    r = inverse_rms(x, D, eps)
    n = x * r
    tl.store(dw + d, tl.sum(g * n, 0)[None, :], mask=d < D)
    g *= tl.load(w + d, mask=d < D, other=0.0)
    tl.store(dx, r * (g - n * (tl.sum(g * n, 1) / D)[:, None]), mask=inside)


@jit(do_not_specialize=["L", "N"])
def qkv_backward_kernel(text, text_b, text_r, text_p, text_h,          # as in qkv_kernel
                        image, image_b, image_r, image_p, image_h,
                        text_wq, text_wk, image_wq, image_wk, cos, sin,
                        dq, dk, dv,                                    # (B, S, H, D) contiguous
                        dtext, dimage,                                 # out: (B, rows, 3, H, D) contiguous
                        dw,                                            # out: (2, B, H, blocks, D) float32
                        L, N, H, D, eps, DP: tl.constexpr, ROWS: tl.constexpr):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x, stride, part, first, rows, is_text = locate(block, batch, head, text, text_b, text_r, text_p, text_h,
                                                   image, image_b, image_r, image_p, image_h, L, N, ROWS)
    row, d = first + tl.arange(0, ROWS), tl.arange(0, DP)[None, :]
    x += row[:, None] * stride + d                                                       # (ROWS, DP)
    inside = (row < rows)[:, None] & (d < D)
    joint = batch * (L + N) + tl.where(is_text, row, row + L)
    at = (joint * H + head)[:, None] * D + d                                             # (ROWS, DP)
    wq = text_wq if is_text else image_wq
    wk = text_wk if is_text else image_wk
    c, s = load_rotation(cos, sin, row, (row < rows) & (is_text == 0), D, DP)

    dx = (dtext if is_text else dimage) + ((batch * rows + row) * 3 * H + head)[:, None] * D + d
    share = dw + ((batch * H + head) * tl.num_programs(0) + block) * D
    other = tl.num_programs(2).to(tl.int64) * H * tl.num_programs(0) * D                 # from dw of q to that of k
    norm_backward(x, dx, dq + at, wq, share, c, s, inside, d, D, eps)
    norm_backward(x + part, dx + H * D, dk + at, wk, share + other, c, s, inside, d, D, eps)
    tl.store(dx + 2 * H * D, tl.load(dv + at, mask=inside), mask=inside)


# ---------------------------------------------------------------------------------------------------------
# Autograd and the public function


def launch(kernel, text, image, norms, cos, sin, *rest, **options):
    """Both kernels share their first arguments, their grid and their block sizes."""
    (B, L, _, H, D), N, rows = text.shape, image.shape[1], block_rows()
    kernel[(triton.cdiv(L, rows) + triton.cdiv(N, rows), H, B)](
        text, *text.stride()[:4], image, *image.stride()[:4], *norms, cos, sin, *rest, L, N, H, D, EPS,
        DP=max(16, triton.next_power_of_2(D)), ROWS=rows, num_warps=8, **options)


def block_rows():
    """32 rows of 128 are 16 numbers for each thread of 8 warps; in the interpreter small tests cross the edges."""
    return 16 if interpreted() else 32


def forward(text, image, norms, cos, sin, v=None):
    """q, k, v. A given `v` is taken as it is, else it is copied too."""
    B, L, _, H, D = text.shape
    q, k = (image.new_empty((B, L + image.shape[1], H, D)) for _ in range(2))
    copy = torch.empty_like(q) if v is None else v
    launch(qkv_kernel, text, image, norms, cos, sin, q, k, copy, COPY_V=v is None)
    return q, k, copy


class JointQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, image, text_wq, text_wk, image_wq, image_wk, cos, sin):
        norms = text_wq, text_wk, image_wq, image_wk
        ctx.save_for_backward(text, image, *norms, cos, sin)
        return forward(text, image, norms, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        text, image, *norms, cos, sin = ctx.saved_tensors
        (B, L, _, H, D), rows = text.shape, block_rows()
        dtext, dimage = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (text, image))
        text_blocks = triton.cdiv(L, rows)
        blocks = text_blocks + triton.cdiv(image.shape[1], rows)
        dw = torch.empty((2, B, H, blocks, D), dtype=torch.float32, device=image.device)
        launch(qkv_backward_kernel, text, image, norms, cos, sin, dq.contiguous(), dk.contiguous(), dv.contiguous(),
               dtext, dimage, dw)
        shares = dw.sum((1, 2)).split((text_blocks, blocks - text_blocks), 1)            # text, image: (2, blocks, D)
        dnorms = (x.sum(0).to(w.dtype) for x, w in zip((*shares[0], *shares[1]), norms))
        return dtext, dimage, *dnorms, None, None


def in_line(text, image):
    """Whether the rows of text and image follow each other in one tensor, as in a single-modal block."""
    return (text.untyped_storage().data_ptr() == image.untyped_storage().data_ptr() and text.stride() == image.stride()
            and text.storage_offset() + text.shape[1] * text.stride(1) == image.storage_offset())


def joint_qkv_triton(text, image, text_norms, image_norms, cos, sin):
    """See `kernels.attention` for the arguments -> q, k, v, each (B, S, H, D); v may be a view of the inputs."""
    norms = *text_norms, *image_norms
    if torch.is_grad_enabled() and any(x.requires_grad for x in (text, image, *norms)):
        return JointQKV.apply(text, image, *norms, cos, sin)
    v = None
    if not torch.compiler.is_compiling() and in_line(text, image):
        B, L, _, H, D = text.shape
        v = text.as_strided((B, L + image.shape[1], 3, H, D), text.stride())[:, :, 2]
    return forward(text, image, norms, cos, sin, v)
