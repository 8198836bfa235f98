"""Editing without training: a picture's own tokens, some of them masked, are what sampling starts from (paper section 3.3).

    edit, size = Edit(picture, mask=mask), pipeline.fit(*picture.size)       # or strength=0.5, or source="what it shows now"
    tokens = edit.start(pipeline, ["a red star"], [0], size)
    painted, = pipeline(["a red star"], [0], size=size, tokens=tokens, steps=edit.steps(pipeline.steps))
    result = edit.finish(painted)

Letters: B pictures, H W pixels, h w tokens.
"""
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

import data
import disk
import kernels
import meissonic


@dataclass
class Edit:
    """What of a picture is drawn anew: the tokens that `mask` touches, or, without one, the share `strength` of all,
    those of which the caption changes the model's opinion most, or, without a `source`, any. Without a strength the
    opinions themselves say where those that change end (`split`).

    picture   RGB or RGBA Image, upright and as large as the result; its transparent parts are white to the model
    mask      (H, W) bool; outside it the result is the picture, byte for byte
    feather   pixels, inwards from the mask's edge, over which old turns to new
    source    the caption that the picture has, the empty one if that is not known
    """
    picture: Image.Image
    mask: np.ndarray | None = None
    feather: int = 0
    strength: float | None = None
    source: str | None = None
    encoded: dict = field(default_factory=dict, repr=False, compare=False)       # {size: tokens (1, h, w)} of the picture

    def __post_init__(self):
        self.share = self.strength                            # of the last batch that was started

    def steps(self, steps):
        """Of the `steps` of a whole picture the last ones, as many as the strength asks for; all until it is known."""
        return steps if self.share is None else max(1, round(self.share * steps))

    def start(self, pipeline, prompts, seeds, size, score=None):
        """-> (B, h, w) tokens of the picture at `size`, one for each prompt and seed, masked where to draw."""
        if size not in self.encoded:
            picture = disk.flatten(self.picture).resize(size, Image.Resampling.LANCZOS)
            self.encoded[size] = pipeline.encode_picture(picture)
        tokens = self.encoded[size].repeat(len(prompts), 1, 1)                                            # (B, h, w)
        if self.mask is not None:
            redraw = torch.from_numpy(shrink(self.mask, *tokens.shape[1:])).to(tokens.device)             # (h, w)
            return tokens.masked_fill(redraw, pipeline.mask_token)
        rank = self.rank(pipeline, tokens, prompts, seeds, score).flatten(1)                              # (B, h w)
        self.share = split(rank) if self.strength is None else self.strength
        order = rank.argsort(descending=True, stable=True)[:, :round(self.share * rank.shape[1])]
        return tokens.flatten(1).scatter(1, order, pipeline.mask_token).view(tokens.shape)

    def rank(self, pipeline, tokens, prompts, seeds, score):
        """(B, h, w): tokens of the greatest are drawn anew first. Chance is the seed's, so that what a strength
        masks, a greater one masks too."""
        if self.source is None:
            positions = torch.arange(tokens[0].numel(), device=tokens.device).expand(len(tokens), -1)
            seeds = torch.as_tensor(seeds, dtype=torch.int64, device=tokens.device)
            return kernels.confidence_noise(seeds, 2 ** 31, positions)                   # a step that no run has
        width, height = (side * pipeline.tokens_f for side in (tokens.shape[2], tokens.shape[1]))
        score = pipeline.score_condition if score is None else score
        old, new = (pipeline.encode_text(texts, width, height, score) for texts in ([self.source] * len(prompts), prompts))
        return meissonic.opinion_change(pipeline.transformer, tokens, old, new, pipeline.convention)

    def finish(self, painted):
        """The model's picture at the original's size, with the original outside the mask."""
        painted = painted.resize(self.picture.size, Image.Resampling.LANCZOS)
        if self.mask is None:
            return painted
        return Image.composite(painted.convert(self.picture.mode), self.picture, feathered(self.mask, self.feather))


def split(x):
    """(B, n) -> the share of high values among them: Otsu's split (1979), whose two sides' means lie furthest apart for
    their sizes; the largest of the batch, whose pictures must have equally many tokens to draw."""
    high, k, n = x.sort(descending=True).values.cumsum(1)[:, :-1].double(), torch.arange(1, x.shape[1], device=x.device), x.shape[1]
    gap = high / k - (x.double().sum(1, keepdim=True) - high) / (n - k)
    return ((k * (n - k) * gap ** 2).argmax(1).max().item() + 1) / n


def shrink(mask, h, w):
    """(H, W) bool -> (h, w) bool: whether the mask touches each cell, whatever the sizes."""
    cover = lambda m, n: np.stack([m[i * len(m) // n:-(-(i + 1) * len(m) // n)].any(0) for i in range(n)])
    return cover(cover(mask, h).T, w).T


def feathered(mask, pixels):
    """(H, W) bool -> L Image: 0 outside, rising to 255 over `pixels` inwards: the mean of the mask eroded 0, 1, ... times."""
    image, total = Image.fromarray(mask.astype(np.uint8) * 255), np.zeros(mask.shape)
    for _ in range(pixels + 1):
        total += np.asarray(image)
        image = image.filter(ImageFilter.MinFilter(3))
    return Image.fromarray(np.round(total / (pixels + 1)).astype(np.uint8))


def score_edits(pipeline, number=20, strength=None, progress=tqdm, **settings):
    """For each kind of edit of the world of shapes, on `number` true pictures, mask-free and plain image to image at
    the same strength -> {kind: ((shows, kept), (shows, kept))}: the share of pictures that show what the new caption
    says, and the share of pixels that the edit does not concern whose colour is still the same."""
    table, side = {}, min(settings.pop("size", None) or pipeline.size)
    steps, size = settings.pop("steps", None) or pipeline.steps, (side, side)
    for kind in progress(data.EDITS):
        rng, results = np.random.default_rng([0, data.EDITS.index(kind)]), []
        for seed in range(number):
            task, share = data.sample_edit(rng, kind, side), strength
            for source in (task.old, None):
                edit = Edit(task.picture, strength=share, source=source)
                tokens = edit.start(pipeline, [task.new], [seed], size, settings.get("score"))
                share = edit.share                             # as many at random
                picture, = pipeline([task.new], [seed], size=size, tokens=tokens, steps=edit.steps(steps), **settings)
                results.append((data.shows(picture, task.claim), (data.named(picture) == data.named(task.picture))[task.keep].mean()))
        table[kind] = tuple(tuple(np.mean(results[way::2], 0).tolist()) for way in (0, 1))
    return table
