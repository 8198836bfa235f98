"""Training: from nothing to a model that draws what it is told (paper sections 2.2, 2.4, 2.5).

    python train.py --out runs/shapes                         # all stages in turn; --resume goes on after any interruption
    python train.py --preset cpu --out runs/cpu --compile     # smaller pictures, for two CPU cores
    python train.py --out runs/shapes --stage 3 --resume      # one stage: tokenizer, text, vq, 1, 2, 3, 4
    python train.py --init meissonic --data photos --preset paper --stage 4 --lora 16        # fine-tune public weights
    python train.py --encode --data photos --init meissonic --stage 4 --preset paper         # pictures to tokens, no more
    torchrun --nproc_per_node=8 train.py --preset paper --data "laion/*.tar" --init parts    # one node or many; --shard
    python train.py --benchmark                               # samples per second, share of the hardware's peak

tokenizer    byte pairs learned from the captions
text         the text encoder learns what captions say of their scenes (the paper's comes from CLIP)
vq           pictures -> tokens -> pictures: an autoencoder first, its codebook drawn from the data, then quantised,
             last against a discriminator (VQ-GAN, Esser et al. 2021; its perceptual loss is left out)
1 2 3 4      masked-token modelling on pictures that are encoded once: concepts at low resolution; twice that, long
             captions; twice again behind compression layers; a low learning rate. The averaged weights are the model

A run's folder is a model folder (`sample.py --model`) with the checkpoints, log.jsonl, loss.png and sheet.png beside.
A stage starts from the model that is there. Here is what is learned, and from what; the loop itself, its processes, its
checkpoints and its log are in trainer.py.

Letters: B batch, H W pixels, h w tokens, L text positions, E codebook vector, V codebook, C width.
"""
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import clip
import data
import kernels
import meissonic
import sample
import trainer
import vq
from pipeline import Pipeline, UserError, choose_device, find_model, kernel_path, score_tasks

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
    "cpu": {                                                 # compressed from the start; tokens of patches (see wire, two_tone)
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
MANY = 2000                                                  # pictures to encode for which other processes are started

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
# Pictures, and their tokens


class World:
    """`number` examples of the world of shapes; the i-th comes from a generator seeded with (seed, stage, i)."""
    def __init__(self, seed, stage, size, number, **shares):
        self.skipped = []
        self.key, self.size, self.number = [seed, trainer.number_of(stage), 2 ** 32], size, number
        self.shares = shares

    def __len__(self):
        return self.number

    def state(self, i):
        return None

    def __getitem__(self, i):                                    # -> (size, size, 3) uint8, caption, micro (5,) float32
        return data.training_example(np.random.default_rng([*self.key, i]), self.size, **self.shares)


class Disk:
    """The pictures of --data, each resized and cropped at a place of its own."""
    def __init__(self, source, seed, size):
        self.pictures, self.seed, self.size = data.Pictures(source, near=size), seed, size
        self.skipped = self.pictures.skipped

    def __len__(self):
        return len(self.pictures)

    def state(self, i):
        return self.pictures.state(i)

    def __getitem__(self, i):                                    # as World; raises data.PictureError
        picture, text, score = self.pictures[i]
        crop, (height, width, top, left) = data.crop(picture, self.size, np.random.default_rng([self.seed, i]))
        return crop, text, np.array([width, height, top, left, data.CLEAN if score is None else score], np.float32)


def source_of(run, stage):
    preset = run.stages[stage]
    if run.data:
        return Disk(run.data, run.seed, preset["size"])
    return World(run.seed, stage, preset["size"], preset.get("pictures") or preset["pool"], **mixture(preset))


def mixture(preset):
    """The shares by which a stage's pictures differ from the world's usual ones; see data.training_example."""
    return {name: preset[name] for name in ("concepts", "odd", "letters") if name in preset}


def pixels(pictures):
    """uint8 (B, H, W, 3) numpy -> float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def token_folder(run, stage):
    return run.out / "tokens" / stage


class Attempts:
    """The examples of a source, each (example, None), or (None, why it cannot be read): what processes hand over."""
    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        try:
            return self.source[i], None
        except data.PictureError as e:
            return None, str(e)


def encode(run, stage, chunk=1000):
    """Write each picture of a stage's source as tokens, once, `chunk` to a file: tokens (M, h, w) int16, text (M, L)
    int32, micro (M, 5) float32. Files of the same pictures, VQ model and tokenizer are kept (of a disk's pictures and
    captions: of the same names, sizes and times), so that nothing is encoded twice and an interrupted run loses one chunk
    at most; each process writes every world-th file. A picture that cannot be read is skipped, counted and named in its
    file. Pictures are drawn or read by other processes, one for each core, where there are many."""
    source, folder = source_of(run, stage), token_folder(run, stage)
    tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    model = vq.VQModel.from_pretrained(run.out / "vqvae", device=run.device)
    model = model.to(memory_format=torch.channels_last)                      # 1.25x on a CPU
    files = [p for part in ("vqvae", "tokenizer") for p in sorted((run.out / part).iterdir()) if p.is_file()]
    about = {"source": f"{run.data or 'shapes'}, {len(source)} pictures, seed {run.seed}, {run.stages[stage]['size']} px, "
                       f"{mixture(run.stages[stage])}, "
                       f"{[zlib.crc32(p.read_bytes()) for p in files]}"}
    folder.mkdir(parents=True, exist_ok=True)
    count, most = math.ceil(len(source) / chunk), max(1, min(50, 2 ** 21 // run.stages[stage]["size"] ** 2))   # at 1024 pixels 3 GB
    for old in folder.glob("*.safetensors"):
        if run.first and int(old.stem) >= count:                             # of a source that was larger
            old.unlink()
    missing = []
    for k in range(run.rank, count, run.world):
        path, chosen = folder / f"{k:06d}.safetensors", range(k * chunk, min((k + 1) * chunk, len(source)))
        mine = about | {"state": f"{zlib.crc32(repr([source.state(i) for i in chosen]).encode()):08x}"}
        if not (path.is_file() and mine.items() <= trainer.metadata(path).items()):
            missing.append((path, mine, [chosen[i:i + most] for i in range(0, len(chosen), most)]))
    readers = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if len(missing) * chunk >= MANY else 0
    batches = iter(DataLoader(Attempts(source), batch_sampler=[batch for *_, batches in missing for batch in batches],
                              collate_fn=list, num_workers=min(readers, 16)))
    for path, mine, indices in tqdm(missing, f"encode {stage}", disable=not run.first):
        made, skipped = [], []
        for _ in indices:
            read, troubles = zip(*next(batches))
            skipped += filter(None, troubles)
            if any(read):
                pictures, captions, micro = zip(*filter(None, read))
                with torch.no_grad():
                    tokens = model.encode(pixels(np.stack(pictures)).to(run.device)).short().cpu()
                made.append(dict(tokens=tokens, text=tokenizer(captions, tell=False).int(), micro=torch.from_numpy(np.stack(micro))))
        flat = {k: torch.cat([part[k] for part in made]) for k in made[0]} if made else dict(tokens=torch.zeros(0, 1, 1, dtype=torch.int16))
        vq.write_whole(path, lambda p: save_file(flat, p, metadata=mine | {"skipped": json.dumps(skipped)}))
    run.wait()
    skipped = source.skipped + [name for path in sorted(folder.glob("*.safetensors")) for name in json.loads(trainer.metadata(path)["skipped"])]
    if skipped and run.first:
        print(f"{len(skipped)} pictures skipped; the first: {'; '.join(skipped[:3])}", file=sys.stderr)
        (run.out / "skipped.txt").write_text("\n".join(skipped) + "\n", encoding="utf-8")


class Tokens:
    """What `encode` wrote, mapped and not read: memory holds what is being used."""
    def __init__(self, folder):
        self.files = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if "text" in file.keys():
                    self.files.append({k: file.get_tensor(k) for k in ("tokens", "text", "micro")})
        if not self.files:
            raise UserError(f"{folder}: no picture in it could be read")
        self.ends = np.cumsum([len(f["text"]) for f in self.files])
        self.grid = self.files[0]["tokens"].shape[1:]

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        """(B,) numpy -> tokens (B, h, w) int64, text (B, L) int64, micro (B, 5) float32."""
        which = np.searchsorted(self.ends, index, side="right")
        rows = index - np.concatenate(([0], self.ends))[which]
        pick = lambda key: torch.stack([self.files[f][key][r] for f, r in zip(which, rows)])
        return pick("tokens").long() & 0xFFFF, pick("text").long(), pick("micro")


def examples(seed, step, batch, number):
    """The examples of a step, (batch,) indices: every permutation of the data is gone through before the next."""
    return np.array([order((*seed, p // number), number)[p % number] for p in range(step * batch, (step + 1) * batch)])


@lru_cache(maxsize=2)
def order(seed, number):
    return np.random.default_rng(seed).permutation(number)


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
# VQ model


class VQStudent(nn.Module):
    """The VQ model with its losses: reconstruction, codebook and commitment (van den Oord et al. 2017), and the
    adversarial one of VQ-GAN (Esser et al. 2021, section 3.1)."""
    def __init__(self, model):
        super().__init__()
        self.vq, self.critic, self.price = model, critic(), 0.1
        entries = model.config.num_vq_embeddings
        self.register_buffer("share", torch.full((entries,), 1 / entries))      # of the latents that each code serves, lately
        self.register_buffer("used", torch.zeros(entries))                      # how many it served since `revive`

    def forward(self, images, quantise, adversary):
        """images (B, 3, H, W) -> loss, reconstruction error, latents (B h w, E), their tokens and squared distances
        to the codebook (B h w,); without `quantise` a plain autoencoder and no tokens."""
        latent = self.vq.latent(images).float()                                                  # (B, E, h, w)
        passed, tokens, miss = latent, None, None
        extra = 0.0 * self.vq.quantize.embedding.weight.sum()                # every parameter has its gradient
        if quantise:
            tokens = self.choose(rows(latent.detach())).view(len(images), *latent.shape[2:])
            vectors = self.vq.vectors_of(tokens)
            extra = F.mse_loss(vectors, latent.detach()) + F.mse_loss(latent, vectors.detach())
            miss = (latent - vectors).detach().square().sum(1).flatten()
            passed = latent + (vectors - latent).detach()                    # straight through
            tokens = tokens.flatten()
        decoded = self.vq.pixels(passed).float()
        error = F.mse_loss(decoded, images)
        loss = error + 0.1 * F.l1_loss(decoded, images)
        return loss + 0.1 * extra + self.duel(images, decoded, loss, adversary), error, rows(latent.detach()), tokens, miss

    def choose(self, latents):
        """(M, E) -> (M,) codes by squared distance - price log(share): entropy-constrained quantisation (Chou,
        Lookabaugh and Gray 1989). The encoder commits to the commoner code, and a flat ground ends as one token
        instead of a dozen that differ by chance, which no transformer can predict."""
        distance = torch.cdist(latents, self.vq.quantize.embedding.weight.detach().float()).square()
        return (distance - self.price * self.share.log()).argmin(1)

    def count(self, served):
        """Take note of how many latents each code served (V,) in a step, in all processes."""
        self.share.lerp_(served / served.sum(), 0.01).clamp_(min=1e-5)
        self.used += served

    def duel(self, images, decoded, loss, on):
        """What discriminator and decoder add to the loss: the hinge, and minus the logit of the decoded picture in
        the weight at which its gradient at the last layer is 0.8 of the reconstruction's. Each learns from its own
        part alone, so that one optimizer serves both."""
        if not on:
            return 0.0 * sum(p.sum() for p in self.critic.parameters())
        hinge = F.relu(1 - self.critic(images)).mean() + F.relu(1 + self.critic(decoded.detach())).mean()
        fixed = {k: v.detach() for k, v in self.critic.named_parameters()}
        fooled = -torch.func.functional_call(self.critic, fixed, decoded).mean()
        last = self.vq.decoder.conv_out.weight
        strength = lambda x: torch.autograd.grad(x, last, retain_graph=True)[0].norm()
        weight = (strength(loss) / (strength(fooled) + 1e-4)).clamp(max=1e4).detach()
        return hinge + 0.8 * weight * fooled


def critic(width=32):
    """A patch discriminator (Isola et al. 2017): (B, 3, H, W) -> (B, 1, H / 8, W / 8) logits. NOTE group norm where
    VQ-GAN has batch norm, so that no statistics cross pictures or processes."""
    layer = lambda a, b: [nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(8, b), nn.LeakyReLU(0.2)]
    return nn.Sequential(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), *layer(width, 2 * width),
                         *layer(2 * width, 4 * width), nn.Conv2d(4 * width, 1, 3, 1, 1))


def train_vq(run):
    """From nothing a codebook collapses: the first `warm` steps train a plain autoencoder, then k-means over its
    distinct latents gives the codebook. Codes that nobody used for 50 steps move to the latents served worst.
    From step `adversary` on the discriminator takes part. With `patches` the encoder is wired, the codebook that of
    `two_tone`, and the decoder alone learns."""
    preset = run.stages["vq"]
    steps, batch, lr, warm, adversary = (preset[name] for name in ("steps", "batch", "lr", "warm", "adversary"))
    torch.manual_seed(run.seed)
    student = VQStudent(vq.VQModel(vq.Config(**MODELS[run.preset]["vq"]))).to(run.device)
    book = student.vq.quantize.embedding.weight
    source = source_of(run, "vq")
    kept = lru_cache(2 ** 31 // (3 * preset["size"] ** 2))(lambda i: readable(source, 1, i)[0][0])         # 2 GB of pictures
    readers = ThreadPoolExecutor()                                           # decoding lets other threads run
    images_of = lambda index: pixels(np.stack(list(readers.map(kept, map(int, index))))).to(run.device)    # (B, 3, H, W)
    if patches := preset.get("patches"):
        images = images_of(range(min(len(source), 1000)))
        wire(student.vq, images)
        with torch.no_grad():
            book.copy_(rows(student.vq.latent(two_tone(images, *patches, run.rng("vq", 0)))))
        book.requires_grad_(False)
        student.price = 0.0                                                  # the same pixels are the same token anyway

    def losses(model, step, attempt):
        rng = run.rng("vq", step, attempt)
        if step == warm and not patches:
            with torch.no_grad():
                seen = torch.cat([rows(student.vq.latent(images_of([i])).float()) for i in range(min(len(source), 640))])
                book.copy_(k_means(distinct(seen), len(book), rng))
            run.same(book)
        served = torch.zeros_like(student.used)
        for part, in run.parts(rng.integers(len(source), size=batch)):
            with run.precision():
                loss, error, latents, tokens, miss = model(images_of(part), step >= warm, step >= adversary)
            if tokens is not None:
                served += torch.bincount(tokens, minlength=len(book))
            yield loss / run.accumulate, dict(psnr=-10 * math.log10(float(error.detach())), codes=(student.used > 0).sum())
        if step >= warm:
            student.count(run.total(served))
            if step % 50 == 49:
                if step < 0.8 * steps and not patches:
                    revive(book, student.used, latents, miss, rng)
                    run.same(book)
                    student.share.masked_fill_(student.used == 0, 1 / len(book))
                student.used.zero_()

    def finish(average):
        model = vq.VQModel(student.vq.config)
        model.load_state_dict(trainer.strip(average, "vq."))
        model.save_pretrained(run.out / "vqvae", torch.float16)

    trainer.fit(run, "vq", student, lambda: trainer.decay_groups(student), losses, batch, steps, lr, finish)


@torch.no_grad()
def wire(model, images):
    """Set the encoder (f = 4, 8 channels in each of the last norm's groups) so that a token tells of its own 4 x 4 pixels
    alone, by the E principal components of the patches of `images` (B, 3, H, W), and freeze it.

    A trained encoder's token depends on pixels far beyond its patch, and through the group norms on the whole picture: a
    hash, which the transformer must learn by heart. Here all residual branches are zero; the strided convolutions gather
    the patch. The last activation lets x through as silu(x) - silu(-x) = x, and its group norm is held still by constants
    that dwarf x, and by the pairs x and -x, whose mean is zero."""
    encoder, size, still = model.encoder, model.config.vq_embed_dim, 256.0
    patches = patches_of(images).flatten(1).unique(dim=0)
    basis = torch.linalg.eigh(patches.T @ patches).eigenvectors.flip(1)[:, :size].T                 # (E, 3 * 4 * 4)
    for p in (*encoder.parameters(), *model.quant_conv.parameters()):
        p.zero_().requires_grad_(False)
    gather, project = (encoder.down_blocks[i].downsamplers[0].conv.weight for i in (0, 1))
    pass_on, double = (encoder.down_blocks[i].resnets[0].conv_shortcut for i in (1, 2))
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    gather[:12, :3, :2, :2] = torch.eye(12).view(12, 3, 2, 2)                                       # pixels (c, y, x) of 2 x 2
    pass_on.weight[:12, :12, 0, 0] = torch.eye(12)
    project[:size, :12, :2, :2] = basis.view(size, 3, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(size, 12, 2, 2)
    for k in range(size):                                                                           # of each group's 8 channels
        plus = 8 * (k // 3) + 2 * (k % 3)                                                           # 3 pairs, and the constants
        double.weight[plus, k] = encoder.conv_out.weight[k, plus, 1, 1] = 1
        double.weight[plus + 1, k] = encoder.conv_out.weight[k, plus + 1, 1, 1] = -1
    double.bias[6::8], double.bias[7::8] = still, -still
    encoder.conv_norm_out.weight.fill_(still / 2)                                                   # the spread of a group
    model.quant_conv.weight[:, :, 0, 0] = torch.eye(size)


def patches_of(images):
    """(B, 3, H, W) -> (B H W / 16, 3, 4, 4)."""
    return images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


@torch.no_grad()
def two_tone(images, colours, outlines, rng):
    """The codebook that texture compression has for flat pictures (Delp and Mitchell 1979; Campbell et al. 1986): a patch is
    two colours and an outline between them. images (B, 3, H, W) -> patches (V, 3, 4, 4): each pair of the commonest colours
    in each outline, then the colours alone; V = colours (colours - 1) / 2 * outlines + colours."""
    seen, number = images.movedim(1, -1).flatten(0, 2).unique(dim=0, return_counts=True)
    if len(seen) < colours:
        raise UserError(f"the pictures have {len(seen)} colours; the preset's codebook wants {colours}")
    palette = seen[number.topk(colours).indices]
    palette = palette[palette.sum(1).argsort()]                                # from dark to light
    dark, light = palette[torch.combinations(torch.arange(colours, device=palette.device))].transpose(0, 1)[..., None]
    patches = patches_of(images).flatten(2)                                    # (M, 3, 16); dark, light (P, 3, 1)
    patches = patches[(patches != patches[..., :1]).any((1, 2))][:, None]
    span = light - dark
    share = ((patches - dark) * span).sum(2, keepdim=True) / span.square().sum(1, keepdim=True)
    share = share.clamp(0, 1)                                                  # of the lighter colour, (M, P, 1, 16)
    best = (dark + share * span - patches).square().sum((2, 3)).argmin(1)
    share = share[torch.arange(len(best), device=best.device), best, 0]        # (M, 16)
    share = k_means(share, outlines, rng, iterations=40)                       # (outlines, 16)
    paired = dark[:, None] + share[:, None] * span[:, None]                    # (P, outlines, 3, 16)
    return torch.cat([paired.flatten(0, 1), palette[..., None].expand(-1, -1, 16)]).unflatten(-1, (4, 4))


def code_features(colours, outlines):
    """What the codes of `two_tone` show -> (V, F) float32: how often each colour, which pair, which outline, or none."""
    pairs = torch.combinations(torch.arange(colours))
    paired = [F.one_hot(pairs, colours).sum(1).repeat_interleave(outlines, 0), torch.eye(len(pairs)).repeat_interleave(outlines, 0),
              torch.eye(outlines).repeat(len(pairs), 1), torch.zeros(len(pairs) * outlines, 1)]
    flat = [2 * torch.eye(colours), torch.zeros(colours, len(pairs) + outlines), torch.ones(colours, 1)]
    return torch.cat([torch.cat(paired, 1), torch.cat(flat, 1)])


def readable(source, number, first=0):
    """The `number` examples of a source from the `first` on, those left out that cannot be read; after the last comes the
    0th -> (pictures, captions, micro)."""
    examples = []
    for i in range(first, first + len(source)):
        with contextlib.suppress(data.PictureError):
            examples.append(source[i % len(source)])
        if len(examples) == number:
            break
    if not examples:
        raise UserError("no picture of --data could be read")
    return tuple(zip(*examples))


def rows(latent):
    """(B, E, h, w) -> (B h w, E)."""
    return latent.permute(0, 2, 3, 1).flatten(0, 2)


def distinct(points, cell=0.8):
    """(M, E) -> one point for each occupied cell of a grid of `cell` standard deviations. Most latents of a
    picture are its flat ground: a codebook drawn from them all spends its codes there, several for one colour,
    and tokens that differ by chance alone are noise to the transformer (perplexity 238 against 79, same PSNR)."""
    cells = (points / points.std(0) / cell).round().long()
    _, where = torch.unique(cells, dim=0, return_inverse=True)
    return points.new_zeros(int(where.max()) + 1, points.shape[1]).index_copy_(0, where, points)


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
    --init), else fresh; compression layers added where the stage has them and that model has not."""
    torch.manual_seed(run.seed)
    vocabulary = clip.Tokenizer.from_pretrained(run.out / "tokenizer").bpe.get_vocab()
    student = Student(*build(run.preset, vocabulary, preset["compress"], run.without), convention_of(run.out))
    fresh(student)
    there = lambda part: (run.out / part / "config.json").is_file()
    if there("text_encoder"):
        student.encoder = clip.TextEncoder.from_pretrained(run.out / "text_encoder").train().requires_grad_(True)
    if there("transformer"):
        student.transformer = meissonic.Transformer.from_pretrained(run.out / "transformer").train().requires_grad_(True)
        if preset["compress"] and not (student.transformer.config.downsample or run.without == "compression" or run.lora):
            student.transformer = add_compression(student.transformer)
        student.probe = nn.Linear(student.transformer.config.pooled_projection_dim, student.transformer.config.codebook_size)
    elif run.lora:
        raise UserError(f"--lora trains terms of a model: {run.out / 'transformer'} is not there; --init says which")
    if not preset["text"] and not there("text_encoder"):
        raise UserError(f"{run.out / 'text_encoder'}: not there, and this stage does not train it: begin with --stage text, or --init")
    if not preset["text"] or run.lora:
        student.encoder.requires_grad_(False).eval()
        student.probe.requires_grad_(False)
    student.transformer.checkpointing = run.checkpointing
    if run.lora:
        student.transformer.requires_grad_(False)
        meissonic.add_lora(student.transformer, run.lora)
    elif patches := run.stages.get("vq", {}).get("patches"):
        features = code_features(*patches)
        if len(features) == student.transformer.config.codebook_size:        # with --init it may be another model's
            share_features(student.transformer, features, anew=not there("transformer"))
    return student.to(run.device)


def train_stage(run, stage, dropout=0.1):
    """Masked-token modelling (SPEC section 6); the caption is empty with probability `dropout`, for guidance."""
    preset = run.stages[stage]
    size, steps, batch = preset["size"], preset["steps"], preset["batch"]
    encode(run, stage)
    pictures = Tokens(token_folder(run, stage))
    empty = clip.Tokenizer.from_pretrained(run.out / "tokenizer")([""])
    student = new_student(run, preset)

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
    """The averaged weights, float16, in the published layout, beside the VQ model and the tokenizer."""
    for name, part, module in (("text_encoder", "encoder.", student.encoder), ("transformer", "transformer.", student.transformer)):
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
    if args.stage == "vq" and args.steps and args.steps <= (warm := PRESETS[args.preset]["vq"]["warm"]):
        p.error(f"--steps {args.steps}: the codes are drawn after {warm} steps, ask for more")
    return args


def changed(presets, args):
    """The stages of --preset with --steps, --batch and --lr in place. Pictures of one's own have no scenes: where the text
    encoder would learn from those, it learns along."""
    new = {k: v for k, v in (("steps", args.steps), ("batch", args.batch), ("lr", args.lr)) if v}
    stages = {stage: preset | new for stage, preset in presets[args.preset].items()}
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
            data.Pictures(args.data)                             # a source that is none: say so before anything is made
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
        for stage in [args.stage] if args.stage else ("tokenizer", *run.stages):
            run_stage(stage, run, args.encode)
        if run.first and (run.out / "log.jsonl").is_file() and not args.encode:
            summary(run)
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (UserError, vq.CheckpointError, data.SourceError, SafetensorError, OSError) as e:     # the fourth: a full disk
        print(f"train.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def adopt(run):
    """Copy the parts of --init into the run's folder; with --resume those alone that it has not yet."""
    if run.init and run.first and not run.init.samefile(run.out):
        for part in ("tokenizer", "vqvae", "text_encoder", "transformer", "scheduler"):
            if (run.init / part).is_dir() and not (run.resume and (run.out / part).is_dir()):
                shutil.rmtree(run.out / part, ignore_errors=True)
                shutil.copytree(run.init / part, run.out / part)
    run.wait()


def run_stage(stage, run, encode_only):
    """Run one stage, unless what it makes is there to stay: brought by --init; a tokenizer, with --resume; any, with
    --encode; or with --resume the stage's last checkpoint is its end (later ones may have changed the model since)."""
    part = dict(tokenizer="tokenizer", text="text_encoder", vq="vqvae").get(stage)
    brought, made = (part and folder and (folder / part).is_dir() for folder in (run.init, run.out))
    run.wait()                                                   # until all have looked
    if brought or made and (stage == "tokenizer" if run.resume else encode_only) or encode_only and stage == "text":
        return
    if stage == "tokenizer":
        if run.first:
            length = MODELS[run.preset]["text"].get("max_position_embeddings", 77)
            train_tokenizer(captions(run), length).save_pretrained(run.out / "tokenizer")
        run.wait()
    elif encode_only and not part:
        encode(run, stage)
    elif not (run.resume and trainer.steps_done(run, stage) >= run.stages[stage]["steps"]):
        {"text": train_text, "vq": train_vq}.get(stage, lambda run: train_stage(run, stage))(run)


def captions(run):
    """Captions to learn the byte pairs from."""
    return readable(source_of(run, "vq"), 2000)[1] if run.data else world_captions(run.seed)


def world_captions(seed, number=20_000):
    rng = np.random.default_rng(seed)
    return [data.caption(rng, data.sample_claim(rng)) for _ in range(number)]


if __name__ == "__main__":
    main()
