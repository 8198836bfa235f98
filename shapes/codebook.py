"""A VQ codebook that is computed instead of trained, for pictures of few flat colours.

A trained encoder's token depends on pixels far beyond its patch, and through the group norms on
the whole picture. A transformer must learn that hash by heart. Here a token depends on its own
f x f pixels alone: `set_patch_encoder` turns the encoder into a projection of patches, averaged to
4 x 4 pixels, and the codebook is that of block truncation coding (Delp and Mitchell 1979; Campbell
et al. 1986). Only the decoder is trained. It draws sharp edges: from its neighbours it can tell
which outline a token belongs to.

    set_patch_codes(vq_model, images, colours=8, outlines=36, rng=np.random.default_rng(0))
    encode = PatchEncoder(vq_model)        # the tokens of vq_model.encode, without convolutions

NOTE None of this is in the paper. It makes a tiny model learn the world of shapes on two CPU cores.
Letters: B pictures, H W pixels, h w tokens, M patches, E latent channels, P pairs of colours,
V codes, F features.
"""
import numpy as np
import torch
import torch.nn.functional as F

from engine.checkpoint import UserError
from engine.vq_training import k_means

GROUP_CONSTANT = 256.0                             # dwarfs the latents in the last group norm


@torch.no_grad()
def set_patch_codes(vq_model, images, colours, outlines, rng):
    """Set and freeze the encoder and the codebook of a VQ model, from images (B, 3, H, W) in
    [0, 1]. The codebook must have the V entries of block_truncation_codebook."""
    scale = vq_model.config.f // 4
    images = F.avg_pool2d(images, scale)                                           # 4 px per token
    set_patch_encoder(vq_model, images)
    patches = block_truncation_codebook(images, colours, outlines, rng)            # (V, 3, 4, 4)
    patches = F.interpolate(patches, scale_factor=scale)                           # (V, 3, f, f)
    latents = vq_model.encode_latents(patches)                                     # (V, E, 1, 1)
    codebook = vq_model.quantize.embedding.weight
    codebook.copy_(latents.flatten(1))
    codebook.requires_grad_(False)


