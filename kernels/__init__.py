"""The hot spots of the model, each in its own file with its plain PyTorch reference; and, here alone, the choice.

MEISSONIC_KERNELS=auto     Triton on NVIDIA GPUs from compute capability 7.5 (bfloat16: 8.0), else plain; the default
MEISSONIC_KERNELS=plain    plain PyTorch everywhere
MEISSONIC_KERNELS=triton   Triton, or a RuntimeError that says why not; with TRITON_INTERPRET=1 on the CPU too
"""
import os

import torch

from kernels._triton import capability, interpreted, no_launcher, triton
from kernels.attention import attention_by_head, attention_plain, attention_triton
from kernels.cross_entropy import linear_cross_entropy_plain, linear_cross_entropy_triton
from kernels.linear8 import linear8_plain, linear8_triton, round8
from kernels.modulate import (norm_modulate_plain, norm_modulate_triton, residual_norm_modulate_plain,
                              residual_norm_modulate_triton)
from kernels.sampling import (confidence_noise, remask, sample_from_head_plain, sample_from_head_triton,
                              sample_masked_plain, sample_masked_triton)


def obstacle(device, dtype):
    """Why Triton cannot run tensors of this device and dtype, or None."""
    if triton is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "there is no kernel for float64"
    if interpreted() and device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"{device.type} is not an NVIDIA GPU"
    major, minor = capability(device)
    if (major, minor) < (7, 5):
        return f"compute capability {major}.{minor} is below 7.5"
    if dtype == torch.bfloat16 and major < 8:
        return f"bfloat16 needs compute capability 8.0, not {major}.{minor}"
    return None if torch.compiler.is_compiling() else no_launcher()     # a compiled step wants a launcher anyway


def choose(device, dtype):
    """(whether Triton runs, why)."""
    mode = os.environ.get("MEISSONIC_KERNELS", "auto")
    if mode not in ("auto", "plain", "triton"):
        raise RuntimeError(f"MEISSONIC_KERNELS={mode}: auto, plain or triton")
    if mode == "plain":
        return False, "MEISSONIC_KERNELS=plain"
    why_not = obstacle(device, dtype)
    if mode == "triton" and why_not:
        raise RuntimeError(f"MEISSONIC_KERNELS=triton, but {why_not}")
    if mode == "auto" and device.type == "cpu":
        why_not = "cpu"                               # the interpreter is for tests: only when asked for
    if why_not:
        return False, why_not
    return True, "interpreter" if device.type == "cpu" else "compute capability %d.%d" % capability(device)


def path(device, dtype=torch.float32):
    """The path that tensors of this device and dtype take and why, e.g. "triton (compute capability 9.0)"."""
    chosen, why = choose(torch.device(device), dtype)
    return f"{'triton' if chosen else 'plain'} ({why})"


def attention(text, image, text_norms, image_norms, cos, sin):
    """Joint attention with QK-norm and rotary positions.

    text (B, L, 3, H, D), image (B, N, 3, H, D)   packed q, k, v; any strides with the last axis dense; L may be 0
    text_norms, image_norms                       (w_q, w_k), each (D,): weights of the RMSNorm of q and k; None for no norm,
                                                  an ablation that runs on the plain path
    cos, sin (N, D/2) float32                     rotation of the image rows
    -> (B, L + N, H * D), text rows first, in the dtype of `image`
    """
    chosen, why = choose(image.device, image.dtype)
    if chosen and image_norms[0] is not None:
        function = attention_triton
    elif why == "cpu" and image.dtype == torch.bfloat16 and image.shape[1] >= 512 and not torch.is_grad_enabled():
        function = attention_by_head
    else:
        function = attention_plain
    return function(text, image, text_norms, image_norms, cos, sin)


def sample_masked(logits, positions, seeds, step, unconditional=None, guidance=1.0, temperature=1.0):
    """Draw one token for each masked position.

    logits, unconditional (B, M, V)   of the conditional and the unconditional pass; the draw is from
                                      softmax((u + guidance (c - u)) / temperature), in float32; any strides with
                                      the last axis dense; a code at -inf in either is never drawn
    positions (B, M) int64            where the masked positions lie in their picture (counters of the noise)
    seeds (B,) int64, step int        key and counter of the noise
    -> tokens (B, M) int64, log p of each (B, M) float32
    """
    function = sample_masked_triton if choose(logits.device, logits.dtype)[0] else sample_masked_plain
    return function(logits, positions, seeds, step, unconditional, guidance, temperature)


def sample_from_head(hidden, weight, positions, seeds, step, temperature=1.0):
    """`sample_masked` from logits = hidden @ weight.T, which need not be stored.

    hidden (B, M, C)                  input of the head's last projection; guidance, linear too, is already in it
    weight (V, C)                     that projection
    -> as `sample_masked`; forward only
    """
    function = sample_from_head_triton if choose(hidden.device, hidden.dtype)[0] else sample_from_head_plain
    return function(hidden, weight, positions, seeds, step, temperature)


def norm_modulate(x, shift, scale):
    """LayerNorm without weights, eps 1e-6, then * (1 + scale) + shift.

    x (B, S, C)                       any strides with the last axis dense
    shift, scale (B, C)               the same
    -> (B, S, C) in the dtype of x
    """
    function = norm_modulate_triton if choose(x.device, x.dtype)[0] else norm_modulate_plain
    return function(x, shift, scale)


def residual_norm_modulate(x, gate, y, shift, scale):
    """x' = x + gate * y, kept within +-65504 in float16, and norm_modulate(x', shift, scale), in one pass.

    x, y (B, S, C), gate, shift, scale (B, C)     any strides with the last axis dense
    -> x', h, both (B, S, C) in the dtype of x
    """
    function = residual_norm_modulate_triton if choose(x.device, x.dtype)[0] else residual_norm_modulate_plain
    return function(x, gate, y, shift, scale)


def linear_cross_entropy(hidden, weight, targets):
    """Cross-entropy of logits = hidden @ weight.T, which are never all stored on the Triton path.

    hidden (M, C), weight (V, C), targets (M,) int64 -> losses (M,) float32 (float64 for float64)
    Under autocast the product is in autocast's dtype, as any linear layer's.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    function = linear_cross_entropy_triton if choose(hidden.device, hidden.dtype)[0] else linear_cross_entropy_plain
    return function(hidden, weight, targets)


def linear8(x, weight, scale, bias=None):
    """x @ (weight * scale).T + bias with both factors in 8 bits; see kernels/linear8.py.

    x (..., K)                        rounded here, a scale for each row
    weight (N, K)                     int8 or float8_e4m3fn, of `round8`, contiguous
    scale (N, 1) float32              of its rows
    bias (N,)                         or None
    -> (..., N) in the dtype of x; forward only
    """
    chosen = choose(x.device, x.dtype)[0] and (interpreted() or capability(x.device) >= (8, 0))    # 7.5: the library's product
    function = linear8_triton if chosen else linear8_plain
    return function(x, weight, scale, bias)
