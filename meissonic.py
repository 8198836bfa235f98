"""Meissonic: a multi-modal transformer that fills in masked image tokens (ICLR 2025; sections are the paper's).

    model = Transformer.from_pretrained("weights/shapes/transformer")
    logits = model(tokens, hidden, pooled, micro_conds, timestep)                # one pass
    masked = torch.full((1, 16, 16), model.config.mask_token)
    tokens = sample(model, text, negative, masked, seeds=[0], steps=16, guidance=3.0)    # text, negative: Text

Read it top to bottom: config, small modules, the two kinds of block, the whole model, then sampling, of which
the schedule (`masked_counts`), the guidance (`guided`) and the loop (`sample`) can each be replaced alone.

Letters: B batch, h w tokens, N image positions that the blocks see (h w, or h w / 4 behind the compression),
L text positions, S = L + N, C width, H heads, D head size, V codebook entries, M masked positions.
"""
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import kernels
from vq import CheckpointError, JsonConfig, Pretrained, write_whole

# ---------------------------------------------------------------------------------------------------------
# Config and small modules


@dataclass
class Config(JsonConfig):
    num_layers: int = 14                          # multi-modal blocks
    num_single_layers: int = 28                   # single-modal blocks
    num_attention_heads: int = 8                  # H
    attention_head_dim: int = 128                 # D
    joint_attention_dim: int = 1024               # width of the text encoder's hidden states
    pooled_projection_dim: int = 1024             # width of its pooled output; must equal C
    axes_dims_rope: tuple = (16, 56, 56)          # dimensions of a head that see (nothing, row, column)
    codebook_size: int = 8192                     # V
    vocab_size: int = 8256                        # codes and special tokens; the last one is the mask
    downsample: bool = True                       # compression layers around the blocks
    upsample: bool = True
    without: tuple = ()                           # ours, for ablations: of rope, rate, qk-norm, micro

    FIXED = dict(_class_name="Transformer2DModel", patch_size=1, guidance_embeds=False)
    IGNORED = frozenset({"_diffusers_version", "_name_or_path", "in_channels"})

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise CheckpointError(f"axes_dims_rope {self.axes_dims_rope} must be even and sum to "
                                  f"attention_head_dim {self.attention_head_dim}")
        if self.pooled_projection_dim != self.width:
            raise CheckpointError(f"pooled_projection_dim {self.pooled_projection_dim} must equal the width {self.width}")
        if self.downsample != self.upsample:
            raise CheckpointError("downsample and upsample must be both true or both false")
        if unknown := set(self.without) - {"rope", "rate", "qk-norm", "micro"}:
            raise CheckpointError(f"without {sorted(unknown)} is unknown")
        if self.vocab_size <= self.codebook_size:
            raise CheckpointError("vocab_size must exceed codebook_size: its last entry is the mask token")

    def to_dict(self):
        values = super().to_dict()
        return values if self.without else {k: v for k, v in values.items() if k != "without"}     # the published keys

    @property
    def width(self):                              # C
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mask_token(self):
        return self.vocab_size - 1

    @property
    def compression(self):                        # tokens per block position, along each side
        return 2 if self.downsample else 1


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class Pointwise(nn.Module):
    """A 1x1 convolution without bias, on the last axis; the weight keeps the published shape (out, in, 1, 1)."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(c_in, c_out).weight[:, :, None, None].detach().clone())

    def forward(self, x):                                                          # (..., c_in) -> (..., c_out)
        return F.linear(x, self.weight[:, :, 0, 0])


class MLP(nn.Module):
    """linear, SiLU, linear."""
    def __init__(self, c_in, c_out, bias):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out, bias)
        self.linear_2 = nn.Linear(c_out, c_out, bias)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class Linear8(nn.Module):
    """A linear layer in 8 bits, for sampling: kernels.linear8. `dtype` int8 or float8_e4m3fn."""
    def __init__(self, linear, dtype, device):
        super().__init__()
        weight, self.scale = kernels.round8(linear.weight.to(device), dtype)
        self.weight, self.bias = weight, None if linear.bias is None else linear.bias.to(device)

    def forward(self, x):
        return kernels.linear8(x, self.weight, self.scale, self.bias)


def gelu(x):
    """The tanh-approximate GELU. Compiled, as x sigmoid(2 u), which is the same as x (1 + tanh(u)) / 2: forward and backward
    on a CPU in 0.45 of the time."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3))
    return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """linear to 4C, tanh-GELU, linear; `net` has the published places (0.proj, 1 a dropout, 2)."""
    def __init__(self, c):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(c, 4 * c)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * c, c)])

    def forward(self, x):
        return self.net[2](gelu(self.net[0].proj(x)))


