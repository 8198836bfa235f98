"""Stage one-step: a model of many steps becomes a one-step generator (Di[M]O, Zhu et al. 2025,
arXiv 2503.15457, section 3).

    batches = Prefetch(masked_batches(run, dataset, "one-step", cond_drop_prob=0), ...)
    train.fit(run, distillation_task(run, text_encoder, batches, evaluate))

The generator, the student, draws whole pictures in one pass. The model that it comes from, the
teacher, says what is wrong with them: pictures of the student are masked anew, and the teacher
predicts the masked tokens. So does an auxiliary model, which learns what the student draws. Where
the teacher finds a token likelier than the auxiliary model does, the student draws it too rarely.
Only the captions of the data are used, not the pictures.

Letters: B batch, h w tokens, N = h w, M masked tokens of a batch, V codebook entries.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

import clip
import meissonic
from engine.checkpoint import UserError, remove_prefix, write_folder, write_text
from engine.data import DEFAULT_SCORE
from engine.model_folder import copy_files, is_one_step, load_part, save_scheduler
from engine.resume import checkpoints
from engine.task import Task, decay_groups, recomputed, save_half

TRAINING_START = meissonic.OneStep(mask_share=0.5, noise=0.3)        # sampling: 0.6 and 0.1
NEGATIVE = "negative.txt"                         # in the teacher's folder: its negative prompt


# --------------------------------------------------------------------------------------------------
# The objective


class Distiller(nn.Module):
    """Student and auxiliary model, which start as the teacher. One optimizer trains both: neither
    loss reaches the parameters of the other."""

    def __init__(self, teacher):
        super().__init__()
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.auxiliary = copy.deepcopy(teacher).requires_grad_(True)
        self.teacher = [teacher.requires_grad_(False)]   # in a list: neither trained nor saved

    @property
    def blocks(self):
        return [*self.student.blocks, *self.auxiliary.blocks]

    def forward(self, cond, uncond, batch, seeds, cfg):
        """cond, uncond: Conditionings of B rows; batch: a train.MaskedBatch, whose tokens and
        captions do not count; seeds (B,) of the pictures; cfg: the teacher's guidance.
        -> three scalars, sums over the M masked tokens: the student's loss, whose value is 0, as
        only its gradient means something; the auxiliary model's loss; the distance of the
        auxiliary model from the teacher (total variation, between 0 and 1 for a token)."""
        teacher, = self.teacher
        # 1. the student draws whole pictures
        ids, logits = draw(self.student, cond, batch.ids, seeds)          # (B, h, w), (B, N, V)
        logits = logits.flatten(0, 1).index_select(0, batch.masked).float()            # (M, V)
        # 2. they are masked anew
        drawn = ids.flatten().index_select(0, batch.masked)                            # (M,)
        ids = ids.flatten().index_fill(0, batch.masked, teacher.config.mask_token)     # (B N,)
        ids = ids.view_as(batch.ids)                                                   # (B, h, w)
        # 3. the teacher, with guidance, and the auxiliary model predict the masked tokens
        with torch.no_grad():
            guided = meissonic.apply_cfg(masked_logits(teacher, ids, cond, batch),
                                         masked_logits(teacher, ids, uncond, batch), cfg)
        predicted = masked_logits(self.auxiliary, ids, cond, batch)                    # (M, V)
        # 4. the gradient of the forward KL divergence by the student's logits
        gradient = predicted.detach().softmax(-1) - guided.softmax(-1)                 # (M, V)
        student_loss = (gradient * (logits - logits.detach())).sum()
        # 5. the auxiliary model learns what the student draws
        auxiliary_loss = F.cross_entropy(predicted, drawn, reduction="sum")
        return student_loss, auxiliary_loss, gradient.abs().sum() / 2


def draw(student, cond, ids, seeds):
    """Whole pictures, of the shape of ids (B, h, w) -> ids, logits (B, N, V). Gradients flow
    through the logits, not through the draw."""
    seen = []
    predict = meissonic.one_step_predictor(student, cond)
    drawn = meissonic.sample_one_step(predict, ids, student.config, seeds, TRAINING_START,
                                      watch=lambda n, ids, positions, logits: seen.append(logits))
    return drawn, seen[0]


def masked_logits(model, ids, cond, batch):
    """-> float32 logits (M, V) of the masked positions of ids (B, h, w)."""
    x = model.features(ids, cond.hidden, cond.pooled, cond.micro_conds, batch.timestep)
    x = x.flatten(0, 2).index_select(0, batch.masked)                                  # (M, C)
    return model.mlm_layer.conv2(model.head_features(x)).float()


# --------------------------------------------------------------------------------------------------
# The stage


def distillation_task(run, text_encoder, batches, evaluate):
    """The Task of stage "one-step". batches(step, attempt) -> a list of (MaskedBatch of train.py,
    number of masked tokens in the whole batch). It saves run.out/transformer. Raises UserError."""
    if run.lora:
        raise UserError("--lora: stage one-step trains all weights")
    settings = run.stages["one-step"]
    steps, batch, cfg = settings["steps"], settings["batch"], settings["cfg"]
    teacher = keep_teacher(run)
    distiller = Distiller(load_part(teacher, meissonic.Transformer).to(run.device))
    if run.checkpointing:
        for block in distiller.blocks:
            block.forward = recomputed(block.forward)
    # as sampling asks for pictures: whole ones of this size
    micro_conds = [[settings["size"], settings["size"], 0, 0, DEFAULT_SCORE]]
    micro_conds = torch.tensor(micro_conds, dtype=torch.float32, device=run.device)    # (1, 5)
    tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    negative = (teacher / NEGATIVE).read_text(encoding="utf-8")

    @torch.no_grad()
    def encode(text_ids):
        hidden, pooled = text_encoder(run.to_device(text_ids))
        return meissonic.Conditioning(hidden, pooled, micro_conds.expand(len(text_ids), -1))

    with run.precision():
        uncond = encode(tokenizer([negative]))                                         # one row

    def micro_batches(module, step, attempt):
        seeds = run.rng("one-step seeds", step, attempt).integers(2 ** 31, size=batch)
        for (own, masked), (own_seeds,) in zip(batches(step, attempt), run.rank_slice(seeds)):
            own = own._make(run.to_device(tensor) for tensor in own)
            with run.precision():
                student_loss, auxiliary_loss, distance = module(
                    encode(own.text_ids), uncond.rows([0] * len(own_seeds)), own,
                    run.to_device(own_seeds), cfg)
            # the mean over the masked tokens of the whole batch: processes average their gradients
            loss = (student_loss + auxiliary_loss) * (run.world_size / masked)
            yield loss, {"distance": distance.detach() / len(own.masked)}

    def save(state):
        # in this order: see keep_teacher
        save_scheduler(run, distiller.student, {"size": settings["size"]}, one_step={})
        save_half(run.out / "transformer", distiller.student, remove_prefix(state, "student."))

    def param_groups():
        # The auxiliary model must keep up. With momentum the two go round in circles, see NOTES.md.
        return decay_groups(distiller.student) + decay_groups(distiller.auxiliary, scale=3.0)

    return Task("one-step", distiller, param_groups, micro_batches, steps, batch, settings["lr"],
                save, settings.get("floor", 0.02), evaluate, betas=(0.0, 0.98))


def keep_teacher(run):
    """Copy the model in the run's folder, and the negative prompt, to run.out/teacher -> that
    folder. It stays as it is for a run that goes on, and where the model is a one-step generator:
    then that one's teacher is taken again. The scheduler's config tells; it is written first, so
    that a killed run leaves no generator that looks like a teacher. Raises UserError."""
    teacher = run.out / "teacher"
    goes_on = run.resume and checkpoints(run.out, "one-step")
    if not goes_on and not is_one_step(run.out):
        if run.is_main:
            write_folder(teacher, lambda folder: copy_teacher(run, folder), ["*"])
    elif not (teacher / NEGATIVE).is_file():
        raise UserError(f"--out {run.out} holds a one-step generator whose teacher is not in "
                        f"{teacher}: stage one-step starts from a model of many steps")
    run.barrier()
    return teacher


def copy_teacher(run, folder):
    copy_files(run.out / "transformer", folder)
    write_text(folder / NEGATIVE, run.negative)
