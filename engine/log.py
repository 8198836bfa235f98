"""What a run leaves to look at: a progress bar, log.jsonl and loss.png.

    log = Log(run, "1", first=0, steps=6000, batch=64)
    log.add(step, loss=loss, norm=norm, rate=0.6)
    if log.read(): ...                                     # PATIENCE steps in a row were not finite

log.jsonl has a line for every LINE_EVERY steps, with means, and one for each event. The values of a
step stay on the device until `read`: on a GPU the host does not wait for each step.
"""
import contextlib
import json
import math
import sys
import time

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from engine.checkpoint import UserError, atomic_write
from engine.cli import say

LINE_EVERY = 50                                   # steps between lines of log.jsonl
READ_EVERY = 10                                   # steps between readings of the device; CPU: 1
PATIENCE = 3                                      # steps in a row that may be not finite


class Log:
    """The log of one stage. Every process reads its losses; the main one writes."""

    def __init__(self, run, stage, first, steps, batch):
        self.run = run
        self.stage = stage
        self.first = first
        self.batch = batch
        self.pending = []                         # (step, {name: number or 0-d tensor}), unread
        self.sums = {}                            # {name: (sum, number)} since the last line
        self.scores = None                        # {name: score} of the last sheet, for the bar
        self.bad = 0                              # steps in a row that were not finite
        self.bar = tqdm(total=steps, initial=first, desc=f"stage {stage}", disable=not run.is_main)
        self.start = time.perf_counter()

    def add(self, step, loss, norm, **values):
        """The loss and the gradient norm of a step, 0-d tensors, and other numbers or tensors."""
        self.pending.append((step, {"loss": loss, "norm": norm, **values}))
        self.bar.update(step - self.bar.n)

    def is_due(self, step):
        return self.run.device.type == "cpu" or step % READ_EVERY == 0

    def read(self):
        """Read what was added -> whether PATIENCE steps in a row had a loss or a gradient that was
        not finite. Those steps are left out of the means and noted as events."""
        broken = False
        for step, values in to_host(self.pending):
            norm = values.pop("norm")
            if math.isfinite(values["loss"]) and math.isfinite(norm):
                self.bad = 0
                self.count_step(step, values)
            else:
                self.bad += 1
                self.event(step, "dropped", loss=values["loss"], norm=norm)
                broken = broken or self.bad == PATIENCE
        self.pending = []
        if broken:
            self.bad = 0
        return broken

    def count_step(self, step, values):
        """Add numbers to the sums, and write a line if it is time."""
        for name, value in values.items():
            total, number = self.sums.get(name, (0, 0))
            self.sums[name] = total + value, number + 1
        if step % LINE_EVERY == 0:
            means = {name: round(total / n, 5) for name, (total, n) in self.sums.items()}
            seconds = time.perf_counter() - self.start
            if seconds > 0:                       # a clock may stand still
                means["samples_per_second"] = round(self.batch * (step - self.first) / seconds, 1)
            self.show(means)
            self.write(step, **means)
            self.sums = {}

    def show(self, means):
        """The progress bar: loss, samples per second and the last scores."""
        shown = {"loss": f"{means['loss']:.3f}"}
        if "samples_per_second" in means:
            shown["samples/s"] = f"{means['samples_per_second']:.0f}"
        if self.scores:
            shown["score"] = f"{self.scores['overall']:.2f}"
        self.bar.set_postfix(shown)

    def event(self, step, what, **values):
        """A dropped step, or a reload."""
        self.bar.n = step
        self.write(step, event=what, **{name: repr(value) for name, value in values.items()})
        if self.run.is_main:
            tqdm.write(f"{self.stage} step {step}: {what} {values}", file=sys.stderr)

    def write(self, step, **values):
        if self.run.is_main:
            with noted("log.jsonl or loss.png"):
                append(self.run.out, stage=self.stage, step=step, **values)
                draw_losses(self.run.out)

    def close(self):
        self.bar.close()


@contextlib.contextmanager
def noted(what):
    """Around what only tells the user: if it fails, a note says so and training goes on."""
    try:
        yield
    except (OSError, UserError, MemoryError, torch.OutOfMemoryError) as e:
        tqdm.write(f"note: {what} could not be written ({e})", file=sys.stderr)


