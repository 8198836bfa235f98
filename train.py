"""Training: from nothing to a model that draws what it is told (paper sections 2.2, 2.4).

    python train.py --out runs/shapes              # all stages in turn; --resume goes on after any interruption
    python train.py --out runs/shapes --stage vq   # one stage: tokenizer, vq, transformer
    python train.py --out runs/more --init runs/shapes       # train a model's transformer and text encoder further
    torchrun --nproc_per_node=8 train.py           # data parallel, on one node or many
    python sample.py --model runs/shapes --prompt "a red circle"

1. tokenizer    byte pairs learned from the world's captions
2. vq           pictures -> tokens -> pictures: an autoencoder first, then its codebook is drawn from the data
3. transformer  masked-token modelling, the text encoder trained along, on a stock of pictures that is drawn and
                encoded once; the averaged weights are the model

A run's folder is a model folder (`sample.py --model`) with the checkpoints, log.jsonl, loss.png and sheet.png beside.
Every random choice of step i comes from a generator seeded with (seed, stage, i): a run that goes on from a
checkpoint sees what it would have seen, and no random state needs to be kept.

Letters: B batch, H W pixels, h w tokens, L text positions.
"""
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import clip
import data
import kernels
import meissonic
import sample
import vq

TEXT_LENGTH, SCORE = 32, 6.0                                 # tokens of a caption; micro condition

# One line for each stage: pictures of size x size pixels, global batch, peak learning rate; `warm` steps as an
# autoencoder; a pool of drawn pictures, a stock of drawn and encoded ones.
STAGES = {
    "vq":          dict(size=64, steps=3200, batch=32, lr=2e-3, warm=800, pool=12_000),
    "transformer": dict(size=64, steps=7600, batch=32, lr=1.2e-3, stock=120_000),
}

VQ_CONFIG = vq.Config(block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, vq_embed_dim=8,
                      num_vq_embeddings=512, norm_num_groups=8)
TRANSFORMER_CONFIG = meissonic.Config(num_layers=3, num_single_layers=6, num_attention_heads=6, attention_head_dim=32,
                                      joint_attention_dim=128, pooled_projection_dim=192, axes_dims_rope=(8, 12, 12),
                                      codebook_size=512, vocab_size=513)


def text_config(vocabulary):
    return clip.Config(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                       projection_dim=TRANSFORMER_CONFIG.width, max_position_embeddings=TEXT_LENGTH,
                       vocab_size=len(vocabulary), eos_token_id=vocabulary[clip.END])


# ---------------------------------------------------------------------------------------------------------
# A run: its folder, its processes, and the loop that both trainings share


class Run:
    """A run's folder and settings, and its place among the processes that torchrun started (one without it)."""

    def __init__(self, out, seed=0, device="cpu", resume=False, init=None, save_every=500, look_every=2000):
        self.out, self.seed, self.resume, self.init = Path(out), seed, resume, init
        self.save_every, self.look_every = save_every, look_every
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.world > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def first(self):
        """Whether this process writes: logs and checkpoints come from one."""
        return self.rank == 0

    def part(self, batch):
        """This process's slice of a global batch of examples; the slices are disjoint and cover it."""
        if len(batch) % self.world:
            raise vq.CheckpointError(f"a batch of {len(batch)} does not divide by {self.world} processes")
        return batch[self.rank::self.world]

    def total(self, tensor):
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def same(self, tensor):
        """Overwrite with the first process's values."""
        if self.world > 1:
            dist.broadcast(tensor, 0)

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def rng(self, stage, step, attempt=0):
        """The generator of all random choices of one step, the same in all processes."""
        return np.random.default_rng([self.seed, list(STAGES).index(stage), step, attempt])

    @contextlib.contextmanager
    def precision(self):
        """bfloat16 autocast; on a CPU with the plain attention, which trains 1.2x faster than its flash kernel at
        the lengths of the small model."""
        attention = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16), attention:
            yield


