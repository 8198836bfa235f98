"""The scorer reads the world's pictures, refuses wrong captions, and adds up a model's scores."""
import itertools
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from common import GOLDEN_MODEL, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vq
from engine.pipeline import Pipeline
from shapes import score, world
from shapes.world import Scene, SceneObject

SIZES = (64, 300), pytest.param(64, 2000, marks=pytest.mark.slow), \
    pytest.param(128, 2000, marks=pytest.mark.slow)


@lru_cache(maxsize=None)
def read_world(size, number):
    """[(picture, scene, spec, scene as read)] of the training mixture; one in 16 has a pair that
    training never sees."""
    rng = np.random.default_rng([5, size])
    examples = []
    for i in range(number):
        if i % 16 == 0:
            spec = world.sample_spec(rng, "colours", unseen=True)
        else:
            spec = world.sample_spec(rng)
        scene = world.sample_scene(rng, spec)
        picture = world.render(scene, size)
        examples.append((picture, scene, spec, score.read_scene(picture)))
    return examples


def accepted(scene, spec):
    """What image_matches says of a picture that was read before."""
    return len(scene.objects) <= score.MAX_OBJECTS and world.satisfies(scene, spec)


def as_image(pixels):
    return Image.fromarray(np.asarray(pixels).clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------
# Reading pictures


@pytest.mark.parametrize("size, number", SIZES)
def test_right_captions_are_accepted(size, number):
    assert np.mean([accepted(read, spec) for *_, spec, read in read_world(size, number)]) >= 0.995


@pytest.mark.parametrize("size, number", SIZES)
def test_wrong_captions_are_refused(size, number):
    """At least 99.5% of each kind of mistake, and of the captions of other pictures."""
    rng = np.random.default_rng(size)
    examples = read_world(size, number)
    refused = {}
    for i, (_, scene, spec, read) in enumerate(examples):
        wrong = wrong_specs(rng, spec, scene)
        wrong["another"] = examples[(i + 1 + int(rng.integers(number - 1))) % number][2]
        for kind, other in wrong.items():
            if not world.satisfies(scene, other):
                refused.setdefault(kind, []).append(not accepted(read, other))
    assert refused.keys() == {"colour", "noun", "count", "background", "size", "relation", "order",
                              "another"}
    assert all(len(results) >= number / 20 for results in refused.values())
    shares = {kind: np.mean(results) for kind, results in refused.items()}
    assert min(shares.values()) >= 0.995, shares


def wrong_specs(rng, spec, scene):
    """{what is wrong: spec}: a true spec with one property changed to one that the scene lacks."""
    flipped = {"left": "right", "right": "left", "above": "below", "below": "above"}
    i = int(rng.integers(len(spec.objects)))
    o = spec.objects[i]

    def another(value, options):
        return world.choose(rng, [option for option in options if option != value])

    def changed(**properties):
        objects = list(spec.objects)
        objects[i] = replace(o, **properties)
        return replace(spec, objects=tuple(objects))

    kin = world.SHAPES if o.noun in world.SHAPES else world.LETTERS
    wrong = {
        "colour": changed(colour=another(o.colour, world.COLOURS.keys())),
        "noun": changed(noun=another(o.noun, kin)),
        "count": changed(count=another(o.count, world.COUNTS)),
        "background": replace(spec, background=another(scene.background, world.COLOURS.keys())),
    }
    if o.size:
        wrong["size"] = changed(size=another(o.size, world.SIZES.keys()))
    if spec.relation:
        wrong["relation"] = replace(spec, relation=flipped[spec.relation])
        wrong["order"] = replace(spec, objects=spec.objects[::-1])
    return {kind: s for kind, s in wrong.items() if not world.satisfies(scene, s)}


def test_image_matches_reads_and_compares():
    """Guards the shortcut above, which reads each picture once."""
    rng = np.random.default_rng(0)
    for picture, scene, spec, read in read_world(64, 300)[:40]:
        for s in (spec, *wrong_specs(rng, spec, scene).values()):
            assert score.image_matches(picture, s) == accepted(read, s)


@pytest.mark.parametrize("nouns", (
    world.SHAPES, pytest.param(world.LETTERS, marks=pytest.mark.slow)), ids=("shapes", "letters"))
def test_every_noun_in_every_colour(nouns):
    """On the background that is most like the colour, and on one that is not."""
    for noun, colour in itertools.product(nouns, world.COLOURS):
        for background in {most_similar(colour), "black" if colour == "white" else "white"}:
            scene = Scene(background, (SceneObject(noun, colour, 0.5, 0.5, 0.2),))
            assert_read_back(scene, world.render(scene, 64))


def most_similar(colour):
    """The other colour with the nearest RGB values."""
    others = [c for c in world.COLOURS if c != colour]
    values = np.array([world.COLOURS[c] for c in others])
    return others[np.linalg.norm(values - world.COLOURS[colour], axis=1).argmin()]


def is_read_back(scene, picture):
    """Whether the scorer finds the scene's nouns, colours and background in the picture."""
    read = score.read_scene(picture)
    names = [[(o.noun, o.colour) for o in s.objects] for s in (read, scene)]
    return names[0] == names[1] and read.background == scene.background


def assert_read_back(scene, picture):
    assert is_read_back(scene, picture), (scene, score.read_scene(picture))


@pytest.mark.parametrize("picture", (
    Image.new("RGB", (64, 64), "white"), Image.new("RGB", (1, 1)),
    Image.new("RGB", (96, 64), "red"),
    as_image(np.random.default_rng(0).integers(0, 255, (64, 64, 3)))),
    ids=("blank", "dot", "wide", "noise"))
def test_pictures_of_nothing_match_nothing(picture):
    rng = np.random.default_rng(1)
    assert not any(score.image_matches(picture, world.sample_spec(rng)) for _ in range(10))


@pytest.mark.parametrize("noise", (6, 12))
def test_a_little_noise_is_forgiven(noise):
    """A decoder is not exact. `noise`: standard deviation, of 255."""
    rng = np.random.default_rng(0)
    right = []
    for picture, _, spec, _ in read_world(64, 300)[:100]:
        pixels = np.asarray(picture, np.float32) + rng.normal(0, noise, (64, 64, 3))
        right.append(score.image_matches(as_image(pixels), spec))
    assert np.mean(right) >= 0.97


@pytest.mark.parametrize("noun, r", (("F", 2 / 16), ("Q", 3 / 16), ("E", 2 / 16), ("star", 2 / 16)))
def test_decoded_pictures_are_read(noun, r):
    """Decoded outlines are not exact. The pictures have the size that the bundled model draws."""
    model = vq.VQModel.from_pretrained(ROOT / "weights/shapes/vqvae")
    size = 16 * model.config.f
    rng = np.random.default_rng(0)
    pairs = list(itertools.permutations(world.COLOURS, 2))
    wrong = []
    for colour, background in [pairs[i] for i in rng.permutation(len(pairs))[:12]]:
        x, y = rng.integers(4, 13, 2) / 16
        scene = Scene(background, (SceneObject(noun, colour, x, y, r),))
        pixels = torch.from_numpy(np.array(world.render(scene, size)))             # (H, W, 3)
        with torch.no_grad():
            decoded = model.decode(model.encode(pixels.permute(2, 0, 1)[None] / 255))
        picture = as_image((decoded[0].permute(1, 2, 0) * 255).round())
        if not is_read_back(scene, picture):
            wrong.append(scene)
    assert not wrong


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2 ** 32), st.floats(0.3, 0.7), st.integers(1, 12), st.integers(1, 12))
def test_connected_components(seed, density, height, width):
    """Two neighbours have one label; each label is the largest index + 1 of the pixels with it."""
    mask = np.random.default_rng(seed).random((height, width)) < density
    labels = score.connected_components(mask)
    assert ((labels > 0) == mask).all()
    for a, b in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        assert (a == b)[(a > 0) & (b > 0)].all()
    index = np.arange(1, mask.size + 1).reshape(mask.shape)
    for label in np.unique(labels[mask]):
        part = labels == label
        assert index[part].max() == label
        assert part.sum() == flooded(mask, part).sum()


