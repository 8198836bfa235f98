"""Surviving any interruption: checkpoints of the training state, the lock, and signals.

    with only_run_in(run): ...                            # no other run writes into its folder
    state = TrainingState(task.module, optimizer)
    begin(run, task, state)                               # with --resume load the last checkpoint
    write_checkpoint(run, task, state)                    # and the averaged model

The random choices of a step depend on (seed, stage, step, attempt). So this is all there is to
keep: a run that was killed and resumed ends with the bits of an uninterrupted one.
"""
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoint import (OLD, TEMPORARY, CheckpointError, UserError, is_finite, read_metadata,
                               remove_prefix, write_tensors)
from engine.distributed import copy_sharded, full_tensor, local_tensor

KEEP = 2                                          # checkpoints of a stage
MAX_RELOADS = 3                                   # without a save between them


# --------------------------------------------------------------------------------------------------
# The state of training


class TrainingState:
    """Parameters and buffers, their exponential moving average, AdamW's moments, and the counters.

    step     steps done
    attempt  how often training went back to a checkpoint after losses that were not finite
    reloads  how often since the last save
    """

    def __init__(self, module, optimizer):
        self.module = module
        self.optimizer = optimizer
        self.params = trained_tensors(module)     # {name: tensor}
        self.ema = {name: tensor.detach().clone() for name, tensor in self.params.items()}
        self.step = 0
        self.attempt = 0
        self.reloads = 0

    @torch.no_grad()
    def update_ema(self, decay):
        """ema = decay * ema + (1 - decay) * params."""
        ema = [local_tensor(tensor) for tensor in self.ema.values()]
        params = [local_tensor(tensor) for tensor in self.params.values()]
        torch._foreach_lerp_(ema, params, 1 - decay)

    def has_learned(self):
        """Whether at least one step was not dropped: AdamW counts those that it took."""
        return any(moments["step"] > 0 for moments in self.optimizer.state.values())

    def gather(self, keep):
        """The whole tensors on the CPU -> (what a checkpoint holds, the averaged state_dict of the
        module), both {name: tensor}. All processes must call it; values are None without `keep`."""
        averaged = {}
        for name, tensor in self.module.state_dict().items():
            averaged[name] = full_tensor(self.ema.get(name, tensor), keep)
        tensors = {f"ema.{name}": averaged[name] for name in self.params}
        for name, tensor in self.params.items():
            tensors[f"params.{name}"] = full_tensor(tensor, keep)
        for i, parameter in enumerate(self.optimized()):
            for name, tensor in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{i}.{name}"] = full_tensor(tensor, keep)
        return tensors, averaged

    def optimized(self):
        """The parameters in the optimizer's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self, path, tensors, settings):
        """Write a checkpoint: the tensors of `gather`, the counters and the run's settings. Raises
        UserError, and writes nothing, if a tensor is not finite."""
        about = settings | {"step": str(self.step), "attempt": str(self.attempt)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            write_tensors(path, tensors, about)
        except UserError:
            raise
        except Exception as e:                    # safetensors has its own error for a full disk
            raise CheckpointError(f"{path}: the checkpoint could not be written ({e}); "
                                  "the last one is whole") from None

    def load(self, path):
        """Read what `save` wrote. Raises CheckpointError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            for name, tensor in tensors.items():
                if not is_finite(tensor):
                    raise ValueError(f"{name} holds NaN or infinity")
            for name, tensor in self.params.items():
                copy_sharded(tensor, tensors[f"params.{name}"])
                copy_sharded(self.ema[name], tensors[f"ema.{name}"])
            for i, parameter in enumerate(self.optimized()):
                self.load_moments(parameter, remove_prefix(tensors, f"optimizer.{i}."))
            self.step = int(about["step"])
            self.attempt = int(about["attempt"])
        except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: not a checkpoint of this run ({e})") from None

    def load_moments(self, parameter, saved):
        """Set AdamW's state of one parameter; {} before the first step."""
        state = {}
        for name, value in saved.items():
            if name == "step":                    # a number; fused AdamW keeps it on the device
                state[name] = value.to(parameter.device)
            else:
                state[name] = torch.zeros_like(parameter.detach())
                copy_sharded(state[name], value)
        self.optimizer.state[parameter] = state