@lru_cache(maxsize=16)
def frequencies(device):
    """(128,) float32: 10000^(-i / 128). The exponents are those of float32, as in the official code; its exp is not, for that
    differs in the last place from one processor to the next, which is 0.004 rad at the timesteps of 64 steps, up to 63,000."""
    return (-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).double().exp().float().to(device)


def sin256(x):
    """Sinusoidal embedding of scalars: (...,) -> (..., 256) float32, 128 cosines then 128 sines."""
    angles = x.float()[..., None] * frequencies(x.device)
    return torch.cat((angles.cos(), angles.sin()), -1)


@lru_cache(maxsize=16)
def rope_table(h, w, axes, device):
    """cos, sin (h * w, D / 2) float32 for image positions (0, row, column), theta 10000, angles in float64.
    NOTE the paper speaks of 1-D RoPE; the released weights use these three axes."""
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w)).double()        # (N, 3)
    angles = [ids[:, i, None] / 10000 ** (torch.arange(0, d, 2, dtype=torch.float64) / d) for i, d in enumerate(axes)]
    angles = torch.cat(angles, 1)                                                                  # (N, D / 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def gated(x, gate, y):
    """x + gate * y, x and y (B, S, C), gate (B, C); float16 residual streams are kept finite."""
    x = x + gate[:, None] * y
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


# ---------------------------------------------------------------------------------------------------------
# Blocks. Their attention is kernels.attention on q, k, v packed in one projection; their adaptive norms, a
# LayerNorm without weights, then * (1 + scale) + shift, are kernels.norm_modulate, alone or after the residual.


class AdaNorm(nn.Module):
    """linear(SiLU(temb)) in `parts` pieces of width C: shift, scale, gate, and in multi-modal blocks the MLP's.
    Sampling makes the pieces of all steps beforehand, `Transformer.modulations`, and gives them in temb's place."""
    def __init__(self, c, parts):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(c, parts * c)

    def forward(self, temb):                      # (B, C), or the pieces side by side (B, parts C) -> parts x (B, C)
        made = temb if temb.shape[-1] == self.linear.out_features else self.make(F.silu(temb))
        return made.chunk(self.parts, -1)

    def make(self, x):                            # the weights may lie on the host, see Transformer
        return F.linear(x, self.linear.weight.to(x.device), self.linear.bias.to(x.device))


def qk_norm(c: Config):
    """The norm of q or k; the attention kernel applies it."""
    norm = RMSNorm(c.attention_head_dim)
    if "qk-norm" in c.without:
        norm.weight = None
    return norm


class JointAttention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        width, self.heads = c.width, c.num_attention_heads
        self.qkv, self.add_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)          # image, text
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (qk_norm(c) for _ in range(4))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(self, x, text, rope):                               # (B, N, C), (B, L, C) -> the same
        split = lambda y: y.unflatten(-1, (3, self.heads, -1))                                     # (B, S, 3, H, D)
        y = kernels.attention(split(self.add_qkv(text)), split(self.qkv(x)),
                              (self.norm_added_q.weight, self.norm_added_k.weight),
                              (self.norm_q.weight, self.norm_k.weight), *rope)                     # (B, L + N, C)
        text, x = y.split((text.shape[1], x.shape[1]), 1)
        return self.to_out[0](x), self.to_add_out(text)