def to_host(pending):
    """[(step, {name: number or 0-d tensor})] -> the same with numbers; one copy for all tensors."""
    tensors = []
    for _, values in pending:
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    numbers = iter(torch.stack([tensor.float() for tensor in tensors]).tolist() if tensors else [])
    read = []
    for step, values in pending:
        plain = {}
        for name, value in values.items():
            plain[name] = next(numbers) if isinstance(value, torch.Tensor) else float(value)
        read.append((step, plain))
    return read


# --------------------------------------------------------------------------------------------------
# log.jsonl


def append(out, **entry):
    """Add a line to the log of a run's folder."""
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(out):
    """The entries of the log of a run's folder. Lines that a full disk cut off, or that something
    else wrote, are left out."""
    entries = []
    for line in (out / "log.jsonl").read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if is_entry(entry):
                entries.append(entry)
    return entries


def is_entry(entry):
    """Whether it is what `append` writes: it has a stage, a step and, unless it is an event, a
    loss."""
    if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
        return False
    step = entry.get("step")
    if not isinstance(step, int) or not is_number(step) or step < 0:
        return False
    return "event" in entry or is_number(entry.get("loss"))


def is_number(value):
    """Whether it is a finite number, and not a bool."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -1e300 < value < 1e300


def print_summary(out):
    """Print a line for each stage of a run: steps, last loss, samples per second, last scores."""
    stages, tasks = {}, []
    for entry in read_log(out):
        if entry.get("event") == "scores":
            tasks += [name for name in entry if name not in ("stage", "step", "event", *tasks)]
        if entry.get("event") in (None, "scores"):
            stages.setdefault(entry["stage"], {}).update(entry)
    say("stage     steps      loss  samples/s " + "".join(f" {task:>11}" for task in tasks))
    for stage, last in stages.items():
        columns = [cell(last, "step", "d", 9), cell(last, "loss", ".4f", 9),
                   cell(last, "samples_per_second", ".1f", 9)]
        say(f"{stage:5} " + " ".join(columns + [cell(last, task, ".2f", 11) for task in tasks]))


def cell(values, name, form, width):
    """One formatted value, "-" if it is missing."""
    text = format(values[name], form) if is_number(values.get(name)) else "-"
    return f"{text:>{width}}"


# --------------------------------------------------------------------------------------------------
# loss.png


def draw_losses(out, width=640, height=320):
    """log.jsonl -> loss.png, losses on a logarithmic scale. A row for the text encoder, one for the
    VQ model, and one for the transformer's stages side by side: the seams between them show."""
    rows = loss_curves(out)
    picture = Image.new("RGB", (width, height * max(1, len(rows))), "white")
    pen = ImageDraw.Draw(picture)
    for i, curves in enumerate(rows.values()):
        draw_row(pen, curves, (60, height * i + 20, width - 20, height * (i + 1) - 40))
    atomic_write(out / "loss.png", lambda temporary: picture.save(temporary, "PNG"))


def loss_curves(out):
    """-> {row: {stage: {step: log10 of the loss}}}. If a step was done twice, the last counts."""
    rows = {}
    for entry in read_log(out):
        if "event" not in entry and entry["loss"] > 0:
            stage = entry["stage"]
            row = rows.setdefault(stage if stage in ("text", "vq") else "transformer", {})
            row.setdefault(stage, {})[entry["step"]] = math.log10(entry["loss"])
    return rows


def draw_row(pen, curves, box):
    """{stage: {step: value}} side by side in the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    values = [value for points in curves.values() for value in points.values()]
    low = min(values)
    high = max(max(values), low + 1e-3)
    pixels_per_step = (right - left) / max(1, sum(max(points) for points in curves.values()))

    def y_of(value):
        return top + (bottom - top) * (high - value) / (high - low)

    for value in (low, high):
        pen.text((5, y_of(value) - 6), f"{10 ** value:.3g}", fill="black")
    for stage, points in curves.items():
        line = [(left + pixels_per_step * step, y_of(value)) for step, value in points.items()]
        pen.line([(left, top), (left, bottom)], fill="lightgrey")
        if len(line) > 1:
            pen.line(line, fill="blue", width=2)
        pen.text((left, bottom + 10), f"{stage}: {max(points)} steps", fill="black")
        left += pixels_per_step * max(points)
