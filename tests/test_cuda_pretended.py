"""Sampling and training on a pretended CUDA device: no device mismatch, no host sync in the loop,
nothing illegal in a capture, few launches for each step. tests/pretended_cuda.py explains it."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import GOLDEN_MODEL
from PIL import Image
from pretended_cuda import pretended_cuda

import kernels
import meissonic
from engine.edit import Edit
from engine.pipeline import Pipeline

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="a PyTorch with CUDA")
SIZE, STEPS = (64, 64), 3


@pytest.fixture(autouse=True)
def cpu_tables():
    """Cached tables of the pretended device must not reach other tests, nor theirs this one."""
    yield
    meissonic.rope_table.cache_clear()
    meissonic.sinusoid_frequencies.cache_clear()


def pipeline(dtype=torch.float32, **options):
    pipe = Pipeline(GOLDEN_MODEL, "cuda", dtype, **options)
    pipe.schedule = replace(pipe.schedule, steps=STEPS)
    return pipe


def steps_of(counts):
    """Syncs in the functions that run in each step of sampling."""
    return [line for line in counts.syncs if "masked_positions" not in line
            and "meissonic.py" in line and "set(masked" not in line and "nonzero" not in line]


def test_the_device_refuses_what_a_gpu_refuses():
    with pretended_cuda() as counts:
        x = torch.ones(3).to("cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        assert x.sum().item() == 3 and len(counts.syncs) == 1
        assert (x[x > 0].cpu() == 1).all() and len(counts.syncs) > 1


@pytest.mark.parametrize("settings", [
    {}, {"remask": 2}, pytest.param({"best_of": 3, "remask": 1}, marks=pytest.mark.slow)])
def test_a_picture(settings):
    """The tokens of the CPU; one graph for each shape, replayed in every step."""
    cpu = Pipeline(GOLDEN_MODEL)
    schedule = replace(cpu.schedule, steps=STEPS)
    expected = cpu.draw(["a star"], [0], size=SIZE, schedule=schedule, **settings)
    with pretended_cuda() as counts:
        pipe = pipeline()
        ids = pipe.draw(["a star"], [0], size=SIZE, **settings)
        assert not steps_of(counts) and not counts.in_capture
        assert counts.recorded == (2 if settings.get("best_of") else 1)
        assert counts.replayed >= STEPS
        assert torch.equal(ids.cpu(), expected)
        image, = pipe.decode(ids)
        assert image.size == SIZE


def test_launches_per_step(monkeypatch):
    """A step launches the graph and, beside it, the head, the draw and the re-masking."""
    draw = lambda logits, *rest: (logits.argmax(-1), logits.amax(-1))        # for one Triton kernel
    monkeypatch.setattr(kernels, "sample_masked", draw)
    launches = {}
    with pretended_cuda() as counts:
        pipe = pipeline()
        for steps in (2, 4, 8):                   # the first records the graph
            before = counts.launches
            schedule = replace(pipe.schedule, steps=steps)
            pipe.draw(["a star"], [0], size=(64, 64), schedule=schedule)
            launches[steps] = counts.launches - before
    assert (launches[8] - launches[4]) / 4 <= 30


@pytest.mark.parametrize("edit", ["mask", "strength", "source"])
def test_an_edit(edit):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    mask = np.zeros((64, 64), bool)
    mask[20:50, 10:40] = True
    options = {"mask": dict(mask=mask), "strength": dict(strength=0.5), "source": dict(source="a")}
    with pretended_cuda() as counts:
        pipe = pipeline()
        work = Edit(picture, **options[edit])
        ids = work.start(pipe, ["a star"], [0], SIZE)
        ids = pipe.draw(["a star"], [0], ids=ids, size=SIZE, schedule=work.schedule(pipe.schedule))
        assert work.finish(pipe.decode(ids)[0]).size == (64, 64)
        assert not steps_of(counts) and not counts.in_capture


@pytest.mark.parametrize("chip, dtype, options", [
    ((9, 0), torch.bfloat16, dict(quantize=torch.int8)),
    ((7, 5), torch.float16, {}),
    ((8, 6), torch.bfloat16, {})])
def test_other_cards_and_dtypes(chip, dtype, options):
    with pretended_cuda(chip, memory=8e9) as counts:
        pipe = pipeline(dtype, **options)
        assert pipe.norms_on_host()
        pipe.decode(pipe.draw(["a star", "a heart"], [0, 1], size=SIZE))
        assert not steps_of(counts) and not counts.in_capture


def test_adaptive_norms_stay_on_a_large_card():
    with pretended_cuda(memory=24e9):
        assert not pipeline().norms_on_host()