class MultiModalBlock(nn.Module):
    """Two streams, image x and text, each with its own weights, that meet in the attention."""
    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm1_context = AdaNorm(c.width, 6), AdaNorm(c.width, 6)
        self.attn = JointAttention(c)
        self.ff, self.ff_context = FeedForward(c.width), FeedForward(c.width)

    def forward(self, x, text, temb, text_temb, rope):              # (B, N, C), (B, L, C), see AdaNorm -> x, text
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(temb)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = self.norm1_context(text_temb)
        y, t = self.attn(kernels.norm_modulate(x, shift, scale), kernels.norm_modulate(text, t_shift, t_scale), rope)
        x, y = kernels.residual_norm_modulate(x, gate, y, mlp_shift, mlp_scale)
        text, t = kernels.residual_norm_modulate(text, t_gate, t, t_mlp_shift, t_mlp_scale)
        return gated(x, mlp_gate, self.ff(y)), gated(text, t_mlp_gate, self.ff_context(t))


class SingleBlock(nn.Module):
    """One stream [text ; image]; attention and MLP side by side, from one packed projection to one projection."""
    def __init__(self, c: Config):
        super().__init__()
        width, self.heads = c.width, c.num_attention_heads
        self.norm = AdaNorm(width, 3)
        self.qkv_mlp = nn.Linear(width, 7 * width)                                                 # q, k, v, 4C
        self.attn = nn.Module()
        self.attn.norm_q, self.attn.norm_k = qk_norm(c), qk_norm(c)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, s, length, temb, rope):                       # (B, S, C), text rows L, see AdaNorm -> (B, S, C)
        shift, scale, gate = self.norm(temb)
        qkv, mlp = self.qkv_mlp(kernels.norm_modulate(s, shift, scale)).split((3 * s.shape[-1], 4 * s.shape[-1]), -1)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))                                               # (B, S, 3, H, D)
        norms = self.attn.norm_q.weight, self.attn.norm_k.weight
        y = kernels.attention(qkv[:, :length], qkv[:, length:], norms, norms, *rope)               # (B, S, C)
        return gated(s, gate, self.proj_out(torch.cat((y, gelu(mlp)), -1)))


# ---------------------------------------------------------------------------------------------------------
# The whole model


