"""sample.py as a user runs it, most of it in this process: pictures, files, bad input, Ctrl-C."""
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (GOLDEN, GOLDEN_MODEL, ROOT, SMALL_RUN, assert_refused, edit_json, environment,
                    open_picture, shell, tree)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from shared_pipeline import load_once      # noqa: F401

import clip
import meissonic
import sample
import train
import vq
from engine import hub, jobs, options, rerank
from engine.checkpoint import UserError
from engine.cli import run_script, script
from engine.pipeline import Pipeline
from shapes.score import image_matches
from shapes.world import PromptObject, PromptSpec

pytestmark = pytest.mark.usefixtures("load_once")


# --------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path):
    done = shell(["--prompt", "a red circle", *SMALL_RUN, "--out", "made"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == ["made", "made/a-red-circle-0.png"]
    image = open_picture(tmp_path / "made" / "a-red-circle-0.png")
    assert image.size == (64, 64) and image.mode == "RGB"
    assert f"wrote {Path('made') / 'a-red-circle-0.png'}" in done.stdout
    assert "2/2" in done.stderr                               # the progress bar


def test_one_line_says_what_runs(cli):
    status, out, _ = cli("--prompt", "a star", *SMALL_RUN, "--seed", 5)
    assert status == 0
    line = out.splitlines()[0]
    for word in (GOLDEN_MODEL, "device: cpu", "dtype: float32", "kernels:", "seed: 5"):
        assert str(word) in line


@pytest.mark.parametrize("flags, total", (
    ([], 5), (["--remask", 2], 7), (["--best-of", 4, "--batch", 1], 10),
    (["--best-of", 4, "--remask", 2, "--batch", 1], 14)))
def test_the_progress_bar_ends_at_its_total(cli, monkeypatch, flags, total):
    """One of the five steps finds at most a quarter masked; two candidates are drawn at once."""
    monkeypatch.setattr(rerank, "MAX_TOKENS", 2 * 64)
    status, _, err = cli("--prompt", "a star", *SMALL_RUN, "--size", 128, "--steps", 5, *flags)
    assert status == 0 and f" {total}/{total} " in err


def test_out_may_be_a_file_or_a_folder(cli):
    for out, made in (((), "out/a-star-0.png"), (("--out", "deep/er/star.png"), "deep/er/star.png"),
                      (("--out", "a.folder/x"), "a.folder/x/a-star-0.png")):
        Path("a.folder").mkdir(exist_ok=True)
        assert cli("--prompt", "a star", *SMALL_RUN, *out)[0] == 0
        assert open_picture(made).format == "PNG"
    assert len(list(Path().rglob("*.png"))) == 3


def test_several_prompts_and_seeds(cli):
    status, out, _ = cli("--prompt", "a star", "A  Heart!", *SMALL_RUN, "--n", 2, "--seed", 7)
    names = ["a-heart-7.png", "a-heart-8.png", "a-star-7.png", "a-star-8.png"]
    assert status == 0 and tree("out") == names and out.count("wrote ") == 4
    assert len({open_picture(Path("out") / name).tobytes() for name in names}) == 4


def test_prompt_file(cli):
    Path("prompts.txt").write_bytes("a star\r\nein grüner Pfeil\n".encode())
    assert cli("--prompt-file", "prompts.txt", "--prompt", "a cross", *SMALL_RUN)[0] == 0
    assert tree("out") == ["a-cross-0.png", "a-star-0.png", "ein-grüner-pfeil-0.png"]


@pytest.mark.parametrize("prompt", ("", "日本語の絵", "🎨", "a/b\\c..", "x" * 500, "a\nb",
                                    "<|endoftext|>", "'", "\t", "-1 -a"))
def test_any_prompt_makes_a_picture(cli, prompt):
    assert cli(f"--prompt={prompt}", *SMALL_RUN)[0] == 0
    file, = Path("out").iterdir()
    assert open_picture(file).size == (64, 64)
    assert prompt or file.name == "empty-0.png"


def test_rectangles(cli):
    assert cli("--prompt", "a star", *SMALL_RUN, "--size", "96x32", "--out", "a.png")[0] == 0
    assert open_picture("a.png").size == (96, 32)


@pytest.mark.parametrize("option", (
    ["--steps", 5], ["--cfg", 1], ["--seed", 1], ["--negative", "a heart"], ["--remask", 1],
    ["--temperature", 0, 0], ["--best-of", 4], ["--score-condition", 1],
    ["--schedule", "linear"]), ids=lambda option: option[0])
def test_options_reach_the_picture(cli, option):
    """Each changes it, by itself; the same command again does not."""
    base = ("--prompt", "a red star", *SMALL_RUN, "--steps", 6, "--size", 128)
    for name, more in (("one", []), ("two", []), ("other", option)):
        assert cli(*base, *more, "--out", f"{name}.png")[0] == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert open_picture("one.png").tobytes() != open_picture("other.png").tobytes()


@pytest.mark.parametrize("best_of", (1, 3))
def test_a_picture_does_not_depend_on_its_batch(cli, best_of):
    """It has the same tokens, so the same pixels but for rounding."""
    base = (*SMALL_RUN, "--size", 128, "--steps", 4, "--best-of", best_of)
    several = ("--prompt", "a star", "a heart", "--n", 2, "--seed", 3, "--out", "all")
    assert cli(*base, *several)[0] == 0
    assert cli(*base, "--prompt", "a heart", "--seed", 4, "--out", "one")[0] == 0
    together, alone = (np.asarray(open_picture(f"{folder}/a-heart-4.png"), int)
                       for folder in ("all", "one"))
    assert np.abs(together - alone).max() <= 1


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision(cli, dtype):
    status, out, _ = cli("--prompt", "a star", *SMALL_RUN, "--dtype", dtype, "--out", "a.png")
    assert status == 0 and f"dtype: {dtype}" in out
    assert open_picture("a.png").getextrema() != ((0, 0),) * 3


@pytest.mark.parametrize("name", hub.QUANTIZED)
def test_8_bits(cli, name):
    status, out, _ = cli("--model", "shapes", "--prompt", "a star", "--dtype", name, "--steps", 2,
                         "--best-of", 1, "--remask", 0, "--device", "cpu", "--out", "a.png")
    within = str(hub.choose_dtype(None, torch.device("cpu"))[0]).removeprefix("torch.")
    assert status == 0 and f"dtype: {name} (--dtype, in {within})" in out
    assert open_picture("a.png").text["dtype"] == name


def test_a_prompt_that_is_cut_says_so_once(cli):
    words = " ".join(f"w{i}" for i in range(200))
    status, _, err = cli("--prompt", words, *SMALL_RUN, "--n", 3)
    assert status == 0 and err.count("w199") == 1 and err.count("dropped") == 1
    status, _, err = cli("--prompt", "a", "b", *SMALL_RUN, "--negative", words + " w200")
    assert status == 0 and err.count("w200") == 1


@settings(deadline=None)
@example(["a 2", "a", "a"], 2, 1)
@given(st.lists(st.text("ab1 -2", max_size=4), min_size=1, max_size=5), st.integers(0, 3),
       st.integers(1, 3))
def test_no_two_pictures_share_a_name(tmp_path_factory, prompts, seed, n):
    folder = tmp_path_factory.getbasetemp() / "names"
    seeds = range(seed, seed + n)
    planned = jobs.plan_jobs(folder, prompts, seeds)
    pairs = [(job.prompt, job.seed) for job in planned]
    assert pairs == [(prompt, seed) for prompt in prompts for seed in seeds]
    assert len({job.path for job in planned}) == len(planned) and not folder.exists()


# --------------------------------------------------------------------------------------------------
# Defaults


def test_defaults_come_from_the_checkpoint(cli, tmp_path):
    folder = Path(shutil.copytree(GOLDEN_MODEL, tmp_path / "model"))
    defaults = {"size": 96, "steps": 3, "cfg": 2.0, "score_condition": 5.0, "remask": 1,
                "best_of": 2, "temperature": [1.0, 0.5]}
    edit_json(folder / "scheduler/scheduler_config.json", rate_condition="rate",
              masking_schedule="linear", defaults=defaults)
    status, _, err = cli("--model", folder, "--device", "cpu", "--out", "a.png")
    assert status == 0 and "4/4" in err                       # of the default prompt
    image = open_picture("a.png")
    expected = {"size": "96x96", "steps": "3", "cfg": "2.0", "score-condition": "5.0",
                "remask": "1", "best-of": "2", "temperature": "1.0 0.5", "schedule": "linear"}
    assert image.size == (96, 96) and expected.items() <= image.text.items()
    assert image.text["prompt"] == sample.DEFAULT_PROMPT


def test_defaults_of_published_checkpoints():
    """Those say nothing: 1024 px with compression, 512 without, 48 steps, guidance 9, noise 2 to
    0, cosine."""
    for kind, side in (("compressed", 1024), ("plain", 512)):
        pipe = Pipeline(GOLDEN / kind)
        assert pipe.size == (side, side) and pipe.score == 6.0
        assert pipe.schedule == meissonic.Schedule(48, 9.0, (2.0, 0.0), "cosine", "step")
        assert (pipe.remask, pipe.best_of) == (0, 1)


# --------------------------------------------------------------------------------------------------
# Models in turn


@pytest.fixture
def reads(monkeypatch):
    """Counts the models that are read, and which of their weights are alive."""
    counts = Counter()
    alive = {}
    monkeypatch.setattr(jobs, "Pipeline", Pipeline)           # nothing stays loaded
    for model in (clip.TextEncoder, meissonic.Transformer, vq.VQModel):
        load = model.from_pretrained.__func__

        def from_pretrained(cls, *arguments, load=load, **options):
            made = load(cls, *arguments, **options)
            if next(made.parameters()).device.type != "meta":
                counts[cls.__name__] += 1
                alive[cls.__name__] = [weakref.ref(p) for p in (made, *made.parameters())]
            return made

        monkeypatch.setattr(model, "from_pretrained", classmethod(from_pretrained))

    def living(name):
        return sum(ref() is not None for ref in alive.get(name, ()))

    return counts, living


@pytest.mark.parametrize("flags", ([], ["--best-of", 2],
                                   ["--image", "p.png", "--source", "a heart"]))
def test_each_model_is_read_once_a_turn_and_is_alone(cli, reads, monkeypatch, flags):
    """No text encoder is alive while ids are drawn, no transformer while they are decoded. Only an
    edit reads the VQ model twice: to encode and to decode."""
    counts, living = reads
    others = []
    draw, decode = meissonic.sample, vq.VQModel.decode

    def watched_sample(*arguments):
        others.append(living("TextEncoder") + living("VQModel"))
        return draw(*arguments)

    def watched_decode(*arguments):
        others.append(living("TextEncoder") + living("Transformer"))
        return decode(*arguments)

    monkeypatch.setattr(meissonic, "sample", watched_sample)
    monkeypatch.setattr(vq.VQModel, "decode", watched_decode)
    monkeypatch.setattr(sample, "TURN", 4)
    Image.new("RGB", (64, 64), "red").save("p.png")
    prompts = ("--prompt", "a b", "b c", "c d", "d e", "e f", "f g")
    status, *_ = cli(*prompts, *SMALL_RUN, "--batch", 2, *flags)
    assert status == 0 and len(tree("out")) == 6              # two turns: of 4 pictures and of 2
    assert counts == {"TextEncoder": 2, "Transformer": 2, "VQModel": 3 if "--image" in flags else 2}
    assert len(others) == 9 and sum(others) == 0


def test_equal_prompts_are_encoded_once_a_turn(cli, monkeypatch):
    encoded = []
    forward = clip.TextEncoder.forward
    monkeypatch.setattr(clip.TextEncoder, "forward",
                        lambda self, ids: encoded.append(len(ids)) or forward(self, ids))
    assert cli("--prompt", "a star", "", "a star", *SMALL_RUN, "--n", 2, "--batch", 1)[0] == 0
    assert encoded == [1, 1]


def interrupt_second_call(monkeypatch, error):
    draw, calls = meissonic.sample, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return draw(*arguments)

    monkeypatch.setattr(meissonic, "sample", interrupted)


def test_interrupted_what_is_drawn_is_written(cli, monkeypatch):
    interrupt_second_call(monkeypatch, KeyboardInterrupt)
    status, _, err = cli("--prompt", "a", "b", "c", *SMALL_RUN, "--batch", 1)
    assert status == 130 and err.endswith("\nstopped\n") and tree("out") == ["a-0.png"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_control_c_leaves_no_half_file(tmp_path):
    arguments = ["--prompt", "x", *SMALL_RUN, "--size", 128, "--steps", 16, "--n", 2000,
                 "--batch", 1, "--out", "made"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "sample.py", *map(str, arguments)], cwd=tmp_path, text=True,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores it
    try:
        while process.poll() is None and len(list(tmp_path.glob("made/*.png"))) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err and "stopped" in err
    made = list((tmp_path / "made").iterdir())
    assert 2 <= len(made) < 2000
    assert all(open_picture(path).size == (128, 128) for path in made)


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("size", ("33", "0", "64x33", "16", "abc", "64x", "-64", "1.5", "64x64x64",
                                  ""))
def test_sizes_that_do_not_fit(cli, size):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, f"--size={size}"], size)


def test_a_size_that_does_not_fit_names_one_that_does(cli):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--size", "100x60"], "32", "96x64")


@pytest.mark.parametrize("option, value", (
    ("--steps", "0"), ("--steps", "-3"), ("--steps", "1.5"), ("--steps", "many"), ("--n", "0"),
    ("--batch", "0"), ("--cfg", "nan"), ("--cfg", "high"), ("--dtype", "int4"), ("--seed", "1.5"),
    ("--score-condition", "inf"), ("--remask", "-1"), ("--best-of", "0"), ("--schedule", "sine"),
    ("--seed", 2 ** 63), ("--seed", -2 ** 63 - 1), ("--speed", "3")))
def test_values_that_make_no_sense(cli, option, value):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, f"{option}={value}"], option)


