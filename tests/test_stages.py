"""The recipe's other parts: compression added late, data from a disk, encoding, LoRA, ablations, scale."""
import json
import shutil

import numpy as np
import pytest
import torch
from common import ROOT, tiny_transformer
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import SIZE, command, losses, shrink, start, tiny_batch, tiny_student

import clip
import data
import dataset
import disk
import meissonic
import sample
import train
import train_vq
import trainer
import vq


LOOK = train.look


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setattr(train, "look", lambda *a: None)
    monkeypatch.setattr(trainer.Log.__init__, "__defaults__", (1,))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tokenizer and a VQ model, barely trained."""
    out = tmp_path_factory.mktemp("base") / "run"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for stage in ("tokenizer", "vq"):
            command("--out", out, "--stage", stage, *(["--steps", "8"] if stage == "vq" else []))
    return out


def train_on(base, out, *arguments):
    shutil.copytree(base, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("log.jsonl"))
    command("--out", out, *arguments)
    return out


# ---------------------------------------------------------------------------------------------------------
# Stages


def test_presets_follow_the_paper():
    """256, 512, 1024 px; batches and steps of section 2.5; compression from stage 3 on, the text encoder in stage 4."""
    paper = train.PRESETS["paper"]
    assert [paper[s]["size"] for s in "1234"] == [256, 512, 1024, 1024]
    assert [paper[s]["batch"] for s in "123"] == [2048, 512, 256] and [paper[s]["steps"] for s in "123"] == [100_000, 100_000, 42_000]
    assert [paper[s]["compress"] for s in "1234"] == [False, False, True, True]
    assert [paper[s]["text"] > 0 for s in "1234"] == [False, False, False, True]
    assert [paper[s]["floor"] for s in "1234"] == [1] * 4                                    # "a fixed learning rate"
    for preset in train.PRESETS.values():
        assert list(preset) == [s for s in train.STAGES if s in preset]


def test_paper_models_have_the_published_sizes():
    with torch.device("meta"):
        encoder, transformer = train.build("paper", {}, True)
    assert encoder.config.hidden_size == 1024 and len(encoder.state_dict()) > 200
    assert sum(p.numel() for p in transformer.parameters()) > 1.0e9 and transformer.config.downsample


def test_compression_is_added_smoothly():
    """The weights are carried over; a picture of 2 x 2 equal tokens, twice as large, gives about the plain model's
    features, where fresh layers give others."""
    plain = tiny_transformer(downsample=False).eval()
    torch.manual_seed(1)
    grown = train.add_compression(plain).eval()
    assert grown.config.downsample and not plain.config.downsample
    for name, value in plain.state_dict().items():
        assert torch.equal(grown.state_dict()[name], value), name
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (2, 4, 4), generator=g)
    conditions = [torch.randn(2, 5, 12, generator=g), torch.randn(2, 16, generator=g), torch.rand(2, 5), torch.full((2,), 0.5)]
    small = plain(tokens, *conditions)
    large = tokens.repeat_interleave(2, 1).repeat_interleave(2, 2)
    expected = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.manual_seed(1)
    fresh = meissonic.Transformer(grown.config)
    fresh.load_state_dict(plain.state_dict(), strict=False)
    error = lambda model: (model(large, *conditions) - expected).pow(2).mean().sqrt() / expected.std()
    assert error(grown) < 0.35 < 0.7 < error(fresh.eval()), (error(grown), error(fresh))


def test_frozen_text_stays(base, tmp_path, monkeypatch):
    """In its own precision too: what is resumed must read what the uninterrupted run has in memory."""
    out = train_on(base, tmp_path / "run", "--stage", "1", "--steps", "2")
    encoder, file = clip.TextEncoder.from_pretrained(out / "text_encoder"), out / "text_encoder" / "model.safetensors"
    encoder.text_projection.weight += 1e-5 * torch.rand_like(encoder.text_projection.weight)
    encoder.save_pretrained(out / "text_encoder")
    before = file.read_bytes()
    monkeypatch.setitem(train.PRESETS["shapes"]["3"], "text", 0.0)
    command("--out", out, "--stage", "3")
    assert file.read_bytes() == before and load_file(file)["text_projection.weight"].dtype == torch.float32
    assert "down_block.downsample.conv.weight" in load_file(out / "transformer/diffusion_pytorch_model.safetensors")


def test_checkpoints_are_thinned(base, tmp_path):
    out = train_on(base, tmp_path / "run", "--stage", "1", "--steps", "40")
    assert [p.name for p in trainer.checkpoints(out, "1")] == ["1-0000030.checkpoint.safetensors", "1-0000040.checkpoint.safetensors"]


# ---------------------------------------------------------------------------------------------------------
# The world's scores and crops


def test_the_score_tells_how_clean_a_picture_is():
    """Distance to the nearest colour of the palette grows as the score falls, and clean pictures score 6."""
    palette = np.array(list(data.COLOURS.values()), np.float32)
    scores, dirt = [], []
    for i in range(200):
        picture, _, micro = data.training_example(np.random.default_rng([7, i]), 32)
        away = np.sqrt(((picture[:, :, None].astype(np.float32) - palette) ** 2).sum(-1)).min(-1)
        scores.append(micro[4])
        dirt.append(np.median(away))
    scores, dirt = np.array(scores), np.array(dirt)
    assert scores.max() == data.CLEAN and 2 <= scores.min() < 3 and 0.65 < (scores == data.CLEAN).mean() < 0.85
    assert dirt[scores == data.CLEAN].max() < 3 and dirt[scores < 4].mean() > 15
    spoilt = scores < data.CLEAN
    assert np.corrcoef(scores[spoilt], dirt[spoilt])[0, 1] < -0.7


def test_a_low_score_asks_for_a_spoilt_picture(steps=500, number=1500, batch=32):
    """Trained on pictures with their scores, a model draws clean ones for a score of 6 and spoilt ones for 2. Its codes are those
    of a rough VQ: 20 greys of 2 x 2 pixels, even or not."""
    def codes(i):
        picture, _, micro = data.training_example(np.random.default_rng([5, i]), 16, concepts=1.0, odd=0.5)
        patches = picture.astype(float).reshape(8, 2, 8, 2, 3).swapaxes(1, 2).reshape(8, 8, 4, 3)
        return patches.mean((2, 3)) // 13 + 20 * (patches.std(2).max(-1) > 6), micro
    tokens, micro = (torch.from_numpy(np.stack(x)) for x in zip(*map(codes, range(number))))
    uneven, score = (lambda tokens: (tokens >= 20).float().mean().item()), micro[:, 4]
    assert uneven(tokens[score == data.CLEAN]) < 0.3 and uneven(tokens[score < 4]) > 0.9
    student, rng, ids = tiny_student(), np.random.default_rng(0), torch.zeros(batch, 6, dtype=torch.int64)
    optimizer = torch.optim.AdamW(trainer.decay_groups(student))
    for step in range(steps):
        pick, (mask, rates) = rng.integers(number, size=batch), map(torch.from_numpy, train.sample_mask(rng, batch, 64))
        loss = student(ids, tokens[pick].long(), mask, rates, micro[pick])[0] / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.step()
    with torch.no_grad():
        hidden, pooled = student.encoder(ids)
    for score, right in ((data.CLEAN, lambda share: share < 0.4), (data.CLEAN - 4, lambda share: share > 0.8)):
        text = meissonic.Text(hidden, pooled, torch.tensor([[16, 16, 0, 0, score]]).expand(batch, 5))
        empty = torch.full((batch, 8, 8), student.transformer.config.mask_token)
        drawn = meissonic.sample(student.transformer.eval(), text, text, empty, range(batch), 16, 1.0, convention="rate")
        assert right(uneven(drawn)), (score, uneven(drawn))


def test_crops_are_cut_from_larger_pictures():
    """The crop's corner and the original size say which part of the larger picture this is."""
    seen = [data.training_example(np.random.default_rng([3, i]), 32) for i in range(150)]
    micro = np.stack([m for _, _, m in seen])
    assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p, _, _ in seen)
    cropped = micro[:, 0] > 32
    assert 0.1 < cropped.mean() < 0.4 and micro[:, 0].max() <= 40 and (micro[:, 0] == micro[:, 1]).all()
    assert (micro[:, 2:4] <= micro[:, :1] - 32).all() and (micro[~cropped, 2:4] == 0).all() and micro[cropped, 2:4].max() > 0