class Transformer(Pretrained):
    """For sampling its adaptive norms, a quarter of its weights that are read once for a picture, may stay on the host:
    `from_pretrained(..., host=Transformer.ADAPTIVE)`."""
    CONFIG = Config
    ADAPTIVE = (".norm.linear.", ".norm1.linear.", ".norm1_context.linear.")
    PACKED = {"attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
              "attn.add_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
              "qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}

    def __init__(self, config: Config):
        super().__init__(config)
        c, width = config, config.width
        named = lambda **parts: nn.ModuleDict(parts)                    # groups of modules under published names
        self.embed = named(embeddings=nn.Embedding(c.vocab_size, width), layer_norm=RMSNorm(width),
                           conv=Pointwise(width, width))
        if c.downsample:
            self.down_block = named(downsample=named(norm=RMSNorm(width), conv=nn.Conv2d(width, width, 2, 2, bias=False)))
            self.up_block = named(upsample=named(norm=RMSNorm(width),
                                                 conv=nn.ConvTranspose2d(width, width, 2, 2, bias=False)))
        if "rope" in c.without:
            self.positions = nn.Parameter(torch.zeros(2, 64, width))              # learned: of rows, of columns
        self.project_to_hidden_norm = RMSNorm(width)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.context_embedder = nn.Linear(c.joint_attention_dim, width)
        self.encoder_proj_layer_norm = RMSNorm(width)
        self.cond_embed = MLP(c.pooled_projection_dim + 5 * 256, width, bias=False)
        self.time_text_embed = named(timestep_embedder=MLP(256, width, bias=True), text_embedder=MLP(width, width, bias=True))
        self.transformer_blocks = nn.ModuleList(MultiModalBlock(c) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.num_single_layers))
        self.project_from_hidden_norm = RMSNorm(width)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        self.mlm_layer = named(conv1=Pointwise(width, width), layer_norm=RMSNorm(width),
                               conv2=Pointwise(width, c.codebook_size))
        self.checkpointing = False                                                # recompute blocks in the backward pass
        self.recorded = {}                                                        # see `launch`

    def lean(self, device, rounded=None):
        """Move to `device`, in place, all but the adaptive norms, the blocks' other linear layers rounded on the way
        to int8 or float8_e4m3fn if that is asked for: what they were is never there. -> self"""
        norms = {id(norm.linear) for norm in self.norms()}
        for parent in [m for block in self.blocks for m in block.modules()]:
            for name, child in parent.named_children():
                if rounded and isinstance(child, nn.Linear) and id(child) not in norms:
                    setattr(parent, name, Linear8(child, rounded, device))
        for module in self.modules():
            if id(module) not in norms:
                for name, value in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(value.to(device), requires_grad=False))
        return self

    def conditioning(self, pooled, micro_conds, timestep):
        """pooled (B, C), micro_conds (B, 5) = width, height, crop top, crop left, score; timestep (B,) or (1,)
        -> temb (B, C)."""
        return self.embed_time(timestep, pooled.dtype) + self.embed_prompt(pooled, micro_conds)

    def embed_prompt(self, pooled, micro_conds):
        """(B, C), (B, 5) -> (B, C), what temb has from the prompt."""
        micro_conds = micro_conds * 0 if "micro" in self.config.without else micro_conds
        cond = torch.cat((pooled, sin256(micro_conds).flatten(1).to(pooled.dtype)), -1)
        return self.time_text_embed.text_embedder(self.cond_embed(cond))

    def embed_time(self, timestep, dtype):
        """(B,), multiplied by 1000 here -> (B, C), what temb has from the masking rate."""
        timestep = timestep * 0 if "rate" in self.config.without else timestep
        return self.time_text_embed.timestep_embedder(sin256(1000 * timestep.float()).to(dtype))

    def embed_image(self, tokens):
        """(B, h, w) -> (B, N, C) and the grid that the blocks see. Raises ValueError for a grid that does not divide."""
        h, w = tokens.shape[1:]
        if h % self.config.compression or w % self.config.compression:
            raise ValueError(f"a grid of {h}x{w} tokens does not divide by the compression, {self.config.compression}")
        x = self.embed.conv(self.embed.layer_norm(self.embed.embeddings(tokens)))                  # (B, h, w, C)
        if self.config.downsample:
            down = self.down_block.downsample
            x = down.conv(down.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)                    # (B, h/2, w/2, C)
        grid = x.shape[1:3]
        if "rope" in self.config.without:
            x = x + self.positions[0, :grid[0], None] + self.positions[1, :grid[1]]
        return self.project_to_hidden(self.project_to_hidden_norm(x.flatten(1, 2))), grid

    def embed_text(self, hidden):
        """(B, L, text width) -> (B, L, C)."""
        return self.encoder_proj_layer_norm(self.context_embedder(hidden))

    @property
    def blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def norms(self):
        return [m for m in self.modules() if isinstance(m, AdaNorm)]

    def modulations(self, temb):
        """(..., C) -> (..., W): what each adaptive norm makes of temb, side by side; written in place, as they are large."""
        norms, x = self.norms(), F.silu(temb)
        made = x.new_empty(*x.shape[:-1], sum(norm.linear.out_features for norm in norms))
        for norm, part in zip(norms, self.parted(made)):
            part.copy_(norm.make(x))
        return made

    def parted(self, made):
        """(..., W) of `modulations` -> a view of it for each adaptive norm, in the order in which the blocks meet them."""
        return made.split([norm.linear.out_features for norm in self.norms()], -1)

    def features(self, tokens, hidden, pooled, micro_conds, timestep):
        """Everything but the head -> (B, h, w, C)."""
        return self.run(tokens, self.embed_text(hidden), self.conditioning(pooled, micro_conds, timestep))

    def launch(self, tokens, text, made):
        """`run`, made (B, W) of `modulations`; on CUDA recorded once for each shape and launched as one graph."""
        if not tokens.is_cuda:
            return self.run(tokens, text, made)
        shapes = tokens.shape, text.shape
        if shapes not in self.recorded:
            if len(self.recorded) == 2:                                           # drawing and judging; their memory first
                self.recorded.clear()
            self.recorded[shapes] = Graph(self.run, tokens, text, made)
        return self.recorded[shapes](tokens, text, made)

    def run(self, tokens, text, temb):
        """`features` of what is prepared: text (B, L, C) of embed_text, temb (B, C), or (B, W) of `modulations`."""
        x, grid = self.embed_image(tokens)                                                         # (B, N, C)
        rope = rope_table(*grid, self.config.axes_dims_rope, x.device)
        if "rope" in self.config.without:
            rope = torch.ones_like(rope[0]), torch.zeros_like(rope[1])
        run = partial(checkpoint, use_reentrant=False) if self.checkpointing else lambda block, *x: block(*x)
        given = repeat(temb) if temb.shape[-1] == self.config.width else iter(self.parted(temb))  # for each adaptive norm
        for block in self.transformer_blocks:
            x, text = run(block, x, text, next(given), next(given), rope)
        s = torch.cat((text, x), 1)                                                                # (B, S, C)
        for block in self.single_transformer_blocks:
            s = run(block, s, text.shape[1], next(given), rope)
        x = self.project_from_hidden(self.project_from_hidden_norm(s[:, text.shape[1]:]))          # (B, N, C)
        x = x.unflatten(1, grid)
        if self.config.upsample:
            up = self.up_block.upsample
            x = up.conv(up.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)                        # (B, h, w, C)
        return x

    def head_features(self, x):
        """(..., C) -> (..., C): the head but for its last projection."""
        return self.mlm_layer.layer_norm(self.mlm_layer.conv1(x))

    def head(self, x):
        """(..., C) -> logits (..., V)."""
        return self.mlm_layer.conv2(self.head_features(x))

    def forward(self, tokens, hidden, pooled, micro_conds, timestep):
        """tokens (B, h, w) int64, config.mask_token where unknown; hidden (B, L, text width); pooled (B, C);
        micro_conds (B, 5); timestep (B,) or (1,) -> logits (B, h, w, V)."""
        return self.head(self.features(tokens, hidden, pooled, micro_conds, timestep))


