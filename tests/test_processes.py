"""Several processes: they share the batches, and together train as one does."""
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import EXACT, copy_parts, losses, run_process, script

from engine import distributed, resume
from engine.checkpoint import UserError
from engine.distributed import Run


def one_of(world_size, rank, accumulate, monkeypatch, tmp_path):
    """The Run of one of several processes that do not exist."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("RANK", str(rank))
    return Run(tmp_path, {}, accumulate=accumulate)


def test_each_process_has_its_own_rows_of_a_batch(monkeypatch, tmp_path):
    rows = []
    for rank in range(4):
        run = one_of(4, rank, 3, monkeypatch, tmp_path)
        assert run.is_main == (rank == 0)
        for part, squares in run.rank_slice(np.arange(24), np.arange(24) ** 2):
            assert np.array_equal(part ** 2, squares)
            rows += part.tolist()
    assert sorted(rows) == list(range(24))
    with pytest.raises(UserError, match="4 processes"):
        run.rank_slice(np.arange(10))


@pytest.mark.parametrize("visible, chosen", ((8, 3), (1, 0), (2, None)))
def test_a_process_takes_its_own_gpu_first(monkeypatch, visible, chosen):
    """Before anything is allocated on GPU 0. CUDA_VISIBLE_DEVICES may show it one GPU only."""
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    if chosen is None:
        with pytest.raises(UserError, match="no GPU of its own"):
            distributed.own_device("cuda")
        return
    assert distributed.own_device(None) is None
    assert distributed.own_device("cuda:0") == "cuda"
    assert distributed.own_device("cpu") == "cpu"
    assert seen == [chosen, chosen]


def train_alike(base, tmp_path, runs, *arguments):
    """{name: (processes, flags)} -> {name: losses}, each run on a copy of `base`."""
    exact = script(tmp_path / "exact.py", EXACT + "\ntrain.CAPTIONS_EVERY = 3")
    found = {}
    for name, (processes, flags) in runs.items():
        out = tmp_path / name
        if not out.exists():
            shutil.copytree(base, out)
        status, err = run_process(exact, "--out", out, *arguments, *flags, processes=processes)
        assert status == 0, err
        found[name] = losses(out)
    return found


@pytest.mark.slow
def test_sharded_and_accumulated_equal_plain(tmp_path):
    """One process; one that accumulates gradients over four passes; two; two with everything split
    between them: the same losses to 1e-5. A split run resumes alike, bit for bit."""
    base = copy_parts(tmp_path / "base")
    arguments = "--stage", "1", "--resume", "--steps", 8, "--save-every", 4
    runs = {"plain": (1, []), "accumulated": (1, ["--accumulate", 4]),
            "parallel": (2, ["--accumulate", 2]), "sharded": (2, ["--shard", "--accumulate", 2])}
    found = train_alike(base, tmp_path, runs, *arguments)
    weights = {name: load_file(resume.checkpoints(tmp_path / name, "1")[-1]) for name in runs}
    assert len(found["plain"]) == 8
    for name in runs:
        for key, loss in found["plain"].items():
            assert abs(found[name][key] - loss) <= 1e-5 * (1 + loss), (name, key, found)
        shapes = {key: value.shape for key, value in weights[name].items()}
        assert shapes == {key: value.shape for key, value in weights["plain"].items()}
    resume.checkpoints(tmp_path / "sharded", "1")[-1].unlink()                # back to step 4
    train_alike(base, tmp_path, {"sharded": runs["sharded"]}, *arguments)
    again = load_file(resume.checkpoints(tmp_path / "sharded", "1")[-1])
    assert all(torch.equal(again[key], value) for key, value in weights["sharded"].items())


@pytest.mark.slow
def test_the_vq_stage_in_two_processes_equals_one(tmp_path):
    """Before the discriminator, whose weight is each process's own; with --shard too, which leaves
    this model whole."""
    base = copy_parts(tmp_path / "base")
    shutil.rmtree(base / "vqvae")
    runs = {"one": (1, []), "two": (2, ["--shard"])}
    found = train_alike(base, tmp_path, runs, "--stage", "vq", "--steps", 15)
    assert len(found["one"]) == 15
    assert found["two"] == pytest.approx(found["one"], abs=2e-5), found


BAD_STEPS = EXACT + """
from engine import vq_training
forward, calls = vq_training.VQTrainer.forward, []
def poisoned(self, images, *rest):
    calls.append(images)
    loss, *others = forward(self, images, *rest)
    bad = len(calls) in (5, 14, 15, 16) and os.environ["RANK"] == "1"
    return (loss * (float("nan") if bad else 1), *others)
vq_training.VQTrainer.forward = poisoned
"""


@pytest.mark.slow
def test_a_bad_loss_in_one_process_is_bad_in_all(tmp_path):
    """All drop the step, and all go back."""
    out = copy_parts(tmp_path / "run")
    shutil.rmtree(out / "vqvae")
    status, err = run_process(script(tmp_path / "bad.py", BAD_STEPS), "--out", out, "--stage", "vq",
                              "--steps", 20, "--save-every", 10, processes=2)
    assert status == 0, err
    assert [line.split(": ")[1].split()[0] for line in err.splitlines()
            if line.startswith("vq step")] == ["dropped"] * 4 + ["reloaded"]