def trained_tensors(module):
    """{name: tensor} of the trained parameters and the buffers."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: t for name, t in module.state_dict().items() if name not in frozen}


def begin(run, task, state):
    """With --resume load the last checkpoint of the stage. Else write the first, so that there is
    a good state to go back to from the first step on."""
    paths = checkpoints(run.out, task.name) if run.resume else []
    run.barrier()                                 # until all processes have looked
    if paths:
        state.load(paths[-1])
        return
    if run.is_main:
        remove_stages_from(run, task.name)
    write_checkpoint(run, task, state)


def write_checkpoint(run, task, state):
    """Write the averaged model, then the checkpoint: once the last one is there, the stage is
    over."""
    if state.step == task.steps and not state.has_learned():
        raise UserError(f"stage {task.name}: no step had a finite loss and gradient, nothing was "
                        "learned; a lower --lr may help")
    tensors, averaged = state.gather(keep=run.is_main)
    if run.is_main:
        if state.step:
            task.save(averaged)
        state.save(checkpoint_path(run.out, task.name, state.step), tensors, run.settings)
        for old in checkpoints(run.out, task.name)[:-KEEP]:
            old.unlink()
    state.reloads = 0
    run.barrier()


def go_back(run, task, state, log):
    """Load the last checkpoint and go on with other random choices. Raises UserError if that did
    not help several times."""
    if state.reloads == MAX_RELOADS:
        raise UserError(f"stage {task.name}: after {state.reloads} reloads still not finite at "
                        f"step {state.step}; a lower --lr may help")
    attempt = state.attempt + 1
    state.load(checkpoints(run.out, task.name)[-1])
    state.attempt = attempt
    state.reloads += 1
    log.event(state.step, "reloaded", attempt=attempt)


# --------------------------------------------------------------------------------------------------
# Checkpoint files


def checkpoint_path(out, stage, step):
    return out / f"{stage}-{step:07d}.checkpoint.safetensors"


def checkpoints(out, stage):
    """The checkpoint files of a stage, oldest first."""
    return sorted(out.glob(f"{stage}-*.checkpoint.safetensors"))


def remove_stages_from(run, stage):
    """Remove the checkpoints of this stage and the later ones: they belong to another run."""
    stages = list(run.stages)
    for later in stages[stages.index(stage):]:
        for path in checkpoints(run.out, later):
            path.unlink()


def steps_done(run, stage):
    """The step of a stage's last checkpoint, 0 without one. Raises UserError if it was made with
    another seed, preset or kind of data."""
    paths = checkpoints(run.out, stage)
    if not paths:
        return 0
    about = read_metadata(paths[-1])
    for name, value in run.settings.items():
        if about.get(name, value) != value:
            raise UserError(f"{paths[-1]} was made with --{name} {about[name]}: "
                            "--resume wants the same")
    return int(about.get("step", 0))


# --------------------------------------------------------------------------------------------------
# One run, one folder


LOCK = "lock.json"


@contextlib.contextmanager
def only_run_in(run):
    """Hold the lock of a run's folder, which names the main process, and remove what killed runs
    left there. Raises UserError if another run holds it."""
    refusal = ""
    if run.is_main:
        refusal = take_lock(run.out / LOCK)
    if run.any(bool(refusal)):
        raise UserError(refusal or f"--out {run.out} is in use")
    try:
        if run.is_main:
            clean(run.out)
        run.barrier()                             # until it is clean
        yield
    finally:
        if run.is_main:
            (run.out / LOCK).unlink(missing_ok=True)


def take_lock(path):
    """Write this process into the lock file -> "", or what to tell the user if a running process is
    in it. A lock whose process is gone is taken over."""
    own = {"pid": os.getpid(), "host": socket.gethostname(), "start": process_start(os.getpid()),
           "run": secrets.token_hex(8)}
    for _ in range(3):
        with contextlib.suppress(FileExistsError):
            with open(path, "x", encoding="utf-8") as file:
                json.dump(own, file)
        time.sleep(0.05)                          # another run may be taking it over, too
        holder = read_lock(path)
        if holder == own:
            return ""
        if is_running(holder):
            return (f"--out {path.parent} is in use by another run, process {holder['pid']} on "
                    f"{holder['host']}; if that has ended, remove {path}")
        path.unlink(missing_ok=True)
    return f"--out {path.parent}: other runs are starting there"


def read_lock(path):
    """What a lock file holds; process 0 if that cannot be read."""
    try:
        holder = json.loads(path.read_bytes())
        return holder | {"pid": int(holder["pid"]), "host": str(holder["host"])[:100],
                         "start": holder["start"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {"pid": 0, "host": socket.gethostname(), "start": None}


def is_running(holder):
    """Whether the process of a lock is there. Unknown, so taken for true, on other machines."""
    if holder["host"] != socket.gethostname():
        return True
    if os.path.exists("/proc/self/stat"):
        start = process_start(holder["pid"])
        return start is not None and start == holder["start"]
    return is_alive(holder["pid"])


def process_start(pid):
    """When a process began, in the kernel's ticks: numbers of processes are used again. None if
    there is none, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *values = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(values[18])         # Z: ended, not yet collected


def is_alive(pid):
    """Whether a process of this number runs on this machine."""
    if sys.platform == "win32":                   # os.kill would end it
        return pid > 0
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return pid > 0


def clean(out):
    """Remove unfinished files and folders of processes that are gone from a run's folder and its
    parts. A folder that was being replaced comes back if the new one is not there."""
    for folder in ("", "*/", "tokens/*/"):
        for path in out.glob(f"{folder}{TEMPORARY}*"):
            if path.name.startswith(OLD):
                target = path.with_name(path.name.removeprefix(OLD))
                if not target.exists():
                    path.rename(target)
                    continue
            elif is_in_use(path.name.removeprefix(TEMPORARY).partition("-")[0]):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_in_use(pid):
    """Whether a temporary name with this number, a str, is of a process that runs, not of ours: we
    have written nothing yet."""
    return pid.isdigit() and int(pid) != os.getpid() and is_alive(int(pid))


# --------------------------------------------------------------------------------------------------
# Signals


class StopSignal:
    """Within `with StopSignal() as stop`, SIGTERM and Ctrl-C set stop.asked, which the loop reads
    after each step. A second Ctrl-C stops at once."""

    def __enter__(self):
        self.asked = False
        self.previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
