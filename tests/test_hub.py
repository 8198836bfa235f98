"""Models by name, from the hub and its cache; the choice of device and dtype."""
import hashlib
import http.server
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from common import GOLDEN_MODEL, SMALL_RUN, assert_refused, open_picture, shell, tree
from safetensors import safe_open

import meissonic
from engine import hub
from engine.checkpoint import UserError
from engine.pipeline import Pipeline

CPU = torch.device("cpu")
RUN = SMALL_RUN[2:]                       # without --model
STEMS = {"transformer": "diffusion_pytorch_model", "vqvae": "diffusion_pytorch_model",
         "text_encoder": "model"}


# --------------------------------------------------------------------------------------------------
# Names


def test_names_of_models(monkeypatch):
    """Short names and hub ids -> repositories; `shapes` and folders need no hub."""
    asked = []
    monkeypatch.setattr(hub, "cached", lambda repo, parts, dtype: asked.append(repo) or Path(repo))
    for name in ("meissonic", "monetico", "somebody/something-1.0_x"):
        hub.find_model(name, CPU, torch.float32, "own")
    assert asked == ["MeissonFlow/Meissonic", "Collov-Labs/Monetico", "somebody/something-1.0_x"]
    assert hub.find_model("shapes", torch.device("cuda"), torch.float32)[0] == hub.BUNDLED
    assert hub.find_model(str(GOLDEN_MODEL), CPU, torch.float32)[0] == GOLDEN_MODEL
    assert len(asked) == 3


def test_dimo_has_a_transformer_and_meissonic_the_rest(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "cached", lambda repo, parts, dtype: asked.append((repo, [*parts]))
                        or Path(repo))
    model = hub.find_model("dimo", CPU, torch.float32)
    assert asked == [("Yuanzhi/DiMO", ["meissonic/transformer"]),
                     ("MeissonFlow/Meissonic", ["vqvae", "text_encoder"])]
    assert model.transformer == Path("Yuanzhi/DiMO/meissonic/transformer")
    assert model.folder == Path("MeissonFlow/Meissonic") and model.schedule == meissonic.OneStep()
    assert model.text_encoder == model.folder / "text_encoder" and model.negative == ""


def test_auto_without_a_gpu(monkeypatch):
    """Or with one that is not used."""
    for available, reason in ((True, "as it runs on cpu"), (False, "no CUDA GPU")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        model = hub.find_model("auto", CPU, torch.float32)
        assert model.folder == hub.BUNDLED and "shapes" in model.why and reason in model.why
    assert model.text_encoder == hub.BUNDLED / "text_encoder" and model.negative == ""


def test_auto_with_a_gpu(monkeypatch, tmp_path):
    """From the cache, else fetched, else the bundled model with the reason."""
    def find():
        return hub.find_model("auto", torch.device("cuda"), torch.float16)

    monkeypatch.setattr(hub, "find_folder", lambda one, dtype: tmp_path / one.place)
    assert find().folder == tmp_path / "MeissonFlow/Meissonic"
    monkeypatch.setattr(hub, "find_folder", lambda one, dtype: None)
    monkeypatch.setattr(hub, "plan_download",
                        lambda one, dtype: hub.Download(one.place, [], 0, one.advice))
    monkeypatch.setattr(hub, "fetch", lambda download: tmp_path / "fetched" / download.repo)
    assert find().folder == tmp_path / "fetched" / "MeissonFlow/Meissonic"

    def refuse(one, dtype):
        if one.place != hub.BUNDLED:
            raise UserError("the network is down")

    monkeypatch.setattr(hub, "plan_download", refuse)
    monkeypatch.setattr(hub, "find_folder", lambda one, dtype: one.place
                        if one.place == hub.BUNDLED else None)
    model = find()
    assert model.folder == hub.BUNDLED and "the network is down" in model.why
    assert "shapes" in model.why and model.negative == ""


@pytest.mark.parametrize("model", ("nowhere", "./no/where", "/no/where", "a b/c", "too/many/parts",
                                   ""))
def test_models_that_do_not_exist(cli, model):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, f"--model={model}"], model)


@pytest.mark.parametrize("model", ("bad--name/model", "-a/b", "a/b.", "ä/ö", "a/..b"))
def test_names_that_the_hub_refuses(cli, model, monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("the network is not part of this test")

    monkeypatch.setattr("huggingface_hub.HfApi", no_network)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, f"--model={model}"], model)


