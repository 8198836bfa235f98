"""Cross-entropy straight from the head's input: the logits of a batch are never stored (paper section 2.2's loss).

    x = hidden weight^T        loss = logsumexp(x) - x_target        dx = (softmax(x) - onehot(target)) dloss
    dhidden = dx weight        dweight = dx^T hidden

Rows go through in chunks of 2^25 logits: a library product, then a kernel that reduces the logits to loss and
logsumexp in one pass. The backward repeats the product (a quarter of the work of a training step of the head), turns
the logits into their gradient in place, and two more products follow.

Bytes for M x V logits of two bytes. Plain: logits, their float32 copy, log-softmax and its gradient, and the
gradient of the logits all stand in memory at once, 16 M V, and 30 M V are moved. Here 64 MB stand, whatever M is;
forward the logits are written and read (4), backward written, read, overwritten and read twice (10).

Fusing the product into the kernel as well, as `sample_from_head` does, was left out: logits of a chunk cost 14 bytes
of traffic for 8 C = 8192 multiplications each, which the library's products do faster than Triton's would.

Letters: M masked positions, C width of the head's input, V codes.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._triton import interpreted, jit, tl, triton


def linear_cross_entropy_plain(hidden, weight, targets):
    """The reference, in plain PyTorch; see `kernels.linear_cross_entropy` for the arguments."""
    logits = hidden @ weight.T                                                           # (M, V)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


# ---------------------------------------------------------------------------------------------------------
# Triton: one program for each row of logits


@jit
def loss_kernel(logits,                                # (rows, V) contiguous
                targets,                               # (rows,) int64
                losses, lse,                           # out: (rows,) float32, the second the logsumexp of the row
                V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    m, l = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(logits + i, mask=i < V, other=float("-inf")).to(tl.float32)         # (1, BLOCK)
        m_new = tl.maximum(m, tl.max(x, 1))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[:, None]), 1)
        m = m_new
    one = tl.arange(0, 1)
    target = tl.load(targets + row + one)
    x = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    tl.store(lse + row + one, m + tl.log(l))
    tl.store(losses + row + one, m + tl.log(l) - x)    # a target out of range gives NaN, not a stray read


@jit
def gradient_kernel(logits,                            # (rows, V) contiguous; overwritten by their gradient
                    targets, lse, dlosses,             # (rows,) int64, float32, float32
                    V, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * V
    p = tl.exp(tl.load(logits + i, mask=i < V, other=0.0).to(tl.float32) - tl.load(lse + row))
    p = tl.where(i == tl.load(targets + row), p - 1, p)
    tl.store(logits + i, p * tl.load(dlosses + row), mask=i < V)


def block():
    """Logits that a program holds at once: 16 for each thread of 4 warps."""
    return 16 if interpreted() else 2048


def chunks(rows, V):
    """Slices of rows whose logits are 2^25 numbers at most; in the interpreter small tests take several."""
    size = 4 if interpreted() else max(1, 2 ** 25 // V)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        V, (losses, lse) = len(weight), torch.empty((2, len(hidden)), dtype=torch.float32, device=hidden.device)
        for rows in chunks(len(hidden), V):
            logits = hidden[rows] @ weight.T                                             # (rows, V)
            loss_kernel[(len(logits),)](logits, targets[rows], losses[rows], lse[rows], V, BLOCK=block(), num_warps=4)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        hidden, weight, targets, lse = ctx.saved_tensors
        V, dlosses, dhidden = len(weight), dlosses.contiguous(), torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32)                          # sums over chunks
        for rows in chunks(len(hidden), V):
            dlogits = hidden[rows] @ weight.T                                            # (rows, V), logits so far
            gradient_kernel[(len(dlogits), triton.cdiv(V, block()))](
                dlogits, targets[rows], lse[rows], dlosses[rows], V, BLOCK=block(), num_warps=4)
            torch.mm(dlogits, weight, out=dhidden[rows])
            dweight += dlogits.T @ hidden[rows]
        return dhidden, dweight.to(weight.dtype), None


def linear_cross_entropy_triton(hidden, weight, targets):
    """See `kernels.linear_cross_entropy` for the arguments."""
    return LinearCrossEntropy.apply(hidden, weight, targets)
