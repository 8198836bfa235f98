"""The VQ model: pictures to tokens and back (paper section 2.2; VQ-GAN, Esser et al. 2021).

    model = VQModel.from_pretrained("weights/shapes/vqvae")
    ids = model.encode(images)             # (B, 3, H, W) in [0, 1] -> (B, h, w) int64
    images = model.decode(ids)             # (B, h, w) -> (B, 3, H, W), not clipped

Read it top to bottom: config, small modules, encoder, quantiser, decoder, the whole model, the
adversarial losses of VQ-GAN. engine/vq_training.py trains it. The strips, 60 lines, let a 1024 px
picture decode on a small GPU.

Letters: B batch, H W pixels, h w tokens (h = H / f), V codebook entries, E their size, c channels.
"""
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from engine.checkpoint import DEPTH, CheckpointError, Embedding, JsonConfig, Pretrained


@dataclass
class Config(JsonConfig):
    """The defaults are the published configuration."""
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512, 768)     # per level, finest first
    layers_per_block: int = 2
    latent_channels: int = 64
    vq_embed_dim: int | None = None                           # E; None: latent_channels
    num_vq_embeddings: int = 8192                             # V
    norm_num_groups: int = 32
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ()                    # one DownEncoderBlock2D per level
    up_block_types: tuple[str, ...] = ()                      # one UpDecoderBlock2D per level

    FIXED = {"_class_name": "VQModel", "act_fn": "silu", "norm_type": "group",
             "mid_block_add_attention": False, "lookup_from_codebook": True}
    IGNORED = frozenset({"_diffusers_version", "_name_or_path", "sample_size", "scaling_factor",
                         "force_upcast"})

    BOUNDS = dict(layers_per_block=DEPTH, in_channels=(3, 3), out_channels=(3, 3))

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= len(self.block_out_channels) <= 10:
            raise CheckpointError("block_out_channels: not 1 to 10 levels")
        down = ("DownEncoderBlock2D",) * len(self.block_out_channels)
        up = ("UpDecoderBlock2D",) * len(self.block_out_channels)
        self.down_block_types = tuple(self.down_block_types) or down
        self.up_block_types = tuple(self.up_block_types) or up
        if self.down_block_types != down or self.up_block_types != up:
            raise CheckpointError("down_block_types, up_block_types: only DownEncoderBlock2D and "
                                  "UpDecoderBlock2D, one per level")

    @property
    def f(self):                                              # pixels per token along a side
        return 2 ** (len(self.block_out_channels) - 1)


# -------------------------------------------------------------------------------------------------
# Small modules. Without gradients, a large map (B, c, H, W) is processed in strips of rows. The
# largest map of the published decoder takes 1 GiB at 1024 px in float32; norm, activation and
# convolution of the whole map would allocate another one each.

STRIP = 2 ** 24                                               # numbers of a map processed at a time


def is_large(x):
    """Whether a map is processed in strips."""
    return x.numel() > STRIP and not torch.is_grad_enabled()