def test_concepts_are_whole_and_fill_small_pictures():
    for size, sizes in ((32, {0.25, 0.375}), (128, {0.125, 0.1875})):
        seen = [data.concept(np.random.default_rng(i), size) for i in range(300)]
        items = [scene.items[0] for _, scene, _ in seen]
        assert all(data.holds(scene, claim) and text for text, scene, claim in seen)
        assert {i.r for i in items} == sizes
        assert all(i.r <= min(i.x, 1 - i.x, i.y, 1 - i.y) for i in items) and any(i.r == i.x for i in items)
        assert not {(i.colour, i.noun) for i in items} & data.HELD_OUT


# ---------------------------------------------------------------------------------------------------------
# Pictures of one's own, and their tokens


def photos(folder, number=12, broken=()):
    folder.mkdir()
    for i in range(number):
        picture, text, _ = data.training_example(np.random.default_rng([9, i]), 40)
        path = folder / f"{i:03d}.png"
        Image.fromarray(picture).save(path)
        path.with_suffix(".txt").write_text(text)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])
    return folder


def test_training_on_a_folder(base, tmp_path, capsys):
    """A broken picture is skipped, counted and named; the others are trained on, with their sizes as conditions."""
    out = train_on(base, tmp_path / "run", "--stage", "1", "--steps", "2", "--data", photos(tmp_path / "photos", broken=(3, 7)))
    assert len(losses(out, "1")) == 2
    tokens = dataset.Tokens(dataset.token_folder(trainer.Run(out, train.PRESETS["shapes"]), "1"))
    assert len(tokens) == 10
    _, _, micro = tokens[np.arange(10)]
    assert (micro == torch.tensor([40.0, 40, 0, 0, data.CLEAN])).all()
    err = capsys.readouterr().err
    assert "2 pictures skipped" in err and "003.png" in err
    assert len((out / "skipped.txt").read_text().splitlines()) == 2
    sample.Pipeline(out)


