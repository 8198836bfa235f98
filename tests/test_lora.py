"""LoRA: low-rank terms beside the weights, their file, and merging them."""
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from common import generator, masked_grid, random_conditioning, tiny_transformer
from safetensors.torch import load_file, save_file

from engine.checkpoint import CheckpointError, UserError
from engine.lora import (PREFIX, add_lora, add_terms, merge_lora, parse_lora, public_weights,
                         read_lora, save_lora)

RANK = 3
STEM = "transformer.single_transformer_blocks.0.attn.to_k"


def forward(model):
    """Logits of a fixed batch."""
    cond = random_conditioning(generator(1), 2, model)
    ids = masked_grid(0, 2, 4, 4, 9, model)
    return model(ids, cond.hidden, cond.pooled, cond.micro_conds, torch.tensor([0.5]))


def terms(model):
    """{name: parameter} of the low-rank terms."""
    mark = ".parametrizations.weight.0."
    return {name: p for name, p in model.named_parameters() if mark in name}


def model_with_lora():
    """A tiny model with random low-rank terms."""
    model = tiny_transformer()
    add_lora(model, RANK)
    for name, parameter in terms(model).items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator(2))
    return model


def term(rank=2, out=16, alpha=None):
    """The tensors of one term for STEM."""
    g = generator(3)
    tensors = {f"{STEM}.lora_A.weight": torch.randn(rank, 16, generator=g),
               f"{STEM}.lora_B.weight": torch.randn(out, rank, generator=g)}
    if alpha is not None:
        tensors[f"{STEM}.alpha"] = torch.tensor(alpha)
    return tensors


def test_fresh_terms_change_nothing_and_alone_are_trainable():
    model = tiny_transformer()
    before = forward(model)
    add_lora(model, RANK)
    torch.testing.assert_close(forward(model), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(terms(model))
    forward(model).square().mean().backward()
    gradients = {name: p.grad.abs().max() for name, p in terms(model).items()}
    assert all(gradients[name] > 0 for name in gradients if name.endswith(".B"))


def test_terms_are_on_all_linear_layers_but_the_adaptive_norms():
    """Of the blocks: 8 in a multi-modal block, 2 in a single block."""
    model = tiny_transformer()
    add_lora(model, RANK)
    modules = {name.partition(".parametrizations.")[0] for name in terms(model)}
    assert len(modules) == 10
    assert all("transformer_blocks.0." in name and ".norm" not in name for name in modules)
    for name, parameter in terms(model).items():
        assert RANK in parameter.shape, name


def test_a_merged_file_gives_the_trained_model(tmp_path):
    """The file has the published names, fused projections split, with PEFT's suffixes."""
    model = model_with_lora()
    save_lora(tmp_path / "lora.safetensors", model, model.state_dict())
    stored = load_file(tmp_path / "lora.safetensors")
    assert len(stored) == 2 * 17 and not any("qkv" in name for name in stored)
    for end in ("A", "B"):
        assert f"transformer.transformer_blocks.0.attn.add_q_proj.lora_{end}.weight" in stored
        assert f"{STEM}.lora_{end}.weight" in stored
    merged = tiny_transformer()
    before = forward(merged)
    merge_lora(merged, tmp_path / "lora.safetensors")
    torch.testing.assert_close(forward(merged), forward(model), rtol=1e-4, atol=1e-5)
    assert (forward(merged) - before).abs().max() > 0.01


@pytest.mark.parametrize("alpha, scale", [(None, 1), (4.0, 2)])
def test_the_scale_is_alpha_over_the_rank(tmp_path, alpha, scale):
    """Only the rows of the named projection change. The prefix may be missing."""
    tensors = term(alpha=alpha)
    save_file({name.removeprefix("transformer."): x for name, x in tensors.items()},
              tmp_path / "lora")
    model = tiny_transformer()
    before = model.single_transformer_blocks[0].qkv_mlp.weight.clone()
    merge_lora(model, tmp_path / "lora")
    change = model.single_transformer_blocks[0].qkv_mlp.weight - before
    expected = scale * tensors[f"{STEM}.lora_B.weight"] @ tensors[f"{STEM}.lora_A.weight"]
    torch.testing.assert_close(change[16:32], expected)
    assert change[:16].abs().max() == change[32:].abs().max() == 0


def test_a_file_is_checked_without_weights(tmp_path):
    """So that a bad one is refused before the model is read."""
    with torch.device("meta"):
        model = type(tiny_transformer())(tiny_transformer().config)
    save_file(term(), tmp_path / "lora")
    terms = read_lora(model, tmp_path / "lora", 3.0)
    assert [(one.weight, one.scale) for one in terms] == [
        ("single_transformer_blocks.0.qkv_mlp.weight", 3.0)]
    add_terms(tiny_transformer(), terms)
    save_file(term(out=17), tmp_path / "lora")
    with pytest.raises(CheckpointError, match="17, 2"):
        read_lora(model, tmp_path / "lora")


def test_a_16_bit_model_keeps_its_dtype(tmp_path):
    save_file(term(), tmp_path / "lora")
    model = tiny_transformer().bfloat16()
    before = model.single_transformer_blocks[0].qkv_mlp.weight.clone()
    merge_lora(model, tmp_path / "lora")
    weight = model.single_transformer_blocks[0].qkv_mlp.weight
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before)


