"""The settings in a PNG, and --like: every flag is stored and read, and the picture comes again."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from common import SMALL_RUN, assert_refused, noise, open_picture
from PIL import Image
from shared_pipeline import load_once      # noqa: F401

import sample
from engine import settings
from engine.checkpoint import UserError
from engine.images import save_png
from tools import sweep

pytestmark = pytest.mark.usefixtures("load_once")

# A value of every flag that is none's default, as a user types it
VALUES = {
    "prompt": ["-a * \U0001f3a8\nb"], "negative": ["ein Grün\nund -1"], "seed": ["-7"],
    "size": ["96x32"], "steps": ["3"], "cfg": ["-1.5"], "temperature": ["1", "-0.5"],
    "schedule": ["linear"], "remask": ["2"], "best-of": ["3"], "score-condition": ["3"],
    "model": ["a/b c"], "text-encoder": ["laion"], "lora": ["l o.safetensors"],
    "device": ["cpu"], "dtype": ["int8"],
    "compile": [], "batch": ["2"], "image": ["p 1.png"], "mask": ["-m.png"],
    "invert-mask": [], "outpaint": ["0,3,0,9"], "feather": ["3"], "strength": ["0.5"],
    "source": [""],
}


def on_the_command_line(name, values):
    if len(values) == 1:
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def stored(parser, args):
    """The settings of parsed arguments; a PNG has one prompt of the list."""
    prompt = args.prompt[0] if args.prompt else None
    return settings.settings_of(parser, args, prompt=prompt)


def read_again(parser, text, tmp_path, *more):
    """--like of a PNG with these settings -> arguments."""
    path = tmp_path / "like.png"
    save_png(path, Image.new("RGB", (1, 1)), text | {"software": "s", "place": "0"})
    return settings.parse_like(parser, ["--like", str(path), *more])


def test_every_flag_is_a_setting_or_named_as_none():
    flags = settings.setting_flags(sample.make_parser())
    assert flags.keys() == VALUES.keys()


@pytest.mark.parametrize("name", VALUES)
def test_every_setting_is_stored_and_read(name, tmp_path):
    parser = sample.make_parser()
    args = parser.parse_args(on_the_command_line(name, VALUES[name]))
    text = stored(parser, args)
    assert text.keys() == {name}
    again = read_again(parser, text, tmp_path)
    attribute = name.replace("-", "_")
    value = getattr(args, attribute)
    assert value != parser.get_default(attribute) and getattr(again, attribute) == value


def test_defaults_are_not_stored_and_a_missing_key_is_the_default(tmp_path):
    parser = sample.make_parser()
    default = parser.parse_args([])
    assert stored(parser, default) == {}
    again = vars(read_again(parser, {}, tmp_path))
    assert {name: again[name] for name in vars(default) if name != "like"} == {
        name: value for name, value in vars(default).items() if name != "like"}


def test_a_new_flag_is_stored_without_an_entry_anywhere(tmp_path):
    """In PNGs from before, the missing key means its default."""
    old = sample.make_parser()
    new = sample.make_parser()
    new.add_argument("--sparkle", type=float, default=1.0)
    before = stored(old, old.parse_args(["--cfg", "3"]))
    assert read_again(new, before, tmp_path).sparkle == 1.0
    after = stored(new, new.parse_args(["--cfg", "3", "--sparkle", "2"]))
    assert after == before | {"sparkle": "2.0"}
    assert read_again(new, after, tmp_path).sparkle == 2.0


def test_a_setting_that_is_no_flag_is_noted(tmp_path, capsys):
    args = read_again(sample.make_parser(), {"redraws": "4", "cfg": "3.0"}, tmp_path)
    assert args.cfg == 3 and "redraws" in capsys.readouterr().err


def test_other_flags_override_those_of_the_png(tmp_path):
    parser = sample.make_parser()
    text = {"cfg": "3.0", "steps": "4", "prompt": "a star"}
    args = read_again(parser, text, tmp_path, "--cfg", "2", "--prompt", "a heart", "a cross")
    assert (args.cfg, args.steps, args.prompt) == (2, 4, ["a heart", "a cross"])
    args = read_again(parser, text, tmp_path, "--prompt-file", "prompts.txt")
    assert args.prompt is None


def test_a_png_without_settings(tmp_path):
    save_png(tmp_path / "p.png", Image.new("RGB", (1, 1)), {"prompt": "x"})
    with pytest.raises(UserError, match="p.png.*no settings"):
        settings.parse_like(sample.make_parser(), ["--like", str(tmp_path / "p.png")])


# --------------------------------------------------------------------------------------------------
# Pictures of others


def gift(tmp_path, **texts):
    """A PNG with these texts and what read_settings looks for -> its path."""
    path = tmp_path / "gift.png"
    texts = {name.replace("_", "-"): text for name, text in texts.items()}
    save_png(path, Image.new("RGB", (1, 1)), {"software": "s", "place": "0"} | texts)
    return path


@pytest.mark.parametrize("name, text", (
    ("temperature", "4 0 --prompt-file X --out Y"), ("temperature", "4 --out"), ("cfg", "--out=Y"),
    ("seed", "1 --out Y"), ("steps", "--n=9"), ("size", "64 --out"), ("compile", "--out"),
    ("outpaint", "--help"), ("device", "--help"), ("schedule", "--help"), ("dtype", "-h")))
def test_a_picture_cannot_give_flags(tmp_path, name, text):
    """A text that is no value of its own key is refused; a switch has no other value."""
    path = gift(tmp_path, **{name: text})
    parser = sample.make_parser()
    try:
        args = settings.parse_like(parser, ["--like", str(path)])
    except UserError as e:
        assert str(e).startswith(f"--like {path}: {name}: ")
        return
    assert name == "device" and args.device == text
    assert (args.out, args.n, args.prompt_file) == (Path("out"), 1, None)


def test_a_picture_gives_neither_places_nor_numbers_of_pictures(tmp_path):
    """Texts are texts, however they begin."""
    texts = {"prompt": "--out=Y", "negative": "-n 5", "source": "--prompt-file X", "out": "Y",
             "n": "9", "prompt-file": "X", "like": "b.png", "help": "True"}
    args = settings.parse_like(sample.make_parser(), ["--like", str(gift(tmp_path, **texts))])
    assert (args.prompt, args.negative, args.source) == (["--out=Y"], "-n 5", "--prompt-file X")
    assert (args.out, args.n, args.prompt_file) == (Path("out"), 1, None)


@pytest.mark.parametrize("name, text", (
    ("batch", "1000000000"), ("batch", "0"), ("size", "999999x999999"), ("size", "9" * 5000),
    ("best-of", "99999"), ("remask", "99999"), ("steps", "99999"), ("cfg", "1e39"), ("cfg", "nan"),
    ("temperature", "nan 0"), ("seed", "²"),
    ("batch", "²"), ("strength", "-1"), ("feather", "9999"), ("schedule", "sine"),
    ("dtype", "int4"), ("image", "a\ud800b\0.png"), ("model", "\0"), ("steps", "")))
def test_settings_of_a_picture_have_bounds(tmp_path, name, text):
    path = gift(tmp_path, **{name: text})
    with pytest.raises(UserError, match=f"gift.png: {name}: ") as caught:
        settings.parse_like(sample.make_parser(), ["--like", str(path)])
    assert len(str(caught.value)) < 400


def test_a_picture_with_many_texts_gives_one_short_note(tmp_path, capsys):
    args = settings.parse_like(sample.make_parser(), ["--like", str(gift(
        tmp_path, **{f"key{i}": "x" * 1000 for i in range(2000)}, weights="w" * 10 ** 5))])
    settings.check_like(args, {"software": "s", "weights": "v"})
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and len(err) < 1500


@pytest.mark.parametrize("place", ("²", "-1", "", "1.5", "9" * 5000, "٣"))
def test_places_that_are_no_numbers(tmp_path, place):
    with pytest.raises(UserError, match="no settings"):
        settings.parse_like(sample.make_parser(), ["--like", str(gift(tmp_path, place=place))])


def test_axes_of_a_foreign_sheet(tmp_path):
    parser = sample.make_parser()
    parser.add_argument("--axes", type=sweep.axes)
    for text in ("steps=1 --out=Y", "cfg=" + ",".join("1" * 1001), "out=Y", "best-of=9999999"):
        with pytest.raises(UserError, match="axes: "):
            settings.parse_like(parser, ["--like", str(gift(tmp_path, axes=text))])


# --------------------------------------------------------------------------------------------------
# What picture viewers show


def test_parameters_for_viewers(cli):
    """The form that other programs write: prompt, negative prompt, settings."""
    assert cli("--prompt", "a star,\nred", *SMALL_RUN, "--negative", "a: heart", "--cfg", 4.5,
               "--seed", 7, "--out", "a.png")[0] == 0
    assert open_picture("a.png").text["parameters"] == (
        "a star,\nred\nNegative prompt: a: heart\n"
        "Steps: 2, CFG scale: 4.5, Seed: 7, Size: 64x64, Model: compressed")
    Image.fromarray(noise(0, 70, 50)).save("p.png")
    edit = ("--image", "p.png", "--strength", 0.5, "--prompt", "")
    assert cli(*edit, *RUN, "--out", "b.png")[0] == 0
    lines = open_picture("b.png").text["parameters"].split("\n")
    assert len(lines) == 2 and lines[0] == "" and "Size: 70x50" in lines[1]


@pytest.mark.parametrize("model, name", (
    ("shapes", "shapes"), ("a/b/", "b"), ("x, Seed: 1", "x Seed 1"), ("a/\nSteps: 9", "Steps 9")))
def test_a_models_name_cannot_be_taken_for_settings(model, name):
    args = SimpleNamespace(negative="", steps=2, cfg=9.0, model=model)
    text = settings.parameters_text(args, "p", 0, (64, 64))
    assert text == f"p\nSteps: 2, CFG scale: 9, Seed: 0, Size: 64x64, Model: {name}"


# --------------------------------------------------------------------------------------------------
# Whole runs


RUN = (*SMALL_RUN[:6], "--steps", 4)                          # at the picture's size


@pytest.fixture
def pictures(cli):
    """p.png and m.png in the test's folder."""
    Image.fromarray(noise(0, 70, 50)).save("p.png")
    mask = np.zeros((50, 70), np.uint8)
    mask[4:30, 3:30] = 255
    Image.fromarray(mask).save("m.png")


