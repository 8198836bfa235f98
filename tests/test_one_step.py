"""One-step generators: the random start, the noise, the draw, and what the command line makes of a
checkpoint that is one, in a folder of its own or in the layout of Di[M]O's repository.

Letters: as in meissonic.py.
"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import (GOLDEN_MODEL, assert_refused, edit_json, generator, open_picture,
                    random_conditioning, tiny_transformer, tree)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shared_pipeline import load_once      # noqa: F401
from test_first_user import SIZES, FakeHub, cache_name
from test_hub import fill_cache, files_of

import meissonic
from engine import fast, hub
from engine.checkpoint import CheckpointError, UserError
from engine.pipeline import Pipeline
from meissonic import OneStep
from tools import bench_one_step, bench_picture
from tools.bench_timing import Report

CPU = torch.device("cpu")
SEED = st.integers(-2 ** 63, 2 ** 63 - 1)
RUN = ("--device", "cpu", "--dtype", "float32", "--size", 128)
few = settings(max_examples=15, deadline=None)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


def draw(model, seeds, h=4, w=6, one_step=OneStep(), predict=None, **options):
    """The pictures of these seeds -> (ids (B, h, w), start (B, h, w), what becomes of embedded
    zeros (B, h, w, C)). Without `predict` all logits are equal."""
    seen = []
    ids = torch.empty(len(seeds), h, w, dtype=torch.int64)

    def watched(start, perturb):
        seen.extend((start, perturb(torch.zeros(*start.shape, model.config.width))))
        if predict:
            return predict(start, perturb)
        return torch.zeros(len(seeds), h * w, model.config.codebook_size)

    return meissonic.sample_one_step(watched, ids, model.config, seeds, one_step, **options), *seen


# --------------------------------------------------------------------------------------------------
# Start, noise, draw


@few
@given(st.lists(SEED, min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 6),
       st.floats(0, 1))
def test_the_start(model, seeds, h, w, share):
    """Codes, and as many mask tokens as the share asks for."""
    _, start, _ = draw(model, seeds, h, w, OneStep(mask_share=share))
    masked = start == model.config.mask_token
    assert masked.flatten(1).sum(1).tolist() == [round(share * h * w)] * len(seeds)
    assert ((start >= 0) & (start < model.config.codebook_size) | masked).all()


def test_the_start_is_uniform(model):
    """Every code, and every position for the mask: chi-square within five deviations."""
    _, start, _ = draw(model, range(200), 16, 16)
    V = model.config.codebook_size
    masked = start == model.config.mask_token
    counts = start[~masked].bincount(minlength=V).double()
    expected = (~masked).sum() / V
    assert abs(((counts - expected) ** 2 / expected).sum() - (V - 1)) < 5 * (2 * V) ** 0.5
    share = masked.double().mean(0)                                                # (h, w)
    assert abs(share - 0.6).max() < 5 * (0.24 / 200) ** 0.5


def test_the_noise_is_normal(model):
    """Of deviation sigma, for each number of its own; tokens keep the rest of their variance."""
    _, _, noise = draw(model, [3, 4], 32, 32, OneStep(noise=0.5))
    z = (noise / 0.5).flatten().double()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.02 and 3.5 < z.abs().max() < 7
    assert abs((z ** 4).mean() - 3) < 0.3
    assert abs(torch.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.03
    x = torch.randn(2, 3, 4, 5, generator=generator())
    assert torch.equal(meissonic.perturb(x, x, 0.0), x)
    assert torch.allclose(meissonic.perturb(x, 0 * x, 0.6), 0.8 * x)


def test_extreme_bits_give_finite_noise():
    bits = torch.tensor([0, 1, 2 ** 31, 2 ** 32 - 1])
    noise = meissonic.normal_noise(bits)
    assert noise.isfinite().all() and noise[0] < -5 and noise[-1] > 5 and abs(noise[2]) < 1e-6


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_the_draw(model, temperature):
    """Of every position from softmax(logits / temperature)."""
    logits = torch.randn(40, generator=generator())
    ids, *_ = draw(model, range(20), 16, 16, OneStep(temperature=temperature),
                   lambda start, perturb: logits.expand(len(start), 256, 40))
    p = (logits.double() / temperature).softmax(0)
    expected = p * ids.numel()
    chi_square = ((ids.flatten().bincount(minlength=40) - expected) ** 2 / expected).sum()
    assert chi_square < 39 + 5 * 78 ** 0.5


def test_a_low_temperature_takes_the_likeliest(model):
    logits = torch.randn(2, 24, 40, generator=generator())
    ids, *_ = draw(model, [0, 1], one_step=OneStep(temperature=1e-3), predict=lambda *_: logits)
    assert torch.equal(ids.flatten(1), logits.argmax(-1))


def test_the_watcher_sees_all_positions(model):
    calls = []
    ids, *_ = draw(model, [1, 2], watch=lambda *call: calls.append(call))
    (n, seen, positions, logits), = calls
    assert n == 0 and torch.equal(seen, ids) and logits.shape == (2, 24, 40)
    assert torch.equal(positions, torch.arange(24).expand(2, -1))


# --------------------------------------------------------------------------------------------------
# The model


@few
@given(st.lists(SEED, min_size=1, max_size=4, unique=True), st.integers(0, 3), st.booleans())
def test_a_picture_depends_on_its_seed_and_prompt_alone(seeds, alone, downsample):
    """Not on its batch; and the fast predictor draws what the reference draws."""
    model = tiny_transformer(downsample)
    cond = random_conditioning(generator(7), len(seeds), model)
    alone %= len(seeds)
    together = draw(model, seeds, predict=meissonic.one_step_predictor(model, cond))
    again = draw(model, seeds, predict=fast.one_step_predictor(model, cond))
    assert all(torch.equal(*pair) for pair in zip(together, again))
    single = meissonic.one_step_predictor(model, cond.rows([alone]))
    for mine, of_all in zip(draw(model, [seeds[alone]], predict=single), together):
        assert torch.equal(mine[0], of_all[alone])


def test_start_and_noise_reach_the_picture(model):
    """Each seed has its own; with one start, the noise alone changes the logits."""
    cond = random_conditioning(generator(7), 1, model)
    predict = meissonic.one_step_predictor(model, cond)
    first, second = (draw(model, [seed], predict=predict) for seed in (0, 1))
    assert not any(torch.equal(*pair) for pair in zip(first, second))
    start = first[1]
    plain = predict(start, None)
    assert torch.equal(plain, predict(start, lambda x: x))
    assert not torch.equal(plain, predict(start, lambda x: meissonic.perturb(x, 1 + 0 * x, 0.3)))


def test_gradients_flow_through_the_logits():
    """For the training of such a generator."""
    model = tiny_transformer().requires_grad_(True)
    cond = random_conditioning(generator(7), 1, model)
    logits = []
    draw(model, [0], predict=meissonic.one_step_predictor(model, cond),
         watch=lambda *call: logits.append(call[3]))
    logits[0].square().mean().backward()
    assert model.embed.embeddings.weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------
# Checkpoints


def one_step_folder(folder, **one_step):
    """The golden model, which says that it is a one-step generator -> its folder."""
    shutil.copytree(GOLDEN_MODEL, folder)
    edit_json(folder / "scheduler/scheduler_config.json", one_step=one_step)
    return folder


def test_what_a_checkpoint_says(tmp_path):
    assert Pipeline(one_step_folder(tmp_path / "a")).schedule == OneStep(0.6, 0.1, 1.0)
    pipe = Pipeline(one_step_folder(tmp_path / "b", mask_share=0, noise=0.3, temperature=1.2))
    assert pipe.one_step and pipe.schedule == OneStep(0, 0.3, 1.2)
    many = Pipeline(GOLDEN_MODEL)
    assert not many.one_step and isinstance(many.schedule, meissonic.Schedule)


@pytest.mark.parametrize("one_step, word", (
    ({"mask_share": 1.1}, "mask_share"), ({"noise": -0.1}, "noise"), ({"noise": 2}, "noise"),
    ({"temperature": 0}, "temperature"), ({"temperature": "1"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"), ({"mask_share": True}, "mask_share"),
    ({"mask_rate": 0.6}, "mask_rate"), ([0.6], "object"), (None, "object"), (True, "object")))
def test_what_a_checkpoint_cannot_say(tmp_path, one_step, word):
    folder = one_step_folder(tmp_path / "a")
    path = folder / "scheduler/scheduler_config.json"
    edit_json(path, one_step=one_step)
    with pytest.raises(CheckpointError, match=f"scheduler_config.json: .*{word}"):
        Pipeline(folder)


@pytest.mark.parametrize("key, value", (("steps", 8), ("cfg", 3.0), ("remask", 1), ("best_of", 2)))
def test_defaults_of_many_steps_are_refused(tmp_path, key, value):
    folder = one_step_folder(tmp_path / "a")
    path = folder / "scheduler/scheduler_config.json"
    edit_json(path, defaults={"size": 64})
    assert Pipeline(folder).size == (64, 64)
    edit_json(path, defaults={key: value})
    with pytest.raises(CheckpointError, match=f"unknown key '{key}'"):
        Pipeline(folder)


def test_a_pipeline(tmp_path):
    pipe = Pipeline(one_step_folder(tmp_path / "a"))
    image, = pipe(["a star"], [0], size=(96, 64))
    assert image.size == (96, 64)
    ids = pipe.all_masked(1, (64, 64))
    for settings_, word in ((dict(remask=1), "remask"), (dict(best_of=2), "best_of"),
                            (dict(ids=ids.clone().fill_(3)), "keep")):
        with pytest.raises(UserError, match=word):
            pipe.draw(["a star"], [0], size=(64, 64), **settings_)
    pipe.transformer.mlm_layer.conv1.weight.mul_(torch.nan)
    with pytest.raises(UserError, match="NaN"):
        pipe.draw(["a star"], [0], size=(64, 64))


# --------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return one_step_folder(tmp_path_factory.mktemp("models") / "one")


def test_a_picture(cli, folder, load_once):                                         # noqa: F811
    """One step; the PNG makes it again, and one changed setting changes it."""
    run = ("--model", folder, *RUN, "--prompt", "a star")
    status, _, err = cli(*run, "--out", "a.png")
    assert status == 0 and "1/1" in err
    text = open_picture("a.png").text
    assert (text["steps"], text["cfg"], text["temperature"]) == ("1", "1.0", "1.0")
    assert cli("--like", "a.png", "--out", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    pictures = {open_picture("a.png").tobytes()}
    for flags in (["--temperature", 1.2], ["--seed", 1], ["--prompt", "a heart"]):
        assert cli("--like", "a.png", *flags, "--out", "c.png")[0] == 0
        pictures.add(open_picture("c.png").tobytes())
    assert len(pictures) == 4


def test_pictures_in_a_batch(cli, folder, load_once):                               # noqa: F811
    run = ("--model", folder, *RUN, "--prompt", "a star", "a heart", "--n", 2)
    for batch in (1, 3):
        assert cli(*run, "--batch", batch, "--out", f"by-{batch}")[0] == 0
    for name in tree("by-1"):
        assert (open_picture(f"by-1/{name}").tobytes()
                == open_picture(f"by-3/{name}").tobytes()), name


@pytest.mark.parametrize("flags", (
    ["--steps", 2], ["--cfg", 3], ["--schedule", "cosine"], ["--remask", 1], ["--best-of", 2],
    ["--negative", "x"], ["--temperature", 1, 0], ["--temperature", 0]),
    ids=lambda flags: " ".join(map(str, flags)))
def test_flags_that_one_step_does_not_take(cli, folder, load_once, flags):          # noqa: F811
    run = ["--model", folder, *RUN, "--prompt", "a star"]
    assert_refused(cli, [*run, *flags], flags[0].removeprefix("--"))


def test_flags_that_change_nothing(cli, folder, load_once):                         # noqa: F811
    run = ("--model", folder, *RUN, "--prompt", "a star")
    same = ("--steps", 1, "--cfg", 1, "--remask", 0, "--best-of", 1, "--negative=", "--temperature",
            1)
    for name, flags in (("a", ()), ("b", same)):
        assert cli(*run, *flags, "--out", f"{name}.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_an_edit_is_refused(cli, folder, load_once):                                # noqa: F811
    assert cli("--model", folder, *RUN, "--prompt", "a star", "--out", "a.png")[0] == 0
    for flags in (["--strength", 0.5], ["--outpaint", "32,0,0,0"], ["--prompt", "x"]):
        assert_refused(cli, ["--model", folder, *RUN, "--image", "a.png", *flags],
                       "--image", "whole pictures")


def test_other_models_want_two_temperatures(cli, load_once):                        # noqa: F811
    run = ["--model", GOLDEN_MODEL, *RUN, "--prompt", "x"]
    for temperature in ([1], [1, 2, 3]):
        assert_refused(cli, [*run, "--temperature", *temperature], "--temperature", "two numbers")


def test_a_film_has_two_moments(cli, folder, load_once):                            # noqa: F811
    run = ("--model", folder, *RUN, "--prompt", "x", "--out", "a.png")
    assert cli(*run, "--frames", 2, script="tools.film")[0] == 0
    assert tree(".") == ["a-film.gif", "a-film.png", "a.png"]


# --------------------------------------------------------------------------------------------------
# The layout of Di[M]O's repository


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A hub cache with Meissonic, and Di[M]O, whose transformer has other weights."""
    home = tmp_path_factory.mktemp("home")
    fill_cache(home, hub.MEISSONIC)
    source = home / "DiMO"
    transformer = source / "meissonic/transformer"
    shutil.copytree(GOLDEN_MODEL / "transformer", transformer)
    path = transformer / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["mlm_layer.conv2.weight"] = tensors["mlm_layer.conv2.weight"] * 2
    save_file(tensors, path)
    (source / "maskgit").mkdir()
    (source / "maskgit/model.safetensors").write_text("of another model")
    fill_cache(home, hub.DIMO, source)
    return home


