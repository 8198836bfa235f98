"""The command line as a user runs it, most of it in this process: pictures, bad input, models from the hub."""
import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import GOLDEN, ROOT, edit_json
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

import data
import meissonic
import sample
import vq
from pipeline import cached, hub_files, shortened

MODEL = GOLDEN / "compressed"
SMALL = ("--model", MODEL, "--device", "cpu", "--dtype", "float32", "--size", 64, "--steps", 2)
PARTS = {"transformer": "diffusion_pytorch_model", "vqvae": "diffusion_pytorch_model", "text_encoder": "model"}


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


def assert_refused(cli, arguments, *words):
    """One line on stderr with these words in it, exit status 2, nothing written."""
    before = tree(".")
    status, out, err = cli(*arguments)
    assert status == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1, (status, err)
    assert len(err) < 500 and all(str(w) in err for w in words), err
    assert "wrote" not in out and tree(".") == before


def picture(path):
    image = Image.open(path)
    image.load()
    return image


def environment(**changes):
    """As a user has it: nothing of this test run's, the hub unreachable unless told otherwise."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRITON_", "PYTEST"))}
    return {**keep, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **{k: str(v) for k, v in changes.items()}}


def shell(arguments, cwd, **env):
    return subprocess.run([sys.executable, ROOT / "sample.py", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env=environment(**env))


# ---------------------------------------------------------------------------------------------------------
# Pictures


def test_as_a_user_runs_it(tmp_path):
    done = shell(["--prompt", "a red circle", *SMALL, "--out", "made"], tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "made" / "a-red-circle-0.png"
    assert picture(file).size == (64, 64) and picture(file).mode == "RGB"
    assert f"wrote {Path('made') / file.name}" in done.stdout
    assert "2/2" in done.stderr                                                          # the progress bar
    assert tree(tmp_path) == ["made", "made/a-red-circle-0.png"]


def test_one_line_says_what_runs(cli):
    status, out, _ = cli("--prompt", "a star", *SMALL, "--seed", 5)
    line = out.splitlines()[0]
    assert status == 0
    for word in (str(MODEL), "device: cpu", "dtype: float32", "kernels:", "seed: 5"):
        assert word in line


def test_out_is_a_file(cli):
    assert cli("--prompt", "a star", *SMALL, "--out", "deep/er/star.png")[0] == 0
    assert tree(".") == ["deep", "deep/er", "deep/er/star.png"] and picture("deep/er/star.png").format == "PNG"


def test_out_is_a_folder_that_exists(cli):
    Path("a.folder").mkdir()
    Path("a.folder/mine.txt").touch()
    assert cli("--prompt", "a star", *SMALL, "--out", "a.folder")[0] == 0
    assert tree("a.folder") == ["a-star-0.png", "mine.txt"]


def test_the_default_folder(cli):
    assert cli("--prompt", "a star", *SMALL)[0] == 0
    assert tree(".") == ["out", "out/a-star-0.png"]


def test_several_prompts_and_seeds(cli):
    status, out, err = cli("--prompt", "a star", "A  Heart!", *SMALL, "--n", 2, "--seed", 7)
    names = ["a-heart-7.png", "a-heart-8.png", "a-star-7.png", "a-star-8.png"]
    assert status == 0 and tree("out") == names and out.count("wrote ") == 4
    assert len({picture(Path("out") / n).tobytes() for n in names}) == 4


def test_prompt_file(cli):
    Path("prompts.txt").write_bytes("a star\r\nein grüner Pfeil\n".encode())
    assert cli("--prompt-file", "prompts.txt", "--prompt", "a cross", *SMALL)[0] == 0
    assert tree("out") == ["a-cross-0.png", "a-star-0.png", "ein-grüner-pfeil-0.png"]


def test_the_empty_prompt(cli):
    assert cli("--prompt", "", *SMALL)[0] == 0
    assert tree("out") == ["empty-0.png"]


@pytest.mark.parametrize("prompt", ("日本語の絵", "🎨", "a/b\\c..", "x" * 500, "a\nb", "<|endoftext|>", "'", "\t"))
def test_any_prompt_makes_a_picture(cli, prompt):
    assert cli("--prompt", prompt, *SMALL)[0] == 0
    file, = Path("out").iterdir()
    assert picture(file).size == (64, 64)


def test_a_prompt_that_is_not_utf8(cli):
    """What Python makes of the byte 0xff on a command line: a picture or a plain error, no traceback."""
    status, _, err = cli("--prompt", "a \udcff star", *SMALL)
    assert status == 0 or (status == 2 and err.count("\n") == 1)


def test_rectangles(cli):
    assert cli("--prompt", "a star", *SMALL, "--size", "96x32", "--out", "a.png")[0] == 0
    assert picture("a.png").size == (96, 32)


@pytest.mark.parametrize("option", (["--steps", 5], ["--cfg", 1], ["--seed", 1], ["--negative", "a heart"], ["--temperature", 0, 0],
                                    ["--redraws", 1], ["--candidates", 4], ["--score-condition", 1]), ids=lambda o: o[0])
def test_options_reach_the_picture(cli, option):
    """Each changes it, by itself; the same command again does not."""
    base = ("--prompt", "a red star", *SMALL, "--steps", 6, "--size", 128)
    for name, extra in (("one", []), ("two", []), ("other", option)):
        assert cli(*base, *extra, "--out", f"{name}.png")[0] == 0
    one, two, other = (Path(f"{n}.png").read_bytes() for n in ("one", "two", "other"))
    assert one == two and picture("one.png").tobytes() != picture("other.png").tobytes()


def test_guidance_one_is_without_the_negative(cli):
    for name in ("a heart", "a blue arrow"):
        assert cli("--prompt", "a star", *SMALL, "--cfg", 1, "--negative", name, "--out", f"{name}.png")[0] == 0
    assert np.array_equal(*(np.asarray(picture(f"{name}.png")) for name in ("a heart", "a blue arrow")))


def test_a_picture_does_not_depend_on_its_batch(cli):
    """Its seed and prompt alone, however many are made at a time: the same tokens, so the same pixels but for rounding."""
    base = (*SMALL, "--size", 128, "--steps", 4)
    assert cli("--prompt", "a star", "a heart", *base, "--n", 2, "--seed", 3, "--out", "all")[0] == 0
    assert cli("--prompt", "a heart", "a cross", *base, "--seed", 4, "--batch", 1, "--out", "one")[0] == 0
    together, alone = (np.asarray(picture(f"{f}/a-heart-4.png"), int) for f in ("all", "one"))
    assert np.abs(together - alone).max() <= 1


@pytest.mark.parametrize("able", (False, True))
def test_the_default_dtype_on_a_cpu(monkeypatch, able):
    monkeypatch.setattr("pipeline.multiplies_bfloat16", lambda: able)
    dtype, rounded, _ = sample.choose_dtype(None, torch.device("cpu"))
    assert dtype == (torch.bfloat16 if able else torch.float32) and rounded is None
    assert sample.choose_dtype("int8", torch.device("cpu"))[:2] == (dtype, torch.int8)
    assert sample.choose_dtype("float32", torch.device("cpu"))[:2] == (torch.float32, None)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision(cli, dtype):
    status, out, _ = cli("--prompt", "a star", *SMALL, "--dtype", dtype, "--out", "a.png")
    assert status == 0 and f"dtype: {dtype}" in out and picture("a.png").getextrema() != ((0, 0),) * 3


def test_the_decoder_is_never_float16():
    """The published one overflows (force_upcast)."""
    pipeline = sample.Pipeline(MODEL, dtype=torch.float16)
    kinds = lambda m: {p.dtype for p in m.parameters()}
    assert kinds(pipeline.vq) == {torch.float32} and kinds(pipeline.transformer) == kinds(pipeline.encoder) == {torch.float16}


def test_a_prompt_that_is_cut_says_so_once(cli):
    words = " ".join(f"w{i}" for i in range(200))
    status, _, err = cli("--prompt", words, *SMALL, "--n", 3)
    assert status == 0 and err.count("w199") == 1 and err.count("dropped") == 1
    status, _, err = cli("--prompt", "a", "b", *SMALL, "--negative", words)
    assert status == 0 and err.count("w199") == 1


@settings(deadline=None)
@example(["a 2", "a", "a"], 2, 1)
@given(st.lists(st.text("ab1 -2", max_size=4), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 3))
def test_no_two_pictures_share_a_name(tmp_path_factory, prompts, seed, n):
    jobs = sample.output_paths(tmp_path_factory.getbasetemp() / "names", prompts, range(seed, seed + n))
    assert [(p, s) for p, s, _ in jobs] == [(p, s) for p in prompts for s in range(seed, seed + n)]
    assert len({path for _, _, path in jobs}) == len(jobs)


def test_defaults_come_from_the_checkpoint(cli, tmp_path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    edit_json(folder / "scheduler/scheduler_config.json", rate_condition="rate",
              defaults=dict(size=96, steps=3, cfg=2.0, score_condition=5.0))
    status, _, err = cli("--model", folder, "--device", "cpu", "--out", "a.png")              # and of the default prompt
    assert status == 0 and picture("a.png").size == (96, 96) and "3/3" in err
    pipeline = sample.Pipeline(folder)
    assert (pipeline.convention, pipeline.cfg, pipeline.score_condition) == ("rate", 2.0, 5.0)


def test_published_defaults():
    """A checkpoint without defaults is a published one: 1024 px with compression, 512 without, 48 steps, guidance 9,
    noise 2 to 0."""
    for kind, side in (("compressed", 1024), ("plain", 512)):
        p = sample.Pipeline(GOLDEN / kind)
        assert (p.size, p.steps, p.cfg, p.score_condition, p.convention) == ((side, side), 48, 9.0, 6.0, "step")
        assert (p.temperature, p.redraws, p.candidates) == ((2.0, 0.0), 0, 1)


@pytest.mark.parametrize("kind", ("compressed", "plain"))
def test_the_pipeline_says_the_size_to_the_model(kind, monkeypatch):
    """Micro conditions: width, height, no crop, score; tokens as rows of the picture's height."""
    seen, draw = [], meissonic.sample
    monkeypatch.setattr(meissonic, "sample", lambda model, text, negative, tokens, *a, **k: (
        seen.append((text, negative, tokens)), draw(model, text, negative, tokens, *a, **k))[1])
    pipeline = sample.Pipeline(GOLDEN / kind)
    image, = pipeline(["a star"], [0], size=(96, 64), steps=1, score=4.5)
    (text, negative, tokens), f = seen[0], pipeline.vq.config.f
    assert text.micro_conds.tolist() == negative.micro_conds.tolist() == [[96, 64, 0, 0, 4.5]]
    assert tokens.shape == (1, 64 // f, 96 // f) and (tokens == 71).all() and image.size == (96, 64)


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("size", ("33", "0", "64x33", "16", "abc", "64x", "-64", "1.5", "64x64x64", ""))
def test_sizes_that_do_not_fit(cli, size):
    assert_refused(cli, ["--prompt", "x", *SMALL, f"--size={size}"], size)


def test_a_size_that_does_not_fit_names_one_that_does(cli):
    assert_refused(cli, ["--prompt", "x", *SMALL, "--size", "100x60"], "32", "96x64")


@pytest.mark.parametrize("option, value", (
    ("--steps", "0"), ("--steps", "-3"), ("--steps", "1.5"), ("--steps", "many"), ("--n", "0"), ("--batch", "0"), ("--cfg", "nan"),
    ("--cfg", "high"), ("--dtype", "int4"), ("--seed", "1.5"), ("--score-condition", "inf"), ("--score", "0"),
    ("--speed", "3")))
def test_values_that_make_no_sense(cli, option, value):
    assert_refused(cli, ["--prompt", "x", *SMALL, f"{option}={value}"], option)


@pytest.mark.parametrize("seed", (2 ** 64, -2 ** 63 - 1, 2 ** 63))
def test_seeds_beyond_64_bits(cli, seed):
    assert_refused(cli, ["--prompt", "x", *SMALL, "--seed", seed], "--seed")


@pytest.mark.parametrize("seed", (2 ** 63 - 1, -2 ** 63))
def test_seeds_of_64_bits(cli, seed):
    assert cli("--prompt", "x", *SMALL, f"--seed={seed}")[0] == 0


@pytest.mark.parametrize("device", ("bogus", "cuda:99", "meta", "hpu", "xla", "privateuseone", ""))
def test_unknown_devices(cli, device):
    assert_refused(cli, ["--prompt", "x", *SMALL, f"--device={device}"], "device", device)


@pytest.mark.parametrize("model", ("nowhere", "./no/where", "/no/where", "a b/c", "too/many/parts", ""))
def test_models_that_are_not_there(cli, model):
    assert_refused(cli, ["--prompt", "x", *SMALL, f"--model={model}"], model)


@pytest.mark.parametrize("model", ("bad--name/model", "-a/b", "a/b.", "ä/ö", "a/..b"))
def test_hub_names_that_the_hub_refuses(cli, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", no_network)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    assert_refused(cli, ["--prompt", "x", *SMALL, f"--model={model}"], model)


def no_network(*_, **__):
    raise ConnectionError("the network is not part of this test")


def test_a_folder_that_is_no_model(cli, tmp_path):
    assert_refused(cli, ["--prompt", "x", *SMALL, "--model", tmp_path], tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


BREAKS = dict(
    no_transformer=(lambda f: shutil.rmtree(f / "transformer"), "transformer"),
    no_vqvae=(lambda f: shutil.rmtree(f / "vqvae"), "vqvae"),
    no_text_encoder=(lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder"),
    no_tokenizer=(lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    no_scheduler=(lambda f: shutil.rmtree(f / "scheduler"), "scheduler"),
    cut_weights=(lambda f: cut(f / "vqvae/diffusion_pytorch_model.safetensors"), "vqvae"),
    cut_config=(lambda f: cut(f / "transformer/config.json"), "transformer"),
    unknown_key=(lambda f: edit_json(f / "vqvae/config.json", sparkle=1), "sparkle"),
    wrong_width=(lambda f: edit_json(f / "text_encoder/config.json", intermediate_size=40), "text_encoder"),
    scheduler_list=(lambda f: (f / "scheduler/scheduler_config.json").write_text("[]"), "scheduler"),
    scheduler_cut=(lambda f: cut(f / "scheduler/scheduler_config.json"), "scheduler"),
    rate=(lambda f: edit_json(f / "scheduler/scheduler_config.json", rate_condition="speed"), "speed"),
    mask=(lambda f: edit_json(f / "scheduler/scheduler_config.json", mask_token_id=5), "mask_token_id"),
    defaults=(lambda f: edit_json(f / "scheduler/scheduler_config.json", defaults=[3]), "scheduler"),
    default=(lambda f: edit_json(f / "scheduler/scheduler_config.json", defaults={"stepz": 3}), "stepz"),
    merges=(lambda f: (f / "tokenizer/merges.txt").write_text("#version\nqq zz\n"), "tokenizer"),
    vocab=(lambda f: (f / "tokenizer/vocab.json").write_text("{}"), "tokenizer"),
    vocab_cut=(lambda f: cut(f / "tokenizer/vocab.json"), "tokenizer"),
    tokenizer_config=(lambda f: (f / "tokenizer/tokenizer_config.json").write_text("[1]"), "tokenizer"),
    tokenizer_length=(lambda f: edit_json(f / "tokenizer/tokenizer_config.json", model_max_length=None), "tokenizer"),
    too_long=(lambda f: edit_json(f / "tokenizer/tokenizer_config.json", model_max_length=99), "token"),
    other_text_encoder=(lambda f: (shutil.rmtree(f / "text_encoder"),
                                   shutil.copytree(GOLDEN / "plain/text_encoder", f / "text_encoder")), "token"))


@pytest.mark.parametrize("name", BREAKS)
def test_broken_models(cli, tmp_path, name):
    """`other_text_encoder` has fewer words than the tokenizer; `too_long` more positions than the encoder."""
    folder, (harm, word) = Path(shutil.copytree(MODEL, tmp_path / "model")), BREAKS[name]
    harm(folder)
    assert_refused(cli, ["--prompt", "a red circle above a blue square", *SMALL, "--model", folder], word)


def test_outputs_that_cannot_be_written(cli):
    Path("file").write_text("mine")
    Path("folder.png").mkdir()
    for out in ("file", "file/below", "file/below.png", "folder.png", "/proc/nothing/here.png", "a.jpg"):
        assert_refused(cli, ["--prompt", "x", *SMALL, "--out", out], out)
    assert Path("file").read_text() == "mine"


def test_several_pictures_do_not_go_into_one_file(cli):
    assert_refused(cli, ["--prompt", "x", "y", *SMALL, "--out", "a.png"], "a.png")
    assert_refused(cli, ["--prompt", "x", *SMALL, "--n", 2, "--out", "a.png"], "a.png")


def test_prompt_files_that_cannot_be_read(cli):
    Path("latin").write_bytes(b"caf\xe9\n")
    Path("empty").touch()
    for name in ("latin", "empty", "nowhere", "."):
        assert_refused(cli, ["--prompt-file", name, *SMALL], "--prompt-file", name)


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: "
                                                "you tried to allocate 1 bytes. Error code 12 (Cannot allocate memory)")))
@pytest.mark.parametrize("place", ("Pipeline.__init__", "Pipeline.draw"))
def test_out_of_memory_says_what_to_lower(cli, monkeypatch, error, place):
    def full(*_, **__):
        raise error
    monkeypatch.setattr(sample.Pipeline, place.split(".")[1], full)
    assert_refused(cli, ["--prompt", "x", *SMALL], "out of memory", "--size")


@pytest.mark.parametrize("exponent", (30, 40, 62))
def test_sizes_beyond_any_memory(cli, exponent):
    assert_refused(cli, ["--prompt", "x", *SMALL, "--size", 2 ** exponent], "--size")


def test_other_errors_are_not_hidden(cli, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a defect")
    monkeypatch.setattr(sample.Pipeline, "draw", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        cli("--prompt", "x", *SMALL)


def test_kernels_that_are_not_there(cli, monkeypatch):
    monkeypatch.setenv("MEISSONIC_KERNELS", "triton")
    assert_refused(cli, ["--prompt", "x", *SMALL], "MEISSONIC_KERNELS")


@pytest.mark.parametrize("script", ("sample.py", "train.py"))
def test_without_a_compiler(script, tmp_path):
    """--compile says at once what it lacks."""
    done = subprocess.run([sys.executable, ROOT / script, "--compile", "--device", "cpu", "--out", tmp_path / "made"], capture_output=True,
                          text=True, env=environment(CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{script}: error: --compile" in done.stderr and "no-such-compiler" in done.stderr and not (tmp_path / "made").exists()


def test_bad_input_as_a_user_sees_it(tmp_path):
    done = shell(["--prompt", "x", *SMALL, "--size", 33], tmp_path)
    assert done.returncode == 2 and done.stdout == "" and tree(tmp_path) == []
    assert done.stderr.startswith("sample.py: error: size 33x33") and done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_control_c_leaves_no_half_file(tmp_path):
    arguments = ["--prompt", "x", *SMALL, "--size", 128, "--steps", 16, "--n", 2000, "--batch", 1, "--out", "made"]
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *map(str, arguments)], cwd=tmp_path, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell's & ignores it
    try:
        while process.poll() is None and len(list(tmp_path.glob("made/*.png"))) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err and "stopped" in err
    made = list((tmp_path / "made").iterdir())
    assert 2 <= len(made) < 2000 and all(picture(p).size == (128, 128) for p in made)


def test_a_write_that_fails_leaves_nothing(cli, monkeypatch):
    def half(self, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(Image.Image, "save", half)
    status, _, err = cli("--prompt", "x", *SMALL, "--out", "made")
    assert status == 2 and "No space left" in err and err.splitlines()[-1].startswith("sample.py: error:")
    assert tree(".") in ([], ["made"])


# ---------------------------------------------------------------------------------------------------------
# Scoring


class Artist:
    """A pipeline that draws what the captions say, but for every `wrong`th picture."""
    def __init__(self, wrong=0):
        self.claims = {t: c for task in data.TASKS + ("unseen",) for t, c in data.test_claims(task, 8)}
        self.wrong, self.seeds = wrong, []

    def __call__(self, prompts, seeds, **settings):
        self.seeds += list(seeds)
        scenes = [data.sample_scene(np.random.default_rng(s), self.claims[p]) for p, s in zip(prompts, seeds)]
        blank = data.Scene("white", ())
        return [data.draw(blank if self.wrong and s % self.wrong == 0 else scene, 128) for scene, s in zip(scenes, seeds)]


def test_score():
    right, half = Artist(), Artist(wrong=2)
    shares = sample.score_tasks(right, number=8, batch=5, progress=iter)
    assert shares.keys() == {*data.TASKS, "unseen", "overall"} and min(shares.values()) >= 0.98
    assert right.seeds == list(range(56))
    assert all(abs(s - 0.5) < 0.01 for s in sample.score_tasks(half, number=8, batch=5, progress=iter).values())


def test_score_on_the_command_line(cli):
    status, out, _ = cli(*SMALL, "--score", 1)
    lines = out.splitlines()[1:]
    assert status == 0 and [line.split()[0] for line in lines] == [*data.TASKS, "unseen", "overall"] and tree(".") == []


# ---------------------------------------------------------------------------------------------------------
# Models by name


def test_auto_without_a_gpu_says_why(cli, monkeypatch):
    monkeypatch.setattr("pipeline.BUNDLED", MODEL)
    monkeypatch.setattr(sample, "BUNDLED", MODEL)
    status, out, _ = cli("--prompt", "x", "--device", "cpu", "--size", 64, "--steps", 1)
    line = out.splitlines()[0]
    assert status == 0 and "shapes" in line and "no CUDA GPU" in line


def test_auto_with_a_gpu(monkeypatch, tmp_path):
    """From the cache, else fetched, else the bundled model with the reason."""
    find = lambda: sample.find_model("auto", torch.device("cuda"), torch.float16)
    monkeypatch.setattr("pipeline.cached", lambda repo, dtype: tmp_path / repo)
    assert find()[0] == tmp_path / "MeissonFlow/Meissonic"
    monkeypatch.setattr("pipeline.cached", lambda repo, dtype: None)
    monkeypatch.setattr("pipeline.fetch", lambda repo, dtype: tmp_path / "fetched" / repo)
    assert find()[0] == tmp_path / "fetched" / "MeissonFlow/Meissonic"

    def refuse(repo, dtype):
        raise sample.UserError("the network is down")
    monkeypatch.setattr("pipeline.fetch", refuse)
    folder, why = find()
    assert folder == sample.BUNDLED and "shapes" in why and "the network is down" in why


def test_names_of_models(monkeypatch):
    seen = []
    monkeypatch.setattr("pipeline.cached", lambda repo, dtype: seen.append(repo) or Path(repo))
    for name in ("meissonic", "monetico", "somebody/something-1.0_x"):
        sample.find_model(name, torch.device("cpu"), torch.float32)
    assert seen == ["MeissonFlow/Meissonic", "Collov-Labs/Monetico", "somebody/something-1.0_x"]
    assert sample.find_model("shapes", torch.device("cuda"), torch.float32)[0] == sample.BUNDLED
    assert sample.find_model(str(MODEL), torch.device("cpu"), torch.float32)[0] == MODEL


def files_of(folder):
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]


NEEDED = [n for n in files_of(MODEL) if "/" in n and not n.endswith(".safetensors")] + ["model_index.json"]
SURPLUS = ["README.md", ".gitattributes", "assets/demo.png", "transformer/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin",
           "vqvae/diffusion_pytorch_model.msgpack", "transformer/checkpoint/diffusion_pytorch_model.safetensors", "unet.safetensors"]


def weights(half=(), full=PARTS):
    return [f"{p}/{PARTS[p]}.safetensors" for p in full] + [f"{p}/{PARTS[p]}.fp16.safetensors" for p in half]


@pytest.mark.parametrize("half", (torch.float16, torch.bfloat16))
def test_hub_files_of_a_repository_with_twins(half):
    """All parts once: twins for 16 bits, but the text encoder in full (its twin is faulty)."""
    names = NEEDED + SURPLUS + weights(half=PARTS)
    assert sorted(hub_files(names, torch.float32)) == sorted(NEEDED + weights())
    assert sorted(hub_files(names, half)) == sorted(
        NEEDED + weights(half=("transformer", "vqvae"), full=("text_encoder",)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_hub_files_of_a_repository_with_one_form(dtype):
    for stored in (weights(), weights(half=PARTS, full=()), weights(half=("vqvae",), full=("transformer", "text_encoder"))):
        assert sorted(hub_files(NEEDED + SURPLUS + stored, dtype)) == sorted(NEEDED + stored)


SHARDS = [f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
HALVES = [f"transformer/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = "transformer/diffusion_pytorch_model.safetensors.index"


def test_hub_files_of_shards():
    rest = NEEDED + weights(full=("vqvae", "text_encoder"))
    names = rest + SURPLUS + SHARDS + HALVES + [f"{INDEX}.json", f"{INDEX}.fp16.json"]
    assert sorted(hub_files(names, torch.float32)) == sorted(rest + SHARDS + [f"{INDEX}.json"])
    assert sorted(hub_files(names, torch.float16)) == sorted(rest + HALVES + [f"{INDEX}.fp16.json"])


def test_hub_files_takes_what_would_be_read():
    """Beside a whole file neither its shards nor other weights of the folder are needed."""
    names = NEEDED + weights() + SHARDS + [f"{INDEX}.json", "transformer/ema.safetensors"]
    assert sorted(hub_files(names, torch.float32)) == sorted(NEEDED + weights())


def fill_cache(home, repo="somebody/something"):
    """Lay golden/compressed out as the hub's own client would."""
    repository = home / "hub" / f"models--{repo.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return Path(shutil.copytree(MODEL, repository / "snapshots" / ("a" * 40)))


def test_a_cached_model_needs_no_network(tmp_path):
    fill_cache(tmp_path / "home")
    done = shell(["--model", "somebody/something", *SMALL[2:], "--out", "a.png"], tmp_path, HF_HOME=tmp_path / "home",
                 HF_HUB_OFFLINE=0, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert picture(tmp_path / "a.png").size == (64, 64)


@pytest.mark.parametrize("gone", ("transformer/diffusion_pytorch_model.safetensors", "vqvae/config.json",
                                  "text_encoder/model.safetensors", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
                                  "model_index.json"))
def test_a_cache_that_lacks_a_file_is_not_used(tmp_path, monkeypatch, gone):
    """An interrupted download is gone on with, not mistaken for a model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = fill_cache(tmp_path)
    assert cached("somebody/something", torch.float32) == folder
    (folder / gone).unlink()
    assert cached("somebody/something", torch.float32) is None


class Silent:
    """A server that accepts and never answers."""
    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *_):
        self.socket.close()


def test_without_a_network_a_named_model_is_refused_in_seconds(tmp_path):
    """Offline by choice, nothing listening, and a hub that never answers."""
    with Silent() as silent:
        for env in (dict(), dict(HF_HUB_OFFLINE=0, HF_ENDPOINT="http://127.0.0.1:9"), dict(HF_HUB_OFFLINE=0, HF_ENDPOINT=silent)):
            start = time.perf_counter()
            done = shell(["--model", "meissonic", "--prompt", "x"], tmp_path, HF_HOME=tmp_path / "home", **env)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert "MeissonFlow/Meissonic" in done.stderr and "--model FOLDER" in done.stderr
            assert time.perf_counter() - start < 30
    assert [n for n in tree(tmp_path) if n.endswith((".png", "out"))] == []


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs, serving golden/compressed with files that nobody needs beside."""
    asked, extra = [], {"README.md": b"x", "transformer/diffusion_pytorch_model.bin": b"x" * 9}

    def content(self, name):
        return self.extra[name] if name in self.extra else (MODEL / name).read_bytes()

    def reply(self, body, **headers):
        self.send_response(200)
        for key, value in {"Content-Length": len(body), "X-Repo-Commit": "b" * 40, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        names = [n for n in [*files_of(MODEL), *self.extra] if not n.startswith(("expected", "prompts"))]
        if self.path.startswith("/api/models/somebody/something"):
            if "/tree/" in self.path:
                listed = [dict(type="file", path=n, size=len(self.content(n)), oid="c" * 40) for n in names]
            else:
                listed = dict(id="somebody/something", modelId="somebody/something", sha="b" * 40, private=False, tags=[],
                              downloads=0, siblings=[dict(rfilename=n) for n in names])
            return self.reply(json.dumps(listed).encode(), Content_Type="application/json")
        if self.path.startswith("/somebody/something/resolve/"):
            name = self.path.split("?")[0].split("/", 5)[5]
            if self.command == "GET":
                self.asked.append(name)
            body = self.content(name)
            return self.reply(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_fetched_once_and_only_what_is_needed(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    env = dict(HF_HOME=tmp_path / "home", HF_HUB_OFFLINE=0, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    run = lambda out: shell(["--model", "somebody/something", *SMALL[2:], "--out", out], tmp_path, **env)
    try:
        first = run("a.png")
    finally:
        server.shutdown()
        server.server_close()
    assert first.returncode == 0, first.stderr
    assert sorted(set(Hub.asked)) == sorted(NEEDED + weights()) and len(Hub.asked) == len(set(Hub.asked))
    second = run("b.png")                                                                # the server is gone
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# ---------------------------------------------------------------------------------------------------------
# The bundled model


def test_the_bundled_model_is_small_and_half_precision():
    assert sample.BUNDLED.is_dir(), "weights/shapes is not there"
    stored = list(sample.BUNDLED.rglob("*.safetensors"))
    assert sum(p.stat().st_size for p in sample.BUNDLED.rglob("*") if p.is_file()) <= 30e6 and len(stored) == 3
    for path in stored:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"F16"}
    pipeline = sample.Pipeline(sample.BUNDLED)
    assert pipeline.transformer.config.downsample and pipeline.convention == "rate" and min(pipeline.size) >= 64


def test_the_first_command_makes_the_right_picture(tmp_path):
    """`python sample.py` and README's prompt are the same; the scorer reads what came out."""
    assert sample.BUNDLED.is_dir(), "weights/shapes is not there"
    prompt = "a red circle above a blue square on a white background"
    assert sample.DEFAULT_PROMPT == prompt
    done = shell(["--prompt", prompt, "--device", "cpu"], tmp_path)
    assert done.returncode == 0, done.stderr
    claim = data.Claim("position", (data.Thing("circle", "red"), data.Thing("square", "blue")), "above", "white")
    file, = (tmp_path / "out").glob("*.png")
    assert data.shows(picture(file), claim)


def test_the_bundled_model_follows_captions():
    """A glance at what `--score` measures: 6 held-out captions of each task and two candidates, with much room, as
    another processor rounds to other pictures."""
    assert sample.BUNDLED.is_dir(), "weights/shapes is not there"
    cpu = torch.device("cpu")
    pipeline = sample.Pipeline(sample.BUNDLED, cpu, sample.choose_dtype(None, cpu)[0])
    shares = sample.score_tasks(pipeline, number=6, tasks=data.TASKS, progress=iter, candidates=2)
    assert shares["overall"] >= 0.6, shares


def test_what_was_left_out_costs_a_candidate():
    """Of pictures that show both objects of a caption or only the first, the fit picks the former nearly always; the
    likelihood alone, for which an object less is less to get wrong, does not."""
    pipeline, rng, fits, likely = sample.Pipeline(sample.BUNDLED), np.random.default_rng(0), [], []
    encode = lambda text: pipeline.encode_text([text] * 2, 64, 64, pipeline.score_condition)
    for text, claim in data.test_claims("two", 6):
        scene = data.sample_scene(rng, claim)
        pair = torch.cat([pipeline.encode_picture(data.draw(s, 64)) for s in (scene, replace(scene, items=scene.items[:1]))])
        fits.append(pipeline.fit_of(pair, encode(text), *map(encode, shortened(text))))
        likely.append(pipeline.fit_of(pair, encode(text)))
    better = [int((pair[:, 0] > pair[:, 1]).sum()) for pair in map(torch.stack, (fits, likely))]
    assert better[0] >= 5 and better[0] >= better[1] + 2, better


def test_every_flag_has_help(cli):
    status, out, _ = cli("--help")
    assert status == 0
    for flag in ("--prompt", "--prompt-file", "--negative", "--steps", "--cfg", "--size", "--n", "--seed", "--temperature",
                 "--redraws", "--candidates", "--score-condition", "--model", "--device", "--dtype", "--out", "--score", "--image",
                 "--mask", "--outpaint", "--feather",
                 "--strength", "--source", "--schedule", "--score-edits", "--film", "--film-tokens", "--sweep", "--reconstruct", "--like"):
        assert f"  {flag} " in out or f"  {flag}\n" in out


def test_files_are_whole_or_not_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError):
        vq.write_whole(target, lambda path: (Path(path).write_text("half"), 1 / 0))
    assert target.read_text() == "old" and tree(tmp_path) == ["a.txt"]
    vq.write_whole(target, lambda path: Path(path).write_text("new"))
    assert target.read_text() == "new" and tree(tmp_path) == ["a.txt"]