def learning_rate(step, steps, peak, warmup=100):
    """Linear warm-up, then a cosine to 2% of the peak."""
    return peak * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def decay_groups(module, scale=1.0, weight_decay=0.01):
    """AdamW groups: decay on matrices and kernels alone; not on biases, norms and embeddings (SPEC section 6).
    `scale` multiplies the learning rate."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in module.parameters() if p.dim() > 1 and id(p) not in embeddings]
    rest = [p for p in module.parameters() if p.dim() <= 1 or id(p) in embeddings]
    return [dict(params=decayed, weight_decay=weight_decay, scale=scale), dict(params=rest, weight_decay=0.0, scale=scale)]


def fit(run, stage, student, groups, loss_of, steps, lr, finish, average=0.999, patience=3):
    """Train `student` (a module on run.device) for `steps` steps and keep an average of its weights.

    groups                    the optimizer's, from decay_groups
    loss_of(model, step, rng) -> (loss, {name: number to log}); `model` is student, behind data parallelism
    finish(shadow, step)      called with the averaged student at each save, in the first process
    A step with a non-finite loss or gradient is dropped; after `patience` in a row the last checkpoint is loaded
    and training goes on with other data (the paper, section 2.2, after LLaMA). SIGTERM and Ctrl-C save first.
    """
    shadow = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=run.device.type == "cuda")
    path = run.out / f"{stage}.checkpoint.safetensors"
    step, attempt, bad = 0, 0, 0
    if run.resume and path.is_file():
        step, attempt = load_checkpoint(path, optimizer, student, shadow)
    model = DistributedDataParallel(student) if run.world > 1 else student
    log = Log(run, stage, step, steps)

    def save():
        if run.first:
            save_checkpoint(path, step, attempt, optimizer, student, shadow)
            finish(shadow, step)
        run.wait()

    if step == 0:
        save()                                                  # a good state to go back to from the first step on
    with Stop() as stop:
        while step < steps:
            set_rate(optimizer, learning_rate(step, steps, lr))
            with run.precision():
                loss, values = loss_of(model, step, run.rng(stage, step, attempt))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            mean, stopping = run.total(torch.tensor([float(loss.detach()) / run.world, float(stop.asked)])).tolist()
            step += 1
            if math.isfinite(mean) and math.isfinite(norm):
                bad = 0
                optimizer.step()
                decay = min(average, step / (step + 10))        # quick at first
                with torch.no_grad():
                    for old, new in zip(shadow.state_dict().values(), student.state_dict().values()):
                        old.lerp_(new, 1 - decay)
                log.add(step, loss=mean, **values)
            else:
                bad += 1
                log.event(step, "dropped", loss=mean, norm=float(norm))
                if bad == patience:
                    step, attempt = load_checkpoint(path, optimizer, student, shadow)
                    attempt, bad = attempt + 1, 0
                    log.event(step, "reloaded", attempt=attempt)
            if step % run.save_every == 0 or step == steps or stopping:
                save()
            if stopping:
                raise KeyboardInterrupt
    log.close()


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


class Stop:
    """Turns SIGTERM and Ctrl-C into a flag that is read after each step; a second Ctrl-C stops at once."""
    def __enter__(self):
        self.asked = False
        self.old = {s: signal.signal(s, self.ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, self.old[signal.SIGINT])

    def __exit__(self, *exception):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def save_checkpoint(path, step, attempt, optimizer, student, shadow):
    """One safetensors file with both state dicts, the optimizer's moments and the step. Written beside the one before
    and renamed over it: killed at any moment, or on a full disk, a whole one is there."""
    flat = {f"student.{k}": v for k, v in student.state_dict().items()}
    flat |= {f"shadow.{k}": v for k, v in shadow.state_dict().items()}
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        flat |= {f"optimizer.{i}.{k}": v for k, v in optimizer.state[p].items()}
    flat = {k: v.detach().cpu().contiguous().clone() for k, v in flat.items()}
    try:
        vq.write_whole(path, lambda p: save_file(flat, p, metadata={"step": str(step), "attempt": str(attempt)}))
    except Exception as e:                                     # safetensors wraps "no space left" in its own error
        raise vq.CheckpointError(f"{path}: the checkpoint could not be written ({e}); the last one is whole") from None


def load_checkpoint(path, optimizer, student, shadow):
    """Restore what save_checkpoint wrote -> (step, attempt). Raises CheckpointError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about, flat = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        part = lambda name: {k.removeprefix(name + "."): v for k, v in flat.items() if k.startswith(name + ".")}
        student.load_state_dict(part("student"))
        shadow.load_state_dict(part("shadow"))
        for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in part(f"optimizer.{i}").items()}
        return int(about["step"]), int(about["attempt"])
    except Exception as e:                                     # not safetensors, other tensors, other metadata
        raise vq.CheckpointError(f"{path}: not a checkpoint of this run ({e})") from None


