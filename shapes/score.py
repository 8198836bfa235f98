"""The scorer of the world of shapes: does a picture show what its caption says?

    picture -> Scene               read_scene
    Scene, PromptSpec -> bool      world.satisfies
    both                           image_matches

`score_tasks` scores a model's pictures on held-out captions of the six tasks of GenEval (Table 3 of
the paper). `score_edits` scores mask-free editing (section 3.3) on pictures whose change is known.

    pipe = Pipeline("weights/shapes")
    score_tasks(pipe, number=25)          # {"single": 0.96, ..., "overall": 0.92}

Letters: H W pixels, K templates (a noun at one size), P pixels of a window.
"""
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from engine.edit import Edit
from shapes import world
from shapes.world import COLOURS, NOUNS, Scene, SceneObject, nearest_colours

MIN_AREA = 0.004                                   # share of the picture; smaller parts are specks
MAX_OBJECTS = 6
MAX_SIDE = 28                                      # pixels; larger masks are compared at this size

# ------------------------------------------------------------------------------------------------
# Picture -> Scene


def image_matches(picture, spec):
    """Whether a picture, read from its pixels, satisfies a PromptSpec. More than MAX_OBJECTS
    objects never do."""
    scene = read_scene(picture)
    return len(scene.objects) <= MAX_OBJECTS and world.satisfies(scene, spec)


def read_scene(picture):
    """Picture -> Scene.

    The background is the commonest colour of the border. Objects are the connected parts that
    differ from it, but for parts of under MIN_AREA.
    """
    rgb = np.asarray(picture.convert("RGB"), np.float32)                           # (H, W, 3)
    nearest = nearest_colours(rgb)                                                 # (H, W)
    border = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    background = int(np.bincount(border, minlength=len(COLOURS)).argmax())
    distance = np.sqrt(((rgb - colour_values()[background]) ** 2).sum(-1))         # (H, W)
    labels = connected_components(distance > 60)                                   # (H, W)
    objects = []
    for label in np.unique(labels)[1:]:
        part = labels == label
        if part.sum() >= MIN_AREA * part.size:
            objects.append(read_object(part, nearest, distance, background))
    return Scene(list(COLOURS)[background], tuple(o for o in objects if o))


def read_object(part, nearest, distance, background):
    """One connected part -> SceneObject, or None if the part is only a faint halo.

    part (H, W) bool, nearest (H, W) colour indices, distance (H, W) from the background's colour.
    The colour is the commonest of the part, the noun the one whose mask is most similar.
    """
    votes = np.bincount(nearest[part], minlength=len(COLOURS))
    votes[background] = 0                          # edge pixels are a blend, and may look like it
    colour = int(votes.argmax())
    values = colour_values()
    contrast = np.sqrt(((values[colour] - values[background]) ** 2).sum())
    coverage = np.clip(distance / max(contrast, 1), 0, 1) * part                   # (H, W)
    inside = coverage > 0.4                        # leaves out the halo of decoded pictures
    if not inside.any():
        return None
    rows, columns = np.where(inside.any(1))[0], np.where(inside.any(0))[0]
    top, bottom = rows[0], rows[-1] + 1
    left, right = columns[0], columns[-1] + 1
    mask = Image.fromarray((coverage[top:bottom, left:right] * 255).astype(np.uint8))
    height, width = part.shape
    x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
    r = max((right - left) / width, (bottom - top) / height) / 2
    return SceneObject(nearest_noun(mask), list(COLOURS)[colour], x, y, r)


def colour_values():
    """(8, 3) float32: the RGB values of COLOURS."""
    return np.array(list(COLOURS.values()), np.float32)


def connected_components(mask):
    """Label the 4-connected parts of a bool (H, W) array -> int (H, W): 0 outside, else the largest
    index + 1 of the part's pixels."""
    label = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:
        p = np.pad(label, 1)
        neighbours = [p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]
        grown = np.maximum.reduce([label, *neighbours]) * mask
        if (grown == label).all():
            return label
        # A label is a pixel's index + 1. Take that pixel's label: it is at least as large.
        label = np.append(0, grown)[grown]


# ------------------------------------------------------------------------------------------------
# Mask -> noun


