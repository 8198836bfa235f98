"""Never losing a run: kills, signals, full disks, losses that are not finite."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_training import (KILL, RESULTS, SAVE, STAGES, STEPS, VQ_WEIGHTS, assert_same_tensors,
                           command, contents, copy_parts, copy_run, events, losses, refused,
                           run_process, script, shrink, trained_run)

import train
import vq
from common import ROOT, photos
from engine import checkpoint, log, recipe, resume, vq_training
from engine.checkpoint import read_metadata
from engine.distributed import Run
from engine.log import draw_losses
from engine.recipe import FileRecipe

VQ_RESULTS = (VQ_WEIGHTS, "vq-0000030.checkpoint.safetensors")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiny stages, and one thread: sums over other numbers of threads differ in the last bits."""
    shrink(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def out(tmp_path):
    """A run's folder in which stage vq can begin."""
    out = copy_parts(tmp_path / "run")
    for path in (out / "vqvae").iterdir():
        path.unlink()
    (out / "vqvae").rmdir()
    return out


def last_step(out, stage):
    return int(read_metadata(resume.checkpoints(out, stage)[-1])["step"])


def interrupt(monkeypatch, step, number, *arguments):
    """Run a command; the signal comes while `step` is done."""
    learning_rate = train.learning_rate

    def signalling(n, *rest):
        if n == step - 1:
            signal.raise_signal(number)
        return learning_rate(n, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", signalling)
        with pytest.raises(SystemExit) as caught:
            command(*arguments)
    assert caught.value.code == 130


# -----------------------------------------------------------------------------
# Interruptions


@pytest.mark.slow
def test_killed_inside_a_write_then_resumed_equals_uninterrupted(tmp_path):
    """kill -9 in the middle of writing a checkpoint, in either stage: the one before is whole, and
    resuming from it gives the uninterrupted run's weights, averages and moments bit for bit."""
    killed = script(tmp_path / "killed.py", KILL)
    arguments = [killed, "--out", tmp_path / "run", "--seed", 3, "--save-every", SAVE, "--resume",
                 "--threads", 1]
    for save in ("3", "2"):
        status, _ = run_process(*arguments, KILL_AT_SAVE=save)
        assert status == -9
    status, err = run_process(*arguments)
    assert status == 0, err
    assert_same_tensors(trained_run(), tmp_path / "run", *RESULTS)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_saves_first(out, monkeypatch, number):
    """SIGTERM and Ctrl-C in step 13 leave the checkpoint of step 13, and --resume goes on."""
    arguments = "--out", out, "--seed", 3, "--stage", "vq"
    interrupt(monkeypatch, 13, number, *arguments)
    assert last_step(out, "vq") == 13
    command(*arguments, "--resume")
    assert_same_tensors(trained_run(), out, *VQ_RESULTS)


def test_a_transformer_stage_resumes_alike(tmp_path, monkeypatch):
    """In a stage with sums of logged values between saves, and a frozen text encoder."""
    for name in ("whole", "stopped"):
        arguments = "--out", copy_run(tmp_path / name, "*.checkpoint.*"), "--stage", "3"
        monkeypatch.setitem(train.PRESETS["tiny"]["3"], "text_lr", 0.0)
        if name == "stopped":
            interrupt(monkeypatch, 2, signal.SIGTERM, *arguments)
            arguments += "--resume",
        command(*arguments)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    assert_same_tensors(tmp_path / "whole", tmp_path / "stopped", RESULTS[1], RESULTS[5])


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    out = copy_run(tmp_path / "run")
    before = contents(out)
    command("--out", out, "--seed", 3, "--resume")
    after = contents(out)
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_codes_restart_alike_after_an_interruption(out, tmp_path, monkeypatch):
    """The count of the codes in use outlives a stop between two restarts."""
    settings = STAGES["vq"] | dict(steps=130, adversary_from=130)
    monkeypatch.setitem(train.PRESETS["tiny"], "vq", settings)
    restart_dead_codes, moved = vq_training.restart_dead_codes, []

    def spy(codebook, unused, *rest):
        moved.append(int(unused.sum()))
        restart_dead_codes(codebook, unused, *rest)

    monkeypatch.setattr(vq_training, "restart_dead_codes", spy)
    whole = copy_run(tmp_path / "whole", "*.checkpoint.*", "vqvae")
    command("--out", whole, "--stage", "vq")
    interrupt(monkeypatch, 63, signal.SIGTERM, "--out", out, "--stage", "vq")
    command("--out", out, "--stage", "vq", "--resume")
    assert len(moved) == 4 and moved[1] > 0 and moved[:2] == moved[2:], moved
    assert_same_tensors(whole, out, VQ_WEIGHTS, "vq-0000130.checkpoint.safetensors")


def test_halves_of_files_are_removed(tmp_path):
    out = copy_run(tmp_path / "run")
    (out / "tokens/4").mkdir(parents=True)
    gone = 2 ** 22 + 1                            # no process has such a number
    for half in (f".meissonic-{gone}-0a", f"transformer/.meissonic-{gone}-0b",
                 f"tokens/4/.meissonic-{gone}-0c"):
        (out / half).write_bytes(b"half")
    (out / f".meissonic-{gone}-0d").mkdir()
    (out / f".meissonic-{gone}-0d/config.json").write_text("{")
    command("--out", out, "--stage", "4", "--steps", 3, "--resume", "--seed", 3)
    assert not list(out.rglob(".*"))


# -----------------------------------------------------------------------------
# Full disks and broken files


def full_at(monkeypatch, owner, name, call, error):
    """The call-th call of owner.name leaves half a file and raises."""
    write, calls = getattr(owner, name), []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            if name == "save_file":
                Path(arguments[1]).write_bytes(b"half")
            raise error
        return write(*arguments, **options)

    monkeypatch.setattr(owner, name, full)


def test_a_full_disk_leaves_the_last_checkpoint_whole(out, monkeypatch, capsys):
    full_at(monkeypatch, checkpoint, "save_file", 5, OSError(28, "No space left on device"))
    assert "No space left" in refused(capsys, "--out", out, "--seed", 3, "--stage", "vq")
    assert last_step(out, "vq") == 10 and not list(out.rglob(".*"))


def test_a_full_disk_in_the_words_of_safetensors(out, monkeypatch, capsys):
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    full_at(monkeypatch, vq.VQModel, "save_pretrained", 1, error)
    assert "No space left" in refused(capsys, "--out", out, "--stage", "vq")


def test_a_stage_is_over_when_its_model_is_written(out, monkeypatch):
    """Stopped in the last save, while the model is written: the stage goes on."""
    error = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        full_at(patch, vq.VQModel, "save_pretrained", 3, error)
        with pytest.raises(SystemExit):
            command("--out", out, "--seed", 3, "--stage", "vq")
    assert last_step(out, "vq") == 20
    command("--out", out, "--seed", 3, "--stage", "vq", "--resume")
    assert_same_tensors(trained_run(), out, *VQ_RESULTS)


def test_a_broken_checkpoint_is_named(out, capsys):
    name = "vq-0000010.checkpoint.safetensors"
    (out / name).write_bytes(b"half")
    assert name in refused(capsys, "--out", out, "--stage", "vq", "--resume")


def test_the_checkpoint_of_another_model_is_named(out, capsys):
    name = "vq-0000010.checkpoint.safetensors"
    os.link(trained_run() / RESULTS[5], out / name)
    message = refused(capsys, "--out", out, "--stage", "vq", "--seed", 3, "--resume")
    assert name in message and "not a checkpoint of this run" in message


# -----------------------------------------------------------------------------
# Losses that are not finite


def poison(monkeypatch, calls):
    """Make the loss of these calls of the VQ model's forward NaN -> the pictures of all calls."""
    forward, seen = vq_training.VQTrainer.forward, []

    def poisoned(self, images, *rest):
        seen.append(images)
        loss, *others = forward(self, images, *rest)
        return loss * (float("nan") if len(seen) in calls else 1), *others

    monkeypatch.setattr(vq_training.VQTrainer, "forward", poisoned)
    return seen


def test_bad_steps_are_dropped_then_the_checkpoint_is_loaded(out, monkeypatch):
    """One bad step is dropped. Three in a row bring back step 10 and other data."""
    seen = poison(monkeypatch, (5, 14, 15, 16))
    command("--out", out, "--seed", 3, "--stage", "vq")
    assert events(out) == [(5, "dropped"), (14, "dropped"), (15, "dropped"), (16, "dropped"),
                           (10, "reloaded")]
    assert len(seen) == STEPS + 6 and not torch.equal(seen[10], seen[16])
    tensors = load_file(resume.checkpoints(out, "vq")[-1])
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_dropped_step_changes_no_weight(out, monkeypatch):
    """AdamW's weights, moments and step counter; the codes in use are counted all the same."""
    monkeypatch.setitem(train.PRESETS["tiny"]["vq"], "steps", 7)
    monkeypatch.setitem(train.PRESETS["tiny"]["vq"], "quantize_from", 6)
    poison(monkeypatch, (5, 6))
    interrupt(monkeypatch, 4, signal.SIGTERM, "--out", out, "--stage", "vq")
    before = load_file(resume.checkpoints(out, "vq")[-1])
    interrupt(monkeypatch, 6, signal.SIGTERM, "--out", out, "--stage", "vq", "--resume")
    after = load_file(resume.checkpoints(out, "vq")[-1])
    assert last_step(out, "vq") == 6 and events(out) == [(5, "dropped"), (6, "dropped")]
    for name, value in before.items():
        if not name.startswith("ema."):
            assert torch.equal(after[name], value), name


def test_losses_that_are_read_later(out, monkeypatch):
    """As on a GPU, where they are read every few steps: the same steps are dropped, training goes
    back to the same step and ends well."""
    monkeypatch.setattr(log.Log, "is_due", lambda self, step: step % 6 == 0)
    seen = poison(monkeypatch, (5, 14, 15, 16))
    command("--out", out, "--seed", 3, "--stage", "vq")
    assert events(out) == [(5, "dropped"), (14, "dropped"), (15, "dropped"), (16, "dropped"),
                           (10, "reloaded")]
    assert len(seen) == STEPS + 8
    assert losses(out).keys() == {("vq", step) for step in range(1, STEPS + 1) if step != 5}


def test_a_loss_that_stays_bad_ends_the_run(out, monkeypatch, capsys):
    """After three reloads, each with other data. The checkpoint of step 10 stays."""
    seen = poison(monkeypatch, range(11, 99))
    assert "--lr" in refused(capsys, "--out", out, "--stage", "vq", "--seed", 3)
    assert len(seen) == 10 + 12 and last_step(out, "vq") == 10
    assert not any(torch.equal(seen[10], seen[i]) for i in (13, 16, 19))


@pytest.mark.slow
def test_a_rate_that_breaks_the_model_writes_no_broken_weights(out, capsys):
    refused(capsys, "--out", out, "--stage", "vq", "--seed", 3, "--lr", 1e30)
    for path in out.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_a_stage_whose_steps_were_all_dropped_is_an_error(out, monkeypatch, capsys):
    """Two steps are too few to go back. The stage is not over: --resume does it."""
    monkeypatch.setitem(train.PRESETS["tiny"]["vq"], "steps", 2)
    monkeypatch.setitem(train.PRESETS["tiny"]["vq"], "quantize_from", 1)
    with monkeypatch.context() as patch:
        poison(patch, (1, 2))
        message = refused(capsys, "--out", out, "--stage", "vq")
    assert "nothing was learned" in message and last_step(out, "vq") == 0
    assert not (out / "vqvae").exists()
    command("--out", out, "--stage", "vq", "--resume")
    assert last_step(out, "vq") == 2


def test_a_checkpoint_that_is_not_finite_is_refused(out, monkeypatch, capsys):
    """Neither written nor read."""
    interrupt(monkeypatch, 3, signal.SIGTERM, "--out", out, "--stage", "vq")
    path = resume.checkpoints(out, "vq")[-1]
    tensors, about = load_file(path), read_metadata(path)
    name = "ema.vq.encoder.conv_in.bias"
    tensors[name][0] = float("nan")
    with pytest.raises(checkpoint.UserError, match=name):
        checkpoint.write_tensors(path, tensors, about)
    save_file(tensors, path, metadata=about)
    message = refused(capsys, "--out", out, "--stage", "vq", "--resume")
    assert name in message and path.name in message


# -----------------------------------------------------------------------------
# One run, one folder


def test_a_second_run_at_the_same_time_is_refused(tmp_path, capsys):
    out = copy_run(tmp_path / "run")
    before = contents(out)
    with resume.only_run_in(Run(out, {})):
        message = refused(capsys, "--out", out, "--seed", 3, "--resume")
        assert f"process {os.getpid()}" in message and str(out) in message
        assert (out / "lock.json").exists()
    assert contents(out) == before                # the lock is gone


def holder(**changes):
    own = {"pid": os.getpid(), "host": socket.gethostname(),
           "start": resume.process_start(os.getpid())}
    return json.dumps(own | changes)


@pytest.mark.parametrize("text", (
    holder(pid=2 ** 22 + 1), holder(start=1), holder(pid=0), holder(pid=10 ** 30), "", "{", "null",
    '{"pid": []}', "[" * 100_000, "\xff"), ids=range(10))
def test_a_stale_lock_is_taken_over(tmp_path, text):
    """Of a process that is gone, or whose number another one has now; or cut off by a kill."""
    (tmp_path / "lock.json").write_text(text, encoding="latin-1")
    with resume.only_run_in(Run(tmp_path, {})):
        found = json.loads((tmp_path / "lock.json").read_text())
        assert json.loads(holder()).items() <= found.items()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_machine_is_kept(tmp_path):
    (tmp_path / "lock.json").write_text(holder(host="elsewhere"))
    with pytest.raises(checkpoint.UserError, match="elsewhere.*remove"):
        with resume.only_run_in(Run(tmp_path, {})):
            pass
    assert (tmp_path / "lock.json").exists()


def test_the_lock_goes_after_errors(tmp_path, capsys):
    refused(capsys, "--out", tmp_path / "run", "--stage", "1")
    assert not (tmp_path / "run/lock.json").exists()


def test_temporary_files_of_running_processes_stay(tmp_path):
    """Another program may be writing a picture there. An old folder comes back if it is needed."""
    (tmp_path / f".meissonic-{os.getppid()}-0a").write_text("half")
    (tmp_path / f".meissonic-{os.getpid()}-0b").write_text("half")
    (tmp_path / ".meissonic-old-vqvae").mkdir()
    resume.clean(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".meissonic-{os.getppid()}-0a", "vqvae"]
    (tmp_path / ".meissonic-old-vqvae").mkdir()
    resume.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == left


# -----------------------------------------------------------------------------
# Telling does not stop training


FOREIGN = (b"3", b"null", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"stage": "vq", "step": 1}', b"",
           b'{"stage": "vq", "step": 1, "loss": "low"}',
           b'{"stage": "vq", "step": null, "loss": 1}',
           b'{"stage": ["vq"], "step": 1, "loss": 1}', b'{"stage": "vq", "step": true, "loss": 1}',
           b'{"stage": "vq", "step": 1, "loss": NaN}', b'{"stage": "vq", "step": -3, "loss": 1}',
           b'{"stage": "vq", "step": 1, "loss": 1' + b"0" * 400 + b"}",
           b'{"stage": "vq", "step": 0, "event": "scores", "overall": "good"}',
           b'{"stage": "zero", "step": 0, "loss": 1}')


def test_foreign_lines_in_the_log(out, monkeypatch, capsys):
    monkeypatch.setattr(log, "draw_losses", draw_losses)
    (out / "log.jsonl").write_bytes(b"\n".join(FOREIGN) + b"\n")
    command("--out", out, "--stage", "vq", "--steps", 7)
    assert len(losses(out, "vq")) == 7 and len(log.read_log(out)) == 9
    assert (out / "loss.png").is_file() and "vq" in capsys.readouterr().out


def test_a_clock_that_stands_still(out, monkeypatch):
    monkeypatch.setattr(log.time, "perf_counter", lambda: 5.0)
    command("--out", out, "--stage", "vq", "--steps", 7)
    assert len(losses(out)) == 7


def test_pictures_that_cannot_be_written_are_a_note(out, monkeypatch, capsys):
    """A folder in the way of loss.png, and one in that of log.jsonl."""
    monkeypatch.setattr(log, "draw_losses", draw_losses)
    (out / "loss.png").mkdir()
    command("--out", out, "--stage", "vq", "--steps", 6)
    assert "note: log.jsonl or loss.png" in capsys.readouterr().err
    (out / "log.jsonl").unlink()
    (out / "log.jsonl").mkdir()
    command("--out", out, "--stage", "vq", "--steps", 7, "--resume")
    assert last_step(out, "vq") == 7


def test_a_sheet_that_cannot_be_written_is_a_note(tmp_path, capsys):
    """Neither a folder in its way nor a model that draws NaN ends the run."""
    run = Run(copy_run(tmp_path / "run"), train.PRESETS["tiny"])
    sheet = FileRecipe(run)
    sheet.sheet_captions = lambda stage, number: ["a red circle"] * number
    (run.out / "sheet.png").mkdir()
    assert recipe.evaluate(run, sheet, "4", 2) is None
    (run.out / "transformer/config.json").write_text("{")
    assert recipe.evaluate(run, sheet, "4", 2) is None
    assert capsys.readouterr().err.count("note: sheet.png could not be written") == 2


# -----------------------------------------------------------------------------
# No orphans


ORPHANS = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from engine import data

class Slow:
    def __getitem__(self, i):
        time.sleep(0.1)
        return b"x" * 10 ** 6
batches = [list(range(i, i + 4)) for i in range(0, 4000, 4)]
data.os.cpu_count = lambda: 3
if sys.argv[3] == "files":
    files = [data.TokenFile(None, {}, batches)]
    loader = data._read_batches(Slow(), files, True)
    next(loader)
    print(*[worker.pid for worker in loader._workers], flush=True)
else:
    pictures = data.Prefetch(lambda step, attempt: Slow()[step], 1000, 2)
    pictures(0, 0)
    print(*pictures.pool._processes, flush=True)
os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("what, number", (
    ("files", signal.SIGKILL), ("files", signal.SIGTERM), ("drawn", signal.SIGKILL)))
def test_readers_end_with_their_parent(what, number):
    """Those that read files, and those that draw pictures."""
    command = [sys.executable, "-c", ORPHANS, str(ROOT), str(int(number)), what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    workers = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -number and len(workers) == 2
    for _ in range(50):
        alive = [pid for pid in workers if resume.process_start(pid) is not None]
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(alive)


# -----------------------------------------------------------------------------
# Whose checkpoints


def test_checkpoints_are_thinned():
    names = [path.name for path in resume.checkpoints(trained_run(), "1")]
    assert names == ["1-0000020.checkpoint.safetensors", "1-0000030.checkpoint.safetensors"]


def test_a_stage_done_again_ends_those_after_it(tmp_path):
    """Their checkpoints would count as those of the stages that follow."""
    out = copy_run(tmp_path / "run")
    command("--out", out, "--stage", "3", "--steps", 2)
    left = [stage for stage in STAGES if resume.checkpoints(out, stage)]
    assert left == ["vq", "1", "3"]


def test_a_run_is_resumed_with_the_settings_it_began_with(tmp_path, capsys):
    out, folder = copy_run(tmp_path / "run"), photos(tmp_path / "photos")
    before = contents(out)
    again = "--out", out, "--stage", "4", "--steps", 3, "--resume"
    assert "--seed 3" in refused(capsys, *again, "--seed", 1)
    assert "--data shapes" in refused(capsys, *again, "--seed", 3, "--data", folder)
    assert contents(out) == before
    command(*again, "--seed", 3)
