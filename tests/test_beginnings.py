"""What a run begins with and goes on with: --init, --resume, and what is refused before hours are spent on it."""
import shutil

import pytest
import torch
from test_stages import base, photos, small, train_on  # noqa: F401 (fixtures)
from test_train import command, losses, same_files, shrink

import meissonic
import train
import trainer
import vq

VQ, TRANSFORMER = "vqvae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"


def refused(capsys, *arguments):
    """What a command that ends with status 2 says, in its last line."""
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def tree(folder):
    """{name: (bytes, time)} of all files below a folder."""
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):  # noqa: F811
    """A whole model, barely trained."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(train, "look", lambda *a: None)
        return train_on(base, tmp_path_factory.mktemp("model") / "run", "--stage", "1", "--steps", "2")


# ---------------------------------------------------------------------------------------------------------
# --init


@pytest.mark.parametrize("arguments", (["--stage", "1"], ["--stage", "4", "--lora", "2"], ["--encode"]), ids=lambda a: a[-1])
def test_a_model_is_not_written_over_by_another(model, tmp_path, capsys, arguments):
    """A forgotten --out must not cost the run that lies in the default one."""
    out, other = (shutil.copytree(model, tmp_path / name) for name in ("run", "other"))
    torch.manual_seed(1)
    vq.VQModel(vq.VQModel.from_pretrained(other / "vqvae").config).save_pretrained(other / "vqvae")
    before = tree(out)
    assert "another vqvae" in refused(capsys, "--out", out, "--init", other, *arguments)
    assert tree(out) == before


def test_the_same_model_may_be_named_again(model, tmp_path):
    """To encode, then to train; an interrupted copy is begun again."""
    out = tmp_path / "run"
    shutil.copytree(model / "vqvae", out / ".vqvae")
    (out / ".vqvae" / "config.json").unlink()
    command("--out", out, "--init", model, "--stage", "1", "--encode")
    command("--out", out, "--init", model, "--stage", "1", "--steps", "2")
    same_files(model, out, VQ)
    assert not list(out.glob(".*")) and not torch.equal(*(
        meissonic.Transformer.from_pretrained(f / "transformer").project_to_hidden.weight for f in (model, out)))


def test_a_text_encoder_wants_its_tokenizer(model, tmp_path, capsys):
    shutil.copytree(model / "text_encoder", tmp_path / "parts" / "text_encoder")
    assert "tokenizer" in refused(capsys, "--out", tmp_path / "run", "--init", tmp_path / "parts")


def test_parts_that_do_not_fit_are_refused_before_encoding(model, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "other", ignore=shutil.ignore_patterns("tokens", "*.checkpoint.*"))
    config = vq.VQModel.from_pretrained(other / "vqvae").config
    config.num_vq_embeddings += 1
    vq.VQModel(config).save_pretrained(other / "vqvae")
    assert "codes" in refused(capsys, "--out", tmp_path / "run", "--init", other, "--stage", "1")
    assert not (tmp_path / "run" / "tokens").exists()


def test_saved_weights_have_no_older_twin(model, tmp_path):
    """sample.py in 16 bits would draw with it."""
    out = shutil.copytree(model, tmp_path / "run")
    for twin in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"):
        (out / "transformer" / twin).write_bytes(b"old")
    command("--out", out, "--stage", "1", "--steps", "2")
    files = vq.weight_files(out / "transformer", "diffusion_pytorch_model", torch.bfloat16)
    assert files == [out / TRANSFORMER] and not list((out / "transformer").glob("*.fp16*"))


@pytest.mark.parametrize("without", train.ABLATIONS)
def test_a_part_that_is_trained_already_cannot_be_left_out(model, tmp_path, capsys, without):
    out = shutil.copytree(model, tmp_path / "run")
    grown = train.add_compression(meissonic.Transformer.from_pretrained(out / "transformer"))
    grown.save_pretrained(out / "transformer")
    assert f"--without {without}" in refused(capsys, "--out", out, "--stage", "3", "--without", without)


def test_what_was_left_out_stays_so_in_an_earlier_stage(base, tmp_path):  # noqa: F811
    """Compression, which an earlier stage does not add, is not what was left out here."""
    out = train_on(base, tmp_path / "run", "--stage", "3", "--steps", "2", "--without", "rope")
    command("--out", out, "--stage", "1", "--steps", "2", "--without", "rope")
    config = meissonic.Transformer.from_pretrained(out / "transformer").config
    assert config.without == ("rope",) and config.downsample


# ---------------------------------------------------------------------------------------------------------
# --resume


def test_what_init_brought_stays_without_naming_it_again(model, tmp_path, monkeypatch):
    """A VQ model without checkpoints was brought: --resume alone does not train it anew."""
    out = tmp_path / "run"
    parts = shutil.copytree(model, tmp_path / "parts", ignore=shutil.ignore_patterns("transformer", "tokens", "*.checkpoint.*"))
    command("--out", out, "--init", parts, "--stage", "1", "--steps", "2")
    monkeypatch.setattr(train, "train_text", None)
    monkeypatch.setattr(train.train_vq, "train", None)
    command("--out", out, "--resume")
    same_files(model, out, VQ)
    assert {stage for stage, _ in losses(out)} == {"1", "3", "4"}


def test_a_run_goes_on_as_it_began(model, tmp_path, capsys):
    out, folder = shutil.copytree(model, tmp_path / "run"), photos(tmp_path / "photos")
    before = tree(out)
    again = "--out", out, "--stage", "1", "--steps", "4", "--resume"
    assert "--seed 0" in refused(capsys, *again, "--seed", "1")
    assert "--data shapes" in refused(capsys, *again, "--data", folder)
    assert tree(out) == before
    command(*again)


def test_halves_of_files_are_swept(model, tmp_path):
    out = shutil.copytree(model, tmp_path / "run")
    for half in (".1-0000500.checkpoint.safetensors.17", "transformer/.diffusion_pytorch_model.safetensors.17"):
        (out / half).write_bytes(b"half")
    command("--out", out, "--stage", "1", "--steps", "4", "--resume")
    assert not list(out.rglob(".*"))


def test_loss_that_stays_non_finite_ends_the_run(model, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(model, tmp_path / "run")
    forward, seen = train.Student.forward, []
    monkeypatch.setattr(train.Student, "forward", lambda self, ids, tokens, *rest: (
        seen.append(tokens), [x * float("nan") for x in forward(self, ids, tokens, *rest)])[1])
    assert "--lr" in refused(capsys, "--out", out, "--stage", "1", "--steps", "40", "--resume")
    assert len(seen) == 12 and not any(torch.equal(seen[0], seen[i]) for i in (3, 6, 9))          # other data each time
    assert [p.name for p in trainer.checkpoints(out, "1")][-1] == "1-0000002.checkpoint.safetensors"


# ---------------------------------------------------------------------------------------------------------
# At once


def test_what_stages_lack_is_said_at_once(tmp_path, capsys):
    """Not after the stages before."""
    assert "--init" in (error := refused(capsys, "--out", tmp_path / "a", "--preset", "paper")) and "--stage text" not in error
    assert "does not divide" in refused(capsys, "--out", tmp_path / "b", "--accumulate", "7")
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


def test_photographs_are_not_of_eight_colours():
    """With pictures of one's own the preset cpu trains the whole VQ model, as the preset shapes does."""
    arguments = ["--preset", "cpu", "--data", "photos", "--batch", "8"]
    stages = train.changed(train.PRESETS, train.parse_arguments(arguments))
    assert stages["vq"] == train.PRESETS["shapes"]["vq"] | {"batch": 8} and "patches" in train.PRESETS["cpu"]["vq"]


@pytest.mark.parametrize("able", (True, False))
def test_products_are_bfloat16_where_there_are_instructions_for_it(tmp_path, monkeypatch, able):
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda: able)
    run = trainer.Run(tmp_path, train.PRESETS["shapes"])
    with run.precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == run.dtype == (torch.bfloat16 if able else torch.float32)