@pytest.mark.parametrize("option", ("--candidates", "--redraws", "--score", "--film", "--bench"))
def test_flags_of_former_versions(cli, option):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, option, "1"], option)


@pytest.mark.parametrize("seed", (2 ** 63 - 1, -2 ** 63))
def test_seeds_of_64_bits(cli, seed):
    assert cli("--prompt", "x", *SMALL_RUN, f"--seed={seed}")[0] == 0
    if seed > 0:
        assert_refused(cli, ["--prompt", "x", *SMALL_RUN, f"--seed={seed}", "--n", 2], "--seed")


def test_outputs_that_cannot_be_written(cli):
    Path("file").write_text("mine")
    Path("folder.png").mkdir()
    for out in ("file", "file/below", "file/below.png", "folder.png", "/proc/nothing/here.png",
                "a.jpg"):
        assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--out", out], out)
    assert Path("file").read_text() == "mine"


def test_several_pictures_do_not_go_into_one_file(cli):
    for flags in (["--prompt", "x", "y"], ["--prompt", "x", "--n", 2]):
        assert_refused(cli, [*flags, *SMALL_RUN, "--out", "a.png"], "a.png")


def test_prompts_that_cannot_be_read(cli):
    """The last one is what Python makes of a byte that is not UTF-8."""
    Path("latin").write_bytes(b"caf\xe9\n")
    Path("empty").touch()
    for name in ("latin", "empty", "nowhere", "."):
        assert_refused(cli, ["--prompt-file", name, *SMALL_RUN], "--prompt-file", name)
    assert_refused(cli, ["--prompt", "a \udcff star", *SMALL_RUN], "UTF-8")


