"""The preset "tiny", cut to about two minutes on two cores: it learns eight pictures by heart.

The stages have fewer steps than in the preset. As stage text is then too short to be of use, the
text encoder learns along with the transformer. The preset itself sees each picture once.
"""
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from engine import log
from engine.data import to_float
from engine.pipeline import Pipeline
from shapes import world

STEPS = {"text": 20, "vq": 150, "1": 400}
PICTURES = 8
LOSS = 0.5                                         # of stage 1; a guess among all codes has 7


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a run of the first stages."""
    stages = {}
    for stage, steps in STEPS.items():
        stages[stage] = train.PRESETS["tiny"][stage] | dict(steps=steps)
    stages["vq"].update(adversary_from=STEPS["vq"])
    stages["1"].update(text_lr=1.0)
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", stages)
        patch.setattr(world, "ShapesSource", FewPictures)
        train.main(["--preset", "tiny", "--out", str(out), "--device", "cpu", "--no-eval"])
    return out


class FewPictures(world.ShapesSource):
    """The first pictures of stage 1 over and over; of stage vq all."""

    def __init__(self, seed, stage, size, **mixture):
        super().__init__(seed, stage, size, **mixture)
        self.number = PICTURES if stage == "1" else len(self)

    def __getitem__(self, i):
        return super().__getitem__(i % self.number)


@pytest.mark.slow
def test_the_loss_falls_and_captions_are_heard(out):
    entries = log.read_log(out)
    last = entries[-1]
    assert [entry["psnr"] for entry in entries if entry["stage"] == "vq"][-1] > 12
    assert last["step"] == STEPS["1"] and last["loss"] < LOSS, last
    assert last["right_caption"] < 0.5 * last["wrong_caption"], last


@pytest.mark.slow
def test_pictures_are_drawn_from_their_captions(out):
    """At least half of them token for token, the others nearly."""
    settings = train.PRESETS["tiny"]["1"]
    mixture = world.WORLDS["tiny"] | dict(concepts=settings["concepts"], augment_prob=0.0)
    source = world.ShapesSource(0, "1", settings["size"], **mixture)
    pictures, captions, _ = zip(*[source[i] for i in range(PICTURES)])
    pipe = Pipeline(out)
    with torch.no_grad():
        ids = pipe.vq.encode(to_float(np.stack(pictures)))                         # (8, 8, 8)
    schedule = replace(pipe.schedule, temperature=(0.0, 0.0), cfg_scale=1.0)
    drawn = pipe.draw(list(captions), list(range(PICTURES)), schedule=schedule, remask=0)
    shares = (drawn == ids).float().mean((1, 2))                                   # (8,)
    assert (shares == 1).sum() >= PICTURES / 2 and shares.min() > 0.5, shares
