"""Drawing masked tokens (MaskGIT, Chang et al. 2022; paper section 2.2).

At every masked position one token is drawn from p = softmax(x), x = (u + guidance (c - u)) / temperature, by the
Gumbel-max trick: argmax_i (x_i + g_i) with g_i = -log E_i, E_i exponential, is a draw from softmax(x). It is used
twice, first for a group of 128 codes and then for a code inside it:

    mass_j = logsumexp of x over group j       j = argmax_j (mass_j + g_j)       i = argmax_{i in j} (x_i + g'_i)

p(group) p(code | group) = p(code), so the law is the same, but V / 128 + 128 numbers are random instead of V:
192 for 8192 codes, where one for each code would cost several times the memory traffic. log p(token) is kept: of
the drawn tokens, those with the lowest log p + temperature * Gumbel noise are masked again.

The noise is counter-based (Philox 4x32, Salmon et al. 2011): it depends on the picture's seed, the step, the
position and the group or code alone, so a picture does not depend on its neighbours in the batch, on the device
(but for rounding), or on how a kernel cuts the work.

Bytes for each logit of two bytes: softmax + multinomial in float32 move about 30 with guidance (two casts, the
guided logits, the probabilities, multinomial's copy and noise); the kernel reads c and u once, 4, and writes none.
`sample_from_head` goes on: the last matrix product of the head inside the kernel, and no logit reaches memory.
Forward only: nothing here is differentiated.

Letters: B pictures, M masked positions of each, V codes, C width of the head's input.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._triton import capability, interpreted, jit, tl

MASK32 = 0xFFFFFFFF
GROUP = 128                                           # codes of a group; part of the law of the draw, not a block size
GROUP_NOISE, CODE_NOISE, CONFIDENCE_NOISE = 0, 1, 2   # fourth word of the Philox counter
BELOW_ONE = 1 - 2.0 ** -24                            # the largest float32 below 1


# ---------------------------------------------------------------------------------------------------------
# Plain PyTorch


def philox(seed, c0, c1, c2, c3, rounds=10):
    """Philox 4x32: int64 tensors that broadcast, `seed` 64 bits, counters 32 bits -> first word, int64 of 32 bits. c2 and
    c3 may be plain ints, for which a GPU need not be waited."""
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57                     # modulo 2^64: int64 wraps round
        c0, c1, c2, c3 = ((b >> 32) ^ (c1 ^ k0)) & MASK32, b, ((a >> 32) ^ (c3 ^ k1)) & MASK32, a        # of c1, c3 the low words
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0


def gumbel(bits):
    """32 random bits (int64) -> finite standard Gumbel noise, float32. log1p keeps the smallest u exact: uniforms of
    24 bits near 1 would draw tokens with p < 1e-7 far too rarely."""
    u = ((bits.float() + 0.5) * 2.0 ** -32).clamp(max=BELOW_ONE)
    return -torch.log(-torch.log1p(-u))


def draw_noise(seeds, step, positions, count, stream):
    """Gumbel noise (B, M, count). seeds (B,), positions (B, M) int64."""
    index = torch.arange(count, device=positions.device)
    return gumbel(philox(seeds[:, None, None], index, positions[..., None], step, stream))


def confidence_noise(seeds, step, positions):
    """Gumbel noise (B, M) for the choice of what to mask again."""
    return draw_noise(seeds, step, positions, 1, CONFIDENCE_NOISE)[..., 0]


def sample_masked_plain(logits, positions, seeds, step, unconditional=None, guidance=1.0, temperature=1.0):
    """The reference, in plain PyTorch; see `kernels.sample_masked` for the arguments."""
    x = logits if logits.dtype == torch.float64 else logits.float()                      # (B, M, V)
    if unconditional is not None:                      # -inf in either pass forbids a code; -inf - -inf would be NaN
        forbidden = torch.minimum(x, unconditional.to(x.dtype)) == -torch.inf
        x = (unconditional + guidance * (x - unconditional)).masked_fill(forbidden, -torch.inf)
    x = F.pad(x / temperature, (0, -x.shape[-1] % GROUP), value=-torch.inf).unflatten(-1, (-1, GROUP))
    mass = x.logsumexp(-1)                                                               # (B, M, V / GROUP)
    group = (mass + draw_noise(seeds, step, positions, mass.shape[-1], GROUP_NOISE)).argmax(-1)        # (B, M)
    x = x.gather(2, group[..., None, None].expand(-1, -1, 1, GROUP))[..., 0, :]          # (B, M, GROUP)
    code = (x + draw_noise(seeds, step, positions, GROUP, CODE_NOISE)).argmax(-1)        # (B, M)
    return group * GROUP + code, x.gather(-1, code[..., None])[..., 0] - mass.logsumexp(-1)


def sample_from_head_plain(hidden, weight, positions, seeds, step, temperature=1.0):
    """The reference, in plain PyTorch; see `kernels.sample_from_head` for the arguments. Picture by picture: what a CPU's
    cache holds is not moved (half the time, of 32 with 1024 positions of 1016 codes)."""
    drawn = [sample_masked_plain(h @ weight.T, p, s, step, temperature=temperature)
             for h, p, s in zip(hidden.split(1), positions.split(1), seeds.split(1))]
    return tuple(map(torch.cat, zip(*drawn)))                                            # (B, M) twice


def remask(positions, logp, noise, temperature, count):
    """The `count` positions of each picture with the lowest confidence log p + temperature * noise.
    positions, logp, noise (B, M) -> (B, count) int64. No host sync: `count` comes from the schedule."""
    lowest = (logp + temperature * noise).topk(count, dim=1, largest=False, sorted=False).indices
    return positions.gather(1, lowest)


# ---------------------------------------------------------------------------------------------------------
# Pieces of both kernels. x: scaled logits of whole groups in float32, -inf beyond V


@jit
def noise(seed, index, position, step, STREAM: tl.constexpr):
    """`gumbel(philox(...))` on the device; the arguments broadcast to the shape of `index`."""
    bits, _, _, _ = tl.philox(seed, index, position, step, STREAM)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    w = 1 - u                                          # log1p(-u) = log(w) u / (1 - w), exact to the last bits (Kahan)
    exponential = tl.where(w == 1, u, -tl.log(w) * u / tl.maximum(1 - w, 2.0 ** -32))
    return -tl.log(exponential)


@jit
def logsumexp(x, AXIS: tl.constexpr):
    """-inf where all of x is."""
    top = tl.max(x, AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x - tl.expand_dims(top, AXIS)), AXIS))


@jit
def logaddexp(a, b):
    high = tl.maximum(a, b)
    return high + tl.where(high == float("-inf"), 0.0, tl.log(1 + tl.exp(tl.minimum(a, b) - high)))


@jit
def draw_code(x, group, total, tokens, logp, seed, position, step, V, GROUP: tl.constexpr, CODE_NOISE: tl.constexpr):
    """The second draw, and the stores. x (GROUP,) logits of the group, total the logsumexp of all logits."""
    lane = tl.arange(0, GROUP)
    code = tl.argmax(x + noise(seed, lane, position, step, CODE_NOISE), 0)
    tl.store(tokens, tl.minimum(group * GROUP + code, V - 1).to(tl.int64))              # in range even after NaN
    tl.store(logp, tl.max(tl.where(lane == code, x, float("-inf")), 0) - total)


# ---------------------------------------------------------------------------------------------------------
# Sampling from logits: one program for each masked position, one pass over its logits


@jit
def scaled_logits(c, u, codes, V, guidance, inverse_temperature, GUIDED: tl.constexpr):
    x = tl.load(c + codes, mask=codes < V, other=float("-inf")).to(tl.float32)
    if GUIDED:
        y = tl.load(u + codes, mask=codes < V, other=float("-inf")).to(tl.float32)
        x = tl.where(tl.minimum(x, y) == float("-inf"), float("-inf"), y + guidance * (x - y))
    return x * inverse_temperature


@jit(do_not_specialize=["M", "step"])                  # they change with every step: one compilation serves all
def sample_kernel(c, c_b, c_m,                         # (B, M, V) conditional logits, strides of B and M
                  u, u_b, u_m,                         # the same of the unconditional pass; c's own without guidance
                  positions,                           # (B, M) int64
                  seeds,                               # (B,) int64
                  tokens, logp,                        # out: (B, M) int64, (B, M) float32
                  M, V, step, guidance, inverse_temperature,
                  GUIDED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
                  GROUP_NOISE: tl.constexpr, CODE_NOISE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b, m = row // M, row % M
    c += b * c_b + m * c_m
    u += b * u_b + m * u_m
    seed, position = tl.load(seeds + b), tl.load(positions + row).to(tl.int32)
    lane = tl.arange(0, GROUP)

    # Lane i of these holds what was best, and the mass, of groups i, i + GROUPS, ...: one reduction at the end
    best = tl.full((GROUPS,), float("-inf"), tl.float32)
    best_group = tl.zeros((GROUPS,), tl.int32)
    total = best
    for start in range(0, tl.cdiv(V, GROUP), GROUPS):
        group = start + tl.arange(0, GROUPS)
        codes = group[:, None] * GROUP + lane[None, :]                                   # (GROUPS, GROUP)
        mass = logsumexp(scaled_logits(c, u, codes, V, guidance, inverse_temperature, GUIDED), 1)
        score = mass + noise(seed, group, position, step, GROUP_NOISE)                   # (GROUPS,)
        best_group = tl.where(score > best, group, best_group)
        best = tl.maximum(score, best)
        total = logaddexp(total, mass)

    winner = tl.max(tl.where(best == tl.max(best, 0), best_group, 0), 0)
    codes = winner * GROUP + lane                                                        # read again, from the cache
    x = scaled_logits(c, u, codes, V, guidance, inverse_temperature, GUIDED)             # (GROUP,)
    top = tl.max(total, 0)
    total = top + tl.log(tl.sum(tl.exp(total - top), 0))
    draw_code(x, winner, total, tokens + row, logp + row, seed, position, step, V, GROUP, CODE_NOISE)


def sample_masked_triton(logits, positions, seeds, step, unconditional=None, guidance=1.0, temperature=1.0):
    """See `kernels.sample_masked` for the arguments."""
    (B, M, V), u = logits.shape, logits if unconditional is None else unconditional
    tokens = torch.empty((B, M), dtype=torch.int64, device=logits.device)
    logp = torch.empty((B, M), dtype=torch.float32, device=logits.device)
    if B * M:
        sample_kernel[(B * M,)](logits, *logits.stride()[:2], u, *u.stride()[:2], positions.contiguous(),
                                seeds.contiguous(), tokens, logp, M, V, step, guidance, 1 / temperature, unconditional is not None,
                                16, GROUP, GROUP_NOISE, CODE_NOISE, num_warps=4)         # 16 logits for each thread
    return tokens, logp


# ---------------------------------------------------------------------------------------------------------
# Sampling from the head's input: one program for a block of masked positions, a matrix product for each group


@jit(do_not_specialize=["rows", "M", "step"])
def head_kernel(hidden, hidden_r,                      # (rows, C), rows = B * M; stride of the rows
                weight, weight_v,                      # (V, C), stride of V
                positions,                             # (rows,) int64
                seeds,                                 # (B,) int64
                kept,                                  # scratch (rows, GROUP) float32: logits of each row's best group
                tokens, logp,                          # out: (rows,) best group, int64; logsumexp of all logits
                rows, M, V, C, step, inverse_temperature,
                ROWS: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, GROUP_NOISE: tl.constexpr):
    first = tl.program_id(0) * ROWS                    # int64 for the block, int32 for offsets in it: fewer registers
    hidden += first.to(tl.int64) * hidden_r
    kept += first.to(tl.int64) * GROUP
    row = tl.minimum(tl.arange(0, ROWS), rows - 1 - first)         # rows past the end repeat the last: the same stores
    seed, position = tl.load(seeds + (first + row) // M), tl.load(positions + first + row).to(tl.int32)
    lane, k = tl.arange(0, GROUP), tl.arange(0, BLOCK_C)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = best
    winner = tl.zeros((ROWS,), tl.int32)
    for group in range(0, tl.cdiv(V, GROUP)):
        codes = group * GROUP + lane
        x = tl.zeros((ROWS, GROUP), tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + k
            h = tl.load(hidden + row[:, None] * hidden_r + c[None, :], mask=c[None, :] < C, other=0.0)
            w = tl.load(weight + lane[None, :] * weight_v + c[:, None],
                        mask=(codes[None, :] < V) & (c[:, None] < C), other=0.0)         # (BLOCK_C, GROUP)
            x = tl.dot(h, w, x)
        x = tl.where(codes[None, :] < V, x * inverse_temperature, float("-inf"))
        mass = logsumexp(x, 1)                                                           # (ROWS,)
        score = mass + noise(seed, tl.zeros_like(position) + group, position, step, GROUP_NOISE)
        tl.store(kept + row[:, None] * GROUP + lane[None, :], x, mask=(score > best)[:, None])
        winner = tl.where(score > best, group, winner)
        best = tl.maximum(score, best)
        total = logaddexp(total, mass)
        weight += GROUP * weight_v

    tl.store(tokens + first + row, winner.to(tl.int64))
    tl.store(logp + first + row, total)


@jit(do_not_specialize=["M", "step"])
def head_draw_kernel(kept, tokens, logp, positions, seeds, M, V, step,                   # as in head_kernel
                     GROUP: tl.constexpr, CODE_NOISE: tl.constexpr):
    """The second draw, one program for each row: inside head_kernel its registers would spill."""
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(kept + row * GROUP + tl.arange(0, GROUP))                                # (GROUP,)
    seed, position = tl.load(seeds + row // M), tl.load(positions + row).to(tl.int32)
    draw_code(x, tl.load(tokens + row), tl.load(logp + row), tokens + row, logp + row, seed, position, step, V,
              GROUP, CODE_NOISE)


def head_config(device_capability):
    """Rows of a block, its slice of C and the launch options. Chosen so that nothing spills (128 rows do where the
    accumulator is held as on 8.x) and three stages fit shared memory everywhere; not measured."""
    if device_capability is None:                      # the interpreter: small, so that tests cross the edges
        return dict(ROWS=16, BLOCK_C=16)
    return dict(ROWS=128 if device_capability[0] in (9, 10) else 64, BLOCK_C=64, num_warps=8, num_stages=3)


def head_is_fused(hidden, rows):
    """Whether the fused head runs: in half precision on tensor cores that Triton uses (8.0 and later), and with a
    block of rows for every multiprocessor. Elsewhere a library product is faster, and logits of few rows are small."""
    if interpreted():
        return True
    config, cores = head_config(capability(hidden.device)), torch.cuda.get_device_properties(hidden.device)
    return hidden.itemsize == 2 and cores.major >= 8 and rows >= config["ROWS"] * cores.multi_processor_count


def sample_from_head_triton(hidden, weight, positions, seeds, step, temperature=1.0):
    """See `kernels.sample_from_head` for the arguments."""
    (B, M), V = positions.shape, len(weight)
    if not head_is_fused(hidden, B * M):
        return sample_masked_triton(hidden @ weight.T, positions, seeds, step, temperature=temperature)
    hidden, positions, seeds = hidden.flatten(0, 1), positions.contiguous(), seeds.contiguous()        # (B M, C)
    tokens = torch.empty((B, M), dtype=torch.int64, device=hidden.device)
    logp = torch.empty((B, M), dtype=torch.float32, device=hidden.device)
    kept = torch.empty((B * M, GROUP), dtype=torch.float32, device=hidden.device)
    config = head_config(capability(hidden.device))
    if B * M:
        head_kernel[(-(-B * M // config["ROWS"]),)](
            hidden, hidden.stride(0), weight, weight.stride(0), positions, seeds, kept, tokens, logp, B * M, M, V,
            hidden.shape[1], step, 1 / temperature, GROUP=GROUP, GROUP_NOISE=GROUP_NOISE, **config)
        head_draw_kernel[(B * M,)](kept, tokens, logp, positions, seeds, M, V, step, GROUP, CODE_NOISE, num_warps=1)
    return tokens, logp
