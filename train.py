"""Training, in its first form: from nothing to a model that draws the world of shapes (paper sections 2.2, 2.4).

    python train.py --out runs/shapes              # all stages in turn; again with --resume to go on
    python train.py --out runs/shapes --stage vq   # one stage: tokenizer, vq, transformer
    python sample.py --model runs/shapes --prompt "a red circle"

1. tokenizer    byte pairs learned from the world's captions
2. vq           pictures -> tokens -> pictures: an autoencoder first, then its codebook is drawn from the data
3. transformer  masked-token modelling, the text encoder trained along, on a stock of pictures that is drawn and
                encoded once; the averaged weights are the model

Every random choice of step i comes from a generator seeded with (seed, stage, i): a run that goes on from a
checkpoint sees what it would have seen, and no random state needs to be kept.

Letters: B batch, H W pixels, h w tokens, L text positions.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import clip
import data
import meissonic
import vq

TEXT_LENGTH, SCORE = 32, 6.0                                 # tokens of a caption; micro condition

# One line for each stage: pictures of size x size pixels, peak learning rate; `warm` steps as an autoencoder;
# a pool of drawn pictures, a stock of drawn and encoded ones.
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
# What both trainings share


def rng_for(seed, stage, step):
    """The generator of all random choices of one step."""
    return np.random.default_rng([seed, list(STAGES).index(stage), step])


def learning_rate(step, steps, peak, warmup=100):
    """Linear warm-up, then a cosine to 2% of the peak."""
    return peak * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def decay_groups(module, weight_decay=0.01):
    """AdamW groups: decay on matrices and kernels alone; not on biases, norms and embeddings (SPEC section 6)."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    decayed = [p for p in module.parameters() if p.dim() > 1 and id(p) not in embeddings]
    rest = [p for p in module.parameters() if p.dim() <= 1 or id(p) in embeddings]
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]


def update(optimizer, loss, parameters, rate, clip_norm=1.0):
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()


def save_checkpoint(path, step, optimizer, **tensors):
    """One safetensors file: named state dicts, the optimizer's moments, the step; whole or not at all."""
    flat = {f"{part}.{k}": v for part, state in tensors.items() for k, v in state.items()}
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        flat.update({f"optimizer.{i}.{k}": v for k, v in optimizer.state[p].items()})
    flat = {k: v.detach().contiguous().clone() for k, v in flat.items()}
    vq.write_whole(path, lambda p: save_file(flat, p, metadata={"step": str(step)}))


def load_checkpoint(path, optimizer, **modules):
    """Restore what save_checkpoint wrote -> the step to go on with. Raises CheckpointError for a broken file."""
    try:
        with safe_open(path, framework="pt") as file:
            step, flat = int(file.metadata()["step"]), {k: file.get_tensor(k) for k in file.keys()}
    except Exception as e:
        raise vq.CheckpointError(f"{path}: not a training checkpoint ({e})") from None
    part = lambda name: {k.removeprefix(name + "."): v for k, v in flat.items() if k.startswith(name + ".")}
    for name, module in modules.items():
        module.load_state_dict(part(name))
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        optimizer.state[p] = part(f"optimizer.{i}")
    return step


class Log:
    """A progress bar, and a line of log.jsonl every 50 steps."""
    def __init__(self, path, stage, first, steps):
        self.file = open(path, "a", buffering=1)
        self.stage, self.bar, self.sums, self.count = stage, tqdm(range(first, steps), stage, steps, initial=first), {}, 0

    def add(self, step, **values):
        """Average `values` (numbers or 0-d tensors) since the last line."""
        self.count += 1
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0) + float(v)
        if step % 50 == 49:
            means = {k: round(v / self.count, 5) for k, v in self.sums.items()}
            self.file.write(json.dumps(dict(stage=self.stage, step=step + 1, **means)) + "\n")
            self.bar.set_postfix(means)
            self.sums, self.count = {}, 0


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