def test_an_interrupted_encode_loses_nothing(base, tmp_path, monkeypatch):
    """Stopped in the third file, then resumed: the first two are not made again, and all are as uninterrupted."""
    monkeypatch.setattr(dataset.encode, "__defaults__", (16,))
    whole = train_on(base, tmp_path / "whole", "--stage", "1", "--encode")
    read, calls = data.training_example, []

    def stop(*arguments, **shares):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return read(*arguments, **shares)

    monkeypatch.setattr(data, "training_example", stop)
    with pytest.raises(SystemExit):
        train_on(base, tmp_path / "run", "--stage", "1", "--encode")
    files = sorted((tmp_path / "run" / "tokens" / "1").iterdir())
    assert [p.name for p in files] == ["000000.safetensors", "000001.safetensors"]
    stamps = [p.stat().st_mtime_ns for p in files]
    command("--out", tmp_path / "run", "--stage", "1", "--encode", "--resume")
    assert [p.stat().st_mtime_ns for p in files] == stamps
    names = sorted(p.name for p in (whole / "tokens" / "1").iterdir())
    assert len(names) == 13
    for name in names:
        a, b = (load_file(root / "tokens" / "1" / name) for root in (whole, tmp_path / "run"))
        assert all(torch.equal(a[k], b[k]) for k in ("tokens", "text", "micro"))


def test_readers_of_their_own_give_the_same(base, tmp_path, monkeypatch):
    """Pictures that other processes read: the same files, and the same are skipped."""
    monkeypatch.setattr(dataset.encode, "__defaults__", (5,))
    folder, made = photos(tmp_path / "photos", broken=(3, 7)), []
    for name, many in (("alone", 1000), ("readers", 1)):
        monkeypatch.setattr(dataset, "MANY", many)
        out = train_on(base, tmp_path / name, "--stage", "1", "--encode", "--data", folder)
        made.append([load_file(path) for path in sorted((out / "tokens" / "1").iterdir())])
        assert len((out / "skipped.txt").read_text().splitlines()) == 2
    assert [len(file["text"]) for file in made[0]] == [4, 4, 2]
    for alone, read in zip(*made):
        assert all(torch.equal(alone[k], read[k]) for k in alone)


