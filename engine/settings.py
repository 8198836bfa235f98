"""The settings that a PNG carries as text, and --like, which makes the picture again from them.

    args = parse_like(parser, ["--like", "out/a-star-0.png", "--cfg", "5"])
    save_png(path, image, settings_of(parser, args, prompt="a star", seed=0) | provenance)

All flags of a parser but NOT_SETTINGS are settings, so a new flag is stored and read without an
entry here. A PNG stores the values that differ from the flags' defaults; a missing key means the
default. Beside the settings it stores PROVENANCE.
"""
import sys

import numpy as np
import PIL
import torch

from engine import cli
from engine.checkpoint import UserError
from engine.images import PictureError, read_png_text

NOT_SETTINGS = ("help", "like", "out", "n", "prompt-file")    # a PNG stores its own prompt and seed
PROVENANCE = ("software", "weights", "image-crc", "mask-crc", "place")        # place in its batch
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


def to_arguments(action, text):
    """The text of a setting -> command line arguments."""
    flag = action.option_strings[-1]
    if action.nargs == 0:                                     # a switch, stored only if it is on
        return [flag]
    if isinstance(action.nargs, int):
        return [flag, *text.split()]
    return [f"{flag}={text}"]


def parse_like(parser, argv=None):
    """Parse a command line. With --like FILE.png the settings of that PNG come before the other
    arguments, which therefore win. args.made is all text of the PNG, {} without --like.
    Raises UserError if the file has no settings."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    made = read_settings(args.like) if args.like else {}
    flags = setting_flags(parser)
    stored = []
    for name, text in made.items():
        if name == "prompt" and args.prompt_file:
            continue
        if name in flags:
            stored += to_arguments(flags[name], text)
        elif name not in PROVENANCE:
            print(f"note: {args.like} has a setting {name}, which is no flag of {parser.prog}",
                  file=sys.stderr)
    args = parser.parse_args(stored + argv)
    args.made = made
    return args


def read_settings(path):
    """{key: text} of a PNG that this program wrote. Raises UserError for any other file."""
    try:
        made = read_png_text(path)
    except PictureError as e:
        raise UserError(f"--like {e}") from None
    if "software" not in made or not made.get("place", "0").isdigit():
        raise UserError(f"--like {path}: carries no settings of this program")
    return made


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
            print(f"note: {args.like} was made with {name} {before}, this is {provenance[name]}",
                  file=sys.stderr)
