"""Train Meissonic (Bai et al., ICLR 2025; sections are the paper's): from nothing, or further.

    python train.py                                           # tiny on a CPU, small on a GPU
    python train.py --preset small --out runs/small           # the bundled model
    python train.py --preset small --out runs/small --resume  # after any interruption
    python train.py --preset tiny --resume --stage 3          # one stage

    # the public weights, fine-tuned on your own pictures; then the paper's recipe on 8 GPUs
    python train.py --preset paper --init meissonic --data photos --stage 4 --lora 16 --out runs/a
    torchrun --nproc_per_node=8 train.py --preset paper --data "laion/*.tar" --init parts --shard

Stages, in this order:

    tokenizer   byte pairs learned from the captions
    text        the text encoder on captions alone (shapes only; the paper takes CLIP's)
    vq          pictures -> tokens -> pictures, engine/vq_training.py
    1 2 3 4     masked image modelling: low resolution, twice that, twice again with compression
                layers (paper), and last a low learning rate that includes the text encoder
    one-step    a generator that draws in one pass, distilled from the model in the folder or from
                --init; only with --stage one-step

A run's folder is a model folder for `sample.py --model`, with checkpoints, log.jsonl, loss.png and
sheet.png beside. A stage starts from the model in the folder.

Letters: B batch, h w tokens along the sides, N = h w, M masked tokens of a batch, L text positions,
C width, D width of the text encoder, V codebook entries.
"""
import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import clip
import kernels
import meissonic
import vq
from engine import options, resume
from engine.cli import script
from engine.data import Prefetch, worker_number
from engine.distillation import distillation_task
from engine.distributed import clip_gradients
from engine.log import Log, print_summary
from engine.lora import add_lora
from engine.model_folder import (MADE_BY, check_fit, check_stages, copy_init, is_finished,
                                 load_part, report_sizes, save_model, rate_condition_of)
from engine.recipe import FileRecipe, evaluate
from engine.task import (Task, accumulate_gradients, decay_groups, is_due, not_finite, recomputed,
                         set_lr)
from engine.vq_training import vq_task

# --------------------------------------------------------------------------------------------------
# Presets. Stages 1 to 4: pixels along a side, batch, steps, peak learning rate, the text encoder's
# share of it (0: frozen), compression layers. Stage vq: the steps from which latents are quantised
# and from which the discriminator takes part. Stage one-step: the teacher's guidance. More: floor
# is the share of the peak at which the cosine ends (1: a fixed rate, as in the paper). The rest is
# for pictures of shapes: shapes/recipe.py.

TEXT = "batch steps lr"
VQ = "size batch steps lr quantize_from adversary_from"
STAGE = "size batch steps lr text_lr compress"
ONE_STEP = "size batch steps lr cfg"


def row(columns, *values, **more):
    return dict(zip(columns.split(), values, strict=True)) | more


CLEAN = dict(augment_prob=0.0)                    # no blurred or noisy pictures
FIXED = dict(floor=1)
TINY = dict(world="tiny", **CLEAN)                # 8 x 8 tokens, no letters, at most three objects
PRESETS = {
    "tiny": {                                     # two CPU cores, 17 minutes
        "text": row(TEXT, 64, 600, 1.5e-3, **TINY),
        "vq": row(VQ, 64, 8, 1500, 4e-3, 0, 1500, crowds=0.5, patch_codes=(8, 36), **TINY),
        "1": row(STAGE, 64, 16, 1500, 1.5e-3, 0.0, True, concepts=1.0, **TINY),
        "2": row(STAGE, 64, 16, 3300, 1.5e-3, 0.0, True, concepts=0.2, **TINY),
        "one-step": row(ONE_STEP, 64, 32, 2000, 2e-4, 2.0, **TINY),
    },
    "small": {                                    # the bundled model: minutes on a GPU
        "text": row(TEXT, 256, 3000, 1e-3),
        "vq": row(VQ, 256, 32, 2000, 2e-3, 0, 2000, concepts=0.2, patch_codes=(8, 64), **CLEAN),
        "1": row(STAGE, 128, 1024, 600, 2e-3, 0.0, True, concepts=1.0, scale=2, cells=8, views=2,
                 **CLEAN),
        "2": row(STAGE, 256, 1024, 800, 2e-3, 0.0, True, concepts=0.6, views=2, **CLEAN),
        "3": row(STAGE, 256, 1024, 2000, 2e-3, 0.0, True, concepts=0.15, letters=0.4, views=2,
                 **CLEAN),
        "one-step": row(ONE_STEP, 256, 64, 4000, 1e-4, 1.5, concepts=0.15, **CLEAN),
    },
    "paper": {                                    # f = 16; steps and batches of section 2.5
        "vq": row(VQ, 256, 256, 200_000, 1e-4, 5000, 100_000),
        "1": row(STAGE, 256, 2048, 100_000, 1e-4, 0.0, False, **FIXED),
        "2": row(STAGE, 512, 512, 100_000, 1e-4, 0.0, False, **FIXED),
        "3": row(STAGE, 1024, 256, 42_000, 1e-4, 0.0, True, **FIXED),
        "4": row(STAGE, 1024, 256, 10_000, 1e-5, 1.0, True, **FIXED),
        "one-step": row(ONE_STEP, 1024, 64, 20_000, 1e-6, 4.0, **FIXED),
    },
}
STAGES = ("tokenizer", "text", "vq", "1", "2", "3", "4", "one-step")