# ---------------------------------------------------------------------------------------------------------
# LoRA (Hu et al. 2021): W + B A, of rank r, on the projections of the blocks. Files have the public names and PEFT's
# suffixes, so that other tools read them, and theirs are read here


class LowRank(nn.Module):
    """The parametrisation W -> W + B A with A (r, in), B (out, r); B starts at zero."""
    def __init__(self, weight, rank):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight):
        return weight + (self.B @ self.A).to(weight.dtype)


def add_lora(model, rank):
    """Give each linear layer of the blocks' attention and MLPs a trainable low-rank term, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".norm" not in name and "transformer_blocks." in name:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def save_lora(path, model, state):
    """Write the low-rank terms of a state dict of `model` to one safetensors file, packed projections split."""
    plain, tensors = published_rows(model), {}
    for name, b in state.items():
        if name.endswith(".parametrizations.weight.0.B"):
            module = name.removesuffix(".parametrizations.weight.0.B")
            for public, rows in plain[module + ".weight"]:
                stem = "transformer." + public.removesuffix(".weight")
                tensors[stem + ".lora_A.weight"] = state[name[:-1] + "A"].clone()
                tensors[stem + ".lora_B.weight"] = b[rows].contiguous()
    write_whole(path, lambda beside: save_file(tensors, beside, metadata={"format": "pt"}))


@torch.no_grad()
def merge_lora(model, path):
    """Add a LoRA file's terms to the weights, in place: the merged model is as fast as the plain one. A term's scale
    is alpha / r where the file has `alpha`, else 1. Raises CheckpointError for a file that is none or does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = {k.removeprefix("transformer."): file.get_tensor(k) for k in file.keys()}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a LoRA file ({e})") from None
    where = {public: (name, rows) for name, parts in published_rows(model).items() for public, rows in parts}
    stems = {k.removesuffix(f".lora_{ab}.weight") for k in stored for ab in "AB" if k.endswith(f".lora_{ab}.weight")}
    if not stems or (extra := set(stored) - {f"{s}.{end}" for s in stems for end in ("lora_A.weight", "lora_B.weight", "alpha")}):
        raise CheckpointError(f"{path}: not a LoRA file" + (f"; unknown: {min(extra)}" if stems else ""))
    for stem in sorted(stems):
        a, b = stored.get(stem + ".lora_A.weight"), stored.get(stem + ".lora_B.weight")
        if stem + ".weight" not in where or a is None or b is None:
            raise CheckpointError(f"{path}: {stem} has no counterpart in this model")
        name, rows = where[stem + ".weight"]
        weight = model.get_parameter(name)[rows]
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise CheckpointError(f"{path}: {stem} has shapes {tuple(b.shape)}, {tuple(a.shape)}, made for another model")
        scale = float(stored.get(stem + ".alpha", a.shape[0])) / a.shape[0]
        weight += (scale * b.float() @ a.float()).to(weight)