def test_places_here_are_not_asked_of_the_hub(cli, monkeypatch):
    """A file, a mistyped folder beside others, nothing at all."""
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    Path("runs/shapes").mkdir(parents=True)
    Path("runs/weights.safetensors").touch()
    os.mkfifo("pipe")
    for model, words in (("runs/weights.safetensors", ["a file", "transformer"]),
                         ("runs/shpaes", ["a folder runs", "no shpaes"]),
                         ("", ["neither a folder"]),
                         ("pipe", ["a file"]), ("runs/", ["runs"]),
                         ("~nobody-of-that-name/x", ["neither"])):
        assert_refused(cli, ["--prompt", "x", *SMALL_RUN, f"--model={model}"], *words)
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--text-encoder=runs/x"], "text encoder",
                   "no x in it")


class Answer(Exception):
    """An error of the hub's client with an answer of the hub."""
    def __init__(self, status):
        super().__init__(f"{status} Client Error\nsee the documentation")
        self.response = SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize("place", ("HfApi.model_info", "snapshot_download"))
@pytest.mark.parametrize("error, words, others", (
    (Answer(403), "permission", "network"), (Answer(401), "no such public repository", "network"),
    (Answer(404), "no such public repository", "network"),
    (Answer(503), "--model FOLDER", "log in"),
    (ConnectionError("no route to host"), "--model FOLDER", "log in"),
    (TimeoutError(), "--model FOLDER", "log in"),
    ("GatedRepoError", "permission", "no such"),
    ("RepositoryNotFoundError", "no such", "network")))
def test_what_the_hub_answers(cli, monkeypatch, tmp_path, place, error, words, others):
    """Three messages: ask for permission, correct the name, connect."""
    if isinstance(error, str):
        kind = getattr(huggingface_hub.errors, error)
        error = kind.__new__(kind)
        Exception.__init__(error, "401 Client Error")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if place == "snapshot_download":
        monkeypatch.setattr(hub, "plan_download", lambda one, dtype: hub.Download(
            one.place, [], 0, one.advice))
        monkeypatch.setattr(hub, "announce", lambda *_: None)
    monkeypatch.setattr(f"huggingface_hub.{place}", fail)
    status, _, err = cli("--prompt", "x", *SMALL_RUN, "--model", "some-body/something")
    assert status == 2 and err.count("\n") == 1 and "some-body/something" in err
    assert words in err and others not in err


def test_pointers_in_place_of_weights(cli, tmp_path):
    """Of a clone without Git LFS."""
    folder = Path(shutil.copytree(GOLDEN_MODEL, tmp_path / "model"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    (folder / "vqvae/diffusion_pytorch_model.safetensors").write_text(pointer)
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, "--model", folder], "vqvae", "git lfs pull")


# --------------------------------------------------------------------------------------------------
# Which files of a repository


def files_of(folder):
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]


NEEDED = ["model_index.json"] + [
    name for name in files_of(GOLDEN_MODEL) if "/" in name and not name.endswith(".safetensors")]
SURPLUS = [
    "README.md", ".gitattributes", "assets/demo.png", "unet.safetensors",
    "transformer/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin",
    "vqvae/diffusion_pytorch_model.msgpack",
    "transformer/checkpoint/diffusion_pytorch_model.safetensors"]


def weights(full=STEMS, half=()):
    """Names of whole weight files: of these parts in float32, of those as .fp16 twins."""
    names = [f"{part}/{STEMS[part]}.safetensors" for part in full]
    return names + [f"{part}/{STEMS[part]}.fp16.safetensors" for part in half]


