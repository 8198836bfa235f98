"""Training: from nothing to a model that draws what it is told (paper sections 2.2, 2.4, 2.5).

    python train.py --out runs/shapes                         # all stages in turn; --resume goes on after any interruption
    python train.py --preset cpu --out runs/cpu --compile     # smaller pictures, for two CPU cores
    python train.py --out runs/shapes --stage 3 --resume      # one stage: tokenizer, text, vq, 1, 2, 3, 4
    python train.py --out runs/style --init meissonic --data photos --preset paper --stage 4 --lora 16   # public weights, tuned
    python train.py --out runs/style --init meissonic --data photos --preset paper --stage 4 --encode    # pictures to tokens, no more
    torchrun --nproc_per_node=8 train.py --out runs/big --preset paper --data "laion/*.tar" --init parts   # or many nodes; --shard
    python train.py --benchmark                               # samples per second, share of the hardware's peak

tokenizer    byte pairs learned from the captions
text         the text encoder learns what captions say of their scenes (the paper's comes from CLIP)
vq           pictures -> tokens -> pictures (train_vq.py)
1 2 3 4      masked-token modelling on pictures that are encoded once: concepts at low resolution; twice that, long
             captions; twice again behind compression layers; a low learning rate. The averaged weights are the model

A run's folder is a model folder (`sample.py --model`) with the checkpoints, log.jsonl, loss.png and sheet.png beside.
A stage starts from the model that is there. The examples come from dataset.py, the loop with its processes, checkpoints and
log from trainer.py.

Letters: B batch, h w tokens, L text positions, V codebook, F features of a code, C width.
"""
import contextlib
import filecmp
import json
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from tokenizers import models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import clip
import data
import disk
import kernels
import meissonic
import sample
import train_vq
import trainer
import vq
from dataset import Tokens, encode, examples, readable, source_of, token_folder
from pipeline import Pipeline, UserError, check_compile, check_parts, choose_device, find_model, kernel_path, score_tasks

# One line for each stage: size x size pixels, global batch, steps, peak learning rate, that of the text encoder in
# its share (text; 0: frozen), compression layers or none, how many pictures of the world of shapes are drawn, which share of
# them shows a single concept, which is cropped and which spoilt (odd, a quarter each unless it is said), and which of the
# objects in the others are letters (a sixth); at which share of its peak the learning rate's cosine ends (floor: 0.02; 1 is a
# fixed rate, as the paper's).
# Stage text: the text encoder alone, from captions and scenes (the paper takes CLIP's).
# Stage vq: steps as an autoencoder (warm), the step at which the discriminator joins (adversary), pictures drawn (pool), and
# how many colours and outlines make up a codebook that is computed, as the encoder then is, not trained (patches).
PRESETS = {
    "shapes": {                                              # f = 4: 8 x 8, 16 x 16, then 32 x 32 tokens
        "text": dict(steps=4000, batch=64, lr=1e-3),
        "vq": dict(size=64, batch=32, steps=6000, lr=2e-3, warm=800, adversary=5000, pool=12_000),
        "1": dict(size=32, batch=64, steps=6000, lr=1.2e-3, text=0.0, compress=False, pictures=200_000, concepts=1.0),
        "2": dict(size=64, batch=64, steps=12_000, lr=8e-4, text=0.0, compress=False, pictures=400_000, concepts=0.4),
        "3": dict(size=128, batch=64, steps=12_000, lr=6e-4, text=0.0, compress=True, pictures=400_000, concepts=0.2),
        "4": dict(size=128, batch=64, steps=3000, lr=1e-4, text=1.0, compress=True, pictures=100_000),
    },
    "cpu": {                                                 # compressed from the start; tokens of patches (train_vq.py)
        "text": dict(steps=4000, batch=64, lr=1e-3),
        "vq": dict(size=64, batch=32, steps=2400, lr=2e-3, warm=0, adversary=2400, pool=6000, concepts=0.2, odd=0.0, patches=(8, 36)),
        "1": dict(size=32, batch=64, steps=2000, lr=1.2e-3, text=0.0, compress=True, pictures=150_000, concepts=1.0, odd=0.0),
        "2": dict(size=64, batch=48, steps=1500, lr=1e-3, text=0.0, compress=True, pictures=60_000, concepts=0.6, odd=0.0),
        "3": dict(size=64, batch=48, steps=4000, lr=1e-3, text=0.0, compress=True, pictures=200_000, concepts=0.15, odd=0.0, letters=0.4),
    },
    "paper": {                                               # f = 16, the published sizes; steps and batches of section 2.5
        "vq": dict(size=256, batch=256, steps=200_000, lr=1e-4, warm=5000, adversary=100_000, pool=200_000),
        "1": dict(size=256, batch=2048, steps=100_000, lr=1e-4, text=0.0, compress=False, floor=1, pictures=2_000_000, concepts=1.0),
        "2": dict(size=512, batch=512, steps=100_000, lr=1e-4, text=0.0, compress=False, floor=1, pictures=2_000_000),
        "3": dict(size=1024, batch=256, steps=42_000, lr=1e-4, text=0.0, compress=True, floor=1, pictures=2_000_000),
        "4": dict(size=1024, batch=256, steps=10_000, lr=1e-5, text=1.0, compress=True, floor=1, pictures=1_000_000),
    },
}
STAGES = ("tokenizer", "text", "vq", "1", "2", "3", "4")

