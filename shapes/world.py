"""The world of shapes: an endless, seeded source of captioned pictures.

A `PromptSpec` is what a caption says. A `Scene` is what a picture holds.

    rng -> PromptSpec             sample_spec
    PromptSpec -> caption         write_caption
    PromptSpec -> Scene           sample_scene
    Scene -> picture              render

`shapes/score.py` goes back: it reads a Scene from pixels and compares it with a PromptSpec.

Six tasks mirror those of GenEval (Ghosh et al. 2023; Table 3 of the paper): one object, two
objects, counting, colours, position, attribution. Training never shows some pairs of colour and
noun, nor one caption in sixteen. The scores use only those: they measure composition, not memory.

    python -m shapes.world        # write sheet.png: 48 pictures with their captions

The file is long because it has four parts: captions, scenes, pictures, and data sets made of them.

Letters: H W pixels.
"""
import itertools
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COLOURS = {
    "red": (214, 32, 38), "orange": (255, 140, 0), "yellow": (250, 225, 40),
    "green": (30, 150, 60), "blue": (30, 80, 220), "purple": (140, 50, 170),
    "black": (15, 15, 15), "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "arrow")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
NOUNS = SHAPES + LETTERS
SIZES = {"small": 1 / 8, "large": 3 / 16}          # half the longer side: a share of the picture's
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = {
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
    "above": ("above", "over"), "below": ("below", "under"),
}
MIRRORED = {"right": "left", "below": "above"}     # equivalent with the two objects exchanged
TASKS = ("single", "two", "counting", "colours", "position", "attribution")
OF_CONCEPTS = ("cells", "letters", "large")        # keywords of sample_concept and sample_example
OF_GRID = (*OF_CONCEPTS, "margin")                 # keywords of sample_crowd and sample_example
CLEAN_SCORE = 6.0                                  # the micro condition of a clean picture

# The edges of objects lie on a grid of cells x cells, `margin` cells from the picture's edge, and a
# cell from each other. The tiny world is for 8 x 8 tokens: each object fills a block of 2 x 2.
WORLDS = {
    "full": dict(),
    "tiny": dict(cells=4, margin=0, letters=0.0, max_objects=3, large=0.0),
}

WORDS = ("letters", "max_objects", "large")              # what of it changes captions

# Training shows each of these colours and shapes, but never the two together.
HELD_OUT_PAIRS = frozenset({
    ("red", "heart"), ("orange", "star"), ("yellow", "square"), ("green", "triangle"),
    ("blue", "diamond"), ("purple", "circle"), ("black", "cross"), ("white", "arrow"),
})


@dataclass(frozen=True)
class PromptObject:
    """One phrase of a caption: `count` objects of a noun. None leaves a property open."""
    noun: str
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class PromptSpec:
    """What a caption says. `relation` tells where the first object is, seen from the second."""
    task: str
    objects: tuple[PromptObject, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class SceneObject:
    """One object of a picture: centre (x, y), y downwards, and half the longer side r, as shares of
    the picture's side."""
    noun: str
    colour: str
    x: float
    y: float
    r: float

    @property
    def size(self):
        """The name of the size that r is nearer to."""
        return "small" if self.r < sum(SIZES.values()) / 2 else "large"


@dataclass(frozen=True)
class Scene:
    """What a picture holds."""
    background: str
    objects: tuple[SceneObject, ...]


# ------------------------------------------------------------------------------------------------
# Captions


def choose(rng, options):
    """One of a sequence."""
    return options[int(rng.integers(len(options)))]


def sample_noun(rng, letters):
    """A letter with probability `letters`, else a shape."""
    return choose(rng, LETTERS if rng.random() < letters else SHAPES)


def sample_colour(rng, noun, unseen=False):
    """A colour that training shows with the noun, or with `unseen` one that it never does."""
    return choose(rng, [c for c in COLOURS if ((c, noun) in HELD_OUT_PAIRS) == unseen])


def sample_background(rng, objects):
    """A colour that no object has."""
    taken = {o.colour for o in objects}
    return choose(rng, [c for c in COLOURS if c not in taken])


def sample_spec(rng, task=None, unseen=False, letters=1 / 6, max_objects=4, large=0.5,
                mirrored=0.5):
    """Draw a PromptSpec.

    task      one of TASKS; "long", which names all properties; or None for the training mixture
    unseen    the first object is a colour-noun pair of HELD_OUT_PAIRS (for tasks that name colours)
    letters   share of the objects that are letters; letters are 26 of 34 nouns
    max_objects  how many objects a caption names at most, at least 2
    large     share of large objects; with 0 all are small and no caption names a size
    mirrored  share of the relations that are "right" or "below", at most 0.5
    """
    if task is None:
        task = "long" if rng.random() < 0.25 else choose(rng, TASKS)
    objects = sample_prompt_objects(rng, task, unseen, letters, max_objects, large)
    while len({(o.noun, o.colour) for o in objects}) < len(objects):   # "a star and a star"
        objects = sample_prompt_objects(rng, task, unseen, letters, max_objects, large)
    relation = None
    if task == "position" or (task == "long" and len(objects) == 2):
        relation = choose(rng, tuple(RELATIONS))
    if relation in MIRRORED and mirrored < 0.5 and rng.random() >= 2 * mirrored:
        relation = MIRRORED[relation]
    background = sample_background(rng, objects) if rng.random() < 0.6 else None
    return PromptSpec(task, objects, relation, background)


def sample_prompt_objects(rng, task, unseen, letters, max_objects, large):
    """Draw the PromptObjects of a task; two of them may be alike."""
    long_number = int(rng.integers(1, max_objects + 1))
    number = {"two": 2, "position": 2, "attribution": 2, "long": long_number}.get(task, 1)
    has_colours = task in ("colours", "attribution", "long")
    if task == "position":
        has_colours = rng.random() < 0.5
    objects = []
    for i in range(number):
        noun = choose(rng, SHAPES) if unseen else sample_noun(rng, letters)
        colour = sample_colour(rng, noun, unseen and i == 0) if has_colours else None
        size, count = None, 1
        if large and task == "long" and number < 4 and rng.random() < 0.5:
            size = choose(rng, ("small", "large"))
        if task == "counting":
            count = int(rng.integers(2, max_objects + 1))
            if rng.random() < 0.5:
                colour = sample_colour(rng, noun)
        objects.append(PromptObject(noun, colour, size, count))
    return tuple(objects)


def write_caption(rng, spec):
    """Put a PromptSpec into words. The same spec has several wordings."""
    phrases = [noun_phrase(o) for o in spec.objects]
    if spec.relation:
        text = f"{phrases[0]} {choose(rng, RELATIONS[spec.relation])} {phrases[1]}"
    elif len(phrases) == 2:
        text = choose(rng, (" and ", " next to ", " with ")).join(phrases)
    elif len(phrases) > 2:
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    else:
        text = phrases[0]
    text = choose(rng, ("", "", "a picture of ", "a drawing of ")) + text
    if spec.background:
        article = "an" if spec.background == "orange" else "a"
        wording = choose(rng, (" on {0} {1} background", " on {1}", ", {1} background"))
        text += wording.format(article, spec.background)
    return text


def noun_phrase(prompt_object):
    """A PromptObject in words: "an orange star", "three large letters B"."""
    several = prompt_object.count > 1
    if prompt_object.noun in LETTERS:
        noun = f"{'letters' if several else 'letter'} {prompt_object.noun}"
    elif several:
        noun = "crosses" if prompt_object.noun == "cross" else prompt_object.noun + "s"
    else:
        noun = prompt_object.noun
    words = [word for word in (prompt_object.size, prompt_object.colour, noun) if word]
    article = COUNTS[prompt_object.count]
    if article == "a" and words[0][0] in "aeio":
        article = "an"
    return " ".join([article] + words)


def is_held_out(caption):
    """Whether a caption belongs to evaluation alone. One in sixteen does."""
    return zlib.crc32(caption.encode()) % 16 == 0


# ------------------------------------------------------------------------------------------------
# Scenes


def sample_scene(rng, spec, cells=16, margin=1, large=0.5):
    """Draw a Scene that satisfies a PromptSpec, on a grid of cells x cells (see WORLDS).

    What the caption leaves open is random. Objects keep a distance of one cell. A relation holds
    with the two objects wholly apart along its axis.
    """
    while True:
        background = spec.background
        if background is None:
            background = sample_background(rng, spec.objects)
        objects = sample_scene_objects(rng, spec, background, large)
        placed = place(rng, objects, spec.relation, cells, margin)
        if placed:
            return Scene(background, placed)


def sample_scene_objects(rng, spec, background, large):
    """-> list of SceneObjects without a place: at (0, 0)."""
    crowded = sum(o.count for o in spec.objects) > 2
    objects = []
    for wanted in spec.objects:
        size = wanted.size or ("large" if rng.random() < large else "small")
        if crowded and wanted.size is None:
            size = "small"
        for _ in range(wanted.count):
            colour = wanted.colour
            if colour is None:
                colour = sample_open_colour(rng, wanted.noun, background, objects)
            objects.append(SceneObject(wanted.noun, colour, 0, 0, SIZES[size]))
    return objects


def sample_open_colour(rng, noun, background, objects):
    """A colour that the caption leaves open. Objects with the same noun mostly share it."""
    alike = [o.colour for o in objects if o.noun == noun]
    if alike and rng.random() < 0.75:
        return alike[0]
    seen = [c for c in COLOURS if (c, noun) not in HELD_OUT_PAIRS]
    return choose(rng, [c for c in seen if c != background])


def place(rng, objects, relation, cells, margin, tries=16):
    """Place objects on the grid, a cell away from each other and `margin` cells from the picture's
    edge, so that the relation holds -> tuple of SceneObjects, or None if none of `tries` draws
    fits."""
    r = np.array([o.r for o in objects])                                           # (n,)
    width = np.ceil(2 * cells * r - 1e-9).astype(int)                              # (n,) in cells
    end = cells - width - margin + 1
    corner = rng.integers(margin, end[:, None], (tries, len(objects), 2))          # (tries, n, 2)
    xy = (corner + width[:, None] / 2) / cells
    i, j = pairs_of(len(objects))
    distance = np.abs(xy[:, i] - xy[:, j]).max(-1)                                 # (tries, pairs)
    apart = r + 0.5 / cells - 1e-9
    fits = (distance >= apart[i] + apart[j]).all(-1)                               # (tries,)
    if relation:
        fits &= offset(relation, xy[:, 0].T, xy[:, 1].T) >= apart[0] + apart[1]
    if not fits.any():
        return None
    first = xy[fits.argmax()]                                                      # (n, 2)
    return tuple(replace(o, x=float(x), y=float(y)) for o, (x, y) in zip(objects, first))


@lru_cache(maxsize=None)
def pairs_of(number):
    """The pairs i < j of `number` things -> two (pairs,) index arrays."""
    return np.triu_indices(number, 1)


def offset(relation, a, b):
    """How far the point a = (x, y) is from b in the direction of a relation."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (b[axis] - a[axis])


def satisfies(scene, spec):
    """Whether a Scene shows exactly the objects of a PromptSpec, each with its named properties, on
    the named background. A relation needs an offset of over half the sum of the two half-sizes."""
    wanted = [o for o in spec.objects for _ in range(o.count)]
    if len(wanted) != len(scene.objects) or spec.background not in (None, scene.background):
        return False
    for found in itertools.permutations(scene.objects):
        if all(map(has_properties, found, wanted)) and has_relation(found, spec.relation):
            return True
    return False


def has_properties(found, wanted):
    """Whether a SceneObject has the properties that a PromptObject names."""
    return (found.noun == wanted.noun and wanted.colour in (None, found.colour)
            and wanted.size in (None, found.size))


def has_relation(objects, relation):
    """Whether the first of two SceneObjects is where `relation` says, seen from the second."""
    if relation is None:
        return True
    a, b = objects[:2]
    return offset(relation, (a.x, a.y), (b.x, b.y)) > 0.5 * (a.r + b.r)


def scene_labels(scene):
    """What a caption lets one guess of its scene -> (182,) float32 of 0 and 1.

    For the left, right, upper and lower half: which colours and which nouns have an object's centre
    there (4 x 42). Then the background's colour (8), and the number of objects, 1 to 6.
    """
    names = [*COLOURS, *NOUNS]
    halves = np.zeros((4, len(names)), np.float32)
    for o in scene.objects:
        for half in (int(o.x >= 0.5), 2 + int(o.y >= 0.5)):
            halves[half, names.index(o.colour)] = 1
            halves[half, names.index(o.noun)] = 1
    background = np.array(list(COLOURS)) == scene.background
    number = np.arange(1, 7) == len(scene.objects)
    return np.concatenate([halves.ravel(), background, number]).astype(np.float32)


# ------------------------------------------------------------------------------------------------
# Pictures

REFERENCE = 1024                                   # pixels of a picture's side


def ray_points(radii, number):
    """Points at equal angles, clockwise from the top, at distances that repeat `radii`."""
    points = []
    for i in range(number):
        radius, angle = radii[i % len(radii)], 2 * np.pi * i / number
        points.append((radius * np.sin(angle), -radius * np.cos(angle)))
    return points


def heart_points():
    """The curve that plotting programs use for a heart."""
    t = np.linspace(0, 2 * np.pi, 200)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return list(zip(np.sin(t) ** 3, y))


POLYGONS = {                                       # corners in [-1, 1], y downwards
    "triangle": [(0, -0.85), (1, 0.85), (-1, 0.85)],
    "star": ray_points((1, 0.42), 10),
    "heart": heart_points(),
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "arrow": [(-1, -0.35), (0.1, -0.35), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.35), (-1, 0.35)],
}


@lru_cache(maxsize=None)
def glyph(noun):
    """A noun's mask as an L image of its bounding box, about 960 pixels along the longer side."""
    image = Image.new("L", (1024, 1024))
    pen = ImageDraw.Draw(image)
    c, r = 512, 480
    if noun in POLYGONS:
        pen.polygon([(c + r * x, c + r * y) for x, y in POLYGONS[noun]], fill=255)
    elif noun == "circle":
        pen.ellipse((c - r, c - r, c + r, c + r), fill=255)
    elif noun == "square":
        pen.rectangle((c - 0.9 * r, c - 0.9 * r, c + 0.9 * r, c + 0.9 * r), fill=255)
    elif noun == "cross":
        pen.rectangle((c - r, c - r / 3, c + r, c + r / 3), fill=255)
        pen.rectangle((c - r / 3, c - r, c + r / 3, c + r), fill=255)
    else:
        font = ImageFont.load_default(800)
        pen.text((c, c), noun, font=font, fill=255, stroke_width=44, anchor="mm")
    return image.crop(image.getbbox())


@lru_cache(maxsize=4096)
def object_mask(noun, r, size):
    """A noun's mask in a picture of size x size pixels, as a square L image around its centre.

    It is drawn for a picture of REFERENCE pixels and averaged over areas. The square's edges lie on
    the grid of 16 cells if the object's do. So a picture of 64 pixels is exactly one of 256 pixels
    averaged over 4 x 4 pixels, and both have the same tokens."""
    image = glyph(noun)
    image = scaled(image, 2 * r * REFERENCE / max(image.size))
    cell = REFERENCE // 16
    half = -(-max(image.size) // (2 * cell)) * cell
    square = Image.new("L", (2 * half, 2 * half))
    square.paste(image, (half - image.width // 2, half - image.height // 2))
    return scaled(square, size / REFERENCE)


def scaled(image, scale):
    """Resize an image by a factor, averaging over areas; at least 1 pixel a side."""
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.BOX)


def render(scene, size):
    """Draw a Scene as an RGB image of size x size pixels with antialiased edges."""
    picture = Image.new("RGB", (size, size), COLOURS[scene.background])
    for o in scene.objects:
        mask = object_mask(o.noun, o.r, size)
        left = round(o.x * size - mask.width / 2)
        top = round(o.y * size - mask.height / 2)
        picture.paste(COLOURS[o.colour], (left, top), mask)
    return picture


def degrade(rng, picture, degree):
    """Add blur, noise and a colour cast, in proportion to `degree` in [0, 1]."""
    blurred = picture.filter(ImageFilter.GaussianBlur(degree * picture.width / 32))
    cast = rng.normal(0, 25 * degree, 3)
    noise = rng.normal(0, 25 * degree, (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(blurred) + cast + noise).clip(0, 255).astype(np.uint8))


def nearest_colours(picture):
    """RGB picture -> (H, W) int64: for each pixel the index of the nearest of COLOURS."""
    rgb = np.asarray(picture, np.float32)                                          # (H, W, 3)
    palette = np.array(list(COLOURS.values()), np.float32)                         # (8, 3)
    return ((rgb[:, :, None] - palette) ** 2).sum(-1).argmin(-1)                   # (H, W)


# ------------------------------------------------------------------------------------------------
# Data sets: training examples, evaluation captions, edits


def sample_example(rng, task=None, cells=16, margin=1, large=0.5, **mixture):
    """-> (caption, Scene, PromptSpec), none of it held out. `mixture`: keywords of sample_spec."""
    while True:
        spec = sample_spec(rng, task, large=large, **mixture)
        caption = write_caption(rng, spec)
        if not is_held_out(caption):
            return caption, sample_scene(rng, spec, cells, margin, large), spec


def sample_concept(rng, cells=16, letters=0.3, large=0.5, scale=1):
    """One object anywhere -> (caption, Scene, PromptSpec). It teaches what things are, before where
    and how many they are. scale: of the object, 2 where the grid has half the usual cells."""
    noun = sample_noun(rng, letters)
    colour = sample_colour(rng, noun)
    background = choose(rng, [c for c in COLOURS if c != colour])
    wanted = PromptObject(noun, colour if rng.random() < 0.75 else None)
    spec = PromptSpec("single", (wanted,), None, background if rng.random() < 0.6 else None)
    r = scale * SIZES["large" if rng.random() < large else "small"]
    placed = place(rng, [SceneObject(noun, colour, 0, 0, r)], None, cells, margin=0)
    return write_caption(rng, spec), Scene(background, placed), spec


def sample_crowd(rng, cells=16, margin=1, letters=0.3, large=0.5):
    """As many objects as fit side by side, half of them left out -> Scene. It has no caption. The
    VQ model learns more of outlines from it than from a picture that is nearly all ground."""
    background = choose(rng, tuple(COLOURS))
    r = SIZES["large" if rng.random() < large else "small"]
    width = round(2 * cells * r)
    left, top = rng.integers(0, width + margin, 2) % (cells - width + 1)
    objects = []
    for row in range(top, cells - width + 1, width + margin):
        for column in range(left, cells - width + 1, width + margin):
            noun = sample_noun(rng, letters)
            colour = sample_colour(rng, noun)
            if colour != background and rng.random() < 0.5:
                x, y = (column + width / 2) / cells, (row + width / 2) / cells
                objects.append(SceneObject(noun, colour, x, y, r))
    return Scene(background, tuple(objects))


def training_example(rng, size, concepts=0.0, crowds=0.0, augment_prob=0.25, scale=1, **mixture):
    """One example -> picture uint8 (size, size, 3), caption, micro conditions (5,) float32. These
    are: original width and height, crop top and left, score.

    concepts      share of pictures with a single object, see sample_concept
    crowds        share of pictures without a caption, see sample_crowd
    augment_prob  probability that the picture is a crop of a larger one, and that it is degraded.
                  The score of a degraded picture is up to 4 lower
    scale         of the single objects
    mixture       keywords of sample_example for the other pictures
    """
    if rng.random() < crowds:
        shared = {name: mixture[name] for name in OF_GRID if name in mixture}
        caption, scene = "", sample_crowd(rng, **shared)
    else:
        caption, scene = sample_pair(rng, concepts, scale, mixture)
    side, left, top, score = size, 0, 0, CLEAN_SCORE
    if rng.random() < augment_prob:
        side = int(rng.integers(size, size * 5 // 4 + 1))
        left, top = (int(start) for start in rng.integers(0, side - size + 1, 2))
    picture = render(scene, side).crop((left, top, left + size, top + size))
    if rng.random() < augment_prob:
        degree = float(rng.random())
        picture = degrade(rng, picture, degree)
        score = CLEAN_SCORE - 4 * degree
    return np.asarray(picture), caption, np.array([side, side, top, left, score], np.float32)


def sample_pair(rng, concepts, scale, mixture):
    """-> caption, Scene, of a single object with probability `concepts`."""
    if rng.random() >= concepts:
        caption, scene, _ = sample_example(rng, **mixture)
        return caption, scene
    while True:
        shared = {name: mixture[name] for name in OF_CONCEPTS if name in mixture}
        caption, scene, _ = sample_concept(rng, scale=scale, **shared)
        if not is_held_out(caption):
            return caption, scene


class ShapesSource:
    """Training examples without end; example i comes from a generator seeded with (seed, stage, i).
    Implements the Source protocol of engine/data.py. `mixture`: keywords of training_example."""

    def __init__(self, seed, stage, size, **mixture):
        self.key = [seed, zlib.crc32(stage.encode()), 2 ** 32]
        self.size, self.mixture = size, mixture
        self.skipped = []

    def __len__(self):
        return 2 ** 48

    def __getitem__(self, i):
        return training_example(np.random.default_rng([*self.key, i]), self.size, **self.mixture)

    def state(self, i):
        """What an example depends on beside the arguments of the source: nothing."""
        return None


def sample_captions(seed, number=20_000):
    """Captions to learn byte pairs from."""
    rng = np.random.default_rng(seed)
    return [write_caption(rng, sample_spec(rng)) for _ in range(number)]


def words_of(world_name):
    """The keywords of sample_spec for one of WORLDS."""
    return {name: value for name, value in WORLDS[world_name].items() if name in WORDS}


def test_prompts(task, number, seed=0, **mixture):
    """`number` (caption, PromptSpec) pairs of a task that training never sees. The task "unseen"
    has new colour-noun pairs. A task with fewer captions repeats them ("single" has 147).
    `mixture`: keywords of sample_spec."""
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    pairs = {}
    draws_since_last = 0
    while len(pairs) < number and draws_since_last < 10_000:
        if task == "unseen":
            spec = sample_spec(rng, "colours", unseen=True, **mixture)
        else:
            spec = sample_spec(rng, task, **mixture)
        caption = write_caption(rng, spec)
        draws_since_last += 1
        if (task == "unseen" or is_held_out(caption)) and caption not in pairs:
            pairs[caption] = spec
            draws_since_last = 0
    return list(itertools.islice(itertools.cycle(pairs.items()), number))


test_prompts.__test__ = False                      # it is no test: pytest collects by name

EDITS = ("recolour", "turn", "background", "remove", "add")


@dataclass(frozen=True)
class EditExample:
    """A picture and a change of its caption."""
    kind: str                                      # one of EDITS
    picture: Image.Image
    old_caption: str
    new_caption: str
    spec: PromptSpec                               # what the new caption says
    keep: np.ndarray                               # (H, W) bool: pixels that must not change


def sample_edit(rng, kind, size):
    """Draw an EditExample with two objects on a background, or one object for "add". The captions
    name every colour. The first object is recoloured, turned into another, removed or added."""
    colours = [list(COLOURS)[i] for i in rng.permutation(8)]
    nouns = [SHAPES[i] for i in rng.permutation(8)]
    first = PromptObject(nouns[0], colours[0])
    second = PromptObject(nouns[1], colours[1])
    before = PromptSpec("attribution", (first, second), None, colours[2])
    after = {
        "recolour": replace(before, objects=(replace(first, colour=colours[3]), second)),
        "turn": replace(before, objects=(replace(first, noun=nouns[2]), second)),
        "background": replace(before, background=colours[3]),
        "remove": replace(before, objects=(second,)),
        "add": before,
    }[kind]
    if kind == "add":
        before = replace(before, objects=(second,))
    if any((o.colour, o.noun) in HELD_OUT_PAIRS for o in before.objects + after.objects):
        return sample_edit(rng, kind, size)
    scene = sample_scene(rng, before)
    wording = int(rng.integers(1 << 30))           # one seed: both captions use the same words
    old_caption = write_caption(np.random.default_rng(wording), before)
    new_caption = write_caption(np.random.default_rng(wording), after)
    picture = render(scene, size)
    keep = pixels_to_keep(kind, scene, picture)
    return EditExample(kind, picture, old_caption, new_caption, after, keep)


def pixels_to_keep(kind, scene, picture):
    """(H, W) bool. A new background keeps the objects' pixels, "add" a box around each object.
    The other kinds change the first object and keep all but a box around it."""
    if kind == "add":
        return near_objects(scene.objects, picture.width)
    if kind == "background":
        object_pixels = nearest_colours(picture) != list(COLOURS).index(scene.background)
        return near_objects(scene.objects, picture.width) & object_pixels
    return ~near_objects(scene.objects[:1], picture.width)


def near_objects(objects, size):
    """(size, size) bool: pixels in the box of an object, or up to 2 pixels beside it."""
    centres = (np.arange(size) + 0.5) / size
    boxes = []
    for o in objects:
        distance = np.maximum(abs(centres[:, None] - o.y), abs(centres - o.x))     # (size, size)
        boxes.append(distance < o.r + 2 / size)
    return np.logical_or.reduce(boxes)


def write_sheet(path, columns=8, rows=6, cell=160):
    """Write example pictures with their captions below them."""
    rng = np.random.default_rng(0)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + 40)), "white")
    pen = ImageDraw.Draw(sheet)
    for n in range(columns * rows):
        caption, scene, _ = sample_example(rng)
        x = n % columns * cell + 16
        y = n // columns * (cell + 40) + 8
        sheet.paste(render(scene, 128), (x, y))
        for start in range(0, len(caption), 26):
            pen.text((x, y + 132 + start // 26 * 12), caption[start:start + 26], fill="black")
    sheet.save(path)


if __name__ == "__main__":
    write_sheet("sheet.png")
    print("sheet.png")