SMALL_VQ = dict(block_out_channels=(16, 32, 32, 32, 64), layers_per_block=1, latent_channels=24,
                vq_embed_dim=24, num_vq_embeddings=1800, norm_num_groups=8)
SMALL_TEXT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3,
                  num_attention_heads=4, projection_dim=192, max_position_embeddings=32)
SMALL_TRANSFORMER = dict(num_layers=3, num_single_layers=6, num_attention_heads=6,
                         attention_head_dim=32, joint_attention_dim=128, pooled_projection_dim=192,
                         axes_dims_rope=(8, 12, 12), codebook_size=1800, vocab_size=1801)
TINY_TEXT = SMALL_TEXT | dict(projection_dim=128, max_position_embeddings=24)
TINY_TRANSFORMER = SMALL_TRANSFORMER | dict(num_layers=2, num_single_layers=4,
                                            num_attention_heads=4, pooled_projection_dim=128,
                                            codebook_size=1016, vocab_size=1017)
MODELS = {                                        # configs; what they leave out is as published
    "tiny": dict(vq=SMALL_VQ | dict(block_out_channels=(16, 16, 32, 64), num_vq_embeddings=1016),
                 transformer=TINY_TRANSFORMER, text=TINY_TEXT,
                 sampling=dict(steps=32, cfg=2.0, temperature=(4.0, 0.0), remask=2)),
    "small": dict(vq=SMALL_VQ, transformer=SMALL_TRANSFORMER, text=SMALL_TEXT,
                  sampling=dict(steps=24, cfg=1.5, temperature=(4.0, 0.0), remask=2)),
    "paper": dict(vq={}, transformer={}, text={}, sampling=dict(steps=48, cfg=9.0)),
}


# --------------------------------------------------------------------------------------------------
# The objective (section 2.2: masking; section 2.4: loss)


def draw_mask(rng, batch, tokens):
    """Which tokens are masked -> (batch, tokens) bool, at least one in each row. The masking rate
    is r = cos(pi t / 2) with t uniform in [0, 1]; its density is the arccos law
    2/pi (1 - r^2)^(-1/2). Sampling masks the same share at t = step / steps, so training meets each
    rate as often as sampling does. High rates are the most frequent: the cosine is flat at 0."""
    rate = np.cos(np.pi / 2 * rng.random(batch))                                   # (batch,)
    num_masked = np.maximum(np.round(rate * tokens), 1)                            # (batch,)
    rank = rng.random((batch, tokens)).argsort(1).argsort(1)                       # (batch, tokens)
    return rank < num_masked[:, None]


class MaskedBatch(NamedTuple):
    """What a training step sees. `masked` are indices, as a bool mask would make the host wait."""
    ids: torch.Tensor                             # (B, h, w) int64, all tokens
    text_ids: torch.Tensor                        # (B, L) int64
    micro_conds: torch.Tensor                     # (B, 5) float32
    masked: torch.Tensor                          # (M,) int64, positions in ids.flatten()
    timestep: torch.Tensor                        # (B,) the condition on the masking rate