# -------------------------------------------------------------------------------------------------
# Spellings of the ecosystem

MODULE = STEM.removeprefix("transformer.")
KOHYA = MODULE.replace(".", "_")
A, B = term().values()


def to_k(model):
    """The rows of the tiny model's weight that STEM names, as they are now."""
    return model.single_transformer_blocks[0].qkv_mlp.weight[16:32].clone()


def change(path, *scale, model=None):
    """What merging a file adds to the weight of STEM."""
    model = model or tiny_transformer()
    before = to_k(model)
    merge_lora(model, path, *scale)
    return to_k(model) - before


def save(path, tensors, **metadata):
    save_file(tensors, path, metadata={key: str(value) for key, value in metadata.items()})
    return path


PREFIXED = ("base_model.model.", "base_model.model.transformer.", "transformer.", "unet.",
            "diffusion_model.", "model.diffusion_model.", "")
SUFFIXED = ((".lora_A.weight", ".lora_B.weight"),
            (".lora_A.default.weight", ".lora_B.default.weight"),
            (".lora_down.weight", ".lora_up.weight"), (".lora.down.weight", ".lora.up.weight"))
SPELLINGS = [(prefix + MODULE, ends) for prefix in PREFIXED for ends in SUFFIXED]
SPELLINGS += [("lora_unet_" + KOHYA, SUFFIXED[2]), ("lora_transformer_" + KOHYA, SUFFIXED[2])]


@pytest.mark.parametrize("stem, ends", SPELLINGS, ids=lambda x: x if isinstance(x, str) else x[0])
def test_spellings(tmp_path, stem, ends):
    path = save(tmp_path / "lora", {stem + ends[0]: A, stem + ends[1]: B})
    torch.testing.assert_close(change(path), B @ A)


def test_every_weight_has_a_spelling_of_kohya():
    """No two names have one underscored form."""
    names = public_weights(tiny_transformer())
    assert len({name.replace(".", "_") for name in names}) == len(names)


@pytest.mark.parametrize("shape", ((1, 1), ()))
def test_terms_of_convolutions(tmp_path, shape):
    """A (r, n, 1, 1) term of a linear layer, and terms of a 1x1 convolution of either shape."""
    a, b = A.view(2, 16, *shape), B.view(16, 2, *shape)
    path = save(tmp_path / "lora", {f"{name}.lora_{end}.weight": x.clone()
                                    for name in (MODULE, "mlm_layer.conv1")
                                    for end, x in (("down", a), ("up", b))})
    model = tiny_transformer()
    before = model.mlm_layer.conv1.weight.clone()
    torch.testing.assert_close(change(path, model=model), B @ A)
    torch.testing.assert_close((model.mlm_layer.conv1.weight - before)[..., 0, 0], B @ A)


