"""LoRA (Hu et al. 2021): W + B A of rank r on the linear layers of the blocks' attention and MLPs.

    add_lora(model, rank=16)                       # trainable terms beside the weights
    save_lora("lora.safetensors", model, state)    # public names with PEFT's suffixes
    merge_lora(model, "lora.safetensors")          # added to the weights: as fast as without
    merge_lora(model, *parse_lora("lora.safetensors:0.7"))                # at a strength

Files of PEFT, diffusers, kohya's scripts and ComfyUI are read: PREFIXES, UNDERSCORED and PAIRS list
their spellings. What is none of these is refused by name, before any weight is changed.
"""
import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.utils import parametrize

from engine.checkpoint import CheckpointError, UserError, read_json, write_tensors
from engine.cli import note

PREFIX = "transformer."                          # of the names that save_lora writes

# Of the names in a file: module names with dots, and kohya's with underscores in place of the dots.
PREFIXES = ("base_model.model.", "model.", "transformer.", "unet.", "diffusion_model.")
UNDERSCORED = ("lora_unet_", "lora_transformer_")
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?"
                          r"(text_encoders?(_\d)?\.|text_model\.|lora_te\d?_)")
PAIRS = {".lora_A": "A", ".lora_B": "B", ".lora_down": "A", ".lora_up": "B",
         ".lora.down": "A", ".lora.up": "B"}     # PEFT; kohya; older diffusers
TERM = re.compile("(.+)(" + "|".join(map(re.escape, PAIRS)) + r")(?:\.(\w+))?\.weight")

STYLES = {                                       # part of a name: what is refused
    "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
    "lora_mid": "LoCon with a middle term", "oft_": "OFT", "ia3_": "IA3",
    "lora_embedding_": "LoRA of an embedding", ".diff": "full weight differences",
    ".bias": "a bias", "_lora.": "diffusers' old attention processors"}

MAX_CHANGE = 1e30                                # of a weight: |B A| is at most |A| |B|
METADATA = "lora_adapter_metadata"               # header key of diffusers: a PEFT config as JSON
PEFT_CONFIG = "adapter_config.json"              # PEFT's own file, beside the weights


class LoRA(nn.Module):
    """The parametrisation W -> W + B A with A (r, in), B (out, r). B starts at zero."""
    def __init__(self, weight, rank):
        super().__init__()
        a = torch.randn(rank, weight.shape[1], device=weight.device)
        self.A = nn.Parameter(a * weight.shape[1] ** -0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight):
        return weight + (self.B @ self.A).to(weight.dtype)


def add_lora(model, rank):
    """Give each linear layer of the blocks, adaptive norms aside, a trainable low-rank term."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "transformer_blocks." in name and ".norm" not in name:
            parametrize.register_parametrization(module, "weight", LoRA(module.weight, rank))


def save_lora(path, model, state):
    """Write the low-rank terms in a state dict of `model` to one safetensors file."""
    tensors = {}
    for public, (name, rows) in public_weights(model).items():
        term = name.removesuffix("weight") + "parametrizations.weight.0."
        if term + "B" in state:
            stem = PREFIX + public.removesuffix(".weight")
            tensors[stem + ".lora_A.weight"] = state[term + "A"].clone()
            tensors[stem + ".lora_B.weight"] = state[term + "B"][rows].contiguous()
    write_tensors(path, tensors)


def public_weights(model):
    """{published name: (our name, its rows)} of the weights of the plain model, LoRA or not."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    table = plain.weight_map()
    return {public: ours for public, ours in table.items() if public.endswith(".weight")}


# -------------------------------------------------------------------------------------------------
# Reading and merging


class Term(NamedTuple):
    """scale * b @ a is added to some rows of a weight."""
    weight: str                                   # our name
    rows: slice
    a: torch.Tensor                               # (r, in)
    b: torch.Tensor                               # (out, r)
    scale: float


def parse_lora(text):
    """FILE or FILE:SCALE -> (path, scale). A file whose name has the colon wins.
    Raises UserError."""
    text = os.path.expanduser(text)
    path, _, number = text.rpartition(":")
    if not path or os.path.exists(text):
        return Path(text), 1.0
    try:
        scale = float(number)
    except ValueError:
        if not os.path.exists(path):              # the colon is part of a name
            return Path(text), 1.0
        scale = math.nan
    if not math.isfinite(scale):
        raise UserError(f"--lora {text}: the strength {number!r} is not a number")
    return Path(path), scale


