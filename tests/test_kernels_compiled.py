"""Machine code of every kernel for a chip, without one: it compiles, spills no register and fits shared memory.

    python tests/test_kernels_compiled.py 80 90            # compute capabilities 8.0 and 9.0

prints one line for each kernel. `test_kernels.py` runs it for all chips. Kernels whose products need tensor cores are
compiled from 8.0 on, as they run there alone. The head size is the largest, 128, whose tiles are the largest too.
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
FLOATS = {"cos", "sin", "logp", "kept", "dw", "shares", "losses", "lse", "dlosses", "x_scale", "w_scale"}      # pointers to float32
LONGS = {"positions", "seeds", "tokens", "targets"}                                      # pointers to int64
WEIGHTS = {"text_wq", "text_wk", "image_wq", "image_wk"}                                 # float32 beside half activations
NUMBERS = {"eps", "scale", "guidance", "inverse_temperature"}                            # float32 scalars
INTEGERS = {"L", "N", "H", "D", "S", "C", "V", "M", "K", "rows", "step", "STEPS"}
EVEN = {"H", "D", "C", "V", "K"}                                                              # multiples of 16, as strides


def kind(name, kernel, dtype):
    """Type of an argument in Triton's words."""
    if name in FLOATS | WEIGHTS:
        return "*fp32"
    if name in LONGS:
        return "*i64"
    if name in NUMBERS and not (name == "scale" and "modulate" in kernel.__name__):
        return "fp32"
    dtype, _, eight = dtype.partition(" ")
    if name in ("x8", "w8"):
        return f"*{eight}"
    return "i32" if name in INTEGERS or re.search(r"_[bmrphv]$", name) else f"*{dtype}"


def build(kernel, chip, dtype, constants, num_warps=4, num_stages=3):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kind(name, kernel, dtype) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name].startswith("*") or name in EVEN or (signature[name] == "i32" and "_" in name)}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(num_warps=num_warps, num_stages=num_stages))


def resources(compiled):
    """Registers, bytes of stack (what spills), bytes of shared memory."""
    import triton
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1]), compiled.metadata.shared


def cases(chip):
    """(kernel, dtype, constants and options) of everything that runs on the chip, with its own block sizes."""
    attention, qkv, sampling, modulate, cross_entropy, linear8 = (importlib.import_module(f"kernels.{name}") for name in (
        "attention", "qkv", "sampling", "modulate", "cross_entropy", "linear8"))
    version = chip // 10, chip % 10
    halves = ("fp16",) if chip < 80 else ("bf16",)
    sample = dict(GUIDED=True, GROUPS=16, GROUP=128, GROUP_NOISE=0, CODE_NOISE=1)
    for dtype in halves + ("fp32",) if chip in (75, 90) else halves:
        yield qkv.qkv_kernel, dtype, dict(COPY_V=True, DP=128, ROWS=qkv.block_rows(), num_warps=8)
        yield qkv.qkv_backward_kernel, dtype, dict(DP=128, ROWS=qkv.block_rows(), num_warps=8)
        yield sampling.sample_kernel, dtype, sample
        residual = dict(RESIDUAL=True, CLAMP=dtype == "fp16")
        yield modulate.modulate_kernel, dtype, dict(residual, **modulate.tile(1024))
        yield modulate.modulate_backward_kernel, dtype, dict(residual, **modulate.backward_tile(1024))
        yield cross_entropy.loss_kernel, dtype, dict(BLOCK=cross_entropy.block())
        yield cross_entropy.gradient_kernel, dtype, dict(BLOCK=cross_entropy.block())
    for eight in ("i8", "fp8e4nv") if chip >= 89 else ("i8",) if chip >= 80 else ():
        dtype, whole = f"{halves[0]} {eight}", eight == "i8"
        yield linear8.round8_kernel, dtype, dict(TOP=127.0 if whole else 448.0, ROUND=whole, KP=8192)
        for rows in (2202, 48, 8):
            yield linear8.linear8_kernel, dtype, dict(BIAS=True, SUM=linear8.tl.int32 if whole else linear8.tl.float32, **linear8.tile(rows))
    yield sampling.head_draw_kernel, "fp32", dict(GROUP=128, CODE_NOISE=1, num_warps=1)
    if chip >= 80:
        yield attention.attention_kernel, halves[0], dict(DP=128, **attention.attention_config(version))
        yield sampling.head_kernel, halves[0], dict(GROUP=128, GROUP_NOISE=0, **sampling.head_config(version))


def main(chips):
    for chip in chips:
        for kernel, dtype, options in cases(chip):
            constants = {name: value for name, value in options.items() if name.isupper()}
            launch = {name: value for name, value in options.items() if not name.isupper()}
            registers, stack, shared = resources(build(kernel, chip, dtype, constants, **launch))
            print(f"{chip} {kernel.__name__} {dtype}: {registers} registers, {stack} bytes spilled, {shared} bytes shared")
            assert stack == 0 and shared <= SHARED_KB[chip] * 1024, (chip, kernel.__name__, dtype)


if __name__ == "__main__":
    main(map(int, sys.argv[1:]))
