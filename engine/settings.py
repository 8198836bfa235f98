"""The settings that a PNG carries as text, and --like, which makes the picture again from them.

    args = parse_like(parser, ["--like", "out/a-star-0.png", "--cfg", "5"])
    save_png(path, image, settings_of(parser, args, prompt="a star", seed=0) | provenance)

All flags of a parser but NOT_SETTINGS are settings, so a new flag is stored and read without an
entry here. A PNG stores the values that differ from the flags' defaults; a missing key means the
default. Beside the settings it stores PROVENANCE, and `parameters` for the viewers of pictures.
"""
import argparse
import re
import secrets
import sys
from pathlib import Path

import numpy as np
import PIL
import torch

from engine import cli
from engine.checkpoint import UserError
from engine.images import PictureError, read_png_text

NOT_SETTINGS = ("help", "like", "out", "n", "prompt-file")    # a PNG stores its own prompt and seed
PROVENANCE = ("software", "weights", "image-crc", "mask-crc", "place",        # place in its batch
              "parameters")
SOFTWARE = f"torch {torch.__version__}, numpy {np.__version__}, pillow {PIL.__version__}"
SEPARATORS = {cli.size: "x", cli.margins: ","}


def setting_flags(parser):
    """{name of the setting: its argparse action}, of all settings."""
    flags = {action.option_strings[-1].removeprefix("--"): action
             for action in parser._actions if action.option_strings}
    return {name: action for name, action in flags.items() if name not in NOT_SETTINGS}


def settings_of(parser, args, **changes):
    """{setting: text} of the arguments that differ from their flags' defaults. `changes`, by the
    arguments' names, take the place of their values: of several prompts, a PNG has one."""
    values = vars(args) | changes
    return {name: to_text(action, values[action.dest])
            for name, action in setting_flags(parser).items()
            if values[action.dest] != action.default}


def to_text(action, value):
    """The value of a flag as the user would type it."""
    if isinstance(value, (tuple, list)):
        return SEPARATORS.get(action.type, " ").join(map(str, value))
    return str(value)


def from_text(action, text):
    """The text of a setting -> the flag's value, by the flag's own type: a picture cannot name
    other flags or numbers than the command line takes. Raises argparse.ArgumentTypeError."""
    if action.nargs == 0:                                     # a switch, stored only if it is on
        if text != "True":
            raise argparse.ArgumentTypeError(f"{cli.quoted(text)} is not True")
        return True
    if isinstance(action.nargs, int):
        words = text.split()
        if len(words) != action.nargs:
            raise argparse.ArgumentTypeError(f"{cli.quoted(text)} is not {action.nargs} values")
        return [convert(action, word) for word in words]
    if action.nargs == "+" and action.type:                   # numbers; a prompt is one text
        return [convert(action, word) for word in text.split()]
    value = convert(action, text)
    return [value] if action.nargs == "+" else value


def convert(action, text):
    """One text -> a value of the flag's type and choices. Raises argparse.ArgumentTypeError."""
    value = action.type(text) if action.type else text
    if action.choices and value not in action.choices:
        raise argparse.ArgumentTypeError(f"{cli.quoted(text)} is none of its choices")
    return value


def parse_like(parser, argv=None):
    """Parse a command line. With --like FILE.png the settings of that PNG take the place of the
    flags' defaults. args.made is all text of the PNG, {} without --like. A typed --seed -1 becomes
    a seed that is drawn. Raises UserError if the file has no settings, or settings that its flags
    do not take."""
    argv = sys.argv[1:] if argv is None else argv
    typed = parser.parse_args(argv)
    made = read_settings(typed.like) if typed.like else {}
    flags = setting_flags(parser)
    stored = argparse.Namespace()
    unknown = []
    for name, text in made.items():
        if name in flags and not (name == "prompt" and typed.prompt_file):
            try:
                setattr(stored, flags[name].dest, from_text(flags[name], text))
            except (argparse.ArgumentTypeError, ValueError) as e:
                raise UserError(f"--like {typed.like}: {name}: {e}") from None
        elif name not in flags and name not in PROVENANCE:
            unknown.append(name)
    if unknown:
        cli.note(f"note: {typed.like} has settings that are no flags of {parser.prog}: "
                 f"{', '.join(unknown):.200}")
    args = parser.parse_args(argv, stored)
    args.made = made
    if typed.seed == -1:
        args.seed = secrets.randbelow(2 ** 32)                # as other programs understand -1
    return args


def read_settings(path):
    """{key: text} of a PNG that this program wrote. Raises UserError for any other file."""
    try:
        made = read_png_text(path)
    except PictureError as e:
        raise UserError(f"--like {e}") from None
    if "software" not in made or not re.fullmatch("[0-9]{1,9}", made.get("place", "0")):
        raise UserError(f"--like {path}: carries no settings of this program")
    return made


def parameters_text(args, prompt, seed, size):
    """The settings of a picture in the form that picture viewers show, and other programs write."""
    lines = [prompt]
    if args.negative:
        lines.append(f"Negative prompt: {args.negative}")
    model = re.sub(r"[,:\s]+", " ", Path(args.model).name).strip()
    lines.append(f"Steps: {args.steps}, CFG scale: {args.cfg:g}, Seed: {seed}, "
                 f"Size: {size[0]}x{size[1]}, Model: {model}")
    return "\n".join(lines)


def check_like(args, provenance):
    """Compare the provenance of the PNG of --like, if any, with this run's. Prints a note if
    software or weights differ. Raises UserError if an input picture has changed."""
    if not args.like:
        return
    for name in ("image", "mask"):
        same_path = args.made.get(name) == str(getattr(args, name))
        if same_path and args.made.get(f"{name}-crc") != provenance.get(f"{name}-crc"):
            raise UserError(f"--like {args.like}: {args.made[name]} has changed since")
    for name in ("software", "weights"):
        before = args.made.get(name)
        if before != provenance[name]:
            cli.note(f"note: {args.like} was made with {name} {before!s:.200}, this is "
                     f"{provenance[name]}")
