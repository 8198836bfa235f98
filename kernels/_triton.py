"""Triton where it exists. Without it (macOS, Windows) what stands below `@jit` is a plain function that nobody calls."""
from functools import lru_cache

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


@lru_cache(maxsize=1)
def no_launcher():
    """Why kernels cannot be launched on this machine's GPU, or None: Triton compiles a piece of C for that, once."""
    try:
        triton.runtime.driver.active.utils
    except Exception as e:                                                  # of the compiler, the linker, the driver
        return f"Triton wants a C compiler and Python's headers ({(str(e).splitlines() or [type(e).__name__])[0][:100]})"
