"""Training: the masks, the loss, initialisation, and what a tiny run of all stages does."""
import copy
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import photos, tiny_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import (RESULTS, SIZE, STAGES, STEPS, TEXT_WEIGHTS, TRANSFORMER_WEIGHTS,
                           VQ_WEIGHTS, assert_same_tensors, command, contents, copy_parts,
                           copy_run, losses, shrink, trained_run)

import clip
import meissonic
import train
import vq
from engine import log, recipe
from engine.data import DEFAULT_SCORE, TokenDataset
from engine.distributed import Run
from engine.model_folder import rate_condition_of
from engine.options import chosen_stages, parse_arguments
from engine.pipeline import Pipeline
from engine.task import decay_groups
from shapes import world
from shapes.codebook import code_features
from shapes.recipe import ShapesRecipe

SEED = st.integers(0, 2 ** 32 - 1)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over other numbers of threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -----------------------------------------------------------------------------
# Masks


@settings(max_examples=3, deadline=None)
@given(SEED)
def test_masking_rates_follow_the_arccos_law(seed):
    """P(r < x) = 2/pi arcsin(x). The distance of n draws from it exceeds 2.5 / sqrt(n) with
    probability 7e-6. Rates are rounded to counts; a uniform shift undoes it but for the half count
    that is cut off at the steep end."""
    rng = np.random.default_rng(seed)
    batch, tokens = 5000, 256
    counts = [train.draw_mask(rng, 250, tokens).sum(1) for _ in range(batch // 250)]
    rates = np.concatenate(counts) / tokens + (rng.random(batch) - 0.5) / tokens
    rates = np.sort(rates.clip(0, 1))
    wanted = 2 / np.pi * np.arcsin(rates)
    distance = max((np.arange(1, batch + 1) / batch - wanted).max(),
                   (wanted - np.arange(batch) / batch).max())
    cut_off = 1 - 2 / np.pi * math.asin(1 - 0.5 / tokens)
    assert distance < 2.5 / math.sqrt(batch) + cut_off


@settings(deadline=None)
@given(SEED, st.integers(1, 40), st.integers(1, 200))
def test_the_number_of_masked_tokens_rounds_the_rate(seed, batch, tokens):
    rates = np.cos(np.pi / 2 * np.random.default_rng(seed).random(batch))
    mask = train.draw_mask(np.random.default_rng(seed), batch, tokens)
    assert mask.shape == (batch, tokens) and mask.dtype == bool
    assert (mask.sum(1) >= 1).all()
    assert (np.abs(mask.sum(1) - np.maximum(rates * tokens, 1)) <= 0.5).all()


def test_every_position_is_masked_equally_often():
    mask = train.draw_mask(np.random.default_rng(0), 20_000, 16)
    assert np.abs(mask.mean(0) - mask.mean()).max() < 5 * math.sqrt(0.25 / 20_000)


# -----------------------------------------------------------------------------
# The loss


def tiny_model():
    torch.manual_seed(0)
    encoder = clip.TextEncoder(clip.Config(
        hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=6, vocab_size=20, eos_token_id=19))
    transformer = copy.deepcopy(tiny_transformer()).requires_grad_(True).train()
    return train.MaskedImageModel(encoder, transformer)


def masked_batch(ids, text_ids, micro_conds, mask):
    """ids (B, h, w), mask (B, h w) bool -> the MaskedBatch with the rate as timestep."""
    rates = mask.sum(1) / mask.shape[1]
    masked = torch.from_numpy(mask.ravel().nonzero()[0])
    timestep = torch.from_numpy(rates).float()
    return train.MaskedBatch(ids, text_ids, micro_conds, masked, timestep)


def tiny_batch(batch=4):
    g = torch.Generator().manual_seed(0)
    text_ids = torch.randint(19, (batch, 6), generator=g)
    ids = torch.randint(40, (batch, 4, 4), generator=g)
    micro_conds = torch.tensor([[SIZE, SIZE, 0.0, 0.0, 6.0]]).expand(batch, 5)
    return masked_batch(ids, text_ids, micro_conds,
                        train.draw_mask(np.random.default_rng(0), batch, 16))


def test_the_loss_is_the_cross_entropy_of_the_masked_tokens():
    model, batch = tiny_model(), tiny_batch()
    hidden, pooled = model.text_encoder(batch.text_ids)
    shown = batch.ids.flatten()
    shown[batch.masked] = model.transformer.config.mask_token
    logits = model.transformer(shown.view(4, 4, 4), hidden, pooled, batch.micro_conds,
                               batch.timestep)
    expected = F.cross_entropy(logits.flatten(0, 2)[batch.masked],
                               tiny_batch().ids.flatten()[batch.masked], reduction="sum")
    torch.testing.assert_close(model(tiny_batch()), expected)


def test_the_model_does_not_see_what_is_masked():
    """Code 5 stands at the masked positions only: the gradient of its embedding is zero."""
    model, batch = tiny_model(), tiny_batch()
    ids = torch.full((4 * 16,), 6)
    ids[batch.masked] = 5
    model(batch._replace(ids=ids.view(4, 4, 4))).backward()
    grad = model.transformer.embed.embeddings.weight.grad.abs().sum(1)
    assert grad[5] == 0 and grad[6] > 0 and grad[model.transformer.config.mask_token] > 0


def test_every_parameter_is_trained():
    """Softmax ignores the bias of the keys: of the fused qkv bias a part has no gradient."""
    model = tiny_model()
    model(tiny_batch()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_overfitting_one_batch():
    model, batch = tiny_model(), tiny_batch()
    optimizer = torch.optim.AdamW(decay_groups(model), lr=1e-2)
    seen = []
    for _ in range(80):
        loss = model(batch) / len(batch.masked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[0] > 3 and seen[-1] < 0.5, seen[::10]


@torch.no_grad()
def test_caption_losses():
    """Of pictures of which nothing is known, with their own captions and with each other's."""
    model, batch = tiny_model(), tiny_batch()
    found = train.caption_losses(model, batch, 0.9)
    unknown = torch.full_like(batch.ids, model.transformer.config.mask_token)
    for name, text_ids in (("right_caption", batch.text_ids),
                           ("wrong_caption", batch.text_ids[[3, 0, 1, 2]])):
        hidden, pooled = model.text_encoder(text_ids)
        logits = model.transformer(unknown, hidden, pooled, batch.micro_conds, torch.tensor([0.9]))
        expected = F.cross_entropy(logits.flatten(0, 2), batch.ids.flatten())
        torch.testing.assert_close(found[name], expected)


def test_caption_losses_are_logged_and_change_nothing(tmp_path, monkeypatch):
    shrink(monkeypatch)
    for name, every in (("without", 100), ("with", 2)):
        monkeypatch.setattr(train, "CAPTIONS_EVERY", every)
        command("--out", copy_parts(tmp_path / name), "--stage", "3", "--accumulate", 2)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    entries = log.read_log(tmp_path / "with")
    told = [e["step"] for e in entries if e.keys() >= {"right_caption", "wrong_caption"}]
    assert told == [2, 4]
    assert all(3 < e["right_caption"] < 5 for e in entries if "right_caption" in e)


# -----------------------------------------------------------------------------
# Initialisation


def test_blocks_start_as_the_identity(monkeypatch):
    shrink(monkeypatch)
    model = train.new_model(train.MODELS["tiny"], {clip.START: 0, "a": 1, clip.END: 2}, True)
    train.initialize_weights(model)
    norms = [m for m in model.modules() if isinstance(m, meissonic.Modulation)]
    assert len(norms) == 3 and not any(p.any() for m in norms for p in m.parameters())


def test_compression_is_added_smoothly():
    """The weights are carried over. A picture of 2 x 2 equal tokens, twice as large, gives about
    the plain model's logits; with fresh compression layers it gives others."""
    plain = tiny_transformer(downsample=False).eval()
    torch.manual_seed(1)
    grown = train.add_compression(plain).eval()
    assert grown.config.downsample and not plain.config.downsample
    state = grown.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    fresh = meissonic.Transformer(grown.config).eval()
    fresh.load_state_dict(plain.state_dict(), strict=False)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (2, 4, 4), generator=g)
    conditions = (torch.randn(2, 5, 12, generator=g), torch.randn(2, 16, generator=g),
                  torch.rand(2, 5, generator=g), torch.full((2,), 0.5))
    expected = plain(ids, *conditions)

    def error(model):
        logits = model(ids.repeat_interleave(2, 1).repeat_interleave(2, 2), *conditions)
        difference = logits - expected.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return (difference.pow(2).mean().sqrt() / expected.std()).item()

    assert error(grown) < 0.35 < 0.7 < error(fresh), (error(grown), error(fresh))


def test_checkpointed_blocks_have_the_same_gradients(tmp_path, monkeypatch):
    shrink(monkeypatch)
    copy_run(tmp_path)
    grads = []
    for checkpointing in (False, True):
        run = Run(tmp_path, train.PRESETS["tiny"], checkpointing=checkpointing)
        model = train.build_model(run, recipe.FileRecipe(run), train.MODELS["tiny"], 1.0, True)
        batch = tiny_batch()
        text_ids = torch.zeros(4, 32, dtype=torch.int64)
        with run.precision(), run.attention():
            loss = model(batch._replace(ids=batch.ids % 32, text_ids=text_ids))
        with run.attention():
            loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


# -----------------------------------------------------------------------------
# Presets and options


def test_the_preset_paper_follows_the_paper():
    """256, 512, 1024 px; batches and steps of section 2.5 at a fixed learning rate; compression
    from stage 3 on, the text encoder in stage 4."""
    stages = [train.PRESETS["paper"][stage] for stage in "1234"]
    assert [s["size"] for s in stages] == [256, 512, 1024, 1024]
    assert [s["batch"] for s in stages[:3]] == [2048, 512, 256]
    assert [s["steps"] for s in stages[:3]] == [100_000, 100_000, 42_000]
    assert [s["compress"] for s in stages] == [False, False, True, True]
    assert [s["text_lr"] > 0 for s in stages] == [False, False, False, True]
    assert [s["floor"] for s in stages] == [1] * 4


def test_presets_have_stages_in_order_and_models():
    for name, preset in train.PRESETS.items():
        assert list(preset) == [stage for stage in train.STAGES if stage in preset]
        assert train.MODELS[name].keys() == {"vq", "transformer", "text", "sampling"}


def test_models_of_the_paper_have_the_published_sizes():
    with torch.device("meta"):
        model = train.new_model(train.MODELS["paper"], {}, True)
    assert model.text_encoder.config.hidden_size == 1024
    assert sum(p.numel() for p in model.transformer.parameters()) > 1.0e9
    assert model.transformer.config.downsample


def options(*words):
    return chosen_stages(parse_arguments(train.PRESETS, train.STAGES, "", words), train.PRESETS)


def test_picture_files_train_the_text_encoder_along():
    """They have no scenes to learn captions from, and more colours than a computed codebook."""
    for preset in ("tiny", "small"):
        shapes = options("--preset", preset, "--batch", "8")
        photos = options("--preset", preset, "--batch", "8", "--data", "photos")
        assert "patch_codes" in shapes["vq"] and "patch_codes" not in photos["vq"]
        assert photos["vq"]["quantize_from"] < photos["vq"]["adversary_from"]
        assert photos["vq"]["adversary_from"] < photos["vq"]["steps"] and photos["vq"]["batch"] == 8
        assert shapes.keys() - photos.keys() == {"text"}
        for stage in photos.keys() & {"1", "2", "3", "4"}:
            assert (shapes[stage]["text_lr"], photos[stage]["text_lr"]) == (0.0, 0.3)
    assert "patch_codes" in train.PRESETS["tiny"]["vq"]           # the table itself stays


@pytest.mark.parametrize("device, preset", (("cpu", "tiny"), ("cuda", "small")))
def test_the_hardware_chooses_the_preset(monkeypatch, device, preset):
    """And the preset the folder. What is named is taken."""
    def choose(name):
        return torch.device(name or device), "a test"

    monkeypatch.setattr("engine.hub.choose_device", choose)
    parse = partial(parse_arguments, train.PRESETS, train.STAGES, "")
    args = parse([])
    assert (args.preset, args.out, args.device.type) == (preset, Path("runs") / preset, device)
    assert args.chosen_preset == f" (chosen for {device})"
    assert parse(["--device", "cpu"]).preset == "tiny"
    args = parse(["--preset", "paper", "--data", "photos"])
    assert (args.out, args.chosen_preset) == (Path("runs/paper"), "")
    assert parse(["--out", "runs/a"]).out == Path("runs/a")


def test_a_run_says_which_preset_was_chosen(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    for preset, words in ((["--preset", "tiny"], "preset: tiny |"),
                          ([], "preset: tiny (chosen for cpu) |")):
        args = ["--out", tmp_path, "--device", "cpu", "--stage", "tokenizer", *preset]
        train.main([*map(str, args)])
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("words", (
    "--steps 0 --stage vq", "--steps 5", "--stage nothing", "--steps 5 --stage tokenizer",
    "--speed 1", "--device nothing", "--data /nowhere", "--preset tiny --stage 2", "--shard",
    "--init /nowhere", "--lora 0", "--seed -1", "--lr 0", "--lr -1", "--lora 2",
    "--stage vq --steps 5", "--encode", "--preset all", "--eval-captions 0", "--eval-every 0"))
def test_bad_arguments(words, tmp_path, monkeypatch, cli):
    shrink(monkeypatch)
    status, _, err = cli("--out", tmp_path / "run", *words.split(), script="train")
    assert status == 2 and not (tmp_path / "run").exists()
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_learning_rate():
    """Up to the peak in a straight line, then down a cosine to 2% of it."""
    rate = [train.learning_rate(i, 1000, 0.5) for i in range(1000)]
    assert np.isclose(rate[0], 0.5 / 100, rtol=1e-3) and np.isclose(rate[49], 0.25, rtol=0.01)
    assert 0.95 * 0.5 < max(rate) <= 0.5 and rate.index(max(rate)) == 99
    assert all(a > b for a, b in zip(rate[99:], rate[100:]))
    assert np.isclose(rate[500], 0.51 * 0.5, rtol=0.01)
    assert np.isclose(rate[-1], 0.02 * 0.5, rtol=0.01)
    assert [train.learning_rate(i, 1000, 0.5, floor=1) for i in (100, 500, 999)] == [0.5] * 3


def test_weight_decay_spares_biases_norms_and_embeddings():
    vq_model = vq.VQModel(vq.Config(block_out_channels=(8, 8), layers_per_block=1,
                                    norm_num_groups=4))
    for module in (tiny_model(), vq_model):
        decayed, spared = decay_groups(module, scale=0.5)
        assert decayed["weight_decay"] == 0.01 and spared["weight_decay"] == 0
        assert decayed["scale"] == spared["scale"] == 0.5
        names = {id(p): name for name, p in module.named_parameters()}
        both = decayed["params"] + spared["params"]
        assert sorted(names) == sorted(id(p) for p in both)
        for p in decayed["params"]:
            assert p.dim() > 1 and "_embedding." not in names[id(p)]
        for p in spared["params"]:
            assert p.dim() == 1 or "embedding" in names[id(p)]


@pytest.mark.parametrize("told, convention", (
    ("rate", "rate"), ("rate1000", "rate1000"), ("step", "rate1000"), (None, "rate1000")))
def test_the_rate_is_told_as_the_model_knows_it(tmp_path, told, convention):
    """Public models do not say, or say how they are sampled: they were trained with 1000 rates."""
    assert rate_condition_of(tmp_path) == "rate"                # a fresh model
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"rate_condition": told} if told else {}))
    assert rate_condition_of(tmp_path) == convention


# -----------------------------------------------------------------------------
# A tiny run of all stages


def test_first_losses(tmp_path, monkeypatch):
    """Frozen: a change of the data, the models, their initialisation or the losses shows here. The
    bounds leave room for another processor's bfloat16. The transformer's tokens are of a fresh VQ
    model: those of a trained one differ between processors, and with them all losses."""
    shrink(monkeypatch)
    torch.manual_seed(0)
    model = vq.VQModel(vq.Config(**train.MODELS["tiny"]["vq"]))
    parts = copy_parts(tmp_path / "parts")
    model.save_pretrained(parts / "vqvae")
    seen = losses(trained_run(), "vq")
    for stage in ("1", "3"):
        out = tmp_path / stage
        command("--out", out, "--init", parts, "--stage", stage, "--steps", 3, "--seed", 3)
        seen |= losses(out)
    for stage, wanted, bound in (("vq", FIRST_VQ, 0.01), ("1", FIRST_1, 0.003),
                                 ("3", FIRST_3, 0.003)):
        found = [seen[stage, step] for step in (1, 2, 3)]
        assert np.allclose(found, wanted, atol=bound), (stage, found)


FIRST_VQ = (0.559, 0.682, 0.845)
FIRST_1 = (3.823, 3.789, 3.809)
FIRST_3 = (3.736, 3.731, 3.732)


def test_losses_fall():
    before_discriminator = STAGES["vq"]["adversary_from"]
    for stage, last, drop in (("vq", before_discriminator, 0.05), ("1", STEPS, 0.02)):
        seen = losses(trained_run(), stage)
        assert len(seen) == STEPS and seen[stage, last] < seen[stage, 1] - drop


def test_what_a_run_leaves():
    """Logs, loss curves, and a checkpoint folder in half precision that draws."""
    out = trained_run()
    names = {path.name for path in out.iterdir()}
    assert {"log.jsonl", "loss.png", "model_index.json"} < names
    assert "tokens" not in names and not list(out.rglob(".*"))     # pictures are drawn, not kept
    pipe = Pipeline(out)
    assert pipe.size == (2 * SIZE, 2 * SIZE) and pipe.score == DEFAULT_SCORE
    assert pipe.schedule == meissonic.Schedule(4, 3.0, (2.0, 0.0), "cosine", "rate")
    picture, = pipe(["a red circle"], [0])
    assert picture.size == (2 * SIZE, 2 * SIZE)
    for weights in (VQ_WEIGHTS, TRANSFORMER_WEIGHTS, TEXT_WEIGHTS):
        with safe_open(out / weights, framework="pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_the_result_is_the_average():
    """The averaged weights are saved, not the last ones."""
    tensors = load_file(trained_run() / RESULTS[-1])
    model = meissonic.Transformer.from_pretrained(trained_run() / "transformer").state_dict()
    average = tensors["ema.transformer.project_to_hidden.weight"]
    assert torch.equal(model["project_to_hidden.weight"], average.half().float())
    assert not torch.equal(average, tensors["params.transformer.project_to_hidden.weight"])


def test_captions_are_dropped_one_time_in_ten(tmp_path, monkeypatch):
    shrink(monkeypatch)
    run = Run(copy_parts(tmp_path), train.PRESETS["tiny"])
    make = train.masked_batches(run, ShapesRecipe(run).dataset("1"), "1")
    text_ids = torch.cat([make(step, 0)[0][0].text_ids for step in range(60)])     # (60 * 8, L)
    tokenizer = clip.Tokenizer.from_pretrained(tmp_path / "tokenizer")
    empty = (text_ids == tokenizer([""])).all(1).double()
    assert len(empty) == 60 * 8 and abs(empty.mean() - 0.1) < 4 * math.sqrt(0.09 / len(empty))


def test_masked_batches(tmp_path, monkeypatch):
    """A MaskedBatch for each accumulation: together all pictures and all masked tokens. The same
    again for the same step and attempt, others for another one."""
    shrink(monkeypatch)
    run = Run(copy_parts(tmp_path), train.PRESETS["tiny"], accumulate=2)
    make = train.masked_batches(run, ShapesRecipe(run).dataset("1"), "1")
    batches = make(3, 0)
    assert len(batches) == 2
    assert {total for _, total in batches} == {sum(len(batch.masked) for batch, _ in batches)}
    for batch, _ in batches:
        assert batch.ids.shape == (4, 8, 8) and batch.ids.dtype == torch.int64
        shares = torch.bincount(batch.masked // 64, minlength=4) / 64
        torch.testing.assert_close(batch.timestep, shares, rtol=0, atol=1e-3)
    for step, attempt, same in ((3, 0, True), (4, 0, False), (3, 1, False)):
        again = make(step, attempt)
        for one, other in zip(batches[0][0], again[0][0]):
            assert same <= torch.equal(one, other)
        assert torch.equal(batches[0][0].masked, again[0][0].masked) == same


def test_the_first_step_needs_no_other_pictures(tmp_path, monkeypatch):
    """A stage draws the pictures of its first batch, and begins."""
    shrink(monkeypatch)
    out = copy_parts(tmp_path / "run")
    monkeypatch.setattr(train, "worker_number", lambda device: 0)
    render, compute_loss, drawn, steps = world.render, train.compute_loss, [], []
    monkeypatch.setattr(world, "render", lambda *scene: drawn.append(1) or render(*scene))
    monkeypatch.setattr(train, "compute_loss",
                        lambda *batch: steps.append(len(drawn)) or compute_loss(*batch))
    command("--out", out, "--stage", "1", "--steps", 2)
    assert steps == [8, 16]


def test_the_sheet_and_the_scores(tmp_path, monkeypatch, capsys):
    """As many pictures as asked for, each drawn once, of all tasks in turn."""
    shrink(monkeypatch)
    run = Run(copy_run(tmp_path), train.PRESETS["tiny"], eval_captions=10)
    shapes, batches = ShapesRecipe(run), []
    draw = Pipeline.__call__

    def spy(self, prompts, seeds):
        batches.append((prompts, seeds, self.best_of))
        return draw(self, prompts, seeds)

    monkeypatch.setattr(Pipeline, "__call__", spy)
    scores = recipe.evaluate(run, shapes, "4", 2)
    prompts = shapes.sheet_prompts("4", 10)
    assert batches == [([caption for _, caption, _ in prompts], list(range(10)), 1)]
    assert [task for task, _, _ in prompts] == [*world.TASKS, *world.TASKS[:4]]
    assert all(world.is_held_out(caption) for _, caption, _ in prompts)
    entry = log.read_log(tmp_path)[-1]
    assert entry == scores | {"stage": "4", "step": 2, "event": "scores"}
    assert scores.keys() == {*world.TASKS, "overall"}
    mean = np.mean([scores[task] for task in world.TASKS])
    assert scores["overall"] == pytest.approx(mean, abs=1e-3)
    assert f"overall {scores['overall']:.2f}" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").size == (6 * 2 * SIZE, 2 * 2 * SIZE)


def test_sheets_come_when_asked_for(tmp_path, monkeypatch, capsys):
    """And their scores are in the progress bar. With --no-eval there are none."""
    shrink(monkeypatch)
    calls = []

    def scores(run, recipe, stage, step):
        calls.append((stage, step))
        return {"overall": 0.25}

    monkeypatch.setattr(train, "evaluate", scores)
    command("--out", copy_parts(tmp_path / "a"), "--stage", "3", "--eval-every", 3)
    assert calls == [("3", 3), ("3", 4)] and "score=0.25" in capsys.readouterr().err
    calls.clear()
    command("--out", copy_parts(tmp_path / "b"), "--stage", "3", "--eval-every", 3, "--no-eval")
    assert not calls and (tmp_path / "b" / TRANSFORMER_WEIGHTS).is_file()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_the_summary(capsys, tmp_path):
    """A line for each stage: its last step, loss and speed, and scores if there are any."""
    log.print_summary(trained_run())
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["stage", "steps", "loss", "samples/s"]
    steps = [line.split()[:2] for line in lines]
    assert steps == [["vq", "30"], ["1", "30"], ["3", "4"], ["4", "2"]]
    assert float(lines[1].split()[2]) == pytest.approx(losses(trained_run())["1", 30], abs=1e-4)
    (tmp_path / "log.jsonl").write_bytes((trained_run() / "log.jsonl").read_bytes())
    log.append(tmp_path, stage="4", step=2, event="scores", single=0.5, overall=0.25)
    log.print_summary(tmp_path)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["single", "overall"]
    assert lines[0].split()[-1] == "-" and lines[3].split()[-2:] == ["0.50", "0.25"]


def test_a_line_of_the_log_that_was_cut_off_is_left_out(tmp_path):
    whole = (trained_run() / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole[:-20])
    assert len(log.read_log(tmp_path)) == len(whole.splitlines()) - 1
    log.draw_losses(tmp_path)
    assert Image.open(tmp_path / "loss.png").size == (640, 640)


# -----------------------------------------------------------------------------
# Other ways to train


SHORT = {"text": dict(steps=2, batch=4), "vq": dict(steps=3, batch=4, adversary_from=3)}


@pytest.mark.slow
def test_the_preset_tiny(tmp_path, monkeypatch):
    """Two steps of each stage. The text encoder stays as its own stage left it, the codebook as it
    was computed, and codes begin as the sum of their features."""
    stages = {}
    for stage, settings in train.PRESETS["tiny"].items():
        stages[stage] = settings | SHORT.get(stage, dict(steps=2, batch=4))
    monkeypatch.setitem(train.PRESETS, "tiny", stages)
    monkeypatch.setattr(log, "LINE_EVERY", 1)
    monkeypatch.setattr(train, "evaluate", lambda *arguments: None)
    command("--out", tmp_path, "--stage", "tokenizer")
    command("--out", tmp_path, "--stage", "text")
    before = (tmp_path / TEXT_WEIGHTS).read_bytes()
    command("--out", tmp_path, "--resume")
    assert (tmp_path / TEXT_WEIGHTS).read_bytes() == before
    assert {stage for stage, _ in losses(tmp_path)} == stages.keys() - {"one-step"}
    model = vq.VQModel.from_pretrained(tmp_path / "vqvae")
    assert not model.encoder.mid_block.resnets[0].conv2.weight.any()
    transformer = meissonic.Transformer.from_pretrained(tmp_path / "transformer")
    features = code_features(*stages["vq"]["patch_codes"]).double()
    assert len(features) == model.config.num_vq_embeddings
    for weight in (transformer.embed.embeddings.weight[:-1],
                   transformer.mlm_layer.conv2.weight.flatten(1)):
        weight = weight.detach().double()
        fitted = features @ torch.linalg.lstsq(features, weight, driver="gelsd").solution
        assert (fitted - weight).square().sum() < 0.01 * weight.square().sum()


def test_training_on_picture_files(tmp_path, monkeypatch, capsys):
    """A broken picture is skipped and named; the sheet has the captions of the first others."""
    shrink(monkeypatch)
    monkeypatch.setattr(train, "evaluate", recipe.evaluate)
    drawn = []
    draw = Pipeline.__call__

    def spy(self, prompts, seeds):
        drawn.extend(prompts)
        return draw(self, prompts, seeds)

    monkeypatch.setattr(Pipeline, "__call__", spy)
    folder = photos(tmp_path / "photos", broken=(3, 7))
    out = copy_parts(tmp_path / "run")
    command("--out", out, "--stage", "1", "--steps", 2, "--data", folder, "--eval-captions", 8)
    assert len(losses(out, "1")) == 2 and not [e for e in log.read_log(out) if "event" in e]
    dataset = TokenDataset(out / "tokens" / "1")
    assert len(dataset) == 10
    _, _, micro = dataset[np.arange(10)]
    assert (micro == torch.tensor([40.0, 40, 0, 0, DEFAULT_SCORE])).all()
    err = capsys.readouterr().err
    assert "2 pictures skipped" in err and "003.png" in err
    assert drawn == [(folder / f"{i:03d}.txt").read_text() for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert Image.open(out / "sheet.png").size == (6 * SIZE, 2 * SIZE)


def test_tokens_are_made_again_if_the_vq_model_changes(tmp_path, monkeypatch):
    shrink(monkeypatch)
    out, folder = copy_parts(tmp_path / "run"), photos(tmp_path / "photos", number=4)
    path = out / "tokens" / "1" / "000000.safetensors"
    encode = "--out", out, "--stage", "1", "--encode", "--data", folder
    command(*encode)
    before = path.stat().st_mtime_ns
    command(*encode)
    assert path.stat().st_mtime_ns == before
    model = vq.VQModel.from_pretrained(out / "vqvae")
    model.quantize.embedding.weight.mul_(-1)
    model.save_pretrained(out / "vqvae", torch.float16)
    command(*encode)
    assert path.stat().st_mtime_ns != before


def test_encoding_trains_nothing_that_is_there(tmp_path, monkeypatch):
    shrink(monkeypatch)
    out = copy_run(tmp_path / "run")
    before = contents(out)
    command("--out", out, "--encode", "--data", photos(tmp_path / "photos", number=4), "--seed", 3)
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert {path.name for path in (out / "tokens").iterdir()} == {"1", "3", "4"}


def test_training_a_lora(tmp_path, monkeypatch):
    """The model's own weights stay; the file is small, and pictures are drawn with it."""
    shrink(monkeypatch)
    monkeypatch.setattr(train, "evaluate", recipe.evaluate)
    out = copy_run(tmp_path / "run", "*.checkpoint.*")
    folder = photos(tmp_path / "photos", number=2)
    command("--out", out, "--stage", "4", "--steps", 4, "--lora", 2, "--lr", 0.05,
            "--init", out, "--data", folder)
    assert_same_tensors(trained_run(), out, TRANSFORMER_WEIGHTS, TEXT_WEIGHTS)
    terms = load_file(out / "lora.safetensors")
    weights = load_file(out / TRANSFORMER_WEIGHTS)
    assert sum(v.numel() for v in terms.values()) < 0.5 * sum(v.numel() for v in weights.values())
    assert all(v.abs().sum() > 0 for name, v in terms.items() if "lora_B" in name)
    assert (out / "sheet.png").is_file()
    plain, tuned = Pipeline(out), Pipeline(out, lora=out / "lora.safetensors")
    name = "single_transformer_blocks.0.proj_out.weight"
    assert not torch.equal(plain.transformer.get_parameter(name),
                           tuned.transformer.get_parameter(name))


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path, monkeypatch):
    """--compile traces whole blocks, forward and backward, with --checkpointing too. The default
    backend takes 20 s here; its losses were equal to 4e-4."""
    shrink(monkeypatch)
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr("engine.hub.check_compile", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_block(
        block, backend="aot_eager", fullgraph=True))
    found = {}
    for name, flags in (("plain", []), ("compiled", ["--compile"]),
                        ("both", ["--compile", "--checkpointing"])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        out = copy_parts(tmp_path / name)
        command("--out", out, "--stage", "3", "--steps", 2, *flags)
        found[name] = losses(out)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs >= 2 if flags else graphs == 0
    assert found["compiled"] == pytest.approx(found["plain"], abs=1e-4)
    assert found["both"] == pytest.approx(found["plain"], abs=1e-4)


@pytest.mark.parametrize("able", (True, False))
def test_products_are_bfloat16_if_there_are_instructions_for_it(tmp_path, monkeypatch, able):
    monkeypatch.setattr("engine.hub.has_bfloat16", lambda device: able)
    run = Run(tmp_path, {})
    wanted = torch.bfloat16 if able else torch.float32
    with run.precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == run.dtype == wanted
