"""The world of shapes: captions, scenes and pictures agree; training sees nothing held out."""
import itertools

import numpy as np
import pytest
import torch

import clip
from shapes import world
from shapes.world import PromptObject, PromptSpec, Scene, SceneObject


def rng_of(*seed):
    return np.random.default_rng(seed)


def pairs_of(objects):
    """{(colour, noun)} of PromptObjects or SceneObjects."""
    return {(o.colour, o.noun) for o in objects}


# ------------------------------------------------------------------------------------------------
# What satisfies a PromptSpec

STAR = SceneObject("star", "red", 0.2, 0.5, 0.1)
HEART = SceneObject("heart", "blue", 0.7, 0.5, 0.1)


@pytest.mark.parametrize("expected, objects, properties", (
    (True, (PromptObject("heart"), PromptObject("star")), {}),
    (True, (PromptObject("star", "red", "small"), PromptObject("heart", "blue")),
     {"relation": "left", "background": "white"}),
    (False, (PromptObject("star", "blue"), PromptObject("heart", "red")), {}),
    (False, (PromptObject("star"), PromptObject("heart")), {"relation": "right"}),
    (False, (PromptObject("star"), PromptObject("heart")), {"relation": "above"}),
    (False, (PromptObject("star"),), {}),
    (False, (PromptObject("star", count=2),), {}),
    (False, (PromptObject("star"), PromptObject("heart")), {"background": "black"}),
    (False, (PromptObject("star", size="large"), PromptObject("heart")), {}),
))
def test_satisfies(expected, objects, properties):
    scene = Scene("white", (STAR, HEART))
    assert world.satisfies(scene, PromptSpec("two", objects, **properties)) == expected


@pytest.mark.parametrize("relation, dx, dy", (
    ("left", -1, 0), ("right", 1, 0), ("above", 0, -1), ("below", 0, 1)))
def test_relations_point_the_right_way(relation, dx, dy):
    """"A left of B": A has the smaller x. "A above B": A has the smaller y, on pixels."""
    objects = PromptObject("square", "red"), PromptObject("circle", "blue")
    scene = world.sample_scene(rng_of(3), PromptSpec("position", objects, relation, "white"))
    pixels = np.asarray(world.render(scene, 128), int)

    def centre(colour):
        near = np.abs(pixels - world.COLOURS[colour]).sum(-1) < 9
        return np.argwhere(near).mean(0)[::-1]                                     # (x, y)

    x, y = centre("red") - centre("blue")
    assert x * dx + y * dy > 20


def test_scenes_satisfy_their_specs():
    for i in range(1500):
        rng = rng_of(5, i)
        if i % 16:
            spec = world.sample_spec(rng)
        else:
            spec = world.sample_spec(rng, "colours", unseen=True)
        assert world.satisfies(world.sample_scene(rng, spec), spec)


# ------------------------------------------------------------------------------------------------
# The distribution


@pytest.mark.parametrize("task", world.TASKS)
def test_every_task_is_what_it_says(task):
    rng = rng_of(0)
    for _ in range(200):
        spec = world.sample_spec(rng, task)
        number = 2 if task in ("two", "position", "attribution") else 1
        assert spec.task == task and len(spec.objects) == number
        assert (spec.relation is not None) == (task == "position")
        assert (spec.objects[0].count > 1) == (task == "counting")
        if task in ("colours", "attribution"):
            assert all(o.colour for o in spec.objects)
        if task in ("single", "two"):
            assert not any(o.colour or o.size for o in spec.objects)


