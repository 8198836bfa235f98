"""Text to image, editing, and seeing how a picture comes to be.

    python sample.py --prompt "a red circle above a blue square on a white background"
    python sample.py --model meissonic --prompt "a lighthouse in a storm, oil painting"    # 1024 x 1024, fetched once
    python sample.py --prompt "a star" "a heart" --n 4 --seed 7 --steps 32 --cfg 5 --out pictures
    python sample.py --score                                   # how often pictures show what their captions say
    python sample.py --image P --mask M --prompt "a star"      # repaint what is white in M; --outpaint: a larger canvas
    python sample.py --image P --prompt "a blue star" --source "a red star"     # redraw what the captions differ in
    python sample.py --film 8 --sweep steps=8,16 cfg=1,3       # how the picture came to be, and what settings do
    python sample.py --like out/a-star-0.png --cfg 5           # the same again, with one setting changed

From text to pixels goes pipeline.py's `Pipeline`; editing.py's `Edit` starts it from a picture with some tokens masked.
Letters: B pictures, H W pixels, h w tokens.
"""
import argparse
import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

import disk
import meissonic
import vq
from editing import Edit, score_edits, shrink
from pipeline import (BUNDLED, MOST_TOKENS, ROUNDED, Invented, Pipeline, UserError, check_compile, choose_device, choose_dtype,
                      find_model, fingerprint, kernel_path, score_tasks, told_of)

DEFAULT_PROMPT = "a red circle above a blue square on a white background"
TURN = 32                                         # pictures that are painted before they are decoded and written


# ---------------------------------------------------------------------------------------------------------
# What to edit


def read_picture(flag, path):
    """-> (RGB or RGBA Image, its bytes' CRC). Raises UserError."""
    try:
        picture, raw = disk.read_picture(path)
    except disk.PictureError as e:
        raise UserError(f"{flag} {e}") from None
    return picture, f"{zlib.crc32(raw):08x}"


def read_edit(args):
    """The Edit that the arguments ask for -> (Edit or None, {what of it goes into the PNG}). Raises UserError."""
    asked = [flag for flag in ("mask", "outpaint", "strength", "source") if getattr(args, flag) is not None]
    if not args.image:
        if asked or args.feather:
            raise UserError(f"--{(asked or ['feather'])[0]} wants a picture: --image")
        return None, {}
    if {"mask", "outpaint"} & {*asked} and {"strength", "source"} & {*asked}:
        raise UserError(f"--{asked[-1]} is for the whole picture, --{asked[0]} for a part")
    if args.size and args.size[0] * args.size[1] > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"--size {args.size[0]}x{args.size[1]}: too many pixels")
    if args.feather and not {"mask", "outpaint"} & {*asked}:
        raise UserError("--feather wants --mask or --outpaint")
    if not asked and args.prompt is None and args.prompt_file is None:
        raise UserError("--image wants one of --prompt, --mask, --outpaint, --strength")
    picture, crc = read_picture("--image", args.image)
    mask, text = None, {"image-crc": crc}
    if args.mask:
        image, text["mask-crc"] = read_picture("--mask", args.mask)
        mask = shrink(np.asarray(disk.flatten(image, "black").convert("L")) > 127, picture.height, picture.width)
        if not mask.any():
            raise UserError(f"--mask {args.mask}: no white in it, so there is nothing to repaint")
    if args.outpaint:
        left, top, right, bottom = args.outpaint
        if (picture.width + left + right) * (picture.height + top + bottom) > Image.MAX_IMAGE_PIXELS:
            raise UserError(f"--outpaint: {picture.width + left + right}x{picture.height + top + bottom} pixels are too many")
        mask = np.zeros((picture.height, picture.width), bool) if mask is None else mask
        mask = np.pad(mask, ((top, bottom), (left, right)), constant_values=True)
        picture = Image.fromarray(np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), "edge"))
    if mask is None:                                          # so that the PNG says it too
        args.source = "" if not asked else args.source
    return Edit(picture, mask, args.feather or 0, args.strength, args.source), text


# ---------------------------------------------------------------------------------------------------------
# Seeing