def flooded(mask, part):
    """The pixels of `mask` that a walk from one pixel of `part` reaches."""
    start = tuple(np.argwhere(part)[0])
    seen, waiting = {start}, [start]
    while waiting:
        y, x = waiting.pop()
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]
            if inside and mask[place] and place not in seen:
                seen.add(place)
                waiting.append(place)
    reached = np.zeros_like(mask)
    for place in seen:
        reached[place] = True
    return reached


# ------------------------------------------------------------------------------------------------
# Scores of a model


class PerfectPipeline:
    """Draws what the captions say, but a blank picture for every `wrong`-th seed."""

    def __init__(self, wrong=None, world_name="full"):
        self.specs = {}
        for task in (*world.TASKS, "unseen"):
            self.specs |= dict(world.test_prompts(task, 8, **world.words_of(world_name)))
        self.wrong = wrong
        self.seeds = []

    def __call__(self, prompts, seeds):
        self.seeds += seeds
        return [self.draw(prompt, seed) for prompt, seed in zip(prompts, seeds)]

    def draw(self, prompt, seed):
        if self.wrong and seed % self.wrong == 0:
            return Image.new("RGB", (128, 128), "white")
        scene = world.sample_scene(np.random.default_rng(seed), self.specs[prompt])
        return world.render(scene, 128)


