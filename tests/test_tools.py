"""tools: films, sweeps, scores and reconstruction, all with the flags of sample.py."""
import re
from pathlib import Path

import numpy as np
import pytest
from common import SMALL_RUN, assert_refused, noise, open_picture, tree
from PIL import Image, ImageSequence
from shared_pipeline import load_once      # noqa: F401

from engine import rerank
from shapes import world
from tools import sweep

pytestmark = pytest.mark.usefixtures("load_once")

RUN = (*SMALL_RUN[:6], "--steps", 4)              # at the picture's size


def pixels(path):
    return np.asarray(open_picture(path))


@pytest.fixture
def picture(cli):
    """p.png, 70 x 50 pixels, in the test's folder."""
    Image.fromarray(noise(0, 70, 50)).save("p.png")
    return Path("p.png")


# --------------------------------------------------------------------------------------------------
# Film


@pytest.mark.parametrize("flags, number", ((["--frames", 3], 3), (["--frames", 5, "--grid"], 5),
                                           ([], 8)), ids=("3", "grid", "default"))
def test_a_film_has_the_frames_asked_for(cli, flags, number):
    """As a strip and an animation: at first nothing is known, at last everything."""
    status, *_ = cli("--prompt", "a star", *SMALL_RUN, "--steps", 7, *flags, "--out", "a.png",
                     script="tools.film")
    assert status == 0 and tree(".") == ["a-film.gif", "a-film.png", "a.png"]
    with Image.open("a-film.gif") as gif:
        assert {frame.size for frame in ImageSequence.Iterator(gif)} == {(64, 136)}
        assert gif.n_frames == number
    strip = pixels("a-film.png")                              # frames 64 wide, 4 apart
    assert strip.shape == (2 * 64 + 8, number * 68 - 4, 3)
    believed, known = strip[:64], strip[66:130]
    assert (believed[:, -64:] == pixels("a.png")).all()
    assert (known[1:15, 1:15] == 128).all()                   # grey between the lines
    if "--grid" in flags:
        assert (known[:, :64] == 0).all(-1).any()
    else:
        assert (known[:, :64] == 128).all() and (known[:, -64:] == believed[:, -64:]).all()


def test_a_film_of_an_edit(cli):
    """Grey is what the mask touches."""
    Image.fromarray(noise(0, 64, 64)).save("p.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save("m.png")
    assert cli("--image", "p.png", "--mask", "m.png", *RUN, "--frames", 2, "--out", "a.png",
               script="tools.film")[0] == 0
    strip = pixels("a-film.png")
    assert (strip[66:82, :64] == 128).all() and (strip[82:130, :64] == strip[16:64, :64]).all()


@pytest.mark.parametrize("at_once", (1, 4))
def test_a_film_is_of_the_candidate_that_was_kept(cli, monkeypatch, at_once):
    """Two pictures of three candidates; each film ends with the picture that sample.py makes."""
    monkeypatch.setattr(rerank, "MAX_TOKENS", 16 * at_once)
    flags = ("--prompt", "a star", "a big red heart", *SMALL_RUN, "--best-of", 3, "--remask", 1,
             "--cfg", 4, "--batch", 2)
    assert cli(*flags, "--frames", 3, "--out", "film", script="tools.film")[0] == 0
    assert cli(*flags, "--out", "plain")[0] == 0
    for name in ("a-star-0", "a-big-red-heart-0"):
        strip = pixels(f"film/{name}-film.png")
        assert (strip[:64, -64:] == pixels(f"film/{name}.png")).all()
        assert (pixels(f"plain/{name}.png") == pixels(f"film/{name}.png")).all()


def test_a_film_of_more_steps_than_tokens(cli):
    """The idle steps show the end again; a picture of which nothing is drawn has only an end."""
    assert cli("--prompt", "x", *SMALL_RUN, "--steps", 24, "--frames", 25, "--out", "a.png",
               script="tools.film")[0] == 0
    frames = pixels("a-film.png")[:64].reshape(64, -1, 3)
    assert (frames[:, -64:] == frames[:, -132:-68]).all()
    Image.fromarray(noise(0, 64, 64)).save("p.png")
    assert cli("--image", "p.png", "--strength", 0, *RUN, "--frames", 2, "--out", "b.png",
               script="tools.film")[0] == 0


@pytest.mark.parametrize("flags", (["--frames", "1"], ["--steps", "4", "--frames", "9"]))
def test_films_that_make_no_sense(cli, flags):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, *flags], "--frames", script="tools.film")


# --------------------------------------------------------------------------------------------------
# Sweep


@pytest.mark.parametrize("axes", (
    ["steps=1,3", "cfg=1,4.5"], ["temperature=0,9", "seed=5,-2"],
    ["strength=0,1", "score-condition=6,1"], ["seed=1,2,3"], ["remask=0,2"], ["best-of=1,3"]),
    ids=" ".join)