# ---------------------------------------------------------------------------------------------------------
# Watching it


class Log:
    """In the first process: a progress bar, log.jsonl (a line every 50 steps and for each event), loss.png."""

    def __init__(self, run, stage, first, steps, every=50):
        self.run, self.stage, self.every, self.sums, self.count = run, stage, every, {}, 0
        self.bar = tqdm(total=steps, initial=first, desc=stage, disable=not run.first)
        self.path = run.out / "log.jsonl"
        self.start, self.first = time.perf_counter(), first

    def add(self, step, **values):
        """Average `values` (numbers or 0-d tensors) since the last line."""
        self.count += 1
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0) + float(v)
        self.bar.update(step - self.bar.n)
        if step % self.every == 0:
            means = {k: round(v / self.count, 5) for k, v in self.sums.items()}
            means["steps_per_second"] = round((step - self.first) / (time.perf_counter() - self.start), 2)
            self.bar.set_postfix(means)
            self.write(step, **means)
            self.sums, self.count = {}, 0

    def event(self, step, what, **values):
        """Something to know of: a dropped step, a reload."""
        self.bar.n = step
        self.write(step, event=what, **{k: repr(v) for k, v in values.items()})
        if self.run.first:
            tqdm.write(f"{self.stage} step {step}: {what} {values}", file=sys.stderr)

    def write(self, step, **values):
        if self.run.first:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(stage=self.stage, step=step, **values)) + "\n")
            draw_losses(self.path, self.run.out / "loss.png")

    def close(self):
        self.bar.close()


def draw_losses(log, path, width=640, height=320):
    """log.jsonl -> a PNG with one curve for each stage, the loss on a logarithmic scale."""
    curves = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "event" not in entry and entry["loss"] > 0:
            curves.setdefault(entry["stage"], []).append((entry["step"], math.log10(entry["loss"])))
    picture = Image.new("RGB", (width, height * max(1, len(curves))), "white")
    pen = ImageDraw.Draw(picture)
    for row, (stage, points) in enumerate(curves.items()):
        steps, values = np.array(points).T
        low, high = values.min(), max(values.max(), values.min() + 1e-3)
        x = 60 + (width - 80) * steps / steps.max()
        y = height * row + 20 + (height - 60) * (high - values) / (high - low)
        if len(points) > 1:
            pen.line(list(zip(x, y)), fill=data.COLOURS["blue"], width=2)
        pen.text((60, height * (row + 1) - 30), f"{stage}: loss over {int(steps.max())} steps", fill="black")
        for value, at in ((high, y.min()), (low, y.max())):
            pen.text((5, at - 6), f"{10 ** value:.3g}", fill="black")
    vq.write_whole(path, lambda p: picture.save(p, "PNG"))


