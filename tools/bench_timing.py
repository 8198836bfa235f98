"""What the parts of tools.bench share: the report, timing, ceilings.

    report = Report(Path("runs/bench"), "kernels")
    report.row(what="a product", us=1e6 * seconds(torch.mm, [(a, b)], device))
"""
import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from unittest import mock

import torch


class Report:
    """Appends rows of one part to bench.md and bench.jsonl, and prints them."""

    def __init__(self, out, part):
        self.out = out
        self.part = part
        self.columns = None
        self.heading = ["", f"### {part}"]            # written once

    def row(self, **values):
        """Append one row. A row with other columns than the last one begins a new table."""
        self.append("bench.jsonl", json.dumps({"part": self.part, **values}))
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value)
                 for value in values.values()]
        lines = [f"| {' | '.join(cells)} |"]
        if list(values) != self.columns:
            self.columns = list(values)
            names = [name.replace("_per_", "/").replace("_", " ") for name in values]
            lines = [*self.heading, "", f"| {' | '.join(names)} |", "|---" * len(values) + "|",
                     *lines]
            self.heading = []
        self.append("bench.md", "\n".join(lines))
        print("\n".join(lines), flush=True)

    def note(self, text):
        """Append one line of text."""
        self.columns = None
        self.append("bench.jsonl", json.dumps({"part": self.part, "note": text}))
        self.append("bench.md", f"\n{self.part}: {text}")
        print(f"\n{self.part}: {text}", flush=True)

    def append(self, name, text):
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def jobs(self, jobs, start):
        """Call the functions of [(name, function)] from number `start` on.

        A failure becomes a note. After an error that ends the CUDA context the part starts again
        with the next job.
        """
        for i, (name, function) in enumerate(jobs):
            if i < start:
                continue
            try:
                function()
            except Exception as error:    # whatever it is: the other jobs are to be measured
                place = traceback.extract_tb(error.__traceback__)[-1]
                message = " ".join(str(error).split())[:300]
                self.note(f"{name}: failed: {type(error).__name__}: {message} "
                          f"({place.filename}:{place.lineno})")
                if not context_is_alive():
                    restart(self, i + 1)


def context_is_alive():
    """Whether CUDA still works, after an error in a kernel for one."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def restart(report, start):
    """Replace this process by one that runs the same part from case `start` on."""
    arguments = "--part", report.part, "--start", str(start), "--out", str(report.out)
    os.execv(sys.executable, [sys.executable, "-m", "tools.bench", *arguments])


def plain_kernels():
    """A context in which the plain PyTorch functions run in place of the kernels."""
    return mock.patch.dict(os.environ, {"MEISSONIC_KERNELS": "plain"})


def now(device):
    """Seconds, when all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function, argument_sets, device, repeats=30):
    """Median time of a call after warm-up; each call takes the next set of arguments, so that no
    cache holds them."""
    times = []
    for i in range(3 + repeats if device.type == "cuda" else 1 + min(repeats, 5)):
        arguments = argument_sets[i % len(argument_sets)]
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(8_000_000)              # some 4 ms, in which all launches are queued
            first.record()
            function(*arguments)
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        else:
            start = time.perf_counter()
            function(*arguments)
            times.append(time.perf_counter() - start)
    warm_up = 3 if device.type == "cuda" else 1
    return statistics.median(times[warm_up:])


def ceilings(device, dtype):
    """Bytes/s of a large copy (read and written), operations/s of a large product."""
    cuda = device.type == "cuda"
    n = 8192 if cuda else 1024
    x = torch.empty(2 ** 30 if cuda else 2 ** 25, dtype=torch.float16, device=device)
    a = torch.randn(n, n, device=device).to(dtype)
    copy = seconds(x.clone, [()], device, 10)
    product = seconds(torch.mm, [(a, a)], device, 10)
    return 2 * x.nbytes / copy, 2 * n ** 3 / product


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):            # Linux alone has it
            open("/proc/self/clear_refs", "w").write("5")


def peak_memory(device):
    """GB at most since the reset: reserved on a GPU, resident on a CPU (Linux), else "-"."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 1e9
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e9
    return "-"
