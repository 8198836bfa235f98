"""Triton where it exists. Without it (macOS, Windows) what stands below `@jit` is a plain function that nobody calls."""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function=None, **options):
    """triton.jit, with or without options."""
    if triton is not None:
        return triton.jit(function, **options)
    return function if function is not None else lambda f: f


INTERPRETED = triton is not None and triton.knobs.runtime.interpret         # settled when `@jit` runs, so once


def interpreted():
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 when they were defined."""
    return INTERPRETED


def capability(device):
    """(major, minor) of a CUDA device, e.g. (9, 0); None on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
