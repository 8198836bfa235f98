"""Checkpoints: the published names and shapes, every form they are stored in, and every way they can be broken."""
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import GOLDEN, KINDS, ROOT, edit_json, expected
from safetensors.torch import load_file, save_file

import clip
import meissonic
import vq

LAYOUT = json.loads((ROOT / "tests" / "public_layout.json").read_text())
MODELS = dict(transformer=meissonic.Transformer, vqvae=vq.VQModel, text_encoder=clip.TextEncoder)
STEMS = dict(transformer="diffusion_pytorch_model", vqvae="diffusion_pytorch_model", text_encoder="model")


@pytest.fixture(params=MODELS)
def part(request):
    return request.param


@pytest.fixture
def folder(part, tmp_path):
    """A copy of one part of a golden checkpoint."""
    return Path(shutil.copytree(GOLDEN / "compressed" / part, tmp_path / part))


def weights(folder):
    return folder / f"{STEMS[folder.name]}.safetensors"


def change(folder, edit):
    """Rewrite the weights after edit(tensors), which changes the dict in place."""
    tensors = load_file(weights(folder))
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, weights(folder))
    return tensors


def load(folder, **options):
    return MODELS[folder.name].from_pretrained(folder, **options)


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def published_shapes(model):
    """{published name: shape} of a model, as save_pretrained would split it."""
    shapes, mine = {}, model.state_dict()
    for name, parts in model.published().items():
        sizes = model.split_sizes(name, len(parts)) if len(parts) > 1 else [mine[name].shape[0]]
        shapes.update({p: [size, *mine[name].shape[1:]] for p, size in zip(parts, sizes)})
    return shapes


def error_of(folder, **options):
    with pytest.raises(vq.CheckpointError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# The published layout


@pytest.mark.parametrize("name", LAYOUT)
def test_every_published_name_and_shape(name):
    model = MODELS[name.rsplit("/", 1)[1]]
    with torch.device("meta"):
        mine = published_shapes(model(model.CONFIG.from_dict(LAYOUT[name]["config"])))
    assert mine == LAYOUT[name]["tensors"]


def test_the_layout_covers_both_repositories():
    assert {"MeissonFlow/Meissonic/transformer", "Collov-Labs/Monetico/transformer"} < LAYOUT.keys()
    assert {n.rsplit("/", 1)[1] for n in LAYOUT} == set(MODELS)


def test_every_class_builds_from_its_defaults():
    """The defaults are the published configuration: the parameter counts of SPEC section 1."""
    millions = dict(transformer=1007, vqvae=146, text_encoder=354)
    for name, model in MODELS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in model(model.CONFIG()).parameters())
        assert round(count / 1e6) == millions[name]


# ---------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("kind", KINDS)
def test_saving_writes_the_file_that_was_loaded(kind, part, tmp_path):
    model = MODELS[part].from_pretrained(GOLDEN / kind / part, dtype=torch.float16)
    model.save_pretrained(tmp_path / part)
    before, after = load_file(weights(GOLDEN / kind / part)), load_file(weights(tmp_path / part))
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)


def test_round_trip(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "again" / folder.name)
    again = load(tmp_path / "again" / folder.name)
    assert same(model, again) and model.config == again.config
    assert sorted(p.name for p in (tmp_path / "again" / folder.name).iterdir()) == sorted(
        ["config.json", weights(folder).name])