def test_every_property_occurs():
    """All tasks, shapes, letters, colours, backgrounds, counts, sizes, relations and wordings."""
    rng = rng_of(0)
    examples = [world.sample_example(rng) for _ in range(3000)]
    captions = [caption for caption, _, _ in examples]
    specs = [spec for _, _, spec in examples]
    objects = [o for spec in specs for o in spec.objects]
    assert {spec.task for spec in specs} == {*world.TASKS, "long"}
    assert {o.noun for o in objects} == set(world.NOUNS)
    assert {o.colour for o in objects} == {None, *world.COLOURS}
    assert {spec.background for spec in specs} == {None, *world.COLOURS}
    assert {o.count for o in objects} == {1, 2, 3, 4}
    assert {o.size for o in objects} == {None, "small", "large"}
    assert {sum(o.count for o in spec.objects) for spec in specs} == {1, 2, 3, 4}
    text = " ".join(f"{caption} " for caption in captions)
    for wordings in world.RELATIONS.values():
        assert all(f" {wording} " in text for wording in wordings)
    assert len(set(captions)) > 2000


@pytest.mark.parametrize("mirrored", (0.5, 0.2, 0.0))
def test_share_of_mirrored_relations(mirrored):
    specs = [world.sample_spec(rng_of(i), "position", mirrored=mirrored) for i in range(2000)]
    share = np.mean([spec.relation in world.MIRRORED for spec in specs])
    assert abs(share - mirrored) < 0.035
    assert {spec.relation for spec in specs} >= {"left", "above"}


@pytest.mark.parametrize("name, cells, margin", (("full", 16, 1), ("tiny", 4, 0)))
def test_objects_are_on_the_grid_and_apart(name, cells, margin):
    """So an object has the same tokens wherever it is, for a power of two of pixels per token. In
    the tiny world with 8 x 8 tokens it has a block of 2 x 2."""
    rng = rng_of(4)
    for _ in range(400):
        _, scene, spec = world.sample_example(rng, **world.WORLDS[name])
        boxes = [box_of(o, cells) for o in scene.objects]
        for o, (low, high) in zip(scene.objects, boxes):
            assert o.r in world.SIZES.values()
            assert (low % 1 == 0).all() and (high % 1 == 0).all()
            assert low.min() >= margin and high.max() <= cells - margin
        for a, b in itertools.combinations(boxes, 2):
            assert gaps(a, b).max() >= 1
        if spec.relation:
            axis = 0 if spec.relation in ("left", "right") else 1
            assert gaps(*boxes)[axis] >= 1


def box_of(o, cells):
    """A SceneObject's corners in cells -> (2,) left and top, (2,) right and bottom."""
    return np.array([o.x - o.r, o.y - o.r]) * cells, np.array([o.x + o.r, o.y + o.r]) * cells


def gaps(a, b):
    """The gap between two boxes along each axis -> (2,), negative where they overlap."""
    return np.maximum(a[0] - b[1], b[0] - a[1])


def test_the_tiny_world():
    """Shapes only, all small, three at most; captions name no size. Everything else occurs."""
    rng = rng_of(0)
    examples = [world.sample_example(rng, **world.WORLDS["tiny"]) for _ in range(1500)]
    found = [o for _, scene, _ in examples for o in scene.objects]
    named = [o for _, _, spec in examples for o in spec.objects]
    assert {o.noun for o in found} == set(world.SHAPES) and {o.size for o in found} == {"small"}
    assert {len(scene.objects) for _, scene, _ in examples} == {1, 2, 3}
    assert {o.size for o in named} == {None} and {o.count for o in named} == {1, 2, 3}
    assert {spec.task for _, _, spec in examples} == {*world.TASKS, "long"}
    assert {spec.relation for _, _, spec in examples} == {None, *world.RELATIONS}
    assert len({(round(8 * o.x), round(8 * o.y)) for o in found}) == 16


@pytest.mark.parametrize("task", (*world.TASKS, "unseen"))
def test_evaluation_captions_of_the_tiny_world(task):
    """They ask for nothing that it does not have."""
    for caption, spec in world.test_prompts(task, 30, **world.words_of("tiny")):
        assert {o.noun for o in spec.objects} <= set(world.SHAPES)
        assert {o.size for o in spec.objects} == {None} and max(o.count for o in spec.objects) <= 3
        assert world.is_held_out(caption) or task == "unseen"


