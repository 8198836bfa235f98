"""Triton where it exists. Without it (macOS, Windows) the kernels below `@jit` are plain functions that nobody calls."""
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


def interpreted():
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when triton was imported)."""
    return triton is not None and triton.knobs.runtime.interpret


def capability(device):
    """(major, minor) of a CUDA device, e.g. (9, 0); None on the CPU."""
    import torch
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