SMALL = dict(
    vq=dict(block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, vq_embed_dim=8, num_vq_embeddings=512,
            norm_num_groups=8),
    transformer=dict(num_layers=3, num_single_layers=6, num_attention_heads=6, attention_head_dim=32,
                     joint_attention_dim=128, pooled_projection_dim=192, axes_dims_rope=(8, 12, 12), codebook_size=512,
                     vocab_size=513),
    sampling=dict(steps=16, cfg=3.0),
    text=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, projection_dim=192,
              max_position_embeddings=32))
MODELS = {"shapes": SMALL,
          "cpu": SMALL | dict(vq=SMALL["vq"] | dict(latent_channels=24, vq_embed_dim=24, num_vq_embeddings=1016),
                              transformer=SMALL["transformer"] | dict(codebook_size=1016, vocab_size=1017),
                              sampling=dict(steps=32, cfg=1.5, temperature=(4.0, 0.0), redraws=4, candidates=8)),
          "paper": dict(vq=dict(), transformer=dict(), text=dict(), sampling=dict(steps=48, cfg=9.0))}
ABLATIONS = ("rope", "rate", "qk-norm", "micro", "multimodal", "compression")


def build(preset, vocabulary, compress, without=None):
    """Fresh text encoder and transformer of a preset; `without` one of ABLATIONS."""
    text = dict(MODELS[preset]["text"])
    text_config = clip.Config(**text, vocab_size=len(vocabulary), eos_token_id=vocabulary[clip.END]) if text else clip.Config()
    config = meissonic.Config(**MODELS[preset]["transformer"])
    config.downsample = config.upsample = compress and without != "compression"
    if without == "multimodal":                              # as many blocks, all with one stream
        config.num_single_layers, config.num_layers = config.num_single_layers + config.num_layers, 0
    elif without and without != "compression":
        config.without = (without,)
    return clip.TextEncoder(text_config), meissonic.Transformer(config)


# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(captions, length):
    """Byte pairs from captions, enough merges that each word of the world of shapes is one token."""
    bpe = clip.byte_pair_tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=clip.END))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=1024, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    # CLIP's vocabulary: all bytes, all bytes that end a word, the merges, then the two special tokens.
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in trained["merges"]]
    words = sorted(alphabet) + [a + "</w>" for a in sorted(alphabet)] + ["".join(m) for m in merges]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(words + [clip.START, clip.END]))}
    return clip.Tokenizer(clip.byte_pair_tokenizer(models.BPE(
        vocabulary, merges, end_of_word_suffix="</w>", unk_token=clip.END)), length)


# ---------------------------------------------------------------------------------------------------------
# Transformer


def sample_mask(rng, batch, tokens):
    """Which of `tokens` positions are masked: the rate r = cos(pi t / 2) with t uniform has the density
    p(r) = 2/pi (1 - r^2)^(-1/2) of section 2.2, truncated to [0, 1]; round(r tokens) positions, at least one.
    -> mask (batch, tokens) bool, rates (batch,) float64: masked / tokens."""
    r = np.cos(np.pi / 2 * rng.random(batch))
    count = np.maximum(np.round(r * tokens), 1)
    mask = rng.random((batch, tokens)).argsort(1).argsort(1) < count[:, None]
    return mask, count / tokens


