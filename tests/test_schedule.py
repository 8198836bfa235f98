"""The mask schedule, the plan of a run and the conventions of the timestep.

test_golden.py compares masked_counts with the official implementation.
"""
import json
import math
import shutil
from dataclasses import replace

import pytest
from common import GOLDEN
from hypothesis import example, given, settings
from hypothesis import strategies as st

import meissonic
from engine.checkpoint import CheckpointError
from engine.pipeline import Pipeline

STEPS = st.integers(1, 300)
TOKENS = st.one_of(st.integers(1, 300), st.integers(1, 5000))
KINDS = st.sampled_from(sorted(meissonic.MASK_SCHEDULES))
BUNDLED = GOLDEN.parent.parent / "weights" / "shapes" / "scheduler"
SCHEDULE = meissonic.Schedule(steps=8, cfg_scale=3.0, temperature=(2.0, 0.5),
                              mask_schedule="cosine", rate_condition="rate")


# -------------------------------------------------------------------------------------------------
# masked_counts


@settings(max_examples=200, deadline=None)
@example(10, 10, "linear")
@given(STEPS, TOKENS, KINDS)
def test_every_step_reveals_something(steps, tokens, kind):
    """Each step reveals a token while any is masked, and the last token is revealed by the last
    step, or earlier if there are more steps than tokens."""
    counts = meissonic.masked_counts(steps, tokens, kind)
    assert len(counts) == steps and all(type(count) is int for count in counts)
    for before, after in zip([tokens, *counts], counts):
        assert after < before or before == after == 0
    assert counts[-1] == 0
    assert steps > tokens or all(counts[:-1])


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 2000))
def test_cosine_follows_its_formula(steps, tokens):
    """floor(tokens cos(pi/2 i / steps)), but for the token that float32 may round away and for the
    steps that are forced to reveal one or to keep one for each step to come."""
    counts = meissonic.masked_counts(steps, tokens)
    for i, count in enumerate(counts):
        exact = tokens * math.cos(math.pi / 2 * (i + 1) / steps)
        before = tokens if i == 0 else counts[i - 1]
        still_to_come = steps - i - 1
        assert count <= exact + 1e-3 or count == still_to_come
        assert count >= math.floor(exact - 1e-3) or count == max(before - 1, 0)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(60, 2000))
def test_linear_follows_its_formula(steps, tokens):
    counts = meissonic.masked_counts(steps, tokens, "linear")
    for i, count in enumerate(counts):
        assert abs(count - tokens * (1 - (i + 1) / steps)) < 1 + 1e-9


@pytest.mark.parametrize("steps, tokens, kind",
                         [(0, 5, "cosine"), (-1, 5, "cosine"), (5, 0, "linear"), (5, 5, "spiral")])
def test_counts_that_make_no_sense(steps, tokens, kind):
    with pytest.raises(ValueError):
        meissonic.masked_counts(steps, tokens, kind)


# -------------------------------------------------------------------------------------------------
# Schedule.plan


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 100), KINDS)
def test_a_plan_has_the_counts_of_the_schedule(steps, masked, known, kind):
    """Over the masked tokens alone; steps that would find nothing to draw are left out."""
    schedule = replace(SCHEDULE, steps=steps, mask_schedule=kind)
    plan = schedule.plan(masked, masked + known)
    counts = meissonic.masked_counts(steps, masked, kind)
    assert [step.num_masked for step in plan] == counts[:min(steps, masked)]
    assert plan[-1].num_masked == 0
    assert [step.number for step in plan] == list(range(len(plan)))
    assert {step.cfg_scale for step in plan} == {3.0}


def test_a_plan_for_nothing_is_empty():
    assert SCHEDULE.plan(0, 16) == []


@pytest.mark.parametrize("steps, expected", [(1, [2.0]), (2, [2.0, 0.5]), (4, [2, 1.5, 1, 0.5])])
def test_the_temperature_is_linear(steps, expected):
    """From the first step to the last; a single step uses the first."""
    plan = replace(SCHEDULE, steps=steps).plan(100, 100)
    assert [step.temperature for step in plan] == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 500), st.integers(0, 500))
def test_timestep_conventions(steps, masked, known):
    """step counts down; rate is the share of all tokens in 1000 levels; rate1000 is 1000 of it."""
    tokens = masked + known
    plans = {}
    for name in meissonic.RATE_CONDITIONS:
        plans[name] = replace(SCHEDULE, steps=steps, rate_condition=name).plan(masked, tokens)
    before = masked
    for i, step in enumerate(plans["step"]):
        level = round(1000 * before / tokens)
        assert step.timestep == steps - 1 - i
        assert plans["rate"][i].timestep == level / 1000
        assert plans["rate1000"][i].timestep == level
        before = step.num_masked