def merge_lora(model, path, scale=1.0):
    """Add the terms of a LoRA file, times `scale`, to the weights, in place. Raises CheckpointError
    for a file that is none or does not fit; then no weight has changed."""
    add_terms(model, read_lora(model, path, scale))


@torch.no_grad()
def add_terms(model, terms):
    """Add the terms of read_lora to the weights, in place."""
    for term in terms:
        weight = model.get_parameter(term.weight)[term.rows]
        change = term.scale * term.b.float() @ term.a.float()                 # (out, in)
        weight += change.view(weight.shape).to(weight)


def read_lora(model, path, scale=1.0):
    """Read and check a LoRA file -> list of Terms. The model gives names and shapes only and may be
    on the meta device. Prints a line for what is left out. Raises CheckpointError."""
    path = Path(path)
    table = public_weights(model)
    modules = {public.removesuffix(".weight") for public in table}
    with open_lora(path) as file:
        names, left_out = sort_names(path, file.keys(), modules)
        config = read_config(path, file)
        terms = []
        for module, parts in names.items():
            tensors = {kind: file.get_tensor(key) for kind, key in parts.items()}
            name, rows = table[module + ".weight"]
            shape = model.get_parameter(name)[rows].shape
            a, b = check_pair(path, module, tensors["A"], tensors["B"], shape)
            factor = scale * config_scale(path, config, module, len(a), tensors.get("alpha"))
            if not abs(factor) * float(a.float().norm() * b.float().norm()) < MAX_CHANGE:
                raise CheckpointError(f"{path}: {module}: its numbers are not finite or too large")
            terms.append(Term(name, rows, a, b, factor))
    if left_out:
        note(f"note: {path}: {left_out} tensors for the text encoder are left out")
    return terms


def open_lora(path):
    """-> an open safetensors file. Raises CheckpointError."""
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: a folder; name the .safetensors file in it")
    if not os.path.isfile(path):                  # a pipe would be waited for
        reason = "not a regular file" if os.path.exists(path) else "no such file"
        raise CheckpointError(f"{path}: {reason}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a LoRA file: no safetensors file ({e})") from None


# -------------------------------------------------------------------------------------------------
# Names


def sort_names(path, keys, modules):
    """The names in a file -> ({module: {"A", "B", "alpha": name in the file}}, how many names are
    of a text encoder). Each module has A and B. Raises CheckpointError."""
    underscored = {module.replace(".", "_"): module for module in modules}
    names = defaultdict(dict)
    adapters = set()
    left_out = 0
    for key in sorted(keys):
        if TEXT_ENCODER.match(key):
            left_out += 1
            continue
        stem, kind, adapter = split_name(path, key)
        module = find_module(stem, modules, underscored)
        if module is None:
            raise CheckpointError(f"{path}: {key:.200} has no counterpart in this model")
        if kind in names[module]:
            other = names[module][kind]
            raise CheckpointError(f"{path}: {key:.200} and {other:.200} are for one weight")
        names[module][kind] = key
        adapters.add(adapter)
    adapters.discard(None)
    if len(adapters) > 1:
        raise CheckpointError(f"{path}: holds several LoRAs: {', '.join(sorted(adapters))}")
    if not names:
        what = "only terms of a text encoder" if left_out else "nothing"
        raise CheckpointError(f"{path}: not a LoRA file for this model: {what} in it")
    for module, parts in names.items():
        if missing := {"A", "B"} - parts.keys():
            raise CheckpointError(f"{path}: {module} has no {min(missing)} of the pair A, B")
    return names, left_out


def split_name(path, key):
    """A name in a file -> (module as it is spelled there, "A", "B" or "alpha", name of the adapter
    or None). Raises CheckpointError that names the style of the file, where it is known."""
    if match := TERM.fullmatch(key):
        return match[1], PAIRS[match[2]], match[3]
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha", None
    style = next((style for mark, style in STYLES.items() if mark in key), None)
    reason = f"is {style}, which is not supported" if style else "is no term of a LoRA"
    raise CheckpointError(f"{path}: {key:.200} {reason}")


