"""The world of shapes: an endless, seeded source of captioned pictures, and a scorer that reads them.

A `Claim` is what a caption says, a `Scene` is what a picture holds. The world goes

    rng -> Claim -> (caption, Scene) -> picture          sample_claim, caption, sample_scene, draw

and the scorer goes back, from pixels alone:

    picture -> Scene -> does it hold the Claim?          read, holds

Six kinds of claim mirror the tasks of GenEval (Ghosh et al. 2023; Table 3 of the paper): one object, two
objects, counting, colours, position, attribution. Some pairs of colour and noun, and one caption in
sixteen, are never shown in training, so that composing can be told from remembering.

    python data.py          # write sheet.png: 48 pictures of the world with their captions
"""
import itertools
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COLOURS = dict(red=(214, 32, 38), orange=(255, 140, 0), yellow=(250, 225, 40), green=(30, 150, 60),
               blue=(30, 80, 220), purple=(140, 50, 170), black=(15, 15, 15), white=(250, 250, 250))
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "arrow")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
NOUNS = SHAPES + LETTERS
CELL = 1 / 16                                                 # of the picture: centres and sizes are multiples of it
SIZES = dict(small=2 * CELL, large=3 * CELL)                  # half the larger side
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
             "above": ("above", "over"), "below": ("below", "under")}
MIRRORED = {"right": "left", "below": "above"}                # the same with the two objects exchanged
CLEAN = 6.0                                                   # the score, a micro condition, of an unspoilt picture
TASKS = ("single", "two", "counting", "colours", "position", "attribution")

# One pair for each colour and each shape: training sees both, but never together.
HELD_OUT = frozenset({("red", "heart"), ("orange", "star"), ("yellow", "square"), ("green", "triangle"),
                      ("blue", "diamond"), ("purple", "circle"), ("black", "cross"), ("white", "arrow")})


@dataclass(frozen=True)
class Thing:
    """One phrase of a caption: `count` objects of a noun; None leaves a property open."""
    noun: str
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Claim:
    """What a caption says. `relation` is from the first thing to the second."""
    task: str
    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Item:
    """One object of a picture; centre (x, y) and half-size r as shares of the picture, y downwards."""
    noun: str
    colour: str
    x: float
    y: float
    r: float

    @property
    def size(self):
        return "small" if self.r < sum(SIZES.values()) / 2 else "large"


@dataclass(frozen=True)
class Scene:
    background: str
    items: tuple[Item, ...]


# ---------------------------------------------------------------------------------------------------------
# Captions


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _noun(rng, letters):
    return _pick(rng, LETTERS if rng.random() < letters else SHAPES)


def _colour(rng, noun, unseen=False):
    """A colour that makes the pair one of training's, or one of those it never sees."""
    return _pick(rng, [c for c in COLOURS if ((c, noun) in HELD_OUT) == unseen])


def sample_claim(rng, task=None, unseen=False, letters=1 / 6, mirrored=0.5):
    """Draw a Claim; `task` one of TASKS, "long" (all properties named), or None for the training mixture. Letters are 26
    of 34 nouns but the share `letters` of the objects, so that shapes stay the common case; `mirrored`, at most a half, is
    the share of relations that are "right" or "below". With `unseen` the first thing is a colour-noun pair that training
    never shows (tasks that name colours)."""
    if task is None:
        task = "long" if rng.random() < 0.25 else _pick(rng, TASKS)
    number = {"single": 1, "two": 2, "counting": 1, "colours": 1, "position": 2, "attribution": 2,
              "long": int(rng.integers(1, 5))}[task]
    named = task in ("colours", "attribution", "long") or (task == "position" and rng.random() < 0.5)
    things = []
    for i in range(number):
        noun = _pick(rng, SHAPES) if unseen else _noun(rng, letters)
        colour = _colour(rng, noun, unseen and i == 0) if named else None
        size = _pick(rng, ("small", "large")) if task == "long" and number < 4 and rng.random() < 0.5 else None
        thing = Thing(noun, colour, size, int(rng.integers(2, 5)) if task == "counting" else 1)
        if task == "counting" and rng.random() < 0.5:
            thing = replace(thing, colour=_colour(rng, noun))
        things.append(thing)
    clash = len({t.noun for t in things}) < number             # "a star and a star" would be counting
    if clash and not (named and len({(t.noun, t.colour) for t in things}) == number):
        return sample_claim(rng, task, unseen, letters, mirrored)
    relation = _pick(rng, tuple(RELATIONS)) if task == "position" or (task == "long" and number == 2) else None
    if relation in MIRRORED and mirrored < 0.5 and rng.random() >= 2 * mirrored:
        relation = MIRRORED[relation]
    colours = {t.colour for t in things}
    background = _pick(rng, [c for c in COLOURS if c not in colours]) if rng.random() < 0.6 else None
    return Claim(task, tuple(things), relation, background)