def train_vq(out, seed, resume, size, steps, batch, lr, warm, pool):
    """Reconstruction, codebook and commitment losses (van den Oord et al. 2017). From nothing a codebook collapses:
    the first `warm` steps train a plain autoencoder, then k-means over its distinct latents gives the codebook.
    Codes that nobody used for 50 steps move to the latents that are served worst."""
    torch.manual_seed(seed)
    model = vq.VQModel(VQ_CONFIG)
    book, codes = model.quantize.embedding.weight, VQ_CONFIG.num_vq_embeddings
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = out / "vq.checkpoint.safetensors"
    first = load_checkpoint(checkpoint, optimizer, model=model) if resume and checkpoint.is_file() else 0
    rng = rng_for(seed, "vq", steps)
    pool = np.stack([np.asarray(data.example(rng, size)[0]) for _ in range(pool)])               # (pool, H, W, 3)
    log, used = Log(out / "log.jsonl", "vq", first, steps), torch.zeros(codes)
    for step in log.bar:
        rng = rng_for(seed, "vq", step)
        images = pixels(pool[rng.integers(len(pool), size=batch)])
        if step == warm:
            with torch.no_grad():
                sample = torch.cat([rows(model.latent(pixels(pool[i:i + 64]))) for i in range(0, min(640, len(pool)), 64)])
                book.copy_(k_means(distinct(sample), codes, rng))
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.latent(images)
        latent = latent.float()
        quantised, extra, miss = latent, torch.zeros(()), None
        if step >= warm:
            tokens = model.tokens_of(latent.detach())
            vectors = model.vectors_of(tokens)
            extra = F.mse_loss(vectors, latent.detach()) + 0.5 * F.mse_loss(latent, vectors.detach())
            miss = (latent - vectors).detach().square().sum(1).flatten()                         # (B h w,)
            quantised = latent + (vectors - latent).detach()              # straight through
            used += torch.bincount(tokens.flatten(), minlength=codes)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = model.pixels(quantised)
        error = F.mse_loss(decoded.float(), images)
        loss = error + 0.1 * F.l1_loss(decoded.float(), images) + 0.1 * extra
        update(optimizer, loss, model.parameters(), learning_rate(step, steps, lr))
        log.add(step, psnr=-10 * math.log10(error.item()), codebook=extra, codes=(used > 0).sum())
        if step % 50 == 49:
            if warm < step < 0.8 * steps:
                revive(book, used, rows(latent.detach()), miss, rng)
            used.zero_()
        if step % 500 == 499 or step == steps - 1:
            save_checkpoint(checkpoint, step + 1, optimizer, model=model.state_dict())
    model.save_pretrained(out / "vqvae", torch.float16)


def rows(latent):
    """(B, E, h, w) -> (B h w, E)."""
    return latent.permute(0, 2, 3, 1).flatten(0, 2)


def distinct(points, cell=0.8):
    """(M, E) -> one point for each occupied cell of a grid of `cell` standard deviations. Most latents of a
    picture are its flat ground: a codebook drawn from them all spends its codes there, several for one colour,
    and tokens that differ by chance alone are noise to the transformer (perplexity 238 against 70, same PSNR)."""
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


@torch.no_grad()
def encode(path, seed, size, stock, chunk=2000):
    """Draw `stock` captioned pictures and keep them as tokens (M, h, w) int16 and text (M, L) int16."""
    tokenizer = clip.Tokenizer.from_pretrained(path.parent / "tokenizer")
    model = vq.VQModel.from_pretrained(path.parent / "vqvae").to(memory_format=torch.channels_last)  # 1.25x on a CPU
    tokens, texts = [], []
    for i in tqdm(range(math.ceil(stock / chunk)), "encode"):
        rng = rng_for(seed, "transformer", 2 ** 32 + i)                            # apart from the training steps
        pictures, captions, _ = zip(*(data.example(rng, size) for _ in range(min(chunk, stock - i * chunk))))
        batch = pixels(np.stack([np.asarray(p) for p in pictures]))
        tokens.append(torch.cat([model.encode(part) for part in batch.split(50)]).short())
        texts.append(tokenizer(captions).short())
    vq.write_whole(path, lambda p: save_file(dict(tokens=torch.cat(tokens), text=torch.cat(texts)), p))


def sample_mask(rng, batch, tokens):
    """Which of `tokens` positions are masked: the rate r = cos(pi t / 2) with t uniform has the density
    p(r) = 2/pi (1 - r^2)^(-1/2) of section 2.2, truncated to [0, 1]; round(r tokens) positions, at least one.
    -> mask (batch, tokens) bool, rates (batch,) float64: masked / tokens."""
    r = np.cos(np.pi / 2 * rng.random(batch))
    count = np.maximum(np.round(r * tokens), 1)
    mask = rng.random((batch, tokens)).argsort(1).argsort(1) < count[:, None]
    return mask, count / tokens


