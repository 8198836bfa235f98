"""Joint attention over [text ; image] with QK-norm and rotary positions (paper section 2.3, SD3's joint attention).

For each head, with rows of q and k normalised by their root mean square and weighted, text rows with the
text stream's weights, image rows with the image stream's, and image rows then rotated by their position:

    q' = R(q / rms(q) * w_q),  k' = R(k / rms(k) * w_k),  out = softmax(q' k'^T / sqrt(D)) v

R turns each adjacent pair (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin); text stands at position 0, where
R is the identity, so text rows are not touched.

Letters: B batch, L text rows, N image rows, H heads, D head size.
"""
import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32 (float64 stays float64)."""
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary positions. x (B, N, H, D), cos and sin (N, D/2) -> (B, N, H, D)."""
    pairs = x.unflatten(-1, (-1, 2)).to(torch.promote_types(x.dtype, cos.dtype))         # (B, N, H, D/2, 2)
    x0, x1 = pairs.unbind(-1)
    cos, sin = cos[:, None], sin[:, None]                                                # (N, 1, D/2)
    return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1).flatten(-2).to(x.dtype)


def attention_plain(text, image, text_norms, image_norms, cos, sin):
    """The reference, in plain PyTorch; see `kernels.attention` for the arguments."""
    (tq, tk, tv), (iq, ik, iv) = text.unbind(2), image.unbind(2)                         # each (B, rows, H, D)
    iq, ik = (rotate(rms_norm(x, w), cos, sin) for x, w in zip((iq, ik), image_norms))
    tq, tk = (rms_norm(x, w) for x, w in zip((tq, tk), text_norms))
    q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in ((tq, iq), (tk, ik), (tv, iv)))    # (B, H, L+N, D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)            # (B, L+N, H * D)