def chosen(names, dtype):
    return sorted(hub.hub_files(names, dtype))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_of_a_repository_with_twins_each_part_comes_once(dtype):
    """The twins for 16 bits, but the text encoder in full: its twin is faulty."""
    names = NEEDED + SURPLUS + weights(half=STEMS)
    assert chosen(names, torch.float32) == sorted(NEEDED + weights())
    expected = NEEDED + weights(full=["text_encoder"], half=["transformer", "vqvae"])
    assert chosen(names, dtype) == sorted(expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("stored", (
    weights(), weights(full=(), half=STEMS),
    weights(full=["transformer", "text_encoder"], half=["vqvae"])), ids=("full", "half", "mixed"))
def test_of_a_repository_with_one_form_that_is_taken(stored, dtype):
    assert chosen(NEEDED + SURPLUS + stored, dtype) == sorted(NEEDED + stored)


SHARDS = [f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
HALF_SHARDS = [f"transformer/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors"
               for i in (1, 2)]
INDEX = "transformer/diffusion_pytorch_model.safetensors.index"


def test_shards_come_with_their_index():
    rest = NEEDED + weights(full=["vqvae", "text_encoder"])
    names = rest + SURPLUS + SHARDS + HALF_SHARDS + [f"{INDEX}.json", f"{INDEX}.fp16.json"]
    assert chosen(names, torch.float32) == sorted(rest + SHARDS + [f"{INDEX}.json"])
    assert chosen(names, torch.float16) == sorted(rest + HALF_SHARDS + [f"{INDEX}.fp16.json"])


def test_beside_a_whole_file_no_shards_are_needed():
    names = NEEDED + weights() + SHARDS + [f"{INDEX}.json", "transformer/ema.safetensors"]
    assert chosen(names, torch.float32) == sorted(NEEDED + weights())


def test_of_a_text_encoder_its_config_and_weights():
    """Of a whole CLIP repository, and of a model's."""
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json",
             "open_clip_model.safetensors"]
    assert hub.hub_files(names, torch.float16, hub.OTHER_TEXT) == ["config.json",
                                                                   "model.safetensors"]
    files = hub.hub_files(NEEDED + SURPLUS + weights(), torch.float32, hub.OWN_TEXT)
    assert files == ["text_encoder/config.json", "text_encoder/model.safetensors"]


# --------------------------------------------------------------------------------------------------
# Cache and network


def fill_cache(home, repo="somebody/something", source=GOLDEN_MODEL):
    """Lay a folder out as the hub's own client would -> its folder there."""
    repository = home / "hub" / f"models--{repo.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return Path(shutil.copytree(source, repository / "snapshots" / ("a" * 40)))


@pytest.mark.parametrize("gone", (
    "transformer/diffusion_pytorch_model.safetensors", "vqvae/config.json",
    "text_encoder/model.safetensors", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
    "model_index.json"))
def test_an_incomplete_cache_is_not_used(tmp_path, monkeypatch, gone):
    """An interrupted download continues; it is not mistaken for a model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = fill_cache(tmp_path)
    assert hub.cached("somebody/something", hub.PARTS, torch.float32) == folder
    (folder / gone).unlink()
    assert hub.cached("somebody/something", hub.PARTS, torch.float32) is None
    without = hub.cached("somebody/something", hub.WITHOUT_TEXT, torch.float32)
    assert without == (folder if gone.startswith("text_encoder") else None)


@pytest.mark.slow
def test_a_cached_model_needs_no_network(tmp_path):
    fill_cache(tmp_path / "home")
    done = shell(["--model", "somebody/something", *RUN, "--out", "a.png"], tmp_path,
                 HF_HOME=tmp_path / "home", HF_HUB_OFFLINE=0, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert open_picture(tmp_path / "a.png").size == (64, 64)


@pytest.mark.slow
def test_without_a_network_a_named_model_is_refused_in_seconds(tmp_path):
    """Offline by choice; nothing listens; the hub never answers."""
    silent = socket.create_server(("127.0.0.1", 0))           # accepts and says nothing
    address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    for changes in ({}, {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": "http://127.0.0.1:9"},
                    {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": address}):
        start = time.perf_counter()
        done = shell(["--model", "meissonic", "--prompt", "x"], tmp_path,
                     HF_HOME=tmp_path / "home", **changes)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "MeissonFlow/Meissonic" in done.stderr and "--model FOLDER" in done.stderr
        assert time.perf_counter() - start < 30
    silent.close()
    assert [name for name in tree(tmp_path) if name.endswith((".png", "out"))] == []


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: the golden model beside files that nobody needs."""
    asked = []
    extra = {"README.md": b"x", "transformer/diffusion_pytorch_model.bin": b"x" * 9}

    def content(self, name):
        return self.extra[name] if name in self.extra else (GOLDEN_MODEL / name).read_bytes()

    def reply(self, body, **headers):
        self.send_response(200)
        headers = {"Content-Length": len(body), "X-Repo-Commit": "b" * 40} | headers
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        names = [n for n in [*files_of(GOLDEN_MODEL), *self.extra]
                 if not n.startswith(("expected", "prompts"))]
        if self.path.startswith("/api/models/somebody/something"):
            if "/tree/" in self.path:
                listed = [{"type": "file", "path": n, "size": len(self.content(n)),
                           "oid": "c" * 40} for n in names]
            else:
                listed = {"id": "somebody/something", "modelId": "somebody/something",
                          "sha": "b" * 40, "private": False, "tags": [], "downloads": 0,
                          "siblings": [{"rfilename": n, "size": len(self.content(n))}
                                       for n in names]}
            self.reply(json.dumps(listed).encode(), Content_Type="application/json")
        elif self.path.startswith("/somebody/something/resolve/"):
            name = self.path.split("?")[0].split("/", 5)[5]
            if self.command == "GET":
                self.asked.append(name)
            body = self.content(name)
            self.reply(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_model_is_fetched_once_and_only_what_is_needed(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()

    def run(out):
        return shell(["--model", "somebody/something", *RUN, "--out", out], tmp_path,
                     HF_HOME=tmp_path / "home", HF_HUB_OFFLINE=0,
                     HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")

    try:
        first = run("a.png")
    finally:
        server.shutdown()
        server.server_close()
    assert first.returncode == 0, first.stderr
    assert sorted(Hub.asked) == sorted(NEEDED + weights())
    size = sum((GOLDEN_MODEL / name).stat().st_size for name in Hub.asked)
    told = f"fetching {size / 1e6:.1f} MB to {tmp_path / 'home' / 'hub'}, once"
    assert told in first.stderr and "somebody/something" in first.stderr
    second = run("b.png")                                     # the server is gone
    assert second.returncode == 0 and "fetching" not in second.stderr, second.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# --------------------------------------------------------------------------------------------------
# The bundled model


def test_the_bundled_model_is_small_and_in_half_precision():
    stored = list(hub.BUNDLED.rglob("*.safetensors"))
    assert len(stored) == 3
    assert sum(p.stat().st_size for p in hub.BUNDLED.rglob("*") if p.is_file()) <= 30e6
    for path in stored:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}
    pipe = Pipeline(hub.BUNDLED)
    assert pipe.multiple == 2 * pipe.f and pipe.schedule.rate_condition == "rate"


def test_the_fingerprint_tells_checkpoints_apart():
    pipes = [Pipeline(folder) for folder in (hub.BUNDLED, GOLDEN_MODEL)]
    prints = {hub.fingerprint(pipe.folders, torch.float32) for pipe in pipes}
    assert len(prints) == 2 and all(len(one) == 8 for one in prints)


# --------------------------------------------------------------------------------------------------
# Device and dtype


@pytest.mark.parametrize("device", ("bogus", "cuda:99", "meta", "hpu", "xla", "privateuseone", ""))
def test_unknown_devices(cli, device):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, f"--device={device}"], "device", device)


@pytest.mark.parametrize("able", (False, True))
def test_the_default_dtype_on_a_cpu(monkeypatch, able):
    monkeypatch.setattr(hub, "has_bfloat16", lambda device: able)
    default = torch.bfloat16 if able else torch.float32
    assert hub.choose_dtype(None, CPU)[:2] == (default, None)
    assert hub.choose_dtype("int8", CPU)[:2] == (default, torch.int8)
    assert hub.choose_dtype("float32", CPU)[:2] == (torch.float32, None)


@pytest.mark.parametrize("capability, name, expected", (
    ((7, 5), None, (torch.float16, None)), ((8, 0), None, (torch.bfloat16, None)),
    ((8, 0), "int8", (torch.bfloat16, torch.int8)), ((8, 0), "float32", (torch.float32, None)),
    ((8, 9), "fp8", (torch.bfloat16, torch.float8_e4m3fn))))
def test_the_dtype_on_a_gpu(monkeypatch, capability, name, expected):
    monkeypatch.setattr(hub, "capability", lambda device: capability)
    assert hub.choose_dtype(name, torch.device("cuda"))[:2] == expected


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(hub, "capability", lambda device: (8, 6))
    with pytest.raises(UserError, match="8.9.*int8 runs"):
        hub.choose_dtype("fp8", torch.device("cuda"))
