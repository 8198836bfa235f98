"""The loop that every training here runs in: processes, steps, checkpoints that outlive any interruption, the log.

    run = Run(out, stages)                                    # a folder, and this process's place among torchrun's
    fit(run, "1", student, groups_of, losses, batch, steps, lr, finish)

Nothing in it knows of pictures. Every random choice of step i comes from a generator seeded with (seed, stage, i): a run
that goes on from a checkpoint sees what it would have seen, and the step is all of it that there is to keep.
"""
import contextlib
import json
import math
import os
import signal
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import vq
from pipeline import UserError, multiplies_bfloat16

KEEP = 2                                                         # checkpoints of a stage
number_of = lambda stage: zlib.crc32(stage.encode())             # in seeds: by name, so that another stage shifts none


# ---------------------------------------------------------------------------------------------------------
# A run: its folder, its processes, and the loop that both trainings share


class Run:
    """A run's folder and settings, and its place among the processes that torchrun started (one without it)."""

    def __init__(self, out, stages, seed=0, device="cpu", preset="shapes", resume=False, init=None, data=None, save_every=500,
                 look_every=2000, accumulate=1, shard=False, checkpointing=False, compile=False, lora=None, without=None):
        self.out, self.stages, self.seed, self.preset, self.resume, self.init, self.data = Path(out), stages, seed, preset, resume, init, data
        self.save_every, self.look_every, self.accumulate, self.shard = save_every, look_every, accumulate, shard
        self.checkpointing, self.compile, self.lora, self.without = checkpointing, compile, lora, without
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.world > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if (self.world > 1 or shard) and not dist.is_initialized():
            if self.world == 1:
                raise UserError("--shard wants several processes: start with torchrun")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(days=1))   # for encode, look
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def dtype(self):
        """That of the matrix products: bfloat16 where there are instructions for it."""
        able = multiplies_bfloat16() if self.device.type == "cpu" else torch.cuda.get_device_capability(self.device) >= (8, 0)
        return torch.bfloat16 if able else torch.float32

    @property
    def first(self):
        """Whether this process writes: logs and checkpoints come from one."""
        return self.rank == 0

    @property
    def settings(self):
        """What a run is not gone on with if it changes: a forgotten --data would put shapes in place of its pictures."""
        return {"seed": str(self.seed), "preset": self.preset, "data": "SOURCE" if self.data else "shapes"}

    def parts(self, *batch):
        """This process's slices of the arrays of a global batch, one for each gradient accumulation; over all
        processes they are disjoint and cover it."""
        number = self.world * self.accumulate
        if len(batch[0]) % number:
            raise UserError(f"a batch of {len(batch[0])} does not divide by {self.world} processes x {self.accumulate}")
        return [tuple(a[self.rank + self.world * i::number] for a in batch) for i in range(self.accumulate)]

    def total(self, tensor):
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def same(self, tensor):
        """Overwrite with the first process's values."""
        if self.world > 1:
            dist.broadcast(tensor, 0)

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def rng(self, stage, step, attempt=0):
        """The generator of all random choices of one step, the same in all processes."""
        return np.random.default_rng([self.seed, number_of(stage), step, attempt])

    @contextlib.contextmanager
    def precision(self):
        """Autocast to bfloat16, if products are of it (GPUs before compute capability 8.0 only pretend to); on a CPU with the
        plain attention, which trains 1.2x faster than its flash kernel at the lengths of the small model."""
        attention = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16), attention:
            yield

    def parallel(self, student):
        """The student over all processes: replicated, or with --shard each block's parameters, gradients and moments
        split (ZeRO-3, by PyTorch's fully_shard). The text encoder alone and the VQ model are small: always replicated."""
        if not self.shard or not blocks_of(student):
            return DistributedDataParallel(student) if self.world > 1 else student
        for block in blocks_of(student):
            fully_shard(block)
        return fully_shard(student)

    def synchronise(self, model, last):
        """Before a forward pass: gradients travel between processes in a step's last backward pass alone."""
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        elif self.shard:
            model.set_requires_gradient_sync(last)


