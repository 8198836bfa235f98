"""What the first user of the published weights meets: the official defaults, what is told before a
download, a GPU without kernels, and NaN. The hub's cache holds tiny models in published layouts."""
import re
import shutil
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import (GOLDEN, GOLDEN_MODEL, SMALL_RUN, assert_refused, edit_json, open_picture,
                    photos)
from safetensors.torch import load_file, save_file
from shared_pipeline import load, load_once      # noqa: F401
from test_hub import fill_cache

import clip
import train
from engine import fast, hub, options
from engine.checkpoint import UserError, read_json
from engine.model_folder import copy_init
from engine.pipeline import Pipeline

CPU = torch.device("cpu")
RUN = SMALL_RUN[2:]                               # without --model
LAION = hub.TEXT_ENCODERS["laion"]
REPOSITORIES = {"meissonic": "MeissonFlow/Meissonic", "monetico": "Collov-Labs/Monetico"}
SOURCES = {"meissonic": GOLDEN / "compressed", "monetico": GOLDEN / "plain"}


def write_whole_clip(folder):
    """A CLIP checkpoint with both halves, as the hub has it, that fits both golden models."""
    folder.mkdir(parents=True)
    own = GOLDEN_MODEL / "text_encoder"
    config = read_json(own / "config.json")
    tensors = {name: tensor + 0.1 for name, tensor in load_file(own / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["vision_model.post_layernorm.bias"] = torch.zeros(3)
    tensors["visual_projection.weight"] = torch.zeros(3, 3)
    tensors["logit_scale"] = torch.zeros(())
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    text_config = config | {"projection_dim": 512}        # the one that counts is at the top
    edit_json(folder / "config.json", model_type="clip", text_config=text_config,
              projection_dim=config["projection_dim"], vision_config={}, logit_scale_init_value=2.6)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A hub cache with Meissonic, Monetico and laion's CLIP, and the last one as a folder."""
    home = tmp_path_factory.mktemp("home")
    for name, repo in REPOSITORIES.items():
        fill_cache(home, repo, SOURCES[name])
    fill_cache(home, LAION, write_whole_clip(home / "clip"))
    return home


@pytest.fixture
def cache(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return home


# --------------------------------------------------------------------------------------------------
# The official defaults


TEXT_ENCODERS = (None, "own", "laion", LAION, "FOLDER", "MeissonFlow/Meissonic")
NEGATIVES = (None, "", "a heart")


def expected_text_encoder(model, name, home):
    """-> (name that a PNG stores, folder)."""
    name = name or {"meissonic": "laion", "monetico": "own"}[model]
    if name == "own":
        return name, SOURCES[model] / "text_encoder"
    if name == "MeissonFlow/Meissonic":
        return name, SOURCES["meissonic"] / "text_encoder"
    return name, home / "clip"


@lru_cache
def expected_picture(folder, text_encoder, negative):
    """The pixels of the picture that RUN makes of "a star"."""
    pipe = load(folder, CPU, torch.float32, None, None, False, text_encoder)
    schedule = replace(pipe.schedule, steps=2)
    ids = pipe.draw(["a star"], [0], negative=negative, size=(64, 64), schedule=schedule)
    return pipe.decode(ids)[0].tobytes()


@pytest.mark.parametrize("model", REPOSITORIES)
def test_all_combinations(cli, cache, load_once, model):                            # noqa: F811
    """The text encoder and the negative prompt that are named, else the official ones: in the
    picture, in its settings, in what is printed; and --like makes it again."""
    for name, negative in product(TEXT_ENCODERS, NEGATIVES):
        flags = [] if negative is None else [f"--negative={negative}"]
        asked = str(cache / "clip") if name == "FOLDER" else name
        flags += [f"--text-encoder={asked}"] if name else []
        status, out, err = cli("--model", model, "--prompt", "a star", *RUN, *flags, "--out",
                               "a.png")
        assert status == 0, err
        stored, folder = expected_text_encoder(model, asked, cache)
        wanted = hub.OFFICIAL_NEGATIVE if negative is None else negative
        picture = open_picture("a.png")
        assert picture.text["text-encoder"] == stored and picture.text["negative"] == wanted
        line = out.splitlines()[1]
        assert f"text encoder: {stored} (" in line and f'negative: "{wanted}" (' in line
        assert line.count("as the official program has it") == (name is None) + (negative is None)
        assert picture.tobytes() == expected_picture(SOURCES[model], folder, wanted)
        if negative is None and name in (None, "FOLDER"):
            assert cli("--like", "a.png", "--out", "b.png")[0] == 0
            assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_the_choices_make_a_difference(cli, cache, load_once):                      # noqa: F811
    pictures = set()
    for flags in ([], ["--text-encoder", "own"], ["--negative", ""]):
        assert cli("--model", "meissonic", "--prompt", "a star", *RUN[:4], "--size", 128, "--steps",
                   4, *flags, "--out", "a.png")[0] == 0
        pictures.add(open_picture("a.png").tobytes())
    assert len(pictures) == 3


def test_other_models_have_no_official_defaults(cli, load_once):                    # noqa: F811
    status, out, _ = cli("--prompt", "a star", *SMALL_RUN, "--out", "a.png")
    text = open_picture("a.png").text
    assert status == 0 and "text encoder:" not in out
    assert (text["text-encoder"], text["negative"]) == ("own", "")


def test_official_steps_guidance_and_size(cache):
    for name, side in (("meissonic", 1024), ("monetico", 512)):
        pipe = Pipeline(hub.find_model(name, CPU, torch.float32).folder)
        assert (pipe.schedule.steps, pipe.schedule.cfg_scale, pipe.size) == (48, 9.0, (side, side))


def test_the_fingerprint_has_the_text_encoder(cli, cache, load_once):               # noqa: F811
    prints = set()
    for name in ("own", "laion"):
        assert cli("--model", "meissonic", "--prompt", "x", *RUN, "--text-encoder", name,
                   "--out", "a.png")[0] == 0
        prints.add(open_picture("a.png").text["weights"])
    assert len(prints) == 2


def test_text_encoders_that_are_refused(cli, cache, tmp_path):
    def refused(name, *words):
        assert_refused(cli, ["--model", "meissonic", "--prompt", "x", *RUN,
                             f"--text-encoder={name}"], *words)

    refused("nowhere", "text encoder", "nowhere", "laion", "own")
    refused(tmp_path, tmp_path, "config.json")
    refused(hub.BUNDLED, "text encoder", hub.BUNDLED, "fit")
    assert_refused(cli, ["--preset", "tiny", "--text-encoder", "laion"], "--init", script="train")


def test_fine_tuning_begins_with_the_same_text_encoder(cache, tmp_path, monkeypatch):
    """--init meissonic copies the text encoder of sampling; the rest is Meissonic's."""
    own = load_file(GOLDEN_MODEL / "text_encoder/model.safetensors")
    data = photos(tmp_path / "photos")
    for flags, same in (([], False), (["--text-encoder", "own"], True)):
        out = tmp_path / "-".join(["run", *flags])
        arguments = ["--out", str(out), "--init", "meissonic", "--preset", "paper", "--stage", "4",
                     "--device", "cpu", "--data", str(data)]
        args = options.parse_arguments(train.PRESETS, train.STAGES, "", arguments + flags)
        copy_init(options.open_run(args, train.PRESETS))
        weights = clip.TextEncoder.from_pretrained(out / "text_encoder").text_projection.weight
        assert torch.equal(weights, own["text_projection.weight"].float()) == same
        assert (out / "tokenizer/vocab.json").is_file()
        Pipeline(out)


# --------------------------------------------------------------------------------------------------
# Before a download


SIZES = {"transformer": 2e9, "vqvae": 0.3e9, "text_encoder": 1.4e9, "": 3.9e9}


def cache_name(repo):
    return f"models--{repo.replace('/', '--')}"


class FakeHub:
    """The hub's client: repositories of the fixture `home`, whose weights say they are large."""
    def __init__(self, home, cache):
        self.folders = {repo: next((home / "hub").glob(f"{cache_name(repo)}/snapshots/*"))
                        for repo in (*REPOSITORIES.values(), LAION)}
        self.cache, self.fetched, self.cut_after = cache, [], None

    def model_info(self, repo, timeout, files_metadata):
        assert files_metadata
        files = []
        for path in self.folders[repo].rglob("*.*"):
            name = path.relative_to(self.folders[repo]).as_posix()
            part = name.rpartition("/")[0]
            size = SIZES[part] if name.endswith(".safetensors") else 10
            files.append(SimpleNamespace(rfilename=name, size=int(size)))
        return SimpleNamespace(sha="a" * 40, siblings=files)

    def snapshot_download(self, repo, allow_patterns):
        repository = self.cache / cache_name(repo)
        folder = repository / "snapshots" / ("a" * 40)
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs/main").write_text("a" * 40)
        for name in allow_patterns:
            if (folder / name).is_file():
                continue
            if len(self.fetched) == self.cut_after:
                raise ConnectionError("the line was cut")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folders[repo] / name, folder / name)
            self.fetched.append((repo, name))
        return str(folder)


@pytest.fixture
def fake_hub(home, tmp_path, monkeypatch):
    fake = FakeHub(home, tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


def test_what_is_fetched_is_told_first(fake_hub, capsys, monkeypatch):
    """How large, where to, what would be less; the replaced text encoder is not fetched."""
    told = []
    fetch = fake_hub.snapshot_download
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *a, **b: told.append(capsys.readouterr().err) or fetch(*a, **b))
    model = hub.find_model("meissonic", CPU, torch.float32)
    first, *lines = told[0].splitlines()
    assert "6.2 GB" in first and str(fake_hub.cache) in first and "goes on" in first
    assert re.search(r"2\.3 GB  MeissonFlow/Meissonic", lines[0])
    assert re.search(rf"3\.9 GB  {LAION}.*--text-encoder own: 1\.4 GB", lines[1])
    assert len(lines) == 2 and told[1] == ""
    assert (REPOSITORIES["meissonic"], "text_encoder/model.safetensors") not in fake_hub.fetched
    Pipeline(model.folder, text_encoder=model.text_encoder)
    assert hub.find_model("meissonic", CPU, torch.float32) == model and len(told) == 2


@pytest.mark.parametrize("name, text_encoder, total", (
    ("meissonic", "own", "3.7 GB"), ("monetico", None, "3.7 GB"), ("monetico", "laion", "6.2 GB")))
def test_other_choices_tell_their_sizes(fake_hub, capsys, name, text_encoder, total):
    hub.find_model(name, CPU, torch.float32, text_encoder)
    err = capsys.readouterr().err
    assert f"fetching {total}" in err and (LAION in err) == (text_encoder == "laion")


def test_a_download_that_is_cut_goes_on(fake_hub, capsys):
    fake_hub.cut_after = 11                       # within laion's
    with pytest.raises(UserError, match="the line was cut.*goes on.*--text-encoder FOLDER"):
        hub.find_model("meissonic", CPU, torch.float32)
    before = list(fake_hub.fetched)
    assert before[-1][0] == LAION
    fake_hub.cut_after = None
    capsys.readouterr()
    hub.find_model("meissonic", CPU, torch.float32)
    assert fake_hub.fetched == [*before, (LAION, "model.safetensors")]
    assert "fetching 3.9 GB" in capsys.readouterr().err


def test_without_a_network_the_own_text_encoder_is_named(fake_hub, monkeypatch):
    hub.find_model("meissonic", CPU, torch.float32, "own")

    def no_network():
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", no_network)
    with pytest.raises(UserError, match=f"{LAION} .*--text-encoder FOLDER or own"):
        hub.find_model("meissonic", CPU, torch.float32)
    assert hub.find_model("meissonic", CPU, torch.float32, "own").text_encoder_name == "own"


# --------------------------------------------------------------------------------------------------
# A GPU that runs no kernels


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


@pytest.fixture
def gpu_without_kernels(monkeypatch):
    ones = torch.ones

    def launch(*size, device=None, **options):
        if torch.device(device or "cpu").type == "cuda":
            raise RuntimeError(f"{NO_KERNEL}\nCUDA kernel errors might be reported later")
        return ones(*size, device=device, **options)

    monkeypatch.setattr(torch, "ones", launch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_the_default_falls_back_to_the_cpu(cli, gpu_without_kernels):
    device, why = hub.choose_device(None)
    assert device == CPU and NO_KERNEL in why
    status, out, _ = cli("--model", GOLDEN_MODEL, "--size", 64, "--steps", 2, "--prompt", "x")
    assert status == 0 and f"device: cpu ({why})" in out


def test_a_named_gpu_without_kernels_is_refused(cli, gpu_without_kernels):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--device", "cuda"], "cuda", NO_KERNEL)


def test_a_gpu_with_kernels_is_taken():
    if torch.version.cuda:
        pytest.skip("a PyTorch with CUDA")
    from pretended_cuda import pretended_cuda
    with pretended_cuda():
        assert hub.choose_device(None) == (torch.device("cuda"), "the default")
        assert hub.choose_device("cuda:0")[0] == torch.device("cuda:0")


# --------------------------------------------------------------------------------------------------
# NaN


def draw(pipe, **settings):
    schedule = replace(pipe.schedule, steps=3)
    return pipe.draw(["a star"], [0], size=(64, 64), schedule=schedule, **settings)


@pytest.mark.parametrize("settings", ({}, {"remask": 1}, {"best_of": 2}), ids=str)
def test_an_overflow_of_float16_is_an_error(settings):
    """It names the dtype and what helps; in float32 there is none."""
    for dtype in (torch.float16, torch.float32):
        pipe = Pipeline(GOLDEN_MODEL, dtype=dtype)
        pipe.transformer.mlm_layer.conv1.weight.mul_(6e4)
        if dtype == torch.float16:
            with pytest.raises(UserError, match="NaN.*float16.*--dtype float32"):
                draw(pipe, **settings)
        else:
            assert draw(pipe, **settings).shape == (1, 4, 4)


@pytest.mark.parametrize("step", (0, 1, 2))
def test_a_nan_in_any_step_is_found(monkeypatch, step):
    predictor = fast.predictor

    def broken_predictor(*arguments):
        predict = predictor(*arguments)

        def broken(at, ids, masked):
            logits = predict(at, ids, masked)
            if at.number == step:
                logits[0, 0] = torch.nan          # of one position
            return logits
        return broken

    monkeypatch.setattr(fast, "predictor", broken_predictor)
    with pytest.raises(UserError, match="NaN.*--dtype float32"):
        draw(Pipeline(GOLDEN_MODEL, dtype=torch.bfloat16))


def test_broken_weights_are_named_in_float32(cli, tmp_path):
    folder = Path(shutil.copytree(GOLDEN_MODEL, tmp_path / "model"))
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, path)
    status, out, err = cli("--prompt", "x", *SMALL_RUN, "--model", folder)
    last = err.splitlines()[-1]
    assert status == 2 and "transformer: embed." in last and "NaN" in last and "wrote" not in out
    assert not Path("out").exists()


def test_the_check_waits_for_the_device_once():
    if torch.version.cuda:
        pytest.skip("a PyTorch with CUDA")
    from pretended_cuda import pretended_cuda
    with pretended_cuda() as counts:
        draw(Pipeline(GOLDEN_MODEL, "cuda"))
        assert sum(n for line, n in counts.syncs.items() if "engine/pipeline.py" in line) == 1
