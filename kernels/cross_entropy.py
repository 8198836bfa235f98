"""Cross-entropy from the input of the head, without storing all logits (the loss of section 2.2).

    x = hidden weight^T        loss = logsumexp(x) - x_target
    dx = (softmax(x) - onehot(target)) dloss       dhidden = dx weight       dweight = dx^T hidden

Rows are processed in chunks of 2^25 logits: a library product, then a kernel that reduces the
logits to the loss and their logsumexp in one pass. The backward repeats the product (a quarter of
the head's work in a training step) and turns the logits into their gradient in place; two more
products follow. The products are not fused into the kernels: a logit costs 14 bytes of traffic for
8 C multiplications.

Bytes for M x V logits of two bytes. Plain: the logits, their float32 copy, the log-softmax with its
gradient, and the gradient of the logits are in memory at the same time, 16 M V; about 30 M V are
moved. Here 64 MB are in memory for any M; the forward moves 4 M V (write, read), the backward
10 M V (write, read, overwrite, read twice).

Letters: M masked positions, C width of the head's input, V codes.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._triton import interpreted, jit, tl, triton


def linear_cross_entropy_plain(hidden, weight, targets):
    """The reference, in plain PyTorch; see `kernels.linear_cross_entropy` for the arguments."""
    logits = hidden @ weight.T                                                   # (M, V)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


# -------------------------------------------------------------------------------------------------
# Triton: one program for each row of logits (loss) or block of a row (gradient)


@jit
def loss_kernel(logits,                                # (rows, V) contiguous
                targets,                               # (rows,) int64
                losses, lse,                           # out: (rows,) float32; lse: logsumexp
                V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    m = tl.full((1,), float("-inf"), tl.float32)       # running maximum and sum
    l = tl.zeros((1,), tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(logits + i, mask=i < V, other=float("-inf")).to(tl.float32)  # (1, BLOCK)
        m_new = tl.maximum(m, tl.max(x, 1))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[:, None]), 1)
        m = m_new
    one = tl.arange(0, 1)
    target = tl.load(targets + row + one)
    valid = (target >= 0) & (target < V)               # else the loss is NaN
    x = tl.load(logits + target, mask=valid, other=float("nan")).to(tl.float32)
    tl.store(lse + row + one, m + tl.log(l))
    tl.store(losses + row + one, m + tl.log(l) - x)


@jit
def gradient_kernel(logits,                            # (rows, V) contiguous; becomes the gradient
                    targets, lse, dlosses,             # (rows,) int64, float32, float32
                    V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * V
    x = tl.load(logits + i, mask=i < V, other=0.0).to(tl.float32)                # (BLOCK,)
    p = tl.exp(x - tl.load(lse + row))
    p = tl.where(i == tl.load(targets + row), p - 1, p)
    tl.store(logits + i, p * tl.load(dlosses + row), mask=i < V)


# -------------------------------------------------------------------------------------------------
# Autograd and the public function


def block_size():
    """Logits that a program holds at once: 16 for each thread of 4 warps."""
    return 16 if interpreted() else 2048


def chunks(rows, V):
    """Slices of rows with 2^25 logits at most; a few rows in the interpreter."""
    size = 4 if interpreted() else max(1, 2 ** 25 // V)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, targets) -> losses."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        M = len(hidden)
        V = len(weight)
        losses = torch.empty(M, dtype=torch.float32, device=hidden.device)
        lse = torch.empty(M, dtype=torch.float32, device=hidden.device)
        for rows in chunks(M, V):
            logits = hidden[rows] @ weight.T                                     # (rows, V)
            loss_kernel[(len(logits),)](logits, targets[rows], losses[rows], lse[rows], V,
                                        BLOCK=block_size(), num_warps=4)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        hidden, weight, targets, lse = ctx.saved_tensors
        V = len(weight)
        dlosses = dlosses.contiguous()
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32)                  # sum over chunks
        for rows in chunks(len(hidden), V):
            dlogits = hidden[rows] @ weight.T                                    # (rows, V), logits
            gradient_kernel[(len(dlogits), triton.cdiv(V, block_size()))](
                dlogits, targets[rows], lse[rows], dlosses[rows], V,
                BLOCK=block_size(), num_warps=4)
            torch.mm(dlogits, weight, out=dhidden[rows])
            dweight += dlogits.T @ hidden[rows]
        return dhidden, dweight.to(weight.dtype), None


def linear_cross_entropy_triton(hidden, weight, targets):
    """See `kernels.linear_cross_entropy` for the arguments."""
    return LinearCrossEntropy.apply(hidden, weight, targets)