def compute_loss(transformer, text_encoder, batch):
    """Cross-entropy of the masked tokens, given the other tokens, the caption, the micro conditions
    and the masking rate -> the sum over M tokens, a scalar."""
    hidden, pooled = text_encoder(batch.text_ids)                              # (B, L, D), (B, C)
    ids = batch.ids.flatten()                                                      # (B N,)
    targets = ids.index_select(0, batch.masked)                                    # (M,)
    ids = ids.index_fill(0, batch.masked, transformer.config.mask_token)           # (B N,)
    x = transformer.features(ids.view_as(batch.ids), hidden, pooled, batch.micro_conds,
                             batch.timestep)                                       # (B, h, w, C)
    x = x.flatten(0, 2).index_select(0, batch.masked)                              # (M, C)
    x = transformer.head_features(x)                                               # (M, C)
    codes = transformer.mlm_layer.conv2.weight.flatten(1)                          # (V, C)
    return kernels.linear_cross_entropy(x, codes, targets).sum()


class MaskedImageModel(nn.Module):
    """Text encoder and transformer in one module: data parallelism wants one forward pass."""

    def __init__(self, text_encoder, transformer):
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    @property
    def blocks(self):
        return self.transformer.blocks

    def forward(self, batch):
        return compute_loss(self.transformer, self.text_encoder, batch)


# --------------------------------------------------------------------------------------------------
# Stages 1 to 4: the model that they start with, and how it is trained


def new_model(configs, vocabulary, compress):
    """A MaskedImageModel with PyTorch's random weights. configs: an entry of MODELS; vocabulary:
    {word: number} of the tokenizer."""
    text = dict(configs["text"])
    if text:
        text.update(vocab_size=len(vocabulary), eos_token_id=vocabulary[clip.END])
    transformer = configs["transformer"] | dict(downsample=compress, upsample=compress)
    return MaskedImageModel(clip.TextEncoder(clip.Config(**text)),
                            meissonic.Transformer(meissonic.Config(**transformer)))


