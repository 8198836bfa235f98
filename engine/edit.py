"""Editing without training: sampling starts from the tokens of a picture, some of them masked.
Paper section 3.3.

    pipe = Pipeline("weights/shapes")
    picture = Image.open("gallery/scene.png").convert("RGB")
    edit = Edit(picture, source="a red circle")               # or mask=mask, or strength=0.5
    ids = edit.start(pipe, ["a red star"], [0], pipe.size)
    schedule = edit.schedule(pipe.schedule)
    painted, = pipe(["a red star"], [0], ids=ids, schedule=schedule)
    result = edit.finish(painted)

Letters: B pictures, H W pixels, h w tokens, N tokens of a picture.
"""
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageFilter

import kernels
from engine.checkpoint import UserError
from engine.cli import note
from engine.images import PictureError, flatten_alpha, read_image
from engine.rerank import token_saliency

CHANCE_STEP = 2 ** 31                     # noise counter of the random choice, above all steps


@dataclass
class Edit:
    """Which tokens of a picture are drawn anew: with a `mask` those that it touches, else the share
    `strength` of all. With a `source` these are the tokens whose likelihood falls most from the
    source caption to the prompt (mask-free editing), else random ones. A source without a strength:
    Otsu's threshold decides how many.

    picture   RGB or RGBA Image, upright, of the result's size; the model sees transparent as white
    mask      (H, W) bool; outside it the result equals the picture, byte for byte
    feather   pixels, inwards from the mask's edge, over which old turns to new
    strength  0 to 1; so much of the schedule's steps is run, too
    source    the caption of the picture as it is, "" if unknown
    """
    picture: Image.Image
    mask: np.ndarray | None = None
    feather: int = 0
    strength: float | None = None
    source: str | None = None
    encoded: dict = field(default_factory=dict, repr=False, compare=False)    # {size: (1, h, w)}

    def __post_init__(self):
        self.used_strength = self.strength                    # of the last start()

    def start(self, pipe, prompts, seeds, size, score=None):
        """-> ids (B, h, w) of the picture at `size`, one for each prompt and seed, masked where
        to draw."""
        ids = self.encode_picture(pipe, size).repeat(len(prompts), 1, 1)              # (B, h, w)
        if self.mask is not None:
            redraw = torch.from_numpy(mask_to_grid(self.mask, *ids.shape[1:]))        # (h, w)
            return ids.masked_fill(redraw.to(ids.device), pipe.mask_token)
        if self.source is None:
            rank = random_rank(ids, seeds)                                            # (B, N)
        else:
            rank = self.saliency(pipe, ids, prompts, size, score).flatten(1)          # (B, N)
        if self.strength is None:
            self.used_strength = otsu_split(rank)
        number = round(self.used_strength * rank.shape[1])
        redraw = rank.argsort(descending=True, stable=True)[:, :number]               # (B, M)
        return ids.flatten(1).scatter(1, redraw, pipe.mask_token).view(ids.shape)

    def encode_picture(self, pipe, size):
        """-> ids (1, h, w) of the picture, resized to (width, height)."""
        if size not in self.encoded:
            picture = flatten_alpha(self.picture).resize(size, Image.Resampling.LANCZOS)
            self.encoded[size] = pipe.encode_image(picture)
        return self.encoded[size]

    def saliency(self, pipe, ids, prompts, size, score):
        """How much less likely each token becomes from source to prompt -> (B, h, w)."""
        score = pipe.score if score is None else score
        old = pipe.encode([self.source] * len(prompts), size, score)
        new = pipe.encode(prompts, size, score)
        return token_saliency(pipe.transformer, ids, old, new, pipe.schedule.rate_condition)

    def schedule(self, schedule):
        """After start(): the schedule with as many steps as the strength asks for."""
        if self.used_strength is None:
            return schedule
        return replace(schedule, steps=max(1, round(self.used_strength * schedule.steps)))

    def finish(self, painted):
        """The model's picture -> Image of the original's size, equal to it outside the mask. What
        is repainted in a mask is opaque; without one the picture's own transparency stays."""
        painted = painted.resize(self.picture.size, Image.Resampling.LANCZOS)
        painted = painted.convert(self.picture.mode)
        if self.mask is None:
            if painted.mode == "RGBA":
                painted.putalpha(self.picture.getchannel("A"))
            return painted
        return Image.composite(painted, self.picture, feathered(self.mask, self.feather))


def random_rank(ids, seeds):
    """Noise that depends on the seed alone -> (B, N): tokens that a strength redraws, a greater one
    redraws too."""
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=ids.device)
    return kernels.gumbel_noise(seeds, [CHANCE_STEP], ids[0].numel())[0]


def otsu_split(x):
    """(B, N) -> the share of high values in a row, by Otsu's method (1979): the split whose two
    sides have the greatest variance between them. The largest share of the batch, whose pictures
    must have equally many masked tokens."""
    n = x.shape[1]
    k = torch.arange(1, n, device=x.device)                                           # (N-1,)
    descending = x.sort(descending=True).values
    high = descending.cumsum(1)[:, :-1].double()                        # (B, N-1) sum of k highest
    low = x.double().sum(1, keepdim=True) - high                                      # (B, N-1)
    between = k * (n - k) * (high / k - low / (n - k)) ** 2                           # (B, N-1)
    return (between.argmax(1).max().item() + 1) / n


def mask_to_grid(mask, h, w):
    """(H, W) bool -> (h, w) bool: whether any masked pixel overlaps the cell, for any two sizes."""
    return any_in_cells(any_in_cells(mask, h).T, w).T