def published_rows(model):
    """{our weight's name: [(published name, its rows)]} of the plain model, LoRA or not."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    table = {}
    for name, parts in plain.published().items():
        if name.endswith(".weight"):
            sizes = plain.split_sizes(name, len(parts)) if len(parts) > 1 else [plain.state_dict()[name].shape[0]]
            ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
            table[name] = [(part, slice(end - size, end)) for part, size, end in zip(parts, sizes, ends)]
    return table


# ---------------------------------------------------------------------------------------------------------
# Sampling (section 2.2 and MaskGIT, Chang et al. 2022)


REDRAWN = 0.25                                    # share of the tokens that a redraw masks again


def masked_counts(steps, tokens, schedule="cosine"):
    """Tokens still masked after each step: floor(tokens * cos(pi/2 (i+1)/steps)), or falling linearly, but at
    least one revealed by every step and none masked after the last. -> list of `steps` ints.
    NOTE with more steps than tokens the list ends in zeros; the official code idles with one token masked.
    Raises ValueError for steps or tokens < 1 or an unknown schedule."""
    if steps < 1 or tokens < 1:
        raise ValueError(f"steps ({steps}) and tokens ({tokens}) must be at least 1")
    if schedule not in ("cosine", "linear"):
        raise ValueError(f"unknown schedule {schedule!r}: cosine or linear")
    counts, masked = [], tokens
    for i in range(1, steps + 1):
        angle = torch.tensor(math.pi / 2 * (i / steps))               # float32, as the official code: floor is sharp
        share = float(angle.cos()) if schedule == "cosine" else 1 - i / steps
        rest = max(math.floor(tokens * share), steps - i) if i < steps else 0     # one token for each step to come
        masked = max(min(rest, masked - 1), 0)
        counts.append(masked)
    return counts


def timestep(convention, step, steps, masked, tokens):
    """The model's masking-rate condition before step `step` of `steps`, with `masked` of `tokens` unknown.
    step      the step index counted down: how the public weights are sampled
    rate      the masking rate in 1000 levels: the paper's, and ours for models trained here
    rate1000  1000 times the rate: the official training script"""
    if convention == "step":
        return float(steps - 1 - step)
    rate = round(1000 * masked / tokens)
    return {"rate": rate / 1000, "rate1000": float(rate)}[convention]


@dataclass
class Text:
    """What the transformer is told: hidden (B, L, D), pooled (B, C), micro_conds (B, 5)."""
    hidden: torch.Tensor
    pooled: torch.Tensor
    micro_conds: torch.Tensor

    def rows(self, index):
        return Text(*(x[index] for x in vars(self).values()))


def guide(c, u, scale):
    """Classifier-free guidance, of logits or, as the head's last projection is linear, of what it projects."""
    return u + scale * (c - u)


def plain_path(model, text, negative, times, guidance):
    """A step as the paper writes it, to be read and to be held against: both passes whole, guidance of the logits
    of all positions -> function (step, tokens (B, h, w), positions (B, M)) -> logits (B, M, V)."""
    def logits(i, tokens, positions):
        time = torch.full((1,), times[i], device=tokens.device)
        x = model(tokens, text.hidden, text.pooled, text.micro_conds, time)                        # (B, h, w, V)
        if guidance != 1:
            x = guide(x, model(tokens, negative.hidden, negative.pooled, negative.micro_conds, time), guidance)
        return pick(x, positions)
    return logits


