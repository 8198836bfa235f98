"""The hot spots of the model, one in each file, with a plain PyTorch reference and a Triton kernel.

This file alone chooses between the two. MEISSONIC_KERNELS is one of

    auto      Triton on NVIDIA GPUs of compute capability 7.5 or more (bfloat16: 8.0), else plain
    plain     plain PyTorch everywhere
    triton    Triton, or a RuntimeError that says why not; with TRITON_INTERPRET=1 on a CPU too

Letters: B batch, L text rows, N image rows, H heads, D head size, S rows, C width, M masked
positions of each picture, V codes.
"""
import os

import torch

from kernels._triton import capability, interpreted, no_launcher, triton
from kernels.attention import (attention_by_head, attention_in_place_triton, attention_plain,
                               attention_triton)
from kernels.cross_entropy import linear_cross_entropy_plain, linear_cross_entropy_triton
from kernels.gelu import concat_gelu_plain, concat_gelu_triton, gelu
from kernels.linear8 import linear8_plain, linear8_triton, quantize_rows
from kernels.modulate import (gated_residual_plain, gated_residual_triton, norm_modulate_plain,
                              norm_modulate_triton, residual_norm_modulate_plain,
                              residual_norm_modulate_triton)
from kernels.sampling import gumbel_noise, sample_masked_plain, sample_masked_triton


def obstacle(device, dtype):
    """Why Triton cannot run on tensors of this device and dtype, or None."""
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
    if torch.compiler.is_compiling():                 # torch.compile needs a launcher in any case
        return None
    return no_launcher()


def choose(device, dtype):
    """Whether Triton runs on tensors of this device and dtype, and why: (bool, str)."""
    mode = os.environ.get("MEISSONIC_KERNELS", "auto")
    if mode not in ("auto", "plain", "triton"):
        raise RuntimeError(f"MEISSONIC_KERNELS={mode}: auto, plain or triton")
    if mode == "plain":
        return False, "MEISSONIC_KERNELS=plain"
    why_not = obstacle(device, dtype)
    if mode == "triton" and why_not:
        raise RuntimeError(f"MEISSONIC_KERNELS=triton, but {why_not}")
    if mode == "auto" and device.type == "cpu":
        why_not = "cpu"                               # the interpreter is for tests only
    if why_not:
        return False, why_not
    if device.type == "cpu":
        return True, "interpreter"
    return True, "compute capability %d.%d" % capability(device)


def path(device, dtype=torch.float32):
    """The path of tensors of this device and dtype, "triton (compute capability 9.0)" for one."""
    chosen, why = choose(torch.device(device), dtype)
    return f"{'triton' if chosen else 'plain'} ({why})"


def attention(text, image, text_norms, image_norms, cos, sin):
    """Joint attention with QK-norm and rotary positions.

    text (B, L, 3, H, D), image (B, N, 3, H, D)   packed q, k, v; last axis dense; L may be 0
    text_norms, image_norms                       (w_q, w_k), each (D,): weights of the RMSNorms
    cos, sin (N, D/2)                             rotation of the image rows, any dtype
    -> (B, L + N, H * D), text rows first, in the dtype of `image`
    """
    chosen, why = choose(image.device, image.dtype)
    half_on_cpu = why == "cpu" and image.dtype == torch.bfloat16
    if chosen:
        function = attention_triton
    elif half_on_cpu and image.shape[1] >= 512 and not torch.is_grad_enabled():
        function = attention_by_head
    else:
        function = attention_plain
    return function(text, image, text_norms, image_norms, cos, sin)


def attention_in_place(qkv, length, text_norms, image_norms, cos, sin):
    """`attention` of text and image in one buffer; without gradients the buffer may be overwritten.

    qkv (B, L + N, 3, H, D)           packed q, k, v, the first `length` rows text; last axis dense
    text_norms, ..., sin -> as in `attention`

    On the Triton path norm and rotation overwrite q and k, and v is not copied. With gradients and
    under torch.compile nothing is overwritten.
    """
    if choose(qkv.device, qkv.dtype)[0]:
        return attention_in_place_triton(qkv, length, text_norms, image_norms, cos, sin)
    text = qkv[:, :length]                                                       # (B, L, 3, H, D)
    image = qkv[:, length:]                                                      # (B, N, 3, H, D)
    return attention(text, image, text_norms, image_norms, cos, sin)


def sample_masked(logits, positions, seeds, step):
    """Draw one token for each masked position from softmax(logits), computed in float32.

    logits (B, M, V)                  last axis dense; a code at -inf is never drawn
    positions (B, M) int64            places in the picture (counters of the noise)
    seeds (B,) int64, step int        key and counter of the noise
    -> codes (B, M) int64, log p of each (B, M) float32
    """
    chosen = choose(logits.device, logits.dtype)[0]
    function = sample_masked_triton if chosen else sample_masked_plain
    return function(logits, positions, seeds, step)


def norm_modulate(x, shift, scale):
    """LayerNorm without weights, eps 1e-6, then * (1 + scale) + shift.

    x (B, S, C), shift, scale (B, C)              last axis dense
    -> (B, S, C) in the dtype of x
    """
    chosen = choose(x.device, x.dtype)[0]
    function = norm_modulate_triton if chosen else norm_modulate_plain
    return function(x, shift, scale)


def gated_residual(x, gate, y):
    """x + gate * y.

    x, y (B, S, C), gate (B, C)                   last axis dense
    -> (B, S, C) in the dtype of x; float16 is clamped to +-65504
    """
    chosen = choose(x.device, x.dtype)[0]
    function = gated_residual_triton if chosen else gated_residual_plain
    return function(x, gate, y)


def residual_norm_modulate(x, gate, y, shift, scale):
    """x' = gated_residual(x, gate, y) and h = norm_modulate(x', shift, scale) in one pass.

    x, y (B, S, C), gate, shift, scale (B, C)     last axis dense
    -> x', h, both (B, S, C) in the dtype of x
    """
    chosen = choose(x.device, x.dtype)[0]
    function = residual_norm_modulate_triton if chosen else residual_norm_modulate_plain
    return function(x, gate, y, shift, scale)


def concat_gelu(attention, mlp):
    """[attention ; gelu(mlp)], with the tanh-approximate GELU.

    attention (B, S, C), mlp (B, S, F)            last axis dense
    -> (B, S, C + F) in the dtype of mlp
    """
    chosen = choose(mlp.device, mlp.dtype)[0]
    function = concat_gelu_triton if chosen else concat_gelu_plain
    return function(attention, mlp)


def linear_cross_entropy(hidden, weight, targets):
    """Cross-entropy of logits = hidden @ weight.T; Triton never stores all of the logits.

    hidden (M, C), weight (V, C), targets (M,) int64 -> losses (M,) float32 (float64 for float64)
    Under autocast the product runs in autocast's dtype, as in any linear layer.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(dtype)
        weight = weight.to(dtype)
    chosen = choose(hidden.device, hidden.dtype)[0]
    function = linear_cross_entropy_triton if chosen else linear_cross_entropy_plain
    return function(hidden, weight, targets)


def linear8(x, weight, scale, bias=None):
    """x @ (weight * scale).T + bias with both factors in 8 bits; see kernels/linear8.py.

    x (..., K)                        quantised here, with one scale for each row
    weight (N, K), scale (N, 1)       of `quantize_rows`: int8 or float8_e4m3fn, float32 scales
    bias (N,)                         or None
    -> (..., N) in the dtype of x; forward only
    """
    chosen = choose(x.device, x.dtype)[0]
    function = linear8_triton if chosen else linear8_plain
    return function(x, weight, scale, bias)