class Student(nn.Module):
    """What the stages train: the text encoder and the transformer together. `convention` is meissonic.timestep's."""
    def __init__(self, encoder, transformer, convention="rate"):
        super().__init__()
        self.encoder, self.transformer, self.convention = encoder, transformer, convention
        self.probe = nn.Linear(transformer.config.pooled_projection_dim, transformer.config.codebook_size)

    def forward(self, ids, tokens, mask, rates, micro):
        """ids (B, L), tokens (B, h, w) int64, mask (B, h * w) bool, rates (B,), micro (B, 5) -> summed
        cross-entropy of the masked tokens, and the probe's. The masking-rate condition is the rate in 1000 levels.

        The probe: a text tower that starts from nothing says nothing, and the transformer learns to do without it.
        So a linear layer, thrown away at the end, predicts each picture's histogram of tokens from the pooled text. Where
        the text tower is frozen there is nothing to predict, and no loss."""
        hidden, pooled = self.encoder(ids)
        masked = tokens.flatten(1).masked_fill(mask, self.transformer.config.mask_token).view(tokens.shape)
        levels = (rates * 1000).round()
        x = self.transformer.features(masked, hidden, pooled, micro, levels if self.convention == "rate1000" else levels / 1000)
        x = self.transformer.head_features(x.flatten(1, 2)[mask])                               # (masked, C)
        weight = self.transformer.mlm_layer.conv2.weight.flatten(1)                             # (V, C)
        loss = kernels.linear_cross_entropy(x, weight, tokens.flatten(1)[mask]).sum()
        if not self.probe.weight.requires_grad:
            return loss, loss.new_zeros(())
        histogram = torch.zeros(len(ids), len(weight), device=ids.device).scatter_add_(
            1, tokens.flatten(1), torch.ones_like(tokens.flatten(1), dtype=torch.float32)) / mask.shape[1]     # (B, V)
        return loss, F.cross_entropy(self.probe(pooled).float(), histogram)


def fresh(student):
    """Initialise in place: adaptive norms start at zero, so that every block starts as the identity (DiT)."""
    width = student.transformer.config.width
    for module in student.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)       # large against a step of Adam
        elif isinstance(module, meissonic.MLP):
            for linear in (module.linear_1, module.linear_2):   # the caption must still be heard after four layers
                nn.init.normal_(linear.weight, std=1.5 / linear.in_features ** 0.5)
        elif isinstance(module, meissonic.AdaNorm):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    # The five micro conditions fill 1280 inputs, nearly constant ones, beside the pooled text's C.
    student.transformer.cond_embed.linear_1.weight.data[:, width:] *= 0.1
    student.transformer.cond_embed.linear_1.weight.data[:, :width] *= 2.5


class Reader(nn.Module):
    """The text encoder, and a linear layer, thrown away at the end, that tells from the pooled text what the picture shows."""
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.answer = nn.Linear(encoder.config.projection_dim, len(data.whereabouts(data.Scene("red", ()))))

    def forward(self, ids, told):
        """ids (B, L), told (B, questions) of data.whereabouts -> binary cross-entropy, a scalar."""
        return F.binary_cross_entropy_with_logits(self.answer(self.encoder(ids)[1]).float(), told)


def train_text(run):
    """The text encoder learns what a caption says of its scene, no picture drawn: minutes, where through the transformer
    hours were too short. The paper's comes trained, from CLIP.

    Which of two objects is "left" is a parity: it takes the order of the words and the relation, and either alone tells
    nothing, so that gradients are blind. The first quarter has captions of two objects alone, four relations of five "left"
    or "above": there order tells something by itself, and is learned; from order, the rest."""
    preset = run.stages["text"]
    steps, batch = preset["steps"], preset["batch"]
    tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    student = Reader(new_student(run, {"compress": False, "text": 1.0}).encoder).to(run.device)

    def losses(model, step, attempt):
        rng, early = run.rng("text", step, attempt), step < steps // 4
        made = [data.sample_example(rng, "position" if early or i % 2 else None, letters=0.3, mirrored=0.2 if early else 0.5)
                for i in range(batch)]
        ids, told = tokenizer([text for text, _, _ in made]), torch.from_numpy(np.stack([data.whereabouts(scene) for _, scene, _ in made]))
        for ids, told in run.parts(ids, told):
            with run.precision():
                loss = model(ids.to(run.device), told.to(run.device))
            yield loss / run.accumulate, {}

    def finish(average):
        save_part(run.out / "text_encoder", student.encoder, trainer.strip(average, "encoder."))

    trainer.fit(run, "text", student, lambda: trainer.decay_groups(student), losses, batch, steps, preset["lr"], finish)


class Shared(nn.Module):
    """The parametrisation W -> W + M T of a table of codes (V, ...): M (V, F) has the codes' features, T (F, ...) is
    trained with W and starts at zero. What is learned of one code is then learned of all that share a feature with it."""
    def __init__(self, features, weight):
        super().__init__()
        self.register_buffer("features", F.pad(features, (0, 0, 0, len(weight) - len(features))), persistent=False)
        self.table = nn.Parameter(torch.zeros(features.shape[1], weight[0].numel()))

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):                 # as exact as the sum that is saved
            return weight + (self.features @ self.table).view_as(weight)


