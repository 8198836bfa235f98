"""Joint attention over [text ; image] with QK-norm and rotary positions (paper section 2.3, SD3's joint attention).

    q' = R(q / rms(q) * w_q),  k' = R(k / rms(k) * w_k),  out = softmax(q' k'^T / sqrt(D)) v

with the norm and the rotation R of `kernels/qkv.py`. Two designs compute it from the packed projections:

in one pass   `attention_kernel`: flash attention (Dao et al. 2022) that normalises and rotates as it loads. A block
              of queries walks over the keys with the running maximum m and sum l of its rows in float32:
                  m' = max(m, rowmax(s)),  p = exp(s - m'),  l' = l exp(m - m') + rowsum(p),
                  o' = o exp(m - m') + p v,  at the end o / l
              Bytes: q, k, v read, out written, 4 d for each row and head (d = 2 D in half precision), but for the
              re-reading of k, v, cos and sin by every block of queries, which the cache serves.
in two        `joint_qkv_triton`, 6 d or 4 d, and the library's attention, 4 d.

One pass normalises each key again for every block of queries, ordinary arithmetic beside the tensor cores'
products. Counted in the machine code for D = 128 (cycles of a multiprocessor for each step of the inner loop):

    chip     tile        instructions to issue, of these norm and rotation    tensor cores busy
    8.9      128 x 32    1400                   300                           2048       hidden behind the products
    9.0      128 x 64    1580                   690                           1024       half as long again

So two passes on chips whose tensor cores are far ahead of the rest (8.0, 9.0, 10.x) and in training, where the
library's backward is at its best and only that of `kernels/qkv.py` is added. One pass on chips that have few bytes
of memory traffic for each product (8.6, 8.9, 12.x), and everywhere for so few rows that launching a second kernel
costs more than it saves. float32 takes two passes: in Triton it would multiply in TF32 or without tensor cores.
These are counts, not times: not measured. `python -m kernels.bench` times both on a GPU.

Letters: B batch, L text rows, N image rows, S = L + N, H heads, D head size.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._triton import capability, interpreted, jit, tl, triton
from kernels.qkv import EPS, inverse_rms, joint_qkv_plain, joint_qkv_triton, load_rotation, locate, rotate_pairs

FEW_ROWS = 512                                        # up to here one launch beats two on any chip


def library_attention(q, k, v):
    """(B, S, H, D) each -> (B, S, H * D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                     # (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_plain(text, image, text_norms, image_norms, cos, sin):
    """The reference, in plain PyTorch; see `kernels.attention` for the arguments."""
    return library_attention(*joint_qkv_plain(text, image, text_norms, image_norms, cos, sin))


def attention_by_head(text, image, text_norms, image_norms, cos, sin):
    """On a CPU, bfloat16, forward only: two matrix products and a softmax for each head. They run at the speed of the
    linear layers, which the library's flash kernel does not reach there (2.2x at 1101 rows of 128)."""
    q, k, v = joint_qkv_plain(text, image, text_norms, image_norms, cos, sin)            # (B, S, H, D) each
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            p = (q[b, :, h] * q.shape[-1] ** -0.5 @ k[b, :, h].t()).softmax(-1)          # (S, S)
            torch.mm(p, v[b, :, h], out=out[b, :, h])
    return out.flatten(2)


# ---------------------------------------------------------------------------------------------------------
# In one pass, forward only


@jit
def attend(q, o, m, l, k, v, stride, w, cos, sin, rows, D, eps,
           ROTATE: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr):
    """Queries q (ROWS, DP) over all rows of one stream: o (ROWS, DP), m and l (ROWS,) before -> after.
    k, v: pointers to the stream's first row, stride from row to row, w (1, DP) the weight of its norm."""
    d = tl.arange(0, DP)[None, :]
    for start in range(0, rows, COLUMNS):
        row = start + tl.arange(0, COLUMNS)
        at, inside = row[:, None].to(tl.int64) * stride + d, (row < rows)[:, None] & (d < D)
        y = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)                       # (COLUMNS, DP)
        y = y * inverse_rms(y, D, eps) * w
        if ROTATE:
            c, s = load_rotation(cos, sin, row, row < rows, D, DP)
            y = rotate_pairs(y, c, s)
        x = tl.dot(q, tl.trans(y.to(q.dtype)))                   # (ROWS, COLUMNS)
        x = tl.where((row < rows)[None, :], x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        p, shrink = tl.exp2(x - m_new[:, None]), tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        y = tl.load(v + at, mask=inside, other=0.0)                                      # (COLUMNS, DP)
        o = tl.dot(p.to(y.dtype), y, o * shrink[:, None])
        m = m_new
    return o, m, l


@jit(do_not_specialize=["L", "N"])
def attention_kernel(text, text_b, text_r, text_p, text_h,             # (B, L, 3, H, D), strides of B, L, 3, H
                     image, image_b, image_r, image_p, image_h,        # (B, N, 3, H, D), the same
                     text_wq, text_wk, image_wq, image_wk,             # (D,) weights of the norms
                     cos, sin,                                         # (N, D / 2) float32
                     out,                                              # (B, S, H, D) contiguous
                     L, N, H, D, scale, eps,                           # scale: log2(e) / sqrt(D), for exp2
                     DP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    x, stride, _, first, rows, is_text = locate(tl.program_id(0), batch, head, text, text_b, text_r, text_p, text_h,
                                                image, image_b, image_r, image_p, image_h, L, N, ROWS)
    row, d = first + tl.arange(0, ROWS), tl.arange(0, DP)[None, :]
    inside = (row < rows)[:, None] & (d < D)
    y = tl.load(x + row[:, None] * stride + d, mask=inside, other=0.0).to(tl.float32)    # (ROWS, DP)
    y = y * inverse_rms(y, D, eps) * tl.load((text_wq if is_text else image_wq) + d, mask=d < D, other=0.0)
    c, s = load_rotation(cos, sin, row, (row < rows) & (is_text == 0), D, DP)
    q = (rotate_pairs(y, c, s) * scale).to(out.dtype.element_ty)

    o, l = tl.zeros((ROWS, DP), tl.float32), tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    text += batch * text_b + head * text_h
    image += batch * image_b + head * image_h
    w = tl.load(text_wk + d, mask=d < D, other=0.0)
    o, m, l = attend(q, o, m, l, text + text_p, text + 2 * text_p, text_r, w, cos, sin, L, D, eps, False, DP, COLUMNS)
    w = tl.load(image_wk + d, mask=d < D, other=0.0)
    o, m, l = attend(q, o, m, l, image + image_p, image + 2 * image_p, image_r, w, cos, sin, N, D, eps, True, DP, COLUMNS)

    joint = batch * (L + N) + tl.where(is_text, row, row + L)                            # row of (B S)
    tl.store(out + (joint * H + head)[:, None] * D + d, o / l[:, None], mask=inside)


def attention_config(device_capability):
    """Rows of queries, columns of keys and the launch options: the largest tiles that neither spill nor exceed the
    shared memory at D = 128; on 9.0 and 10.x, where rows are few, more and smaller blocks. Not measured."""
    if device_capability is None:                      # the interpreter: small, so that tests cross the edges
        return dict(ROWS=16, COLUMNS=16)
    rows, columns = {8: (128, 32), 12: (128, 16)}.get(device_capability[0], (64, 64))
    return dict(ROWS=rows, COLUMNS=columns, num_warps=8, num_stages=2)


def attention_fused(text, image, text_norms, image_norms, cos, sin):
    """In one pass; see `kernels.attention` for the arguments."""
    (B, L, _, H, D), N = text.shape, image.shape[1]
    out = image.new_empty((B, L + N, H * D))
    config = attention_config(capability(image.device))
    blocks = triton.cdiv(L, config["ROWS"]) + triton.cdiv(N, config["ROWS"])
    attention_kernel[(blocks, H, B)](
        text, *text.stride()[:4], image, *image.stride()[:4], *text_norms, *image_norms, cos, sin, out, L, N, H, D,
        1.4426950408889634 / D ** 0.5, EPS, DP=max(16, triton.next_power_of_2(D)), **config)
    return out


# ---------------------------------------------------------------------------------------------------------
# The choice between the two


def one_pass(device_capability, half, training, rows):
    """Whether `attention_fused` is taken; see the top of this file for why. Triton uses tensor cores from 8.0 on."""
    if training or not half or device_capability < (8, 0):
        return False
    return rows <= FEW_ROWS or device_capability in ((8, 6), (8, 9)) or device_capability[0] == 12


def attention_triton(text, image, text_norms, image_norms, cos, sin):
    """See `kernels.attention` for the arguments."""
    arguments = text, image, text_norms, image_norms, cos, sin
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (text, image, *text_norms, *image_norms))
    if interpreted():
        fused = not training
    else:
        fused = one_pass(capability(image.device), image.itemsize == 2, training, text.shape[1] + image.shape[1])
    return attention_fused(*arguments) if fused else library_attention(*joint_qkv_triton(*arguments))