@pytest.mark.parametrize("flags", (
    ["--negative", "ein Grün\nund -1", "--cfg", -1.5, "--temperature", 1, -0.5, "--remask", 2,
     "--schedule", "linear", "--score-condition", 3],
    ["--n", 3, "--seed=-2"], ["--best-of", 3], ["--image", "p.png", "--source", ""],
    ["--image", "p.png", "--mask", "m.png", "--feather", 3], ["--image", "p.png"],
    ["--image", "p.png", "--strength", 0.5, "--n", 2],
    ["--image", "p.png", "--outpaint", "0,3,0,9"]),
    ids=lambda flags: " ".join(map(str, flags[:3])))
def test_like_makes_the_file_again(cli, pictures, flags):
    """Bit for bit, text and all, though a batch of several is made as one again."""
    size = [] if "--image" in flags else ["--size", 64]
    assert cli("--prompt", "-a * \U0001f3a8", *RUN, *size, *flags)[0] == 0
    made = sorted(Path("out").glob("*.png"))
    text = open_picture(made[-1]).text
    assert {"prompt", "model", "dtype", "software", "weights", "steps", "cfg"} <= text.keys()
    for path in made:
        status, _, err = cli("--like", path, "--out", "again/")
        assert status == 0 and "note" not in err, err
        again = Path("again") / f"again-{path.name}"
        assert again.read_bytes() == path.read_bytes()


