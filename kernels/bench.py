"""Correctness and speed of every kernel, on the GPU at hand.

    python -m kernels.bench                                # all, float16 and bfloat16; about 5 minutes
    python -m kernels.bench --only attention --dtype bfloat16

Checks each kernel at full size against plain PyTorch in float32, then times it beside the plain function,
torch.compile of that, and the best library path: medians after warm-up, inputs rotated so that no cache holds them.
Rates count the least bytes or products that the task needs, and stand beside what a large copy and a large matrix
product reach on the same chip in the same run. On the CPU only the plain paths run, at small sizes.
"""
import argparse
import os
import statistics
import time
from dataclasses import dataclass
from typing import Callable
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels._triton import triton
from kernels.attention import attention_fused, attention_plain, library_attention
from kernels.cross_entropy import linear_cross_entropy_plain, linear_cross_entropy_triton
from kernels.linear8 import linear8_plain, linear8_triton
from kernels.modulate import residual_norm_modulate_plain, residual_norm_modulate_triton
from kernels.qkv import joint_qkv_plain, joint_qkv_triton
from kernels.sampling import sample_from_head_plain, sample_from_head_triton, sample_masked_plain, sample_masked_triton


@dataclass
class Case:
    name: str
    inputs: Callable                    # (device, dtype) -> arguments of every variant
    plain: Callable
    kernels: dict                       # label -> function of the same arguments; run on CUDA alone
    library: dict                       # label -> the best that PyTorch has, perhaps of less work
    work: tuple                         # least (bytes or None, products and sums or None) of one call
    training: bool = False              # forward and backward
    draws: bool = False                 # outputs are tokens and log p


# ---------------------------------------------------------------------------------------------------------
# Cases