def nearest_noun(mask):
    """L image of an object in its bounding box -> the noun whose mask correlates most with it.

    Masks are compared at the object's size, a pixel larger and a pixel smaller, and shifted by up
    to a pixel: a decoder may cut the tail of a Q, and the bounding box with it.
    """
    side = min(max(mask.size), MAX_SIDE)
    frame = side + 8
    square = np.asarray(centred(mask, side, frame + 2))                            # (frame + 2)^2
    windows = []
    for top in range(3):
        for left in range(3):
            windows.append(normalized(square[top:top + frame, left:left + frame]))
    correlation = noun_templates(side) @ np.stack(windows, 1)                      # (K, 9)
    return NOUNS[int(correlation.max(1).argmax()) % len(NOUNS)]


@lru_cache(maxsize=None)
def noun_templates(side):
    """(K, P) float32: all nouns with a longer side of side - 1, side and side + 1 pixels, each in
    a square of P = (side + 8)^2 pixels, blurred like a decoder's output."""
    templates = []
    for length in (side - 1, side, side + 1):
        for noun in NOUNS:
            mask = centred(world.glyph(noun), max(1, length), side + 8)
            templates.append(normalized(mask.filter(ImageFilter.GaussianBlur(0.8))))
    return np.stack(templates)


def centred(mask, side, frame):
    """An L image, its longer side scaled to `side`, in the middle of a black square of `frame`."""
    mask = world.scaled(mask, side / max(mask.size))
    square = Image.new("L", (frame, frame))
    square.paste(mask, ((frame - mask.width) // 2, (frame - mask.height) // 2))
    return square


def normalized(window):
    """-> vector of mean 0 and norm 1. The product of two of them is their correlation."""
    v = np.asarray(window, np.float32).ravel()
    v = v - v.mean()
    return v / (np.linalg.norm(v) + 1e-6)


# ------------------------------------------------------------------------------------------------
# Scores of a model


def score_tasks(pipe, number=100, batch=16, tasks=(*world.TASKS, "unseen"), world_name="full",
                progress=tqdm, **settings):
    """Draw `number` held-out captions of each task, with seeds 0, 1, ... world_name: one of
    world.WORLDS. `settings`: keywords of Pipeline -> {task: share of its pictures that match},
    "overall" the mean over world.TASKS."""
    prompts = []
    for task in tasks:
        prompts += world.test_prompts(task, number, **world.words_of(world_name))
    correct = []
    for start in progress(range(0, len(prompts), batch)):
        captions, specs = zip(*prompts[start:start + batch])
        seeds = list(range(start, start + len(captions)))
        pictures = pipe(list(captions), seeds, **settings)
        correct += map(image_matches, pictures, specs)
    by_task = np.reshape(correct, (len(tasks), number))
    scores = {task: float(np.mean(row)) for task, row in zip(tasks, by_task)}
    scores["overall"] = float(np.mean([scores[task] for task in tasks if task in world.TASKS]))
    return scores


def score_edits(pipe, number=20, strength=None, progress=tqdm, **settings):
    """Make each of world.EDITS on `number` true pictures, mask-free and with as many tokens chosen
    at random. `settings`: keywords of Pipeline.

    -> {kind: ((matches, kept) of mask-free editing, (matches, kept) of random tokens)}: the share
    of the pictures that match the new caption, and the share of the pixels outside the edit that
    still have their colour.
    """
    side = min(settings.pop("size", None) or pipe.size)
    table = {}
    for kind in progress(world.EDITS):
        rng = np.random.default_rng([0, world.EDITS.index(kind)])
        free, random = [], []
        for seed in range(number):
            example = world.sample_edit(rng, kind, side)
            edit = Edit(example.picture, strength=strength, source=example.old_caption)
            free.append(score_edit(pipe, example, edit, seed, settings))
            edit = Edit(example.picture, strength=edit.used_strength)
            random.append(score_edit(pipe, example, edit, seed, settings))
        table[kind] = tuple(tuple(np.mean(scores, 0).tolist()) for scores in (free, random))
    return table


def score_edit(pipe, example, edit, seed, settings):
    """Edit an EditExample's picture -> (matches: bool, kept: share of the pixels to keep)."""
    size = example.picture.size
    ids = edit.start(pipe, [example.new_caption], [seed], size, settings.get("score"))
    schedule = edit.schedule(settings.get("schedule") or pipe.schedule)
    settings = {**settings, "size": size, "schedule": schedule}
    picture, = pipe([example.new_caption], [seed], ids=ids, **settings)
    same = nearest_colours(picture) == nearest_colours(example.picture)            # (H, W)
    return image_matches(picture, example.spec), same[example.keep].mean()