@pytest.mark.parametrize("wrong, share, world_name", (
    (None, 1.0, "full"), (2, 0.5, "full"), (None, 1.0, "tiny")))
def test_score_tasks(wrong, share, world_name):
    pipe = PerfectPipeline(wrong, world_name)
    scores = score.score_tasks(pipe, 8, batch=5, world_name=world_name, progress=iter)
    assert scores == dict.fromkeys((*world.TASKS, "unseen", "overall"), share)
    assert pipe.seeds == list(range(56))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(world.EDITS), st.integers(0, 999))
def test_edit_examples(kind, seed):
    """The picture does not show the new caption. The pixels to keep hold the objects that do not
    change."""
    edit = world.sample_edit(np.random.default_rng(seed), kind, 64)
    scene = score.read_scene(edit.picture)
    assert not world.satisfies(scene, edit.spec) and edit.old_caption != edit.new_caption
    assert edit.keep.shape == (64, 64) and 0 < edit.keep.mean() < 1
    kept = np.array(edit.picture)
    kept[~edit.keep] = world.COLOURS[scene.background]
    number = {"recolour": 1, "turn": 1, "remove": 1, "background": 2, "add": 1}[kind]
    assert len(score.read_scene(Image.fromarray(kept)).objects) == number


class EditingPipeline:
    """Gives one picture whatever is asked for. Also stands in for an Edit of it."""
    size = (64, 64)

    def __init__(self, answer):
        self.answer = answer

    def start(self, pipe, prompts, seeds, size, score):
        return "ids"

    def schedule(self, schedule):
        return "schedule"

    def __call__(self, prompts, seeds, ids, size, schedule):
        assert (ids, size, schedule) == ("ids", self.size, "schedule")
        return [self.answer]


def test_an_edit_is_judged_by_its_caption_and_by_what_it_keeps():
    rng = np.random.default_rng(3)
    example = world.sample_edit(rng, "recolour", 64)
    right = world.render(world.sample_scene(rng, example.spec), 64)
    blank = Image.new("RGB", (64, 64), (255, 0, 255))
    cases = (example.picture, False, 1), (right, True, None), (blank, False, 0)
    for picture, matches, kept in cases:
        pipe = EditingPipeline(picture)
        found = score.score_edit(pipe, example, pipe, 0, {})
        assert found[0] == matches and kept in (None, found[1])


def test_score_edits_without_strength_changes_nothing():
    """Nothing is resampled, so mask-free and random edits give the same picture."""
    pipe = Pipeline(GOLDEN_MODEL)
    schedule = replace(pipe.schedule, steps=1)
    table = score.score_edits(pipe, 1, strength=0, size=(64, 64), schedule=schedule, progress=iter)
    assert list(table) == list(world.EDITS)
    assert all(free == random for free, random in table.values())


@pytest.mark.slow
def test_the_bundled_model_follows_captions():
    """4 held-out captions of each task, drawn once. The bound leaves much room: another processor
    rounds to other pictures."""
    pipe = Pipeline(ROOT / "weights/shapes")
    scores = score.score_tasks(pipe, 4, tasks=world.TASKS, progress=iter, best_of=1)
    assert scores["overall"] >= 0.45, scores
