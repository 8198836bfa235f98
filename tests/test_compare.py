"""tools/compare.py: its numbers are what they are called, and its table comes row by row."""
import re

import numpy as np
import pytest
import torch
from common import GOLDEN_MODEL, assert_refused
from shared_pipeline import load_once      # noqa: F401

import shapes.world
from tools import compare

pytestmark = pytest.mark.usefixtures("load_once")

RUN = ("--n", 1, "--batch", 6, "--model", GOLDEN_MODEL, "--size", 64, "--dtype", "float32")


def table(out):
    """Rows of the Markdown table -> lists of cells, without head and line."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_mean_and_error():
    """Of one task it is the error of a mean; of several the mean is over tasks."""
    values = np.random.default_rng(0).random((3, 50))
    mean, error = compare.mean_and_error(values[:1])
    assert mean == pytest.approx(values[0].mean())
    assert error == pytest.approx(values[0].std(ddof=1) / 50 ** 0.5)
    mean, error = compare.mean_and_error(values)
    each = [compare.mean_and_error(row[None])[1] for row in values]
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(np.linalg.norm(each) / 3)


def test_the_error_of_the_mean_is_its_spread():
    """Over many draws of captions that are right with other probabilities in each task."""
    rng = np.random.default_rng(1)
    chance = np.array([0.2, 0.5, 0.9])[:, None]
    found = [compare.mean_and_error(rng.random((3, 40)) < chance) for _ in range(500)]
    means, errors = np.array(found).T
    assert means.std() == pytest.approx(errors.mean(), rel=0.1)


def test_scores():
    """Each task, overall, and the gain, whose error counts captions that changed alone."""
    first = np.array([[True, False, False, True]] * 2)
    right = first.copy()
    right[0, 1] = True
    assert compare.scores(right, first) == ["0.75 ± 0.25", "0.50 ± 0.29", "0.62 ± 0.19",
                                           "+0.12 ± 0.12"]
    assert compare.scores(first, first)[-1] == "+0.00 ± 0.00"


@pytest.mark.parametrize("name, cond, uncond", [
    ("confidence", 4, 4), ("halton", 4, 4), ("unguided", 4, 0), ("guided-early", 4, 2),
    ("every-2nd", 4, 2), ("every-4th", 4, 1), ("remask-1", 5, 5)])
def test_passes_of_a_picture(cli, name, cond, uncond):
    """In four steps."""
    status, out, err = cli(*RUN, "--steps", 4, "--variants", name, script="tools.compare")
    row, = table(out)
    assert status == 0 and row[:2] == [name, "4"], err
    assert [float(cell) for cell in row[-3:-1]] == [cond, uncond] and float(row[-1]) > 0


def test_a_row_for_each_variant_and_number_of_steps(cli):
    names = ["random", "halton"]
    status, out, _ = cli(*RUN, "--steps", 1, 2, "--variants", *names, script="tools.compare")
    rows = table(out)
    assert status == 0 and [row[:2] for row in rows] == [
        [name, steps] for steps in "12" for name in names]
    assert all(len(row) == 2 + 6 + 2 + 3 for row in rows)
    scores = [re.fullmatch(r"(\d\.\d\d) ± nan", cell)[1] for cell in rows[0][2:8]]
    assert rows[0][8].startswith(f"{np.mean([float(score) for score in scores]):.2f}")


def test_variants_draw_the_same_captions_and_seeds(cli, monkeypatch):
    """And the captions are those that training never sees."""
    calls = []
    draw = compare.draw_batch

    def noted(pipe, args, variant, batch, seeds, *rest):
        calls.append((variant, [caption for caption, _ in batch], list(seeds)[:len(batch)]))
        return draw(pipe, args, variant, batch, seeds, *rest)

    monkeypatch.setattr(compare, "draw_batch", noted)
    cli(*RUN, "--batch", 4, "--steps", 1, "--variants", "confidence", "random",
        script="tools.compare")
    half = len(calls) // 2
    assert [call[1:] for call in calls[:half]] == [call[1:] for call in calls[half:]]
    drawn = calls[1:half]                                     # the first one warms up
    assert sum((seeds for _, _, seeds in drawn), []) == list(range(6))
    captions = sum((captions for _, captions, _ in drawn), [])
    assert all(shapes.world.is_held_out(caption) for caption in captions)


def test_the_first_variant_is_what_the_pipeline_draws(cli, monkeypatch):
    """Without candidates and re-masking, but for rounding."""
    drawn = []
    draw = compare.draw_batch

    def noted(pipe, *rest):
        ids, seconds = draw(pipe, *rest)
        drawn.append((pipe, ids))
        return ids, seconds

    monkeypatch.setattr(compare, "draw_batch", noted)
    cli(*RUN, "--steps", 3, "--variants", "confidence", script="tools.compare")
    pipe, ids = drawn[-1]
    captions = [shapes.world.test_prompts(task, 1)[0][0] for task in shapes.world.TASKS]
    schedule = compare.replace(pipe.schedule, steps=3)
    expected = pipe.draw(captions, range(6), size=(64, 64), schedule=schedule, remask=0, best_of=1)
    assert (ids != expected).float().mean() < 0.2             # a tie may change a picture
    assert any(torch.equal(a, b) for a, b in zip(ids, expected))


@pytest.mark.parametrize("flags, word", [
    (("--variants", "spiral"), "spiral"), (("--steps", 0), "--steps"), (("--n", 0), "--n"),
    (("--prompt", "a star"), "--prompt")])
def test_what_makes_no_sense(cli, flags, word):
    assert_refused(cli, flags, word, script="tools.compare")