def test_like_with_one_setting_changed(cli):
    """As if that flag had been another from the start."""
    base = ("--prompt", "a star", *SMALL_RUN, "--seed", 5)
    assert cli(*base, "--out", "a.png")[0] == 0
    assert cli(*base, "--cfg", 2, "--out", "b.png")[0] == 0
    assert cli("--like", "a.png", "--cfg", 2, "--out", "c.png")[0] == 0
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert c == b != a


def test_like_notices_other_inputs(cli, pictures):
    """Another picture under the same name is refused; another software is noted."""
    assert cli("--image", "p.png", "--strength", 0.5, *RUN, "--out", "a.png")[0] == 0
    Image.fromarray(noise(1, 70, 50)).save("p.png")
    assert_refused(cli, ["--like", "a.png"], "p.png", "changed")
    assert cli("--prompt", "x", *SMALL_RUN, "--out", "b.png")[0] == 0
    image = open_picture("b.png")
    save_png("b.png", image, image.text | {"software": "torch 0"})
    status, _, err = cli("--like", "b.png", "--out", "c.png")
    assert status == 0 and "torch 0" in err


@pytest.mark.parametrize("name", ("nowhere.png", "cut.png", "text.png"))
def test_like_of_no_picture(cli, pictures, name):
    Path("cut.png").write_bytes(Path("p.png").read_bytes()[:60])
    Path("text.png").write_text("not a picture")
    assert_refused(cli, ["--like", name], "--like", name)
