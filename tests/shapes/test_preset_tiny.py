"""The preset "tiny", cut to about two minutes on two cores: it learns eight pictures by heart.

The stages have fewer steps than in the preset. As stage text is then too short to be of use, the
text encoder learns along with the transformer. The preset itself sees each picture once.
"""
import numpy as np
import pytest
from PIL import Image

import train
from engine import log
from engine.pipeline import Pipeline
from shapes import score, world

STEPS = {"text": 20, "vq": 400, "1": 300}
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
    last = [entry for entry in log.read_log(out) if entry["stage"] == "1"][-1]
    assert last["step"] == STEPS["1"] and last["loss"] < LOSS, last
    assert last["right_caption"] < 0.5 * last["wrong_caption"], last


@pytest.mark.slow
def test_objects_are_drawn_as_captions_say(out):
    """Most pictures have the right object in the right colour on the right background."""
    settings = dict(train.PRESETS["tiny"]["1"])
    mixture = world.WORLDS["tiny"] | dict(concepts=settings["concepts"], augment_prob=0.0)
    source = world.ShapesSource(0, "1", settings["size"], **mixture)
    true, captions, _ = zip(*[source[i] for i in range(PICTURES)])
    drawn = Pipeline(out)(list(captions), list(range(PICTURES)))
    right = [shown(np.asarray(picture)) == shown(pixels) for picture, pixels in zip(drawn, true)]
    assert sum(right) >= PICTURES / 2, list(zip(captions, right))


def shown(pixels):
    """(H, W, 3) uint8 -> background, and noun and colour of each object."""
    scene = score.read_scene(Image.fromarray(pixels))
    return scene.background, [(o.noun, o.colour) for o in scene.objects]
