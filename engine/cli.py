"""What the command lines of all scripts share: a parser, types of values, errors in one line.

    @script("sample.py")
    def main(argv=None):
        parser = Parser(prog="sample.py", description=__doc__)
        parser.add_argument("--steps", type=positive)
        args = parser.parse_args(argv)
"""
import argparse
import functools
import math
import re
import sys

import torch
from safetensors import SafetensorError

from engine.checkpoint import UserError


class Parser(argparse.ArgumentParser):
    """argparse that prints errors in one line and the description as it is written. Flags cannot be
    abbreviated: --score would be taken for --score-condition."""

    def __init__(self, prog, description):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


# --------------------------------------------------------------------------------------------------
# Types: text of a flag -> value, or argparse.ArgumentTypeError


def positive(text):
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text):
    """A whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def finite(text):
    """A number, neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def share(text):
    """A number from 0 to 1."""
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def seed(text):
    """A whole number of 64 bits."""
    if not re.fullmatch(r"[+-]?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if not -2 ** 63 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} does not fit 64 bits")
    return int(text)


def size(text):
    """N or WxH in pixels -> (width, height)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or WxH in pixels")
    return int(match[1]), int(match[2] or match[1])


def feather(text):
    """A whole number of pixels from 0 to 256."""
    if not text.isdigit() or int(text) > 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 256")
    return int(text)


def margins(text):
    """LEFT,TOP,RIGHT,BOTTOM in pixels -> list of 4 ints, at least one of them above 0."""
    match = re.fullmatch(r"\d{1,9}(,\d{1,9}){3}", text)
    sides = [int(side) for side in text.split(",")] if match else []
    if not any(sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels, none below 0 and one above")
    return sides


# --------------------------------------------------------------------------------------------------
# Errors


def run_script(name, function, out_of_memory=None, stopped="stopped"):
    """Call function(). What the user can mend becomes one line on stderr and exit status 2;
    Ctrl-C prints `stopped` and exits with 130. `out_of_memory` says what to lower when memory is
    full; without it such errors pass. All other errors pass."""
    try:
        function()
    except (UserError, SafetensorError) as e:             # the second one: a full disk
        fail(name, e)
    except OSError as e:
        fail(name, f"{e.filename or '--out'}: {e.strerror or e}")
    except (RuntimeError, MemoryError) as e:
        if not (out_of_memory and is_out_of_memory(e)):
            raise
        fail(name, f"out of memory: {out_of_memory}")
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)


def script(name, **options):
    """Decorator of a main(argv=None): run_script with the same options."""
    def decorate(main):
        @functools.wraps(main)
        def wrapper(argv=None):
            run_script(name, lambda: main(argv), **options)
        return wrapper
    return decorate


def fail(name, message):
    """Print one line and exit with status 2."""
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def is_out_of_memory(error):
    """Whether memory was full. On a CPU PyTorch says so in words alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return bool(re.search("allocate memory|Storage size calculation overflowed", str(error)))
