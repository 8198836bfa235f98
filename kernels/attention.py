"""Joint attention over [text ; image] with QK-norm and rotary positions (paper section 2.3).

    q' = R(q / rms(q) * w_q),  k' = R(k / rms(k) * w_k),  out = softmax(q' k'^T / sqrt(D)) v

Norm and rotation R are those of `kernels/qkv.py`. There are two ways to compute this from packed
projections. Bytes are for each row and head, in units of one vector (2 D bytes in half precision):

one pass    `attention_kernel`: flash attention (Dao et al. 2022) that normalises and rotates q and
            k as it loads them. q, k, v are read and out is written, 4; every block of queries reads
            k and v again, from the cache. A block walks over the keys with the running maximum m
            and sum l of its rows, in float32:
                m' = max(m, rowmax(s))             p = exp(s - m')
                l' = l exp(m - m') + rowsum(p)     o' = o exp(m - m') + p v     at the end o / l
two passes  `kernels/qkv.py`, then the library's attention, 4. In place (`attention_in_place`) the
            first pass moves 4, else (`attention`) 6.

In one pass every block of queries normalises all keys again, with ordinary arithmetic beside the
tensor cores. On chips whose tensor cores are far ahead of the rest this costs more than it saves.
On an H200 (9.0; bfloat16, B 2, H 8, D 128) S = 333 took 22 us in one pass and 18 in two copying
passes, S = 1101 took 148 and 50, S = 4173 took 1429 and 268. One pass is taken on 8.6, 8.9 and
12.x, which have less memory bandwidth for each product; it is not measured there yet (`python -m
tools.bench`). float32 takes two passes, and so does training, as only the library has a backward.

Letters: B batch, L text rows, N image rows, S = L + N, H heads, D head size.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._triton import capability, interpreted, jit, tl, triton
from kernels.qkv import (EPS, inverse_rms, joint_qkv_plain, joint_qkv_triton, load_rotation, locate,
                         norm_rotate_, packed_qkv_triton, rotate_pairs)


def library_attention(q, k, v):
    """q, k, v (B, S, H, D) -> (B, S, H * D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                             # (B, H, S, D)
    out = F.scaled_dot_product_attention(q, k, v)                                # (B, H, S, D)
    return out.transpose(1, 2).flatten(2)


# -------------------------------------------------------------------------------------------------
# Plain PyTorch


def attention_plain(text, image, text_norms, image_norms, cos, sin):
    """The reference; see `kernels.attention` for the arguments."""
    return library_attention(*joint_qkv_plain(text, image, text_norms, image_norms, cos, sin))


def attention_by_head(text, image, text_norms, image_norms, cos, sin):
    """For bfloat16 on a CPU, forward only: two matrix products and a softmax for each head.

    They run at the speed of the linear layers. The library's flash attention does not: it takes 2.2
    times as long at 1101 rows of 128.
    """
    q, k, v = joint_qkv_plain(text, image, text_norms, image_norms, cos, sin)    # (B, S, H, D)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] * q.shape[-1] ** -0.5 @ k[b, :, h].t()           # (S, S)
            torch.mm(scores.softmax(-1), v[b, :, h], out=out[b, :, h])
    return out.flatten(2)


# -------------------------------------------------------------------------------------------------
# Triton, in one pass, forward only: one program for a block of queries of one head


@jit
def attend(q, o, m, l, k, v, stride, w, cos, sin, rows, D, eps,
           ROTATE: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr):
    """Let queries q (ROWS, DP) attend to all rows of one stream.

    k, v: pointers to the stream's first row; stride: from row to row; w (1, DP): weight of the norm
    o (ROWS, DP), m, l (ROWS,): output so far, maximum, sum -> the same with this stream
    """
    d = tl.arange(0, DP)[None, :]
    for start in range(0, rows, COLUMNS):
        row = start + tl.arange(0, COLUMNS)
        at = row[:, None].to(tl.int64) * stride + d                              # (COLUMNS, DP)
        inside = (row < rows)[:, None] & (d < D)
        y = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        y = y * inverse_rms(y, D, eps) * w
        if ROTATE:
            c, s = load_rotation(cos, sin, row, row < rows, D, DP)
            y = rotate_pairs(y, c, s)
        scores = tl.dot(q, tl.trans(y.to(q.dtype)))                              # (ROWS, COLUMNS)
        scores = tl.where((row < rows)[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        y = tl.load(v + at, mask=inside, other=0.0)                              # (COLUMNS, DP)
        o = tl.dot(p.to(y.dtype), y, o * shrink[:, None])
        m = m_new
    return o, m, l


@jit(do_not_specialize=["L", "N"])
def attention_kernel(text, text_b, text_r, text_p, text_h,             # (B, L, 3, H, D), strides
                     image, image_b, image_r, image_p, image_h,        # (B, N, 3, H, D), strides
                     text_wq, text_wk, image_wq, image_wk,             # (D,) weights of the norms
                     cos, sin,                                         # (N, D / 2)
                     out,                                              # (B, S, H, D) contiguous
                     L, N, H, D,
                     scale: tl.constexpr, eps: tl.constexpr,           # scale: log2(e) / sqrt(D)
                     DP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    x, row_stride, _, head_stride, first, rows, is_text = locate(
        tl.program_id(0), batch, text, text_b, text_r, text_p, text_h,
        image, image_b, image_r, image_p, image_h, L, N, ROWS)
    row = first + tl.arange(0, ROWS)
    d = tl.arange(0, DP)[None, :]
    inside = (row < rows)[:, None] & (d < D)
    x += head * head_stride + row[:, None] * row_stride + d                      # (ROWS, DP)
    y = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    wq = tl.load((text_wq if is_text else image_wq) + d, mask=d < D, other=0.0).to(tl.float32)
    y = y * inverse_rms(y, D, eps) * wq
    c, s = load_rotation(cos, sin, row, (row < rows) & (is_text == 0), D, DP)
    q = (rotate_pairs(y, c, s) * scale).to(out.dtype.element_ty)

    o = tl.zeros((ROWS, DP), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    text += batch * text_b + head * text_h
    image += batch * image_b + head * image_h
    w = tl.load(text_wk + d, mask=d < D, other=0.0).to(tl.float32)
    o, m, l = attend(q, o, m, l, text + text_p, text + 2 * text_p, text_r, w, cos, sin, L, D, eps,
                     False, DP, COLUMNS)
    w = tl.load(image_wk + d, mask=d < D, other=0.0).to(tl.float32)
    o, m, l = attend(q, o, m, l, image + image_p, image + 2 * image_p, image_r, w, cos, sin, N, D,
                     eps, True, DP, COLUMNS)

    joint = batch * (L + N) + tl.where(is_text, row, row + L)                    # row of (B S)
    tl.store(out + (joint * H + head)[:, None] * D + d, o / l[:, None], mask=inside)


def attention_config(version):
    """Rows of queries, columns of keys, launch options, by compute capability.

    The largest tiles that neither spill registers nor exceed the shared memory at D = 128. Smaller
    on 9.0 and 10.x, where there are few rows for each multiprocessor.
    """
    if version is None:                               # the interpreter: small, to cross the edges
        return dict(ROWS=16, COLUMNS=16)
    rows, columns = {8: (128, 32), 12: (128, 16)}.get(version[0], (64, 64))
    return dict(ROWS=rows, COLUMNS=columns, num_warps=8, num_stages=2)


def attention_fused(text, image, text_norms, image_norms, cos, sin):
    """In one pass; see `kernels.attention` for the arguments."""
    B, L, _, H, D = text.shape
    N = image.shape[1]
    out = image.new_empty((B, L + N, H * D))
    config = attention_config(capability(image.device))
    blocks = triton.cdiv(L, config["ROWS"]) + triton.cdiv(N, config["ROWS"])
    attention_kernel[(blocks, H, B)](
        text, *text.stride()[:4], image, *image.stride()[:4], *text_norms, *image_norms, cos, sin,
        out, L, N, H, D, 1.4426950408889634 / D ** 0.5, EPS,
        DP=max(16, triton.next_power_of_2(D)), **config)
    return out


# -------------------------------------------------------------------------------------------------
# The choice between the two


def one_pass(version, dtype):
    """Whether `attention_fused` is faster on this compute capability; see the top of this file."""
    return dtype.itemsize == 2 and (version in ((8, 6), (8, 9)) or version[0] == 12)


def needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def attention_triton(text, image, text_norms, image_norms, cos, sin):
    """See `kernels.attention` for the arguments."""
    arguments = text, image, text_norms, image_norms, cos, sin
    training = needs_gradient(text, image, *text_norms, *image_norms)
    if not training and (interpreted() or one_pass(capability(image.device), image.dtype)):
        return attention_fused(*arguments)
    return library_attention(*joint_qkv_triton(*arguments))


def attention_in_place_triton(qkv, length, text_norms, image_norms, cos, sin):
    """See `kernels.attention_in_place` for the arguments."""
    if needs_gradient(qkv, *text_norms, *image_norms) or torch.compiler.is_compiling():
        qkv = packed_qkv_triton(qkv, length, text_norms, image_norms, cos, sin)
        return library_attention(*qkv)
    arguments = qkv[:, :length], qkv[:, length:], text_norms, image_norms, cos, sin
    if not interpreted() and one_pass(capability(qkv.device), qkv.dtype):
        return attention_fused(*arguments)
    norm_rotate_(*arguments)
    return library_attention(*qkv.unbind(2))
