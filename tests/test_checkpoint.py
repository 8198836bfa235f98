"""Checkpoint folders: published names and shapes, all forms of storage, and what is refused.

All tests with the fixture `folder` run for the transformer, the VQ model and the text encoder.
"""
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from common import GOLDEN, KINDS, ROOT, edit_json, tiny_vq, tree
from safetensors.torch import load_file, save_file

import clip
import meissonic
import vq
from engine.checkpoint import (CheckpointError, JsonConfig, UserError, atomic_write, read_json,
                               remove_prefix, weight_files, write_json, write_tensors)
from engine.resume import clean

LAYOUT = json.loads((ROOT / "tests" / "public_layout.json").read_text())
MODELS = {"transformer": meissonic.Transformer, "vqvae": vq.VQModel,
          "text_encoder": clip.TextEncoder}


@pytest.fixture(params=MODELS)
def part(request):
    """Name of a part of a checkpoint."""
    return request.param


@pytest.fixture
def folder(part, tmp_path):
    """A copy of one part of a golden checkpoint."""
    return Path(shutil.copytree(GOLDEN / "compressed" / part, tmp_path / part))


@pytest.fixture
def text_folder(tmp_path):
    """A copy of the golden text encoder."""
    return Path(shutil.copytree(GOLDEN / "compressed/text_encoder", tmp_path / "text_encoder"))


def weights(folder):
    """The path of a part's weights."""
    return folder / f"{MODELS[folder.name].STEM}.safetensors"


def add_tensors(folder, tensors):
    """Add or replace tensors of the stored weights."""
    tensors = {**load_file(weights(folder)), **tensors}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights(folder))


def load(folder, **options):
    return MODELS[folder.name].from_pretrained(folder, **options)


def is_same(model, other):
    """Whether two models have equal weights."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def error_of(folder):
    """The message, one line, with which loading fails."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------
# The published layout


@pytest.mark.parametrize("name", LAYOUT)
def test_every_published_name_and_shape(name):
    model_class = MODELS[name.rsplit("/", 1)[1]]
    with torch.device("meta"):
        model = model_class(model_class.CONFIG.from_dict(LAYOUT[name]["config"]))
    ours = model.state_dict()
    shapes = {published: list(ours[name][rows].shape)
              for published, (name, rows) in model.weight_map().items()}
    assert shapes == LAYOUT[name]["tensors"]


def test_the_layout_covers_both_repositories():
    assert {"MeissonFlow/Meissonic/transformer", "Collov-Labs/Monetico/transformer"} < LAYOUT.keys()
    assert {name.rsplit("/", 1)[1] for name in LAYOUT} == set(MODELS)


def test_the_default_config_is_the_published_one(part):
    config = MODELS[part].CONFIG
    assert config() == config.from_dict(LAYOUT[f"MeissonFlow/Meissonic/{part}"]["config"])


# -------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("kind", KINDS)
def test_saving_writes_the_tensors_that_were_loaded(kind, part, tmp_path):
    model = MODELS[part].from_pretrained(GOLDEN / kind / part, torch.float16)
    model.save_pretrained(tmp_path / part)
    before = load_file(weights(GOLDEN / kind / part))
    after = load_file(weights(tmp_path / part))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_round_trip(folder, tmp_path):
    model = load(folder)
    again = tmp_path / "again" / folder.name
    model.save_pretrained(again)
    assert is_same(model, load(again)) and model.config == load(again).config
    assert tree(again) == ["config.json", weights(again).name]


def test_saving_over_the_folder_it_was_loaded_from(folder):
    """The model's tensors are the memory-mapped file that is replaced."""
    model = load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    again = load(folder).state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, model.state_dict()[name])


def test_saving_in_half_precision(folder, tmp_path):
    """The golden weights are exact in float16."""
    half = tmp_path / "half" / folder.name
    load(folder).save_pretrained(half, torch.float16)
    assert {tensor.dtype for tensor in load_file(weights(half)).values()} == {torch.float16}
    assert is_same(load(half), load(folder))


