"""tools.bench on a CPU: every part writes its rows, and a failure ends nothing but itself."""
import json
from dataclasses import replace

import pytest
import torch

import train
from engine.checkpoint import UserError
from tools import bench, bench_kernels, bench_picture, bench_training
from tools.bench_timing import Report

CPU = torch.device("cpu")


def rows(folder):
    lines = (folder / "bench.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_report(tmp_path):
    """Tables in Markdown, rows in JSON, and notes of jobs that failed."""
    def fail():
        raise ValueError("no such\ncard")

    report = Report(tmp_path, "card")
    jobs = [("first", lambda: report.row(us=1.23456, what="a")), ("second", fail),
            ("third", lambda: report.row(us=2.0, what="b"))]
    report.jobs(jobs, start=0)
    first, second, third = rows(tmp_path)
    assert first == {"part": "card", "us": 1.23456, "what": "a"} and third["what"] == "b"
    assert second["note"].startswith("second: failed: ValueError: no such card (")
    table = (tmp_path / "bench.md").read_text()
    assert "### card\n\n| us | what |\n|---|---|\n| 1.235 | a |\n" in table
    report.jobs(jobs, start=2)
    assert len(rows(tmp_path)) == 4


def test_parts(tmp_path, monkeypatch):
    """A part that takes too long or fails leaves a note; the others run."""
    monkeypatch.setattr(bench, "PARTS", {"card": 1, "tokens": 1, "check": 2})
    monkeypatch.setattr(bench.subprocess, "run", run_nothing)
    bench.main(["--out", str(tmp_path), "--seconds", "8"])
    notes = [row["note"] for row in rows(tmp_path)]
    assert notes[0] == "stopped after 2 s" and notes[1] == "exit status 3"
    assert notes[2].startswith("took ")


def run_nothing(command, timeout, env):
    part = command[command.index("--part") + 1]
    if part == "card":
        raise bench.subprocess.TimeoutExpired(command, timeout)
    return bench.subprocess.CompletedProcess(command, 3 if part == "tokens" else 0)


def test_a_gpu_is_not_pretended(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((SystemExit, UserError)):
        bench.main(["--gpu"])
    assert "no CUDA GPU" in capsys.readouterr().err


def test_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "ceilings", lambda *_: (1e9, 1e9))
    bench_kernels.time_kernels(Report(tmp_path, "kernels"), CPU, 0)
    found = rows(tmp_path)
    assert len(found) == len(bench_kernels.small_cases()) and not any("note" in r for r in found)


def test_all_cases_agree_with_themselves():
    """The check of the kernels finds the plain functions right, and a wrong one wrong."""
    for case in bench_kernels.small_cases():
        verdict = bench_kernels.draws_agree if case.draws else bench_kernels.values_agree
        half = bench_kernels.results(case, case.plain, CPU, torch.bfloat16, torch.bfloat16)
        exact = bench_kernels.results(case, case.plain, CPU, torch.bfloat16, torch.float32)
        eps = torch.finfo(torch.bfloat16).eps
        assert verdict(half, half, exact, eps), case.name
        wrong = [x if x is None else x + 1 for x in half]
        assert not verdict(wrong, half, exact, eps), case.name


def test_picture(tmp_path, monkeypatch):
    """Plain and fast paths have the same logits; the operations are those of the matrices."""
    setup = bench_picture.make_setup(CPU)
    c = replace(setup.transformer, num_layers=1, num_single_layers=2)
    setup = replace(setup, transformer=c)
    monkeypatch.setattr(bench_picture, "make_setup", lambda device: setup)
    monkeypatch.setattr(bench_picture, "ceilings", lambda *_: (1e9, 1e9))
    bench_picture.time_pictures(Report(tmp_path, "picture"), CPU, 0)
    plain, fast, note = rows(tmp_path)
    assert plain["path"] == "plain" and fast["path"] == "fast" and fast["loop_s"] > 0
    assert float(note["note"].split(" by ")[1].split()[0]) < 1e-4
    grid = (setup.side // c.compression) ** 2
    rows_of_single = grid + setup.length
    weights = c.num_single_layers * 12 * c.width ** 2 * 2 * rows_of_single       # in one pass
    assert bench_picture.step_operations(setup) > 2 * weights


def test_training(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_training, "ceilings", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(bench_training, "SECONDS", 0.1)
    transformer = train.TINY_TRANSFORMER | dict(num_layers=1, num_single_layers=1)
    configs = train.MODELS["tiny"] | dict(transformer=transformer)
    monkeypatch.setitem(train.MODELS, "tiny", configs)
    bench_training.time_training(Report(tmp_path, "training"), CPU, 0)
    kernels, plain = rows(tmp_path)
    assert kernels["path"] == "kernels" and plain["path"] == "plain"
    assert kernels["samples_per_s"] > 0