def test_saving_over_the_folder_it_was_loaded_from(folder):
    model = load(folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(folder)
    again = load(folder).state_dict()
    assert all(torch.equal(v, again[k]) and torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_saving_in_half_precision(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "half" / folder.name, torch.float16)
    stored = load_file(weights(tmp_path / "half" / folder.name))
    assert {v.dtype for v in stored.values()} == {torch.float16}
    assert same(load(tmp_path / "half" / folder.name), load(folder))             # the golden weights are exact in float16


def test_saved_configs_hold_what_the_official_code_asks_for(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "again")
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    if folder.name == "text_encoder":
        assert raw["architectures"] == ["CLIPTextModelWithProjection"] and raw["model_type"] == "clip_text_model"
    else:
        assert raw["_class_name"] == dict(transformer="Transformer2DModel", vqvae="VQModel")[folder.name]
    before = json.loads((folder / "config.json").read_text())
    kept = MODELS[folder.name].CONFIG.IGNORED | {"architectures", "torch_dtype"}
    assert {k: v for k, v in before.items() if k not in kept} == {k: v for k, v in raw.items() if k not in kept}


# ---------------------------------------------------------------------------------------------------------
# Forms of storage


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtype(folder, dtype):
    assert {p.dtype for p in load(folder, dtype=dtype).parameters()} == {dtype}


def test_loaded_models_are_for_inference(folder):
    model = load(folder)
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())


def twin(folder, scale=1.0):
    """Put a .fp16 twin, its weights multiplied by `scale`, beside the full weights."""
    half = {k: (v * scale).half() for k, v in load_file(weights(folder)).items()}
    save_file(half, folder / f"{STEMS[folder.name]}.fp16.safetensors")


def test_a_twin_alone_is_loaded(folder):
    whole = load(folder)
    twin(folder)
    weights(folder).unlink()
    assert same(load(folder), whole)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_16_bit_model_reads_the_twin_but_for_the_text_encoder(folder, dtype):
    """The text encoder's published twin is faulty: it is read in full and cast (SPEC section 1)."""
    whole = load(folder, dtype=dtype)
    twin(folder, scale=2.0)
    assert same(load(folder, dtype=dtype), whole) == (folder.name == "text_encoder")


def test_a_float32_model_reads_the_full_weights(folder):
    whole = load(folder)
    twin(folder, scale=2.0)
    assert same(load(folder), whole)


def shard(folder, half=False):
    """Cut the weights into three shards with an index, under the names of diffusers (transformers differs for halves)."""
    tensors, stem, table = load_file(weights(folder)), STEMS[folder.name], {}
    weights(folder).unlink()
    for i in range(3):
        mine = dict(list(tensors.items())[i::3])
        file = f"{stem}{'.fp16' * half}-{i + 1:05}-of-00003.safetensors"
        save_file(mine, folder / file)
        table.update({k: file for k in mine})
    index = folder / f"{stem}.safetensors.index{'.fp16' * half}.json"
    index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=table)))
    return index


@pytest.mark.parametrize("half", (False, True))
def test_shards(folder, half):
    whole = load(folder)
    shard(folder, half)
    assert same(load(folder), whole)


def test_a_missing_shard_is_named(folder):
    shard(folder)
    gone = f"{STEMS[folder.name]}-00002-of-00003.safetensors"
    (folder / gone).unlink()
    assert gone in error_of(folder)


@pytest.mark.parametrize("text", ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "null"))
def test_a_broken_index_is_named(folder, text):
    index = shard(folder)
    index.write_text(text)
    assert index.name in error_of(folder)


def test_shards_outside_the_folder_are_refused(folder):
    index, outside = shard(folder), folder.parent / "outside.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    index.write_text(json.dumps(dict(weight_map={"a": "../outside.safetensors"})))
    assert "outside" in error_of(folder)


def test_compiled_prefix(folder):
    whole, tensors = load(folder), load_file(weights(folder))
    save_file({f"_orig_mod.{k}": v for k, v in tensors.items()}, weights(folder))
    assert same(load(folder), whole)


# ---------------------------------------------------------------------------------------------------------
# The text encoder's own forms


@pytest.fixture
def text_folder(tmp_path):
    return Path(shutil.copytree(GOLDEN / "compressed" / "text_encoder", tmp_path / "text_encoder"))


def test_position_ids_are_dropped(text_folder):
    whole = load(text_folder)
    change(text_folder, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}))
    assert same(load(text_folder), whole)