def test_scene_labels():
    scene = Scene("blue", (SceneObject("star", "red", 0.25, 0.75, 0.1),
                           SceneObject("A", "white", 0.5, 0.25, 0.1)))
    labels = world.scene_labels(scene)
    halves, background, number = labels[:-14].reshape(4, -1), labels[-14:-6], labels[-6:]
    names = np.array([*world.COLOURS, *world.NOUNS])
    found = [set(names[half > 0]) for half in halves]                    # left, right, upper, lower
    assert found == [{"red", "star"}, {"white", "A"}, {"white", "A"}, {"red", "star"}]
    assert background.tolist() == [name == "blue" for name in world.COLOURS]
    assert number.tolist() == [0, 1, 0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize("prompt_object, words", (
    (PromptObject("arrow"), "an arrow"), (PromptObject("star", "orange"), "an orange star"),
    (PromptObject("A"), "a letter A"), (PromptObject("cross", count=2), "two crosses"),
    (PromptObject("B", "red", count=3), "three red letters B"),
    (PromptObject("heart", "blue", "large"), "a large blue heart")))
def test_wording(prompt_object, words):
    assert words in world.write_caption(rng_of(0), PromptSpec("long", (prompt_object,)))


def test_wording_of_backgrounds():
    spec = PromptSpec("single", (PromptObject("star"),), background="orange")
    captions = {world.write_caption(rng_of(seed), spec).split("star")[1] for seed in range(30)}
    assert captions == {" on an orange background", " on orange", ", orange background"}


@pytest.fixture(scope="module")
def tokenizer():
    return clip.learn_tokenizer(world.sample_captions(0), 32)


def test_captions_fit_the_tokenizer(tokenizer, capsys):
    """The longest captions and a sample of all are not cut."""
    objects = (PromptObject("triangle", "yellow", "small"),
               PromptObject("diamond", "purple", "small"),
               PromptObject("square", "orange", "small"))
    longest = PromptSpec("long", objects, background="orange")
    rng = rng_of(1)
    captions = [world.write_caption(rng, longest) for _ in range(50)]
    captions += [world.write_caption(rng, world.sample_spec(rng)) for _ in range(2000)]
    assert tokenizer(captions).shape == (2050, 32)
    assert capsys.readouterr().err == ""


def test_each_word_of_the_world_is_one_token(tokenizer):
    """Other text is covered too, by several tokens a word, and the special tokens come last."""
    words = [*world.COLOURS, *world.SHAPES, *world.SIZES, *world.RELATIONS, "two", "three", "four",
             "circles", "stars", "hearts", "crosses", "arrows", "letter", "letters", "background",
             "picture", "drawing"]
    for word in words:
        assert len(tokenizer.bpe.encode(word, add_special_tokens=False).ids) == 1, word
    number = tokenizer.bpe.get_vocab_size()
    assert (tokenizer.start, tokenizer.end) == (number - 2, number - 1) and number <= 1024
    pieces = tokenizer.bpe.encode("Zebra, 7 €!", add_special_tokens=False).ids
    assert tokenizer.end not in pieces
    text_ids = tokenizer(["Zebra, 7 €!"])                                          # (1, 32)
    assert torch.equal(text_ids[0, 1:len(pieces) + 1], torch.tensor(pieces))


# ------------------------------------------------------------------------------------------------
# What is held out


@pytest.mark.parametrize("task", (None, *world.TASKS))
def test_training_sees_nothing_that_is_held_out(task):
    """No held-out caption, and no held-out pair in a spec or, where the spec leaves it open, in the
    scene."""
    rng = rng_of(9)
    for _ in range(1500 if task is None else 400):
        caption, scene, spec = world.sample_example(rng, task)
        assert not world.is_held_out(caption) and task in (None, spec.task)
        assert not pairs_of(spec.objects) & world.HELD_OUT_PAIRS
        assert not pairs_of(scene.objects) & world.HELD_OUT_PAIRS


def test_held_out_pairs_leave_every_colour_and_shape_in_training():
    pairs = set(itertools.product(world.COLOURS, world.SHAPES)) - world.HELD_OUT_PAIRS
    assert {colour for colour, _ in pairs} == set(world.COLOURS)
    assert {noun for _, noun in pairs} == set(world.SHAPES)


@pytest.mark.parametrize("task", world.TASKS)
def test_evaluation_captions_are_held_out(task):
    prompts = world.test_prompts(task, 100)
    captions = [caption for caption, _ in prompts]
    assert len(set(captions)) == 100 and all(map(world.is_held_out, captions))
    assert all(spec.task == task for _, spec in prompts)
    assert prompts == world.test_prompts(task, 100) != world.test_prompts(task, 100, seed=1)


def test_unseen_evaluation_is_of_held_out_pairs():
    for _, spec in world.test_prompts("unseen", 50):
        first = spec.objects[0]
        assert (first.colour, first.noun) in world.HELD_OUT_PAIRS


def test_a_task_with_too_few_captions_repeats_them():
    prompts = world.test_prompts("single", 200)
    distinct = len(dict(prompts))
    assert 100 < distinct < 200 == len(prompts)
    assert prompts[distinct:] == prompts[:200 - distinct]


# ------------------------------------------------------------------------------------------------
# Pictures and training examples


@pytest.mark.parametrize("size", (16, 64, 128, 250))
def test_pictures_have_the_size_asked_for(size):
    _, scene, _ = world.sample_example(rng_of(0))
    picture = world.render(scene, size)
    assert picture.size == (size, size) and picture.mode == "RGB"


def test_example_i_depends_on_seed_stage_and_i_alone():
    source = world.ShapesSource(0, "1", 32, concepts=0.5)
    again = world.ShapesSource(0, "1", 32, concepts=0.5)
    others = [world.ShapesSource(1, "1", 32, concepts=0.5)[3],
              world.ShapesSource(0, "2", 32, concepts=0.5)[3], source[4], source[2 ** 40]]
    assert len(source) > 2 ** 40 and source.skipped == [] and source.state(0) is source.state(1)
    picture, caption, micro_conds = source[3]
    assert all(np.array_equal(a, b) for a, b in zip(source[3], again[3]))
    assert not any(np.array_equal(picture, other[0]) for other in others)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert micro_conds.shape == (5,) and micro_conds.dtype == np.float32


def test_the_score_tells_how_clean_a_picture_is():
    """The distance to the nearest of COLOURS grows as the score falls from CLEAN_SCORE."""
    palette = np.array(list(world.COLOURS.values()), np.float32)
    scores, distances = [], []
    for i in range(200):
        picture, _, micro_conds = world.training_example(rng_of(7, i), 32)
        difference = picture[:, :, None].astype(np.float32) - palette              # (H, W, 8, 3)
        distances.append(np.median(np.sqrt((difference ** 2).sum(-1)).min(-1)))
        scores.append(micro_conds[4])
    scores, distances = np.array(scores), np.array(distances)
    clean = scores == world.CLEAN_SCORE
    assert scores.max() == world.CLEAN_SCORE and 2 <= scores.min() < 3
    assert 0.65 < clean.mean() < 0.85
    assert distances[clean].max() < 3 and distances[scores < 4].mean() > 15
    assert np.corrcoef(scores[~clean], distances[~clean])[0, 1] < -0.7


def test_crops_are_parts_of_larger_pictures():
    micro_conds = np.stack([world.training_example(rng_of(3, i), 32)[2] for i in range(150)])
    width, height, top, left, _ = micro_conds.T                                    # (150,) each
    cropped = width > 32
    assert (width == height).all() and width.max() <= 40 and 0.1 < cropped.mean() < 0.4
    assert (np.maximum(top, left) <= width - 32).all()
    assert not top[~cropped].any() and not left[~cropped].any()
    assert top.any() and left.any()


@pytest.mark.parametrize("concepts, augment_prob", ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0)))
def test_shares_of_the_mixture(concepts, augment_prob):
    mixture = dict(concepts=concepts, augment_prob=augment_prob)
    examples = [world.training_example(rng_of(i), 32, **mixture) for i in range(60)]
    scores = np.array([micro_conds[4] for _, _, micro_conds in examples])
    assert ((scores < world.CLEAN_SCORE) == (augment_prob == 1)).all()
    several = np.mean([" and " in caption or "two" in caption for _, caption, _ in examples])
    assert (several == 0) == (concepts == 1)