def _phrase(thing):
    words = [thing.size, thing.colour]
    if thing.noun in LETTERS:
        words += ["letters" if thing.count > 1 else "letter", thing.noun]
    else:
        plural = {"cross": "crosses"}.get(thing.noun, thing.noun + "s")
        words.append(plural if thing.count > 1 else thing.noun)
    words = [w for w in words if w]
    article = COUNTS[thing.count]
    if article == "a" and words[0][0] in "aeio":
        article = "an"
    return " ".join([article] + words)


def caption(rng, claim):
    """Word a Claim; the same claim has several wordings."""
    parts = [_phrase(t) for t in claim.things]
    if claim.relation:
        text = f"{parts[0]} {_pick(rng, RELATIONS[claim.relation])} {parts[1]}"
    elif len(parts) == 2:
        text = _pick(rng, (" and ", " next to ", " with ")).join(parts)
    else:
        text = ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1]
    text = _pick(rng, ("", "", "a picture of ", "a drawing of ")) + text
    if claim.background:
        article = "an" if claim.background == "orange" else "a"
        text += _pick(rng, (" on {0} {1} background", " on {1}", ", {1} background")).format(article, claim.background)
    return text


def held_out(text):
    """One caption in sixteen belongs to evaluation alone."""
    return zlib.crc32(text.encode()) % 16 == 0


# ---------------------------------------------------------------------------------------------------------
# Scenes


def sample_scene(rng, claim):
    """Draw a Scene that shows the Claim: what the caption leaves open is drawn at random, objects keep a gap
    of a CELL, and a relation holds with the two objects wholly apart along its axis."""
    while True:
        background = claim.background
        if background is None:
            background = _pick(rng, [c for c in COLOURS if c not in {t.colour for t in claim.things}])
        items = []
        for thing in claim.things:
            size = thing.size or _pick(rng, ("small", "large"))
            if size == "large" and thing.size is None and sum(t.count for t in claim.things) > 2:
                size = "small"
            for _ in range(thing.count):
                colour = thing.colour
                if colour is None:
                    choices = [c for c in COLOURS if c != background and (c, thing.noun) not in HELD_OUT]
                    same = [i.colour for i in items if i.noun == thing.noun]      # "three stars": mostly alike
                    colour = same[0] if same and rng.random() < 0.75 else _pick(rng, choices)
                items.append(Item(thing.noun, colour, 0, 0, SIZES[size]))
        placed = _place(rng, items, claim.relation)
        if placed:
            return Scene(background, placed)


def _place(rng, items, relation, tries=64):
    """The first of `tries` random placements on the grid that keeps all objects a CELL from each other and the edge, and the
    relation true, or None."""
    r = np.array([i.r for i in items])
    xy = CELL * rng.integers(r[:, None] / CELL + 1, (1 - r[:, None]) / CELL, (tries, len(items), 2))
    i, j = np.triu_indices(len(items), 1)
    fits = (np.abs(xy[:, i] - xy[:, j]).max(-1) >= r[i] + r[j] + CELL).all(-1)               # (tries,)
    if relation:
        fits &= _offset(relation, xy[:, 0].T, xy[:, 1].T) >= r[0] + r[1] + CELL
    if not fits.any():
        return None
    return tuple(replace(i, x=float(x), y=float(y)) for i, (x, y) in zip(items, xy[fits.argmax()]))


def _offset(relation, a, b):
    """How far a lies from b in the direction of the relation, as a share of the picture."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (b[axis] - a[axis])


def holds(scene, claim):
    """Whether a Scene shows a Claim: exactly the claimed objects, each with its named properties, the named
    background, and for a relation an offset of at least half the two objects' half-sizes."""
    wanted = [t for t in claim.things for _ in range(t.count)]
    if len(wanted) != len(scene.items) or claim.background not in (None, scene.background):
        return False
    for order in itertools.permutations(scene.items):
        if all(i.noun == t.noun and t.colour in (None, i.colour) and t.size in (None, i.size)
               for i, t in zip(order, wanted)):
            a, b = order[0], order[1] if len(order) > 1 else None
            if claim.relation is None:
                return True
            if _offset(claim.relation, (a.x, a.y), (b.x, b.y)) > 0.5 * (a.r + b.r):
                return True
    return False


# ---------------------------------------------------------------------------------------------------------
# Pictures