def test_saving_removes_older_fp16_variants(folder):
    """Loading in 16 bits would prefer them to the new weights."""
    stem = MODELS[folder.name].STEM
    for name in (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"):
        (folder / name).write_bytes(b"old")
    load(folder).save_pretrained(folder)
    assert tree(folder) == ["config.json", weights(folder).name]


def test_saved_configs_have_the_published_keys(folder, tmp_path):
    before = read_json(folder / "config.json")
    load(folder).save_pretrained(tmp_path / "again")
    after = read_json(tmp_path / "again" / "config.json")
    free = MODELS[folder.name].CONFIG.IGNORED | {"architectures", "torch_dtype"}
    for key in (before.keys() | after.keys()) - free:
        assert before[key] == after[key], key
    if folder.name == "text_encoder":
        assert after["architectures"] == ["CLIPTextModelWithProjection"]
        assert after["model_type"] == "clip_text_model"
    else:
        names = {"transformer": "Transformer2DModel", "vqvae": "VQModel"}
        assert after["_class_name"] == names[folder.name]


def test_files_are_written_atomically(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def interrupted(path):
        path.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, interrupted)
    assert target.read_text() == "old" and tree(tmp_path) == ["a.txt"]
    atomic_write(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new" and tree(tmp_path) == ["a.txt"]


# -------------------------------------------------------------------------------------------------
# Forms of storage


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_loaded_model_is_for_inference(folder, dtype):
    model = load(folder, dtype=dtype)
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad and not parameter.is_meta


def test_on_the_meta_device_all_is_checked_and_nothing_read(folder):
    assert all(p.is_meta for p in load(folder, device="meta").parameters())
    add_tensors(folder, {"surplus": torch.ones(1)})
    with pytest.raises(CheckpointError, match="surplus"):
        load(folder, device="meta")


def write_fp16_variant(folder, scale=1.0):
    """Write a .fp16 variant, with the weights multiplied by `scale`, beside the full weights."""
    half = {name: (tensor * scale).half() for name, tensor in load_file(weights(folder)).items()}
    save_file(half, folder / f"{MODELS[folder.name].STEM}.fp16.safetensors")


def test_an_fp16_variant_alone_is_loaded(folder):
    model = load(folder)
    write_fp16_variant(folder)
    weights(folder).unlink()
    assert is_same(load(folder), model)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_models_read_the_fp16_variant(folder, dtype):
    """All but the text encoder: its published variant is faulty."""
    model = load(folder, dtype=dtype)
    write_fp16_variant(folder, scale=2.0)
    assert is_same(load(folder, dtype=dtype), model) == (folder.name == "text_encoder")


def test_float32_models_read_the_full_weights(folder):
    model = load(folder)
    write_fp16_variant(folder, scale=2.0)
    assert is_same(load(folder), model)


def write_shards(folder, variant=""):
    """Replace the weights by three shards and an index -> the index."""
    stem = MODELS[folder.name].STEM
    tensors = list(load_file(weights(folder)).items())
    weights(folder).unlink()
    table = {}
    for i in range(3):
        file = f"{stem}{variant}-{i + 1:05}-of-00003.safetensors"
        save_file(dict(tensors[i::3]), folder / file)
        table.update({name: file for name, _ in tensors[i::3]})
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return index


@pytest.mark.parametrize("variant", ("", ".fp16"))
def test_shards(folder, variant):
    model = load(folder)
    write_shards(folder, variant)
    assert is_same(load(folder), model)


def test_a_missing_shard_is_named(folder):
    write_shards(folder)
    shard = weight_files(folder, MODELS[folder.name].STEM)[1]
    shard.unlink()
    assert shard.name in error_of(folder)


@pytest.mark.parametrize("text", (
    "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "null"))
def test_a_broken_index_is_named(folder, text):
    index = write_shards(folder)
    index.write_text(text)
    assert index.name in error_of(folder)


def test_shards_outside_the_folder_are_refused(folder):
    index = write_shards(folder)
    save_file({"a": torch.ones(1)}, folder.parent / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    assert "outside" in error_of(folder)


def test_weights_of_a_compiled_model(folder):
    model = load(folder)
    tensors = load_file(weights(folder))
    save_file({f"_orig_mod.{name}": t for name, t in tensors.items()}, weights(folder))
    assert is_same(load(folder), model)


def test_ignored_weights_are_not_read(text_folder):
    """The vision half of a whole CLIP, and the position ids that old versions stored."""
    model = load(text_folder)
    add_tensors(text_folder, {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.class_embedding": torch.ones(8),
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
        "visual_projection.weight": torch.ones(32, 8), "logit_scale": torch.ones(())})
    assert is_same(load(text_folder), model)


def test_remove_prefix():
    assert remove_prefix({"a.b": 1, "a.a.c": 2, "b.a.": 3}, "a.") == {"b": 1, "a.c": 2}


# -------------------------------------------------------------------------------------------------
# Broken checkpoints: the message names the file, tensor or key


def test_a_checkpoint_error_is_a_user_error():
    """The scripts print these as one line; callers of the library may catch ValueError."""
    assert issubclass(CheckpointError, UserError) and issubclass(CheckpointError, ValueError)


def test_folders_without_a_checkpoint(part, tmp_path):
    for path, word in ((tmp_path / "nowhere", "nowhere"), (tmp_path, "config.json")):
        with pytest.raises(CheckpointError, match=word):
            MODELS[part].from_pretrained(path)


def test_a_folder_without_weights(folder):
    weights(folder).unlink()
    assert weights(folder).name in error_of(folder)


def test_missing_and_unknown_tensors_are_named(folder):
    tensors = load_file(weights(folder))
    name = sorted(tensors)[5]
    tensor = tensors.pop(name)
    save_file(tensors, weights(folder))
    assert "1 tensors missing" in error_of(folder) and name in error_of(folder)
    add_tensors(folder, {name: tensor, "surplus": torch.ones(1)})
    assert "1 unknown tensors, first: surplus" in error_of(folder)


def test_misshaped_tensors_are_named(folder):
    """Also the parts of fused weights."""
    tensors = load_file(weights(folder))
    queries = [name for name in tensors if name.endswith(("q_proj.weight", "to_q.weight"))]
    for name in (*list(tensors)[::20], *queries):
        add_tensors(folder, {name: torch.cat((tensors[name], tensors[name][:1]))})
        message = error_of(folder)
        assert name in message and str(tuple(tensors[name].shape)) in message
        save_file(tensors, weights(folder))


def test_misshaped_parts_of_a_fused_weight_that_add_up(text_folder):
    """q is one row longer and k one shorter: the fused shape is right, the parts are not."""
    names = [f"text_model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qk"]
    q, k = (load_file(weights(text_folder))[name] for name in names)
    add_tensors(text_folder, {names[0]: torch.cat((q, k[:1])), names[1]: k[1:]})
    assert names[0] in error_of(text_folder)


@pytest.mark.parametrize("keep", (0.999, 0.5, 0.01, 0.0))
def test_a_truncated_file_is_named(folder, keep):
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    assert path.name in error_of(folder)


def test_a_file_that_is_not_safetensors_is_named(folder):
    weights(folder).write_bytes(b"PK\x03\x04" * 1000)
    assert weights(folder).name in error_of(folder)


class Bomb:
    """Writes a file when it is unpickled."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_unpickled(folder, tmp_path):
    model = load(folder)
    burnt = tmp_path / "burnt"
    pickled = pickle.dumps(Bomb(burnt))
    for stem in ("pytorch_model", MODELS[folder.name].STEM):
        (folder / f"{stem}.bin").write_bytes(pickled)
    assert is_same(load(folder), model)
    weights(folder).unlink()
    assert "safetensors" in error_of(folder)
    weights(folder).write_bytes(pickled)
    error_of(folder)
    assert not burnt.exists()
    pickle.loads(pickled).close()
    assert burnt.exists()                                     # unpickling it writes the file


# -------------------------------------------------------------------------------------------------
# Configs


@dataclass
class Example(JsonConfig):
    """A config with each kind of key."""
    width: int = 4
    axes: tuple = (1, 2)

    FIXED = {"act_fn": "silu"}
    IGNORED = frozenset({"_version"})


def test_a_config_is_read_and_written():
    config = Example.from_dict({"axes": [3, 4], "act_fn": "silu", "_version": 5})
    assert config == Example(4, (3, 4))
    assert config.to_dict() == {"act_fn": "silu", "width": 4, "axes": (3, 4)}


def test_unknown_keys_and_unsupported_values_are_named():
    for raw, words in (({"sparkle": 3}, "here: unknown key 'sparkle'"),
                       ({"act_fn": "relu"}, "here: act_fn = 'relu' is not supported")):
        with pytest.raises(CheckpointError, match=words):
            Example.from_dict(raw, "here")


@pytest.mark.parametrize("text", ("", "{", "[]", "3", "null", "\x00"))
def test_a_config_that_is_not_a_json_object(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in error_of(folder)


@pytest.mark.parametrize("part, key, value", [
    ("transformer", "patch_size", 2), ("transformer", "guidance_embeds", True),
    ("transformer", "num_layers", "two"), ("vqvae", "act_fn", "relu"),
    ("vqvae", "mid_block_add_attention", True), ("vqvae", "norm_num_groups", 7),
    ("vqvae", "up_block_types", ["UpDecoderBlock2D"]), ("vqvae", "layers_per_block", None),
    ("vqvae", "down_block_types", ["AttnDownEncoderBlock2D"] * 5),
    ("text_encoder", "hidden_act", "relu"), ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "num_attention_heads", 0), ("text_encoder", "hidden_size", "24"),
    ("text_encoder", "num_hidden_layers", 2.5)])
def test_config_values_of_which_no_model_can_be_built(folder, key, value):
    edit_json(folder / "config.json", **{key: value})
    message = error_of(folder)
    assert key in message or folder.name in message


@pytest.mark.parametrize("part, key, value", [
    ("transformer", "num_layers", 10 ** 9), ("transformer", "num_layers", True),
    ("transformer", "axes_dims_rope", [[4], 6, 6]), ("transformer", "downsample", 1),
    ("transformer", "vocab_size", float("nan")), ("vqvae", "norm_num_groups", -1),
    ("vqvae", "block_out_channels", []), ("vqvae", "block_out_channels", {"a": 1}),
    ("vqvae", "vq_embed_dim", 8.0), ("text_encoder", "layer_norm_eps", []),
    ("text_encoder", "layer_norm_eps", float("inf")), ("text_encoder", "eos_token_id", None),
    ("text_encoder", "eos_token_id", 2 ** 63), ("text_encoder", "hidden_size", 10 ** 400),
    ("text_encoder", "hidden_act", "x" * 10 ** 6)])
def test_config_values_of_wrong_type_or_range(folder, key, value):
    """Refused at once, and in a short message with file and key. A bool is not a number."""
    edit_json(folder / "config.json", **{key: value})
    message = error_of(folder)
    assert "config.json" in message and key in message and len(message) < 400


@pytest.mark.parametrize("text, words", [
    ("[" * 100_000, "not a JSON file"), ('{"a": ' * 100_000, "not a JSON file"),
    ('{"num_layers": ' + "9" * 10_000 + "}", "not a JSON file"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    (b"\xff\xfe{\x00}\x00", "not a JSON file")], ids=range(5))
def test_hostile_json(folder, text, words):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json" in error_of(folder) and words in error_of(folder)


def test_a_byte_order_mark_is_read_over(folder):
    model = load(folder)
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert is_same(load(folder), model)


# -------------------------------------------------------------------------------------------------
# Tensors that are no weights


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_weights_that_are_not_finite_are_named(folder, dtype, value):
    """Any tensor, also a part of a fused one; float32 weights may be too large for float16."""
    tensors = load_file(weights(folder))
    for name in (min(tensors), max(tensors)):
        bad = tensors[name].clone()
        bad.view(-1)[-1] = value
        add_tensors(folder, {name: bad})
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            load(folder, dtype=dtype)
        add_tensors(folder, {name: tensors[name]})
    add_tensors(folder, {name: torch.full_like(tensors[name], 1e38, dtype=torch.float32)})
    assert load(folder).state_dict()
    with pytest.raises(CheckpointError, match="float16"):
        load(folder, dtype=torch.float16)


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.complex64, torch.uint8))
def test_tensors_that_are_not_floating_point_are_named(folder, dtype):
    tensors = load_file(weights(folder))
    name = min(tensors)
    add_tensors(folder, {name: tensors[name].to(dtype)})
    assert name in error_of(folder) and "floating" in error_of(folder)


def test_a_git_lfs_pointer_is_called_so(folder):
    weights(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "Git LFS" in error_of(folder) and weights(folder).name in error_of(folder)


def test_weights_that_are_not_finite_are_not_written(folder):
    """What was there stays, also if they are only too large for float16."""
    for value, dtype in ((float("nan"), None), (1e38, torch.float16)):
        model, before = load(folder), load(folder)
        next(model.parameters()).data.view(-1)[0] = value
        with pytest.raises(UserError, match="NaN or infinity"):
            model.save_pretrained(folder, dtype)
        assert is_same(load(folder), before) and len(tree(folder)) == 2
        assert tree(folder.parent) == [folder.name, *(f"{folder.name}/{x}" for x in tree(folder))]


# -------------------------------------------------------------------------------------------------
# The writer


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        for umask in (0o077, 0o022, 0o002):
            os.umask(umask)
            write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
            assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)


def test_a_file_system_that_refuses_modes(folder, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")
    model = load(folder)
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    model.save_pretrained(folder.parent / "new")
    assert is_same(MODELS[folder.name].from_pretrained(folder.parent / "new"), model)


def test_a_symbolic_link_is_written_through(tmp_path):
    """To a file, to one that is not there yet, and to a folder."""
    (tmp_path / "real").mkdir()
    for name in ("there", "new"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/there").write_text("old")
    for name in ("there", "new"):
        write_json(tmp_path / name, {"a": 1})
        assert (tmp_path / name).is_symlink() and read_json(tmp_path / "real" / name) == {"a": 1}
    (tmp_path / "link").symlink_to(tmp_path / "model")
    tiny_vq().save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "model/config.json").is_file()
    assert not [path for path in tree(tmp_path) if ".meissonic" in path]


def test_the_longest_names(tmp_path):
    for name in ("a" * 255, "\U0001f600" * 63):
        write_json(tmp_path / name, {})
        assert (tmp_path / name).is_file()


def test_what_is_not_a_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(UserError, match="not a regular file"):
            write_json(path, {})


def test_a_folder_with_other_things_keeps_them(folder):
    """The new files move into it, those of an older model are removed."""
    model = load(folder)
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("mine")
    (folder / f"{MODELS[folder.name].STEM}.fp16.safetensors").write_bytes(b"old")
    model.save_pretrained(folder)
    assert tree(folder) == sorted(["config.json", weights(folder).name, "notes", "notes/a.txt"])
    assert is_same(load(folder), model)


@pytest.mark.parametrize("call", (1, 2, 3, 4))
def test_a_folder_is_the_old_one_or_the_new_one(folder, monkeypatch, call):
    """Whichever rename fails: those of its two files, of the old folder, of the new one."""
    calls, replace = [], os.replace

    def failing(source, target):
        calls.append(target)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        replace(source, target)

    model, changed = load(folder), load(folder)
    next(changed.parameters()).data += 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError):
            changed.save_pretrained(folder)
    clean(folder.parent)
    assert is_same(load(folder), model)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# -------------------------------------------------------------------------------------------------
# Memory


LOADER = """
import sys, threading, time
import torch, meissonic

def private_bytes():
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024

def watch():
    while True:
        peaks.append(private_bytes())
        time.sleep(0.001)

peaks, models = [], []                     # models stay alive, so that no memory is used again
threading.Thread(target=watch, daemon=True).start()
# the first load is not counted: PyTorch imports more modules there
for folder, dtype in zip(sys.argv[1:], (torch.float32, torch.float32, torch.float16)):
    before = private_bytes()
    peaks.clear()
    models.append(meissonic.Transformer.from_pretrained(folder, dtype))
    peaks.append(private_bytes())
    print((max(peaks) - before) / sum(p.nbytes for p in models[-1].parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_makes_no_second_copy(tmp_path):
    """Private memory while loading, relative to the size of the parameters: float16 files read as
    float32, and float32 files as float16. Pages of the file do not count: the system can drop them
    at any time."""
    config = meissonic.Config(
        num_layers=2, num_single_layers=4, num_attention_heads=4, attention_head_dim=128,
        joint_attention_dim=64, pooled_projection_dim=512)
    with torch.device("meta"):
        model = meissonic.Transformer(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "half", torch.float16)
    model.save_pretrained(tmp_path / "full")
    command = [sys.executable, "-c", LOADER, GOLDEN / "plain/transformer", tmp_path / "half",
               tmp_path / "full"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, half, full = map(float, done.stdout.split())
    assert 0.8 < half < 1.2 and 0.8 < full < 1.2, (half, full)