def look(run, number=16):
    """Draw sheet.png, pictures for fixed captions, and score the six tasks, with the model as saved so far."""
    pipeline = sample.Pipeline(run.out, run.device)
    texts = [text for task in data.TASKS[1:] for text, _ in data.test_claims(task, 4, seed=1)]
    pictures = pipeline(texts, [0] * len(texts))
    side = pictures[0].width
    sheet = Image.new("RGB", (5 * side, 4 * side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i // 4 * side, i % 4 * side))
    vq.write_whole(run.out / "sheet.png", lambda p: sheet.save(p, "PNG"))
    return {k: round(v, 3) for k, v in sample.score_tasks(pipeline, number, progress=iter).items()}


def pixels(pictures):
    """uint8 (B, H, W, 3) numpy -> float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------------------------------------------------
# 1. Tokenizer


def train_tokenizer(seed, captions=20_000):
    """Byte pairs from the world's captions, enough merges that each of its words is one token."""
    rng = np.random.default_rng(seed)
    texts = [data.caption(rng, data.sample_claim(rng)) for _ in range(captions)]
    bpe = clip.byte_pair_tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=clip.END))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    # CLIP's vocabulary: all bytes, all bytes that end a word, the merges, then the two special tokens.
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in trained["merges"]]
    words = sorted(alphabet) + [a + "</w>" for a in sorted(alphabet)] + ["".join(m) for m in merges]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(words + [clip.START, clip.END]))}
    return clip.Tokenizer(clip.byte_pair_tokenizer(models.BPE(
        vocabulary, merges, end_of_word_suffix="</w>", unk_token=clip.END)), TEXT_LENGTH)


# ---------------------------------------------------------------------------------------------------------
# 2. VQ model


class VQStudent(nn.Module):
    """The VQ model with its losses: reconstruction, codebook and commitment (van den Oord et al. 2017)."""
    def __init__(self, model):
        super().__init__()
        self.vq = model

    def forward(self, images, quantise):
        """images (B, 3, H, W) -> loss, reconstruction error, latents (B h w, E), their tokens and squared distances
        to the codebook (B h w,); without `quantise` a plain autoencoder and no tokens."""
        latent = self.vq.latent(images).float()                                                  # (B, E, h, w)
        passed, tokens, miss = latent, None, None
        extra = 0.0 * self.vq.quantize.embedding.weight.sum()                # every parameter has its gradient
        if quantise:
            tokens = self.vq.tokens_of(latent.detach())
            vectors = self.vq.vectors_of(tokens)
            extra = F.mse_loss(vectors, latent.detach()) + 0.5 * F.mse_loss(latent, vectors.detach())
            miss = (latent - vectors).detach().square().sum(1).flatten()
            passed = latent + (vectors - latent).detach()                    # straight through
            tokens = tokens.flatten()
        decoded = self.vq.pixels(passed).float()
        error = F.mse_loss(decoded, images)
        return error + 0.1 * F.l1_loss(decoded, images) + 0.1 * extra, error, rows(latent.detach()), tokens, miss


def train_vq(run, size, steps, batch, lr, warm, pool):
    """From nothing a codebook collapses: the first `warm` steps train a plain autoencoder, then k-means over its
    distinct latents gives the codebook. Codes that nobody used for 50 steps move to the latents served worst."""
    torch.manual_seed(run.seed)
    student = VQStudent(vq.VQModel(VQ_CONFIG)).to(run.device)
    book = student.vq.quantize.embedding.weight
    rng = run.rng("vq", 2 ** 32)                                             # apart from the training steps
    stock = np.stack([np.asarray(data.example(rng, size)[0]) for _ in range(pool)])              # (pool, H, W, 3)
    used = torch.zeros(len(book), device=run.device)

    def loss_of(model, step, rng):
        images = pixels(stock[run.part(rng.integers(pool, size=batch))]).to(run.device)
        if step == warm:
            with torch.no_grad():
                seen = torch.cat([rows(student.vq.latent(pixels(stock[i:i + 64]).to(run.device)).float())
                                  for i in range(0, min(pool, 640), 64)])
                book.copy_(k_means(distinct(seen), len(book), rng))
            run.same(book)
        loss, error, latents, tokens, miss = model(images, step >= warm)
        if tokens is not None:
            used.add_(torch.bincount(tokens, minlength=len(book)))
            if step % 50 == 49:
                run.total(used)
                if step < 0.8 * steps:
                    revive(book, used, latents, miss, rng)
                    run.same(book)
        codes = (used > 0).sum()
        if step % 50 == 49:
            used.zero_()
        return loss, dict(psnr=-10 * math.log10(float(error.detach())), codes=codes)

    fit(run, "vq", student, decay_groups(student), loss_of, steps, lr,
        lambda shadow, step: shadow.vq.save_pretrained(run.out / "vqvae", torch.float16))