@pytest.fixture
def cache(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return home


def expected_ids(home):
    """What Di[M]O's transformer draws of "a star"."""
    pipe = Pipeline(GOLDEN_MODEL)
    model = meissonic.Transformer.from_pretrained(home / "DiMO/meissonic/transformer")
    cond = pipe.encode(["a star"], (128, 128), 6.0)
    predict = meissonic.one_step_predictor(model, cond)
    ids = pipe.all_masked(1, (128, 128))
    return pipe, meissonic.sample_one_step(predict, ids, model.config, [0], OneStep())


@pytest.mark.parametrize("name", ("dimo", "Yuanzhi/DiMO", "{home}/DiMO", "{home}/DiMO/meissonic"))
def test_a_model_in_its_layout(cli, cache, name, load_once):                        # noqa: F811
    """By name, hub id or folder: its transformer, the other parts of Meissonic, no defaults of the
    official program."""
    name = name.format(home=cache)
    status, out, err = cli("--model", name, *RUN, "--prompt", "a star", "--out", "a.png")
    assert status == 0, err
    assert "one-step" in out and "MeissonFlow/Meissonic" in out and "text encoder:" not in out
    pipe, ids = expected_ids(cache)
    picture = open_picture("a.png")
    assert picture.tobytes() == pipe.decode(ids)[0].tobytes()
    assert (picture.text["negative"], picture.text["text-encoder"]) == ("", "own")
    assert cli("--like", "a.png", "--out", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_another_text_encoder(cache):
    model = hub.find_model("dimo", CPU, torch.float32, str(GOLDEN_MODEL))
    assert model.text_encoder == GOLDEN_MODEL / "text_encoder"
    assert model.transformer.parts[-2:] == ("meissonic", "transformer")


def test_the_parts_must_fit(cache, tmp_path):
    """The folder that is at fault is named."""
    folder = tmp_path / "DiMO/meissonic/transformer"
    model = meissonic.Transformer(replace(tiny_transformer().config, codebook_size=41))
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    found = hub.find_model(str(tmp_path / "DiMO"), CPU, torch.float32)
    with pytest.raises(CheckpointError, match=f"with the transformer {folder}"):
        Pipeline(found.folder, transformer=found.transformer, schedule=found.schedule)


def test_other_folders_are_no_lone_transformers(tmp_path):
    """A whole model, whatever it is called and lies beside."""
    assert hub.one_step_transformer(GOLDEN_MODEL) is None
    assert hub.one_step_transformer(tmp_path) is None
    assert hub.one_step_transformer("somebody/something") is None
    shutil.copytree(GOLDEN_MODEL, tmp_path / "meissonic")
    assert hub.one_step_transformer(tmp_path / "meissonic") is None


@pytest.fixture
def fake_hub(home, tmp_path, monkeypatch):
    """Repositories of `home`, from which nothing has been fetched yet."""
    fake = FakeHub.__new__(FakeHub)
    fake.folders = {repo: next((home / "hub").glob(f"{cache_name(repo)}/snapshots/*"))
                    for repo in (hub.MEISSONIC, hub.DIMO)}
    fake.cache, fake.fetched, fake.cut_after = tmp_path / "empty", [], None
    monkeypatch.setitem(SIZES, "meissonic/transformer", 4e9)
    monkeypatch.setitem(SIZES, "maskgit", 1e9)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


def test_only_what_is_needed_is_fetched(fake_hub, capsys):
    """And told before: neither Meissonic's transformer nor the generator of another model."""
    model = hub.find_model("dimo", CPU, torch.float32)
    first, *lines = capsys.readouterr().err.splitlines()
    assert "5.7 GB" in first and len(lines) == 2
    assert "4.0 GB  Yuanzhi/DiMO" in lines[0] and "1.7 GB  MeissonFlow/Meissonic" in lines[1]
    names = {name for repo, name in fake_hub.fetched if repo == hub.DIMO}
    assert names == {f"meissonic/transformer/{name}" for name in
                     ("config.json", "diffusion_pytorch_model.safetensors")}
    rest = {name for repo, name in fake_hub.fetched if repo == hub.MEISSONIC}
    unneeded = {name for name in files_of(GOLDEN_MODEL) if name.startswith(
        ("transformer", "expected", "prompts"))}
    assert rest == set(files_of(GOLDEN_MODEL)) - unneeded
    Pipeline(model.folder, transformer=model.transformer, schedule=model.schedule)
    assert hub.find_model("dimo", CPU, torch.float32) == model        # now from the cache
    assert capsys.readouterr().err == ""


def test_beside_meissonic_its_text_encoder_and_the_generator_are_missing(fake_hub, capsys):
    """`meissonic` with another text encoder leaves out its own, which Di[M]O takes."""
    hub.find_model("meissonic", CPU, torch.float32, str(GOLDEN_MODEL))
    before = len(fake_hub.fetched)
    capsys.readouterr()
    hub.find_model("dimo", CPU, torch.float32)
    assert "1.4 GB  MeissonFlow/Meissonic" in capsys.readouterr().err
    weights = [name for _, name in fake_hub.fetched[before:] if name.endswith(".safetensors")]
    assert sorted(weights) == ["meissonic/transformer/diffusion_pytorch_model.safetensors",
                               "text_encoder/model.safetensors"]


# --------------------------------------------------------------------------------------------------
# CUDA, and the benchmark


@pytest.mark.skipif(torch.version.cuda is not None, reason="a PyTorch with CUDA")
@pytest.mark.parametrize("memory", (8e9, 80e9))
def test_a_pretended_gpu_draws_the_same(folder, memory):
    """No step waits for the device but the checks of the tokens and of the logits."""
    from pretended_cuda import pretended_cuda
    expected = Pipeline(folder).draw(["a star"], [5], size=(128, 64))
    with pretended_cuda(memory=memory) as counts:
        ids = Pipeline(folder, "cuda").draw(["a star"], [5], size=(128, 64))
        waits = [line for line in counts.syncs if "meissonic.py" in line or "fast.py" in line]
        assert not waits and counts.recorded == 0
        assert torch.equal(ids.cpu(), expected)
    meissonic.rope_table.cache_clear()
    meissonic.sinusoid_frequencies.cache_clear()


def test_the_benchmark_has_a_row_for_one_step(tmp_path, monkeypatch):
    setup = bench_picture.make_setup(CPU)
    tiny = replace(setup.transformer, num_layers=1, num_single_layers=1)
    setup = replace(setup, transformer=tiny)
    monkeypatch.setattr(bench_one_step, "published_setup", lambda device: setup)
    bench_one_step.time_one_step(Report(tmp_path, "one-step"), CPU, 0)
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["one step", "48 steps"]
    assert 0 < rows[0]["loop_s"] < rows[1]["loop_s"]
