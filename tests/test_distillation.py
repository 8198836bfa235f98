"""Stage one-step: the gradients of the distillation, whether the student comes to draw what the
teacher predicts, and what a tiny run of the stage leaves.

Letters: B batch, h w tokens, N = h w, M masked tokens of a batch, V codes.
"""
import contextlib
import copy
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import generator, open_picture, photos, random_conditioning, tiny_transformer
from safetensors.torch import load_file, save_file
from test_resume import interrupt
from tiny_training import (EXACT, SIZE, TRANSFORMER_WEIGHTS, assert_same_tensors, command, contents,
                           copy_run, losses, refused, run_process, script, shrink)

import clip
import meissonic
import train
from engine import distillation, hub, log, recipe
from engine.distillation import Distiller
from engine.distributed import Run
from engine.pipeline import Pipeline

STEPS = 6
ONE_STEP = dict(size=2 * SIZE, steps=STEPS, batch=8, lr=1e-3, cfg=2.0)
LAST = f"one-step-{STEPS:07d}.checkpoint.safetensors"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiny stages. One thread: sums over other numbers of threads differ in their last bits."""
    shrink(monkeypatch)
    monkeypatch.setitem(train.PRESETS["tiny"], "one-step", dict(ONE_STEP))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distil(out, *arguments):
    """The stage in a folder, with a checkpoint every two steps."""
    command("--out", out, "--seed", 3, "--stage", "one-step", "--save-every", 2, *arguments)
    return out


# --------------------------------------------------------------------------------------------------
# The objective


def masked_batch(batch, h=4, w=4, seed=0):
    """A train.MaskedBatch whose tokens no model knows: they must not count."""
    mask = train.draw_mask(np.random.default_rng(seed), batch, h * w)              # (B, N)
    ids = torch.full((batch, h, w), -1)
    masked = torch.from_numpy(mask.ravel().nonzero()[0])                           # (M,)
    timestep = torch.from_numpy(mask.mean(1)).float()                              # (B,)
    return train.MaskedBatch(ids, None, None, masked, timestep)


class Setting:
    """A distiller in float64 whose three models differ, the arguments of its forward pass, and what
    a computation in whole passes gives: drawn and shown (B, h, w), the pictures of the student and
    what is left of them; logits (B, N, V) of the student."""

    def __init__(self, batch=3):
        self.teacher = tiny_transformer(seed=1).double()
        distiller = Distiller(self.teacher)
        self.distiller, self.student, self.auxiliary = (distiller, distiller.student,
                                                        distiller.auxiliary)
        self.student.load_state_dict(tiny_transformer(seed=2).state_dict())
        self.auxiliary.load_state_dict(tiny_transformer(seed=3).state_dict())
        self.cond = double(random_conditioning(generator(0), batch, self.teacher))
        self.uncond = double(random_conditioning(generator(1), batch, self.teacher))
        self.batch = masked_batch(batch)
        self.seeds = torch.arange(batch)
        self.drawn, self.logits = distillation.draw(self.student, self.cond, self.batch.ids,
                                                    self.seeds)
        self.shown = self.drawn.clone()
        self.shown.view(-1)[self.batch.masked] = self.teacher.config.mask_token

    def losses(self, cfg=3.0):
        return self.distiller(self.cond, self.uncond, self.batch, self.seeds, cfg)

    def predict(self, model, cond):
        """-> logits (M, V), float64, of what is masked in `shown`."""
        logits = model(self.shown, cond.hidden, cond.pooled, cond.micro_conds, self.batch.timestep)
        return logits.flatten(0, 2)[self.batch.masked]

    @torch.no_grad()
    def gradient(self, cfg=3.0):
        """p_auxiliary - p_teacher at the masked positions, 0 elsewhere -> (B, N, V) float64."""
        with_prompt = self.predict(self.teacher, self.cond)
        without = self.predict(self.teacher, self.uncond)
        p_teacher = (without + cfg * (with_prompt - without)).softmax(-1)
        gradient = torch.zeros_like(self.logits).flatten(0, 1)
        p_auxiliary = self.predict(self.auxiliary, self.cond).softmax(-1)
        gradient[self.batch.masked] = p_auxiliary - p_teacher
        return gradient.view_as(self.logits)


def double(cond):
    return meissonic.Conditioning(cond.hidden.double(), cond.pooled.double(), cond.micro_conds)


def test_the_gradient_of_the_students_logits(monkeypatch):
    """p_auxiliary - p_teacher where the student's pictures are masked anew, 0 elsewhere."""
    setting = Setting()
    leaf = setting.logits.detach().requires_grad_()
    monkeypatch.setattr(distillation, "draw", lambda *arguments: (setting.drawn, leaf))
    student_loss, _, distance = setting.losses()
    student_loss.backward()
    wanted = setting.gradient()
    assert torch.allclose(leaf.grad, wanted, atol=1e-6) and wanted.abs().max() > 0.1
    assert student_loss == 0 and not distance.requires_grad
    assert distance.item() == pytest.approx(wanted.abs().sum().item() / 2, rel=1e-5)