def test_terms_of_text_encoders_are_left_out(tmp_path, capsys):
    names = ("text_encoder.text_model.x.lora_A.weight", "lora_te_text_model_x.lora_up.weight",
             "lora_te1_x.alpha", "base_model.model.text_model.x.lora_A.weight")
    text = {name: torch.ones(2, 2) for name in names}
    torch.testing.assert_close(change(save(tmp_path / "lora", term() | text)), B @ A)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("4 tensors for the text encoder are left out")
    with pytest.raises(CheckpointError, match="only terms of a text encoder"):
        merge_lora(tiny_transformer(), save(tmp_path / "lora", text))


# -------------------------------------------------------------------------------------------------
# Scale


CONFIGS = (
    ({"lora_alpha": 32, "r": 2}, 16), ({"lora_alpha": 1.0}, 0.5), ({"r": 2}, 1), ({}, 1),
    ({"lora_alpha": 4, "r": 2, "alpha_pattern": {"attn.to_k": 8}}, 4),
    ({"lora_alpha": 4, "r": 2, "alpha_pattern": {"n.to_k": 8}}, 2),       # whole names only
    ({"lora_alpha": 4, "r": 2, "alpha_pattern": {"^attn.to_k": 8}}, 2),   # ^ is the beginning
    ({"lora_alpha": 4, "r": 2, "alpha_pattern": {f"^{MODULE}$": 8}}, 4),
    ({"lora_alpha": 4, "r": 2, "alpha_pattern": {"to_k": 8, "attn.to_k": 6}}, 4),   # the first
    ({"lora_alpha": 4, "r": 8, "rank_pattern": {"to_k": 2}}, 2),
    ({"lora_alpha": 4, "r": 2, "use_rslora": True}, 4 / 2 ** 0.5))