@torch.no_grad()
def set_patch_encoder(vq_model, images):
    """Make the encoder average each f x f patch to 4 x 4 pixels and project those on the E
    principal components of the patches of `images` (B, 3, H, W), 4 pixels per token; freeze it.

    All residual branches are zero. The last two strided convolutions gather the patch, those before
    them average. Each latent x goes on as the pair x and -x, so that the last activation passes it
    on: silu(x) - silu(-x) = x. The last group norm must not change x. Its groups have 8 channels:
    three pairs, whose means are zero, and two constants, +-GROUP_CONSTANT, which fix the group's
    variance.
    """
    encoder = vq_model.encoder
    size = vq_model.config.vq_embed_dim
    for p in (*encoder.parameters(), *vq_model.quant_conv.parameters()):
        p.zero_().requires_grad_(False)
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    *averaging, gathering, projecting, last = encoder.down_blocks
    for level in averaging:
        mean_2x2 = torch.eye(3)[..., None, None] / 4
        level.downsamplers[0].conv.weight[:3, :3, :2, :2] = mean_2x2
    gather_2x2 = gathering.downsamplers[0].conv.weight
    gather_2x2[:12, :3, :2, :2] = torch.eye(12).view(12, 3, 2, 2)
    project = projecting.downsamplers[0].conv.weight
    project[:size, :12, :2, :2] = on_gathered_pixels(principal_components(images, size))
    for level in encoder.down_blocks[1:-1]:
        shortcut = level.resnets[0].conv_shortcut
        if shortcut is not None:                   # the width changes
            shortcut.weight[:12, :12, 0, 0] = torch.eye(12)
    double = last.resnets[0].conv_shortcut
    for k in range(size):
        plus = 8 * (k // 3) + 2 * (k % 3)
        double.weight[plus, k] = 1
        double.weight[plus + 1, k] = -1
        encoder.conv_out.weight[k, plus, 1, 1] = 1
        encoder.conv_out.weight[k, plus + 1, 1, 1] = -1
    double.bias[6::8] = GROUP_CONSTANT
    double.bias[7::8] = -GROUP_CONSTANT
    encoder.conv_norm_out.weight.fill_(GROUP_CONSTANT / 2)   # a group's spread
    vq_model.quant_conv.weight[:, :, 0, 0] = torch.eye(size)


def has_patch_encoder(vq_model):
    """Whether the encoder is that of set_patch_encoder. A model of --init may have another one."""
    return not vq_model.encoder.mid_block.resnets[0].conv2.weight.any()


class PatchEncoder:
    """The tokens of a VQ model with set_patch_encoder, hundreds of times as fast: images
    (B, 3, 4h, 4w), averaged to 4 pixels per token, -> (B, h, w) int64."""

    def __init__(self, vq_model):
        project = vq_model.encoder.down_blocks[-2].downsamplers[0].conv.weight.detach()
        self.quantizer = vq_model.quantize
        size = vq_model.config.vq_embed_dim
        basis = project[:size, :12, :2, :2].reshape(size, 3, 2, 2, 2, 2)
        self.basis = basis.permute(0, 1, 4, 2, 5, 3).reshape(size, 48)             # (E, 48)

    def __call__(self, images):
        B, _, height, width = images.shape
        latents = to_patches(images).flatten(1) @ self.basis.T                     # (M, E)
        # Most patches are plain. Each different one is looked up once.
        key = latents.double() @ torch.linspace(1, 2, latents.shape[1], dtype=torch.float64)
        _, first, place = np.unique(key.numpy(), return_index=True, return_inverse=True)
        codes = self.quantizer.nearest(latents[first])[place]                      # (M,)
        return codes.view(B, height // 4, width // 4)


def principal_components(images, size):
    """The first `size` principal components (not centred) of the distinct patches -> (size, 48)."""
    patches = to_patches(images).flatten(1).unique(dim=0)                          # (M, 48)
    return torch.linalg.eigh(patches.T @ patches).eigenvectors.flip(1)[:, :size].T


def on_gathered_pixels(basis):
    """(E, 48) on patches (c, 4, 4) -> (E, 12, 2, 2) on 2 x 2 blocks of 2 x 2 pixels gathered."""
    size = len(basis)
    basis = basis.view(size, 3, 2, 2, 2, 2)        # (E, c, block row, row, block column, column)
    return basis.permute(0, 1, 3, 5, 2, 4).reshape(size, 12, 2, 2)                 # (E, 12, 2, 2)


def to_patches(images):
    """(B, 3, H, W) -> (B H W / 16, 3, 4, 4)."""
    return images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


@torch.no_grad()
def block_truncation_codebook(images, colours, outlines, rng):
    """A patch of a flat picture is two colours and an outline between them. images (B, 3, H, W) ->
    patches (V, 3, 4, 4): each pair of the commonest colours with each outline, then the plain
    colours, V = colours (colours - 1) / 2 * outlines + colours. The second half of the outlines are
    the first half with the two colours exchanged. Raises UserError for pictures of fewer colours,
    ValueError for an odd number of outlines."""
    if outlines % 2:
        raise ValueError(f"{outlines} outlines are not pairs")
    palette = commonest_colours(images, colours)                                   # (colours, 3)
    pairs = palette[torch.combinations(torch.arange(colours, device=palette.device))]
    dark, light = pairs.transpose(0, 1)[..., None]                                 # (P, 3, 1) each
    span = light - dark
    shares = lighter_shares(to_patches(images).flatten(2), dark, span)             # (M, 16)
    shares = torch.where(shares.mean(1, keepdim=True) > 0.5, 1 - shares, shares)
    shares = k_means(shares, outlines // 2, rng, iterations=40)                    # (half, 16)
    shares = torch.cat([shares, 1 - shares])                                       # (outlines, 16)
    edges = dark[:, None] + shares[:, None] * span[:, None]                        # (P, ., 3, 16)
    plain = palette[..., None].expand(-1, -1, 16)                                  # (., 3, 16)
    return torch.cat([edges.flatten(0, 1), plain]).unflatten(-1, (4, 4))           # (V, 3, 4, 4)


def commonest_colours(images, number):
    """The commonest pixel values -> (number, 3), from dark to light. Raises UserError."""
    values, counts = images.movedim(1, -1).flatten(0, 2).unique(dim=0, return_counts=True)
    if len(values) < number:
        raise UserError(f"the pictures have {len(values)} colours; "
                        f"the preset's codebook wants {number}")
    palette = values[counts.topk(number).indices]                                  # (number, 3)
    return palette[palette.sum(1).argsort()]


def lighter_shares(patches, dark, span):
    """patches (M, 3, 16) -> (M', 16): the share of the lighter colour in each pixel, for the pair
    of colours that fits a patch best. Patches of one colour are left out."""
    patches = patches[(patches != patches[..., :1]).any((1, 2))][:, None]          # (M', 1, 3, 16)
    share = ((patches - dark) * span).sum(2, keepdim=True) / span.square().sum(1, keepdim=True)
    share = share.clamp(0, 1)                                                      # (M', P, 1, 16)
    best = (dark + share * span - patches).square().sum((2, 3)).argmin(1)          # (M',)
    return share[torch.arange(len(best), device=best.device), best, 0]             # (M', 16)


def code_features(colours, outlines):
    """What the codes of block_truncation_codebook show -> (V, F) float32: the number of times that
    each colour is in it (a plain colour twice), then one-hot: which pair, which outline, plain.
    Last for each colour the part of the patch that it fills: a red corner on blue and a red corner
    on white have this in common, though red is the lighter colour in one of them."""
    pairs = torch.combinations(torch.arange(colours))                              # (P, 2)
    number = len(pairs)
    part = torch.arange(outlines)                                   # that the lighter colour fills
    rest = (part + outlines // 2) % outlines
    dark, light = pairs.T[..., None]                                               # (P, 1) each
    filled = torch.stack([light * outlines + part, dark * outlines + rest], -1)         # (P, ., 2)
    filled = F.one_hot(filled.flatten(0, 1), colours * outlines).sum(1)            # (P outlines, .)
    edges = torch.cat([
        F.one_hot(pairs, colours).sum(1).repeat_interleave(outlines, 0),
        torch.eye(number).repeat_interleave(outlines, 0),
        torch.eye(outlines).repeat(number, 1),
        torch.zeros(number * outlines, 1),
        filled], 1)                                                                # (P outlines, F)
    plain = torch.cat([
        2 * torch.eye(colours),
        torch.zeros(colours, number + outlines),
        torch.ones(colours, 1),
        torch.zeros(colours, colours * outlines)], 1)                              # (colours, F)
    return torch.cat([edges, plain])
