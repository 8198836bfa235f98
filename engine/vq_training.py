"""Stage vq: an autoencoder whose latents are rounded to a learned codebook (paper section 2.2).

    task = vq_task(run, vq.Config(), source)
    train.fit(run, task)

The stage has three parts. First a plain autoencoder. Then k-means over its latents gives a
codebook, and the latents are quantised (VQ-VAE, van den Oord et al. 2017). Last a discriminator
joins (VQ-GAN, Esser et al. 2021). NOTE VQ-GAN's perceptual loss is left out: it would need another
pretrained net.

Letters: B batch, H W pixels, h w tokens, E latent channels, V codebook, M = B h w latents.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vq
from engine.checkpoint import remove_prefix
from engine.data import Prefetch, readable, to_float, worker_number
from engine.task import Task, decay_groups, save_half

RESTART_EVERY = 50                                # steps between restarts of codes that nobody uses


class VQTrainer(nn.Module):
    """A VQModel with its losses and its discriminator, which one optimizer trains together."""

    def __init__(self, model):
        super().__init__()
        self.vq = model
        self.discriminator = vq.discriminator()
        self.rate_weight = 0.1                    # of the code's rate in the choice of a code
        entries = model.config.num_vq_embeddings
        usage = torch.full((entries,), 1 / entries)
        self.register_buffer("code_usage", usage)                     # moving average of the shares
        self.register_buffer("code_counts", torch.zeros(entries))     # since the last restart

    def forward(self, images, quantize, adversary):
        """images (B, 3, H, W) in [0, 1]. Without `quantize` a plain autoencoder, whose codes are
        None; with `adversary` the discriminator takes part.
        -> loss, reconstruction error (scalars), latents (M, E), codes (M,), quant_error (M,)"""
        latents = self.vq.encode_latents(images).float()                           # (B, E, h, w)
        flat_latents = to_rows(latents.detach())                                   # (M, E)
        decoder_input, codes, quant_error = latents, None, None
        quant_loss = 0.0 * self.vq.quantize.embedding.weight.sum()    # DDP wants every gradient
        if quantize:
            codes = self.choose_codes(flat_latents)                                # (M,)
            grid = codes.view(len(images), *latents.shape[2:])                     # (B, h, w)
            vectors = self.vq.codebook_vectors(grid)                               # (B, E, h, w)
            codebook_loss = F.mse_loss(vectors, latents.detach())
            commitment_loss = F.mse_loss(latents, vectors.detach())
            quant_loss = codebook_loss + commitment_loss
            quant_error = (latents - vectors).detach().square().sum(1).flatten()   # (M,)
            decoder_input = latents + (vectors - latents).detach()    # straight-through gradient
        decoded = self.vq.decode_vectors(decoder_input).float()                    # (B, 3, H, W)
        error = F.mse_loss(decoded, images)
        reconstruction_loss = error + 0.1 * F.l1_loss(decoded, images)
        if adversary:
            last_weight = self.vq.decoder.conv_out.weight
            adversarial = vq.adversarial_loss(self.discriminator, images, decoded,
                                              reconstruction_loss, last_weight)
        else:
            adversarial = 0.0 * sum(p.sum() for p in self.discriminator.parameters())
        loss = reconstruction_loss + 0.1 * quant_loss + adversarial
        return loss, error, flat_latents, codes, quant_error

    def choose_codes(self, latents):
        """latents (M, E) -> codes (M,): the smallest squared distance - rate_weight * log(usage).
        This is entropy-constrained quantisation (Chou, Lookabaugh and Gray 1989). It prefers common
        codes, so that a flat ground becomes one token. With the nearest code it becomes a dozen
        that differ by chance, which no transformer can predict."""
        codebook = self.vq.quantize.embedding.weight.detach().float()              # (V, E)
        distance = torch.cdist(latents, codebook).square()                         # (M, V)
        return (distance - self.rate_weight * self.code_usage.log()).argmin(1)

    def update_usage(self, counts):
        """counts (V,): the latents that each code served in a step, in all processes."""
        self.code_usage.lerp_(counts / counts.sum(), 0.01).clamp_(min=1e-5)
        self.code_counts += counts


def vq_task(run, config, source, set_codes=None):
    """The Task of stage "vq": a VQModel of `config`, trained on the pictures of a Source. It saves
    run.out/vqvae. With set_codes(vq_model, images, rng=), which computes and freezes encoder and
    codebook, only the decoder learns.

    A codebook that is trained from the start collapses to a few codes. Hence the plain autoencoder
    for the first `quantize_from` steps, and restarts of unused codes later."""
    settings = run.stages["vq"]
    steps, batch = settings["steps"], settings["batch"]
    quantize_from, adversary_from = settings["quantize_from"], settings["adversary_from"]
    torch.manual_seed(run.seed)
    trainer = VQTrainer(vq.VQModel(config)).to(run.device)
    trainer = trainer.to(memory_format=torch.channels_last)           # 1.2x on a CPU
    codebook = trainer.vq.quantize.embedding.weight                                # (V, E)
    if set_codes:
        images = first_images(run, source, 300)                                    # (B, 3, H, W)
        set_codes(trainer.vq, images, rng=run.rng("vq", 0))
        trainer.rate_weight = 0.0                 # equal patches have equal codes already

    def read_pictures(step, attempt):
        index = run.rng("vq", step, attempt).integers(len(source), size=batch)
        return [read_rows(source, rows) for (rows,) in run.rank_slice(index)]

    pictures = Prefetch(read_pictures, steps, worker_number(run.device))

    def micro_batches(model, step, attempt):
        rng = run.rng("restarts", step, attempt)
        quantize, adversary = step >= quantize_from, step >= adversary_from
        if step == quantize_from and not set_codes:
            initialize_codebook(trainer.vq, first_images(run, source, 640), rng)
            run.broadcast(codebook)
        counts = torch.zeros_like(trainer.code_counts)                             # (V,)
        for rows in pictures(step, attempt):
            images = to_float(run.to_device(rows))                                 # (B, 3, H, W)
            with run.precision():
                loss, error, latents, codes, quant_error = model(images, quantize, adversary)
            if quantize:
                counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
            psnr = -10 * error.detach().log10()
            yield loss / run.accumulate, {"psnr": psnr, "codes": (trainer.code_counts > 0).sum()}
        if quantize:
            trainer.update_usage(run.all_reduce(counts))
        if quantize and step % RESTART_EVERY == RESTART_EVERY - 1:
            if step < 0.8 * steps and not set_codes:
                unused = trainer.code_counts == 0
                restart_dead_codes(codebook, unused, latents, quant_error, rng)
                run.broadcast(codebook)
                trainer.code_usage.masked_fill_(unused, 1 / len(codebook))
            trainer.code_counts.zero_()

    def save(state):
        save_half(run.out / "vqvae", trainer.vq, remove_prefix(state, "vq."))

    return Task("vq", trainer, lambda: decay_groups(trainer), micro_batches, steps, batch,
                settings["lr"], save)


def read_rows(source, index):
    """(B,) indices -> (B, H, W, 3) uint8. A picture that cannot be read is replaced by the next."""
    return torch.from_numpy(np.stack([readable(source, 1, first=int(i))[0][0] for i in index]))


def first_images(run, source, number):
    """The first pictures of a source, `number` of them at most -> (B, 3, H, W) on the device."""
    pictures, _, _ = readable(source, number)
    return to_float(run.to_device(np.stack(pictures)))


# --------------------------------------------------------------------------------------------------
# The codebook


@torch.no_grad()
def initialize_codebook(model, images, rng):
    """Set the codebook to the k-means centres of the latents of images (B, 3, H, W)."""
    codebook = model.quantize.embedding.weight
    latents = [to_rows(model.encode_latents(image).float()) for image in images.split(1)]
    points = distinct_points(torch.cat(latents))                                   # (M, E)
    codebook.copy_(k_means(points, len(codebook), rng))


def to_rows(latents):
    """(B, E, h, w) -> (B h w, E)."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def distinct_points(points, cell=0.8):
    """points (M, E) -> one for each occupied cell of a grid of `cell` standard deviations.

    Most latents of a picture show its flat ground. A codebook drawn from all of them has many codes
    for one colour, and which of them a token gets is noise to the transformer (perplexity 238 in
    place of 79, at the same PSNR)."""
    cells = (points / points.std(0) / cell).round().long()
    _, cell_of = torch.unique(cells, dim=0, return_inverse=True)                   # (M,)
    number = int(cell_of.max()) + 1
    return points.new_zeros(number, points.shape[1]).index_copy_(0, cell_of, points)


def k_means(points, k, rng, iterations=10):
    """points (M, E) -> (k, E) centres. An empty cluster restarts at a random point."""
    def random_points():
        return points[torch.from_numpy(rng.integers(len(points), size=k))]         # (k, E)

    centres = random_points()
    for _ in range(iterations):
        nearest = torch.cdist(points, centres).argmin(1)                           # (M,)
        count = torch.bincount(nearest, minlength=k)[:, None]                      # (k, 1)
        mean = torch.zeros_like(centres).index_add_(0, nearest, points) / count.clamp(min=1)
        centres = torch.where(count > 0, mean, random_points())
    return centres


@torch.no_grad()
def restart_dead_codes(codebook, unused, latents, quant_error, rng):
    """Move the codes (V, E) that are `unused` (V,) bool to some of the latents (M, E), drawn from
    those with the largest quant_error (M,)."""
    number = int(unused.sum())
    worst = quant_error.topk(min(4 * number, len(quant_error))).indices
    chosen = worst[torch.from_numpy(rng.permutation(len(worst))[:number])]
    codebook[unused] = latents[chosen]