@pytest.mark.parametrize("config, scale", CONFIGS, ids=lambda x: str(x))
def test_a_config_has_the_scale(tmp_path, config, scale):
    """In the header as diffusers writes it, with and without a prefix, or in PEFT's own file."""
    for prefix in ("transformer.", "unet.", ""):
        raw = {prefix + key: value for key, value in config.items()}
        raw |= {"text_encoder.lora_alpha": 99, "text_encoder.r": 3}
        path = save(tmp_path / "lora", term(), format="pt", lora_adapter_metadata=json.dumps(raw))
        torch.testing.assert_close(change(path), scale * B @ A)
    peft = {f"base_model.model.{name.removeprefix(PREFIX)}": x for name, x in term().items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    path = save(tmp_path / "adapter_model.safetensors", peft)
    torch.testing.assert_close(change(path), scale * B @ A)


@pytest.mark.parametrize("alpha", (torch.tensor(6), torch.tensor([6.0]), torch.tensor([[6.0]]),
                                   torch.tensor(6.0, dtype=torch.bfloat16)), ids=str)
def test_alpha_is_any_tensor_of_one_number(tmp_path, alpha):
    path = save(tmp_path / "lora", term() | {f"{STEM}.alpha": alpha})
    torch.testing.assert_close(change(path), 3 * B @ A)
    torch.testing.assert_close(change(path, 0.5), 1.5 * B @ A)


def test_peft_without_its_config_is_told(tmp_path, capsys):
    path = save(tmp_path / "lora", {f"base_model.model.{MODULE}.lora_{end}.weight": x
                                    for end, x in (("A", A), ("B", B))})
    torch.testing.assert_close(change(path), B @ A)
    assert "adapter_config.json" in capsys.readouterr().err


def test_parse_lora(tmp_path, monkeypatch):
    """FILE:SCALE; a file that has the colon in its name wins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "a:0.5", "b:c"):
        Path(name).touch()
    for text, wanted in (("a", ("a", 1)), ("a:2", ("a", 2)), ("a:-.25", ("a", -0.25)),
                         ("a:0.5", ("a:0.5", 1)), ("a:0.5:0.5", ("a:0.5", 0.5)),
                         ("b:c", ("b:c", 1)), ("b:c:0", ("b:c", 0)), ("gone", ("gone", 1)),
                         ("gone:3", ("gone", 3)), ("C:\\gone", ("C:\\gone", 1)), (":2", (":2", 1)),
                         ("~/a:2", (f"{tmp_path}/a", 2)), ("x" * 999 + ":2", ("x" * 999, 2))):
        assert parse_lora(text) == (Path(wanted[0]), wanted[1]), text
    for text in ("a:", "a:strong", "a:nan", "a:inf", "gone:nan"):
        with pytest.raises(UserError, match="strength"):
            parse_lora(text)


# -------------------------------------------------------------------------------------------------
# What is refused


def without(tensors, end):
    return {name: x for name, x in tensors.items() if not name.endswith(end)}


def header(text):
    return {"lora_adapter_metadata": text if isinstance(text, str) else json.dumps(text)}


BROKEN = {                                       # tensors: words of the message
    "misshaped": (term() | {f"{STEM}.lora_A.weight": torch.randn(2, 17)}, "(2, 17)"),
    "ranks": (term() | {f"{STEM}.lora_B.weight": torch.randn(16, 3)}, "(16, 3)"),
    "rank 0": (term(rank=0), "(0, 16)"),
    "one dimension": (term() | {f"{STEM}.lora_A.weight": torch.randn(16)}, "(16,)"),
    "no dimension": (term() | {f"{STEM}.lora_A.weight": torch.tensor(1.0)}, "()"),
    "3x3": (term() | {f"{STEM}.lora_A.weight": torch.randn(2, 16, 3, 3)}, "(2, 16, 3, 3)"),
    "norm": ({name.replace("attn.to_k", "attn.norm_k"): x for name, x in term().items()}, "norm_k"),
    "larger convolution": ({name.replace(MODULE, "down_block.downsample.conv"): x
                            for name, x in term().items()}, "downsample"),
    "no B": (without(term(), "lora_B.weight"), "has no B"),
    "no A": (without(term(), "lora_A.weight"), "has no A"),
    "elsewhere": ({name.replace("blocks.0", "blocks.9"): x for name, x in term().items()},
                  "no counterpart"),
    "kohya elsewhere": ({"lora_unet_down_blocks_0.lora_up.weight": A}, "no counterpart"),
    "extra": (term() | {"transformer.bias": torch.ones(2)}, "transformer.bias"),
    "no terms": ({"weight": torch.ones(2)}, "weight is no term"),
    "nothing": ({}, "nothing in it"),
    "alpha alone": ({f"{STEM}.alpha": torch.tensor(1.0)}, "has no A"),
    "two alphas": (term(alpha=[1.0, 2.0]), "alpha is not one number"),
    "no alpha": (term() | {f"{STEM}.alpha": torch.ones(0)}, "alpha is not one number"),
    "infinite alpha": (term(alpha=float("inf")), "alpha is not one number"),
    "huge alpha": (term() | {f"{STEM}.alpha": torch.tensor(1e300, dtype=torch.float64)}, "finite"),
    "NaN": (term() | {f"{STEM}.lora_A.weight": torch.full((2, 16), torch.nan)}, "not finite"),
    "infinite": (term() | {f"{STEM}.lora_B.weight": torch.full((16, 2), torch.inf)}, "not finite"),
    "integers": (term() | {f"{STEM}.lora_B.weight": torch.ones(16, 2, dtype=torch.int8)}, "int8"),
    "twice": (term() | {f"unet.{MODULE}.lora_down.weight": A.clone()}, "for one weight"),
    "two adapters": ({f"{MODULE}.lora_A.one.weight": A, f"{MODULE}.lora_B.two.weight": B},
                     "several LoRAs: one, two"),
    "DoRA": (term() | {f"{STEM}.lora_magnitude_vector.weight": torch.ones(16)}, "DoRA"),
    "kohya's DoRA": (term() | {f"{STEM}.dora_scale": torch.ones(16, 1)}, "DoRA"),
    "LoHa": ({f"lora_unet_{KOHYA}.hada_w1_a": A}, "LoHa"),
    "LoKr": ({f"lora_unet_{KOHYA}.lokr_w1": A}, "LoKr"),
    "middle": (term() | {f"{STEM}.lora_mid.weight": A.clone()}, "middle"),
    "difference": (term() | {f"{STEM}.diff": B @ A}, "full weight differences"),
    "embedding": ({f"{STEM}.lora_embedding_A": A}, "embedding"),
    "bias": (term() | {f"{STEM}.lora_B.bias": torch.ones(16)}, "a bias"),
    "processor": ({f"{STEM.removesuffix('to_k')}processor.to_k_lora.down.weight": A}, "processors")}
CONFIGS_REFUSED = {
    "no JSON": ("{", "not a JSON object"), "deep": ("[" * 100_000, "not a JSON object"),
    "a list": ([1], "not a JSON object"), "text": ({"lora_alpha": "8"}, "lora_alpha '8'"),
    "NaN": ('{"lora_alpha": NaN}', "lora_alpha"), "bool": ({"lora_alpha": True}, "lora_alpha"),
    "huge": ({"lora_alpha": 10 ** 400}, "lora_alpha"), "rank": ({"r": 4}, "rank 2"),
    "pattern": ({"alpha_pattern": 3}, "alpha_pattern"),
    "pattern's value": ({"alpha_pattern": {"to_k": [1]}}, "lora_alpha [1]"),
    "expression": ({"alpha_pattern": {"(a+)+$": 1}}, "(a+)+"),
    "DoRA": ({"use_dora": True}, "DoRA"), "another alpha": ({"lora_alpha": 9}, "alpha 4")}


def assert_nothing_merged(path, word):
    """A CheckpointError of one line that names the file and the reason; the model is unchanged."""
    model = tiny_transformer()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        merge_lora(model, path)
    message = str(caught.value)
    assert message.startswith(str(path)) and word in message and "\n" not in message, message
    assert len(message) < 400 + len(str(path))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_do_not_fit(tmp_path, kind):
    """Also if the first terms of the file are good."""
    tensors, word = BROKEN[kind]
    assert_nothing_merged(save(tmp_path / "name.lora", tensors, format="pt"), word)
    good = {"context_embedder.lora_A.weight": torch.randn(2, 12),
            "context_embedder.lora_B.weight": torch.randn(16, 2)}
    if tensors:
        assert_nothing_merged(save(tmp_path / "name.lora", good | tensors), word)


@pytest.mark.parametrize("kind", CONFIGS_REFUSED)
def test_configs_that_are_refused(tmp_path, kind):
    text, word = CONFIGS_REFUSED[kind]
    assert_nothing_merged(save(tmp_path / "lora", term(alpha=4.0), **header(text)), word)


def test_files_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")                  # opening it would hang
    (tmp_path / "empty").touch()
    whole = save(tmp_path / "whole", term()).read_bytes()
    (tmp_path / "cut").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    for name, word in (("pipe", "not a regular file"), ("empty", "no safetensors file"),
                       ("cut", "no safetensors file"), ("pickle", "no safetensors file"),
                       ("nowhere", "no such file"), ("", "a folder"), ("x" * 999, "no such file"),
                       ("cut/x", "no such file")):
        assert_nothing_merged(tmp_path / name, word)