def rows(latent):
    """(B, E, h, w) -> (B h w, E)."""
    return latent.permute(0, 2, 3, 1).flatten(0, 2)


def distinct(points, cell=0.8):
    """(M, E) -> one point for each occupied cell of a grid of `cell` standard deviations. Most latents of a
    picture are its flat ground: a codebook drawn from them all spends its codes there, several for one colour,
    and tokens that differ by chance alone are noise to the transformer (perplexity 238 against 79, same PSNR)."""
    cells = (points / points.std(0) / cell).round().long()
    _, where = torch.unique(cells, dim=0, return_inverse=True)
    return torch.zeros(int(where.max()) + 1, points.shape[1]).index_copy_(0, where, points)


def k_means(points, k, rng, iterations=10):
    """(M, E) -> (k, E) centres; an empty one is drawn anew."""
    pick = lambda n: points[torch.from_numpy(rng.integers(len(points), size=n))]
    centres = pick(k)
    for _ in range(iterations):
        nearest = torch.cdist(points, centres).argmin(1)
        count = torch.bincount(nearest, minlength=k)[:, None]
        mean = torch.zeros_like(centres).index_add_(0, nearest, points) / count.clamp(min=1)
        centres = torch.where(count > 0, mean, pick(k))
    return centres


@torch.no_grad()
def revive(book, used, latents, miss, rng):
    """Move the entries that were not used to latents (M, E) drawn from those with the largest quantisation error."""
    dead = used == 0
    number = int(dead.sum())
    worst = miss.topk(min(4 * number, len(miss))).indices
    book[dead] = latents[worst[torch.from_numpy(rng.permutation(len(worst))[:number])]]


# ---------------------------------------------------------------------------------------------------------
# 3. Transformer


def sample_mask(rng, batch, tokens):
    """Which of `tokens` positions are masked: the rate r = cos(pi t / 2) with t uniform has the density
    p(r) = 2/pi (1 - r^2)^(-1/2) of section 2.2, truncated to [0, 1]; round(r tokens) positions, at least one.
    -> mask (batch, tokens) bool, rates (batch,) float64: masked / tokens."""
    r = np.cos(np.pi / 2 * rng.random(batch))
    count = np.maximum(np.round(r * tokens), 1)
    mask = rng.random((batch, tokens)).argsort(1).argsort(1) < count[:, None]
    return mask, count / tokens


class Student(nn.Module):
    """What the last stage trains: the text encoder and the transformer together."""
    def __init__(self, encoder, transformer):
        super().__init__()
        self.encoder, self.transformer = encoder, transformer
        self.probe = nn.Linear(transformer.config.pooled_projection_dim, transformer.config.codebook_size)

    def forward(self, ids, tokens, mask, rates, size):
        """ids (B, L), tokens (B, h, w) int64, mask (B, h * w) bool, rates (B,), size in pixels -> summed
        cross-entropy of the masked tokens, and the probe's. The masking-rate condition is the rate in 1000 levels.

        The probe: a text tower that starts from nothing says nothing, and the transformer learns to do without it.
        So a linear layer, thrown away at the end, predicts each picture's histogram of tokens from the pooled text."""
        hidden, pooled = self.encoder(ids)
        masked = tokens.flatten(1).masked_fill(mask, self.transformer.config.mask_token).view(tokens.shape)
        micro = torch.tensor([size, size, 0, 0, SCORE], device=ids.device).expand(len(ids), 5)
        x = self.transformer.features(masked, hidden, pooled, micro, (rates * 1000).round() / 1000)
        x = self.transformer.head_features(x.flatten(1, 2)[mask])                               # (masked, C)
        weight = self.transformer.mlm_layer.conv2.weight.flatten(1)                             # (V, C)
        loss = kernels.linear_cross_entropy(x, weight, tokens.flatten(1)[mask]).sum()
        histogram = F.one_hot(tokens.flatten(1), len(weight)).float().mean(1)                   # (B, V)
        return loss, F.cross_entropy(self.probe(pooled).float(), histogram)


