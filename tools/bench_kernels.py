"""Parts `check` and `kernels` of tools.bench: is every kernel right at full size, and how fast?

Times are medians after warm-up, with inputs that no cache holds. Rates count the bytes or
operations that the task needs at least, beside the ceilings: a large copy, a large product.
"""
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.bench_cases import (attention_case, cross_entropy_case, gelu_case, joint_attention_case,
                               library_training_case, linear8_case, modulate_case, qkv_case,
                               sampling_case)
from tools.bench_timing import ceilings, seconds

INT8 = torch.int8
FLOAT8 = torch.float8_e4m3fn
TRAINING_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def small_cases():
    """For a CPU."""
    return [attention_case(1, 7, 64, H=2, D=32), attention_case(1, 7, 64, True, H=2, D=32),
            joint_attention_case(1, 7, 64, H=2, D=32), qkv_case(1, 7, 64, H=2, D=32),
            sampling_case(64, 1024), modulate_case(1, 64, 128), modulate_case(1, 64, 128, False),
            gelu_case(1, 64, 64), linear8_case(64, 64, 128, INT8), cross_entropy_case(64, 64, 1024)]


def inference_cases():
    """1024 px with guidance: B 2, 1024 image positions between the compression layers."""
    return [joint_attention_case(2, 77, 1024), attention_case(2, 77, 1024), qkv_case(2, 77, 1024),
            sampling_case(4096, 8192), sampling_case(2048, 8192), modulate_case(2, 1101, 1024),
            modulate_case(2, 1101, 1024, norm=False), gelu_case(2, 1101, 1024),
            linear8_case(2202, 1024, 7168, INT8), linear8_case(2202, 1024, 7168, FLOAT8),
            linear8_case(2202, 5120, 1024, INT8), linear8_case(2202, 5120, 1024, FLOAT8),
            joint_attention_case(2, 77, 256), joint_attention_case(2, 77, 4096),
            qkv_case(2, 77, 4096)]


def training_cases():
    """The paper's preset: stage 1, 64 pictures of 256 tokens; stage 3, 8 of 1024 positions."""
    return [attention_case(64, 77, 256, True), joint_attention_case(64, 77, 256, True),
            joint_attention_case(8, 77, 1024, True), qkv_case(64, 77, 256, True),
            modulate_case(64, 333, 1024, True, True), modulate_case(64, 333, 1024, False, True),
            gelu_case(64, 333, 1024, True), cross_entropy_case(16384, 1024, 8192),
            library_training_case(64, 333)]


def check_kernels(report, device, start):
    """Compare each kernel with its reference in float32."""
    if device.type != "cuda":
        return report.note("no kernels on a CPU; tests/test_kernels.py checks them there")
    jobs = []
    for dtype in (torch.bfloat16, torch.float16):
        for case in inference_cases() + training_cases():
            jobs.append((f"{case.name}, {dtype}", partial(check, report, case, dtype, device)))
    report.jobs(jobs, start)


def check(report, case, dtype, device):
    plain_dtypes = dtype, torch.float32
    plain, exact = (results(case, case.plain, device, dtype, used) for used in plain_dtypes)
    for label, function in case.kernels.items():
        found = results(case, function, device, dtype, dtype)
        verdict = draws_agree if case.draws else values_agree
        right = verdict(found, plain, exact, torch.finfo(dtype).eps)
        report.row(what=case.name, path=label, dtype=str(dtype)[6:],
                   result="right" if right else "WRONG")


def results(case, function, device, dtype, used):
    """All outputs (or gradients) for inputs of `dtype` that are cast to `used`."""
    torch.manual_seed(0)
    arguments = case.inputs(device, dtype)
    if used != dtype:
        arguments = cast(arguments, dtype, used)
    function = with_backward(function) if case.training else function
    return flat([function(*arguments)])


def values_agree(found, plain, exact, eps):
    """Errors are at most twice those of the plain function in the same dtype, plus one rounding."""
    for x, y, z in zip(found, plain, exact, strict=True):
        if x is None:                                 # no gradient
            continue
        error = (x - z).abs().max()
        if not error <= 2 * (y - z).abs().max() + eps * z.abs().max():
            return False
    return True


def draws_agree(found, plain, exact, eps):
    """98% the same codes, as rounding may decide near ties; their log p within 16 roundings."""
    same = found[0] == exact[0]
    if same.float().mean() <= 0.98:
        return False
    return bool((found[1] - exact[1])[same].abs().max() < 16 * eps)


def time_kernels(report, device, start):
    """Time each case: its kernels, the plain function, torch.compile and the library."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    copy, product = ceilings(device, dtype)
    jobs, compiled_jobs = [], []                      # compiling takes long: last
    for case in inference_cases() + training_cases() if cuda else small_cases():
        functions = {"plain": case.plain}
        if cuda:
            functions = {**case.kernels, **functions, **case.library}
        for label, function in functions.items():
            job = partial(time_one, report, case, label, function, device, dtype, copy, product)
            jobs.append((f"{case.name}, {label}", job))
        if cuda:
            job = partial(time_one, report, case, "torch.compile", torch.compile(case.plain),
                          device, dtype, copy, product)
            compiled_jobs.append((f"{case.name}, torch.compile", job))
    report.jobs(jobs + compiled_jobs, start)


def time_one(report, case, label, function, device, dtype, copy, product):
    sets = [case.inputs(device, dtype)]
    size = sum(x.nbytes for x in flat(sets) if torch.is_tensor(x))
    if device.type == "cuda":                         # 256 MiB: more than any L2 cache
        sets += [case.inputs(device, dtype) for _ in range(min(15, 2 ** 28 // size))]
    if case.training:
        function = with_backward(function)
    t = seconds(function, sets, device)
    if case.bytes:
        report.row(what=case.name, path=label, us=t * 1e6, rate=case.bytes / t / 1e9,
                   unit="GB/s", of_ceiling=f"{case.bytes / t / copy:.0%}")
    else:
        report.row(what=case.name, path=label, us=t * 1e6, rate=case.operations / t / 1e12,
                   unit="TFLOP/s", of_ceiling=f"{case.operations / t / product:.0%}")


def with_backward(function):
    """Forward, and gradients of the sum of the outputs; as in training without cuDNN."""
    def run(*arguments):
        leaves = [x for x in flat(arguments) if torch.is_tensor(x) and x.requires_grad]
        with sdpa_kernel(TRAINING_BACKENDS):
            total = sum(y.sum() for y in flat([function(*arguments)]))
            return torch.autograd.grad(total, leaves, allow_unused=True)
    return run


def flat(nested):
    """The leaves of nested tuples and lists."""
    leaves = []
    for x in nested:
        leaves += flat(x) if isinstance(x, (tuple, list)) else [x]
    return leaves


def cast(x, dtype, used):
    """Tensors of `dtype` in nested tuples -> the same in dtype `used`, new leaves of autograd."""
    if isinstance(x, (tuple, list)):
        return tuple(cast(y, dtype, used) for y in x)
    if not torch.is_tensor(x) or x.dtype != dtype:
        return x
    return x.detach().to(used).requires_grad_(x.requires_grad)
