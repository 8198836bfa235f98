"""What is printed: escaped, in what the terminal can show, and never a reason to lose work."""
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT, SMALL_RUN, assert_refused, environment, open_picture, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared_pipeline import load_once      # noqa: F401

import meissonic
import sample
from engine import cli as command_line
from engine.cli import TextStream, note, safe_streams, say, visible
from engine.images import save_png

pytestmark = pytest.mark.usefixtures("load_once")
PROMPTS = ("--prompt", "红心", "blauer Kreis", "a star")
ESCAPES = "\x1b[2J\x1b]0;title\x07\r\nwrote fake.png\u202egnp\x9b1m"


@settings(deadline=None)
@given(st.text() | st.text("\x1b\x00\x7f\x9b\n\r\t\u2028\u202e\ud800a[]", min_size=1))
def test_visible_text_is_one_line_that_acts_on_no_terminal(text):
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    assert not any(command_line.is_hidden(c) for c in shown)
    assert text == shown or not text.isprintable() or "\\" in shown
    shown.encode()


def test_text_that_stays_as_it_is():
    for text in ("a red circle", "日本語", "\U0001f468\u200d\U0001f469\u200d\U0001f467 ☂️", "C:\\new"):
        assert visible(text) == text


class Broken(io.TextIOBase):
    """A stream that fails as the reader of a pipe went away, or as a full disk."""
    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, *text):
        raise self.error

    flush = write


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "pipe": lambda: Broken(BrokenPipeError(32, "Broken pipe")),
    "full": lambda: Broken(OSError(28, "No space left on device")),
    "cp1252": lambda: io.TextIOWrapper(io.BytesIO(), "cp1252"),
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_is_painted_is_written_whatever_the_terminal(tmp_path, monkeypatch, name):
    """Messages and progress bars alike."""
    monkeypatch.chdir(tmp_path)
    out, err = STREAMS[name](), STREAMS[name]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    sample.main([*PROMPTS, *map(str, SMALL_RUN)])             # no SystemExit: status 0
    assert tree("out") == ["a-star-0.png", "blauer-kreis-0.png", "红心-0.png"]
    assert (sys.stdout, sys.stderr) == (out, err)
    if isinstance(out, io.TextIOWrapper):
        assert b"\\u7ea2\\u5fc3-0.png\n" in out.buffer.getvalue()


@pytest.mark.parametrize("name", STREAMS)
def test_messages_never_raise(monkeypatch, name):
    monkeypatch.setattr(sys, "stdout", STREAMS[name]())
    monkeypatch.setattr(sys, "stderr", STREAMS[name]())
    say("红心\ud800")
    note("红心\ud800")
    with safe_streams():
        print("红心\ud800")
        print("红心\ud800", file=sys.stderr, flush=True)


def test_a_stream_in_utf_8_shows_everything():
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    TextStream(stream).write_line("红心 \udc80")
    assert stream.buffer.getvalue() == "红心 \\udc80\n".encode()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="redirections of a POSIX shell")
@pytest.mark.parametrize("redirection", (
    "{ %s; echo $? > status; } | head -1", "{ %s; echo $? > status; } 2>&1 | true",
    "%s >&- 2>&-; echo $? > status", "%s > /dev/full 2> /dev/full; echo $? > status"))
def test_redirections_in_a_shell(tmp_path, redirection):
    """Exit status 0 and all pictures, although Python flushes its streams when it exits."""
    arguments = (sys.executable, ROOT / "sample.py", *PROMPTS, *SMALL_RUN, "--n", 2)
    command = redirection % " ".join(f'"{part}"' for part in arguments)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True,
                          env=environment(PYTHONIOENCODING="cp1252"))
    assert (tmp_path / "status").read_text() == "0\n", done.stderr
    assert len(tree(tmp_path / "out")) == 6 and b"Broken" not in done.stderr


# --------------------------------------------------------------------------------------------------
# What others wrote


def test_prompts_and_paths_with_terminal_escapes(cli):
    """As a prompt that is cut, a folder, an unknown flag, a file that is missing."""
    words = " ".join(f"w{i}" for i in range(200)) + ESCAPES
    status, out, err = cli("--prompt", words, *SMALL_RUN, "--out", f"a{ESCAPES}b")
    assert status == 0 and "\\x1b[2J" in out and "\\x1b[2J" in err
    assert not set(out + err) & set("\x1b\x07\x9b\u202e")
    assert out.count("\n") == 2                               # what runs, and "wrote"
    for flags in ([f"--{ESCAPES}"], ["--image", ESCAPES, "--strength=1"], ["--size", ESCAPES],
                  ["--model", ESCAPES], ["--prompt-file", ESCAPES], ["--lora", ESCAPES]):
        status, out, err = cli("--prompt", "x", *SMALL_RUN, *flags)
        assert status == 2 and err.count("\n") == 1 and not set(err) & set("\x1b\x07\x9b\u202e")


def test_settings_of_a_foreign_png_with_terminal_escapes(cli):
    texts = {"software": ESCAPES, "\x1b[2J\x07\n\x9b": "1", "weights": ESCAPES}
    save_png("gift.png", Image.new("RGB", (1, 1)), texts)
    status, out, err = cli("--like", "gift.png", "--prompt", "x", *SMALL_RUN)
    assert status == 0 and not set(out + err) & set("\x1b\x07\x9b\u202e")
    assert err.count("note: ") == 3
    save_png("gift.png", Image.new("RGB", (1, 1)), {"software": "s", "cfg": ESCAPES})
    assert_refused(cli, ["--like", "gift.png"], "cfg", "\\x1b")


# --------------------------------------------------------------------------------------------------
# SIGTERM


@pytest.mark.skipif(os.name != "posix", reason="sends SIGTERM")
def test_sigterm_keeps_what_is_painted(cli, monkeypatch):
    """As Ctrl-C does, with the exit status of SIGTERM. The handler from before is back."""
    draw, calls = meissonic.sample, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    monkeypatch.setattr(meissonic, "sample", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    status, _, err = cli("--prompt", "a", "b", "c", *SMALL_RUN, "--batch", 1)
    assert status == 143 and err.endswith("\nstopped\n") and tree("out") == ["a-0.png"]
    assert signal.getsignal(signal.SIGTERM) == before
    assert open_picture(Path("out") / "a-0.png").size == (64, 64)
