"""Drawing masked tokens (SPEC of MaskGIT, Chang et al. 2022; paper section 2.2).

At every masked position one token is drawn from softmax(logits) by the Gumbel-max trick,

    token = argmax_c (logit_c / T + g_c),   g_c = -log E_c,   E_c = -log(1 - u_c) exponential,

and log p(token) is kept: of the drawn tokens, those with the lowest log p + temperature * Gumbel noise are
masked again. The noise is counter-based (Philox 4x32, Salmon et al. 2011): u depends on the picture's seed,
the step, the position and the code alone, so a picture does not depend on its neighbours in the batch, on the
device, or on how a kernel cuts the work.

Letters: B pictures, M masked positions of each, V codes.
"""
import torch

MASK32 = 0xFFFFFFFF
DRAW, CONFIDENCE = 0, 1                               # streams: third word of the Philox counter


def philox(seed, c0, c1, c2, rounds=10):
    """Philox 4x32: int64 tensors that broadcast, `seed` 64 bits, counters 32 bits -> four int64 tensors of 32 bits.
    The fourth counter word is 0."""
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & MASK32) ^ c1 ^ k0, b & MASK32, ((a >> 32) & MASK32) ^ c3 ^ k1, a & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def gumbel(bits):
    """32 random bits (int64) -> standard Gumbel noise, float32. log1p keeps the smallest u exact: with 23-bit
    uniforms near 1, tokens with p < 1e-7 would be drawn far too rarely."""
    u = (bits.float() + 0.5) * 2.0 ** -32
    return -torch.log(-torch.log1p(-u))


def draw_noise(seeds, step, positions, codes):
    """Gumbel noise (B, M, codes) for the draw. seeds (B,), positions (B, M) int64; one Philox call gives 4 codes."""
    quad = torch.arange((codes + 3) // 4, device=positions.device)
    words = philox(seeds[:, None, None], quad, positions[..., None], torch.tensor(step * 2 + DRAW, device=quad.device))
    return gumbel(torch.stack(words, -1).flatten(-2)[..., :codes])


def confidence_noise(seeds, step, positions):
    """Gumbel noise (B, M) for the choice of what to mask again."""
    zero = torch.zeros_like(positions)
    return gumbel(philox(seeds[:, None], zero, positions, zero + (step * 2 + CONFIDENCE))[0])


def sample_masked_plain(logits, positions, seeds, step, unconditional=None, guidance=1.0, temperature=1.0):
    """The reference, in plain PyTorch; see `kernels.sample_masked` for the arguments."""
    logits = logits if logits.dtype == torch.float64 else logits.float()                 # (B, M, V)
    if unconditional is not None:
        logits = unconditional + guidance * (logits - unconditional)
    logp = torch.log_softmax(logits / temperature, -1)
    tokens = (logp + draw_noise(seeds, step, positions, logits.shape[-1])).argmax(-1)    # (B, M)
    return tokens, logp.gather(-1, tokens[..., None])[..., 0]


def remask(positions, logp, noise, temperature, count):
    """The `count` positions of each picture with the lowest confidence log p + temperature * noise.
    positions, logp, noise (B, M) -> (B, count) int64. No host sync: `count` comes from the schedule."""
    lowest = (logp + temperature * noise).topk(count, dim=1, largest=False, sorted=False).indices
    return positions.gather(1, lowest)
