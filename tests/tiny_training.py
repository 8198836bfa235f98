"""Tiny runs of train.py that several test files share.

    shrink(monkeypatch)                           # tiny models and stages of a few steps
    command("--out", out, "--stage", "vq")        # train.py with them
    out = trained_run()                           # all stages, made once for all tests: copy it
"""
import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from common import ROOT
from safetensors.torch import load_file

import train
from engine import log

SIZE = 16                                         # pixels
STEPS = 30                                        # of stages vq and 1
SAVE = 10                                         # steps between checkpoints
VQ_WEIGHTS = "vqvae/diffusion_pytorch_model.safetensors"
TRANSFORMER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
RESULTS = (VQ_WEIGHTS, TRANSFORMER_WEIGHTS, TEXT_WEIGHTS, "vq-0000030.checkpoint.safetensors",
           "1-0000030.checkpoint.safetensors", "3-0000004.checkpoint.safetensors",
           "4-0000002.checkpoint.safetensors")

MODEL = dict(
    vq=dict(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4,
            num_vq_embeddings=32, norm_num_groups=4),
    transformer=dict(num_layers=1, num_single_layers=1, num_attention_heads=2,
                     attention_head_dim=8, joint_attention_dim=16, pooled_projection_dim=16,
                     axes_dims_rope=(2, 2, 4), codebook_size=32, vocab_size=33),
    text=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
              projection_dim=16, max_position_embeddings=32),
    sampling=dict(steps=4, cfg=3.0))
STAGES = {                                        # f = 2: 8 x 8 tokens, then 16 x 16 compressed
    "vq": dict(size=SIZE, steps=STEPS, batch=8, lr=2e-3, quantize_from=5, adversary_from=20),
    "1": dict(size=SIZE, steps=STEPS, batch=8, lr=1e-3, text_lr=0.3, compress=False, concepts=1.0),
    "3": dict(size=2 * SIZE, steps=4, batch=8, lr=1e-3, text_lr=0.3, compress=True),
    "4": dict(size=2 * SIZE, steps=2, batch=8, lr=1e-4, text_lr=1.0, compress=True)}


def shrink(patch):
    """Make the preset "tiny" much smaller still, log every step, and draw no sheets."""
    patch.setitem(train.MODELS, "tiny", {name: dict(config) for name, config in MODEL.items()})
    patch.setitem(train.PRESETS, "tiny", {name: dict(stage) for name, stage in STAGES.items()})
    patch.setattr(log, "LINE_EVERY", 1)
    patch.setattr(log, "draw_losses", draw_some_losses)
    patch.setattr(train, "evaluate", lambda *arguments: None)


def draw_some_losses(out, draw=log.draw_losses):
    """log.draw_losses for every tenth line of the log: it takes as long as a tiny step."""
    if len((out / "log.jsonl").read_bytes().splitlines()) % 10 == 1:
        draw(out)


def command(*arguments):
    """train.py in this process, with the preset "tiny" on any machine."""
    every = ("--preset", "tiny", "--eval-every", "1000", "--save-every", str(SAVE))
    train.main([*every, *map(str, arguments)])


def refused(capsys, *arguments):
    """What a command that ends with status 2 says last."""
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@lru_cache(maxsize=None)
def trained_run():
    """The folder of a run of all stages with seed 3."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        command("--out", folder / "run", "--seed", 3)
    return folder / "run"


def copy_run(out, *without):
    """A copy of trained_run at `out`, without files that match the patterns."""
    return shutil.copytree(trained_run(), out, dirs_exist_ok=True,
                           ignore=shutil.ignore_patterns("log.jsonl", *without))


def copy_parts(out):
    """Tokenizer and VQ model of trained_run alone."""
    for part in ("tokenizer", "vqvae"):
        shutil.copytree(trained_run() / part, out / part)
    return out


def losses(out, stage=None):
    """{(stage, step): loss} of a run's log."""
    found = {}
    for entry in log.read_log(out):
        if "event" not in entry and stage in (None, entry["stage"]):
            found[entry["stage"], entry["step"]] = entry["loss"]
    return found


def events(out):
    """[(step, event)] of a run's log."""
    return [(entry["step"], entry["event"]) for entry in log.read_log(out) if "event" in entry]


def assert_same_tensors(a, b, *files):
    """Files of two folders hold the same tensors, bit for bit."""
    for file in files:
        mine, theirs = load_file(a / file), load_file(b / file)
        assert mine.keys() == theirs.keys(), file
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file


def contents(folder):
    """{path: (bytes, time)} of all files below a folder."""
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


# -----------------------------------------------------------------------------
# Processes of their own

SCRIPT = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import contextlib, pytest, tiny_training, train
from engine import checkpoint, resume
from engine.distributed import Run
tiny_training.shrink(pytest.MonkeyPatch())
{more}
train.main(sys.argv[1:])
"""
KILL = """                                                # in the middle of writing a checkpoint
write, saves = checkpoint.save_file, []
def save_and_die(tensors, path, **options):
    is_checkpoint = any(name.startswith("params.") for name in tensors)
    saves.extend([path] if is_checkpoint else [])
    write(tensors, path, **options)
    if is_checkpoint and len(saves) == int(os.environ.get("KILL_AT_SAVE", 0)):
        os.truncate(path, 1000)
        os.kill(os.getpid(), 9)
checkpoint.save_file = save_and_die
"""
EXACT = "Run.precision = lambda self: contextlib.nullcontext()   # bfloat16 rounds to 1e-3"


def script(path, more=""):
    """Write a script that runs train.py with the tiny stages, after the lines `more`."""
    path.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), more=more))
    return path


def run_process(*arguments, processes=1, **environment):
    """Run a script under torchrun, or alone -> (exit status, stderr)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    call = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    done = subprocess.run([str(word) for word in call], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return done.returncode, done.stderr