@torch.no_grad()
def share_features(transformer, features, anew):
    """Let codes share what is learned of their features (V, F), in the embedding and in the head, in place; with `anew` a
    code starts as the sum of its features, each a random vector."""
    for module, std in ((transformer.embed.embeddings, 0.25), (transformer.mlm_layer.conv2, 0.04)):
        if anew:
            table = std * torch.randn(features.shape[1], module.weight[0].numel())
            module.weight[:len(features)] = (features @ table).view_as(module.weight[:len(features)])
        parametrize.register_parametrization(module, "weight", Shared(features, module.weight))


def convention_of(folder):
    """The masking-rate condition that a model folder's transformer was trained with; see meissonic.timestep. The
    public weights, whose scheduler does not say, come from the official script: 1000 times the rate."""
    try:
        return json.loads((folder / "scheduler" / "scheduler_config.json").read_text()).get("rate_condition", "rate1000")
    except (OSError, ValueError):
        return "rate"


@torch.no_grad()
def add_compression(plain):
    """A transformer without compression layers -> one with them, its other weights carried over (stage 3). A
    block position then starts as the mean of its 2 x 2 tokens and gives the same features to all four; a little
    noise lets the four come apart."""
    width = plain.config.width
    model = meissonic.Transformer(meissonic.Config(**{**vars(plain.config), "downsample": True, "upsample": True}))
    model.load_state_dict(plain.state_dict(), strict=False)
    down, up = model.down_block.downsample.conv.weight, model.up_block.upsample.conv.weight      # (C, C, 2, 2)
    for weight, share in ((down, 0.25), (up, 1.0)):
        weight.copy_(share * (torch.eye(width)[:, :, None, None] + 0.1 * width ** -0.5 * torch.randn(width, width, 2, 2)))
    return model


def new_student(run, preset):
    """The student a stage starts with: from the model in the run's folder if there is one (the stage before, or
    --init), else fresh; compression layers added where the stage has them and that model has not.
    Raises UserError where that model has what --without leaves out."""
    torch.manual_seed(run.seed)
    vocabulary = clip.Tokenizer.from_pretrained(run.out / "tokenizer").bpe.get_vocab()
    student = Student(*build(run.preset, vocabulary, preset["compress"], run.without), convention_of(run.out))
    fresh(student)
    there = lambda part: (run.out / part / "config.json").is_file()
    if there("text_encoder"):
        student.encoder = clip.TextEncoder.from_pretrained(run.out / "text_encoder").train().requires_grad_(True)
    if there("transformer"):
        wanted = student.transformer.config
        student.transformer = meissonic.Transformer.from_pretrained(run.out / "transformer").train().requires_grad_(True)
        found = student.transformer.config
        if run.without and (found.without != wanted.without or bool(found.num_layers) != bool(wanted.num_layers) or
                            run.without == "compression" and found.downsample):
            raise UserError(f"--without {run.without}: the transformer in {run.out} was trained with it; begin in another folder")
        if preset["compress"] and not (student.transformer.config.downsample or run.without == "compression" or run.lora):
            student.transformer = add_compression(student.transformer)
        student.probe = nn.Linear(student.transformer.config.pooled_projection_dim, student.transformer.config.codebook_size)
    if not preset["text"] or run.lora:
        student.encoder.requires_grad_(False).eval()
        student.probe.requires_grad_(False)
    student.transformer.checkpointing = run.checkpointing
    if run.lora:
        student.transformer.requires_grad_(False)
        meissonic.add_lora(student.transformer, run.lora)
    elif patches := run.stages.get("vq", {}).get("patches"):
        features = train_vq.code_features(*patches)
        if len(features) == student.transformer.config.codebook_size:        # with --init it may be another model's
            share_features(student.transformer, features, anew=not there("transformer"))
    return student.to(run.device)


def train_stage(run, stage, dropout=0.1):
    """Masked-token modelling (SPEC section 6); the caption is empty with probability `dropout`, for guidance."""
    preset = run.stages[stage]
    size, steps, batch = preset["size"], preset["steps"], preset["batch"]
    student, tokenizer = new_student(run, preset), clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    check_parts(run.out, tokenizer, student.encoder.config, student.transformer.config,
                vq.VQModel.from_pretrained(run.out / "vqvae", device="meta").config)
    encode(run, stage)
    pictures, empty = Tokens(token_folder(run, stage)), tokenizer([""])

    def losses(model, step, attempt):
        rng = run.rng(stage, step, attempt)
        index = examples([run.seed, attempt], step, batch, len(pictures))
        dropped = rng.random(batch) < dropout
        mask, rates = sample_mask(rng, batch, math.prod(pictures.grid))
        for index, dropped, mine, rates in run.parts(index, dropped, mask, rates):
            tokens, ids, micro = pictures[index]
            ids = torch.where(torch.from_numpy(dropped)[:, None], empty, ids)
            there = lambda a: torch.as_tensor(a).to(run.device, non_blocking=True)
            with run.precision():
                loss, probe = model(there(ids), there(tokens), there(mine), there(rates), there(micro))
            loss = loss * (run.world / int(mask.sum()))              # data parallelism averages gradients
            yield loss + 0.3 / run.accumulate * probe, dict(masked_loss=loss.detach() * run.accumulate, rate=float(rates.mean()))

    def finish(average):
        if run.lora:
            meissonic.save_lora(run.out / "lora.safetensors", student.transformer, trainer.strip(average, "transformer."))
        else:
            save_model(run, student, average, size)

    groups_of = lambda: trainer.decay_groups(student.transformer) + trainer.decay_groups(student.probe) + \
        trainer.decay_groups(student.encoder, scale=preset["text"])
    trainer.fit(run, stage, student, groups_of, losses, batch, steps, preset["lr"], finish, lambda step: look(run, stage, step),
        preset.get("floor", 0.02))