class Student(torch.nn.Module):
    """What the last stage trains: the text encoder and the transformer together."""
    def __init__(self, encoder, transformer):
        super().__init__()
        self.encoder, self.transformer = encoder, transformer

    def forward(self, ids, tokens, mask, rates, size):
        """ids (B, L), tokens (B, h, w) int64, mask (B, h * w) bool, rates (B,), size in pixels -> mean
        cross-entropy of the masked tokens. The masking-rate condition is the rate in 1000 levels."""
        hidden, pooled = self.encoder(ids)
        masked = tokens.flatten(1).masked_fill(mask, self.transformer.config.mask_token).view(tokens.shape)
        micro = torch.tensor([size, size, 0, 0, SCORE]).expand(len(ids), 5)
        x = self.transformer.features(masked, hidden, pooled, micro, (rates * 1000).round() / 1000)
        logits = self.transformer.head(x.flatten(1, 2)[mask])                                   # (masked, V)
        return F.cross_entropy(logits.float(), tokens.flatten(1)[mask])


def new_student(tokenizer):
    """Fresh weights; adaptive norms start at zero, so that every block starts as the identity (DiT)."""
    student = Student(clip.TextEncoder(text_config(tokenizer.bpe.get_vocab())), meissonic.Transformer(TRANSFORMER_CONFIG))
    for module in student.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, meissonic.AdaNorm):
            torch.nn.init.zeros_(module.linear.weight)
            torch.nn.init.zeros_(module.linear.bias)
    return student


def train_transformer(out, seed, resume, size, steps, batch, lr, stock, dropout=0.1):
    """Masked-token modelling (SPEC section 6); the caption is empty with probability `dropout`, for guidance."""
    torch.manual_seed(seed)
    tokenizer = clip.Tokenizer.from_pretrained(out / "tokenizer")
    store = out / "stock.safetensors"
    if not (resume and store.is_file()):
        encode(store, seed, size, stock)
    with safe_open(store, framework="pt") as file:
        pictures, texts = file.get_tensor("tokens"), file.get_tensor("text")
    empty = tokenizer([""])
    student, shadow = new_student(tokenizer), new_student(tokenizer)
    optimizer = torch.optim.AdamW(decay_groups(student), betas=(0.9, 0.98))
    checkpoint, first = out / "transformer.checkpoint.safetensors", 0
    if resume and checkpoint.is_file():
        first = load_checkpoint(checkpoint, optimizer, model=student, average=shadow)
    log, average = Log(out / "log.jsonl", "transformer", first, steps), shadow.state_dict()
    for step in log.bar:
        rng = rng_for(seed, "transformer", step)
        rows = torch.from_numpy(rng.integers(len(pictures), size=batch))
        tokens, ids = pictures[rows].long(), texts[rows].long()
        ids = torch.where(torch.from_numpy(rng.random(batch) < dropout)[:, None], empty, ids)
        mask, rates = sample_mask(rng, batch, tokens[0].numel())
        # The plain attention trains 1.2x faster on a CPU than the flash kernel at these lengths.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = student(ids, tokens, torch.from_numpy(mask), torch.from_numpy(rates), size)
        update(optimizer, loss, student.parameters(), learning_rate(step, steps, lr))
        with torch.no_grad():                                              # EMA, quick at first
            decay = min(0.999, (step + 1) / (step + 10))
            for k, v in student.state_dict().items():
                average[k].lerp_(v, 1 - decay)
        log.add(step, loss=loss.detach(), rate=rates.mean())
        if step % 500 == 499 or step == steps - 1:
            save_checkpoint(checkpoint, step + 1, optimizer, model=student.state_dict(), average=average)
            save_model(out, shadow, size)


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


def main():
    stages = ("tokenizer", *STAGES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--stage", choices=stages, help="this stage alone (default: all in turn)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoints; finished stages are kept")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the stage named by --stage (default: its preset)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    args = parser.parse_args()
    if args.steps is not None:
        if args.steps < 1 or args.stage not in STAGES:
            parser.error("--steps is at least 1 and wants --stage vq or --stage transformer")
        STAGES[args.stage]["steps"] = args.steps
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"train: {args.out}, seed {args.seed}, CPU, bfloat16 autocast, {torch.get_num_threads()} threads")
    try:
        for stage in [args.stage] if args.stage else stages:
            run_stage(stage, args)
    except KeyboardInterrupt:
        sys.exit("\nstopped; --resume goes on from the last checkpoint")
    except vq.CheckpointError as e:
        parser.error(str(e))


def run_stage(stage, args):
    """Run one stage; with --resume, what an earlier stage has finished is kept."""
    if stage == "tokenizer" and not (args.resume and (args.out / "tokenizer").is_dir()):
        train_tokenizer(args.seed).save_pretrained(args.out / "tokenizer")
    elif stage == "vq" and not (args.resume and (args.out / "vqvae").is_dir()):
        train_vq(args.out, args.seed, args.resume, **STAGES[stage])
    elif stage == "transformer":
        train_transformer(args.out, args.seed, args.resume, **STAGES[stage])


if __name__ == "__main__":
    main()