def test_full_clip_checkpoint(text_folder):
    """The text half of a whole CLIP gives the golden numbers; its config nests the text half's."""
    vision = {"vision_model.embeddings.class_embedding": torch.ones(8), "visual_projection.weight": torch.ones(32, 8),
              "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8), "logit_scale": torch.ones(()),
              "vision_model.embeddings.position_ids": torch.arange(5)[None],
              "text_model.embeddings.position_ids": torch.arange(77)[None]}
    change(text_folder, lambda t: t.update(vision))
    text = json.loads((text_folder / "config.json").read_text())
    (text_folder / "config.json").write_text(json.dumps(dict(
        model_type="clip", architectures=["CLIPModel"], projection_dim=text["projection_dim"], logit_scale_init_value=2.6592,
        initializer_factor=1.0, text_config_dict=None, vision_config_dict=None, vision_config=dict(hidden_size=8),
        text_config={**text, "projection_dim": 512, "dropout": 0.0, "id2label": {"0": "LABEL_0"}, "top_p": 1.0})))
    want = expected("compressed")
    hidden, pooled = load(text_folder)(want["clip.input_ids"])
    torch.testing.assert_close(hidden, want["clip.hidden"], rtol=0, atol=1e-4)
    torch.testing.assert_close(pooled, want["clip.pooled"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("broken", (dict(projection_dim=32), dict(text_config={}), dict(text_config=None, projection_dim=32)))
def test_a_full_clip_config_without_its_parts(text_folder, broken):
    (text_folder / "config.json").write_text(json.dumps(dict(model_type="clip", **broken)))
    assert "text_encoder" in error_of(text_folder)


def test_quick_gelu(text_folder):
    edit_json(text_folder / "config.json", hidden_act="quick_gelu")
    layer = load(text_folder).text_model.encoder.layers[0]
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    y = x + layer.self_attn(layer.layer_norm1(x))
    h = layer.mlp.fc1(layer.layer_norm2(y))
    torch.testing.assert_close(layer(x), y + layer.mlp.fc2(h / (1 + torch.exp(-1.702 * h))))


def test_end_of_text():
    """Position of the first end token; with the old form, eos_token_id 2, of the first largest id."""
    ids = torch.tensor([[7, 1, 2, 9, 9], [7, 9, 1, 9, 1]])
    tiny = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=8, vocab_size=10)
    position = lambda eos: clip.TextEncoder(clip.Config(eos_token_id=eos, **tiny)).end_position(ids).tolist()
    assert position(9) == position(2) == [3, 1]
    assert position(1) == [1, 2]


# ---------------------------------------------------------------------------------------------------------
# Broken checkpoints: one line that names the thing


def test_a_folder_that_is_not_there(part, tmp_path):
    with pytest.raises(vq.CheckpointError, match="nowhere"):
        MODELS[part].from_pretrained(tmp_path / "nowhere")


def test_a_folder_that_is_no_checkpoint(part, tmp_path):
    with pytest.raises(vq.CheckpointError, match="config.json"):
        MODELS[part].from_pretrained(tmp_path)


def test_a_folder_without_weights(folder):
    weights(folder).unlink()
    assert weights(folder).name in error_of(folder)


def test_a_missing_tensor_is_named(folder):
    name = sorted(load_file(weights(folder)))[5]
    change(folder, lambda t: t.pop(name))
    assert "missing" in error_of(folder) and name in error_of(folder)


def test_an_extra_tensor_is_named(folder):
    change(folder, lambda t: t.update(surplus=torch.ones(1)))
    assert "surplus" in error_of(folder)


def test_every_misshaped_tensor_is_named(folder):
    """Packed parts too, where a wrong split would go unseen after concatenation."""
    original = load_file(weights(folder))
    for name in list(original)[::7] + [n for n in original if n.endswith(("q_proj.weight", "to_q.weight"))]:
        change(folder, lambda t: t.update({name: torch.cat((t[name], t[name][:1]))}))
        message = error_of(folder)
        assert name in message and str(tuple(original[name].shape)) in message
        save_file(original, weights(folder))


def test_shapes_of_packed_parts_that_add_up(text_folder):
    """q one row longer and k one shorter: the packed shape is right, the parts are not."""
    q, k = (f"text_model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    change(text_folder, lambda t: t.update({q: torch.cat((t[q], t[k][:1])), k: t[k][1:]}))
    assert q in error_of(text_folder)


@pytest.mark.parametrize("keep", (0.999, 0.5, 0.01, 0.0))
def test_a_truncated_file_is_named(folder, keep):
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    assert path.name in error_of(folder)


def test_a_file_that_is_not_safetensors_is_named(folder):
    weights(folder).write_bytes(b"PK\x03\x04" * 1000)
    assert weights(folder).name in error_of(folder)


def test_an_unknown_config_key_is_named(folder):
    edit_json(folder / "config.json", sparkle=3)
    assert "sparkle" in error_of(folder) and "config.json" in error_of(folder)


@pytest.mark.parametrize("text", ("", "{", "[]", "3", "null", "\x00"))
def test_a_config_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in error_of(folder)


@pytest.mark.parametrize("part, key, value", [
    ("transformer", "patch_size", 2), ("transformer", "guidance_embeds", True), ("transformer", "upsample", False),
    ("transformer", "axes_dims_rope", [4, 6, 8]), ("transformer", "axes_dims_rope", [3, 7, 6]),
    ("transformer", "pooled_projection_dim", 24), ("transformer", "vocab_size", 64), ("transformer", "num_layers", "two"),
    ("vqvae", "act_fn", "relu"), ("vqvae", "mid_block_add_attention", True), ("vqvae", "norm_num_groups", 7),
    ("vqvae", "up_block_types", ["UpDecoderBlock2D"]), ("vqvae", "down_block_types", ["AttnDownEncoderBlock2D"] * 5),
    ("vqvae", "layers_per_block", None), ("text_encoder", "hidden_act", "relu"), ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "num_attention_heads", 0), ("text_encoder", "hidden_size", "24"), ("text_encoder", "num_hidden_layers", 2.5)])
def test_config_values_that_cannot_be_built(part, key, value, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "compressed" / part, tmp_path / part))
    edit_json(folder / "config.json", **{key: value})
    message = error_of(folder)
    assert key in message or part in message


