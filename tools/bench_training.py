"""Part `training` of tools.bench: training steps of each preset, on random tokens.

`plain` computes the logits of all positions with the plain kernels. `kernels` is the step of
train.py, `compiled` that of train.py --compile. The share of the ceiling counts the operations of
the plain step.
"""
import statistics
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import clip
import train
import vq
from engine.distributed import Run
from tools.bench_timing import ceilings, now, peak_memory, plain_kernels, reset_peak_memory

TOKENS = 2 ** 14                                      # of a batch on a GPU at most
GPU_STAGES = (("paper", "1"), ("paper", "3"), ("small", "3"))
CPU_STAGES = (("tiny", "1"),)
SECONDS = 1.0                                         # measured for each path


def time_training(report, device, start):
    cuda = device.type == "cuda"
    product = ceilings(device, torch.bfloat16)[1]
    paths = ("kernels", "plain", "compiled") if cuda else ("kernels", "plain")
    jobs = []
    for path in paths:                                # compiling takes long: last
        for preset, stage in GPU_STAGES if cuda else CPU_STAGES:
            job = partial(time_steps, report, device, preset, stage, path, product)
            jobs.append((f"{preset}, stage {stage}, {path}", job))
    report.jobs(jobs, start)


def time_steps(report, device, preset, stage, path, product):
    """One row: steps of one stage on one path."""
    torch.manual_seed(0)
    reset_peak_memory(device)
    plain = path == "plain"
    run = Run(report.out, {}, device=device, preset=preset, compile=path == "compiled")
    settings = train.PRESETS[preset][stage]
    side = settings["size"] // vq.Config(**train.MODELS[preset]["vq"]).f
    batch = min(settings["batch"], max(1, TOKENS // side ** 2)) if device.type == "cuda" else 4
    words = {clip.END: 655, **{i: i for i in range(655)}}       # as many as a tokenizer learns
    with torch.device(device):
        module = train.new_model(train.MODELS[preset], words, settings["compress"])
    inputs = random_batch(module, batch, side, settings["size"], device)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    operations = count_operations(run, module, inputs)
    model = run.parallelize(module)
    times = []
    with plain_kernels() if plain else nullcontext(), run.attention():
        while len(times) < 4 or sum(times[1:]) < SECONDS:
            begin = now(device)
            train_step(run, model, optimizer, inputs, plain)
            times.append(now(device) - begin)
    per_step = statistics.median(times[1:])
    report.row(preset=preset, stage=stage, path=path, tokens=side ** 2, batch=batch,
               steps_per_s=1 / per_step, samples_per_s=batch / per_step, warm_up_s=times[0],
               peak_GB=peak_memory(device), of_product=f"{operations / per_step / product:.0%}")


def random_batch(model, batch, side, size, device):
    """A train.MaskedBatch."""
    rng = np.random.default_rng(0)
    config = model.text_encoder.config
    ids = rng.integers(model.transformer.config.codebook_size, size=(batch, side, side))
    text_ids = rng.integers(config.vocab_size, size=(batch, config.max_position_embeddings))
    micro = np.tile(np.array([size, size, 0, 0, 6], np.float32), (batch, 1))
    mask = train.draw_mask(rng, batch, side * side)                            # (batch, N)
    timestep = mask.mean(1).astype(np.float32)
    arrays = ids, text_ids, micro, mask.ravel().nonzero()[0], timestep
    return train.MaskedBatch(*[torch.as_tensor(array).to(device) for array in arrays])


def train_step(run, model, optimizer, inputs, plain):
    with run.precision():
        loss = plain_loss(model, inputs) if plain else model(inputs)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def plain_loss(model, inputs):
    """train.compute_loss in its simplest form."""
    ids = inputs.ids.flatten().index_fill(0, inputs.masked, model.transformer.config.mask_token)
    hidden, pooled = model.text_encoder(inputs.text_ids)
    logits = model.transformer(ids.view_as(inputs.ids), hidden, pooled, inputs.micro_conds,
                               inputs.timestep)                                  # (B, h, w, V)
    targets = inputs.ids.flatten()[inputs.masked]                                # (M,)
    logits = logits.flatten(0, 2)[inputs.masked].float()                         # (M, V)
    return F.cross_entropy(logits, targets, reduction="sum")


def count_operations(run, model, inputs):
    """Operations of forward and backward of one plain step, by PyTorch's count."""
    with plain_kernels(), run.attention(), FlopCounterMode(display=False) as counter:
        with run.precision():
            loss = plain_loss(model, inputs)
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops()