@lru_cache(maxsize=None)
def glyph(noun, size=256):
    """The noun's mask as an L image of its bounding box, the larger side `size` pixels."""
    big = Image.new("L", (512, 512))
    pen, c, r = ImageDraw.Draw(big), 256, 240
    at = lambda points: [(c + r * x, c + r * y) for x, y in points]
    turn = lambda n, radii: at([(radii[i % len(radii)] * np.sin(2 * np.pi * i / n),
                                 -radii[i % len(radii)] * np.cos(2 * np.pi * i / n)) for i in range(n)])
    if noun == "circle":
        pen.ellipse((c - r, c - r, c + r, c + r), fill=255)
    elif noun == "square":
        pen.rectangle((c - 0.9 * r, c - 0.9 * r, c + 0.9 * r, c + 0.9 * r), fill=255)
    elif noun == "triangle":
        pen.polygon(at([(0, -0.85), (1, 0.85), (-1, 0.85)]), fill=255)
    elif noun == "star":
        pen.polygon(turn(10, (1, 0.42)), fill=255)
    elif noun == "heart":
        t = np.linspace(0, 2 * np.pi, 200)
        pen.polygon(at(zip(np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t)
                                             - np.cos(4 * t)) / 16)), fill=255)
    elif noun == "diamond":
        pen.polygon(at([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]), fill=255)
    elif noun == "cross":
        pen.rectangle((c - r, c - r / 3, c + r, c + r / 3), fill=255)
        pen.rectangle((c - r / 3, c - r, c + r / 3, c + r), fill=255)
    elif noun == "arrow":
        pen.polygon(at([(-1, -0.35), (0.1, -0.35), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.35), (-1, 0.35)]), fill=255)
    else:
        pen.text((c, c), noun, font=ImageFont.load_default(400), fill=255, stroke_width=22, anchor="mm")
    box = big.crop(big.getbbox())
    scale = size / max(box.size)
    return box.resize([max(1, round(s * scale)) for s in box.size], Image.Resampling.BOX)


def draw(scene, size):
    """Draw a Scene as an RGB image of size x size pixels, edges antialiased."""
    picture = Image.new("RGB", (size, size), COLOURS[scene.background])
    for item in scene.items:
        mask = glyph(item.noun, 256)
        scale = 2 * item.r * size / 256
        mask = mask.resize([max(1, round(s * scale)) for s in mask.size], Image.Resampling.BOX)
        corner = (round(item.x * size - mask.width / 2), round(item.y * size - mask.height / 2))
        picture.paste(COLOURS[item.colour], corner, mask)
    return picture


def sample_example(rng, task=None, **shares):
    """A caption, a scene that shows it and the claim; nothing that is held out. `shares` as for sample_claim."""
    while True:
        claim = sample_claim(rng, task, **shares)
        text = caption(rng, claim)
        if not held_out(text):
            return text, sample_scene(rng, claim), claim


def whereabouts(scene):
    """What a caption lets one guess of its scene -> (182,) float32 of 0 and 1: for the left, right, upper and lower half
    which colours and nouns have an object's centre there; the ground's colour; how many objects there are, up to 6."""
    halves = np.zeros((4, len(COLOURS) + len(NOUNS)), np.float32)
    names = [*COLOURS, *NOUNS]
    for item in scene.items:
        for half in (int(item.x >= 0.5), 2 + int(item.y >= 0.5)):
            halves[half, [names.index(item.colour), names.index(item.noun)]] = 1
    return np.concatenate([halves.ravel(), np.array(list(COLOURS)) == scene.background, np.arange(1, 7) == len(scene.items)]).astype(np.float32)


def example(rng, size, task=None):
    """One clean, whole picture -> (picture, caption, claim)."""
    text, scene, claim = sample_example(rng, task)
    return draw(scene, size), text, claim


def concept(rng, size):
    """One object anywhere: what things are, before where and how many they are -> (caption, Scene, Claim). In a picture
    of under 64 pixels, where it could hardly be told, it is drawn at twice the scale: as a cut from a larger one."""
    noun = _noun(rng, 0.3)
    colour = _colour(rng, noun)
    background = _pick(rng, [c for c in COLOURS if c != colour])
    claim = Claim("single", (Thing(noun, colour if rng.random() < 0.75 else None),), None,
                  background if rng.random() < 0.6 else None)
    cell = 2 * CELL if size < 64 else CELL
    r = cell * _pick(rng, (2, 3))
    x, y = cell * rng.integers(round(r / cell), round((1 - r) / cell) + 1, 2)
    return caption(rng, claim), Scene(background, (Item(noun, colour, float(x), float(y), r),)), claim


