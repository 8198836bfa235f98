"""Stage one-step: a model of many steps becomes a one-step generator (Di[M]O, Zhu et al. 2025,
arXiv 2503.15457, section 3).

    batches = Prefetch(masked_batches(run, dataset, "one-step", cond_drop_prob=0), ...)
    train.fit(run, distillation_task(run, text_encoder, batches, evaluate))

The generator, the student, draws whole pictures in one pass. The model that it comes from, the
teacher, says what is wrong with them: pictures of the student are masked anew, and the teacher
predicts the masked tokens. So does an auxiliary model, which learns what the student draws. Where
the teacher finds a token likelier than the auxiliary model does, the student draws it too rarely.
No pictures are needed, only captions.

Letters: B batch, h w tokens, N = h w, M masked tokens of a batch, V codebook entries.
"""
import copy
from functools import partial

import torch
from torch import nn

import clip
import meissonic
from engine.checkpoint import remove_prefix, write_folder
from engine.model_folder import copy_files, load_part, save_scheduler
from engine.task import Task, decay_groups, save_half

TRAINING_START = meissonic.OneStep(mask_share=0.5, noise=0.3)        # sampling: 0.6 and 0.1


class Distiller(nn.Module):
    """Student and auxiliary model, which start as the teacher. One optimizer trains both: neither
    loss reaches the parameters of the other."""

    def __init__(self, teacher):
        super().__init__()
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.auxiliary = copy.deepcopy(teacher).requires_grad_(True)
        self.teacher = [teacher.requires_grad_(False)]        # in a list: it is no part to be saved

    @property
    def blocks(self):
        return [*self.student.blocks, *self.auxiliary.blocks]

    def forward(self, cond, uncond, batch, seeds, cfg):
        """cond, uncond: Conditionings of B rows; batch: a train.MaskedBatch, of which only the
        masked positions and the timestep count; seeds (B,) -> the student's and the auxiliary
        model's loss, sums over the M masked tokens."""
        teacher, = self.teacher
        drawn = []                                            # 1. the student draws pictures
        student = meissonic.one_step_predictor(self.student, cond)
        ids = meissonic.sample_one_step(student, batch.ids, self.student.config, seeds,
                                        TRAINING_START, lambda *all: drawn.append(all[3]))
        logits = drawn[0].flatten(0, 1).index_select(0, batch.masked)                  # (M, V)
        targets = ids.flatten().index_select(0, batch.masked)                          # (M,)
        mask_token = self.student.config.mask_token
        ids = ids.flatten().index_fill(0, batch.masked, mask_token).view_as(ids)       # 2. masked
        with torch.no_grad():                                 # 3. the teacher predicts them
            guided = meissonic.apply_cfg(masked_logits(teacher, ids, cond, batch),
                                         masked_logits(teacher, ids, uncond, batch), cfg)
        auxiliary = masked_logits(self.auxiliary, ids, cond, batch)                    # (M, V)
        # 4. the gradient of the forward KL divergence, as that of an inner product
        gradient = auxiliary.detach().softmax(-1) - guided.softmax(-1)                 # (M, V)
        student_loss = (gradient * logits.float()).sum()
        return student_loss, nn.functional.cross_entropy(auxiliary, targets, reduction="sum")


def masked_logits(model, ids, cond, batch):
    """-> float32 logits (M, V) of the masked positions of ids (B, h, w)."""
    x = model.features(ids, cond.hidden, cond.pooled, cond.micro_conds, batch.timestep)
    x = x.flatten(0, 2).index_select(0, batch.masked)                                  # (M, C)
    return model.mlm_layer.conv2(model.head_features(x)).float()


def distillation_task(run, text_encoder, batches, evaluate):
    """The Task of stage "one-step". batches(step, attempt) -> a list of (MaskedBatch of train.py,
    number of masked tokens). It saves run.out/transformer; the teacher stays in run.out/teacher,
    where --resume finds it."""
    settings = run.stages["one-step"]
    steps, size, cfg = settings["steps"], settings["batch"], settings["cfg"]
    if run.is_main and not (run.out / "teacher").is_dir():
        write_folder(run.out / "teacher", partial(copy_files, run.out / "transformer"), ["*"])
    run.barrier()
    distiller = Distiller(load_part(run.out / "teacher", meissonic.Transformer)).to(run.device)
    distiller.teacher[0].to(run.device)
    negative = clip.Tokenizer.from_pretrained(run.out / "tokenizer")([run.negative])   # (1, L)

    def micro_batches(module, step, attempt):
        seeds = run.rng("one-step seeds", step, attempt).integers(2 ** 31, size=size)
        parts = zip(batches(step, attempt), run.rank_slice(seeds))
        for (batch, masked), (own_seeds,) in parts:
            batch = type(batch)(*[run.to_device(tensor) for tensor in batch])
            with run.precision():
                with torch.no_grad():
                    cond = encode(text_encoder, batch.text_ids, batch.micro_conds)
                    empty = run.to_device(negative).expand(len(own_seeds), -1)
                    uncond = encode(text_encoder, empty, batch.micro_conds)
                losses = module(cond, uncond, batch, run.to_device(own_seeds), cfg)
            student, auxiliary = (loss * (run.world_size / masked) for loss in losses)
            yield student + auxiliary, {"auxiliary": auxiliary.detach()}

    def save(state):
        save_half(run.out / "transformer", distiller.student, remove_prefix(state, "student."))
        save_scheduler(run, distiller.student, {"size": settings["size"]}, one_step={})

    return Task("one-step", distiller, lambda: decay_groups(distiller), micro_batches, steps, size,
                settings["lr"], save, evaluate=evaluate)


def encode(text_encoder, text_ids, micro_conds):
    return meissonic.Conditioning(*text_encoder(text_ids), micro_conds)
