"""What settings do: a labelled sheet of pictures over one or two of them.

    python -m tools.sweep steps=8,16,32 cfg=1,3 --prompt "a star" --out sheet.png
    python -m tools.sweep strength=0.2,0.5,0.8 --image P --prompt "a star"
    python -m tools.sweep --like sheet.png --seed 1

The first setting goes to the right, the second one downwards: steps, cfg, temperature (of the
first step), remask, best-of, seed, score-condition, strength. Other flags are those of sample.py.
Each cell is the picture that sample.py makes with these settings.
"""
import argparse
import copy
import math
import sys
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import sample
from engine.cli import (finite, number_of_candidates, number_of_passes, number_of_steps, say,
                        script, seed, share)
from engine.images import flatten_alpha, save_png
from engine.jobs import prepare
from engine.settings import parse_like

AXES = {"steps": number_of_steps, "cfg": finite, "temperature": finite,
        "remask": number_of_passes, "best-of": number_of_candidates, "seed": seed,
        "score-condition": finite, "strength": share}
MAX_CELLS = 1000
GAP = 4                                                       # pixels between cells
LABEL = 12                                                    # height of the letters
TOP = 20                                                      # height of the row of labels


def axes(text):
    """The type of --axes: "steps=8,16 cfg=1,3", one or two settings; stays text."""
    names = [part.partition("=")[0] for part in text.split()]
    if not 1 <= len(names) <= 2 or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("takes one or two different settings")
    if math.prod(len(labels) for _, labels in parse_axes(text)) > MAX_CELLS:
        raise argparse.ArgumentTypeError(f"a sheet has at most {MAX_CELLS} pictures")
    for name, labels in parse_axes(text):
        try:
            for label in labels:
                AXES[name](label)
        except (KeyError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(
                f"{name}={','.join(labels)} is not NAME=VALUE,VALUE,..., "
                f"NAME one of {', '.join(AXES)}") from None
    return text


def parse_axes(text):
    """"cfg=1,3 steps=8" -> [("cfg", ["1", "3"]), ("steps", ["8"])]."""
    pairs = [part.partition("=") for part in text.split()]
    return [(name, labels.split(",")) for name, _, labels in pairs]


@script("tools.sweep", out_of_memory=sample.OUT_OF_MEMORY)
def main(argv=None):
    parser = sample.make_parser("tools.sweep", __doc__)
    parser.usage = "python -m tools.sweep NAME=A,B [NAME=A,B] [flags of sample.py]"
    parser.add_argument("--axes", type=axes, help=argparse.SUPPRESS)       # stored in the PNG
    args = parse_like(parser, leading_as_flag(sys.argv[1:] if argv is None else argv))
    if args.axes is None:
        parser.error("which settings? NAME=VALUE,VALUE,...")
    swept = parse_axes(args.axes)
    names = [name for name, _ in swept]
    if "strength" in names and args.strength is None:
        args.strength = share(dict(swept)["strength"][0])                  # checked with --image
    run = prepare(parser, args, suffix="-sweep")
    run.pipe.one_at_a_time = True
    for job in run.jobs:
        sheet, text = draw_sheet(run, job, swept)
        path = run.place(job)
        save_png(path, sheet, text)
        say(f"wrote {path}")


def leading_as_flag(argv):
    """["cfg=1,3", "--n", "2"] -> ["--axes=cfg=1,3", "--n", "2"]: flags are stored for --like."""
    count = 0
    while count < len(argv) and not argv[count].startswith("-"):
        count += 1
    flag = [f"--axes={' '.join(argv[:count])}"] if count else []
    return flag + argv[count:]


def draw_sheet(run, job, swept):
    """All cells of one picture -> (RGB Image, {name: text} of its PNG)."""
    across, columns = swept[0]
    down, rows = swept[1] if len(swept) > 1 else (None, [""])
    cells = [(x, y) for y in rows for x in columns]
    ids = []                                                  # of each cell, (1, h, w)
    for x, y in tqdm(cells, "cells"):
        cell = change_setting(run, "seed", str(job.seed))
        cell = change_setting(cell, across, x)
        if down:
            cell = change_setting(cell, down, y)
        ids.append(draw(cell, job))
    text = run.png_texts([job])[0]
    pictures = [sample.decode(run, one[0]) for one in ids]
    row_labels = [f"{down} {y}" if down else "" for y in rows]
    return label_sheet(pictures, [f"{across} {x}" for x in columns], row_labels), text


def change_setting(run, name, text):
    """-> a Run with one setting of AXES changed; the models are shared."""
    value = AXES[name](text)
    if name == "temperature":
        value = (value, *run.args.temperature[1:])            # of one step there is no second
    args = copy.copy(run.args)
    setattr(args, name.replace("-", "_"), value)
    edit = run.edit and replace(run.edit, strength=args.strength)
    return replace(run, args=args, edit=edit)


def draw(run, job):
    """Make one picture with the settings of the Run -> ids (1, h, w)."""
    batch = [job._replace(seed=run.args.seed)]
    text = sample.encode(run, batch)
    ids = sample.starting_ids(run, batch)
    return sample.fill_in(run, batch, ids, text)


def label_sheet(pictures, columns, rows):
    """Pictures of one size, row by row -> a grid with a label above each column and left of each
    row."""
    font = ImageFont.load_default(LABEL)
    width, height = pictures[0].size
    left = longest(font, rows) + 2 * GAP
    dx = max(width, longest(font, columns)) + GAP
    dy = max(height, LABEL + GAP) + GAP
    sheet = Image.new("RGB", (left + dx * len(columns), TOP + dy * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, label in enumerate(columns):
        pen.text((left + i * dx, 3), label, "black", font)
    for j, label in enumerate(rows):
        pen.text((GAP, TOP + j * dy + height // 2), label, "black", font, anchor="lm")
    for k, picture in enumerate(pictures):
        row, column = divmod(k, len(columns))
        sheet.paste(flatten_alpha(picture), (left + column * dx, TOP + row * dy))
    return sheet


def longest(font, labels):
    """Width of the longest label in pixels."""
    return round(max(font.getlength(label) for label in labels))


if __name__ == "__main__":
    main()