def save_model(run, student, average, size):
    """The averaged weights, float16, in the published layout, beside the VQ model and the tokenizer; what is not trained
    stays as it is there."""
    for name, part, module in (("text_encoder", "encoder.", student.encoder), ("transformer", "transformer.", student.transformer)):
        if any(p.requires_grad for p in module.parameters()):
            save_part(run.out / name, module, trainer.strip(average, part))
    index = {"_class_name": "Pipeline", "_diffusers_version": "0.30.2",
             "scheduler": ["scheduler", "Scheduler"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "transformer": ["transformer", "Transformer2DModel"],
             "vqvae": ["diffusers", "VQModel"]}
    scheduler = {"_class_name": "Scheduler", "_diffusers_version": "0.30.2", "masking_schedule": "cosine",
                 "mask_token_id": student.transformer.config.mask_token, "rate_condition": student.convention,
                 "defaults": {"size": size, "score_condition": data.CLEAN, **MODELS[run.preset]["sampling"]}}
    (run.out / "scheduler").mkdir(exist_ok=True)
    for path, content in ((run.out / "model_index.json", index), (run.out / "scheduler" / "scheduler_config.json", scheduler)):
        text = json.dumps(content, indent=2) + "\n"
        vq.write_whole(path, lambda p: Path(p).write_text(text))


def save_part(folder, module, state):
    """A model of the module's kind with these weights, float16."""
    with torch.device("meta"):
        copied = type(module)(module.config)
    copied.load_state_dict(merged(module, state), assign=True)
    copied.save_pretrained(folder, torch.float16)


def merged(module, state):
    """A module's state with what Shared adds to its weights added: the state of the plain module."""
    state = dict(state)
    for name, part in module.named_modules():
        if isinstance(part, Shared):                                           # name: ...parametrizations.weight.0
            whole_name, table = name.removesuffix(".0"), state.pop(name + ".table")
            weight = state.pop(whole_name + ".original")
            state[whole_name.replace("parametrizations.", "")] = weight + (part.features.cpu() @ table).view_as(weight)
    return state


# ---------------------------------------------------------------------------------------------------------
# Watching it


def look(run, stage, step, number=16):
    """Draw sheet.png, twenty pictures for fixed captions with the model as saved so far; in the world of shapes score the
    six tasks too, and log both. One candidate for each picture: this tells how training goes, and training waits."""
    pipeline = Pipeline(run.out, run.device, lora=run.out / "lora.safetensors" if run.lora else None)
    pipeline.candidates = 1
    texts = readable(source_of(run, stage), 20)[1] if run.data else \
        [text for task in data.TASKS[1:] for text, _ in data.test_claims(task, 4, seed=1)]
    pictures = [picture for k, text in enumerate(texts) for picture in pipeline([text], [k])]
    side = pictures[0].width
    sheet = Image.new("RGB", (5 * side, 4 * side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i // 4 * side, i % 4 * side))
    vq.write_whole(run.out / "sheet.png", lambda p: sheet.save(p, "PNG"))
    if not run.data:
        scores = {k: round(v, 3) for k, v in score_tasks(pipeline, number, progress=iter).items()}
        trainer.write_line(run, stage=stage, step=step, event="scores", **scores)
        tqdm.write(f"stage {stage} step {step}: " + ", ".join(f"{k} {v:.2f}" for k, v in scores.items()))


def summary(run):
    """Print what log.jsonl says of each stage: its steps, the last loss, samples per second, the last scores."""
    stages, columns = {}, dict(step="d", loss=".4f", samples_per_second=".1f", **dict.fromkeys((*data.TASKS, "overall"), ".2f"))
    for entry in trainer.entries(run.out / "log.jsonl"):
        if entry.get("event") in (None, "scores"):
            stages.setdefault(entry["stage"], {}).update(entry)
    print("stage     steps      loss  samples/s " + "".join(f" {task:>11}" for task in list(columns)[3:]))
    for stage, last in stages.items():
        print(f"{stage:5}" + "".join(f" {format(last[key], form) if key in last else '-':>{9 if i < 3 else 11}}"
                                     for i, (key, form) in enumerate(columns.items())))


# ---------------------------------------------------------------------------------------------------------
# What it costs


def benchmark(run, repeats=5):
    """Print for each transformer stage of the preset: samples per second and model FLOP utilisation of a training
    step, beside the same step written plainly (reference kernels, logits of all positions, no fusion, not compiled), on
    random tokens. FLOPs are PyTorch's count of the plain step; the peak is a large bfloat16 matrix product, measured here."""
    peak = matmul_peak(run.device)
    print(f"matrix products reach {peak / 1e12:.2f} TFLOP/s in bfloat16")
    print(f"{'stage':>6} {'tokens':>7} {'batch':>6} {'plain':>10} {'ours':>10}  samples/s {'ratio':>6} {'MFU':>6} {'TFLOP/sample':>13}")
    for stage, preset in run.stages.items():
        if stage in ("text", "vq"):
            continue
        with torch.device(run.device):
            words = {clip.END: 655, **{i: i for i in range(655)}}         # as many as the small models' tokenizer has
            student = Student(*build(run.preset, words, preset["compress"]))
        trainer.compile_blocks(run, student)
        f = vq.Config(**MODELS[run.preset]["vq"]).f
        batch, side = max(1, min(preset["batch"], 2 ** 14 // (preset["size"] // f) ** 2)), preset["size"] // f
        inputs = random_batch(run, student, batch, side, preset["size"])
        optimizer = torch.optim.AdamW(student.parameters(), fused=run.device.type in ("cpu", "cuda"))
        with plainly(), FlopCounterMode(display=False) as counter:
            train_step(run, student, optimizer, inputs, plain_loss)
        seconds = {loss: [] for loss in (plain_loss, fused_loss)}
        for i in range(repeats + 1):                              # in turn, so that both meet the same weather
            for loss, times in seconds.items():
                with plainly() if loss is plain_loss else contextlib.nullcontext():
                    start = time.perf_counter()
                    train_step(run, student, optimizer, inputs, loss)
                    times += [time.perf_counter() - start] if i else []
        plain, ours = (batch / statistics.median(times) for times in seconds.values())
        flops = counter.get_total_flops() / batch
        print(f"{stage:>6} {side * side:>7} {batch:>6} {plain:>10.2f} {ours:>10.2f} {'':>10} {ours / plain:>6.2f} "
              f"{ours * flops / peak:>6.1%} {flops / 1e12:>13.4f}")


@contextlib.contextmanager
def plainly():
    with mock.patch.dict(os.environ, {"MEISSONIC_KERNELS": "plain"}), torch.compiler.set_stance("force_eager"):
        yield


def matmul_peak(device, repeats=10):
    """FLOP/s of a square bfloat16 matrix product, the best of `repeats`."""
    n = 8192 if device.type == "cuda" else 2048
    a, best = torch.randn(n, n, device=device, dtype=torch.bfloat16), 0
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
    return best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_batch(run, student, batch, side, size):
    rng = np.random.default_rng(0)
    mask, rates = sample_mask(rng, batch, side * side)
    c, length = student.transformer.config, student.encoder.config.max_position_embeddings
    ids = rng.integers(student.encoder.config.vocab_size, size=(batch, length))
    tokens = rng.integers(c.codebook_size, size=(batch, side, side))
    micro = np.tile(np.array([size, size, 0, 0, data.CLEAN], np.float32), (batch, 1))
    return [torch.as_tensor(a).to(run.device) for a in (ids, tokens, mask, rates, micro)]


def train_step(run, student, optimizer, inputs, loss_of):
    with run.precision():
        loss = loss_of(student, *inputs)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    synchronize(run.device)


def fused_loss(student, *inputs):
    return sum(student(*inputs))


def plain_loss(student, ids, tokens, mask, rates, micro):
    masked = tokens.masked_fill(mask.view(tokens.shape), student.transformer.config.mask_token)
    logits = student.transformer(masked, *student.encoder(ids), micro, rates)                    # (B, h, w, V)
    return F.cross_entropy(logits.flatten(1, 2)[mask].float(), tokens.flatten(1)[mask], reduction="sum")


# ---------------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    p = sample.Parser(prog="train.py", description=__doc__, formatter_class=sample.argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/shapes"), help="folder of the run (default: %(default)s)")
    p.add_argument("--preset", choices=PRESETS, default="shapes", help="set of stages and sizes (default: %(default)s)")
    p.add_argument("--stage", choices=STAGES, help="this stage alone (default: all of the preset in turn)")
    p.add_argument("--resume", action="store_true", help="go on from the run's checkpoints; finished stages are kept")
    p.add_argument("--init", metavar="MODEL", help="start from the parts of this model that are there: a folder, meissonic, "
                   "monetico or a hub id; its tokenizer and VQ model are kept")
    p.add_argument("--data", default="shapes", metavar="SOURCE", help="shapes; a folder of pictures with NAME.txt or "
                   "metadata.jsonl; a .tar, a folder or a glob of WebDataset shards (default: %(default)s)")
    p.add_argument("--encode", action="store_true", help="write the pictures' tokens and stop (training does it where it was not done)")
    p.add_argument("--seed", type=sample.times, default=0, help="of every random choice (default: %(default)s)")
    p.add_argument("--steps", type=sample.positive, help="optimizer steps of the stage named by --stage (default: its preset)")
    p.add_argument("--batch", type=sample.positive, help="global batch of the stages (default: the presets)")
    p.add_argument("--lr", type=sample.finite, help="peak learning rate of the stages (default: the presets)")
    p.add_argument("--accumulate", type=sample.positive, default=1, help="forward and backward passes for one step (default: 1)")
    p.add_argument("--checkpointing", action="store_true", help="recompute each block in the backward pass: less memory, a third slower")
    p.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks (on a CPU wants a C++ compiler)")
    p.add_argument("--shard", action="store_true", help="split parameters, gradients and moments over the processes")
    p.add_argument("--lora", type=sample.positive, metavar="RANK", help="train low-rank terms alone; written to lora.safetensors")
    p.add_argument("--without", choices=ABLATIONS, help="train without one of the paper's parts, to see its worth")
    p.add_argument("--save-every", type=sample.positive, default=500, help="steps between checkpoints (default: %(default)s)")
    p.add_argument("--look-every", type=sample.positive, default=2000,
                   help="steps between sheets of pictures and scores (default: %(default)s)")
    p.add_argument("--benchmark", action="store_true", help="print the speed of the preset's training steps and stop")
    p.add_argument("--device", help="cpu, cuda (default: cuda where there is one, else cpu)")
    p.add_argument("--threads", type=sample.positive, help="CPU threads (default: PyTorch's choice)")
    args = p.parse_args(argv)
    if args.steps and args.stage in (None, "tokenizer"):
        p.error("--steps wants --stage, one of " + ", ".join(STAGES[1:]))
    if args.stage not in (None, "tokenizer", *changed(PRESETS, args)):
        p.error(f"the preset {args.preset} has no stage {args.stage}")
    if args.lr is not None and args.lr <= 0:
        p.error(f"--lr {args.lr} is not positive")
    if args.lora and not args.stage:
        p.error("--lora wants --stage: it trains one")
    if args.stage == "vq" and args.steps and args.steps <= (warm := changed(PRESETS, args)["vq"]["warm"]):
        p.error(f"--steps {args.steps}: the codes are drawn after {warm} steps, ask for more")
    return args


def changed(presets, args):
    """The stages of --preset with --steps, --batch and --lr in place. Pictures of one's own are not of few colours: the whole
    VQ model is trained. And they have no scenes: where the text encoder would learn from those, it learns along."""
    new = {k: v for k, v in (("steps", args.steps), ("batch", args.batch), ("lr", args.lr)) if v}
    stages = {stage: preset | new for stage, preset in presets[args.preset].items()}
    if args.data != "shapes" and "patches" in stages["vq"]:
        stages["vq"] = presets["shapes"]["vq"] | new
    if args.data != "shapes" and stages.pop("text", None):
        stages |= {stage: preset | {"text": preset["text"] or 0.3} for stage, preset in stages.items() if "text" in preset}
    return stages


def main(argv=None):
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device, why = choose_device(args.device)
        if args.data != "shapes":
            disk.Pictures(args.data)                             # a source that is none: say so before anything is made
        if args.compile:
            check_compile(device)                                # now, and not in an hour
        init = args.init and find_model(args.init, device, torch.float32)[0]
        run = trainer.Run(args.out, changed(PRESETS, args), args.seed, device, args.preset, args.resume, init,
                          None if args.data == "shapes" else args.data, args.save_every, args.look_every, args.accumulate,
                          args.shard, args.checkpointing, args.compile, args.lora, args.without)
        if run.first:
            print(f"run: {args.out} | preset: {args.preset} | device: {run.device} ({why}) | processes: {run.world} | "
                  f"products: {str(run.dtype)[6:]} | kernels: {kernel_path(run.device, run.dtype)} | seed: {args.seed}")
        if args.benchmark:
            return benchmark(run)
        if run.first and run.device.type == "cpu" and args.preset == "shapes" and not args.stage:
            print("note: this preset is for a GPU; --preset cpu is made for two CPU cores", file=sys.stderr)
        if run.first and not (args.stage or args.resume or args.encode) and (run.out / "tokenizer").is_dir() \
                and not (init and init.samefile(run.out)):
            raise UserError(f"--out {run.out} holds a model: --resume goes on with its training, another folder is a new one's")
        adopt(run)
        stages = [args.stage] if args.stage else ["tokenizer", *run.stages]
        if not args.encode:
            check_stages(run, stages)
        for stage in stages:
            run_stage(stage, run, args.encode)
        if run.first and (run.out / "log.jsonl").is_file() and not args.encode:
            summary(run)
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (UserError, vq.CheckpointError, disk.SourceError, SafetensorError, OSError) as e:     # the fourth: a full disk
        print(f"train.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def adopt(run):
    """Copy the parts of --init into the run's folder, each whole or not at all; with --resume those alone that it has not
    yet. Raises UserError where the folder holds others, or a text encoder comes without its tokenizer."""
    if run.init and run.first and not run.init.samefile(run.out):
        parts = [part for part in ("tokenizer", "vqvae", "text_encoder", "transformer", "scheduler") if (run.init / part).is_dir()]
        if "text_encoder" in parts and "tokenizer" not in parts:
            raise UserError(f"--init {run.init}: the text encoder's tokenizer is not there")
        for part in parts:
            if (run.out / part).is_dir() and not run.resume and not same_files(run.init / part, run.out / part):
                raise UserError(f"--out {run.out} holds another {part}: --resume goes on with it, another folder is for another model")
        for part in parts:
            if not (run.out / part).is_dir():
                shutil.rmtree(run.out / f".{part}", ignore_errors=True)                  # of a copy that was interrupted
                shutil.copytree(run.init / part, run.out / f".{part}").rename(run.out / part)
    run.wait()


def same_files(a, b):
    """Whether two folders hold the same files."""
    names = [sorted(p.name for p in folder.iterdir() if p.is_file()) for folder in (a, b)]
    return names[0] == names[1] and filecmp.cmpfiles(a, b, names[0])[0] == names[0]


def check_stages(run, stages):
    """Raises UserError for what stages lack that would show only when they begin."""
    there = lambda part: (run.out / part).is_dir()
    told = there("text_encoder")
    for stage in stages:
        preset = run.stages.get(stage, {})
        run.parts(range(preset.get("batch", 0)))
        if not (told or preset.get("text", 1)):
            raise UserError(f"{run.out / 'text_encoder'}: not there, and stage {stage} does not train it: "
                            + ("begin with --stage text, or " if "text" in run.stages else "") + "--init a model that has one")
        told = told or stage in ("text", "1", "2", "3", "4")
    if run.lora and not there("transformer"):
        raise UserError(f"--lora trains terms of a model: {run.out / 'transformer'} is not there; --init says which")


def run_stage(stage, run, encode_only):
    """Run one stage, unless what it makes is there to stay: brought by --init, now or before; a tokenizer, with --resume;
    any, with --encode; or with --resume the stage's last checkpoint is its end (later ones may have changed the model since)."""
    part = dict(tokenizer="tokenizer", text="text_encoder", vq="vqvae").get(stage)
    brought, made = (part and folder and (folder / part).is_dir() for folder in (run.init, run.out))
    done = trainer.steps_done(run, stage) if run.resume else 0
    stays = made and (not trainer.checkpoints(run.out, stage) if run.resume else encode_only)
    run.wait()                                                   # until all have looked
    if brought or stays or encode_only and stage == "text":
        return
    if stage == "tokenizer":
        if run.first:
            length = MODELS[run.preset]["text"].get("max_position_embeddings", 77)
            train_tokenizer(captions(run), length).save_pretrained(run.out / "tokenizer")
        run.wait()
    elif encode_only and not part:
        encode(run, stage)
    elif done < run.stages[stage]["steps"]:
        if stage == "vq":
            train_vq.train(run, vq.Config(**MODELS[run.preset]["vq"]))
        elif stage == "text":
            train_text(run)
        else:
            train_stage(run, stage)


def captions(run):
    """Captions to learn the byte pairs from."""
    return readable(source_of(run, "vq"), 2000)[1] if run.data else world_captions(run.seed)


def world_captions(seed, number=20_000):
    rng = np.random.default_rng(seed)
    return [data.caption(rng, data.sample_claim(rng)) for _ in range(number)]


if __name__ == "__main__":
    main()