def test_tokens_are_made_again_for_another_model_alone(base, tmp_path):
    """Encoding, then training without --resume: the same files. With other VQ weights or fewer pictures: new ones."""
    out = train_on(base, tmp_path / "run", "--stage", "1", "--encode")
    path = out / "tokens" / "1" / "000000.safetensors"
    first = path.stat().st_mtime_ns
    command("--out", out, "--stage", "1", "--steps", "1")
    assert path.stat().st_mtime_ns == first
    model = vq.VQModel.from_pretrained(out / "vqvae")
    model.quantize.embedding.weight.mul_(-1)
    model.save_pretrained(out / "vqvae", torch.float16)
    save_file({"tokens": torch.zeros(1, 8, 8)}, path.with_name("000007.safetensors"))
    command("--out", out, "--stage", "1", "--encode")
    assert path.stat().st_mtime_ns != first and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_mended_caption_or_picture_is_encoded_again(base, tmp_path, monkeypatch):
    """And the files of the others are kept."""
    monkeypatch.setattr(dataset.encode, "__defaults__", (4,))
    folder = photos(tmp_path / "photos")
    arguments = "--stage", "1", "--encode", "--data", folder
    files = sorted((train_on(base, tmp_path / "run", *arguments) / "tokens" / "1").iterdir())
    stamps = lambda: [p.stat().st_mtime_ns for p in files]
    before = stamps()
    (folder / "005.txt").write_text("a star")
    disk._size_and_time.cache_clear()                                                  # as another process would see it
    command("--out", tmp_path / "run", *arguments)
    assert [a == b for a, b in zip(before, stamps())] == [True, False, True]
    Image.new("RGB", (40, 40), "red").save(folder / "009.png")
    disk._size_and_time.cache_clear()
    command("--out", tmp_path / "run", *arguments)
    assert [a == b for a, b in zip(before, stamps())] == [True, False, False]