def spoil(rng, picture, degree):
    """Blur, noise and a colour cast, in proportion to `degree` in [0, 1]."""
    blurred = picture.filter(ImageFilter.GaussianBlur(degree * picture.width / 32))
    cast, noise = rng.normal(0, 25 * degree, 3), rng.normal(0, 25 * degree, (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(blurred) + cast + noise).clip(0, 255).astype(np.uint8))


def training_example(rng, size, concepts=0.0, odd=0.25, **shares):
    """One example with its micro conditions -> (uint8 (size, size, 3), caption, (5,) float32: original width and
    height, crop top and left, score). As in photographs, the share `odd` are crops of a larger picture, and as many are
    spoilt, which their score tells: CLEAN less 4 at the worst. `concepts` is the share of single concepts; `shares` of
    sample_claim are those of the other pictures."""
    make = (lambda: concept(rng, size)) if rng.random() < concepts else (lambda: sample_example(rng, **shares))
    while held_out((made := make())[0]):
        pass
    text, scene, _ = made
    side, left, top, score = size, 0, 0, CLEAN
    if rng.random() < odd:
        side = int(rng.integers(size, size * 5 // 4 + 1))
        left, top = (int(i) for i in rng.integers(0, side - size + 1, 2))
    picture = draw(scene, side).crop((left, top, left + size, top + size))
    if rng.random() < odd:
        degree = float(rng.random())
        picture, score = spoil(rng, picture, degree), CLEAN - 4 * degree
    return np.asarray(picture), text, np.array([side, side, top, left, score], np.float32)


def test_claims(task, number, seed=0):
    """`number` (caption, claim) pairs of a task that training never sees; task "unseen": new colour-noun pairs. A task
    that has fewer captions ("single": 147) starts over."""
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    pairs, vain = {}, 0
    while len(pairs) < number and vain < 10_000:
        claim = sample_claim(rng, "colours", unseen=True) if task == "unseen" else sample_claim(rng, task)
        text, vain = caption(rng, claim), vain + 1
        if (task == "unseen" or held_out(text)) and text not in pairs:
            pairs[text], vain = claim, 0
    return list(itertools.islice(itertools.cycle(pairs.items()), number))


@dataclass(frozen=True)
class Edit:
    """A picture of the world and a change of its caption; `keep` (H, W) bool are pixels that the change does not touch."""
    kind: str
    picture: Image.Image
    old: str
    new: str
    claim: Claim                                               # what the new caption says
    keep: np.ndarray


EDITS = ("recolour", "turn", "background", "remove", "add")


def sample_edit(rng, kind, size):
    """Draw an Edit of two objects on a ground (of one, to add another), everything named: "recolour the circle",
    "turn the star into a heart", "another background", "remove the square", "add a triangle"."""
    colours, nouns = [[options[i] for i in rng.permutation(8)] for options in (list(COLOURS), SHAPES)]
    before = Claim("attribution", tuple(Thing(n, c) for n, c in zip(nouns[:2], colours)), None, colours[2])
    one, two = before.things
    after = {"recolour": replace(before, things=(replace(one, colour=colours[3]), two)),
             "turn": replace(before, things=(replace(one, noun=nouns[2]), two)),
             "background": replace(before, background=colours[3]), "remove": replace(before, things=(two,)), "add": before}[kind]
    if kind == "add":
        before = replace(before, things=(two,))
    if any((t.colour, t.noun) in HELD_OUT for t in before.things + after.things):
        return sample_edit(rng, kind, size)
    scene, words = sample_scene(rng, before), int(rng.integers(1 << 30))          # both captions in the same words
    old, new = (caption(np.random.default_rng(words), claim) for claim in (before, after))
    touched = {"background": (), "add": ()}.get(kind, scene.items[:1])            # else all but a box round the object
    ys, xs = (np.arange(size) + 0.5)[:, None] / size, (np.arange(size) + 0.5) / size
    boxes = [np.maximum(abs(ys - i.y), abs(xs - i.x)) < i.r + 2 / size for i in touched or scene.items]
    keep = np.logical_or.reduce(boxes)                                            # (H, W)
    picture = draw(scene, size)
    if kind == "background":
        keep &= named(picture) != list(COLOURS).index(scene.background)
    return Edit(kind, picture, old, new, after, ~keep if touched else keep)


# ---------------------------------------------------------------------------------------------------------
# The scorer


def _fitted(mask, side, frame):
    """An L image, its larger side made `side` pixels, in the middle of a black square of `frame` pixels."""
    scale = side / max(mask.size)
    mask = mask.resize([max(1, round(s * scale)) for s in mask.size], Image.Resampling.BOX)
    square = Image.new("L", (frame, frame))
    square.paste(mask, ((frame - mask.width) // 2, (frame - mask.height) // 2))
    return square


def _unit(window):
    """-> zero-mean unit-norm vector: the product of two of them is their correlation."""
    v = np.asarray(window, np.float32).ravel()
    v = v - v.mean()
    return v / (np.linalg.norm(v) + 1e-6)


@lru_cache(maxsize=None)
def _templates(side):
    """(3 nouns, (side + 8)^2): all nouns with a larger side of side - 1, side and side + 1 pixels, blurred as by a decoder."""
    return np.stack([_unit(_fitted(glyph(noun), max(1, s), side + 8).filter(ImageFilter.GaussianBlur(0.8)))
                     for s in (side - 1, side, side + 1) for noun in NOUNS])


def _likest(mask):
    """An L image of an object in its bounding box -> the noun whose mask correlates most with it, at the object's own
    size or a pixel more or less, and up to a pixel aside: a decoder may cut the tail of a Q, and its box with it."""
    side = min(max(mask.size), 28)
    square = np.asarray(_fitted(mask, side, side + 10))
    windows = np.stack([_unit(square[y:y + side + 8, x:x + side + 8]) for y in range(3) for x in range(3)], 1)
    return NOUNS[int((_templates(side) @ windows).max(1).argmax()) % len(NOUNS)]


def components(mask):
    """Label the 4-connected parts of a bool (H, W) array -> int (H, W), 0 outside, equal within a part.
    Each pixel takes the largest label among its neighbours until nothing changes."""
    label = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:
        p = np.pad(label, 1)
        grown = np.maximum.reduce([label, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]) * mask
        if (grown == label).all():
            return label
        label = grown


def named(picture):
    """RGB picture -> (H, W) int: the nearest of COLOURS for each pixel."""
    rgb, palette = np.asarray(picture, np.float32), np.array(list(COLOURS.values()), np.float32)
    return ((rgb[:, :, None] - palette) ** 2).sum(-1).argmin(-1)


def read(picture):
    """Read an RGB picture's pixels -> Scene. Background: the commonest colour of the border. Objects:
    connected parts that differ from it, each with the commonest colour of its inside and the noun whose mask
    it resembles most; parts under 0.4% of the picture are specks and are left out."""
    rgb = np.asarray(picture.convert("RGB"), np.float32)                                     # (H, W, 3)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), np.float32)
    nearest = named(rgb)                                                                     # (H, W)
    border = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    ground = int(np.bincount(border, minlength=len(names)).argmax())
    distance = np.sqrt(((rgb - palette[ground]) ** 2).sum(-1))
    label = components(distance > 60)
    items = []
    height, width = nearest.shape
    for k in np.unique(label)[1:]:
        part = label == k
        if part.sum() < 0.004 * part.size:
            continue
        votes = np.bincount(nearest[part], minlength=len(names))
        votes[ground] = 0                                     # blended edge pixels may look like the ground
        colour = int(votes.argmax())
        full = np.sqrt(((palette[colour] - palette[ground]) ** 2).sum())
        cover = np.clip(distance / max(full, 1), 0, 1) * part      # share of each pixel that the object covers
        inside = cover > 0.4                                  # the box leaves out the faint halo of decoded pictures
        if not inside.any():
            continue
        ys, xs = np.where(inside.any(1))[0], np.where(inside.any(0))[0]
        y0, y1, x0, x1 = ys[0], ys[-1] + 1, xs[0], xs[-1] + 1
        mask = Image.fromarray((cover[y0:y1, x0:x1] * 255).astype(np.uint8))
        items.append(Item(_likest(mask), names[colour], (x0 + x1) / 2 / width, (y0 + y1) / 2 / height,
                          max((x1 - x0) / width, (y1 - y0) / height) / 2))
    return Scene(names[ground], tuple(items))


def shows(picture, claim):
    """Whether the picture, read from its pixels, shows what the claim says. More than 6 objects: never."""
    scene = read(picture)
    return len(scene.items) <= 6 and holds(scene, claim)


if __name__ == "__main__":
    rng, cell = np.random.default_rng(0), 160
    sheet = Image.new("RGB", (8 * cell, 6 * (cell + 40)), "white")
    for n in range(48):
        picture, text, _ = example(rng, 128)
        x, y = n % 8 * cell + 16, n // 8 * (cell + 40) + 8
        sheet.paste(picture, (x, y))
        for line in range(0, len(text), 26):
            ImageDraw.Draw(sheet).text((x, y + 132 + line // 26 * 12), text[line:line + 26], fill="black")
    sheet.save("sheet.png")
    print("sheet.png")
