"""What tools.bench checks and times: each kernel with its arguments and its competitors.

Sizes are those of the published model (H 8, D 128, C 1024, V 8192). Letters: B batch, L text rows,
N image rows, S = L + N, H heads, D head size, C width, M masked positions, V codes.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import sampling
from kernels.attention import attention_fused, attention_plain, library_attention
from kernels.cross_entropy import linear_cross_entropy_plain
from kernels.gelu import concat_gelu_plain
from kernels.linear8 import linear8_plain
from kernels.modulate import gated_residual_plain, residual_norm_modulate_plain
from kernels.qkv import joint_qkv_plain, joint_qkv_triton, norm_rotate_

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


@dataclass
class Case:
    """One call of a kernel.

    inputs         (device, dtype) -> arguments of every function; a function may overwrite them
    plain          the reference
    kernels        {label: function with the results of `plain`}
    library        {label: function to compare with, of less work or other results}
    bytes, operations    one of them: what the call needs at least
    training       forward and backward of the sum
    draws          the results are codes and their log p
    """
    name: str
    inputs: Callable
    plain: Callable
    kernels: dict
    bytes: int = 0
    operations: int = 0
    library: dict = field(default_factory=dict)
    training: bool = False
    draws: bool = False


def attention_case(B, L, N, training=False, H=8, D=128):
    def inputs(device, dtype):
        options = dict(device=device, dtype=dtype, requires_grad=training)
        text = torch.randn(B, L, 3, H, D, **options)
        image = torch.randn(B, N, 3, H, D, **options)
        norms = torch.rand(4, D, device=device, requires_grad=training).unbind(0)
        angles = torch.rand(N, D // 2, device=device) * 6
        return text, image, norms[:2], norms[2:], angles.cos(), angles.sin()

    paths = {"chosen": kernels.attention}
    if not training:
        paths["one pass"] = attention_fused
    work = (14 if training else 4) * B * H * (L + N) ** 2 * D
    return Case(f"attention{' training' if training else ''} {B} x {L} + {N}", inputs,
                attention_plain, paths, operations=work, training=training)


def joint_attention_case(B, L, N, training=False, H=8, D=128):
    """Text and image in one buffer, beside the library's attention alone, without the norms."""
    def inputs(device, dtype):
        text, image, *rest = attention_case(B, L, N, training, H, D).inputs(device, dtype)
        return torch.cat((text, image), 1), L, *rest

    def plain(qkv, length, *rest):
        return attention_plain(qkv[:, :length], qkv[:, length:], *rest)

    def bare(backend):
        def run(qkv, *_):
            with sdpa_kernel(backend):
                return library_attention(*qkv.unbind(2))
        return run

    library = {f"bare library, {name}": bare(backend) for name, backend in BACKENDS.items()}
    work = (14 if training else 4) * B * H * (L + N) ** 2 * D
    return Case(f"joint attention{' training' if training else ''} {B} x {L} + {N}", inputs, plain,
                {"chosen": kernels.attention_in_place}, operations=work,
                library={} if training else library, training=training)