def film(pipeline, seen, number, grid=False):
    """`number` frames of a run, evenly over its steps, of all that `watch` saw of one picture, [(believed (h, w),
    masked (h, w))] -> RGB Images: above what the model believes in, below that with the masked tokens grey, and a bar
    that tells the time. A token has at least 8 pixels; `grid` draws lines between them."""
    f, frames = pipeline.tokens_f, []
    cell = f * -(-8 // f)
    for k in range(number):
        tokens, masked = seen[round(k * (len(seen) - 1) / (number - 1))]
        h, w = masked.shape
        believed = pipeline.decode(tokens[None])[0].resize((w * cell, h * cell), Image.Resampling.NEAREST)
        veil = Image.fromarray(masked.cpu().numpy().astype(np.uint8) * 255).resize(believed.size, Image.Resampling.NEAREST)
        known = Image.composite(Image.new("RGB", believed.size, "grey"), believed, veil)
        pen = ImageDraw.Draw(known)
        for i in range(1, max(h, w)) if grid else ():
            pen.line((i * cell, 0, i * cell, known.height), "black")
            pen.line((0, i * cell, known.width, i * cell), "black")
        frame = Image.new("RGB", (w * cell, 2 * h * cell + 8), "white")
        frame.paste(believed, (0, 0))
        frame.paste(known, (0, h * cell + 2))
        frame.paste("black", (0, 2 * h * cell + 4, round(frame.width * (k + 1) / number), 2 * h * cell + 8))
        frames.append(frame)
    return frames


def write_film(path, frames, text):
    """Beside the picture at `path` a strip, NAME-film.png, and an animation, NAME-film.gif."""
    write_picture(path.with_name(f"{path.stem}-film.png"), side_by_side(frames), text)
    gif = path.with_name(f"{path.stem}-film.gif")
    vq.write_whole(gif, lambda beside: frames[0].save(beside, "GIF", save_all=True, append_images=frames[1:],
                                                      duration=[300] * (len(frames) - 1) + [2000], loop=0))
    print(f"wrote {gif}")


def side_by_side(pictures):
    """One row of RGB pictures of equal height, white between them."""
    gap = np.full((pictures[0].height, 4, 3), 255, np.uint8)
    return Image.fromarray(np.hstack([part for p in pictures for part in (gap, np.asarray(p))][1:]))


def labelled(cells, columns, lines, gap=4):
    """Pictures of one size, row by row, as a grid with a label above each column and before each line."""
    font, (width, height) = ImageFont.load_default(12), cells[0].size
    long = lambda labels: round(max(font.getlength(label) for label in labels))
    left, top, dx, dy = long(lines) + 2 * gap, 20, max(width, long(columns)) + gap, max(height, 16) + gap
    sheet = Image.new("RGB", (left + dx * len(columns), top + dy * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, label in enumerate(columns):
        pen.text((left + i * dx, 3), label, "black", font)
    for j, label in enumerate(lines):
        pen.text((gap, top + j * dy + height // 2), label, "black", font, anchor="lm")
    for k, picture in enumerate(cells):
        sheet.paste(disk.flatten(picture), (left + k % len(columns) * dx, top + k // len(columns) * dy))
    return sheet


def sweep(pipeline, args, edit, prompt, seed, progress=iter):
    """A labelled sheet: the first axis of --sweep to the right, the second downwards; each cell is a run of its own."""
    (across, columns), (down, lines) = (args.sweep + [("", [""])])[:2]
    cells = []
    for x, y in progress([(x, y) for y in lines for x in columns]):
        cell = argparse.Namespace(**vars(args) | {"seed": seed})
        for name, text in ((across, x), (down, y)):
            if name:
                value = AXES[name](text)
                setattr(cell, name.replace("-", "_"), (value, args.temperature[1]) if name == "temperature" else value)
        cells.append(paint(pipeline, cell, edit and replace(edit, strength=cell.strength), [prompt], [cell.seed]))
    return labelled(finish(pipeline, edit, torch.cat(cells)), [f"{across} {x}" for x in columns], [f"{down} {y}".strip() for y in lines])


def reconstruct(pipeline, path):
    """A picture, and the same through the VQ model and back, side by side -> (sheet, PSNR in dB)."""
    picture = disk.flatten(read_picture("--reconstruct", path)[0])
    back = Edit(picture, strength=0).finish(pipeline.decode(pipeline.encode_picture(
        picture.resize(pipeline.fit(*picture.size), Image.Resampling.LANCZOS)))[0])
    error = np.mean((np.asarray(picture, float) - np.asarray(back, float)) ** 2)
    return side_by_side([picture, back]), float(10 * np.log10(255 ** 2 / max(error, 1e-10)))


# ---------------------------------------------------------------------------------------------------------
# What a PNG tells of its making, and making it again

SETTINGS = ("prompt", "negative", "seed", "steps", "cfg", "size", "temperature", "redraws", "candidates", "schedule",
            "score-condition", "model", "lora", "device", "dtype", "compile", "batch", "image", "mask", "outpaint", "feather", "strength",
            "source", "film", "film-tokens", "sweep", "reconstruct")
SOFTWARE = f"torch {torch.__version__}, numpy {np.__version__}, pillow {Image.__version__}"


def settings_of(args, **more):
    """{flag: text} of all that is set, as one would write it on the command line; `more` goes over the arguments."""
    values = {key: getattr(args, key.replace("-", "_")) for key in SETTINGS} | more
    if args.sweep:
        values["sweep"] = [f"{name}={','.join(texts)}" for name, texts in args.sweep]
    words = {"size": "x", "outpaint": ","}
    return {key: words.get(key, " ").join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
            for key, value in values.items() if value is not None and value is not False}


def write_picture(path, picture, text):
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value.encode(errors="replace").decode())                 # a path may be no Unicode
    path.parent.mkdir(parents=True, exist_ok=True)
    vq.write_whole(path, lambda beside: picture.save(beside, "PNG", pnginfo=info))
    print(f"wrote {path}")


def like(argv):
    """Arguments with --like -> the settings of that PNG, and over them the other arguments."""
    args = parse_arguments(argv)
    if not args.like:
        return args
    try:
        with Image.open(args.like, formats=["PNG"]) as picture:
            made = dict(picture.text)
    except Exception as e:                                    # Pillow's are many
        raise UserError(f"--like {args.like}: cannot be read as a PNG ({getattr(e, 'strerror', None) or type(e).__name__})") from None
    if "software" not in made or not made.get("place", "0").isdigit():
        raise UserError(f"--like {args.like}: carries no settings of this program")
    before = []
    for key in SETTINGS:
        if key in made and not (key == "prompt" and args.prompt_file):
            before += [f"--{key}", *made[key].split()] if key in ("temperature", "sweep") else \
                [f"--{key}"] if key == "compile" else [f"--{key}={made[key]}"]
    args = parse_arguments(before + argv)
    args.made = made
    return args


def check_like(args, text):
    """Say what is no longer as it was when the PNG of --like was made. Raises UserError for an input that has changed."""
    for key in ("image", "mask"):
        if args.made.get(key) == str(getattr(args, key)) and args.made.get(f"{key}-crc") != text.get(f"{key}-crc"):
            raise UserError(f"--like {args.like}: {args.made[key]} has changed since")
    for key in ("software", "weights"):
        if args.made.get(key) != text[key]:
            print(f"note: {args.like} was made with {key} {args.made.get(key)}, this is {text[key]}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_size(text):
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or WxH in pixels")
    return int(match[1]), int(match[2] or match[1])


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def finite(text):
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def share(text):
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def frames(text):
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("a film has at least 2 frames")
    return int(text)


def times(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def pixels(text):
    if not text.isdigit() or int(text) > 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 256")
    return int(text)


def margins(text):
    if not re.fullmatch(r"\d{1,9}(,\d{1,9}){3}", text) or not any(sides := [int(side) for side in text.split(",")]):
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels, none below 0 and one above")
    return sides


AXES = {"steps": positive, "cfg": finite, "temperature": finite, "redraws": times, "candidates": positive, "seed": int,
        "score-condition": finite, "strength": share}


def axis(text):
    """"cfg=1,3" -> ("cfg", ["1", "3"])."""
    name, _, values = text.partition("=")
    try:
        for value in values.split(","):
            AXES[name](value)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,VALUE,..., NAME one of {', '.join(AXES)}") from None
    return name, values.split(",")


def parse_arguments(argv):
    p = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", nargs="+", metavar="TEXT", help=f'one or more; "" is allowed (default: "{DEFAULT_PROMPT}")')
    p.add_argument("--prompt-file", type=Path, metavar="FILE", help="more prompts, one on each line, UTF-8")
    p.add_argument("--negative", default="", metavar="TEXT", help="what to steer away from (default: the empty prompt)")
    p.add_argument("--steps", type=positive, help="sampling steps (default: the model's; 48 for meissonic, 32 for shapes)")
    p.add_argument("--cfg", type=finite, help="guidance scale, 1 is none (default: the model's; 9 for meissonic, 1.5 for shapes)")
    p.add_argument("--size", type=parse_size, metavar="N|WxH", help="pixels (default: the model's; 1024 for meissonic, 64 for shapes)")
    p.add_argument("--n", type=positive, default=1, help="pictures for each prompt, with seeds SEED, SEED + 1, ... (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (default: 0)")
    p.add_argument("--temperature", type=finite, nargs=2, metavar=("A", "B"),
                   help="of the noise that chooses what to mask again, first to last step (default: the model's; 2 0 for meissonic, 4 0 for shapes)")
    p.add_argument("--redraws", type=times, metavar="N", help="times that a quarter of the finished picture's tokens, at random, is drawn "
                   "again (default: the model's; 0 for meissonic, 4 for shapes)")
    p.add_argument("--candidates", type=positive, metavar="N", help="pictures drawn for each that is kept, the one that the model "
                   "finds to fit the prompt best (default: the model's; 1 for meissonic, 8 for shapes)")
    p.add_argument("--score-condition", type=finite, help="how good a picture to ask for (default: 6)")
    p.add_argument("--model", default="auto", help="shapes, meissonic, monetico, a hub id or a folder (default: auto: "
                   "meissonic where there is a CUDA GPU and the weights can be had, else shapes)")
    p.add_argument("--lora", type=Path, metavar="FILE", help="low-rank terms, from train.py --lora or in PEFT's layout, to merge")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16", *ROUNDED),
                   help="of the weights; int8 and fp8 round those of the transformer's blocks (default: on CUDA bfloat16 from "
                        "compute capability 8.0, else float16; on a CPU bfloat16 if the chip multiplies it, else float32)")
    p.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks: half a minute that pays "
                   "where many pictures are made (on a CPU wants a C++ compiler)")
    p.add_argument("--batch", type=positive, help="pictures made at a time (default: as many as 4096 tokens hold, at most 16)")
    p.add_argument("--out", type=Path, default=Path("out"), metavar="PATH",
                   help="a .png file for one picture, else a folder (default: out)")
    p.add_argument("--schedule", choices=("cosine", "linear"), default="cosine",
                   help="how the tokens left to draw fall over the steps (default: cosine)")
    p.add_argument("--like", type=Path, metavar="FILE.png",
                   help="with the settings that a PNG of this program carries; other flags go over them")

    e = p.add_argument_group("editing: the result has the size of --image; --size is the one at which the model works "
                             "(default: the nearest that it takes)")
    e.add_argument("--image", type=Path, metavar="P", help="the picture to edit; with --prompt alone, the tokens are redrawn "
                   "of which the caption changes the model's opinion most")
    e.add_argument("--source", metavar="OLD", help="the caption that the picture has now (default: the empty one)")
    e.add_argument("--mask", type=Path, metavar="M", help="a picture of any size, stretched to that of --image: white is repainted")
    e.add_argument("--outpaint", type=margins, metavar="LEFT,TOP,RIGHT,BOTTOM", help="pixels to add on each side")
    e.add_argument("--feather", type=pixels, metavar="PX",
                   help="pixels inside the mask's edge over which old turns to new (default: 0, a hard edge)")
    e.add_argument("--strength", type=share, metavar="S", help="share of tokens redrawn, 0 to 1: at random, or with --source "
                   "where the captions differ (default: there as many as do)")
    e.add_argument("--score-edits", type=positive, nargs="?", const=20, metavar="N",
                   help="print how often N edits of each kind show the new caption, and the share of other pixels kept, mask-free "
                        "and image to image (default N: 20); for models of the world of shapes")
    v = p.add_argument_group("seeing")
    v.add_argument("--film", type=frames, nargs="?", const=8, metavar="N",
                   help="also a strip (PNG) and an animation (GIF) of N moments of the run (default N: 8)")
    v.add_argument("--film-tokens", type=frames, nargs="?", const=8, metavar="N", help="the same with the token grid over it")
    v.add_argument("--sweep", type=axis, nargs="+", metavar="NAME=A,B", help="a labelled grid of runs, in place of the picture, "
                   f"over one or two of {', '.join(AXES)}")
    v.add_argument("--reconstruct", type=Path, metavar="P", help="a picture beside what the VQ model makes of it, with PSNR")
    p.add_argument("--bench", action="store_true", help="print what a batch of --n pictures takes, plainly and as it is done; "
                   "of meissonic's sizes with random weights where those are not cached (--steps 2 is enough on a CPU)")
    p.add_argument("--score", type=positive, nargs="?", const=100, metavar="N",
                   help="print how often pictures of N held-out captions for each task are right (default N: 100); "
                        "for models of the world of shapes")
    return p.parse_args(argv)


def read_prompts(args):
    prompts = list(args.prompt or [])
    if args.prompt_file:
        try:
            prompts += args.prompt_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--prompt-file {args.prompt_file}: cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8'})") from None
        if not prompts:
            raise UserError(f"--prompt-file {args.prompt_file}: no prompts in it")
    for prompt in (*prompts, args.negative, args.source or ""):
        if any("\ud800" <= c <= "\udfff" for c in prompt):                # what Python makes of bytes that are not UTF-8
            raise UserError(f"prompt {prompt!r} is not valid UTF-8")
    return prompts or ["" if args.image else DEFAULT_PROMPT]


def output_paths(out, prompts, seeds, begin=""):
    """[(prompt, seed, path)], file names starting with `begin`. Raises UserError if a path cannot be written; leaves nothing behind."""
    jobs = [(p, s) for p in prompts for s in seeds]
    if out.suffix.lower() == ".png" and len(jobs) > 1:
        raise UserError(f"--out {out} is one file, but {len(jobs)} pictures were asked for; name a folder")
    if out.suffix and out.suffix.lower() != ".png" and not out.is_dir():
        raise UserError(f"--out {out}: pictures are written as .png")
    folder = out.parent if out.suffix.lower() == ".png" else out
    try:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".sample-{id(jobs)}"
        probe.touch()
        probe.unlink()
        for made in missing:
            made.rmdir()
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror})") from None
    if out.suffix.lower() == ".png":
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder")
        return [(p, s, out) for p, s in jobs]
    slug = lambda p: re.sub(r"[^\w]+", "-", p.lower()).strip("-")[:60] or "empty"
    names, paths = set(), []
    for i, (p, s) in enumerate(jobs):
        name = f"{begin}{slug(p)}-{s}"
        while name in names:                                             # two prompts may share a slug
            name = f"{name}-{i}"
        names.add(name)
        paths.append((p, s, out / f"{name}.png"))
    return paths


def check_flags(args):
    """Raises UserError for flags that do not go together."""
    if not -2 ** 63 <= args.seed <= 2 ** 63 - args.n:
        raise UserError(f"--seed {args.seed} does not fit 64 bits")
    if args.sweep:
        names = [name for name, _ in args.sweep]
        if len(names) > 2 or len({*names}) < len(names):
            raise UserError("--sweep takes one or two different names")
        if args.film or args.film_tokens:
            raise UserError("--sweep and --film do not go together")
        for seed in [int(text) for name, texts in args.sweep if name == "seed" for text in texts]:
            if not -2 ** 63 <= seed < 2 ** 63:
                raise UserError(f"--sweep: seed {seed} does not fit 64 bits")
        if "strength" in names and args.strength is None:
            args.strength = float(dict(args.sweep)["strength"][0])
    if args.bench and args.compile:
        raise UserError("--bench measures what is not compiled: without --compile")
    if args.reconstruct and (args.image or args.sweep or args.film or args.film_tokens):
        raise UserError("--reconstruct goes with no other picture, film or sweep")


def paint(pipeline, args, edit, prompts, seeds, progress=iter, watch=None):
    """One batch of pictures as the arguments say; of an Edit, where there is one -> tokens (B, h, w)."""
    settings = sampling(args) | {"progress": progress, "watch": watch}
    if edit:
        settings["size"] = args.size or pipeline.fit(*edit.picture.size)
        settings["tokens"] = edit.start(pipeline, prompts, seeds, settings["size"], args.score_condition)
        settings["steps"] = edit.steps(args.steps)
    return pipeline.draw(prompts, seeds, **settings)


def sampling(args):
    """The settings of Pipeline.draw that are arguments."""
    names = "negative", "size", "steps", "cfg", "temperature", "redraws", "candidates", "schedule"
    return {name: getattr(args, name) for name in names} | {"score": args.score_condition}


def finish(pipeline, edit, tokens):
    """(B, h, w) -> list of Images, of the original's size where there is one."""
    return [edit.finish(picture) if edit else picture for picture in pipeline.decode(tokens)]


def run(args):
    check_flags(args)
    device, why_device = choose_device(args.device)
    dtype, rounded, why_dtype = choose_dtype(args.dtype, device)
    prompts, seeds = read_prompts(args), range(args.seed, args.seed + args.n)
    edit, text = (None, {}) if args.score or args.score_edits else read_edit(args)
    if args.reconstruct:
        read_picture("--reconstruct", args.reconstruct)
    try:
        folder, why_model = find_model(args.model, device, dtype)
        pipeline = Pipeline(folder, device, dtype, args.lora, rounded, args.compile)
    except UserError:
        if not (args.bench and args.model == "meissonic"):
            raise
        pipeline, why_model = Invented(device, dtype, rounded), "meissonic's sizes, random weights"
    pipeline.check_size(*(args.size or pipeline.size))
    if args.compile:
        check_compile(device)                                       # takes seconds: after all that can be said at once
    print(f"model: {why_model} | device: {device} ({why_device}) | dtype: {args.dtype or str(dtype)[6:]} ({why_dtype}) | "
          f"kernels: {kernel_path(device, dtype)} | seed: {args.seed}")
    for name in ("steps", "cfg", "temperature", "redraws", "candidates", "score_condition") + ("size",) * (edit is None):
        if getattr(args, name) is None:
            setattr(args, name, getattr(pipeline, name))
    if args.bench:
        from kernels import bench                                   # measures, and is of no use to a picture
        return bench.picture(meissonic, pipeline, args.size or pipeline.size, args.n, args.steps, args.cfg)
    if args.score:
        for task, right in score_tasks(pipeline, args.score, **sampling(args)).items():
            print(f"{task:12} {right:.2f}")
    if args.score_edits:
        print(f"{'':12} mask-free     at random\n{'':12} shows   kept  shows   kept")
        for kind, ways in score_edits(pipeline, args.score_edits, args.strength, **sampling(args)).items():
            print(f"{kind:12} " + "  ".join(f"{shows:5.2f}  {kept:5.2f}" for shows, kept in ways))
    if args.score or args.score_edits:
        return
    args.model = "shapes" if folder == BUNDLED else "meissonic" if args.model == "auto" else args.model
    args.device, args.dtype = str(device), args.dtype or str(dtype)[6:]
    text |= {"software": SOFTWARE, "weights": fingerprint(folder, dtype)}
    if args.like:
        check_like(args, text)
    make(pipeline, args, edit, prompts, seeds, text)


def make(pipeline, args, edit, prompts, seeds, text):
    """Draw and write what the arguments, all defaults filled in, ask for; `text` goes into the PNGs beside them. The prompts
    of TURN pictures are encoded, then these painted, then decoded: each model is alone in memory and seldom read.
    Interrupted, what is painted by then is still decoded and written."""
    begin = "again-" * bool(args.like) + (f"{args.image.stem}-" if args.image else "")
    if args.reconstruct:
        (name, seed, path), = output_paths(args.out, [f"{args.reconstruct.stem} reconstructed"], [args.seed])
        sheet, psnr = reconstruct(pipeline, args.reconstruct)
        write_picture(path, sheet, settings_of(args, prompt=None) | text)
        print(f"PSNR {psnr:.2f} dB")
        return
    jobs = output_paths(args.out, prompts, seeds, begin)
    pipeline.lean = True
    most = max([args.candidates, *map(int, dict(args.sweep or ()).get("candidates", ()))])
    encode = lambda prompts: pipeline.encode_text([*sum(told_of(prompts, most), []), args.negative, args.source or ""], *pipeline.size, 0)
    if args.sweep:
        encode(prompts)
        for prompt, seed, path in jobs:
            sheet = sweep(pipeline, args, edit, prompt, seed, lambda cells: tqdm(cells, "cells"))
            path = path if path == args.out else path.with_name(f"{path.stem}-sweep.png")
            write_picture(path, sheet, settings_of(args, prompt=prompt, seed=seed) | text)
        return
    number, steps = args.film_tokens or args.film, edit.steps(args.steps) if edit else args.steps
    if number and number > steps + 1:
        raise UserError(f"{steps} steps have {steps + 1} moments, --film asks for {number}")
    width, height = args.size or pipeline.fit(*edit.picture.size)
    batch = args.batch or min(16, max(1, MOST_TOKENS * pipeline.tokens_f ** 2 // (width * height * args.candidates)))
    again = args.like and len(jobs) == 1                  # in a batch as it was: rounding depends on its shape
    turn = batch * max(1, TURN // batch)
    for start in range(0, len(jobs), turn):
        painted, stopped = [], False
        pipeline.held.clear()
        encode([prompt for prompt, _, _ in jobs[start:start + turn]])
        for i in range(start, min(start + turn, len(jobs)), batch):
            part, seen = jobs[i:i + batch] * (batch if again else 1), []
            bar = lambda steps: tqdm(steps, f"pictures {i + 1} to {i + len(part)} of {len(jobs)}" if len(jobs) > 1 else "steps")
            watch = (lambda step, believed, masked: seen.append((believed, masked))) if number else None
            try:
                tokens = paint(pipeline, args, edit, [p for p, _, _ in part], [s for _, s, _ in part], bar, watch)
            except KeyboardInterrupt:
                stopped = True
                break
            for k in [int(args.made.get("place", 0)) % batch] if again else range(len(part)):
                more = dict(zip(("prompt", "seed"), part[k]), batch=len(part)) | ({"strength": edit.share} if edit else {})
                about = settings_of(args, **more) | {"place": str(k)} | text
                painted.append((part[k][2], about, tokens[k:k + 1], [(b[k], m[k]) for b, m in seen]))
        for path, about, tokens, seen in painted:
            write_picture(path, *finish(pipeline, edit, tokens), about)
            if number:
                write_film(path, film(pipeline, seen, number, bool(args.film_tokens)), about)
        if stopped:
            raise KeyboardInterrupt


def main(argv=None):
    try:
        run(like(sys.argv[1:] if argv is None else argv))
    except (UserError, vq.CheckpointError) as e:
        sys.exit(fail(e))
    except OSError as e:
        sys.exit(fail(f"{e.filename or '--out'}: {e.strerror or e}"))
    except (RuntimeError, MemoryError) as e:
        words = "allocate memory|Storage size calculation overflowed"                        # PyTorch's on a CPU
        if not (isinstance(e, (torch.OutOfMemoryError, MemoryError)) or re.search(words, str(e))):
            raise
        sys.exit(fail("out of memory: lower --size, --batch or --n, or use --dtype bfloat16"))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def fail(message):
    print(f"sample.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
