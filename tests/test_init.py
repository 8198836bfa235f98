"""What a run begins with: --init, what is in the folder, and what is refused at once."""
import json
import shutil

import pytest
import torch
from common import photos
from safetensors.torch import load_file
from tiny_training import (RESULTS, TEXT_WEIGHTS, TRANSFORMER_WEIGHTS, VQ_WEIGHTS,
                           assert_same_tensors, command, contents, copy_run, losses, refused,
                           shrink, trained_run)

import clip
import meissonic
import train
import vq
from engine.checkpoint import UserError
from engine.distributed import Run
from engine.model_folder import check_stages


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture
def model(tmp_path):
    """A whole model, as somebody else would hand it on."""
    return copy_run(tmp_path / "model", "*.checkpoint.*", "*.png")


def change_vq(folder):
    """Give a model folder another VQ model of the same sizes."""
    torch.manual_seed(1)
    config = vq.VQModel.from_pretrained(folder / "vqvae").config
    vq.VQModel(config).save_pretrained(folder / "vqvae")


# -----------------------------------------------------------------------------
# --init


def test_training_goes_on_from_a_model(model, tmp_path):
    """The tokenizer and the VQ model are kept; with a learning rate of nearly nothing so are the
    other weights."""
    out = tmp_path / "run"
    command("--out", out, "--init", model, "--lr", 1e-9, "--stage", "4")
    assert_same_tensors(model, out, VQ_WEIGHTS, TRANSFORMER_WEIGHTS, TEXT_WEIGHTS)
    assert (model / "tokenizer/vocab.json").read_bytes() == \
        (out / "tokenizer/vocab.json").read_bytes()


@pytest.mark.parametrize("arguments", (["--stage", "1"], ["--stage", "4", "--lora", "2"],
                                       ["--encode"]), ids=lambda words: words[-1])
def test_a_model_is_not_written_over_by_another(model, tmp_path, capsys, arguments):
    """A forgotten --out must not cost the run in the default folder."""
    out = copy_run(tmp_path / "run")
    change_vq(model)
    before = contents(out)
    arguments += ["--data", photos(tmp_path / "photos", number=2)]
    assert "another vqvae" in refused(capsys, "--out", out, "--init", model, *arguments)
    assert contents(out) == before


def test_a_model_may_be_named_again(model, tmp_path):
    """First to encode, then to train. An interrupted copy is begun again."""
    out, data = tmp_path / "run", ["--data", photos(tmp_path / "photos", number=8)]
    shutil.copytree(model / "vqvae", out / ".meissonic-4194305-0a")
    command("--out", out, "--init", model, "--stage", "1", "--encode", *data)
    command("--out", out, "--init", model, "--stage", "1", "--steps", 2, *data)
    assert_same_tensors(model, out, VQ_WEIGHTS)
    assert not list(out.glob(".*"))
    before, after = load_file(model / TRANSFORMER_WEIGHTS), load_file(out / TRANSFORMER_WEIGHTS)
    assert not torch.equal(before["project_to_hidden.weight"], after["project_to_hidden.weight"])


def test_a_folder_may_be_its_own_beginning(tmp_path):
    out = copy_run(tmp_path / "run")
    command("--out", out, "--init", out, "--stage", "4", "--steps", 1, "--lr", 1e-9)
    assert_same_tensors(trained_run(), out, *RESULTS[:3])


def test_what_init_brought_stays_without_naming_it_again(model, tmp_path):
    """A VQ model without checkpoints was brought: --resume does not train another."""
    out = tmp_path / "run"
    shutil.rmtree(model / "transformer")
    command("--out", out, "--init", model, "--stage", "1", "--steps", 2)
    command("--out", out, "--resume", "--batch", 8)
    assert_same_tensors(model, out, VQ_WEIGHTS)
    assert {stage for stage, _ in losses(out)} == {"1", "3", "4"}


def test_a_text_encoder_needs_its_tokenizer(model, tmp_path, capsys):
    shutil.rmtree(model / "tokenizer")
    assert "tokenizer" in refused(capsys, "--out", tmp_path / "run", "--init", model)


@pytest.mark.parametrize("name", ("tokenizer/merges.txt", "vqvae/config.json", TEXT_WEIGHTS))
def test_an_incomplete_part_is_named_and_not_copied(model, tmp_path, capsys, name):
    (model / name).unlink()
    out = tmp_path / "run"
    part, file = name.split("/")
    message = refused(capsys, "--out", out, "--init", model, "--stage", "1")
    assert part in message and file in message
    assert not (out / part).exists()


def test_an_incomplete_part_in_the_folder_is_named(tmp_path, capsys):
    """It is not taken for one that is still to be made."""
    out = copy_run(tmp_path / "run", "*.checkpoint.*")
    (out / "text_encoder/config.json").unlink()
    message = refused(capsys, "--out", out, "--stage", "4")
    assert "text_encoder" in message and "config.json" in message


