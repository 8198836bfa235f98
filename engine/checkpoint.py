"""Strict loading and saving of checkpoint folders: config.json and safetensors, published layout.

    model = VQModel.from_pretrained("weights/shapes/vqvae", dtype=torch.bfloat16, device="cuda")
    model.save_pretrained("runs/mine/vqvae")

A model is built on the meta device. Then its tensors are read straight to the target device, one at
a time, so a second copy of the model never exists. An unknown config key and a missing, unknown or
misshaped tensor raise CheckpointError. All files are written atomically.
"""
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


class UserError(Exception):
    """Something the user can mend; the message says how. The command line prints it as one line."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be used; the message names the file, tensor or key."""


# -------------------------------------------------------------------------------------------------
# JSON and configs


def read_json(path):
    """Read a JSON object. Raises CheckpointError if the file is missing or holds anything else."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError:
        raise CheckpointError(f"{path}: not a JSON file") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return raw


def write_json(path, content):
    """Write a dict as indented JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class JsonConfig:
    """Base class of the config dataclasses.

    FIXED    {key: value} of published configs that this project supports with one value only
    IGNORED  keys of published configs that do not affect the network
    """
    FIXED = {}
    IGNORED = frozenset()

    @classmethod
    def from_json(cls, path):
        """Read a config.json. Raises CheckpointError for unknown keys and unsupported values."""
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, raw, path="config"):
        """Build a config from a dict; `path` is what error messages name."""
        known = {field.name for field in fields(cls)}
        values = {}
        for key, value in raw.items():
            if key in known:
                values[key] = tuple(value) if isinstance(value, list) else value
            elif key in cls.FIXED:
                if value != cls.FIXED[key]:
                    raise CheckpointError(f"{path}: {key} = {value!r} is not supported, "
                                          f"only {cls.FIXED[key]!r}")
            elif key not in cls.IGNORED:
                raise CheckpointError(f"{path}: unknown key {key!r}")
        try:
            return cls(**values)
        except (TypeError, ZeroDivisionError, CheckpointError) as e:
            raise CheckpointError(f"{path}: {e}") from None

    def to_dict(self):
        """What config.json holds: the FIXED keys and all fields."""
        return {**self.FIXED, **{field.name: getattr(self, field.name) for field in fields(self)}}


# -------------------------------------------------------------------------------------------------
# Models