def library_training_case(B, S, H=8, D=128):
    """Forward and backward of each library attention alone. In PyTorch 2.11 cuDNN's backward ends
    with an illegal memory access at B 64, S 333 on an H200."""
    def inputs(device, dtype):
        return [torch.randn(B, S, H, D, device=device, dtype=dtype, requires_grad=True)
                for _ in range(3)]

    def with_backend(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return library_attention(q, k, v)
        return run

    paths = {name: with_backend(backend) for name, backend in BACKENDS.items()}
    return Case(f"library attention training {B} x {S}", inputs, library_attention, paths,
                operations=14 * B * H * S ** 2 * D, training=True)


def qkv_case(B, L, N, training=False, H=8, D=128):
    inputs = attention_case(B, L, N, training, H, D).inputs

    library = {} if training else {"in place": norm_rotate_}
    vectors = 14 if training else 6                   # moved for each row and head
    return Case(f"norm and rotation{' training' if training else ''} {B} x {L} + {N}", inputs,
                joint_qkv_plain, {"kernel": joint_qkv_triton},
                bytes=vectors * B * (L + N) * H * 2 * D, library=library, training=training)


def sampling_case(M, V):
    def inputs(device, dtype):
        logits = torch.randn(1, M, V, device=device, dtype=dtype) * 3
        positions = torch.arange(M, device=device)[None]
        return logits, positions, torch.zeros(1, dtype=torch.int64, device=device), 3

    def library(logits, *_):
        p = torch.softmax(logits[0].float(), -1)
        return torch.multinomial(p, 1), p

    def with_groups(groups):
        def run(*arguments):
            with mock.patch.object(sampling, "GROUPS", groups):
                return kernels.sample_masked(*arguments)
        return run

    paths = {f"{groups} groups a program": with_groups(groups) for groups in (8, 16, 32, 64)}
    return Case(f"sampling {M} x {V}", inputs, sampling.sample_masked_plain, paths,
                bytes=2 * M * V, library={"softmax, multinomial": library}, draws=True)


def modulate_case(B, S, C, norm=True, training=False):
    def inputs(device, dtype):
        options = dict(device=device, dtype=dtype, requires_grad=training)
        x = torch.randn(B, S, C, **options)
        y = torch.randn(B, S, C, **options)
        gate, shift, scale = torch.randn(B, 3 * C, **options).chunk(3, -1)
        return (x, gate, y, shift, scale) if norm else (x, gate, y)

    kernel = kernels.residual_norm_modulate if norm else kernels.gated_residual
    plain = residual_norm_modulate_plain if norm else gated_residual_plain
    moved = 4 if norm else 3                          # activations
    if training:
        moved += 6 if norm else 4
    name = f"residual{', norm' if norm else ''}{' training' if training else ''} {B} x {S} x {C}"
    return Case(name, inputs, plain, {"kernel": kernel}, bytes=moved * 2 * B * S * C,
                training=training)


def gelu_case(B, S, C, training=False):
    """As in a single-modal block: mlp is a slice of wider rows."""
    def inputs(device, dtype):
        options = dict(device=device, dtype=dtype, requires_grad=training)
        return torch.randn(B, S, C, **options), torch.randn(B, S, 7 * C, **options)[..., 3 * C:]

    return Case(f"concat, GELU{' training' if training else ''} {B} x {S} x {C}", inputs,
                concat_gelu_plain, {"kernel": kernels.concat_gelu},
                bytes=(23 if training else 10) * 2 * B * S * C, training=training)


def linear8_case(M, K, N, kind):
    def inputs(device, dtype):
        weight, scale = kernels.quantize_rows(torch.randn(N, K, device=device), kind)
        x = torch.randn(M, K, device=device, dtype=dtype)
        return x, weight, scale, torch.randn(N, device=device, dtype=dtype)

    def half(x, weight, scale, bias):                 # with the cast of the weight
        return F.linear(x, weight.to(x.dtype), bias)

    return Case(f"linear {str(kind)[6:]} {M} x {K} x {N}", inputs, linear8_plain,
                {"kernel": kernels.linear8}, operations=2 * M * K * N,
                library={"in 16 bits, with a cast": half})


def cross_entropy_case(M, C, V):
    def inputs(device, dtype):
        hidden = torch.randn(M, C, device=device, dtype=dtype, requires_grad=True)
        weight = (torch.randn(V, C, device=device, dtype=dtype) / C ** 0.5).requires_grad_()
        return hidden, weight, torch.randint(V, (M,), device=device)

    return Case(f"cross-entropy training {M} x {C} x {V}", inputs, linear_cross_entropy_plain,
                {"kernel": kernels.linear_cross_entropy}, operations=6 * M * C * V, training=True)