def test_the_student_learns_by_that_gradient_alone():
    """Passed back through its one pass, and not through the draw. The auxiliary model's loss adds
    nothing, and the student's adds nothing to the auxiliary model's."""
    setting = Setting()
    student_loss, auxiliary_loss, _ = setting.losses()
    (student_loss + auxiliary_loss).backward()
    parameters = list(setting.student.parameters())
    wanted = torch.autograd.grad(setting.logits, parameters, setting.gradient())
    for parameter, gradient in zip(parameters, wanted):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5, rtol=1e-4)
    targets = setting.drawn.flatten()[setting.batch.masked]
    explicit = F.cross_entropy(setting.predict(setting.auxiliary, setting.cond), targets,
                               reduction="sum")
    assert auxiliary_loss.item() == pytest.approx(explicit.item(), rel=1e-5)
    parameters = list(setting.auxiliary.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(explicit, parameters)):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_the_teacher_is_neither_trained_nor_saved():
    setting = Setting()
    before = copy.deepcopy(setting.teacher.state_dict())
    optimizer = torch.optim.AdamW(setting.distiller.parameters(), lr=1e-2)
    sum(setting.losses()[:2]).backward()
    optimizer.step()
    after = setting.teacher.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in setting.teacher.parameters())
    assert {name.split(".")[0] for name in setting.distiller.state_dict()} == {"student",
                                                                              "auxiliary"}


def test_the_start_of_training():
    """Half of the tokens are masked, and the noise is stronger than in sampling; timestep 0."""
    model, seen = tiny_transformer(), []

    def record(ids, hidden, pooled, micro_conds, timestep, perturb):
        zeros = torch.zeros(*ids.shape, model.config.width)
        seen.extend((ids, timestep, perturb(zeros).std().item()))
        return torch.zeros(*ids.shape, model.config.codebook_size)

    record.config = model.config
    cond = random_conditioning(generator(), 2, model)
    ids, logits = distillation.draw(record, cond, torch.empty(2, 8, 8, dtype=torch.int64),
                                    torch.arange(2))
    start, timestep, sigma = seen
    assert (start == model.config.mask_token).flatten(1).sum(1).tolist() == [32, 32]
    assert timestep.tolist() == [0] and sigma == pytest.approx(0.3, rel=0.1)
    assert ids.shape == (2, 8, 8) and logits.shape == (2, 64, 40)


