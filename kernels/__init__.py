"""The hot spots of the model, each in its own file with its plain PyTorch reference."""
from kernels.attention import attention_plain, rms_norm
from kernels.sampling import confidence_noise, remask, sample_masked_plain


def attention(text, image, text_norms, image_norms, cos, sin):
    """Joint attention with QK-norm and rotary positions.

    text (B, L, 3, H, D), image (B, N, 3, H, D)   packed q, k, v; any strides with the last axis dense; L may be 0
    text_norms, image_norms                       (w_q, w_k), each (D,): weights of the RMSNorm of q and k
    cos, sin (N, D/2) float32                     rotation of the image rows
    -> (B, L + N, H * D), text rows first, in the dtype of `image`
    """
    return attention_plain(text, image, text_norms, image_norms, cos, sin)


def sample_masked(logits, positions, seeds, step, unconditional=None, guidance=1.0, temperature=1.0):
    """Draw one token for each masked position.

    logits, unconditional (B, M, V)   of the conditional and the unconditional pass; the draw is from
                                      softmax((u + guidance (c - u)) / temperature), in float32
    positions (B, M) int64            where the masked positions lie in their picture (counters of the noise)
    seeds (B,) int64, step int        key and counter of the noise
    -> tokens (B, M) int64, log p of each (B, M) float32
    """
    return sample_masked_plain(logits, positions, seeds, step, unconditional, guidance, temperature)