def initialize_weights(model):
    """Initialise a MaskedImageModel, in place. Adaptive norms start at zero, so that every block
    starts as the identity (DiT)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)                   # large against a step of Adam
        elif isinstance(module, meissonic.Modulation):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)


@torch.no_grad()
def add_compression(plain):
    """A transformer without compression layers -> one with them and the same other weights. A block
    position starts as the mean of its 2 x 2 tokens, and gives the same features to all four. A
    little noise lets the four differ."""
    width = plain.config.width
    config = meissonic.Config(**vars(plain.config) | dict(downsample=True, upsample=True))
    model = meissonic.Transformer(config)
    model.load_state_dict(plain.state_dict(), strict=False)
    down = model.down_block.downsample.conv.weight                                 # (C, C, 2, 2)
    up = model.up_block.upsample.conv.weight                                       # (C, C, 2, 2)
    identity = torch.eye(width)[:, :, None, None]
    for weight, scale in ((down, 0.25), (up, 1.0)):
        noise = 0.1 * width ** -0.5 * torch.randn(width, width, 2, 2)
        weight.copy_(scale * (identity + noise))
    return model


def build_model(run, recipe, configs, text_lr=0.0, compress=False):
    """The MaskedImageModel that a stage starts with: that in the run's folder (of the stage before,
    or of --init), else a fresh one. Compression layers are added if the stage has them."""
    torch.manual_seed(run.seed)
    vocabulary = clip.Tokenizer.from_pretrained(run.out / "tokenizer").bpe.get_vocab()
    model = new_model(configs, vocabulary, compress)
    initialize_weights(model)
    model.text_encoder = load_part(run.out / "text_encoder", clip.TextEncoder) or model.text_encoder
    loaded = load_part(run.out / "transformer", meissonic.Transformer)
    if loaded and compress and not loaded.config.downsample and not run.lora:
        loaded = add_compression(loaded)
    model.transformer = loaded or model.transformer
    if not text_lr or run.lora:
        model.text_encoder.requires_grad_(False).eval()
    if run.lora:
        add_lora(model.transformer.requires_grad_(False), run.lora)
    else:
        recipe.prepare(model.transformer, fresh=loaded is None)
    if run.checkpointing:
        for block in model.blocks:
            block.forward = recomputed(block.forward)
    return model.to(run.device)


def masked_batches(run, dataset, stage, cond_drop_prob=0.1):
    """-> make(step, attempt) -> list of a MaskedBatch for each accumulation, CPU tensors."""
    batch = run.stages[stage]["batch"]
    timestep_of = meissonic.RATE_CONDITIONS[rate_condition_of(run.out)]
    empty_caption = clip.Tokenizer.from_pretrained(run.out / "tokenizer")([""])    # (1, L)
    tokens = math.prod(dataset.grid)                                               # N

    def make(step, attempt):
        rng = run.rng(stage, step, attempt)
        index = dataset.indices([run.seed, attempt], step, batch)                  # (batch,)
        drop = rng.random(batch) < cond_drop_prob         # (batch,) captions, for guidance
        mask = draw_mask(rng, batch, tokens)                                       # (batch, N)
        batches = []
        for own_index, own_drop, own_mask in run.rank_slice(index, drop, mask):
            ids, text_ids, micro_conds = dataset[own_index]
            text_ids = torch.where(torch.from_numpy(own_drop)[:, None], empty_caption, text_ids)
            # by the rate: training knows no step
            timestep = [timestep_of(0, 1, int(n), tokens) for n in own_mask.sum(1)]
            masked = own_mask.ravel().nonzero()[0]                                 # (M,)
            arrays = ids, text_ids, micro_conds, masked, np.float32(timestep)
            tensors = [torch.as_tensor(array) for array in arrays]
            batches.append((MaskedBatch(*tensors), int(mask.sum())))
        return batches

    return make


CAPTIONS_EVERY = 100                              # steps between caption_losses


@torch.no_grad()
def caption_losses(model, batch, timestep):
    """Whether the model hears the caption: its loss for pictures of which all is masked, with their
    own captions and with each other's. The first sign that it does, long before pictures."""
    number = batch.ids.numel()
    everything = torch.arange(number, device=batch.ids.device)                     # (B N,)
    right = batch._replace(masked=everything, timestep=torch.full_like(batch.timestep, timestep))
    wrong = right._replace(text_ids=batch.text_ids.roll(1, 0))
    return {"right_caption": model(right) / number, "wrong_caption": model(wrong) / number}


def transformer_task(run, recipe, stage, model):
    """The Task that trains a MaskedImageModel on the pictures of a stage."""
    settings = run.stages[stage]
    steps, batch = settings["steps"], settings["batch"]
    dataset = recipe.dataset(stage)
    all_masked = meissonic.RATE_CONDITIONS[rate_condition_of(run.out)](0, 1, 1, 1)
    batches = Prefetch(masked_batches(run, dataset, stage), steps, worker_number(run.device))

    def micro_batches(model, step, attempt):
        for masked_batch, masked in batches(step, attempt):
            values = {"rate": len(masked_batch.masked) / masked_batch.ids.numel()}
            masked_batch = MaskedBatch(*[run.to_device(tensor) for tensor in masked_batch])
            with run.precision():
                loss = model(masked_batch)
                if (step + 1) % CAPTIONS_EVERY == 0:
                    values |= caption_losses(model, masked_batch, all_masked)
            # the mean over the masked tokens of the whole batch: processes average their gradients
            yield loss * (run.world_size / masked), values

    def param_groups():
        text_groups = decay_groups(model.text_encoder, scale=settings["text_lr"])
        return decay_groups(model.transformer) + text_groups

    def save(state):
        sampling = {"size": settings["size"], **MODELS[run.preset]["sampling"]}
        save_model(run, recipe, model, state, sampling)

    return Task(stage, model, param_groups, micro_batches, steps, batch, settings["lr"], save,
                settings.get("floor", 0.02), evaluation(run, recipe, stage))


def evaluation(run, recipe, stage):
    """The `evaluate` of a Task, None with --no-eval."""
    return partial(evaluate, run, recipe, stage) if run.eval_every else None


