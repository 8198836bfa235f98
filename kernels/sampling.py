"""Draw one token for each masked position (MaskGIT, Chang et al. 2022; paper section 2.2).

With Gumbel noise g, argmax_i (x_i + g_i) is a draw from softmax(x): the Gumbel-max trick. Here it
is applied twice, first to groups of 128 codes, then to the codes of the group drawn:

    mass_j = logsumexp of x over group j
    j = argmax_j (mass_j + g_j)
    i = argmax_{i in group j} (x_i + g'_i)
    log p_i = x_i - logsumexp_j mass_j

p(group) p(code | group) = p(code), so the distribution is the same. But only V / 128 + 128 random
numbers are needed in place of V: 192 for 8192 codes. There is no backward pass.

The noise comes from a counter-based generator (Philox 4x32, Salmon et al. 2011). It depends only on
the seed of the picture, the step, the position and the index of the group or code. So a picture
does not depend on the other pictures of the batch, on block sizes, or (except for rounding) on the
device.

Bytes for each logit of two bytes. softmax and multinomial in float32: about 34 (cast 6, softmax 8,
exponential noise 4, quotient 12, argmax 4). The kernels: 2, the logits are read once.

Letters: B pictures, M masked positions of each, V codes, J groups, T steps.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._triton import jit, tl, triton

MASK32 = 0xFFFFFFFF
GROUP = 128                                          # codes of a group; part of the law of the draw
GROUPS = 32                                          # of a program: 32 logits for each thread
GROUP_NOISE, CODE_NOISE, CONFIDENCE_NOISE = 0, 1, 2  # fourth word of the Philox counter
BELOW_ONE = 1 - 2.0 ** -24                           # the largest float32 below 1


# -------------------------------------------------------------------------------------------------
# Noise


def philox(seed, c0, c1, c2, c3, rounds=10):
    """First word of Philox 4x32: seed 64 bits, counters 32 bits, all int64 -> int64 below 2^32.

    The arguments broadcast. c2 and c3 may be Python ints. Products wrap modulo 2^64.
    """
    k0 = seed & MASK32
    k1 = (seed >> 32) & MASK32
    for _ in range(rounds):
        a = c0 * 0xD2511F53
        b = c2 * 0xCD9E8D57
        c0 = ((b >> 32) ^ (c1 ^ k0)) & MASK32
        c2 = ((a >> 32) ^ (c3 ^ k1)) & MASK32
        c1 = b & MASK32
        c3 = a & MASK32
        k0 = (k0 + 0x9E3779B9) & MASK32
        k1 = (k1 + 0xBB67AE85) & MASK32
    return c0


def gumbel(bits):
    """32 random bits (int64) -> standard Gumbel noise, float32, always finite.

    log1p keeps small uniforms exact: with 24-bit uniforms near 1, tokens with p < 1e-7 would be
    drawn far too rarely.
    """
    u = ((bits.float() + 0.5) * 2.0 ** -32).clamp(max=BELOW_ONE)
    return -torch.log(-torch.log1p(-u))


def draw_noise(seeds, step, positions, count, stream):
    """seeds (B,), step int, positions (B, M) int64 -> Gumbel noise (B, M, count)."""
    index = torch.arange(count, device=positions.device)
    return gumbel(philox(seeds[:, None, None], index, positions[..., None], step, stream))


def gumbel_noise(seeds, steps, count):
    """Gumbel noise of the confidences, for all steps and positions at once.

    seeds (B,) int64, steps a list of T ints, count = number of positions -> (T, B, count) float32
    """
    steps = torch.tensor(steps, dtype=torch.int64, device=seeds.device)[:, None, None]   # (T, 1, 1)
    positions = torch.arange(count, device=seeds.device)
    index = torch.zeros_like(positions)
    return gumbel(philox(seeds[:, None], index, positions, steps, CONFIDENCE_NOISE))


# -------------------------------------------------------------------------------------------------
# Plain PyTorch


def sample_masked_plain(logits, positions, seeds, step):
    """The reference; see `kernels.sample_masked` for the arguments.

    On a CPU it takes one picture at a time, whose logits stay in the cache.
    """
    if logits.is_cuda or len(logits) < 2:
        return draw_tokens(logits, positions, seeds, step)
    pictures = zip(logits.split(1), positions.split(1), seeds.split(1))
    drawn = [draw_tokens(x, p, s, step) for x, p, s in pictures]
    return torch.cat([codes for codes, _ in drawn]), torch.cat([log_p for _, log_p in drawn])


def draw_tokens(logits, positions, seeds, step):
    x = logits if logits.dtype == torch.float64 else logits.float()     # (B, M, V)
    x = F.pad(x, (0, -x.shape[-1] % GROUP), value=-torch.inf)
    x = x.unflatten(-1, (-1, GROUP))                                    # (B, M, V/128, 128)
    mass = x.logsumexp(-1)                                              # (B, M, V/128)
    group_noise = draw_noise(seeds, step, positions, mass.shape[-1], GROUP_NOISE)
    group = (mass + group_noise).argmax(-1)                             # (B, M)
    index = group[..., None, None].expand(-1, -1, 1, GROUP)             # (B, M, 1, 128)
    x = x.gather(2, index).squeeze(2)                                   # (B, M, 128)
    code = (x + draw_noise(seeds, step, positions, GROUP, CODE_NOISE)).argmax(-1)  # (B, M)
    log_p = x.gather(-1, code[..., None]).squeeze(-1) - mass.logsumexp(-1)  # (B, M)
    return group * GROUP + code, log_p


# -------------------------------------------------------------------------------------------------
# Triton: one kernel for the mass of every group, which reads all logits, and one for the draws. In
# one kernel every thread that shares a group would compute the noise of the group again


@jit
def load_logits(logits, codes, V):
    """Logits of `codes` in float32; -inf beyond V."""
    return tl.load(logits + codes, mask=codes < V, other=float("-inf")).to(tl.float32)


@jit
def logsumexp(x, AXIS: tl.constexpr):
    """-inf where all of x is."""
    top = tl.max(x, AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x - tl.expand_dims(top, AXIS)), AXIS))


@jit
def noise(seed, index, position, step, STREAM: tl.constexpr):
    """`gumbel(philox(...))`; the arguments broadcast to the shape of `index`."""
    bits, _, _, _ = tl.philox(seed, index, position, step, STREAM)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    w = 1 - u                                          # log1p(-u) = log(w) u / (1 - w) (Kahan)
    exponential = tl.where(w == 1, u, -tl.log(w) * u / tl.maximum(1 - w, 2.0 ** -32))
    return -tl.log(exponential)


@jit
def mass_kernel(logits, logits_b, logits_m,            # (B, M, V), strides of B and M
                masses,                                # out: (B, M, J) float32
                V, J, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """One program for GROUPS groups of one masked position."""
    m = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = b * tl.num_programs(1) + m
    logits += b * logits_b + m * logits_m
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    codes = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]                # (GROUPS, GROUP)
    mass = logsumexp(load_logits(logits, codes, V), 1)                           # (GROUPS,)
    tl.store(masses + row * J + group, mass, mask=group < J)


@jit(do_not_specialize=["step"])                       # it always changes: compile once
def draw_kernel(logits, logits_b, logits_m,            # (B, M, V), strides of B and M
                masses,                                # (B, M, J) float32
                positions,                             # (B, M) int64
                seeds,                                 # (B,) int64
                out_codes, out_log_p,                  # out: (B, M) int64, (B, M) float32
                V, J, step, JP: tl.constexpr, GROUP: tl.constexpr,
                GROUP_NOISE: tl.constexpr, CODE_NOISE: tl.constexpr):
    """One program for one masked position. JP is the power of two from J on."""
    m = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = b * tl.num_programs(0) + m
    logits += b * logits_b + m * logits_m
    seed = tl.load(seeds + b)
    position = tl.load(positions + row).to(tl.int32)
    group = tl.arange(0, JP)
    mass = tl.load(masses + row * J + group, mask=group < J, other=float("-inf"))        # (JP,)
    drawn_group = tl.argmax(mass + noise(seed, group, position, step, GROUP_NOISE), 0)
    lane = tl.arange(0, GROUP)
    x = load_logits(logits, drawn_group * GROUP + lane, V)                       # (GROUP,)
    drawn = tl.argmax(x + noise(seed, lane, position, step, CODE_NOISE), 0)
    code = tl.minimum(drawn_group * GROUP + drawn, V - 1)                        # even after NaN
    log_p = tl.max(tl.where(lane == drawn, x, float("-inf")), 0) - logsumexp(mass, 0)
    tl.store(out_codes + row, code.to(tl.int64))
    tl.store(out_log_p + row, log_p)


def sample_masked_triton(logits, positions, seeds, step):
    """See `kernels.sample_masked` for the arguments."""
    B, M, V = logits.shape
    J = triton.cdiv(V, GROUP)
    masses = torch.empty((B, M, J), dtype=torch.float32, device=logits.device)
    codes = torch.empty((B, M), dtype=torch.int64, device=logits.device)
    log_p = torch.empty((B, M), dtype=torch.float32, device=logits.device)
    if B * M:
        strided = logits, *logits.stride()[:2]
        mass_kernel[(triton.cdiv(J, GROUPS), M, B)](*strided, masses, V, J, GROUPS=GROUPS,
                                                    GROUP=GROUP, num_warps=4)
        draw_kernel[(M, B)](*strided, masses, positions.contiguous(), seeds.contiguous(), codes,
                            log_p, V, J, step, JP=triton.next_power_of_2(J), GROUP=GROUP,
                            GROUP_NOISE=GROUP_NOISE, CODE_NOISE=CODE_NOISE, num_warps=1)
    return codes, log_p
