"""Meissonic: masked image modelling with a multi-modal transformer (Bai et al., ICLR 2025).

    model = Transformer.from_pretrained("weights/shapes/transformer")
    schedule = Schedule.from_pretrained("weights/shapes/scheduler")
    ids = torch.full((1, 16, 16), model.config.mask_token)          # nothing is known yet
    plan = schedule.plan(num_masked=256, num_tokens=256)
    predict = reference_predictor(model, cond, uncond)              # engine.pipeline makes both
    ids = sample(predict, ids, model.config.mask_token, [0], plan)

Read it from top to bottom: config, small modules, the two kinds of block, the whole model, then
sampling: the mask schedule, guidance, the prediction and the loop. Sections are the paper's.

Letters: B batch, h w tokens along the sides, N = h w, P image positions that the blocks see (N, or
N / 4 behind the compression layers), L text positions, S = L + P, C width, H heads, D head size,
V codebook entries, M masked positions of a picture, T steps.
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from engine.checkpoint import (DEPTH, CheckpointError, Embedding, JsonConfig, Pretrained,
                               check_fields, read_json)
from kernels.sampling import BELOW_ONE, CONFIDENCE_NOISE, philox

# -------------------------------------------------------------------------------------------------
# Config and small modules


@dataclass
class Config(JsonConfig):
    num_layers: int = 14                        # multi-modal blocks
    num_single_layers: int = 28                 # single-modal blocks
    num_attention_heads: int = 8                # H
    attention_head_dim: int = 128               # D
    joint_attention_dim: int = 1024             # width of the text encoder's hidden states
    pooled_projection_dim: int = 1024           # width of its pooled output; must equal C
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # parts of D rotated by (nothing, row, column)
    codebook_size: int = 8192                   # V
    vocab_size: int = 8256                      # codes and special tokens; the last is the mask
    downsample: bool = True                     # compression layers before and after the blocks
    upsample: bool = True

    FIXED = dict(_class_name="Transformer2DModel", patch_size=1, guidance_embeds=False)
    IGNORED = frozenset({"_diffusers_version", "_name_or_path", "in_channels"})
    BOUNDS = dict(num_layers=DEPTH, num_single_layers=DEPTH, axes_dims_rope=(0, 2 ** 20))

    def __post_init__(self):
        super().__post_init__()
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(d % 2 for d in axes):
            raise CheckpointError(f"axes_dims_rope {axes} must be three even numbers that sum to "
                                  f"attention_head_dim {self.attention_head_dim}")
        if self.pooled_projection_dim != self.width:
            raise CheckpointError(f"pooled_projection_dim {self.pooled_projection_dim} must equal "
                                  f"the width {self.width}")
        if self.downsample != self.upsample:
            raise CheckpointError("downsample and upsample must be both true or both false")
        if self.vocab_size <= self.codebook_size:
            raise CheckpointError("vocab_size must exceed codebook_size: its last entry is the "
                                  "mask token")

    @property
    def width(self):                            # C
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mask_token(self):
        return self.vocab_size - 1

    @property
    def compression(self):                      # tokens per block position, along each side
        return 2 if self.downsample else 1


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class Conv1x1(nn.Module):
    """A 1x1 convolution without bias on the last axis. The weight has the published shape."""
    def __init__(self, c_in, c_out):
        super().__init__()
        weight = nn.Linear(c_in, c_out).weight.detach().clone()
        self.weight = nn.Parameter(weight[:, :, None, None])                 # (c_out, c_in, 1, 1)

    def forward(self, x):                                            # (..., c_in) -> (..., c_out)
        return F.linear(x, self.weight[:, :, 0, 0])


class Downsample(nn.Module):
    """RMSNorm, then a 2x2 convolution of stride 2, computed as a linear layer on 2x2 patches."""
    def __init__(self, c):
        super().__init__()
        self.norm = RMSNorm(c)
        self.conv = nn.Conv2d(c, c, 2, 2, bias=False)

    def forward(self, x):                                                           # (B, h, w, C)
        x = self.norm(x).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))      # (B, h/2, 2, w/2, 2, C)
        x = x.permute(0, 1, 3, 5, 2, 4).flatten(3)                           # (B, h/2, w/2, 4 C)
        return F.linear(x, self.conv.weight.flatten(1))                        # (B, h/2, w/2, C)


class Upsample(nn.Module):
    """RMSNorm, then a 2x2 transposed convolution of stride 2, computed as a linear layer."""
    def __init__(self, c):
        super().__init__()
        self.norm = RMSNorm(c)
        self.conv = nn.ConvTranspose2d(c, c, 2, 2, bias=False)

    def forward(self, x):                                                       # (B, h/2, w/2, C)
        x = F.linear(self.norm(x), self.conv.weight.flatten(1).t())          # (B, h/2, w/2, 4 C)
        x = x.unflatten(3, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)          # (B, h/2, 2, w/2, 2, C)
        return x.flatten(3, 4).flatten(1, 2)                                        # (B, h, w, C)


class MLP(nn.Module):
    """linear, SiLU, linear: embeds the conditions."""
    def __init__(self, c_in, c_out, bias):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out, bias)
        self.linear_2 = nn.Linear(c_out, c_out, bias)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class FeedForward(nn.Module):
    """linear to 4 C, tanh-GELU, linear. `net` has the published names (0.proj, 1 a dropout, 2)."""
    def __init__(self, c):
        super().__init__()
        self.net = nn.ModuleList([modules(proj=nn.Linear(c, 4 * c)), nn.Identity(),
                                  nn.Linear(4 * c, c)])

    def forward(self, x):
        return self.net[2](kernels.gelu(self.net[0].proj(x)))


def modules(**named):
    """A group of modules under their published names."""
    return nn.ModuleDict(named)


@lru_cache(maxsize=16)
def sinusoid_frequencies(device):
    """(128,) float32: 10000^(-i / 128). Exponents are float32 as in the official code; exp is
    computed in float64, because float32 exp is not reproducible across CPUs."""
    exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
    return exponents.double().exp().float().to(device)


def timestep_embedding(x):
    """Sinusoidal embedding of scalars: (...,) -> (..., 256) float32, cosines before sines."""
    angles = x.float()[..., None] * sinusoid_frequencies(x.device)
    return torch.cat((angles.cos(), angles.sin()), -1)


@lru_cache(maxsize=16)
def rope_table(h, w, axes, device):
    """cos, sin (h w, D/2) float32 for image positions (0, row, column), theta 10000.
    NOTE The paper speaks of 1-D RoPE. The released weights use these three axes."""
    rows = torch.arange(h).repeat_interleave(w)
    columns = torch.arange(w).repeat(h)
    angles = []
    for position, d in zip((torch.zeros_like(rows), rows, columns), axes):
        frequencies = 10000 ** (torch.arange(0, d, 2, dtype=torch.float64) / d)             # (d/2,)
        angles.append(position.double()[:, None] / frequencies)                      # (h w, d/2)
    angles = torch.cat(angles, 1)                                                    # (h w, D/2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


# -------------------------------------------------------------------------------------------------
# Blocks (section 2.3). Adaptive norm: LayerNorm without weights, then * (1 + scale) + shift, both
# from temb, the embedding of masking rate, pooled text and micro conditions (B, C). QK-norm and
# rotary positions are inside kernels.attention.


class Modulation(nn.Module):
    """linear(SiLU(temb)): shift, scale and gate of an adaptive norm, side by side. A block calls
    its own, as sharded training gathers weights block by block."""
    def __init__(self, c, chunks):
        super().__init__()
        self.linear = nn.Linear(c, chunks * c)

    def forward(self, temb):                                             # (B, C) -> (B, chunks C)
        return self.linear(F.silu(temb))


class JointAttention(nn.Module):
    """Attention over [text ; image]; each stream has its own projections and QK-norms."""
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkv = nn.Linear(c.width, 3 * c.width)                                         # image
        self.add_qkv = nn.Linear(c.width, 3 * c.width)                                      # text
        self.norm_q, self.norm_k = RMSNorm(c.attention_head_dim), RMSNorm(c.attention_head_dim)
        self.norm_added_q = RMSNorm(c.attention_head_dim)
        self.norm_added_k = RMSNorm(c.attention_head_dim)
        self.to_out = nn.ModuleList([nn.Linear(c.width, c.width)])
        self.to_add_out = nn.Linear(c.width, c.width)

    def forward(self, x, text, rope):                                    # (B, P, C), (B, L, C)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                  # (B, P, 3, H, D)
        text_qkv = self.add_qkv(text).unflatten(-1, (3, self.heads, -1))      # (B, L, 3, H, D)
        y = kernels.attention(text_qkv, qkv, (self.norm_added_q.weight, self.norm_added_k.weight),
                              (self.norm_q.weight, self.norm_k.weight), *rope)     # (B, S, C)
        text, x = y.split((text.shape[1], x.shape[1]), 1)                # (B, L, C), (B, P, C)
        return self.to_out[0](x), self.to_add_out(text)


class MultiModalBlock(nn.Module):
    """Two streams, image and text, each with its own weights. They meet in the attention."""
    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(c.width, 6), Modulation(c.width, 6)
        self.attn = JointAttention(c)
        self.ff, self.ff_context = FeedForward(c.width), FeedForward(c.width)

    @property
    def modulation_layers(self):
        return self.norm1, self.norm1_context

    def forward(self, x, text, temb, rope):              # (B, P, C), (B, L, C), (B, C) -> x, text
        modulations = [layer(temb) for layer in self.modulation_layers]
        return self.forward_modulated(x, text, modulations, rope)

    def forward_modulated(self, x, text, modulations, rope):
        """`forward` with the modulations already computed."""
        shift, scale, gate, shift2, scale2, gate2 = modulations[0].chunk(6, -1)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = modulations[1].chunk(6, -1)
        y, t = self.attn(kernels.norm_modulate(x, shift, scale),
                         kernels.norm_modulate(text, t_shift, t_scale), rope)
        x, y = kernels.residual_norm_modulate(x, gate, y, shift2, scale2)
        text, t = kernels.residual_norm_modulate(text, t_gate, t, t_shift2, t_scale2)
        x = kernels.gated_residual(x, gate2, self.ff(y))
        text = kernels.gated_residual(text, t_gate2, self.ff_context(t))
        return x, text


class SingleBlock(nn.Module):
    """One stream [text ; image]. Attention and MLP run side by side from one fused projection."""
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.num_attention_heads
        self.norm = Modulation(c.width, 3)
        self.qkv_mlp = nn.Linear(c.width, 7 * c.width)                            # q, k, v, 4 C
        self.attn = modules(norm_q=RMSNorm(c.attention_head_dim),
                            norm_k=RMSNorm(c.attention_head_dim))
        self.proj_out = nn.Linear(5 * c.width, c.width)

    @property
    def modulation_layers(self):
        return self.norm,

    def forward(self, s, text_length, temb, rope):           # (B, S, C), L, (B, C) -> (B, S, C)
        return self.forward_modulated(s, text_length, [self.norm(temb)], rope)

    def forward_modulated(self, s, text_length, modulations, rope):
        """`forward` with the modulations already computed."""
        shift, scale, gate = modulations[0].chunk(3, -1)
        packed = self.qkv_mlp(kernels.norm_modulate(s, shift, scale))              # (B, S, 7 C)
        qkv, mlp = packed.split((3 * s.shape[-1], 4 * s.shape[-1]), -1)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))                          # (B, S, 3, H, D)
        qk_norms = self.attn.norm_q.weight, self.attn.norm_k.weight
        y = kernels.attention_in_place(qkv, text_length, qk_norms, qk_norms, *rope)   # (B, S, C)
        y = self.proj_out(kernels.concat_gelu(y, mlp))                               # (B, S, C)
        return kernels.gated_residual(s, gate, y)


# -------------------------------------------------------------------------------------------------
# The whole model


class Transformer(Pretrained):
    CONFIG = Config
    FUSED = {                                    # {ours: {published: its share of our rows}}
        "attn.qkv": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1},
        "attn.add_qkv": {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1},
        "qkv_mlp": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4}}

    def __init__(self, config: Config):
        super().__init__(config)
        c, width = config, config.width
        self.embed = modules(embeddings=Embedding(c.vocab_size, width),
                             layer_norm=RMSNorm(width), conv=Conv1x1(width, width))
        if c.downsample:
            self.down_block = modules(downsample=Downsample(width))
            self.up_block = modules(upsample=Upsample(width))
        self.project_to_hidden_norm = RMSNorm(width)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.context_embedder = nn.Linear(c.joint_attention_dim, width)
        self.encoder_proj_layer_norm = RMSNorm(width)
        self.cond_embed = MLP(c.pooled_projection_dim + 5 * 256, width, bias=False)
        self.time_text_embed = modules(timestep_embedder=MLP(256, width, bias=True),
                                       text_embedder=MLP(width, width, bias=True))
        self.transformer_blocks = nn.ModuleList(MultiModalBlock(c) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(c) for _ in range(c.num_single_layers))
        self.project_from_hidden_norm = RMSNorm(width)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        self.mlm_layer = modules(conv1=Conv1x1(width, width), layer_norm=RMSNorm(width),
                                 conv2=Conv1x1(width, c.codebook_size))

    @property
    def blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def embed_timestep(self, timestep, dtype):                                   # (B,) -> (B, C)
        embedding = timestep_embedding(1000 * timestep.float()).to(dtype)
        return self.time_text_embed.timestep_embedder(embedding)

    def embed_prompt(self, pooled, micro_conds):                       # (B, C), (B, 5) -> (B, C)
        micro = timestep_embedding(micro_conds).flatten(1).to(pooled.dtype)         # (B, 5 256)
        return self.time_text_embed.text_embedder(self.cond_embed(torch.cat((pooled, micro), -1)))

    def embed_text(self, hidden):                                  # (B, L, text width) -> (B, L, C)
        return self.encoder_proj_layer_norm(self.context_embedder(hidden))

    def embed_image(self, ids, perturb=None):
        """(B, h, w) -> (B, P, C) and the grid that the blocks see. perturb: changes the embedded
        tokens (B, h, w, C), see sample_one_step.
        Raises ValueError for a grid that the compression does not divide."""
        h, w = ids.shape[1:]
        if h % self.config.compression or w % self.config.compression:
            raise ValueError(f"a grid of {h}x{w} tokens does not divide by the compression, "
                             f"{self.config.compression}")
        x = self.embed.conv(self.embed.layer_norm(self.embed.embeddings(ids)))       # (B, h, w, C)
        if perturb:
            x = perturb(x)
        if self.config.downsample:
            x = self.down_block.downsample(x)                                    # (B, h/2, w/2, C)
        x, grid = x.flatten(1, 2), x.shape[1:3]                                         # (B, P, C)
        return self.project_to_hidden(self.project_to_hidden_norm(x)), grid

    def unembed_image(self, x, grid):                                  # (B, P, C) -> (B, h, w, C)
        x = self.project_from_hidden(self.project_from_hidden_norm(x)).unflatten(1, grid)
        return self.up_block.upsample(x) if self.config.upsample else x

    def run_blocks(self, ids, text, run_block, perturb=None):
        """ids (B, h, w), text (B, L, C) -> (B, h, w, C). run_block(block, *inputs, rope) runs one
        block and supplies its modulations: computed from temb here, looked up in engine/fast.py."""
        x, grid = self.embed_image(ids, perturb)                                        # (B, P, C)
        rope = rope_table(*grid, self.config.axes_dims_rope, x.device)
        for block in self.transformer_blocks:
            x, text = run_block(block, x, text, rope)
        s = torch.cat((text, x), 1)                                                     # (B, S, C)
        for block in self.single_transformer_blocks:
            s = run_block(block, s, text.shape[1], rope)
        return self.unembed_image(s[:, text.shape[1]:], grid)

    def features(self, ids, hidden, pooled, micro_conds, timestep, perturb=None):
        """All but the head -> (B, h, w, C). Arguments as in `forward`."""
        temb = self.embed_timestep(timestep, pooled.dtype) + self.embed_prompt(pooled, micro_conds)
        return self.run_blocks(ids, self.embed_text(hidden),
                               lambda block, a, b, rope: block(a, b, temb, rope), perturb)

    def head_features(self, x):                                          # (..., C) -> (..., C)
        return self.mlm_layer.layer_norm(self.mlm_layer.conv1(x))

    def forward(self, ids, hidden, pooled, micro_conds, timestep, perturb=None):
        """ids (B, h, w) int64, config.mask_token where unknown; hidden (B, L, text width);
        pooled (B, C); micro_conds (B, 5) = width, height, crop top, crop left, score; timestep (B,)
        or (1,), multiplied by 1000 inside; perturb as in embed_image -> logits (B, h, w, V)."""
        x = self.features(ids, hidden, pooled, micro_conds, timestep, perturb)      # (B, h, w, C)
        return self.mlm_layer.conv2(self.head_features(x))                          # (B, h, w, V)


# -------------------------------------------------------------------------------------------------
# Sampling (section 2.2; MaskGIT, Chang et al. 2022)


def cosine_schedule(t):
    """Share still masked at time t in (0, 1]. float32 as in the official code: one rounding error
    can change a count."""
    return float(torch.tensor(math.pi / 2 * t).cos())


MASK_SCHEDULES = {"cosine": cosine_schedule, "linear": lambda t: 1 - t}

# The timestep tells the model the masking rate: functions of (step, steps, masked, tokens).
# NOTE Three are in use. `step`, the number of steps left: how the public weights are sampled.
# `rate`, rounded to 1/1000: the paper's, and that of models trained here. `rate1000`, 1000 times
# the rate: that of the official training script.
RATE_CONDITIONS = {
    "step": lambda step, steps, masked, tokens: float(steps - 1 - step),
    "rate": lambda step, steps, masked, tokens: round(1000 * masked / tokens) / 1000,
    "rate1000": lambda step, steps, masked, tokens: float(round(1000 * masked / tokens))}


def masked_counts(steps, tokens, schedule="cosine"):
    """Tokens still masked after each step -> list of `steps` ints, the last one 0. Every step
    reveals at least one token, and keeps one for each step to come.
    NOTE With more steps than tokens the list ends in zeros; the official code idles instead.
    Raises ValueError for steps or tokens < 1 or an unknown schedule."""
    if steps < 1 or tokens < 1:
        raise ValueError(f"steps ({steps}) and tokens ({tokens}) must be at least 1")
    if schedule not in MASK_SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: {', '.join(MASK_SCHEDULES)}")
    counts, masked = [], tokens
    for i in range(1, steps + 1):
        wanted = math.floor(tokens * MASK_SCHEDULES[schedule](i / steps)) if i < steps else 0
        masked = max(min(max(wanted, steps - i), masked - 1), 0)
        counts.append(masked)
    return counts


class Step(NamedTuple):
    """One step of sampling."""
    number: int                                 # selects the noise: no two steps share one
    timestep: float                             # the model's condition on the masking rate
    temperature: float                          # of the noise on the confidences
    cfg_scale: float                            # of classifier-free guidance; 1 is none
    num_masked: int                             # positions that are masked after the step


@dataclass(frozen=True)
class Schedule:
    """How a checkpoint is sampled. No field has a default: a wrong one gives wrong pictures."""
    steps: int
    cfg_scale: float
    temperature: tuple[float, ...]              # at the first and the last step, linear between
    mask_schedule: str                          # one of MASK_SCHEDULES
    rate_condition: str                         # one of RATE_CONDITIONS

    BOUNDS = dict(steps=(1, 10 ** 6), cfg_scale=(-1e6, 1e6), temperature=(-1e6, 1e6))

    def __post_init__(self):
        check_fields(self, self.BOUNDS)
        if len(self.temperature) != 2:
            raise CheckpointError(f"temperature {self.temperature} is not two numbers")
        if self.rate_condition not in RATE_CONDITIONS:
            raise CheckpointError(f"unknown rate_condition {self.rate_condition!r}")
        if self.mask_schedule not in MASK_SCHEDULES:
            raise CheckpointError(f"unknown masking_schedule {self.mask_schedule!r}")

    @classmethod
    def from_pretrained(cls, folder):
        """Read scheduler_config.json. What it does not say is as the public weights are sampled.
        Raises CheckpointError."""
        path = Path(folder) / "scheduler_config.json"
        raw = read_json(path)
        defaults = raw.get("defaults", {})
        if not isinstance(defaults, dict):
            raise CheckpointError(f"{path}: defaults {defaults!r} is not an object")
        temperature = defaults.get("temperature", (2.0, 0.0))
        if isinstance(temperature, list):
            temperature = tuple(temperature)
        try:
            return cls(defaults.get("steps", 48), defaults.get("cfg", 9.0), temperature,
                       raw.get("masking_schedule", "cosine"), raw.get("rate_condition", "step"))
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from None

    def plan(self, num_masked, num_tokens):
        """The steps that fill in `num_masked` of a picture's `num_tokens` -> list of Step.
        Steps that would find nothing to draw are left out."""
        if num_masked == 0:
            return []
        counts = masked_counts(self.steps, num_masked, self.mask_schedule)
        first, last = self.temperature
        plan = []
        for i, (before, after) in enumerate(zip([num_masked, *counts], counts)):
            if before > 0:
                timestep = RATE_CONDITIONS[self.rate_condition](i, self.steps, before, num_tokens)
                temperature = first + (last - first) * i / max(self.steps - 1, 1)
                plan.append(Step(i, timestep, temperature, self.cfg_scale, after))
        return plan


@dataclass
class Conditioning:
    """What the transformer is told: hidden (B, L, text width), pooled (B, C),
    micro_conds (B, 5)."""
    hidden: torch.Tensor
    pooled: torch.Tensor
    micro_conds: torch.Tensor

    def rows(self, index):
        return Conditioning(self.hidden[index], self.pooled[index], self.micro_conds[index])


def apply_cfg(cond, uncond, scale):
    """Classifier-free guidance (Ho and Salimans 2022)."""
    return uncond + scale * (cond - uncond)


def gather_positions(x, positions):
    """Rows of x (B, h, w, C) at positions (B, M) of the flat grid -> (B, M, C)."""
    return x.flatten(1, 2).gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def masked_positions(ids, mask_token):
    """(B, N) -> (B, M) int64. Raises ValueError if pictures have unequally many masked tokens."""
    masked = ids == mask_token
    if len(set(masked.sum(1).tolist())) > 1:
        raise ValueError("the pictures of a batch must have equally many masked tokens")
    return masked.nonzero()[:, 1].view(len(ids), -1)


def reference_predictor(model, cond, uncond):
    """Reference implementation; the tests compare engine.fast.predictor with it. Two whole passes,
    guidance of the logits -> predict(step, ids (B, h, w), masked (B, M)) -> logits (B, M, V)."""
    def predict(step, ids, masked):
        timestep = torch.full((1,), step.timestep, device=ids.device)
        logits = model(ids, cond.hidden, cond.pooled, cond.micro_conds, timestep)    # (B, h, w, V)
        if step.cfg_scale != 1:
            unguided = model(ids, uncond.hidden, uncond.pooled, uncond.micro_conds, timestep)
            logits = apply_cfg(logits, unguided, step.cfg_scale)
        return gather_positions(logits, masked)                                        # (B, M, V)
    return predict


def confidence(step, log_p, noise, masked, grid):
    """MaskGIT's order: the score of each token that was drawn, those with the lowest are masked
    again. log_p, noise and the positions `masked` (B, M), grid (h, w) -> (B, M). engine/orders.py
    has other orders."""
    return log_p + step.temperature * noise


@torch.no_grad()
def sample(predict, ids, mask_token, seeds, plan, watch=None, order=confidence):
    """MaskGIT decoding: fill in the masked ids. Known ids never change.

    predict         of reference_predictor or engine.fast.predictor
    ids             (B, h, w) int64, mask_token where unknown; equally many in each picture
    seeds           (B,) ints; a picture depends on its own seed and conditioning alone
    plan            of Schedule.plan
    watch           called in each step as watch(n, ids, masked (B, M), logits (B, M, V)), with the
                    ids (B, h, w) that were drawn and the positions that were masked before
    order           decides which of them are masked again, see `confidence`
    -> (B, h, w) int64
    """
    B, h, w = ids.shape
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=ids.device)
    ids = ids.flatten(1)                                                                  # (B, N)
    masked = masked_positions(ids, mask_token)                                            # (B, M)
    noise = kernels.gumbel_noise(seeds, [step.number for step in plan], h * w)         # (T, B, N)
    for n, step in enumerate(plan):
        # 1. predict all masked tokens
        logits = predict(step, ids.view(B, h, w), masked)                              # (B, M, V)
        # 2. draw one for each
        codes, log_p = kernels.sample_masked(logits, masked, seeds, step.number)          # (B, M)
        ids = ids.scatter(1, masked, codes)
        if watch:
            watch(n, ids.view(B, h, w), masked, logits)
        # 3. mask the least confident again
        score = order(step, log_p, noise[n].gather(1, masked), masked, (h, w))            # (B, M)
        lowest = score.topk(step.num_masked, largest=False, sorted=False).indices
        masked = masked.gather(1, lowest)                                     # (B, step.num_masked)
        ids = ids.scatter(1, masked, mask_token)
    return ids.view(B, h, w)


# -------------------------------------------------------------------------------------------------
# One step (Di[M]O, Zhu et al. 2025, arXiv 2503.15457). A generator of the same architecture, which
# was distilled from the model above, draws the whole picture in one pass. All tokens are drawn
# independently, so what makes one picture differ from the next as a whole is a random input.


@dataclass(frozen=True)
class OneStep(JsonConfig):
    """How a one-step generator is sampled. The defaults are those of the published one."""
    mask_share: float = 0.6                     # of the start
    noise: float = 0.1                          # sigma of the noise in the embedded tokens
    temperature: float = 1.0                    # of the draw; the paper's scores are with 1.2

    BOUNDS = dict(mask_share=(0, 1), noise=(0, 1), temperature=(1e-3, 1e3))
    steps = 1

    @classmethod
    def from_pretrained(cls, folder):
        """Read "one_step" of scheduler_config.json -> OneStep, or None for a model of many steps.
        Raises CheckpointError."""
        path = Path(folder) / "scheduler_config.json"
        raw = read_json(path)
        if "one_step" not in raw:
            return None
        if not isinstance(raw["one_step"], dict):
            raise CheckpointError(f"{path}: one_step is not an object")
        return cls.from_dict(raw["one_step"], f"{path}: one_step")


def one_step_predictor(model, cond):
    """Reference implementation. One pass without guidance, at timestep 0 -> predict(ids (B, h, w),
    perturb) -> logits (B, N, V)."""
    def predict(ids, perturb):
        timestep = torch.zeros(1, device=ids.device)
        logits = model(ids, cond.hidden, cond.pooled, cond.micro_conds, timestep, perturb)
        return logits.flatten(1, 2)                                                    # (B, N, V)
    return predict


def sample_one_step(predict, ids, config, seeds, one_step, watch=None):
    """Draw whole pictures in one pass. Gradients may flow through the logits.

    predict     of one_step_predictor or engine.fast.one_step_predictor
    ids         (B, h, w) int64; shape and device count, the tokens do not
    config      of the transformer
    seeds       (B,) ints; a picture depends on its own seed and conditioning alone
    watch       called once, as in `sample`
    -> (B, h, w) int64
    """
    B, h, w = ids.shape
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=ids.device)
    positions = torch.arange(h * w, device=ids.device).expand(B, -1)                      # (B, N)
    bits = random_bits(seeds, positions, 2 + config.width)                         # (B, N, 2 + C)
    # 1. the start: every token a random one, then a share of them masked
    start = bits[..., 0] * config.codebook_size >> 32                                     # (B, N)
    order = bits[..., 1].argsort(dim=1, stable=True)                                      # (B, N)
    start.scatter_(1, order[:, :round(one_step.mask_share * h * w)], config.mask_token)
    # 2. one pass, with noise in the embedded tokens
    noise = normal_noise(bits[..., 2:]).view(B, h, w, -1)                           # (B, h, w, C)
    logits = predict(start.view(B, h, w), lambda x: perturb(x, noise, one_step.noise))  # (B, N, V)
    # 3. draw every token, masked or not
    scaled = logits.detach().float() / one_step.temperature
    drawn, _ = kernels.sample_masked(scaled, positions, seeds, 0)                         # (B, N)
    ids = drawn.view(B, h, w)
    if watch:
        watch(0, ids, positions, logits)
    return ids


def perturb(x, noise, sigma):
    """Embedded tokens with noise of deviation sigma. Where x has variance 1, it keeps it."""
    return math.sqrt(1 - sigma ** 2) * x + sigma * noise.to(x.dtype)


def random_bits(seeds, positions, count):
    """seeds (B,), positions (B, N) -> (B, N, count) int64 below 2^32. The same on all devices. The
    stream is that of the confidences, which one step does not have."""
    index = torch.arange(count, device=seeds.device)
    return philox(seeds[:, None, None], index, positions[..., None], 0, CONFIDENCE_NOISE)


def normal_noise(bits):
    """32 random bits (int64) -> standard normal noise, float32, always finite."""
    u = ((bits.float() + 0.5) * 2.0 ** -32).clamp(max=BELOW_ONE)
    return torch.special.ndtri(u)