def fast_path(model, text, negative, times, guidance):
    """The same, faster: what steps share is made once, both passes run as one batch, on CUDA as one launch; the head
    sees the masked positions alone, its last projection after the guidance -> function (step, tokens (B, h, w),
    positions (B, M)) -> what that projection takes, (B, M, C)."""
    passes = 1 if guidance == 1 else 2
    both = text if guidance == 1 else Text(*map(torch.cat, zip(vars(text).values(), vars(negative).values())))
    words, made = model.embed_text(both.hidden), made_once(model, both, times)                     # (2B, L, C), (T, 2B, W)
    def features(i, tokens, positions):
        x = model.launch(tokens.repeat(passes, 1, 1), words, made[i])                              # (2B, h, w, C)
        x = model.head_features(pick(x, positions.repeat(passes, 1)))                              # (2B, M, C)
        return x if guidance == 1 else guide(*x.chunk(2), guidance)
    return features


def pick(x, positions):
    """Rows of (B, h, w, C) at positions (B, M) of the flat grid -> (B, M, C)."""
    return x.flatten(1, 2).gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def made_once(model, text, times):
    """The modulations of all steps -> (T, B, W). They depend on the prompt and the step alone, so that the weights
    behind them, a quarter of the model, are read once for a picture and not in each step."""
    time = model.embed_time(torch.tensor(times, device=text.pooled.device), text.pooled.dtype)     # (T, C)
    return model.modulations(time[:, None] + model.embed_prompt(text.pooled, text.micro_conds))


class Graph:
    """A function of tensors whose kernels are recorded and then launched as one: the host, which needs about 5
    microseconds for each of some 600 kernels, is out of the way. Results are overwritten by the next call."""
    def __init__(self, function, *inputs):
        self.inputs, self.graph, side = [x.clone() for x in inputs], torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                             # kernels are compiled and tables filled before, not inside
            function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, stream=side):
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for mine, x in zip(self.inputs, inputs):
            mine.copy_(x)
        self.graph.replay()
        return self.output


@torch.no_grad()
def sample(model, text, negative, tokens, seeds, steps, guidance=9.0, temperature=(2.0, 0.0), schedule="cosine",
           convention="step", redraws=0, progress=iter, watch=None, plain=False):
    """Fill in the masked tokens.

    tokens (B, h, w) int64     config.mask_token where unknown, the same number in each picture of the batch;
                               known tokens never change
    seeds (B,) ints            one for each picture: it depends on its own seed and text alone
    temperature                of the Gumbel noise on the confidences, from the first step to the last
    redraws                    how often, once all is known, REDRAWN of it at random is masked again and the last steps are
                               repeated: what was drawn early then fits what came late (remasking, Wang et al. 2025)
    progress                   wraps the range of steps, e.g. tqdm
    watch                      called as watch(n, believed (B, h, w), masked (B, h, w) bool) for n = 0, 1, ...: what was
                               unknown before the nth step, and the picture with a draw for it; at the end nothing is
    plain                      plain_path in place of fast_path: the same picture, but for rounding
    -> (B, h, w) int64
    """
    shape, flat = tokens.shape, tokens.flatten(1).clone()                                          # (B, h w)
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=flat.device)
    unknown = flat == model.config.mask_token
    if len(set(unknown.sum(1).tolist())) != 1:
        raise ValueError("the pictures of a batch must have equally many masked tokens")
    drawn_here = positions = unknown.nonzero()[:, 1].view(len(flat), -1)                           # (B, M)
    counts = masked_counts(steps, positions.shape[1], schedule) if positions.numel() else []
    masked = [m for m in (positions.shape[1], *counts[:-1]) if m]             # before each step; none are idle ones
    times = [timestep(convention, i, steps, m, flat.shape[1]) for i, m in enumerate(masked)]
    back = next((i for i, m in enumerate(masked) if m <= REDRAWN * masked[0]), len(masked) - 1)
    order = [*range(len(masked)), *list(range(back, len(masked))) * redraws]
    look = (plain_path if plain else fast_path)(model, text, negative, times, guidance)
    weight = model.mlm_layer.conv2.weight.flatten(1)                                               # (V, C)
    for n in progress(range(len(order))):
        i = order[n]
        if n >= len(masked) and i == back:
            chance = kernels.confidence_noise(seeds, len(order) + n, drawn_here)                   # (B, M)
            positions = kernels.remask(drawn_here, 0, chance, 1, masked[i])                        # (B, masked[i])
            flat.scatter_(1, positions, model.config.mask_token)
        x = look(i, flat.view(shape), positions)                                                   # (B, M, V or C)
        drawn, logp = kernels.sample_masked(x, positions, seeds, n) if plain else \
            kernels.sample_from_head(x, weight, positions, seeds, n)                               # (B, M) twice
        heat = temperature[0] + (temperature[1] - temperature[0]) * i / max(steps - 1, 1)
        noise = kernels.confidence_noise(seeds, n, positions)
        unknown = flat == model.config.mask_token
        flat.scatter_(1, positions, drawn)
        if watch:
            watch(n, flat.view(shape).clone(), unknown.view(shape))
        positions = kernels.remask(positions, logp, noise, heat, counts[i])                        # (B, counts[i])
        flat.scatter_(1, positions, model.config.mask_token)
    for n in range(len(order), max(steps, len(order)) + 1) if watch else ():     # the end, and the idle steps before it
        watch(n, flat.view(shape), torch.zeros_like(unknown).view(shape))
    return flat.view(shape)