def test_a_sweep_is_its_single_runs(cli, axes):
    """The first setting to the right, the second one downwards."""
    Image.fromarray(noise(0, 64, 64)).save("p.png")
    base = ["--prompt", "a star", *RUN, "--size", 64]
    if "strength" in axes[0]:
        base += ["--image", "p.png"]
    assert cli(*axes, *base, "--out", "sheet.png", script="tools.sweep")[0] == 0
    assert tree(".") == ["p.png", "sheet.png"]
    sheet = pixels("sheet.png")
    across, columns = sweep.parse_axes(axes[0])[0]
    down, rows = sweep.parse_axes(axes[1])[0] if len(axes) > 1 else (None, [""])
    for j, y in enumerate(rows):
        row = sheet[20 + 68 * j:84 + 68 * j]                  # below the labels, cells 4 apart
        windows = np.lib.stride_tricks.sliding_window_view(row, (64, 64, 3))[0, :, 0]
        last = -1
        for x in columns:
            flags = setting(across, x) + (setting(down, y) if down else [])
            assert cli(*base, *flags, "--out", "one.png")[0] == 0
            one = pixels("one.png")
            places = [k for k, window in enumerate(windows) if (window == one).all() and k > last]
            assert places, (x, y)
            last = places[0]


def setting(name, text):
    """One value of a swept setting -> flags of sample.py."""
    return ["--temperature", text, 0] if name == "temperature" else [f"--{name}={text}"]


def test_a_sheet_for_each_prompt_and_like(cli):
    """Files beside each other; --like makes one again, with its settings, bit for bit."""
    flags = ("cfg=1,2", "seed=0,1", "--prompt", "a", "b", *SMALL_RUN)
    assert cli(*flags, script="tools.sweep")[0] == 0
    assert tree("out") == ["a-0-sweep.png", "b-0-sweep.png"]
    status, _, err = cli("--like", "out/b-0-sweep.png", "--out", "again.png", script="tools.sweep")
    assert status == 0 and "note" not in err
    assert Path("again.png").read_bytes() == Path("out/b-0-sweep.png").read_bytes()


@pytest.mark.parametrize("axes, words", (
    ([], ["which settings"]), (["speed=1"], ["speed"]), (["cfg=1", "cfg=2"], ["different"]),
    (["cfg=a"], ["cfg=a"]), (["cfg=1", "seed=1", "steps=1"], ["two"]), (["seed=1.5"], ["seed"]),
    ([f"seed={2 ** 64}"], ["seed"]), (["strength=0,1"], ["strength", "--image"]),
    (["cfg"], ["cfg"])), ids=lambda axes: " ".join(axes))
def test_sweeps_that_make_no_sense(cli, axes, words):
    assert_refused(cli, [*axes, "--prompt", "x", *SMALL_RUN], *words, script="tools.sweep")


# --------------------------------------------------------------------------------------------------
# Score and reconstruction


def test_the_scores_of_tasks(cli):
    status, out, _ = cli(*SMALL_RUN, "--n", 1, script="tools.score")
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert status == 0 and names == [*world.TASKS, "unseen", "overall"] and tree(".") == []
    assert cli(*SMALL_RUN, "--n", 1, "--world", "tiny", script="tools.score")[0] == 0


def test_the_scores_of_edits(cli):
    """With nothing redrawn, both ways of choosing the tokens give the same."""
    status, out, _ = cli(*SMALL_RUN, "--edits", 1, "--strength", 0, script="tools.score")
    rows = [line.split() for line in out.splitlines()[3:]]
    assert status == 0 and tree(".") == []
    assert [row[:-4] for row in rows] == [kind.split() for kind in world.EDITS]
    assert all(row[-4:-2] == row[-2:] for row in rows)


def test_reconstruct(cli, picture):
    """Both pictures at their size, and the PSNR of their difference."""
    status, out, _ = cli(picture, *SMALL_RUN[:6], "--out", "a.png", script="tools.reconstruct")
    sheet = pixels("a.png").astype(float)
    assert status == 0 and sheet.shape == (50, 144, 3)
    assert (sheet[:, :70] == pixels(picture)).all()
    error = ((sheet[:, :70] - sheet[:, 74:]) ** 2).mean()
    assert error > 0
    psnr = float(re.search(r"PSNR (\S+) dB", out)[1])
    assert psnr == pytest.approx(10 * np.log10(255 ** 2 / error), abs=0.01)


def test_reconstruct_no_picture(cli, picture):
    Path("cut.png").write_bytes(picture.read_bytes()[:60])
    for name in ("nowhere.png", "cut.png"):
        assert_refused(cli, [name, *SMALL_RUN], name, script="tools.reconstruct")
