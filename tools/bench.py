"""Check and time this machine: kernels, pictures, training steps.

    python -m tools.bench --gpu            # everything on a CUDA GPU, 9 minutes at most
    python -m tools.bench --gpu --seconds 220
    python -m tools.bench                  # the same on what is there; on a CPU small sizes
    python -m tools.bench --kernels        # one part: --kernels, --picture or --training

The parts run one after the other, each in a process of its own with a time limit. Every result is
appended at once to bench.md (tables) and bench.jsonl (one JSON object a line) in --out, so that an
early end loses nothing. On a GPU:

    card        versions, bytes/s of a copy and operations/s of a product: the ceilings
    tokens      float32 tokens of the bundled model: CPU, CUDA plain, CUDA with Triton
    check       every kernel at full size against its reference
    picture     1024 px at the published sizes, random weights: plain, fast, int8, fp8
    kernels     each kernel, its plain function, torch.compile and the library's paths
    training    steps of each preset: plain, with the kernels, compiled
    one-step    1024 px at the published sizes in one step and in 48; on a CPU as well, where it
                takes 3 minutes and 6 GB of memory
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import kernels
from engine.checkpoint import UserError
from engine.cli import Parser, natural, positive, script
from kernels._triton import triton
from tools.bench_timing import Report, ceilings

# name -> seconds at most, if --seconds is their sum
PARTS = {"card": 20, "tokens": 50, "check": 70, "picture": 150, "kernels": 100, "training": 90,
         "one-step": 40}
GROUPS = {"kernels": ("card", "check", "kernels"), "training": ("card", "training"),
          "picture": ("card", "tokens", "picture", "one-step")}


@script("tools.bench")
def main(argv=None):
    args = parse_arguments(argv)
    if args.gpu and not torch.cuda.is_available():
        raise UserError("--gpu: PyTorch sees no CUDA GPU; without --gpu the CPU is measured")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.part:
        return run_part(args.part, Report(args.out, args.part), device, args.start)
    chosen = [name for group in GROUPS if getattr(args, group) for name in GROUPS[group]]
    parts = [name for name in PARTS if name in chosen] or list(PARTS)
    end = time.perf_counter() + args.seconds
    for i, name in enumerate(parts):
        share = PARTS[name] / sum(PARTS[part] for part in parts[i:])
        start_part(name, args.out, share * (end - time.perf_counter()))


def parse_arguments(argv):
    parser = Parser("tools.bench", __doc__)
    parser.add_argument("--gpu", action="store_true", help="refuse to run without a CUDA GPU")
    for group, names in GROUPS.items():
        parser.add_argument(f"--{group}", action="store_true", help=f"only {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"),
                        help="folder of bench.md and bench.jsonl (default: %(default)s)")
    parser.add_argument("--seconds", type=positive, default=sum(PARTS.values()),
                        help="of all parts at most; one that ends early leaves its time to the "
                             "next ones (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help="run one part in this process, no limit")
    parser.add_argument("--start", type=natural, default=0,
                        help="with --part: skip this many jobs (default: %(default)s)")
    return parser.parse_args(argv)


def start_part(name, out, limit):
    """Run one part in a process of its own; report when it fails or takes longer than `limit`."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "tools.bench", "--part", name, "--out", str(out)]
    report = Report(out, name)
    environment = dict(os.environ)
    if name == "check":                               # errors then appear where they are made
        environment["CUDA_LAUNCH_BLOCKING"] = "1"
    try:
        status = subprocess.run(command, timeout=limit, env=environment).returncode
    except subprocess.TimeoutExpired:
        return report.note(f"stopped after {limit:.0f} s")
    if status:
        return report.note(f"exit status {status}")
    report.note(f"took {time.perf_counter() - start:.0f} s")


def run_part(name, report, device, start):
    """Run one part in this process. The modules of the other parts are not imported."""
    if name == "card":
        return describe(report, device)
    if name == "tokens":
        from tools.bench_picture import compare_tokens
        return compare_tokens(report, device)
    if name == "picture":
        from tools.bench_picture import time_pictures
        return time_pictures(report, device, start)
    if name == "one-step":
        from tools.bench_one_step import time_one_step
        return time_one_step(report, device, start)
    if name == "training":
        from tools.bench_training import time_training
        return time_training(report, device, start)
    from tools.bench_kernels import check_kernels, time_kernels
    function = check_kernels if name == "check" else time_kernels
    function(report, device, start)


def describe(report, device):
    """Versions of what runs, and the ceilings for each dtype."""
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    report.row(card=card, kernels=kernels.path(device), torch=torch.__version__,
               triton=triton.__version__ if triton else "-", cuda=torch.version.cuda or "-",
               cudnn=torch.backends.cudnn.version() or "-", python=sys.version.split()[0],
               date=time.strftime("%Y-%m-%d"))
    if not cuda:
        report.note("No GPU: plain paths at small sizes. These times say nothing of the kernels.")
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32,):
        copy, product = ceilings(device, dtype)
        report.row(dtype=str(dtype)[6:], copy_GB_per_s=copy / 1e9, product_TFLOPs=product / 1e12)


if __name__ == "__main__":
    main()
