"""The VQ model: pictures to discrete tokens and back (paper section 2.2; Esser et al. 2021).

    vq = VQModel.from_pretrained("weights/shapes/vqvae")
    tokens = vq.encode(images)         # (B, 3, H, W) in [0, 1] -> (B, h, w) int64
    images = vq.decode(tokens)         # (B, h, w) -> (B, 3, H, W), not clipped

Letters: B batch, H W pixels, h w tokens with h = H / f, f = 2 ** (levels - 1), V codebook entries, E their size.
The second half of this file, `Pretrained`, is how all three models of this project load and save checkpoints.
"""
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, tensor or key."""


# ---------------------------------------------------------------------------------------------------------
# Checkpoints: strict, safetensors only, one copy in memory


class JsonConfig:
    """Base of the config dataclasses. `FIXED` are keys of published configs for which one value alone is built
    here; `IGNORED` are keys that say nothing about the network."""
    FIXED, IGNORED = {}, frozenset()

    @classmethod
    def from_json(cls, path):
        """Read a config.json. Raises CheckpointError for a file that is none, and for unknown or unsupported keys."""
        try:
            raw = json.loads(Path(path).read_text())
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
        except ValueError:
            raise CheckpointError(f"{path}: not a JSON file") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: not a JSON object")
        return cls.from_dict(raw, path)

    @classmethod
    def from_dict(cls, raw, path="config"):
        known = {f.name for f in fields(cls)}
        for key, value in raw.items():
            if key in cls.FIXED and value != cls.FIXED[key]:
                raise CheckpointError(f"{path}: {key} = {value!r} is not supported, only {cls.FIXED[key]!r}")
            if key not in known and key not in cls.FIXED and key not in cls.IGNORED:
                raise CheckpointError(f"{path}: unknown key {key!r}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known}
        try:
            return cls(**values)
        except (TypeError, ZeroDivisionError, CheckpointError) as e:
            raise CheckpointError(f"{path}: {e}") from None

    def to_dict(self):
        return {**self.FIXED, **{f.name: getattr(self, f.name) for f in fields(self)}}


class Pretrained(nn.Module):
    """A model that builds from `Config`, and loads and saves the published folder layout.

    CONFIG  the config dataclass
    STEM    file name of the weights, without .safetensors
    PACKED  {suffix of one of our modules: suffixes of the published ones that it concatenates along dim 0}
    DROPPED prefixes of published tensors that are read by nobody
    TWIN    whether the .fp16 twin of the published weights is sound
    """
    CONFIG, STEM, PACKED, DROPPED, TWIN = None, "diffusion_pytorch_model", {}, (), True

    def __init__(self, config):
        super().__init__()
        self.config = config

    def published(self):
        """{our tensor name: [published names]}: the same name unless PACKED says otherwise."""
        table = {}
        for name in self.state_dict():
            module, _, kind = name.rpartition(".")                     # kind: weight or bias
            table[name] = [name]
            for ours, theirs in self.PACKED.items():
                if module == ours or module.endswith("." + ours):
                    table[name] = [f"{module.removesuffix(ours)}{t}.{kind}" for t in theirs]
        return table

    def split_sizes(self, name, parts):
        """Rows of each published part of a packed tensor: C each, and the last takes the rest (q, k, v, MLP)."""
        rows = self.get_parameter(name).shape[0]
        each = rows // parts if parts == 3 else self.config.width
        return [each] * (parts - 1) + [rows - each * (parts - 1)]

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", host=()):
        """Load a checkpoint folder (config.json and weights). Built on the meta device and assigned tensor by
        tensor, read straight to `device` and cast there, so that no second copy of the model ever exists; where files
        and model agree in dtype, the CPU's tensors are the mapped files themselves. Tensors whose names contain one
        of `host` stay on the CPU. With device "meta" all is checked and nothing read.
        Raises CheckpointError, naming what is missing, extra, misshaped or unreadable."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: not a checkpoint folder (no config.json)")
        config = cls.CONFIG.from_json(folder / "config.json")
        try:
            with torch.device("meta"):
                model = cls(config)
        except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as e:       # widths that do not divide, and the like
            raise CheckpointError(f"{folder / 'config.json'}: no model can be built from it ({e})") from None
        model.load_tensors(weight_files(folder, cls.STEM, dtype if cls.TWIN else torch.float32), dtype, device, host)
        return model.eval().requires_grad_(False)

    def load_tensors(self, files, dtype, device, host=()):
        """Assign every parameter from safetensors files; see from_pretrained."""
        stored, device = {}, str(device)                               # published name -> (open files, stored name)
        for path in files:
            try:
                opened = {d: safe_open(path, framework="pt", device=d) for d in {"cpu", device} - {"meta"}}
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{path}: not a whole safetensors file ({e})") from None
            for raw in opened["cpu"].keys():
                name = raw.removeprefix("_orig_mod.")                  # saved from a compiled model
                if not name.startswith(self.DROPPED):
                    stored[name] = (opened, raw)
        table, mine = self.published(), self.state_dict()
        wanted = {p for parts in table.values() for p in parts}
        where = Path(files[0]).parent
        if missing := sorted(wanted - stored.keys()):
            raise CheckpointError(f"{where}: {len(missing)} tensors missing, first: {', '.join(missing[:3])}")
        if extra := sorted(stored.keys() - wanted):
            raise CheckpointError(f"{where}: {len(extra)} unknown tensors, first: {', '.join(extra[:3])}")
        for name, parts in table.items():
            want = [(size, *mine[name].shape[1:]) for size in self.split_sizes(name, len(parts))] \
                if len(parts) > 1 else [tuple(mine[name].shape)]
            for part, shape in zip(parts, want):
                opened, raw = stored[part]
                if (found := tuple(opened["cpu"].get_slice(raw).get_shape())) != shape:
                    raise CheckpointError(f"{where}: {part} has shape {found}, expected {shape}")
        for name, parts in table.items() if device != "meta" else ():
            where = "cpu" if any(h in name for h in host) else device
            tensors = [opened[where].get_tensor(raw).to(dtype) for opened, raw in (stored[part] for part in parts)]
            self.load_state_dict({name: torch.cat(tensors) if len(tensors) > 1 else tensors[0]}, strict=False, assign=True)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and the weights under their published names, each file whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table, tensors = self.published(), {}
        for name, value in self.state_dict().items():
            value = value.detach().to("cpu", dtype or value.dtype)
            parts = table[name]
            pieces = value.split(self.split_sizes(name, len(parts))) if len(parts) > 1 else [value]
            tensors.update({part: piece.contiguous() for part, piece in zip(parts, pieces)})
        write_whole(folder / f"{self.STEM}.safetensors",
                    lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        for twin in folder.glob(f"{self.STEM}*.fp16*"):                  # of the weights that were here before
            twin.unlink()
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        write_whole(folder / "config.json", lambda path: Path(path).write_text(text))


def write_whole(path, write):
    """Call write(temporary path) and rename: a reader, or an interrupted run, never sees half a file."""
    beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        write(beside)
        beside.chmod(0o644)                                           # safetensors makes files for the owner alone
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def weight_files(folder, stem, dtype=torch.float32):
    """The safetensors files of a checkpoint folder: the full-precision file or shards, or the .fp16 twin where
    a 16-bit dtype is wanted or nothing else is there. Raises CheckpointError if there are none."""
    folder = Path(folder)
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors.index.json"]
    for name in full + half if dtype == torch.float32 else half + full:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".json"):
            return [folder / name]
        try:
            shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{folder / name}: not a shard index") from None
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
                raise CheckpointError(f"{folder / name}: shard {shard!r} is missing")
        return [folder / shard for shard in shards]
    raise CheckpointError(f"{folder}: no {full[0]} in it")