# --------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, steps, peak, floor=0.02, warmup=100):
    """Linear warm-up, then a cosine down to `floor` of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


def fit(run, task, ema_decay=0.999, max_norm=1.0):
    """Train task.module. The moving average of its weights is the model.

    A step whose loss or gradient is not finite is dropped. After three of them in a row training
    goes back to the last checkpoint and on with other data (section 2.2, after LLaMA).
    SIGTERM and Ctrl-C save first."""
    model = run.parallelize(task.module)          # and compiled, with --compile
    groups = [group for group in task.param_groups() if group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=task.betas, fused=True)
    state = resume.TrainingState(task.module, optimizer)
    resume.begin(run, task, state)                # load the last checkpoint, or write the first
    log = Log(run, task.name, state.step, task.steps, task.batch)
    with resume.StopSignal() as stop, run.attention():
        while state.step < task.steps:
            set_lr(optimizer, learning_rate(state.step, task.steps, task.lr, task.floor))
            loss, values = accumulate_gradients(run, task, model, state)      # forward and backward
            norm = clip_gradients(state.optimized(), max_norm)
            loss = run.all_reduce(loss / run.world_size)
            optimizer.found_inf = not_finite(loss, norm)      # if it is 1, AdamW skips the update
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            state.update_ema(min(ema_decay, state.step / (state.step + 10)))  # quick at first
            log.add(state.step, loss, norm, **values)
            stopping = run.any(stop.asked)
            evaluating = task.evaluate and is_due(state.step, run.eval_every, task.steps)
            saving = evaluating or stopping or is_due(state.step, run.save_every, task.steps)
            if (saving or log.is_due(state.step)) and log.read():             # three bad in a row
                resume.go_back(run, task, state, log)
                continue
            if saving:
                resume.write_checkpoint(run, task, state)
            if evaluating:
                log.scores = run.on_main(task.evaluate, state.step)
            if stopping:
                raise KeyboardInterrupt
    log.close()


# --------------------------------------------------------------------------------------------------
# The stages in turn


def choose_recipe(run):
    """What --data names: files, or the drawn world of shapes/."""
    if run.data == "shapes":
        from shapes.recipe import ShapesRecipe
        return ShapesRecipe(run)
    return FileRecipe(run)


def run_stage(run, recipe, stage):
    """Train one stage, from what is in the run's folder to what the next one needs."""
    configs, settings = MODELS[run.preset], run.stages.get(stage)
    if stage == "tokenizer":
        length = configs["text"].get("max_position_embeddings", clip.Config.max_position_embeddings)
        return run.on_main(recipe.make_tokenizer, length)
    if stage == "vq":
        task = vq_task(run, vq.Config(**configs["vq"]), recipe.source(stage), recipe.set_codes())
    elif stage == "text":
        task = recipe.text_task(build_model(run, recipe, configs, text_lr=1.0).text_encoder)
    elif stage == "one-step":
        text_encoder = build_model(run, recipe, configs).text_encoder
        batches = masked_batches(run, recipe.dataset(stage), stage, cond_drop_prob=0.0)
        batches = Prefetch(batches, settings["steps"], worker_number(run.device))
        task = distillation_task(run, text_encoder, batches, evaluation(run, recipe, stage))
    else:
        model = build_model(run, recipe, configs, settings["text_lr"], settings["compress"])
        check_fit(run, model)
        task = transformer_task(run, recipe, stage, model)
    fit(run, task)


@script("train.py", stopped="stopped; --resume goes on from the last checkpoint")
def main(argv=None):
    args = options.parse_arguments(PRESETS, STAGES, __doc__, argv)
    run = options.open_run(args, PRESETS)
    with resume.only_run_in(run):                 # raises UserError if another one runs there
        recipe = choose_recipe(run)
        copy_init(run)
        report_sizes(run, MODELS[run.preset])
        in_turn = ["tokenizer", *(stage for stage in run.stages if stage != "one-step")]
        stages = [args.stage] if args.stage else in_turn
        if not args.encode:
            check_stages(run, stages)
        for stage in stages:
            if is_finished(run, stage, args.encode):
                continue
            if args.encode and stage not in MADE_BY:
                recipe.dataset(stage)
            else:
                run_stage(run, recipe, stage)
        if run.is_main and not args.encode and (run.out / "log.jsonl").is_file():
            print_summary(run.out)


if __name__ == "__main__":
    main()