def any_in_cells(mask, n):
    """(H, W) bool -> (n, W) bool: whether any of the rows that overlap the cell is set."""
    height = len(mask)
    cells = []
    for i in range(n):
        first = i * height // n
        end = -(-(i + 1) * height // n)                       # rounded up
        cells.append(mask[first:end].any(0))
    return np.stack(cells)


def feathered(mask, pixels):
    """(H, W) bool -> L Image: 0 outside the mask, rising to 255 over `pixels` inwards. The mean of
    the mask eroded 0, 1, ... `pixels` times."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    total = np.zeros(mask.shape)
    for _ in range(pixels + 1):
        total += np.asarray(image)
        image = image.filter(ImageFilter.MinFilter(3))
    return Image.fromarray(np.round(total / (pixels + 1)).astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# From the command line


def read_edit(args):
    """The Edit that the arguments ask for, None without --image -> (Edit or None, {"image-crc":
    checksum, "mask-crc": checksum} of the files that were read). Raises UserError."""
    check_flags(args)
    if not args.image:
        return None, {}
    picture, checksums = read_picture(args, "image")
    mask = None
    if args.mask:
        image, mask_checksum = read_picture(args, "mask")
        checksums |= mask_checksum
        mask = read_mask(image, picture, args.mask, args.invert_mask)
    if args.outpaint:
        picture, mask = extend_canvas(picture, mask, *args.outpaint)
    if mask is None and args.strength is None and args.source is None:
        args.source = ""                                      # stored in the PNG, too
    return Edit(picture, mask, args.feather, args.strength, args.source), checksums


def check_flags(args):
    """Raises UserError for flags of an edit that do not go together."""
    names = ("mask", "outpaint", "strength", "source")
    given = [name for name in names if getattr(args, name) is not None]
    region = [name for name in given if name in ("mask", "outpaint")]
    if not args.image and (given or args.feather):
        flag = given[0] if given else "feather"
        raise UserError(f"--{flag} needs a picture: --image")
    if region and len(region) < len(given):
        raise UserError(f"--{given[-1]} is for the whole picture, --{given[0]} for a part of it")
    if args.invert_mask and not args.mask:
        raise UserError("--invert-mask needs --mask")
    if args.feather and not region:
        raise UserError("--feather needs --mask or --outpaint")
    if args.image and not given and args.prompt is None and args.prompt_file is None:
        raise UserError("--image needs one of --prompt, --mask, --outpaint, --strength")
    if args.image and args.size:
        check_pixels(f"--size {args.size[0]}x{args.size[1]}", *args.size)


def check_pixels(name, width, height):
    """Raises UserError for more pixels than Pillow takes."""
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{name}: {width}x{height} pixels are too many")


def read_picture(args, name):
    """The picture of --image or --mask -> (RGB or RGBA Image, {name-crc: checksum})."""
    try:
        picture, raw = read_image(getattr(args, name))
    except PictureError as e:
        raise UserError(f"--{name} {e}") from None
    return picture, {f"{name}-crc": f"{zlib.crc32(raw):08x}"}


def read_mask(image, picture, path, invert=False):
    """The Image of --mask -> (H, W) bool of the picture's size: True is to be redrawn. `invert`
    turns the mask round. Raises UserError if nothing is to be redrawn."""
    white = white_pixels(image, path)
    if invert:
        white = ~white
    mask = mask_to_grid(white, picture.height, picture.width)                         # (H, W)
    if not mask.any():
        reason = "no white in it, so there is nothing to repaint"
        if invert:
            reason = "all of it is white, so with --invert-mask there is nothing to repaint"
        raise UserError(f"--mask {path}: {reason}")
    return mask


def white_pixels(image, path):
    """The Image of --mask -> (H, W) bool. White is to be redrawn, black and transparent are not. If
    the colour tells nothing, because all that is opaque is white or all is black, then the opaque
    part is to be redrawn. A line on stderr says so. Raises UserError for a photograph with a hole:
    neither reading of it is safe."""
    grey = np.asarray(image.convert("RGB").convert("L"))                              # (H, W)
    opaque = np.ones(grey.shape, bool)
    if image.mode == "RGBA":
        opaque = np.asarray(image.getchannel("A")) > 127
    if grey.max() == 1:                           # written as the numbers 0 and 1
        note(f"note: --mask {path}: its values 0 and 1 are read as black and white")
        grey = grey * 255
    white = grey > 127
    if opaque.all() or not opaque.any():
        return white & opaque
    shades = grey[opaque]
    if white[opaque].all() or not white[opaque].any():
        note(f"note: --mask {path} has one colour and a transparent part: the opaque part is "
             "repainted; --invert-mask repaints the transparent part")
        return opaque
    if np.mean((shades > 31) & (shades < 224)) > 0.5:
        raise UserError(f"--mask {path}: a picture with a transparent part, not a mask; paint what "
                        "is to be redrawn white and the rest black")
    return white & opaque


def extend_canvas(picture, mask, left, top, right, bottom):
    """Add pixels on each side of a picture, repeating its edge; they are masked -> (picture, mask).
    Raises UserError."""
    width = picture.width + left + right
    height = picture.height + top + bottom
    check_pixels("--outpaint", width, height)
    if mask is None:
        mask = np.zeros((picture.height, picture.width), bool)
    rows, columns = (top, bottom), (left, right)
    mask = np.pad(mask, (rows, columns), constant_values=True)
    pixels = np.pad(np.asarray(picture), (rows, columns, (0, 0)), "edge")
    return Image.fromarray(pixels), mask