def find_module(stem, modules, underscored):
    """The public name of a module -> None if this model has no such one."""
    for prefix in UNDERSCORED:
        if stem.startswith(prefix):
            return underscored.get(stem.removeprefix(prefix))
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    return stem if stem in modules else None


def check_pair(path, module, a, b, shape):
    """Terms of a linear layer or 1x1 convolution whose weight has this shape -> a (r, in) and
    b (out, r). Raises CheckpointError."""
    for tensor in (a, b):
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {module} is of {tensor.dtype}, not of real numbers")
    flat_a, flat_b = without_ones(a), without_ones(b)
    fits = flat_a.ndim == flat_b.ndim == len(shape[:2]) == 2 and max(shape[2:], default=1) == 1
    rank = len(flat_a) if flat_a.ndim else 0
    if not fits or rank == 0 or (*flat_b.shape, *flat_a.shape) != (shape[0], rank, rank, shape[1]):
        raise CheckpointError(f"{path}: {module} has shapes {tuple(b.shape)}, {tuple(a.shape)}, "
                              f"which do not make one of {tuple(shape)}")
    return flat_a, flat_b


def without_ones(tensor):
    """(r, n, 1, 1) -> (r, n); other shapes stay."""
    return tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor


# -------------------------------------------------------------------------------------------------
# Scale


def read_config(path, file):
    """The PEFT config of a file -> dict, {} without one. diffusers writes it into the header,
    PEFT into a file beside. Raises CheckpointError."""
    header = file.metadata() or {}
    if METADATA in header:
        return header_config(path, header[METADATA])
    peft = any(key.startswith("base_model.") for key in file.keys())
    beside = path.with_name(PEFT_CONFIG)
    if (peft or path.name == "adapter_model.safetensors") and beside.is_file():
        return read_json(beside)
    if peft:
        note(f"note: {path}: no {PEFT_CONFIG} beside it, which has PEFT's alpha; the scale is 1, "
             "FILE:SCALE is another")
    return {}


def header_config(path, text):
    """The JSON of the header, whose keys may begin with a part of the model -> dict of the keys of
    this part."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: {METADATA} in its header is not a JSON object")
    config = {key: value for key, value in raw.items() if "." not in key}
    for prefix in PREFIXES:
        config |= {key.removeprefix(prefix): value
                   for key, value in raw.items() if key.startswith(prefix)}
    return config


def config_scale(path, config, module, rank, alpha):
    """The factor of a term: alpha / r with the term's own alpha, else the config's, else 1. With
    rank-stabilised LoRA (Kalajdzievski 2023) alpha / sqrt(r)."""
    if config.get("use_dora"):
        raise CheckpointError(f"{path}: its config asks for DoRA, which is not supported")
    told_rank = config_number(path, config, "r", "rank_pattern", module)
    told_alpha = config_number(path, config, "lora_alpha", "alpha_pattern", module)
    if told_rank not in (None, rank):
        raise CheckpointError(f"{path}: {module} has rank {rank}, its config says {told_rank:g}")
    if alpha is not None:
        if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha):
            raise CheckpointError(f"{path}: {module}: alpha is not one number")
        alpha = float(alpha)
        if told_alpha is not None and not math.isclose(alpha, told_alpha, rel_tol=0.01):
            raise CheckpointError(f"{path}: {module} has alpha {alpha:g}, its config says "
                                  f"{told_alpha:g}")
    alpha = told_alpha if alpha is None else alpha
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def config_number(path, config, key, pattern_key, module):
    """config[key], or what config[pattern_key] says for the module -> float or None.
    NOTE PEFT takes the names in a pattern for regular expressions; only plain names are read."""
    found = config.get(key)
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {pattern_key} in its config is not an object")
    for name, value in reversed(patterns.items()):            # the first one wins
        plain = name.removeprefix("^").removesuffix("$")
        if not re.fullmatch(r"[\w.]+", plain):
            raise CheckpointError(f"{path}: {pattern_key} {name!r:.60} is not a module's name")
        anywhere = not name.startswith("^")
        if module == plain or anywhere and module.endswith("." + plain):
            found = value
    if found is None:
        return None
    if type(found) not in (int, float) or not abs(found) < 1e30:              # bool, NaN
        raise CheckpointError(f"{path}: {key} {found!r:.40} in its config is not a number")
    return float(found)