def test_kernels_that_are_not_available(cli, monkeypatch):
    monkeypatch.setenv("MEISSONIC_KERNELS", "triton")
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN], "MEISSONIC_KERNELS")


@pytest.mark.slow
def test_bad_input_as_a_user_sees_it(tmp_path):
    done = shell(["--prompt", "x", *SMALL_RUN, "--size", 33], tmp_path)
    assert done.returncode == 2 and done.stdout == "" and tree(tmp_path) == []
    assert done.stderr.startswith("sample.py: error: size 33x33")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ("sample.py", "train.py"))
def test_compiling_without_a_compiler(name, tmp_path):
    done = shell(["--compile", "--device", "cpu", "--out", "made"], tmp_path, name,
                 CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{name}: error: --compile" in done.stderr and "no-such-compiler" in done.stderr
    assert not (tmp_path / "made").exists()


# --------------------------------------------------------------------------------------------------
# Names of files


NAMES = (
    "", " ", "!?", "\U0001f3a8", "\U0001f5a8", "\U0001d4d0" * 90, "日" * 300, "x" * 300,
    "e\u0301" * 200, "a/../b", "..", "~", "CON", "-", "\ufe0f", "c\x00d", "𒀀" * 60 + "!")


@pytest.mark.parametrize("seed", (0, -2 ** 63, 2 ** 63 - 9))
@pytest.mark.parametrize("prefix", ("", "again-" + "日" * 200 + "-", "x" * 240 + "-"))
def test_names_have_room_for_what_is_appended(prefix, seed):
    """In bytes, for a film of it, a free number and a temporary name; those of these prompts are
    different."""
    prompts = {*NAMES, *(f"{mark}?" for mark in "!?¿‽\U0001f3a8")}
    stems = [jobs.file_stem(prompt, seed, prefix, "-sweep") for prompt in prompts]
    assert len({*stems}) == len(stems) or len(prefix) > 200   # of which 60 bytes are kept
    for stem in stems:
        assert len(f"{stem}-film.gif".encode()) + 20 <= 255
        assert stem.endswith(f"{seed}-sweep") and "/" not in stem and "\0" not in stem


def test_prompts_without_letters_are_told_apart():
    assert jobs.slug("") == "empty"
    slugs = {jobs.slug(prompt) for prompt in ("\U0001f3a8", "\U0001f5a8", "!", "?", "  ")}
    assert len(slugs) == 5 and all(slug.startswith("prompt-") for slug in slugs)


def test_results_are_not_replaced(cli):
    """In a folder a free number is appended. A file that --out names is replaced."""
    base = ("--prompt", "a star", *SMALL_RUN)
    for cfg in (1, 5, 9):
        assert cli(*base, "--cfg", cfg)[0] == 0
    assert tree("out") == ["a-star-0-1.png", "a-star-0-2.png", "a-star-0.png"]
    values = [open_picture(f"out/a-star-0{end}.png").text["cfg"] for end in ("", "-1", "-2")]
    assert values == ["1.0", "5.0", "9.0"]
    for cfg in (1, 5):
        assert cli(*base, "--cfg", cfg, "--out", "a.png")[0] == 0
    assert tree(".") == ["a.png", "out", *(f"out/{name}" for name in tree("out"))]
    assert open_picture("a.png").text["cfg"] == "5.0"


def test_a_free_path_is_free_of_everything(tmp_path):
    """Of films beside the picture, of folders and of links that lead nowhere."""
    path = tmp_path / "a.png"
    assert jobs.free_path(path) == path
    (tmp_path / "a-film.gif").touch()
    (tmp_path / "a-1.png").mkdir()
    (tmp_path / "a-2.png").symlink_to("nowhere")
    assert jobs.free_path(path) == tmp_path / "a-3.png"


@pytest.mark.parametrize("out", (
    "x" * 252 + ".png", "日" * 84 + ".png", "\U0001f3a8" * 60 + ".png", "x" * 256, "a/" * 2040 + "b",
    "y" * 300 + "/b.png"))
def test_names_that_are_too_long_are_refused_at_the_start(cli, monkeypatch, out):
    """Before anything is drawn; the message is short enough to read."""
    monkeypatch.setattr(Pipeline, "fill_in", None)
    status, _, err = cli("--prompt", "x", *SMALL_RUN, "--out", out)
    assert status == 2 and "too long" in err and err.count("\n") == 1 and tree(".") == []


def test_long_names_of_pictures(cli):
    """Of --image and of a picture of --like: they are the beginning of the new name."""
    name = "ж" * 125 + ".png"
    Image.new("RGB", (64, 64), "red").save(name)
    run = (*SMALL_RUN[:6], "--steps", 2)
    assert cli("--image", name, "--strength", 0.5, "--prompt", "ы" * 200, *run)[0] == 0
    made, = Path("out").iterdir()
    assert cli("--like", made, "--out", "again", script="tools.film", *("--frames", 2))[0] == 0
    assert len(tree("again")) == 3


@pytest.mark.parametrize("out, made", (
    ("runs.v2", "runs.v2/a-0.png"), ("new/../q.png", "q.png"), ("~/x", "home/x/a-0.png"),
    ("a.b.c/d.e", "a.b.c/d.e/a-0.png"), ("new/../more/./x", "more/x/a-0.png"),
    ("~nobody-of-that-name/x", "~nobody-of-that-name/x/a-0.png"), (".hidden", ".hidden/a-0.png"),
    ("link.png", "elsewhere/q.png")))
def test_where_pictures_are_written(cli, monkeypatch, out, made):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    Path("elsewhere").mkdir()
    Path("link.png").symlink_to("elsewhere/q.png")
    assert cli("--prompt", "a", *SMALL_RUN, f"--out={out}")[0] == 0
    assert open_picture(made).size == (64, 64)
    assert len([path for path in Path().rglob("*.png") if not path.is_symlink()]) == 1


def test_the_home_folder_in_every_path(monkeypatch):
    """Of sample.py and train.py, in both spellings."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = sample.make_parser()
    for flag in ("out", "like", "prompt-file", "image", "mask", "model", "text-encoder", "lora"):
        for arguments in ([f"--{flag}=~/x"], [f"--{flag}", "~/x"]):
            assert str(vars(parser.parse_args(arguments))[flag.replace("-", "_")]) == "/home/me/x"
    arguments = ["--out=~/o", "--data=~/d", "--init=~/i", "--text-encoder=~/t"]
    args = options.parse_arguments(train.PRESETS, train.STAGES, "", arguments)
    assert (str(args.out), args.data, args.init, args.text_encoder) == (
        "/home/me/o", "/home/me/d", "/home/me/i", "/home/me/t")


# --------------------------------------------------------------------------------------------------
# Prompts from files, cut prompts, seeds


def test_lines_of_a_prompt_file(tmp_path):
    """Blank ones are skipped; U+2028, U+0085, form feeds and lone carriage returns are text."""
    file = tmp_path / "p"
    file.write_bytes("\ufeffa\u2028b\r\n\r\n \t \nc\x0cd\x85e\x0b\n\nf\rg".encode())
    assert jobs.read_lines(file) == ["a\u2028b", "c\x0cd\x85e\x0b", "f\rg"]
    file.write_bytes(b"\n \r\n")
    with pytest.raises(UserError, match="no prompts"):
        jobs.read_lines(file)


@pytest.mark.parametrize("name", ("pipe", "/dev/zero", "large", "link", "/proc/self/mem"))
def test_prompt_files_that_never_end(cli, name):
    os.mkfifo("pipe")
    Path("link").symlink_to("/dev/zero")
    with open("large", "wb") as file:
        file.truncate(10 ** 13)
    assert_refused(cli, ["--prompt-file", name, *SMALL_RUN], "--prompt-file", name)


def test_one_line_about_the_users_own_prompt_that_is_cut(cli):
    """None about the prompts without one part each, by which candidates are judged."""
    words = ", ".join(f"a red circle v{i}" for i in range(40))
    status, _, err = cli("--prompt", words, *SMALL_RUN, "--best-of", 3)
    assert status == 0 and err.count("cut to") == 1 and "v39" in err
    status, _, err = cli("--prompt", "w" * 9000 + " end", *SMALL_RUN)
    assert status == 0 and err.count("cut to") == 1


def test_a_seed_of_minus_1_is_drawn(cli):
    """Printed and stored, so that the picture can be made again. Other negative ones are seeds."""
    seeds = set()
    for number in range(3):
        status, out, _ = cli("--prompt", "x", *SMALL_RUN, "--seed", -1, "--out", f"{number}.png")
        seed = open_picture(f"{number}.png").text["seed"]
        assert status == 0 and out.splitlines()[0].endswith(f"seed: {seed}") and int(seed) >= 0
        seeds.add(seed)
    assert len(seeds) == 3
    assert cli("--prompt", "x", *SMALL_RUN, "--seed=-2", "--n", 2)[0] == 0
    assert tree("out") == ["x--1.png", "x--2.png"]
    assert cli("--like", "out/x--1.png", "--out", "a.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("out/x--1.png").read_bytes()


# --------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.parametrize("flag, limit", (
    ("--n", 100_000), ("--best-of", 1000), ("--remask", 1000), ("--steps", 10_000),
    ("--batch", 1024), ("--feather", 256)))
def test_numbers_have_an_upper_bound(cli, flag, limit):
    parser = sample.make_parser()
    assert limit in vars(parser.parse_args([flag, str(limit)])).values()
    for value in (limit + 1, 10 ** 12, "9" * 5000, "²", "٣", "1_0", " 1", "+1", "1e3"):
        assert_refused(cli, ["--prompt", "x", *SMALL_RUN, f"{flag}={value}"], flag, limit)


@pytest.mark.parametrize("flag, value", (
    ("--seed", "9" * 5000), ("--seed", "²"), ("--seed", "٣"), ("--size", "٦٤"), ("--size", "²"),
    ("--size", "9" * 5000), ("--size", "4128x4096"), ("--outpaint", "²,1,1,1"), ("--cfg", "1e39"),
    ("--temperature", "1e7"), ("--score-condition", "-1e300"), ("--outpaint", "9" * 5000)))
def test_digits_and_numbers_that_no_flag_takes(cli, flag, value):
    values = [value, "0"] if flag == "--temperature" else [value]
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, *([flag, *values] if len(values) > 1
                                                       else [f"{flag}={value}"])], flag)


def test_more_pictures_than_a_run_has(cli):
    Path("p").write_text("a\n" * 101)
    assert_refused(cli, ["--prompt-file", "p", *SMALL_RUN, "--n", 1000], "101000 pictures")


def test_a_batch_that_no_memory_holds(cli):
    for flags in (["--size", 4096, "--batch", 64, "--n", 64], ["--size", 2048, "--n", 1024,
                                                               "--batch", 1024]):
        assert_refused(cli, ["--prompt", "x", *SMALL_RUN, *flags], "--batch", "tokens")


def test_out_of_memory_mentions_candidates(cli, monkeypatch):
    monkeypatch.setattr(Pipeline, "fill_in", lambda *_, **__: torch.empty(2 ** 60))
    status, _, err = cli("--prompt", "x", *SMALL_RUN, "--best-of", 2)
    assert status == 2 and "--best-of" in err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# Broken models


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def remove(part):
    return lambda folder: shutil.rmtree(folder / part), part


def change(file, word, **changes):
    return lambda folder: edit_json(folder / file, **changes), word


def write(file, text, word):
    return lambda folder: (folder / file).write_text(text), word


def truncate(file, word):
    return lambda folder: cut(folder / file), word


def other_text_encoder(folder):
    """It has fewer words than the tokenizer."""
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(GOLDEN / "plain/text_encoder", folder / "text_encoder")


SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER = "tokenizer/tokenizer_config.json"
BROKEN = {                                # name: (what is done to a model, word of the error)
    "no transformer": remove("transformer"),
    "no vqvae": remove("vqvae"),
    "no text encoder": remove("text_encoder"),
    "no tokenizer": remove("tokenizer"),
    "no scheduler": remove("scheduler"),
    "cut weights": truncate("vqvae/diffusion_pytorch_model.safetensors", "vqvae"),
    "cut config": truncate("transformer/config.json", "transformer"),
    "unknown key": change("vqvae/config.json", "sparkle", sparkle=1),
    "wrong width": change("text_encoder/config.json", "text_encoder", intermediate_size=40),
    "scheduler is a list": write(SCHEDULER, "[]", "scheduler"),
    "cut scheduler": truncate(SCHEDULER, "scheduler"),
    "unknown timesteps": change(SCHEDULER, "speed", rate_condition="speed"),
    "unknown schedule": change(SCHEDULER, "sine", masking_schedule="sine"),
    "mask token": change(SCHEDULER, "mask_token_id", mask_token_id=5),
    "defaults are a list": change(SCHEDULER, "scheduler", defaults=[3]),
    "unknown default": change(SCHEDULER, "stepz", defaults={"stepz": 3}),
    "former name of remask": change(SCHEDULER, "redraws", defaults={"redraws": 4}),
    "former name of best_of": change(SCHEDULER, "candidates", defaults={"candidates": 8}),
    "merges": write("tokenizer/merges.txt", "#version\nqq zz\n", "tokenizer"),
    "vocabulary": write("tokenizer/vocab.json", "{}", "tokenizer"),
    "cut vocabulary": truncate("tokenizer/vocab.json", "tokenizer"),
    "tokenizer config is a list": write(TOKENIZER, "[1]", "tokenizer"),
    "no prompt length": change(TOKENIZER, "tokenizer", model_max_length=None),
    "longer prompts than positions": change(TOKENIZER, "token", model_max_length=99),
    "another text encoder": (other_text_encoder, "token"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models(cli, tmp_path, name):
    folder = Path(shutil.copytree(GOLDEN_MODEL, tmp_path / "model"))
    harm, word = BROKEN[name]
    harm(folder)
    prompt = "a red circle above a blue square"
    assert_refused(cli, ["--prompt", prompt, *SMALL_RUN, "--model", folder], folder, word)


@pytest.mark.parametrize("file", (SCHEDULER, "vqvae/config.json", "tokenizer/vocab.json",
                                  "transformer/diffusion_pytorch_model.safetensors"))
@pytest.mark.parametrize("kind", ("pipe", "zero", "folder"))
def test_files_of_a_model_that_never_end(cli, tmp_path, file, kind):
    folder = Path(shutil.copytree(GOLDEN_MODEL, tmp_path / "model"))
    (folder / file).unlink()
    if kind == "pipe":
        os.mkfifo(folder / file)
    elif kind == "zero":
        (folder / file).symlink_to("/dev/zero")
    else:
        (folder / file).mkdir()
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--model", folder], folder)


def test_folders_that_are_no_models(cli, tmp_path):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--model", tmp_path], tmp_path)
    lora = tmp_path / "nowhere.safetensors"
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--lora", lora], lora)


# --------------------------------------------------------------------------------------------------
# Errors


OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate "
                        "memory: you tried to allocate 1 bytes. Error code 12"),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
@pytest.mark.parametrize("place", ("check_size", "fill_in"))
def test_out_of_memory_says_what_to_lower(cli, monkeypatch, name, place):
    def full(*_, **__):
        raise OUT_OF_MEMORY[name]

    monkeypatch.setattr(Pipeline, place, full)
    status, out, err = cli("--prompt", "x", *SMALL_RUN)
    last = err.splitlines()[-1]                               # after the progress bar
    assert status == 2 and "wrote" not in out and tree(".") == []
    assert last.startswith("sample.py: error: out of memory") and "--size" in last


@pytest.mark.parametrize("exponent", (30, 40, 62))
def test_sizes_beyond_any_memory(cli, exponent):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--size", 2 ** exponent], "--size")


def test_other_errors_are_not_hidden(cli, monkeypatch):
    """But what was drawn before is written."""
    interrupt_second_call(monkeypatch, RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        cli("--prompt", "x", "y", *SMALL_RUN, "--batch", 1)
    assert tree("out") == ["x-0.png"]


def test_a_write_that_fails_leaves_nothing(cli, monkeypatch):
    def half(self, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", half)
    status, _, err = cli("--prompt", "x", *SMALL_RUN, "--out", "made")
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("sample.py: error:") and "No space left" in last
    assert tree(".") in ([], ["made"])


def test_exit_statuses(capsys):
    """2 and one line for what a user can mend, 130 for Ctrl-C; a script may name its own words."""
    def failing(error):
        def function():
            raise error
        return function

    for error, status, words in ((UserError("mend this"), 2, "name: error: mend this\n"),
                                 (OSError(2, "No such file", "f"), 2, "f: No such file\n"),
                                 (MemoryError(), 2, "out of memory: less\n"),
                                 (KeyboardInterrupt(), 130, "\npaused\n")):
        with pytest.raises(SystemExit) as stop:
            run_script("name", failing(error), out_of_memory="less", stopped="paused")
        assert stop.value.code == status and capsys.readouterr().err.endswith(words)
    with pytest.raises(MemoryError):
        run_script("name", failing(MemoryError()))

    @script("name")
    def main(argv=None):
        print(argv)

    main(["x"])
    assert capsys.readouterr().out == "['x']\n"


def test_every_flag_has_help(cli):
    status, out, _ = cli("--help")
    assert status == 0
    assert all(action.help for action in sample.make_parser()._actions)
    assert "python sample.py --prompt" in out


# --------------------------------------------------------------------------------------------------
# The bundled model


@pytest.mark.slow
def test_the_first_command_makes_the_right_picture(cli):
    """With the default prompt; the reader of the world of shapes sees what it says."""
    assert cli("--device", "cpu", "--model", "shapes", "--out", "a.png")[0] == 0
    objects = (PromptObject("circle", "red"), PromptObject("square", "blue"))
    spec = PromptSpec("position", objects, "above", "white")
    assert image_matches(open_picture("a.png"), spec)