def in_strips(function, x):
    """function(x), some rows at a time if x is large. `function` is a convolution of at most 3 rows
    with zero padding, which keeps or doubles the height."""
    if not is_large(x):
        return function(x)
    height = x.shape[2]
    rows = max(1, STRIP * height // x.numel())
    out = None
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first = max(top - 1, 0)                               # one neighbour row on each side
        last = min(bottom + 1, height)
        y = function(x[:, :, first:last])
        scale = y.shape[2] // (last - first)                  # 2 where the function upsamples
        y = y[:, :, scale * (top - first):scale * (bottom - first)]       # without the neighbours
        if out is None:
            shape = (*y.shape[:2], scale * height, y.shape[3])
            out = torch.empty(shape, dtype=y.dtype, device=y.device,
                              memory_format=torch.channels_last)
        out[:, :, scale * top:scale * bottom] = y
    return out


def norm_silu_conv(norm, conv, x):
    """conv(silu(norm(x))) with a group norm, whose statistics are those of the whole map."""
    if not is_large(x):
        return conv(F.silu(norm(x)))
    scale, shift = norm_coefficients(norm, x)                 # (B, c, 1, 1)

    def apply(strip):
        y = torch.addcmul(shift, strip.float(), scale)
        return conv(F.silu(y, inplace=True).to(x.dtype))
    return in_strips(apply, x)


def strips(x):
    """(B, c, H, W) -> its strips of rows, of about STRIP numbers."""
    return x.split(max(1, STRIP * x.shape[2] // x.numel()), 2)


def mean_of_groups(x, size):
    """(B, c), each number replaced by the mean of its `size` channels -> (B, c)."""
    return x.unflatten(1, (-1, size)).mean(2).repeat_interleave(size, 1)


def norm_coefficients(norm, x):
    """scale, shift (B, c, 1, 1) float32 with norm(x) = scale * x + shift, for a group norm. In two
    passes of sums, which on a CPU take a third of var_mean's time."""
    size = x.shape[1] // norm.num_groups                      # channels of a group
    pixels = x.shape[2] * x.shape[3]
    mean = sum(strip.float().sum((2, 3)) for strip in strips(x)) / pixels              # (B, c)
    mean = mean_of_groups(mean, size)                                                  # (B, c)
    centre = mean[..., None, None]
    var = sum((strip - centre).square_().sum((2, 3)) for strip in strips(x)) / pixels  # (B, c)
    std = (mean_of_groups(var, size) + norm.eps).sqrt()                                # (B, c)
    scale = norm.weight.float() / std
    shift = norm.bias.float() - mean * scale
    return scale[..., None, None], shift[..., None, None]


class ResnetBlock(nn.Module):
    """x + two times (norm, SiLU, 3x3 convolution)."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x):                                     # (B, c_in, H, W) -> (B, c_out, H, W)
        y = norm_silu_conv(self.norm1, self.conv1, x)
        y = norm_silu_conv(self.norm2, self.conv2, y)
        if self.conv_shortcut is not None:
            x = in_strips(self.conv_shortcut, x)
        return y + x if torch.is_grad_enabled() else y.add_(x)            # in place saves a map


class Downsample(nn.Module):
    """Halve a map: stride 2, after one row of zeros below and one column on the right."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):                                     # (B, c, H, W) -> (B, c, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double a map: nearest neighbour, then a convolution."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):                                     # (B, c, H, W) -> (B, c, 2H, 2W)
        if x.is_cpu and is_large(x):
            return in_strips(self.transposed(), x)
        return in_strips(lambda strip: self.conv(F.interpolate(strip, scale_factor=2.0)), x)

    def transposed(self):
        """The same as one transposed convolution: 16 products for each of four outputs in place of
        36. A pixel of x reaches 4 x 4 outputs, each by the sum of up to 2 x 2 weights."""
        weight = self.conv.weight.flip(2, 3).transpose(0, 1)                   # (c, c, 3, 3)
        shifted = [F.pad(weight, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1)]
        kernel = sum(shifted)                                                  # (c, c, 4, 4)
        return lambda x: F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """Residual blocks at one resolution, then perhaps a Downsample or Upsample."""
    def __init__(self, c_in, c_out, layers, groups, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def blocks(self):
        """Its modules in order. The caller applies them one by one: then the level's input, which
        may take 1 GiB, is freed after the first."""
        return list(chain.from_iterable(self.children()))


# -------------------------------------------------------------------------------------------------
# Encoder, quantiser, decoder


class Encoder(nn.Module):
    """Levels from fine to coarse, each halving the map but the last."""
    def __init__(self, c: Config):
        super().__init__()
        widths = c.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(c_in, c_out, c.layers_per_block, c.norm_num_groups, downsample=i < last)
            for i, (c_in, c_out) in enumerate(zip(widths[:1] + widths, widths)))
        self.mid_block = Level(widths[-1], widths[-1], 2, c.norm_num_groups)
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c.latent_channels, 3, padding=1)

    def forward(self, x):                                     # (B, 3, H, W) -> (B, latent, h, w)
        x = self.conv_in(x)
        for level in (*self.down_blocks, self.mid_block):
            for block in level.blocks():
                x = block(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class Quantizer(nn.Module):
    """The codebook."""
    def __init__(self, entries, size):
        super().__init__()
        self.embedding = Embedding(entries, size)

    def nearest(self, vectors, chunk=8192):
        """(M, E) -> (M,) int64: the nearest entry in Euclidean distance, computed in float32.
        argmin |z - e|^2 = argmin |e|^2 - 2 z e, for `chunk` vectors z at a time."""
        codebook = self.embedding.weight.float()              # (V, E)
        norms = codebook.square().sum(-1)                     # (V,)
        nearest = []
        for z in vectors.split(chunk):
            distances = torch.addmm(norms, z.float(), codebook.t(), alpha=-2)     # (m, V)
            nearest.append(distances.argmin(-1))
        return torch.cat(nearest)


class Decoder(nn.Module):
    """Levels from coarse to fine, each doubling the map but the last."""
    def __init__(self, c: Config):
        super().__init__()
        widths = c.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Level(widths[0], widths[0], 2, c.norm_num_groups)
        self.up_blocks = nn.ModuleList(
            Level(c_in, c_out, c.layers_per_block + 1, c.norm_num_groups, upsample=i < last)
            for i, (c_in, c_out) in enumerate(zip(widths[:1] + widths, widths)))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, x):                                     # (B, latent, h, w) -> (B, 3, H, W)
        x = self.conv_in(x)
        for level in (self.mid_block, *self.up_blocks):
            for block in level.blocks():
                x = block(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


# -------------------------------------------------------------------------------------------------
# The whole model


class VQModel(Pretrained):
    """Encoder, codebook and decoder. `encode` and `decode` come last, the halves of each before."""
    CONFIG = Config

    def __init__(self, config: Config):
        super().__init__(config)
        size = config.vq_embed_dim or config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, size, 1)
        self.quantize = Quantizer(config.num_vq_embeddings, size)
        self.post_quant_conv = nn.Conv2d(size, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode_latents(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, E, h, w), not yet quantised.
        Raises ValueError if f does not divide H and W."""
        height, width = images.shape[-2:]
        if height % self.config.f or width % self.config.f:
            raise ValueError(f"{width}x{height} pixels do not divide by {self.config.f}")
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    def nearest_codes(self, latents):
        """(B, E, h, w) -> (B, h, w) int64."""
        B, E, h, w = latents.shape
        return self.quantize.nearest(latents.permute(0, 2, 3, 1).reshape(-1, E)).view(B, h, w)

    def codebook_vectors(self, ids):
        """(B, h, w) int64 -> (B, E, h, w)."""
        return self.quantize.embedding(ids).permute(0, 3, 1, 2)

    def decode_vectors(self, vectors):
        """(B, E, h, w) -> (B, 3, H, W), not clipped."""
        return self.decoder(self.post_quant_conv(vectors))

    def encode(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, h, w) int64 tokens."""
        return self.nearest_codes(self.encode_latents(images))

    def decode(self, ids):
        """(B, h, w) int64 -> (B, 3, H, W) in the model's dtype, about [0, 1] but not clipped."""
        return self.decode_vectors(self.codebook_vectors(ids))


# -------------------------------------------------------------------------------------------------
# Adversarial losses (VQ-GAN, Esser et al. 2021, section 3.1)


def discriminator(width=32):
    """A patch discriminator (Isola et al. 2017): (B, 3, H, W) -> (B, 1, H / 8, W / 8) logits.
    NOTE group norm where VQ-GAN has batch norm: no statistics across pictures or processes."""
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for c in (width, 2 * width):
        layers += [nn.Conv2d(c, 2 * c, 4, 2, 1), nn.GroupNorm(8, 2 * c), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1))


def adversarial_loss(discriminator, images, decoded, reconstruction_loss, last_weight):
    """images, decoded (B, 3, H, W) -> scalar: the discriminator's hinge loss + the decoder's loss.

    The decoder's loss is minus the logit of the decoded picture. Its weight makes its gradient at
    `last_weight`, the decoder's last layer, 0.8 times that of the reconstruction loss. Neither term
    reaches the parameters that the other trains, so one optimizer serves both."""
    hinge = (F.relu(1 - discriminator(images)).mean()
             + F.relu(1 + discriminator(decoded.detach())).mean())
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    generator_loss = -torch.func.functional_call(discriminator, frozen, decoded).mean()
    reconstruction_norm = gradient_norm(reconstruction_loss, last_weight)
    generator_norm = gradient_norm(generator_loss, last_weight)
    weight = (reconstruction_norm / (generator_norm + 1e-4)).clamp(max=1e4).detach()
    return hinge + 0.8 * weight * generator_loss


def gradient_norm(loss, parameter):
    """The norm of d loss / d parameter."""
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0].norm()