# ---------------------------------------------------------------------------------------------------------
# The model


@dataclass
class Config(JsonConfig):
    block_out_channels: tuple = (128, 256, 256, 512, 768)     # one per level, finest first
    layers_per_block: int = 2
    latent_channels: int = 64
    vq_embed_dim: int | None = None                           # None: latent_channels
    num_vq_embeddings: int = 8192                             # V
    norm_num_groups: int = 32
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple = ()                              # one DownEncoderBlock2D per level
    up_block_types: tuple = ()

    FIXED = dict(_class_name="VQModel", act_fn="silu", norm_type="group", mid_block_add_attention=False,
                 lookup_from_codebook=True)
    IGNORED = frozenset({"_diffusers_version", "_name_or_path", "sample_size", "scaling_factor", "force_upcast"})

    def __post_init__(self):
        levels = len(self.block_out_channels)
        self.down_block_types = tuple(self.down_block_types) or ("DownEncoderBlock2D",) * levels
        self.up_block_types = tuple(self.up_block_types) or ("UpDecoderBlock2D",) * levels
        if set(self.down_block_types) != {"DownEncoderBlock2D"} or set(self.up_block_types) != {"UpDecoderBlock2D"} \
                or not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise CheckpointError("VQ config: only DownEncoderBlock2D and UpDecoderBlock2D, one per level")

    @property
    def f(self):
        return 2 ** (len(self.block_out_channels) - 1)