@torch.no_grad()
def likelihoods(model, tokens, texts, rates, convention="step"):
    """How likely the tokens of a picture are under each of some captions: the mean of log p(token | visible, text), in
    nats, over one random masking of each rate, the same for all pictures, for all texts and in every call. Where most is
    masked the caption speaks, where less is the neighbours do.
    tokens (B, h, w) int64, all known; texts, Texts of B rows each -> (len(texts), B, h, w) float32, 0 where never masked"""
    flat, generator, means = tokens.flatten(1), torch.Generator().manual_seed(0), []               # (B, h w)
    weight = model.mlm_layer.conv2.weight.flatten(1)                                               # (V, C)
    numbers = [max(1, round(rate * flat.shape[1])) for rate in rates]
    places = [torch.randperm(flat.shape[1], generator=generator)[:n].to(flat.device).expand(len(flat), -1) for n in numbers]
    steps = [min(round(48 * 2 / math.pi * math.acos(rate)), 47) for rate in rates]                 # of 48, those that meet these rates
    times = [timestep(convention, step, 48, n, flat.shape[1]) for step, n in zip(steps, numbers)]
    for text in texts:
        look = fast_path(model, text, None, times, 1)
        total = torch.zeros(flat.shape, device=flat.device)
        seen = total.clone()
        for i, positions in enumerate(places):                                                     # (B, M)
            hidden = flat.scatter(1, positions, model.config.mask_token).view(tokens.shape)
            logp = F.linear(look(i, hidden, positions), weight).float().log_softmax(-1)            # (B, M, V)
            total.scatter_add_(1, positions, logp.gather(-1, flat.gather(1, positions)[..., None])[..., 0])
            seen.scatter_add_(1, positions, torch.ones_like(seen[:, :positions.shape[1]]))
        means.append(total / seen.clamp(min=1))
    return torch.stack(means).view(-1, *tokens.shape)


def opinion_change(model, tokens, old, new, convention="step"):
    """How much less likely each token of a picture becomes when the caption `old` (Text) gives way to `new`, in nats.
    With all masked alone a new ground shows, and no rate below finds it; the lower ones help where a shape changes.
    tokens (B, h, w) int64, all known -> (B, h, w) float32, smoothed over 5 x 5 tokens."""
    before, after = likelihoods(model, tokens, (old, new), (1.0, 0.95, 0.9, 0.85, 0.8, 0.75), convention)
    return F.avg_pool2d((before - after)[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
