"""What the training loop needs to know of one stage, and helpers of the loop.

    task = Task("1", module, param_groups, micro_batches, steps=6000, batch=64, lr=1e-3, save=save)
    train.fit(run, task)

engine.vq_training.vq_task, shapes.text_pretraining.text_task and train.transformer_task build one.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Task:
    """One stage of training.

    name           the stage, e.g. "vq" or "1"; names its checkpoints and log entries
    module         what is trained, on run.device
    param_groups   () -> AdamW groups of decay_groups; called after the module is sharded
    micro_batches  (model, step, attempt) -> generator that yields run.accumulate times (loss,
                   {name: number or 0-d tensor to log}). `model` is `module`, wrapped for data
                   parallelism.
                   The loop calls backward between two yields; what stands after the last one runs
                   after the last backward. The sum of the losses, averaged over the processes, is
                   the loss of the step
    batch          examples in a step, over all processes and accumulations
    lr, floor      peak learning rate; the share of it at which the cosine ends, 1 for a fixed rate
    betas          of AdamW
    save           (state {name: CPU tensor}) writes the averaged model; main process only
    evaluate       (step) draws and scores the saved model; main process only
    """
    name: str
    module: nn.Module
    param_groups: Callable
    micro_batches: Callable
    steps: int
    batch: int
    lr: float
    save: Callable
    floor: float = 0.02
    evaluate: Callable | None = None
    betas: tuple[float, float] = (0.9, 0.98)


def decay_groups(module, scale=1.0, weight_decay=0.01):
    """AdamW groups of the trained parameters. Matrices and kernels decay; biases, norms and
    embeddings do not. `scale` multiplies the learning rate."""
    named = module.named_modules()
    embeddings = tuple(name + "." for name, m in named if isinstance(m, nn.Embedding))
    decayed, spared = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            is_spared = p.dim() <= 1 or name.startswith(embeddings)
            (spared if is_spared else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay, "scale": scale},
            {"params": spared, "weight_decay": 0.0, "scale": scale}]


def accumulate_gradients(run, task, model, state):
    """The forward and backward passes of one step -> (this process's loss, {name: mean to log})."""
    loss = 0.0
    means = {}
    micro_batches = task.micro_batches(model, state.step, state.attempt)
    for i in range(run.accumulate):
        run.sync_gradients(model, last=i == run.accumulate - 1)
        part, values = next(micro_batches)
        part.backward()
        loss = loss + part.detach()
        for name, value in values.items():
            means[name] = means.get(name, 0) + value / run.accumulate
    next(micro_batches, None)                     # the code after the last yield
    return loss, means


def set_lr(optimizer, lr):
    """Set the learning rate, times the scale of each group of decay_groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def recomputed(forward):
    """A function whose activations are not kept, but computed again in the backward pass."""
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def not_finite(*values):
    """1.0 if one of the 0-d tensors is not finite, else 0.0. The host does not wait for it."""
    return (~torch.stack(values).isfinite().all()).float()


def is_due(step, every, last):
    """Whether a step is one of every `every` steps, or the last one."""
    return step % every == 0 or step == last


def save_half(folder, module, state):
    """Write a model like `module`, a Pretrained, with the weights of `state`, in float16."""
    with torch.device("meta"):
        model = type(module)(module.config)
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder, torch.float16)