# -------------------------------------------------------------------------------------------------
# Schedule.from_pretrained


def write_config(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "scheduler_config.json").write_text(text)
    return folder


def test_a_config_that_says_nothing_is_the_published_one(tmp_path):
    """48 steps, guidance 9, noise from 2 to 0, cosine, the step index as the timestep."""
    expected = meissonic.Schedule(48, 9.0, (2.0, 0.0), "cosine", "step")
    assert meissonic.Schedule.from_pretrained(write_config(tmp_path, {})) == expected
    assert meissonic.Schedule.from_pretrained(GOLDEN / "plain" / "scheduler") == expected


def test_a_config_is_read(tmp_path):
    content = {"masking_schedule": "linear", "rate_condition": "rate1000",
               "defaults": {"steps": 5, "cfg": 2.5, "temperature": [1.0, 3.0], "size": 64}}
    found = meissonic.Schedule.from_pretrained(write_config(tmp_path, content))
    assert found == meissonic.Schedule(5, 2.5, (1.0, 3.0), "linear", "rate1000")


def test_the_bundled_model_is_told_the_masking_rate():
    schedule = meissonic.Schedule.from_pretrained(BUNDLED)
    found = schedule.rate_condition, schedule.mask_schedule, schedule.cfg_scale
    assert found == ("rate", "cosine", 1.5)


@pytest.mark.parametrize("content, word", [
    ({"rate_condition": "speed"}, "speed"), ({"masking_schedule": "spiral"}, "spiral"),
    ({"rate_condition": ["rate"]}, "rate_condition"), ({"defaults": [3]}, "defaults"),
    ({"masking_schedule": ["cosine"]}, "mask_schedule"), ({"defaults": {"steps": 0}}, "steps"),
    ({"defaults": {"steps": True}}, "steps"), ({"defaults": {"steps": 4.5}}, "steps"),
    ({"defaults": {"cfg": "9"}}, "cfg"), ({"defaults": {"cfg": 1e39}}, "cfg"),
    ({"defaults": {"cfg": math.nan}}, "cfg"), ({"defaults": {"temperature": 2}}, "temperature"),
    ({"defaults": {"temperature": [1]}}, "temperature"),
    ({"defaults": {"temperature": [1, None]}}, "temperature"),
    ({"defaults": {"temperature": [math.inf, 0]}}, "temperature"),
    ("[]", "scheduler_config.json"), ("{", "scheduler_config.json")], ids=str)
def test_broken_configs(tmp_path, content, word):
    with pytest.raises(CheckpointError, match="scheduler_config.json") as error:
        meissonic.Schedule.from_pretrained(write_config(tmp_path, content))
    assert word in str(error.value)


@pytest.mark.parametrize("changes", [
    dict(cfg_scale=math.nan), dict(cfg_scale=1e39), dict(cfg_scale=None), dict(steps=0),
    dict(steps=10 ** 12), dict(temperature=(math.nan, 0.0)), dict(temperature=(1.0,)),
    dict(temperature=[1.0, 0.0]), dict(rate_condition="speed"), dict(mask_schedule="spiral")],
    ids=str)
def test_settings_from_python_are_checked(changes):
    with pytest.raises(CheckpointError):
        replace(SCHEDULE, **changes)


@pytest.mark.parametrize("key, value", [
    ("size", "64"), ("size", -16), ("size", [64, 64]), ("score_condition", math.nan),
    ("score_condition", None), ("remask", -1), ("remask", 1.5), ("best_of", 0),
    ("best_of", 10 ** 9), ("sparkle\n", 1)], ids=str)
def test_defaults_of_wrong_type_or_range(tmp_path, key, value):
    """Those that the pipeline reads from the same file."""
    folder = shutil.copytree(GOLDEN / "compressed", tmp_path / "model")
    write_config(folder / "scheduler", {"defaults": {key: value}})
    with pytest.raises(CheckpointError, match="scheduler_config.json: defaults") as error:
        Pipeline(folder)
    assert key.strip() in str(error.value) and "\n" not in str(error.value)


def test_a_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match="scheduler_config.json"):
        meissonic.Schedule.from_pretrained(tmp_path)


def test_no_field_has_a_default():
    with pytest.raises(TypeError):
        meissonic.Schedule(8)