@pytest.mark.parametrize("mixture, radii", (
    ({}, {0.125, 0.1875}), (dict(scale=2, cells=8), {0.25, 0.375}),
    (world.WORLDS["tiny"], {0.125})), ids=("full", "half the cells", "tiny"))
def test_concepts_are_whole_and_on_the_grid(mixture, radii):
    mixture = {name: mixture[name] for name in (*world.OF_CONCEPTS, "scale") if name in mixture}
    examples = [world.sample_concept(rng_of(i), **mixture) for i in range(300)]
    objects = [scene.objects[0] for _, scene, _ in examples]
    assert all(world.satisfies(scene, spec) for _, scene, spec in examples)
    assert {o.r for o in objects} == radii
    assert all(o.r <= min(o.x, 1 - o.x, o.y, 1 - o.y) for o in objects)
    assert any(o.r == o.x for o in objects)                                # up to the edge
    for o in objects:
        low, _ = box_of(o, mixture.get("cells", 16))
        assert (low % 1 == 0).all()
    assert not pairs_of(objects) & world.HELD_OUT_PAIRS


@pytest.mark.parametrize("name, cells, margin", (("full", 16, 1), ("tiny", 4, 0)))
def test_crowds(name, cells, margin):
    """Rows and columns of objects of one size, about half of the places left empty."""
    mixture = {key: value for key, value in world.WORLDS[name].items() if key in world.OF_GRID}
    places = []
    for i in range(200):
        scene = world.sample_crowd(rng_of(i), **mixture)
        boxes = [box_of(o, cells) for o in scene.objects]
        assert all((low % 1 == 0).all() and low.min() >= 0 and high.max() <= cells
                   for low, high in boxes)
        assert all(gaps(a, b).max() >= margin for a, b in itertools.combinations(boxes, 2))
        assert len({o.r for o in scene.objects}) <= 1
        assert scene.background not in {o.colour for o in scene.objects}
        assert not pairs_of(scene.objects) & world.HELD_OUT_PAIRS
        places.append(len(scene.objects))
    assert max(places) > 6 and np.mean(places) > 1.5
    picture, caption, _ = world.training_example(rng_of(0), 64, crowds=1.0, **world.WORLDS[name])
    assert picture.shape == (64, 64, 3) and caption == ""


@pytest.mark.parametrize("name", world.WORLDS)
def test_a_small_picture_is_a_large_one_averaged(name):
    """Up to the rounding of 8-bit values, so both have the same tokens."""
    for i in range(40):
        _, scene, _ = world.sample_example(rng_of(7, i), **world.WORLDS[name])
        small = np.asarray(world.render(scene, 64), float)                         # (64, 64, 3)
        for scale in (2, 4):
            large = np.asarray(world.render(scene, 64 * scale), float)
            blocks = large.reshape(64, scale, 64, scale, 3)
            assert np.abs(blocks.mean((1, 3)) - small).max() < 1.5


def test_the_sheet(tmp_path):
    world.write_sheet(tmp_path / "sheet.png", columns=2, rows=2)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
