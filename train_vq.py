"""Stage vq: pictures -> tokens -> pictures, by an autoencoder whose latents are rounded to the entries of a codebook.

First a plain autoencoder; then its codebook is drawn from the data and it is quantised (van den Oord et al. 2017); last a
discriminator joins (VQ-GAN, Esser et al. 2021; its perceptual loss is left out). Or, for flat pictures, encoder and codebook
are computed (`wire`, `two_tone`) and the decoder alone learns. `python train.py --stage vq` trains by it.

Letters: B batch, H W pixels, h w tokens, E codebook vector, V codebook, M latents, P pairs of colours, F features.
"""
import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import trainer
import vq
from dataset import pixels, readable, source_of
from pipeline import UserError


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


def train(run, config):
    """Train a VQ model of `config` into the run's folder.

    From nothing a codebook collapses: the first `warm` steps train a plain autoencoder, then k-means over its distinct
    latents gives the codebook. Codes that nobody used for 50 steps move to the latents served worst. From step
    `adversary` on the discriminator takes part. With `patches` the encoder is wired, the codebook that of `two_tone`, and
    the decoder alone learns."""
    preset = run.stages["vq"]
    steps, batch, lr, warm, adversary = (preset[name] for name in ("steps", "batch", "lr", "warm", "adversary"))
    torch.manual_seed(run.seed)
    student = VQStudent(vq.VQModel(config)).to(run.device)
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