def test_encoding_trains_nothing_that_is_there(base, tmp_path):
    out = train_on(base, tmp_path / "run", "--encode")
    for name in ("vqvae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "vq-0000008.checkpoint.safetensors"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert {p.name for p in (out / "tokens").iterdir()} == {"1", "3", "4"} and not (out / "transformer").exists()


def test_a_sheet_of_ones_own_captions(base, tmp_path, monkeypatch):
    """With a LoRA too; pictures of one's own have no scores."""
    folder, drawn = photos(tmp_path / "photos"), []
    out = train_on(base, tmp_path / "run", "--stage", "1", "--steps", "2", "--data", folder)
    call = sample.Pipeline.__call__
    monkeypatch.setattr(sample.Pipeline, "__call__", lambda self, texts, seeds: (drawn.append((self.lora, *texts)), call(self, texts, seeds))[1])
    LOOK(trainer.Run(out, train.PRESETS["shapes"], data=folder), "1", 2)
    assert [text for _, text in drawn] == [(folder / f"{i:03d}.txt").read_text() for i in range(12)]
    command("--out", out, "--stage", "4", "--steps", "2", "--lora", "2", "--data", folder)
    LOOK(trainer.Run(out, train.PRESETS["shapes"], data=folder, lora=2), "4", 2)
    assert drawn[-1][0] == out / "lora.safetensors"
    assert Image.open(out / "sheet.png").size == (5 * SIZE, 4 * SIZE)
    assert not any(e.get("event") == "scores" for e in trainer.entries(out / "log.jsonl"))


def test_each_example_comes_once_in_a_pass():
    for batch, number in ((8, 30), (7, 20), (16, 10)):
        seen = np.concatenate([dataset.examples([0, 0], i, batch, number) for i in range(4 * number)])
        for epoch in range(len(seen) // number):
            assert sorted(seen[epoch * number:(epoch + 1) * number]) == list(range(number))
        assert not np.array_equal(seen[:number], seen[number:2 * number])
    assert not np.array_equal(dataset.examples([0, 0], 0, 8, 30), dataset.examples([0, 1], 0, 8, 30))


def test_tokens_are_read_across_files(tmp_path):
    g = torch.Generator().manual_seed(0)
    parts = [dict(tokens=torch.randint(40_000, (n, 2, 2), generator=g).to(torch.int16),        # beyond int16: wraps, and back
                  text=torch.arange(n * 3, dtype=torch.int32).view(n, 3), micro=torch.rand(n, 5)) for n in (3, 1, 4)]
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors")
    tokens = dataset.Tokens(tmp_path)
    index = np.array([7, 0, 3, 2, 4])
    got = tokens[index]
    for key, value in zip(("tokens", "text", "micro"), got):
        expected = torch.cat([p[key] for p in parts])[torch.from_numpy(index)]
        assert torch.equal(value, expected.long() & 0xFFFF if key == "tokens" else expected.to(value.dtype))
    assert len(tokens) == 8 and (got[0] >= 0).all()


# ---------------------------------------------------------------------------------------------------------
# LoRA


def with_lora():
    """A model with random low-rank terms, inputs, and its outputs before."""
    model, generator = tiny_transformer(), torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (2, 4, 4), generator=generator)
    inputs = (tokens, torch.randn(2, 5, 12, generator=generator), torch.randn(2, 16, generator=generator),
              torch.rand(2, 5, generator=generator), torch.tensor([0.5]))
    plain = model(*inputs)
    meissonic.add_lora(model, 3)
    torch.testing.assert_close(model(*inputs), plain)                # a fresh one changes nothing
    for name, p in model.named_parameters():
        if name.endswith("0.B"):
            torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model, inputs, plain


@pytest.mark.parametrize("told, factor", (("rate", 1), ("rate1000", 1000), (None, 1000)))
def test_the_rate_is_told_as_the_model_knows_it(tmp_path, told, factor):
    """Ours: the rate. Models of the official script, the public ones among them, which do not say: 1000 times that."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"rate_condition": told} if told else {}))
    assert train.convention_of(tmp_path / "nowhere") == "rate"
    student, (ids, tokens, mask, rates, micro), seen = tiny_student(), tiny_batch(), []
    student.convention, features = train.convention_of(tmp_path), student.transformer.features
    student.transformer.features = lambda *a: (seen.append(a[4]), features(*a))[1]
    student(ids, tokens, mask, rates, micro)
    torch.testing.assert_close(seen[0], (rates * 1000).round() / 1000 * factor)


def test_lora_round_trip(tmp_path):
    model, inputs, plain = with_lora()
    meissonic.save_lora(tmp_path / "lora.safetensors", model, model.state_dict())
    names = set(load_file(tmp_path / "lora.safetensors"))
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in names and not any("qkv" in n for n in names)
    merged = tiny_transformer()
    meissonic.merge_lora(merged, tmp_path / "lora.safetensors")
    expected = model(*inputs)
    torch.testing.assert_close(merged(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01


def test_lora_scale_and_broken_files(tmp_path):
    merged, name = tiny_transformer(), "single_transformer_blocks.0.attn.to_k"
    before = merged.single_transformer_blocks[0].qkv_mlp.weight.clone()
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    good = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b,
            f"transformer.{name}.alpha": torch.tensor(4.0)}
    save_file(good, tmp_path / "good")
    meissonic.merge_lora(merged, tmp_path / "good")
    change = merged.single_transformer_blocks[0].qkv_mlp.weight - before
    torch.testing.assert_close(change[16:32], 2 * b @ a)
    assert change[:16].abs().max() == 0 and change[32:].abs().max() == 0
    wrong = {"misshaped": good | {f"transformer.{name}.lora_A.weight": torch.randn(2, 17)},
             "half": {f"transformer.{name}.lora_A.weight": a},
             "elsewhere": {"transformer.blocks.9.lora_A.weight": a.clone(), "transformer.blocks.9.lora_B.weight": b.clone()},
             "extra": good | {"transformer.bias": torch.ones(2)}, "none": {"weight": a}}
    for kind, tensors in wrong.items():
        save_file(tensors, tmp_path / kind)
        with pytest.raises(vq.CheckpointError, match=kind):
            meissonic.merge_lora(tiny_transformer(), tmp_path / kind)
    with pytest.raises(vq.CheckpointError, match="README"):
        meissonic.merge_lora(tiny_transformer(), ROOT / "README.md")


def test_a_missing_lora_file_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(["--model", "shapes", "--lora", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out.png")])
    assert caught.value.code == 2 and "nowhere" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_training_a_lora(base, tmp_path):
    """The model's own weights stay; the file is small, and sample.py draws with it."""
    out = train_on(base, tmp_path / "run", "--stage", "1", "--steps", "2")
    before = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    command("--out", out, "--stage", "4", "--steps", "10", "--lora", "2", "--lr", "0.05", "--resume", "--init", out)
    after = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    terms = load_file(out / "lora.safetensors")
    assert sum(v.numel() for v in terms.values()) < 0.5 * sum(v.numel() for v in before.values())
    assert all(v.abs().sum() > 0 for k, v in terms.items() if "lora_B" in k)
    plain, tuned = sample.Pipeline(out), sample.Pipeline(out, lora=out / "lora.safetensors")
    assert tuned(["a star"], [0])[0].size == (SIZE, SIZE)
    assert not torch.equal(*(p.transformer.single_transformer_blocks[0].proj_out.weight for p in (plain, tuned)))


def test_a_lora_wants_a_model(base, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train_on(base, tmp_path / "run", "--stage", "1", "--steps", "2", "--lora", "2")
    assert caught.value.code == 2 and "--init" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# Ablations


@pytest.mark.parametrize("without", train.ABLATIONS)
def test_training_without_a_part(base, tmp_path, without):
    """A run without one part trains, saves and draws, and the saved model is without it too."""
    out = train_on(base, tmp_path / "run", "--stage", "3", "--steps", "2", "--without", without)
    transformer = sample.Pipeline(out).transformer
    config, state = transformer.config, transformer.state_dict()
    if without == "multimodal":
        assert config.num_layers == 0 and config.num_single_layers == 2
    elif without == "compression":
        assert not config.downsample
    else:
        assert config.without == (without,)
    assert any("norm_q" in k for k in state) == (without != "qk-norm") and ("positions" in state) == (without == "rope")


@pytest.mark.parametrize("without", ("rate", "micro"))
def test_a_condition_that_is_left_out_changes_nothing(without):
    config = tiny_transformer().config
    for parts, same in (((without,), True), ((), False)):
        torch.manual_seed(0)
        model = meissonic.Transformer(meissonic.Config(**{**vars(config), "without": parts})).eval()
        inputs = [torch.zeros(1, 4, 4, dtype=torch.long), torch.ones(1, 5, 12), torch.ones(1, 16)]
        out = [model(*inputs, micro, time) for micro, time in (
            (torch.ones(1, 5), torch.tensor([0.1])),
            (torch.full((1, 5), 9.0), torch.tensor([0.1])) if without == "micro" else (torch.ones(1, 5), torch.tensor([0.9])))]
        assert torch.equal(*out) == same


def test_without_rope_positions_are_learned():
    config = tiny_transformer().config
    torch.manual_seed(0)
    model = meissonic.Transformer(meissonic.Config(**{**vars(config), "without": ("rope",)})).eval()
    tokens = torch.zeros(1, 4, 4, dtype=torch.long)
    inputs = [torch.ones(1, 5, 12), torch.ones(1, 16), torch.ones(1, 5), torch.tensor([0.1])]
    flat = model.features(tokens, *inputs)[0, ::2, ::2].flatten(0, 1)
    torch.testing.assert_close(flat, flat[:1].expand_as(flat))                      # nothing tells the places apart
    torch.nn.init.normal_(model.positions)
    flat = model.features(tokens, *inputs)[0, ::2, ::2].flatten(0, 1)
    assert (flat - flat[:1]).abs().amax(1)[1:].min() > 1e-4


# ---------------------------------------------------------------------------------------------------------
# Scale


def test_checkpointed_blocks_have_the_same_gradients():
    grads = []
    for on in (False, True):
        student, batch = tiny_student(), tiny_batch()
        student.transformer.checkpointing = on
        sum(student(*batch)).backward()
        grads.append([p.grad for p in student.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


EXACT = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import pytest, test_train, train, trainer
test_train.shrink(pytest.MonkeyPatch())
train.look = lambda *a: None
trainer.Log.__init__.__defaults__ = (1,)
trainer.Run.precision = lambda self: __import__("contextlib").nullcontext()            # float32: bfloat16 rounds to 1e-3
train.main(sys.argv[1:])
"""


def test_sharded_and_accumulated_equal_plain(base, tmp_path):
    """One process; one with gradients accumulated over four passes; two, and two with everything split between them: the same losses to 1e-5, and the same averaged weights."""
    script = tmp_path / "exact.py"
    script.write_text(EXACT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    runs = {"plain": [script], "accumulated": [script, "--accumulate", 4], "parallel": [*two, script, "--accumulate", 2],
            "sharded": [*two, script, "--shard", "--accumulate", 2]}

    def train_with(name):
        process = start([*runs[name], "--out", tmp_path / name, "--stage", "1", "--resume", "--steps", 8, "--save-every", 4])
        _, err = process.communicate()
        assert process.returncode == 0, err
        return losses(tmp_path / name, "1"), load_file(trainer.checkpoints(tmp_path / name, "1")[-1])

    found, weights = {}, {}
    for name in runs:
        shutil.copytree(base, tmp_path / name, ignore=shutil.ignore_patterns("log.jsonl"))
        found[name], weights[name] = train_with(name)
    assert len(found["plain"]) == 8
    for name in ("accumulated", "parallel", "sharded"):
        for key, loss in found["plain"].items():
            assert abs(found[name][key] - loss) <= 1e-5 * (1 + loss), (name, key, found)
        assert {k: v.shape for k, v in weights[name].items()} == {k: v.shape for k, v in weights["plain"].items()}
    trainer.checkpoints(tmp_path / "sharded", "1")[-1].unlink()                    # back to step 4
    _, again = train_with("sharded")
    assert all(torch.equal(again[k], v) for k, v in weights["sharded"].items())


def test_the_vq_stage_in_two_processes_equals_one(base, tmp_path):
    """Before the discriminator, whose weight is each process's own; with --shard too, which leaves this model whole."""
    script, two = tmp_path / "exact.py", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    script.write_text(EXACT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    found = {}
    for name, call in (("one", [script]), ("two", [*two, script, "--shard"])):
        shutil.copytree(base / "tokenizer", tmp_path / name / "tokenizer")
        process = start([*call, "--out", tmp_path / name, "--stage", "vq", "--steps", 15])
        _, err = process.communicate()
        assert process.returncode == 0, err
        found[name] = losses(tmp_path / name, "vq")
    assert len(found["one"]) == 15 and found["two"] == pytest.approx(found["one"], abs=2e-5), found


def test_compiled_blocks_train_alike(base, tmp_path, monkeypatch):
    """--compile traces whole blocks, forward and backward; the default backend, 20 s here, gave losses
    equal to 4e-4."""
    plain, compile_block = losses(train_on(base, tmp_path / "plain", "--stage", "3", "--steps", "2")), torch.nn.Module.compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(train, "check_compile", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_block(block, backend="aot_eager", fullgraph=True))
    compiled = losses(train_on(base, tmp_path / "compiled", "--stage", "3", "--steps", "2", "--compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert compiled == pytest.approx(plain, abs=1e-4)


def test_the_benchmark_prints_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "matmul_peak", lambda device: 1e12)
    command("--out", tmp_path / "run", "--benchmark")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["3"], ["4"])]
    assert len(rows) == 3 and all(float(r[3]) > 0 and float(r[4]) > 0 for r in rows)
    assert "TFLOP" in out


def test_the_critic_learns_apart_from_the_decoder():
    """The discriminator's gradient is the hinge's alone, the decoder's has none of the hinge."""
    torch.manual_seed(0)
    student = train_vq.VQStudent(vq.VQModel(vq.Config(**train.MODELS["shapes"]["vq"])))
    images = torch.rand(4, 3, SIZE, SIZE)
    seen = []
    hook = student.critic.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].detach()))
    loss, *_ = student(images, True, True)
    hook.remove()
    loss.backward()
    mine = {n: p.grad.clone() for n, p in student.critic.named_parameters()}
    assert torch.equal(seen[0], images) and torch.equal(seen[1], seen[2])
    student.zero_grad()
    ((1 - student.critic(images)).relu().mean() + (1 + student.critic(seen[1])).relu().mean()).backward()
    for name, p in student.critic.named_parameters():
        torch.testing.assert_close(p.grad, mine[name], rtol=1e-3, atol=1e-6)
    off, *_ = student(images, True, False)
    student.zero_grad()
    off.backward()
    assert all(not p.grad.any() for p in student.critic.parameters())