def new_student(tokenizer):
    """Fresh weights; adaptive norms start at zero, so that every block starts as the identity (DiT)."""
    student = Student(clip.TextEncoder(text_config(tokenizer.bpe.get_vocab())), meissonic.Transformer(TRANSFORMER_CONFIG))
    for module in student.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)       # large against a step of Adam
        elif isinstance(module, meissonic.MLP):
            for linear in (module.linear_1, module.linear_2):   # the caption must still be heard after four layers
                nn.init.normal_(linear.weight, std=1.5 / linear.in_features ** 0.5)
        elif isinstance(module, meissonic.AdaNorm):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    # The five micro conditions fill 1280 inputs, nearly constant ones, beside the pooled text's 192.
    student.transformer.cond_embed.linear_1.weight.data[:, TRANSFORMER_CONFIG.width:] *= 0.1
    student.transformer.cond_embed.linear_1.weight.data[:, :TRANSFORMER_CONFIG.width] *= 2.5
    return student


def encode(run, path, size, stock, chunk=2000):
    """Draw `stock` captioned pictures and keep them as tokens (M, h, w) int16 and text (M, L) int16."""
    tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    model = vq.VQModel.from_pretrained(run.out / "vqvae", device=run.device)
    model = model.to(memory_format=torch.channels_last)                      # 1.25x on a CPU
    tokens, texts = [], []
    for i in tqdm(range(math.ceil(stock / chunk)), "encode"):
        rng = run.rng("transformer", 2 ** 32 + i)                            # apart from the training steps
        pictures, captions, _ = zip(*(data.example(rng, size) for _ in range(min(chunk, stock - i * chunk))))
        batch = pixels(np.stack([np.asarray(p) for p in pictures]))
        with torch.no_grad():
            tokens.append(torch.cat([model.encode(part.to(run.device)) for part in batch.split(50)]).short().cpu())
        texts.append(tokenizer(captions).short())
    vq.write_whole(path, lambda p: save_file(dict(tokens=torch.cat(tokens), text=torch.cat(texts)), p))


def train_transformer(run, size, steps, batch, lr, stock, dropout=0.1):
    """Masked-token modelling (SPEC section 6); the caption is empty with probability `dropout`, for guidance."""
    torch.manual_seed(run.seed)
    store = run.out / "stock.safetensors"
    if run.first and not (run.resume and store.is_file()):
        encode(run, store, size, stock)
    run.wait()
    with safe_open(store, framework="pt") as file:
        pictures, texts = file.get_tensor("tokens"), file.get_tensor("text")
    tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    empty = tokenizer([""])
    student = new_student(tokenizer)
    if run.init:
        student.encoder = clip.TextEncoder.from_pretrained(run.init / "text_encoder").train().requires_grad_(True)
        student.transformer = meissonic.Transformer.from_pretrained(run.init / "transformer").train().requires_grad_(True)
    student.to(run.device)

    def loss_of(model, step, rng):
        index = torch.from_numpy(rng.integers(len(pictures), size=batch))
        dropped = torch.from_numpy(rng.random(batch) < dropout)
        mask, rates = (torch.from_numpy(a) for a in sample_mask(rng, batch, pictures[0].numel()))
        total = int(mask.sum())                                              # of all processes: drawn by each alike
        index, dropped, mask, rates = (run.part(a) for a in (index, dropped, mask, rates))
        ids = torch.where(dropped[:, None], empty, texts[index].long())
        there = lambda a: a.to(run.device, non_blocking=True)
        loss, probe = model(there(ids), there(pictures[index].long()), there(mask), there(rates), size)
        loss = loss * (run.world / total)                                    # data parallelism averages gradients
        return loss + 0.3 * probe, dict(masked_loss=loss.detach(), rate=rates.mean())

    def finish(shadow, step):
        save_model(run.out, shadow, size)
        if step and (step % run.look_every == 0 or step == steps):
            print(f"\ntransformer step {step}:", look(run))

    groups = decay_groups(student.transformer) + decay_groups(student.probe) + decay_groups(student.encoder, scale=0.3)
    fit(run, "transformer", student, groups, loss_of, steps, lr, finish)