def norm_silu_conv(norm, conv, x):
    """conv(silu(norm(x))), a group norm and a 3x3 convolution. The norm's mean and spread are those of the whole map."""
    if not large(x):
        return conv(F.silu(norm(x)))
    var, mean = torch.var_mean(x.unflatten(1, (norm.num_groups, -1)), (2, 3, 4), correction=0)     # (B, groups)
    apart = lambda y: y.float().repeat_interleave(x.shape[1] // norm.num_groups, 1)[..., None, None]        # (B, c, 1, 1)
    scale = apart((var.float() + norm.eps).rsqrt()) * norm.weight.float()[:, None, None]
    shift = norm.bias.float()[:, None, None] - apart(mean) * scale
    return in_strips(lambda y: conv(F.silu(torch.addcmul(shift, y.float(), scale), inplace=True).to(x.dtype)), x)


STRIP = 2 ** 24                                               # numbers of a map that are worked on at a time


def large(x):
    """Whether a map (B, c, H, W) is gone through in strips: at 1024 pixels each of the published decoder's last maps
    has 2 ** 28 numbers, and the norm, its activation and the convolution would each hold one more."""
    return x.numel() > STRIP and not torch.is_grad_enabled()


def in_strips(function, x):
    """function(x), a convolution of 3 rows at most whose borders are zeros, some rows at a time: a row of
    neighbours on each side is taken along, and what it gives is thrown away."""
    height, whole = x.shape[2], None
    rows = max(1, STRIP * height // x.numel())
    for top in range(0, height, rows):
        first, last = max(top - 1, 0), min(top + rows + 1, height)
        y = function(x[:, :, first:last])
        times = y.shape[2] // (last - first)                                                       # 2 where it enlarges
        y = y[:, :, (top - first) * times:(min(top + rows, height) - first) * times]
        if whole is None:
            whole = y.new_empty(*y.shape[:2], height * times, y.shape[3])
        whole[:, :, top * times:top * times + y.shape[2]] = y
    return whole


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):                                     # (B, c_in, H, W) -> (B, c_out, H, W)
        y = norm_silu_conv(self.norm1, self.conv1, x)
        y = norm_silu_conv(self.norm2, self.conv2, y)
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Resample(nn.Module):
    """Halve (stride 2 after one row of zeros below and one column right) or double (nearest neighbour)."""
    def __init__(self, c, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(c, c, 3, stride=2) if down else nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):                                     # (B, c, H, W) -> (B, c, H/2, W/2) or (B, c, 2H, 2W)
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        double = lambda x: self.conv(F.interpolate(x, scale_factor=2.0))
        return in_strips(double, x) if large(x) else double(x)


class Level(nn.Module):
    def __init__(self, c_in, c_out, layers, groups, resample=None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        if resample:
            setattr(self, f"{resample}samplers", nn.ModuleList([Resample(c_out, resample == "down")]))

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for resample in getattr(self, "downsamplers", getattr(self, "upsamplers", ())):
            x = resample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        widths, last = c.block_out_channels, c.block_out_channels[-1]
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, c.layers_per_block, c.norm_num_groups, "down" if i < len(widths) - 1 else None)
            for i, w in enumerate(widths))
        self.mid_block = Level(last, last, 2, c.norm_num_groups)
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, c.latent_channels, 3, padding=1)

    def forward(self, x):                                     # (B, 3, H, W) -> (B, latent, h, w)
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, self.mid_block(x))


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        widths = c.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Level(widths[0], widths[0], 2, c.norm_num_groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, c.layers_per_block + 1, c.norm_num_groups, "up" if i < len(widths) - 1 else None)
            for i, w in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, x):                                     # (B, latent, h, w) -> (B, 3, H, W)
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class Quantizer(nn.Module):
    def __init__(self, entries, size):
        super().__init__()
        self.embedding = nn.Embedding(entries, size)

    def nearest(self, z, chunk=8192):
        """(M, E) vectors -> (M,) int64: the nearest codebook entry in Euclidean distance, computed in float32
        (|z - e|^2 less |z|^2, which is the same for every e); `chunk` rows at a time bound the memory."""
        book = self.embedding.weight.float()                                         # (V, E)
        bias = book.square().sum(-1)                                                 # (V,)
        return torch.cat([torch.addmm(bias, part.float(), book.t(), alpha=-2).argmin(-1) for part in z.split(chunk)])


class VQModel(Pretrained):
    CONFIG = Config

    def __init__(self, config: Config):
        super().__init__(config)
        size = config.vq_embed_dim or config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, size, 1)
        self.quantize = Quantizer(config.num_vq_embeddings, size)
        self.post_quant_conv = nn.Conv2d(size, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def latent(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, E, h, w), before quantisation. Raises ValueError if f does not divide H, W."""
        if images.shape[-1] % self.config.f or images.shape[-2] % self.config.f:
            raise ValueError(f"{images.shape[-1]}x{images.shape[-2]} pixels do not divide by {self.config.f}")
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    def tokens_of(self, latent):
        """(B, E, h, w) -> (B, h, w) int64."""
        b, e, h, w = latent.shape
        return self.quantize.nearest(latent.permute(0, 2, 3, 1).reshape(-1, e)).view(b, h, w)

    def vectors_of(self, tokens):
        """(B, h, w) int64 -> (B, E, h, w) codebook vectors."""
        return self.quantize.embedding(tokens).permute(0, 3, 1, 2)

    def pixels(self, vectors):
        """(B, E, h, w) -> (B, 3, H, W), not clipped."""
        return self.decoder(self.post_quant_conv(vectors))

    def encode(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, h, w) int64 tokens."""
        return self.tokens_of(self.latent(images))

    def decode(self, tokens):
        """(B, h, w) int64 -> (B, 3, H, W) in the model's dtype, about [0, 1] but not clipped."""
        return self.pixels(self.vectors_of(tokens))