class Bomb:
    """Writes a file when it is unpickled."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_unpickled(folder, tmp_path):
    whole, burnt = load(folder), tmp_path / "burnt"
    stem = "pytorch_model" if folder.name == "text_encoder" else STEMS[folder.name]
    with open(folder / f"{stem}.bin", "wb") as file:
        pickle.dump(Bomb(burnt), file)
    assert same(load(folder), whole)
    weights(folder).unlink()
    assert "safetensors" in error_of(folder)
    (folder / f"{stem}.bin").rename(weights(folder))
    error_of(folder)
    assert not burnt.exists()
    pickle.loads(weights(folder).read_bytes()).close()
    assert burnt.exists()                                                        # the bomb would have gone off


# ---------------------------------------------------------------------------------------------------------
# Memory


LOADER = """
import sys, threading, time
import torch, meissonic
small, folder, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
meissonic.Transformer.from_pretrained(small, dtype=dtype)             # what PyTorch imports on the first use is not counted
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024
before, peak, running = anonymous(), [0], True
def watch():
    while running:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = meissonic.Transformer.from_pretrained(folder, dtype=dtype)
running = False
thread.join()
size = sum(p.nbytes for p in model.parameters())
print((max(peak[0], anonymous()) - before) / size)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("stored, wanted", (("float32", "float32"), ("float16", "float32"), ("float32", "float16")))
def test_loading_makes_no_second_copy(tmp_path, stored, wanted):
    """Private memory during the load, as a share of the parameters' size. Pages of the file itself do not count:
    the system takes them back when it needs them."""
    with torch.device("meta"):
        model = meissonic.Transformer(meissonic.Config(
            num_layers=2, num_single_layers=4, num_attention_heads=4, attention_head_dim=128, joint_attention_dim=64,
            pooled_projection_dim=512))
    model.to_empty(device="cpu").save_pretrained(tmp_path / "big", getattr(torch, stored))
    del model
    done = subprocess.run([sys.executable, "-c", LOADER, str(GOLDEN / "plain/transformer"), str(tmp_path / "big"), wanted],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2