def save_model(out, shadow, size):
    """The averaged weights, float16, in the published layout, beside the VQ model and the tokenizer."""
    shadow.encoder.save_pretrained(out / "text_encoder", torch.float16)
    shadow.transformer.save_pretrained(out / "transformer", torch.float16)
    index = {"_class_name": "Pipeline", "_diffusers_version": "0.30.2",
             "scheduler": ["scheduler", "Scheduler"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "transformer": ["transformer", "Transformer2DModel"],
             "vqvae": ["diffusers", "VQModel"]}
    scheduler = {"_class_name": "Scheduler", "_diffusers_version": "0.30.2", "masking_schedule": "cosine",
                 "mask_token_id": shadow.transformer.config.mask_token, "rate_condition": "rate",
                 "defaults": {"size": size, "steps": 16, "cfg": 3.0, "score_condition": SCORE}}
    (out / "scheduler").mkdir(exist_ok=True)
    for path, content in ((out / "model_index.json", index), (out / "scheduler" / "scheduler_config.json", scheduler)):
        text = json.dumps(content, indent=2) + "\n"
        vq.write_whole(path, lambda p: Path(p).write_text(text))


# ---------------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    stages = ("tokenizer", *STAGES)
    p = sample.Parser(prog="train.py", description=__doc__, formatter_class=sample.argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/shapes"), help="folder of the run (default: %(default)s)")
    p.add_argument("--stage", choices=stages, help="this stage alone (default: all in turn)")
    p.add_argument("--resume", action="store_true", help="go on from the run's checkpoints; finished stages are kept")
    p.add_argument("--init", type=Path, metavar="FOLDER",
                   help="start the transformer and the text encoder from this model; its tokenizer and VQ model are kept")
    p.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    p.add_argument("--steps", type=sample.positive, help="optimizer steps of the stage named by --stage (default: its preset)")
    p.add_argument("--save-every", type=sample.positive, default=500, help="steps between checkpoints (default: %(default)s)")
    p.add_argument("--look-every", type=sample.positive, default=2000,
                   help="steps between sheets of pictures and scores (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda (default: cuda where there is one, else cpu)")
    p.add_argument("--threads", type=sample.positive, help="CPU threads (default: PyTorch's choice)")
    args = p.parse_args(argv)
    if args.steps:
        if args.stage not in STAGES:
            p.error(f"--steps wants --stage, one of {', '.join(STAGES)}")
        STAGES[args.stage]["steps"] = args.steps
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device, why = sample.choose_device(args.device)
        run = Run(args.out, args.seed, device, args.resume, args.init, args.save_every, args.look_every)
        if run.first:
            print(f"run: {args.out} | device: {run.device} ({why}) | processes: {run.world} | dtype: bfloat16 autocast | "
                  f"kernels: {sample.kernel_path(run.device, torch.bfloat16)} | seed: {args.seed}")
        for stage in [args.stage] if args.stage else ("tokenizer", *STAGES):
            run_stage(stage, run)
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (sample.UserError, vq.CheckpointError, OSError) as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_stage(stage, run):
    """Run one stage; with resume, a tokenizer that is there is kept, and trainings go on; with init, the tokenizer
    and the VQ model are that model's."""
    if stage == "tokenizer":
        if run.first and not (run.resume and (run.out / "tokenizer").is_dir()):
            source = clip.Tokenizer.from_pretrained(run.init / "tokenizer") if run.init else train_tokenizer(run.seed)
            source.save_pretrained(run.out / "tokenizer")
        run.wait()
    elif stage == "vq" and run.init:
        if run.first:
            vq.VQModel.from_pretrained(run.init / "vqvae").save_pretrained(run.out / "vqvae", torch.float16)
        run.wait()
    elif stage == "vq":
        train_vq(run, **STAGES[stage])
    else:
        train_transformer(run, **STAGES[stage])


if __name__ == "__main__":
    main()
