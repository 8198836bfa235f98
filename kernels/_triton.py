"""Triton, where it is installed.

Without it (macOS, Windows) `@jit` leaves a plain function that nobody calls.
"""
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
    if function is None:
        return lambda undecorated: undecorated
    return function


# `@jit` reads the setting when it decorates a kernel, so a later change has no effect
INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def interpreted():
    """Whether kernels run on the CPU, in Triton's interpreter (TRITON_INTERPRET=1)."""
    return INTERPRETED


def capability(device):
    """(major, minor) of a CUDA device, for example (9, 0); None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@lru_cache(maxsize=1)
def no_launcher():
    """Why this machine cannot launch kernels, or None. Triton compiles a C file for that, once."""
    try:
        triton.runtime.driver.active.utils
    except Exception as error:                        # of the compiler, the linker or the driver
        lines = str(error).splitlines() or [type(error).__name__]
        return f"Triton needs a C compiler and Python's headers ({lines[0][:100]})"