class Pretrained(nn.Module):
    """A model that is built from a config, and that loads and saves the published folder layout.

    CONFIG           the config dataclass
    STEM             file name of the weights, without .safetensors
    FUSED            {our module: {published module: its share of the rows}}: our weight is the
                     concatenation of the published ones along dim 0. Names are suffixes, e.g.
                     {"attn.qkv": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1}}
    IGNORED_WEIGHTS  prefixes of published tensors that nothing here reads
    FP16_VARIANT     whether the published .fp16 files may be read for 16-bit dtypes
    """
    CONFIG = None
    STEM = "diffusion_pytorch_model"
    FUSED = {}
    IGNORED_WEIGHTS = ()
    FP16_VARIANT = True

    def __init__(self, config):
        super().__init__()
        self.config = config

    def weight_map(self):
        """-> {published tensor name: (our tensor name, slice of its rows)}.
        The slice is the whole tensor unless FUSED lists its module."""
        table = {}
        for name, tensor in self.state_dict().items():
            module, _, kind = name.rpartition(".")  # kind: weight or bias
            shares = self.published_modules(module)
            first = 0
            for published, share in shares.items():
                rows = tensor.shape[0] * share // sum(shares.values())
                table[f"{published}.{kind}"] = (name, slice(first, first + rows))
                first += rows
        return table

    def published_modules(self, module):
        """{published module name: its share of the rows} of one of our modules."""
        for ours, shares in self.FUSED.items():
            if module == ours or module.endswith("." + ours):
                parent = module.removesuffix(ours)
                return {parent + published: share for published, share in shares.items()}
        return {module: 1}

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", host=()):
        """Load a checkpoint folder into a model in eval mode without gradients.

        Tensors are read straight to `device` and cast to `dtype` there. Where a file has that dtype
        already, CPU tensors are the memory-mapped file itself. Tensors whose names contain one of
        `host` stay on the CPU. With device "meta" everything is checked and nothing is read.
        Raises CheckpointError, naming what is missing, unknown, misshaped or unreadable."""
        folder = Path(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: not a checkpoint folder (no config.json)")
        config = cls.CONFIG.from_json(path)
        try:
            with torch.device("meta"):
                model = cls(config)
        except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as e:   # e.g. a bad width
            raise CheckpointError(f"{path}: no model can be built from it ({e})") from None
        files = weight_files(folder, cls.STEM, dtype if cls.FP16_VARIANT else torch.float32)
        model.load_tensors(files, dtype, device, host)
        return model.eval().requires_grad_(False)

    def load_tensors(self, files, dtype, device, host=()):
        """Check the safetensors files and assign every tensor from them; see from_pretrained."""
        table = self.weight_map()
        stored = self.open_files(files, str(device))
        self.check_tensors(table, stored, Path(files[0]).parent)
        if str(device) == "meta":
            return
        parts = {}                                            # {our name: [published names]}
        for published, (name, _) in table.items():
            parts.setdefault(name, []).append(published)
        tensors = {}
        for name, names in parts.items():
            target = "cpu" if any(text in name for text in host) else str(device)
            pieces = [stored[published].read(target).to(dtype) for published in names]
            tensors[name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        self.load_state_dict(tensors, assign=True)

    def open_files(self, files, device):
        """-> {published name: StoredTensor} of all files, without IGNORED_WEIGHTS."""
        stored = {}
        for path in files:
            try:
                handles = {where: safe_open(path, framework="pt", device=where)
                           for where in {"cpu", device} - {"meta"}}
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{path}: not a whole safetensors file ({e})") from None
            for key in handles["cpu"].keys():
                name = key.removeprefix("_orig_mod.")  # saved from a compiled model
                if not name.startswith(self.IGNORED_WEIGHTS):
                    stored[name] = StoredTensor(handles, key)
        return stored

    def check_tensors(self, table, stored, folder):
        """Raise CheckpointError unless `stored` has just the tensors of `table`, in our shapes."""
        missing = sorted(table.keys() - stored.keys())
        unknown = sorted(stored.keys() - table.keys())
        if missing:
            raise CheckpointError(f"{folder}: {len(missing)} tensors missing, "
                                  f"first: {', '.join(missing[:3])}")
        if unknown:
            raise CheckpointError(f"{folder}: {len(unknown)} unknown tensors, "
                                  f"first: {', '.join(unknown[:3])}")
        ours = self.state_dict()
        for published, (name, rows) in table.items():
            shape = stored[published].shape()
            expected = tuple(ours[name][rows].shape)
            if shape != expected:
                raise CheckpointError(f"{folder}: {published} has shape {shape}, "
                                      f"expected {expected}")

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and the weights under their published names, each file atomically.
        `dtype` None keeps the dtype of each tensor."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ours = self.state_dict()
        tensors = {}
        for published, (name, rows) in self.weight_map().items():
            tensor = ours[name][rows].detach()
            tensors[published] = tensor.to("cpu", dtype or tensor.dtype).contiguous()
        write_tensors(folder / f"{self.STEM}.safetensors", tensors)
        for variant in folder.glob(f"{self.STEM}*.fp16*"):  # it holds the weights from before
            variant.unlink()
        write_json(folder / "config.json", self.config.to_dict())


@dataclass
class StoredTensor:
    """A tensor of a safetensors file that is open on one or more devices."""
    handles: dict  # device -> open file
    key: str

    def shape(self):
        return tuple(self.handles["cpu"].get_slice(self.key).get_shape())

    def read(self, device):
        return self.handles[device].get_tensor(self.key)


# -------------------------------------------------------------------------------------------------
# Files


def atomic_write(path, write):
    """Call write(temporary path) and rename the result to `path`. A reader never sees half a file,
    and an interrupted run leaves none behind."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes with mode 600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, tensors, metadata=None):
    """Write {name: contiguous CPU tensor} as a safetensors file, atomically."""
    metadata = {"format": "pt", **(metadata or {})}
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def weight_files(folder, stem, dtype=torch.float32):
    """The safetensors files of a checkpoint folder: one file, or the shards that its index names.
    16-bit dtypes prefer the .fp16 variant, float32 prefers the full-precision files.
    Raises CheckpointError if there are none."""
    folder = Path(folder)
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json",
            f"{stem}.fp16.safetensors.index.json"]
    for name in full + half if dtype == torch.float32 else half + full:
        path = folder / name
        if path.is_file():
            return shard_files(path) if path.suffix == ".json" else [path]
    raise CheckpointError(f"{folder}: no {full[0]} in it")


def shard_files(index):
    """The files that a shard index names. Raises CheckpointError if one is not in its folder."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: not a shard index") from None
    for shard in shards:
        inside = isinstance(shard, str) and Path(shard).name == shard
        if not inside or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: shard {shard!r} is missing")
    return [index.parent / shard for shard in shards]


def remove_prefix(tensors, prefix):
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor
            for name, tensor in tensors.items() if name.startswith(prefix)}