def blocks_of(student):
    transformer = getattr(student, "transformer", None)
    return transformer.blocks if transformer else []


def compile_blocks(run, student):
    if run.compile:
        torch._dynamo.config.optimize_ddp = False                # else blocks are cut into 25 MB for data parallelism
        for block in blocks_of(student):
            block.compile()


def learning_rate(step, steps, peak, floor=0.02, warmup=100):
    """Linear warm-up, then a cosine to `floor` of the peak; with floor 1 a fixed rate, as the paper's."""
    return peak * min(1, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def decay_groups(module, scale=1.0, weight_decay=0.01):
    """AdamW groups of what is trained: decay on matrices and kernels alone; not on biases, norms and embeddings
    (SPEC section 6). `scale` multiplies the learning rate."""
    embeddings = tuple(n + "." for n, m in module.named_modules() if isinstance(m, nn.Embedding))
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    spared = lambda n, p: p.dim() <= 1 or n.startswith(embeddings) or n.endswith("positions")
    return [dict(params=[p for n, p in trained if not spared(n, p)], weight_decay=weight_decay, scale=scale),
            dict(params=[p for n, p in trained if spared(n, p)], weight_decay=0.0, scale=scale)]


def fit(run, stage, student, groups_of, losses, batch, steps, lr, finish, look=None, floor=0.02, average=0.999, patience=3):
    """Train `student` (a module on run.device) for `steps` steps and keep an average of its weights.

    groups_of()               the optimizer's groups, from decay_groups; asked for after the student is sharded
    losses(model, step, attempt)  yields (loss, {name: number to log}) for each gradient accumulation; `model` is student,
                              behind data parallelism; their sum over accumulations, averaged over processes, is the loss
    finish(average)           called at each save but that of step 0 in the first process with {name: tensor}, averaged
                              where it is trained: writes the model
    look(step)                called, if there is one, every run.look_every steps and at the end, when all is saved
    A step with a non-finite loss or gradient is dropped; after `patience` in a row the last checkpoint is loaded
    and training goes on with other data (the paper, section 2.2, after LLaMA); where that has not helped `patience` times,
    UserError. SIGTERM and Ctrl-C save first.
    """
    compile_blocks(run, student)
    model = run.parallel(student)
    groups = [g for g in groups_of() if g["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=run.device.type in ("cpu", "cuda"))
    live = trained(student)
    shadow = {k: v.detach().clone() for k, v in live.items()}
    step, attempt, bad, reloads = 0, 0, 0, 0
    going_on = run.resume and checkpoints(run.out, stage)
    run.wait()                                                             # until all have looked
    if going_on:
        step, attempt = load_checkpoint(going_on[-1], optimizer, live, shadow)
    for half in run.out.rglob(".*.safetensors.*") if run.first else ():      # what a kill in the middle of a write left
        half.unlink()
    log = Log(run, stage, step, steps, batch)

    def save():
        mine = lambda tensor: whole(tensor, run.first)                     # all processes take part
        mean = {k: mine(shadow.get(k, v)) for k, v in student.state_dict().items()}
        flat = {f"shadow.{k}": mean[k] for k in live} | {f"student.{k}": mine(v) for k, v in live.items()}
        for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
            flat |= {f"optimizer.{i}.{k}": mine(v) for k, v in optimizer.state[p].items()}
        if run.first:
            if step:                                                       # first: where the last checkpoint stands, a stage is over
                finish(mean)
            save_checkpoint(run.out / f"{stage}-{step:07d}.checkpoint.safetensors", flat, run.settings | {"step": step, "attempt": attempt})
            for old in checkpoints(run.out, stage)[:-KEEP]:
                old.unlink()
            if look and step and (step % run.look_every == 0 or step == steps):
                look(step)
        run.wait()

    if not going_on:
        if run.first:
            for later in list(run.stages)[list(run.stages).index(stage):]:   # of a run that is not gone on with
                for old in checkpoints(run.out, later):
                    old.unlink()
        save()                                                             # a good state to go back to from the first step on
    with Stop() as stop:
        while step < steps:
            rate = learning_rate(step, steps, lr, floor)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.zero_grad(set_to_none=True)
            loss, values, parts = 0.0, {}, losses(model, step, attempt)
            for i in range(run.accumulate):
                run.synchronise(model, last=i == run.accumulate - 1)
                part, seen = next(parts)
                part.backward()
                loss = loss + part.detach()
                values = {k: values.get(k, 0) + v / run.accumulate for k, v in seen.items()}
            next(parts, None)                                              # what comes after a step's backward passes
            norm = float(whole(nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)))
            mean, stopping = run.total(torch.tensor([float(loss) / run.world, float(stop.asked)], device=run.device)).tolist()
            step += 1
            if math.isfinite(mean) and math.isfinite(norm):
                bad = 0
                optimizer.step()
                decay = min(average, step / (step + 10))                   # quick at first
                with torch.no_grad():
                    for k, v in live.items():
                        shadow[k].mul_(decay).add_(v, alpha=1 - decay)
                log.add(step, loss=mean, **values)
            else:
                bad += 1
                log.event(step, "dropped", loss=mean, norm=norm)
                if bad == patience:
                    if reloads == patience:
                        raise UserError(f"stage {stage}: after {reloads} reloads still not finite at step {step}; a lower --lr may help")
                    step, _ = load_checkpoint(checkpoints(run.out, stage)[-1], optimizer, live, shadow)
                    attempt, bad, reloads = attempt + 1, 0, reloads + 1
                    log.event(step, "reloaded", attempt=attempt)
                    continue                                               # it stands there already
            if step % run.save_every == 0 or look and step % run.look_every == 0 or step == steps or stopping:
                save()
                reloads = 0
            if stopping:
                raise KeyboardInterrupt
    log.close()


class Stop:
    """Turns SIGTERM and Ctrl-C into a flag that is read after each step; a second Ctrl-C stops at once."""
    def __enter__(self):
        self.asked = False
        self.old = {s: signal.signal(s, self.ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, self.old[signal.SIGINT])

    def __exit__(self, *exception):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def trained(student):
    """{name: tensor} of a run's state: the parameters that are trained, and buffers."""
    frozen = {n for n, p in student.named_parameters() if not p.requires_grad}
    return {k: v for k, v in student.state_dict().items() if k not in frozen}


def whole(tensor, keep=True):
    """A tensor that may be split over processes, as one on the CPU, or None without `keep`; all processes must ask."""
    one = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
    return one.cpu() if keep else None


def copy_in(target, value):
    """Overwrite `target`, split over processes or not, with a whole tensor."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(value)


def checkpoints(out, stage):
    """A stage's checkpoint files, oldest first."""
    return sorted(out.glob(f"{stage}-*.checkpoint.safetensors"))


def steps_done(run, stage):
    """The step of a stage's last checkpoint, 0 without one. Raises UserError if another seed, preset or kind of data made it."""
    for path in checkpoints(run.out, stage)[-1:]:
        about = metadata(path)
        for name, value in run.settings.items():
            if about.get(name, value) != value:
                raise UserError(f"{path} was made with --{name} {about[name]}: --resume wants the same")
        return int(about.get("step", 0))
    return 0


def save_checkpoint(path, flat, about):
    """One safetensors file with the weights, their average, the optimizer's moments, the step and the run's settings.
    Written beside and renamed: killed at any moment, or on a full disk, the one before is whole."""
    flat = {k: v.contiguous() for k, v in flat.items()}
    try:
        vq.write_whole(path, lambda p: save_file(flat, p, metadata={k: str(v) for k, v in about.items()}))
    except Exception as e:                                     # safetensors wraps "no space left" in its own error
        raise vq.CheckpointError(f"{path}: the checkpoint could not be written ({e}); the last one is whole") from None


def load_checkpoint(path, optimizer, live, shadow):
    """Restore what fit saved -> (step, attempt). Raises CheckpointError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about, flat = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        for name, target in (("student", live), ("shadow", shadow)):
            for k, v in target.items():
                copy_in(v, flat[f"{name}.{k}"])
        for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
            saved, optimizer.state[p] = strip(flat, f"optimizer.{i}."), {}
            for k, v in saved.items():
                optimizer.state[p][k] = v.to(p.device if optimizer.defaults["fused"] else "cpu") if k == "step" \
                    else torch.zeros_like(p.detach())
                copy_in(optimizer.state[p][k], v)
        return int(about["step"]), int(about["attempt"])
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as e:   # another file, or of another model
        raise vq.CheckpointError(f"{path}: not a checkpoint of this run ({e})") from None


def metadata(path):
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise vq.CheckpointError(f"{path}: not a whole safetensors file ({e}); remove it") from None


def strip(flat, prefix):
    """The entries whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------
# Watching it


class Log:
    """In the first process: a progress bar, log.jsonl (a line every 50 steps and for each event), loss.png."""

    def __init__(self, run, stage, first, steps, batch, every=50):
        self.run, self.stage, self.batch, self.every, self.sums, self.count = run, stage, batch, every, {}, 0
        self.bar = tqdm(total=steps, initial=first, desc=f"stage {stage}", disable=not run.first)
        self.path = run.out / "log.jsonl"
        self.start, self.first = time.perf_counter(), first

    def add(self, step, **values):
        """Average `values` (numbers or 0-d tensors) since the last line."""
        self.count += 1
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0) + float(v)
        self.bar.update(step - self.bar.n)
        if step % self.every == 0:
            means = {k: round(v / self.count, 5) for k, v in self.sums.items()}
            done = self.batch * (step - self.first)
            means["samples_per_second"] = round(done / (time.perf_counter() - self.start), 1)
            self.bar.set_postfix(means)
            self.write(step, **means)
            self.sums, self.count = {}, 0

    def event(self, step, what, **values):
        """Something to know of: a dropped step, a reload."""
        self.bar.n = step
        self.write(step, event=what, **{k: repr(v) for k, v in values.items()})
        if self.run.first:
            tqdm.write(f"{self.stage} step {step}: {what} {values}", file=sys.stderr)

    def write(self, step, **values):
        if self.run.first:
            write_line(self.run, stage=self.stage, step=step, **values)
            draw_losses(self.path, self.run.out / "loss.png")

    def close(self):
        self.bar.close()


def write_line(run, **entry):
    with open(run.out / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def entries(log):
    """The entries of a log.jsonl; a line that a full disk cut off is none."""
    for line in log.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def draw_losses(log, path, width=640, height=320):
    """log.jsonl -> a PNG, losses on a logarithmic scale: the text encoder above, then the VQ model, below them the
    transformer's stages side by side on one scale, so that the seams between them show."""
    rows = {}
    for entry in entries(log):
        if "event" not in entry and entry["loss"] > 0:
            row = rows.setdefault(entry["stage"] if entry["stage"] in ("text", "vq") else "transformer", {})
            points = row.setdefault(entry["stage"], {})
            points[entry["step"]] = math.log10(entry["loss"])            # a step that was gone back on: the last counts
    picture = Image.new("RGB", (width, height * max(1, len(rows))), "white")
    pen = ImageDraw.Draw(picture)
    for row, curves in enumerate(rows.values()):
        values = [v for points in curves.values() for v in points.values()]
        low, high = min(values), max(max(values), min(values) + 1e-3)
        place = lambda v: height * row + 20 + (height - 60) * (high - v) / (high - low)
        share, left = (width - 80) / sum(max(points) for points in curves.values()), 60
        for stage, points in curves.items():
            line = [(left + share * step, place(v)) for step, v in points.items()]
            pen.line([(left, height * row + 20), (left, height * (row + 1) - 40)], fill="lightgrey")
            if len(line) > 1:
                pen.line(line, fill="blue", width=2)
            pen.text((left, height * (row + 1) - 30), f"{stage}: {max(points)} steps", fill="black")
            left += share * max(points)
        for value in (low, high):
            pen.text((5, place(value) - 6), f"{10 ** value:.3g}", fill="black")
    vq.write_whole(path, lambda p: picture.save(p, "PNG"))