@pytest.mark.slow
def test_the_student_comes_to_draw_as_the_teacher_predicts(monkeypatch):
    """Two prompts, and a teacher that predicts one distribution of tokens for each: the total
    variation distance of the student's from it, 0.69 at first, falls clearly. NOTE Without momentum
    (beta_1 = 0): with it the student runs away from the auxiliary model at this rate."""
    model = tiny_transformer()
    distiller = Distiller(model)
    cond = random_conditioning(generator(), 2, model).rows([0, 1] * 8)             # B = 16
    predictions = 2 * torch.randn(2, 40, generator=generator(3))                   # (2, V)
    masked_logits = distillation.masked_logits

    def known(own, ids, cond, batch):
        prompts = batch.masked // ids[0].numel() % 2                               # (M,)
        return predictions[prompts] if own is model else masked_logits(own, ids, cond, batch)

    @torch.no_grad()
    def distance():
        seeds = 10 ** 6 + torch.arange(16)
        _, logits = distillation.draw(distiller.student, cond, masked_batch(16).ids, seeds)
        means = [logits[prompt::2].softmax(-1).mean((0, 1)) for prompt in range(2)]
        return (torch.stack(means) - predictions.softmax(-1)).abs().sum(1).max().item() / 2

    monkeypatch.setattr(distillation, "masked_logits", known)
    before = distance()
    optimizer = torch.optim.Adam(distiller.parameters(), betas=(0.0, 0.98))
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 200)
        batch = masked_batch(16, seed=step)
        *parts, _ = distiller(cond, cond, batch, step * 16 + torch.arange(16), 1.0)
        (sum(parts) / len(batch.masked)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 0.6 and distance() < 0.4, (before, distance())


# --------------------------------------------------------------------------------------------------
# The stage


def test_what_the_stage_leaves(tmp_path, cli):
    """A one-step generator, the averaged student, that sample.py draws with; the teacher, as it
    was; and the other parts, untouched."""
    out = copy_run(tmp_path / "run", "*.checkpoint.*")
    (out / "loss.png").unlink()
    before = {path: content for path, (content, _) in contents(out).items()}
    distil(out)
    after = {path: content for path, (content, _) in contents(out).items()}
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {TRANSFORMER_WEIGHTS, "scheduler/scheduler_config.json"}
    for path in before:
        if path.startswith("transformer/"):
            assert after[path.replace("transformer/", "teacher/")] == before[path]
    config = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert config["one_step"] == {} and config["rate_condition"] == "rate"
    assert config["defaults"] == {"size": 2 * SIZE, "score_condition": 6.0}

    checkpoint, weights = load_file(out / LAST), load_file(out / TRANSFORMER_WEIGHTS)
    averaged = checkpoint["ema.student.embed.embeddings.weight"].half()
    assert torch.equal(weights["embed.embeddings.weight"], averaged)
    assert not torch.equal(checkpoint["params.student.embed.embeddings.weight"].half(), averaged)
    assert not any("teacher" in name for name in checkpoint)
    entries = [entry for entry in log.read_log(out) if entry["stage"] == "one-step"]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert all(0 < entry["distance"] < 1 and entry["loss"] > 0 for entry in entries)

    pipe = Pipeline(out)
    assert pipe.one_step and pipe.draw(["a star"], [0]).shape == (1, 16, 16)
    status, _, err = cli("--model", out, "--prompt", "a star", "--out", tmp_path / "star.png")
    assert status == 0 and (tmp_path / "star.png").is_file(), err


@pytest.mark.parametrize("step", (1, 3))
def test_resuming_gives_the_uninterrupted_run(tmp_path, monkeypatch, step):
    """Also if the second call does not name --init: its negative prompt is beside the teacher."""
    whole, out, init = tmp_path / "whole", tmp_path / "stopped", copy_run(tmp_path / "init")
    monkeypatch.setattr(hub, "OFFICIAL_TEXT_ENCODER", {init: "own"})               # as Meissonic
    distil(whole, "--init", init)
    interrupt(monkeypatch, step, signal.SIGTERM, "--out", out, "--seed", 3, "--stage", "one-step",
              "--save-every", 2, "--init", init)
    distil(out, "--resume")
    assert (out / "teacher/negative.txt").read_text() == hub.OFFICIAL_NEGATIVE
    assert losses(whole) == losses(out)
    assert_same_tensors(whole, out, LAST, TRANSFORMER_WEIGHTS)


def test_killed_before_the_first_save(tmp_path, monkeypatch):
    """Only the first checkpoint is there, and the model is still that of many steps: --resume
    keeps the teacher, with its negative prompt."""
    init, out = copy_run(tmp_path / "init"), tmp_path / "run"
    monkeypatch.setattr(hub, "OFFICIAL_TEXT_ENCODER", {init: "own"})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "learning_rate", lambda *arguments: 1 / 0)
        distil(out, "--init", init)
    assert not distillation.is_one_step(out)
    distil(out, "--resume")
    assert (out / "teacher/negative.txt").read_text() == hub.OFFICIAL_NEGATIVE