def test_parts_that_do_not_fit_are_refused_before_encoding(model, tmp_path, capsys):
    config = vq.VQModel.from_pretrained(model / "vqvae").config
    config.num_vq_embeddings += 1
    vq.VQModel(config).save_pretrained(model / "vqvae")
    out, data = tmp_path / "run", ["--data", photos(tmp_path / "photos", number=2)]
    assert "codes" in refused(capsys, "--out", out, "--init", model, "--stage", "1", *data)
    assert not (out / "tokens").exists()


def test_a_run_says_which_sizes_of_the_preset_it_does_not_use(model, tmp_path, monkeypatch, capsys):
    """--init has the last word on sizes. Where it differs from the preset a note says so."""
    arguments = "--init", model, "--stage", "1", "--steps", 1, "--out"
    command(*arguments, tmp_path / "same")
    assert "keeps its sizes" not in capsys.readouterr().err
    larger = train.MODELS["tiny"]["transformer"] | dict(num_layers=3)
    monkeypatch.setitem(train.MODELS["tiny"], "transformer", larger)
    command(*arguments, tmp_path / "other")
    err = capsys.readouterr().err
    assert "num_layers 1, not 3" in err and err.count("keeps its sizes") == 1
    config = meissonic.Config.from_json(tmp_path / "other/transformer/config.json")
    assert config.num_layers == 1


def test_a_stage_that_init_makes_needless_says_so(model, tmp_path, capsys):
    command("--out", tmp_path / "run", "--init", model, "--stage", "vq")
    assert "stage vq is left out" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# What is in the folder


def test_a_second_run_in_a_folder_is_refused(tmp_path, capsys):
    out = copy_run(tmp_path / "run")
    before = contents(out)
    assert "--resume" in refused(capsys, "--out", out)
    assert contents(out) == before


def test_a_frozen_text_encoder_stays_as_it_is(tmp_path, monkeypatch):
    """In its own precision: a resumed run must read what the uninterrupted one has in memory."""
    out = copy_run(tmp_path / "run", "*.checkpoint.*")
    encoder = clip.TextEncoder.from_pretrained(out / "text_encoder")
    encoder.text_projection.weight += 1e-5 * torch.rand_like(encoder.text_projection.weight)
    encoder.save_pretrained(out / "text_encoder")
    before = (out / TEXT_WEIGHTS).read_bytes()
    monkeypatch.setitem(train.PRESETS["tiny"]["3"], "text_lr", 0.0)
    command("--out", out, "--stage", "3", "--steps", 1)
    assert (out / TEXT_WEIGHTS).read_bytes() == before
    assert load_file(out / TEXT_WEIGHTS)["text_projection.weight"].dtype == torch.float32


def test_compression_is_added_to_the_model_of_the_stage_before():
    """Stage 1 trains without compression layers, stage 3 with them."""
    first = load_file(trained_run() / "1-0000030.checkpoint.safetensors")
    last = load_file(trained_run() / "3-0000004.checkpoint.safetensors")
    name = "params.transformer.down_block.downsample.conv.weight"
    assert name in last and name not in first
    config = json.loads((trained_run() / "transformer/config.json").read_text())
    assert config["downsample"] and config["upsample"]


# -----------------------------------------------------------------------------
# At once, not after the stages before


def test_a_batch_that_does_not_divide(tmp_path, capsys):
    assert "does not divide" in refused(capsys, "--out", tmp_path, "--accumulate", 7)
    assert not list(tmp_path.iterdir())


def test_a_frozen_text_encoder_must_be_there(tmp_path, capsys):
    data = photos(tmp_path / "photos")
    out = tmp_path / "run"
    message = refused(capsys, "--out", out, "--preset", "paper", "--data", data)
    assert "--init" in message and "--stage text" not in message
    assert not list(out.iterdir())
    run = Run(out, {"text": {}, "1": {"text_lr": 0.0}})
    with pytest.raises(UserError, match="--stage text"):
        check_stages(run, ["1"])
    check_stages(run, ["text", "1"])


def test_the_preset_paper_wants_files(tmp_path, capsys):
    assert "--data" in refused(capsys, "--out", tmp_path, "--preset", "paper")
    assert not list(tmp_path.iterdir())


def test_a_lora_needs_a_model(model, tmp_path, capsys):
    shutil.rmtree(model / "transformer")
    arguments = "--out", tmp_path / "run", "--init", model, "--stage", "1", "--lora", 2
    assert "--init" in refused(capsys, *arguments)


def test_a_stage_without_a_tokenizer(tmp_path, capsys):
    assert "tokenizer" in refused(capsys, "--out", tmp_path, "--stage", "1")
