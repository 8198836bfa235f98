"""Machine code of every kernel, made without a GPU: no spills, and it fits the shared memory.

    python tests/test_kernels_compiled.py 80 90            # compute capabilities 8.0 and 9.0

prints one line for each kernel. `test_kernels.py` runs it in a process of its own, as it needs
TRITON_INTERPRET unset. Each kernel has its own block sizes and the head size 128, the largest.
"""
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHARED_KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SPILLED = 8                                # bytes: ptxas may spill one register to gain occupancy

# Types of arguments by name; other pointers have the dtype of the activations
FLOAT_POINTERS = {"cos", "sin", "out_log_p", "masses", "dw", "parts", "losses", "lse", "dlosses",
                  "x_scale", "w_scale", "text_wq", "text_wk", "image_wq", "image_wk"}
LONG_POINTERS = {"positions", "seeds", "out_codes", "targets"}
INTEGERS = {"L", "N", "H", "D", "S", "C", "F", "V", "J", "M", "K", "step", "STEPS", "blocks"}
ALIGNED = {"H", "D", "C", "F", "V", "J", "K"}              # multiples of 16, as all strides are


def argument_type(name, dtype, eight):
    if name in FLOAT_POINTERS:
        return "*fp32"
    if name in LONG_POINTERS:
        return "*i64"
    if name in ("x8", "w8"):
        return f"*{eight}"
    if name in INTEGERS or re.search(r"_[bmrphs]$", name):
        return "i32"
    return f"*{dtype}"


def build(kernel, chip, dtype, constants, eight="i8", num_warps=4, num_stages=3):
    """The compiled kernel. constants: values of its tl.constexpr arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = kernel.arg_names
    if "eps" in names:
        constants = {"eps": 1e-6, **constants}
    if kernel.__name__ == "attention_kernel":
        constants = {"scale": 0.1275, **constants}
    signature = {}
    for name in names:
        signature[name] = argument_type(name, dtype, eight)
        if name in constants:
            signature[name] = "constexpr"
    aligned = {}
    for i, name in enumerate(names):
        stride = signature[name] == "i32" and "_" in name
        if signature[name].startswith("*") or name in ALIGNED or stride:
            aligned[(i,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32),
                          options=dict(num_warps=num_warps, num_stages=num_stages))


def resources(compiled):
    """Registers, bytes of stack (what spills), bytes of shared memory."""
    import triton
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True,
                              check=True).stdout
    registers = int(re.search(r"REG:(\d+)", text)[1])
    stack = int(re.search(r"STACK:(\d+)", text)[1])
    return registers, stack, compiled.metadata.shared


def module(name):
    """A module of kernels; some share their name with a function of the package."""
    return importlib.import_module(f"kernels.{name}")


def cases(chip):
    """(kernel, dtype, options of `build`) of everything that runs on the chip."""
    half = "fp16" if chip < 80 else "bf16"
    for dtype in (half, "fp32") if chip in (75, 90) else (half,):
        yield from elementwise_cases(dtype)
    linear8 = module("linear8")
    if chip >= 80:
        yield linear8.quantize_kernel, half, dict(TOP=127.0, ROUND=True, KP=8192)
        for rows in (2202, 48, 8):
            yield linear8.linear8_kernel, half, dict(BIAS=True, **linear8.tile(rows))
        attention = module("attention")
        config = attention.attention_config((chip // 10, chip % 10))
        yield attention.attention_kernel, half, dict(DP=128, **config)
    if chip >= 89:
        options = dict(TOP=448.0, ROUND=False, KP=8192, eight="fp8e4nv")
        yield linear8.quantize_kernel, half, options


def elementwise_cases(dtype):
    """Kernels without products, which run on every chip."""
    qkv = module("qkv")
    sampling = module("sampling")
    modulate = module("modulate")
    gelu = module("gelu")
    cross_entropy = module("cross_entropy")
    for in_place in (False, True):
        yield qkv.qkv_kernel, dtype, dict(IN_PLACE=in_place, DP=128, SIZE=32, num_warps=8)
    yield qkv.qkv_backward_kernel, dtype, dict(DP=128, SIZE=32, num_warps=8)
    yield sampling.mass_kernel, dtype, dict(GROUPS=sampling.GROUPS, GROUP=128)
    draw = dict(JP=64, GROUP=128, GROUP_NOISE=0, CODE_NOISE=1, num_warps=1)
    yield sampling.draw_kernel, dtype, draw
    for residual, norm in ((True, True), (True, False), (False, True)):
        flags = dict(RESIDUAL=residual, NORM=norm, CLAMP=dtype == "fp16")
        yield modulate.modulate_kernel, dtype, flags | modulate.tile(1024)
        yield modulate.modulate_backward_kernel, dtype, flags | modulate.backward_tile(1024)
    constants = dict(SLOPE=gelu.SLOPE, CUBIC=gelu.CUBIC, BLOCK=gelu.block_size())
    yield gelu.concat_gelu_kernel, dtype, constants
    yield gelu.gelu_backward_kernel, dtype, constants
    yield cross_entropy.loss_kernel, dtype, dict(BLOCK=cross_entropy.block_size())
    yield cross_entropy.gradient_kernel, dtype, dict(BLOCK=cross_entropy.block_size())


def main(chips):
    for chip in chips:
        for kernel, dtype, options in cases(chip):
            constants = {name: value for name, value in options.items() if name.isupper()}
            launch = {name: value for name, value in options.items() if not name.isupper()}
            registers, stack, shared = resources(build(kernel, chip, dtype, constants, **launch))
            print(f"{chip} {kernel.__name__} {dtype}: {registers} registers, "
                  f"{stack} bytes spilled, {shared} bytes shared")
            assert stack <= SPILLED, (chip, kernel.__name__, dtype)
            assert shared <= SHARED_KB[chip] * 1024, (chip, kernel.__name__, dtype)


if __name__ == "__main__":
    main(map(int, sys.argv[1:]))
