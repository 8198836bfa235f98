"""What the command lines of all scripts share: a parser, types of values, messages, errors in one
line.

    @script("sample.py")
    def main(argv=None):
        parser = Parser(prog="sample.py", description=__doc__)
        parser.add_argument("--steps", type=positive)
        args = parser.parse_args(argv)
        say(f"{args.steps} steps")
"""
import argparse
import contextlib
import functools
import math
import os
import re
import signal
import sys
import threading
import unicodedata
from pathlib import Path

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
        self.exit(2, visible(f"{self.prog}: error: {message}") + "\n")


# --------------------------------------------------------------------------------------------------
# Messages. A terminal that is closed, or cannot show a character, does not stop the work.


def say(text):
    """Print one line on stdout, see `visible`. Never raises."""
    TextStream(sys.stdout).write_line(visible(text))


def note(text):
    """Print one line on stderr, see `visible`. Never raises."""
    TextStream(sys.stderr).write_line(visible(text))


def visible(text):
    """Text with its newlines, control characters, terminal escapes, changes of direction and lone
    surrogates written as in Python: \\n, \\x1b, \\u202e. File names and prompts can hold them."""
    return "".join(c.encode("unicode_escape").decode() if is_hidden(c) else c for c in str(text))


def is_hidden(c):
    """Whether a character acts on a terminal instead of showing. The two joiners make emoji and
    letters."""
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"


class TextStream:
    """A text stream, or None for a closed one, that never raises. What its encoding lacks is
    written as \\u7ea2. After the first failure, such as a closed pipe, everything is dropped."""

    def __init__(self, stream):
        self.stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        self.attempt(lambda: self.stream.write(shown))
        return len(text)

    def write_line(self, line):
        self.write(line + "\n")
        self.flush()

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function):
        """Call function(). If it fails, point the file at nothing: Python flushes it once more when
        it exits, and would fail then."""
        try:
            function()
        except (OSError, ValueError):                         # ValueError: closed
            with contextlib.suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self.stream.fileno())
                os.close(nothing)


@contextlib.contextmanager
def safe_streams():
    """Within it, sys.stdout and sys.stderr are TextStreams, for progress bars and libraries too."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = TextStream(sys.stdout), TextStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


# --------------------------------------------------------------------------------------------------
# Types: text of a flag -> value, or argparse.ArgumentTypeError


def whole(low, high):
    """The type of whole numbers from low to high."""
    def parse(text):
        if not re.fullmatch("[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{quoted(text)} is not a whole number from {low} to {high}")
        return int(text)
    return parse


def quoted(text):
    """The beginning of a text that is not what it should be, for a message."""
    return repr(text[:60])


positive = whole(1, 10 ** 9)
natural = whole(0, 2 ** 63 - 1)
feather = whole(0, 256)                                       # pixels
number_of_pictures = whole(1, 100_000)
number_of_steps = whole(1, 10_000)
number_of_passes = whole(0, 1000)
number_of_candidates = whole(1, 1000)
batch_size = whole(1, 1024)
MAX_PIXELS = 4096 ** 2                                        # of a picture that is made


def finite(text):
    """A number of at most a million, neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= 1e6:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number from -1e6 to 1e6")
    return value


def share(text):
    """A number from 0 to 1."""
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not between 0 and 1")
    return value


def seed(text):
    """A whole number of 64 bits."""
    if not re.fullmatch("[+-]?[0-9]{1,19}", text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number of 64 bits")
    if not -2 ** 63 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} does not fit 64 bits")
    return int(text)


def size(text):
    """N or WxH in pixels -> (width, height)."""
    match = re.fullmatch("([0-9]{1,9})(?:x([0-9]{1,9}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not N or WxH in pixels")
    width, height = int(match[1]), int(match[2] or match[1])
    if width * height > MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"{width}x{height} is more than 4096x4096 pixels")
    return width, height


def home(text):
    """The text of a path, or of another name, with the home folder for its ~."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no path")
    return os.path.expanduser(text)


def path(text):
    """A Path, see home."""
    return Path(home(text))


def margins(text):
    """LEFT,TOP,RIGHT,BOTTOM in pixels -> list of 4 ints, at least one of them above 0."""
    match = re.fullmatch("[0-9]{1,9}(,[0-9]{1,9}){3}", text)
    sides = [int(side) for side in text.split(",")] if match else []
    if not any(sides):
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is not LEFT,TOP,RIGHT,BOTTOM in pixels, none below 0 and one above")
    return sides


# --------------------------------------------------------------------------------------------------
# Errors


class Terminated(KeyboardInterrupt):
    """SIGTERM: what is under way ends as with Ctrl-C."""


def run_script(name, function, out_of_memory=None, stopped="stopped"):
    """Call function(). What the user can mend becomes one line on stderr and exit status 2;
    Ctrl-C prints `stopped` and exits with 130, SIGTERM with 143. `out_of_memory` says what to lower
    when memory is full; without it such errors pass. All other errors pass."""
    with safe_streams(), sigterm_raises():
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
        except KeyboardInterrupt as e:
            note("")
            note(stopped)
            sys.exit(143 if isinstance(e, Terminated) else 130)


@contextlib.contextmanager
def sigterm_raises():
    """Within it, SIGTERM raises Terminated in this process; the next one ends it, and it ends the
    processes forked from this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def terminate(number, frame):
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == process:
            raise Terminated
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


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
    note(f"{name}: error: {message}")
    sys.exit(2)


def is_out_of_memory(error):
    """Whether memory was full. On a CPU PyTorch says so in words alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return bool(re.search("allocate memory|Storage size calculation overflowed", str(error)))