def test_distilling_again(tmp_path, capsys):
    """Without --resume the same teacher is distilled anew. After other training of the folder's
    model the teacher is that one. A generator without its teacher is refused, as is --lora, and a
    folder without a model."""
    out = distil(copy_run(tmp_path / "run", "*.checkpoint.*"))
    shutil.copytree(out, tmp_path / "first")
    distil(out)
    assert_same_tensors(tmp_path / "first", out, LAST, TRANSFORMER_WEIGHTS)

    copy_run(out, "*.checkpoint.*")                                                # of many steps
    model = tiny_change(out / TRANSFORMER_WEIGHTS)
    distil(out)
    assert (out / "teacher" / "diffusion_pytorch_model.safetensors").read_bytes() == model

    shutil.rmtree(out / "teacher")
    arguments = "--out", out, "--stage", "one-step"
    assert "whose teacher is not in" in refused(capsys, *arguments)
    assert "--lora" in refused(capsys, *arguments, "--lora", 4)
    shutil.rmtree(out / "transformer")
    assert "starts from a model" in refused(capsys, *arguments)


def tiny_change(path):
    """Change a file of weights a little -> its new bytes."""
    tensors = load_file(path)
    tensors["embed.embeddings.weight"][0] += 1
    save_file(tensors, path)
    return path.read_bytes()


@pytest.mark.parametrize("data", ("shapes", "photos"))
def test_captions_and_micro_conditions(tmp_path, monkeypatch, data):
    """No caption is dropped. Pictures are asked for as sampling does, whatever the data's are; the
    teacher's guidance is the preset's."""
    out, seen = copy_run(tmp_path / "run"), []
    forward = Distiller.forward

    def record(self, cond, uncond, batch, seeds, cfg):
        seen.append((cond, uncond, batch, cfg))
        return forward(self, cond, uncond, batch, seeds, cfg)

    monkeypatch.setattr(Distiller, "forward", record)
    more = ("--data", photos(tmp_path / "photos")) if data == "photos" else ()
    distil(out, *more)
    empty = clip.Tokenizer.from_pretrained(out / "tokenizer")([""])
    assert len(seen) == STEPS
    for cond, uncond, batch, cfg in seen:
        assert cfg == ONE_STEP["cfg"] and batch.ids.shape == (8, 16, 16)
        assert not (batch.text_ids == empty).all(1).any()
        assert (uncond.pooled == uncond.pooled[0]).all()
        assert (cond.pooled != uncond.pooled).any(1).all()
        for one in (cond, uncond):
            assert one.micro_conds.tolist() == [[2 * SIZE, 2 * SIZE, 0, 0, 6]] * 8


@pytest.mark.parametrize("flags", (["--accumulate", 4], ["--checkpointing"]))
def test_flags_that_save_memory_change_nothing(tmp_path, monkeypatch, flags):
    """Losses and distances as without, to rounding."""
    monkeypatch.setattr(Run, "precision", lambda self: contextlib.nullcontext())
    plain = distil(copy_run(tmp_path / "plain"))
    other = distil(copy_run(tmp_path / "other"), *flags)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """With replicas, and with everything split between them."""
    more = EXACT + "\ntrain.PRESETS['tiny']['one-step'] = " + repr(ONE_STEP)
    exact, found = script(tmp_path / "exact.py", more), {}
    for name, processes, flags in (("one", 1, []), ("two", 2, []), ("split", 2, ["--shard"])):
        out = copy_run(tmp_path / name)
        status, err = run_process(exact, "--preset", "tiny", "--out", out, "--stage", "one-step",
                                  "--no-eval", *flags, processes=processes)
        assert status == 0, err
        found[name] = losses(out)
        assert Pipeline(out).one_step
    assert len(found["one"]) == STEPS
    assert found["two"] == pytest.approx(found["one"], rel=1e-4)
    assert found["split"] == pytest.approx(found["one"], rel=1e-4)


def test_a_sheet_of_the_students_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", recipe.evaluate)
    out = distil(copy_run(tmp_path / "run"), "--eval-every", STEPS, "--eval-captions", 4)
    assert open_picture(out / "sheet.png").size == (6 * 2 * SIZE, 2 * SIZE)