def attention_case(B, L, N, H, D, training=False):
    def inputs(device, dtype):
        options = dict(device=device, dtype=dtype, requires_grad=training)
        text, image = (torch.randn(B, rows, 3, H, D, **options) for rows in (L, N))
        norms = torch.rand(4, D, device=device, requires_grad=training).unbind(0)
        angles = torch.rand(N, D // 2, device=device) * 6
        return text, image, norms[:2], norms[2:], angles.cos(), angles.sin()
    def bare(text, image, *_):                            # on q, k, v as they come: no norm, no rotation
        return library_attention(*torch.cat((text, image), 1).unbind(2))
    two = lambda *x: library_attention(*joint_qkv_triton(*x))
    paths = {"chosen": kernels.attention, "two passes": two}
    return Case(f"attention{' training' if training else ''} {B} x {H} x {D}, {L} + {N}", inputs, attention_plain,
                paths if training else {**paths, "one pass": attention_fused}, {"library, q k v ready": bare},
                (None, (14 if training else 4) * B * H * (L + N) ** 2 * D), training)


def qkv_case(B, L, N, H, D):
    inputs = attention_case(B, L, N, H, D).inputs
    return Case(f"norm and rotation {B} x {H} x {D}, {L} + {N}", inputs, joint_qkv_plain,
                {"kernel": joint_qkv_triton}, {}, (2 * 3 * 2 * B * (L + N) * H * D, None))


def sampling_case(M, V):
    def inputs(device, dtype):
        return (torch.randn(1, M, V, device=device, dtype=dtype) * 3, torch.arange(M, device=device)[None],
                torch.zeros(1, dtype=torch.int64, device=device), 3)
    def library(logits, *_):
        p = torch.softmax(logits[0].float(), -1)
        return torch.multinomial(p, 1), p
    return Case(f"sampling {M} x {V}", inputs, sample_masked_plain, {"kernel": sample_masked_triton},
                {"softmax + multinomial": library}, (2 * M * V, None), draws=True)


def head_case(M, C, V):
    def inputs(device, dtype):
        weight = torch.randn(V, C, device=device, dtype=dtype) / C ** 0.5
        return (torch.randn(1, M, C, device=device, dtype=dtype), weight,
                torch.arange(M, device=device)[None], torch.zeros(1, dtype=torch.int64, device=device), 3)
    product = lambda hidden, weight, *rest: sample_masked_triton(hidden @ weight.T, *rest)
    return Case(f"sampling from the head {M} x {C} x {V}", inputs, sample_from_head_plain,
                {"kernel": sample_from_head_triton, "product, then kernel": product}, {}, (None, 2 * M * C * V),
                draws=True)


def modulate_case(B, S, C):
    def inputs(device, dtype):
        x, y = torch.randn(2, B, S, C, device=device, dtype=dtype).unbind(0)
        gate, shift, scale = torch.randn(B, 3 * C, device=device, dtype=dtype).chunk(3, -1)
        return x, gate, y, shift, scale
    return Case(f"residual, norm, modulate {B} x {S} x {C}", inputs, residual_norm_modulate_plain,
                {"kernel": residual_norm_modulate_triton}, {}, (4 * 2 * B * S * C, None))


def linear8_case(M, K, N, kind):
    def inputs(device, dtype):
        weight, scale = kernels.round8(torch.randn(N, K, device=device), kind)
        return torch.randn(M, K, device=device, dtype=dtype), weight, scale, torch.randn(N, device=device, dtype=dtype)
    whole = lambda x, weight, scale, bias: torch.nn.functional.linear(x, weight.to(x.dtype), bias)      # and its cast
    return Case(f"linear {str(kind)[6:]} {M} x {K} x {N}", inputs, linear8_plain, {"kernel": linear8_triton},
                {"in 16 bits": whole}, (None, 2 * M * K * N))


def cross_entropy_case(M, C, V):
    def inputs(device, dtype):
        hidden, weight = (torch.randn(n, C, device=device, dtype=dtype) for n in (M, V))
        return hidden.requires_grad_(), (weight / C ** 0.5).requires_grad_(), torch.randint(V, (M,), device=device)
    return Case(f"cross-entropy training {M} x {C} x {V}", inputs, linear_cross_entropy_plain,
                {"kernel": linear_cross_entropy_triton}, {}, (None, 6 * M * C * V), True)


def cases(cuda):
    if not cuda:
        return [attention_case(1, 7, 64, 2, 32), attention_case(1, 7, 64, 2, 32, True), qkv_case(1, 7, 64, 2, 32),
                sampling_case(64, 1024), head_case(64, 64, 1024), modulate_case(1, 64, 128),
                linear8_case(64, 64, 128, torch.int8), cross_entropy_case(64, 64, 1024)]
    return [*(attention_case(2, 77, n, 8, 128) for n in (256, 1024, 4096)), attention_case(2, 77, 1024, 8, 128, True),
            *(qkv_case(2, 77, n, 8, 128) for n in (1024, 4096)),
            *(sampling_case(4096 * share // 100, 8192) for share in (100, 50, 5)),
            *(head_case(m, 1024, 8192) for m in (1024, 16384)), modulate_case(2, 4173, 1024),
            *(linear8_case(2202, 1024, 7168, kind) for kind in (torch.int8, torch.float8_e4m3fn)),
            cross_entropy_case(16384, 1024, 8192)]


# ---------------------------------------------------------------------------------------------------------
# Measuring


def seconds(function, argument_sets, cuda):
    """Median time of one call; each call takes the next set of arguments."""
    for i in range(3):
        function(*argument_sets[i % len(argument_sets)])
    times = []
    for i in range(30 if cuda else 5):
        arguments = argument_sets[i % len(argument_sets)]
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)                  # about 1 ms of GPU time, in which all launches are queued
            start.record()
            function(*arguments)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function(*arguments)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory(function, arguments):
    """Bytes that one call allocates at most beyond its inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def flat(arguments):
    for x in arguments:
        yield from flat(x) if isinstance(x, (tuple, list)) else [x]


def with_backward(function):
    """Forward and backward of the sum; the gradients are thrown away."""
    def run(*arguments):
        leaves = [x for x in flat(arguments) if torch.is_tensor(x) and x.requires_grad]
        return torch.autograd.grad(function(*arguments).sum(), leaves, allow_unused=True)   # bare attention: no norms
    return run


def ceilings(device, dtype):
    """Bytes/s of a copy of 2 GiB (read and written) and operations/s of a product of 8192 x 8192 matrices."""
    x = torch.empty(2 ** 30, dtype=torch.float16, device=device)
    a = torch.randn(8192, 8192, dtype=dtype, device=device)
    copy, product = (seconds(f, [()], True) for f in (lambda: x.clone(), lambda: a @ a))
    return 2 * x.nbytes / copy, 2 * 8192 ** 3 / product


def check(case, device, dtype):
    """Each kernel against float32: errors at most twice the plain function's in the same dtype plus one rounding; of
    draws, where rounding may turn a near tie, 98% the same tokens, and their log p within the rounding of 16."""
    torch.manual_seed(0)
    arguments = case.inputs(device, dtype)
    run = with_backward if case.training else lambda function: function
    outputs = lambda function, arguments: list(flat([run(function)(*arguments)]))
    up = lambda x: (tuple(map(up, x)) if isinstance(x, tuple) else
                    x.float() if torch.is_tensor(x) and x.dtype == dtype else x)
    exact, plain, eps = outputs(case.plain, up(arguments)), outputs(case.plain, arguments), torch.finfo(dtype).eps
    for label, function in case.kernels.items():
        found = outputs(function, arguments)
        if case.draws:
            same = found[0] == exact[0]
            good = same.float().mean() > 0.98 and (found[1] - exact[1])[same].abs().max() < 16 * eps
        else:
            size = lambda x: x.abs().max().item()
            good = all(size(x - z) <= 2 * size(y - z) + eps * size(z) for x, y, z in zip(found, plain, exact))
        assert good, f"{case.name}, {label}, {dtype}: wrong"


def report(case, device, dtype, ceiling):
    """Rows of the table for one case."""
    cuda = device.type == "cuda"
    variants = {"plain": case.plain, **({"torch.compile": torch.compile(case.plain)} if cuda else {}), **case.library}
    if cuda:
        variants = {**case.kernels, **variants}
    sets = [case.inputs(device, dtype)]
    size = sum(x.nbytes for x in flat(sets[0]) if torch.is_tensor(x))
    more = min(15, 2 ** 28 // size) if cuda else 1       # 256 MiB in all: beyond any L2
    sets += [case.inputs(device, dtype) for _ in range(more)]
    for label, function in variants.items():
        function = with_backward(function) if case.training else function
        t = seconds(function, sets, cuda)
        rate, unit, top = ((case.work[0] / t / 1e9, "GB/s", ceiling[0]) if case.work[0] else
                           (case.work[1] / t / 1e12, "TFLOP/s", ceiling[1]))
        share = f"{rate * (1e9 if unit == 'GB/s' else 1e12) / top:.0%}" if cuda else "-"
        memory = f"{peak_memory(function, sets[0]) / 2 ** 20:.0f}" if cuda else "-"
        print(f"| {case.name} | {label} | {t * 1e6:.1f} | {rate:.3g} {unit} | {share} | {memory} |", flush=True)


# ---------------------------------------------------------------------------------------------------------
# A whole picture: `python sample.py --bench`


def picture(meissonic, pipeline, size, number, steps, guidance):
    """Print what a batch of pictures takes on the plain path (MEISSONIC_KERNELS=plain, meissonic.plain_path, all models in
    memory, nothing in 8 bits) and as sample.py does it, in one run, and how far the two agree. `meissonic` is that module:
    nothing here knows it."""
    rounded, cuda, dtype = pipeline.rounded, pipeline.device.type == "cuda", pipeline.dtype
    prompts = [f"picture {i}" for i in range(number)]
    flops = step_flops(meissonic, pipeline, size, guidance) * number
    top = ceilings(pipeline.device, dtype)[1] if cuda else product_rate(pipeline.device, dtype, 2048)
    print(f"{size[0]}x{size[1]}, batch {number}, {steps} steps, guidance {guidance}: {flops / 1e12:.3g} TFLOP for a step; a large "
          f"matrix product reaches {top / 1e12:.3g} TFLOP/s in {str(dtype)[6:]}")
    print(f"{'path':6} {'text s':>8} {'loop s':>8} {'decode s':>9} {'ms/step':>9} {'warm-up s':>10} {'peak GB':>8} {'TFLOP/s':>8} {'of product':>11}")
    looks, loops = {}, {}
    for name in ("plain", "fast"):
        with mock.patch.dict(os.environ, {"MEISSONIC_KERNELS": "plain"} if name == "plain" else {}):
            pipeline.release("transformer")
            pipeline.rounded = rounded if name == "fast" else None
            peak_memory_reset(cuda)
            if name == "plain":
                pipeline.transformer.to(pipeline.device), pipeline.vq     # all three in memory, as in the official code
            start = now(cuda)
            text = pipeline.encode_text([*prompts, ""], *size, pipeline.score_condition)
            text, against = text.rows(slice(number)), text.rows([number] * number)
            times = [now(cuda) - start]
            if name == "fast":
                pipeline.release("encoder")
                pipeline.release("vq")
            grid, model, seeds = [side // pipeline.tokens_f for side in size[::-1]], pipeline.transformer, list(range(number))
            blank = torch.full((number, *grid), pipeline.mask_token, device=pipeline.device)
            run = lambda steps: meissonic.sample(model, text, against, blank, seeds, steps, guidance,
                                                 convention=pipeline.convention, plain=name == "plain")
            start = now(cuda)
            run(1)                                                        # compiles, captures
            first, start = now(cuda) - start, now(cuda)
            tokens = run(steps)
            times.append(now(cuda) - start)
            looks[name] = one_step(meissonic, model, text, against, tokens, guidance, plain=name == "plain")
            del model, run
            if name == "fast":
                pipeline.release("transformer")
            start = now(cuda)
            pipeline.decode(tokens)
            times.append(now(cuda) - start)
            loops[name] = times[1]
            print(f"{name:6} {times[0]:>8.3f} {times[1]:>8.3f} {times[2]:>9.3f} {1e3 * times[1] / steps:>9.1f} "
                  f"{max(0, first - times[1] / steps):>10.3f} {peak_memory_read(cuda):>8} {flops * steps / times[1] / 1e12:>8.3g} "
                  f"{flops * steps / times[1] / top:>11.1%}", flush=True)
    (a, drawn), (b, again) = looks.values()
    print(f"fast against plain: {loops['plain'] / loops['fast']:.2f}x in the loop; for the same half-masked picture logits differ by "
          f"{(a - b).abs().max():.2g} at most, {(a - b).square().mean().sqrt() / a.std():.2g} of their spread on average, "
          f"and {(drawn == again).float().mean():.2%} of the tokens drawn are the same")


def one_step(meissonic, model, text, against, tokens, guidance, plain):
    """Logits (B, M, V) and draws (B, M) of one step at every second position, on the path given."""
    B, count = len(tokens), tokens[0].numel()
    positions = torch.arange(0, count, 2, device=tokens.device).expand(B, -1)
    known = torch.arange(count, device=tokens.device).expand(B, -1) * 7 % model.config.codebook_size      # the same on both paths
    masked = known.scatter(1, positions, model.config.mask_token).view(tokens.shape)
    with torch.no_grad():
        x = (meissonic.plain_path if plain else meissonic.fast_path)(model, text, against, [0.5], guidance)(0, masked, positions)
        logits = x if plain else x @ model.mlm_layer.conv2.weight.flatten(1).t()
        drawn, _ = kernels.sample_masked(logits, positions, torch.arange(B, device=tokens.device), 0)
    return logits.float().cpu(), drawn.cpu()


def step_flops(meissonic, pipeline, size, guidance):
    """Floating-point operations of one picture's step as the SPEC counts them: both passes through the blocks and the head
    at all positions, by PyTorch's count, on tensors without storage. Adaptive norms are left out: once for a picture."""
    config = pipeline.transformer.config
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = meissonic.Transformer(config)
        made = torch.zeros(1, sum(norm.linear.out_features for norm in model.norms()))
        tokens = torch.zeros(1, size[1] // pipeline.tokens_f, size[0] // pipeline.tokens_f, dtype=torch.int64)
        with mock.patch.dict(os.environ, {"MEISSONIC_KERNELS": "plain"}), \
                mock.patch.object(meissonic, "rope_table", lambda h, w, axes, device: torch.zeros(2, h * w, sum(axes) // 2).unbind(0)):
            model.head(model.run(tokens, torch.zeros(1, pipeline.tokenizer([""]).shape[1], config.width), made))
    return counter.get_total_flops() * (1 if guidance == 1 else 2)


def product_rate(device, dtype, n):
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / seconds(lambda: a @ a, [()], device.type == "cuda")


def now(cuda):
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_reset(cuda):
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:                  # Linux: the peak counts from here
            file.write("5")


def peak_memory_read(cuda):
    """GB at most since the reset: reserved on a GPU, resident on a CPU."""
    if cuda:
        return f"{torch.cuda.max_memory_reserved() / 1e9:.2f}"
    if not os.path.exists("/proc/self/status"):
        return "-"
    with open("/proc/self/status") as file:
        return next(f"{int(line.split()[1]) * 1024 / 1e9:.2f}" for line in file if line.startswith("VmHWM"))


# ---------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this (default: all)")
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16"], choices=["float16", "bfloat16"],
                        help="on CUDA; the CPU takes float32 (default: both)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, triton "
          f"{triton.__version__ if triton else 'not installed'}, {time.strftime('%Y-%m-%d')}, path {kernels.path(device)}")
    if not cuda:
        print("No GPU: the plain paths alone, at small sizes, in float32. These times say nothing about the kernels.")
    for dtype in (getattr(torch, name) for name in (args.dtype if cuda else ["float32"])):
        chosen = [case for case in cases(cuda) if args.only in case.name]
        ceiling = ceilings(device, dtype) if cuda else (None, None)
        if cuda:
            for case in chosen:
                check(case, device, dtype)
            print(f"\n{dtype}: all kernels right at full size; copy {ceiling[0] / 1e9:.0f} GB/s, "
                  f"product {ceiling[1] / 1e12:.0f} TFLOP/s")
        print("\n| what | path | us | rate | of ceiling | MiB |\n|---|---|---|---|---|---|")
        for case in chosen:
            report(case, device, dtype, ceiling)


if __name__ == "__main__":
    main()
