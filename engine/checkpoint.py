"""Strict loading and saving of checkpoint folders: config.json and safetensors, published layout.

    model = VQModel.from_pretrained("weights/shapes/vqvae", dtype=torch.bfloat16, device="cuda")
    model.save_pretrained("runs/mine/vqvae")

A model is built on the meta device. Then its tensors are read straight to the target device, one at
a time, so a second copy of the model never exists. What does not fit raises CheckpointError that
names it: config keys and their values; tensors that are missing, unknown, misshaped, of another
type or not finite. All files and folders appear whole: they are written beside and renamed.
"""
import contextlib
import fnmatch
import json
import math
import os
import reprlib
import secrets
import shutil
import stat
import types
import typing
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


MAX_JSON = 2 ** 26                                # bytes
LFS_POINTER = b"version https://git-lfs"          # what git leaves in place of a large file


def read_json(path):
    """Read a JSON object. Raises CheckpointError if the file is missing or holds anything else."""
    try:
        text = read_file(path, MAX_JSON)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None
    try:
        raw = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):          # the second one: nested too deep
        what = "a Git LFS pointer: git lfs pull" if is_lfs_pointer(path) else "not a JSON file"
        raise CheckpointError(f"{path}: {what}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return raw


def is_lfs_pointer(path):
    """Whether a file is what `git clone` without Git LFS leaves in place of the real one."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def write_json(path, content):
    """Write a dict as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


SIZES = (1, 2 ** 20)                              # bounds of a number that BOUNDS does not list
DEPTH = (0, 1000)                                 # bounds of a number of layers


def check_fields(config, bounds):
    """Raise CheckpointError unless every field of a dataclass fits its annotation and the bounds
    {name: (lowest, highest)}."""
    for field in fields(config):
        check_value(field.name, getattr(config, field.name), field.type,
                    *bounds.get(field.name, SIZES))


def check_value(name, value, kind, low=-math.inf, high=math.inf):
    """Raise CheckpointError unless the value fits; see fits."""
    if not fits(value, kind, low, high):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind)
        if kind not in (bool, str):
            wanted += f" from {low} to {high}"
        raise CheckpointError(f"{name} {reprlib.repr(value)} is not {wanted}")


def fits(value, kind, low, high):
    """Whether a value is of an annotated type and, if it is a number, within the bounds. That holds
    for all entries of a tuple. A bool is no int, an int may stand for a float, NaN fits none."""
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, part, low, high) for part in parts)
    if typing.get_origin(kind) is tuple:          # tuple[int, ...]
        short = isinstance(value, tuple) and len(value) <= 100
        return short and all(fits(v, parts[0], low, high) for v in value)
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and low <= value <= high
    return isinstance(value, kind) and not (kind is str and len(value) > 100)


class JsonConfig:
    """Base class of the config dataclasses.

    FIXED    {key: value} of published configs that this project supports with one value only
    IGNORED  keys of published configs that do not affect the network
    BOUNDS   {field: (lowest, highest)} where these are not SIZES
    """
    FIXED = {}
    IGNORED = frozenset()
    BOUNDS = {}

    def __post_init__(self):
        check_fields(self, self.BOUNDS)

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
                    raise CheckpointError(f"{path}: {key} = {reprlib.repr(value)} is not "
                                          f"supported, only {cls.FIXED[key]!r}")
            elif key not in cls.IGNORED:
                raise CheckpointError(f"{path}: unknown key {reprlib.repr(key)}")
        try:
            return cls(**values)
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from None

    def to_dict(self):
        """What config.json holds: the FIXED keys and all fields."""
        return {**self.FIXED, **{field.name: getattr(self, field.name) for field in fields(self)}}


# -------------------------------------------------------------------------------------------------
# Models


class Embedding(nn.Embedding):
    """nn.Embedding, with other random weights. PyTorch's are normal, and on the meta device normal
    numbers import 900 modules, which takes a second and a half."""
    def reset_parameters(self):
        nn.init.uniform_(self.weight, -1, 1)


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
            raise CheckpointError(f"{path}: no model can be built from it "
                                  f"({first_line(e)})") from None
        files = weight_files(folder, cls.STEM, dtype if cls.FP16_VARIANT else torch.float32)
        model.load_tensors(files, dtype, device, host)
        return model.eval().requires_grad_(False)

    def load_tensors(self, files, dtype, device, host=()):
        """Check the safetensors files and assign every tensor from them; see from_pretrained."""
        table = self.weight_map()
        folder = Path(files[0]).parent
        stored = self.open_files(files, str(device))
        self.check_tensors(table, stored, folder)
        if str(device) == "meta":
            return
        parts = {}                                            # {our name: [published names]}
        for published, (name, _) in table.items():
            parts.setdefault(name, []).append(published)
        tensors = {}
        for name, names in parts.items():
            target = "cpu" if any(text in name for text in host) else str(device)
            pieces = [stored[published].read(target).to(dtype) for published in names]
            for published, piece in zip(names, pieces):
                if not is_finite(piece):
                    raise CheckpointError(f"{folder}: {published} holds NaN or infinity "
                                          f"in {str(dtype)[6:]}")
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
                raise CheckpointError(f"{path}: {what_it_is(path, e)}") from None
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
            if stored[published].dtype() not in FLOATS:
                raise CheckpointError(f"{folder}: {published} is of type "
                                      f"{stored[published].dtype()}, not a floating-point number")

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and the weights under their published names; the folder appears whole.
        `dtype` None keeps the dtype of each tensor. Raises UserError for weights that are not
        finite."""
        ours = self.state_dict()
        tensors = {}
        for published, (name, rows) in self.weight_map().items():
            tensor = ours[name][rows].detach()
            tensors[published] = tensor.to("cpu", dtype or tensor.dtype).contiguous()

        def write(temporary):
            write_tensors(temporary / f"{self.STEM}.safetensors", tensors)
            write_json(temporary / "config.json", self.config.to_dict())
        check_finite(folder, tensors)
        write_folder(folder, write, owned=("config.json", f"{self.STEM}*"))


FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")     # dtypes that weights may have


@dataclass
class StoredTensor:
    """A tensor of a safetensors file that is open on one or more devices."""
    handles: dict  # device -> open file
    key: str

    def shape(self):
        return tuple(self.handles["cpu"].get_slice(self.key).get_shape())

    def dtype(self):
        return self.handles["cpu"].get_slice(self.key).get_dtype()

    def read(self, device):
        return self.handles[device].get_tensor(self.key)


# -------------------------------------------------------------------------------------------------
# Files


def read_file(path, limit):
    """The bytes of a regular file of at most `limit` bytes. Raises ValueError for others: a pipe or
    a device may never end. Raises OSError if it cannot be read."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        raw = b"" if found.st_size > limit else file.read(limit + 1)  # files of /proc have size 0
    if max(found.st_size, len(raw)) > limit:
        raise ValueError(f"larger than {limit / 2 ** 20:.0f} MiB")
    return raw


TEMPORARY = ".meissonic-"                         # begins the names of what is not whole yet
OLD = ".meissonic-old-"                           # begins that of a folder that is being replaced


def atomic_write(path, write):
    """Call write(temporary path) and rename the result to `path`. A reader never sees half a file,
    and an interrupted run leaves none behind. A symbolic link stays: its target is replaced."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")
    temporary = temporary_beside(path)
    try:
        write(temporary)
        follow_umask(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path):
    """A new short name in the same folder, with the number of this process: engine.resume.clean
    removes what a killed process left."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")


def follow_umask(path):
    """Give a file the mode that the user's umask asks for; safetensors writes with mode 600. Some
    network shares and FAT refuse, and the file is as good without."""
    umask = os.umask(0o077)                       # it cannot be read without being set
    os.umask(umask)
    with contextlib.suppress(OSError):
        path.chmod(0o666 & ~umask)


def write_folder(folder, write, owned):
    """Call write(temporary folder) and rename the result to `folder`: it appears whole. `owned` are
    patterns of all file names that such a folder may have. A folder that holds other things is not
    replaced: the new files move into it, and other files of these names are removed."""
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    shared = is_shared(folder, owned)
    temporary = temporary_beside(folder / "file" if shared else folder)
    try:
        temporary.mkdir()
        write(temporary)
        if shared:
            move_into(temporary, folder, owned)
        else:
            replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_shared(folder, owned):
    """Whether a folder cannot be replaced: it holds other things, somebody works in it, or no other
    can be made beside it."""
    if not folder.is_dir():
        return False
    fixed = os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)
    names = [path.name for path in folder.iterdir()]
    return fixed or folder == Path.cwd() or not all(is_owned(name, owned) for name in names)


def is_owned(name, owned):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in owned)


def move_into(temporary, folder, owned):
    new = [path.name for path in temporary.iterdir()]
    for name in new:
        os.replace(temporary / name, folder / name)
    for path in list(folder.iterdir()):
        if is_owned(path.name, owned) and path.name not in new:
            path.unlink()


def replace_folder(temporary, folder):
    """Between the two renames there is none: engine.resume.clean brings the old one back."""
    old = folder.with_name(OLD + folder.name)
    if folder.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path, text):
    """Write text as UTF-8, atomically."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path, tensors, metadata=None):
    """Write {name: contiguous CPU tensor} as a safetensors file, atomically. Raises UserError if
    one is not finite."""
    check_finite(path, tensors)
    metadata = {"format": "pt", **(metadata or {})}
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def check_finite(path, tensors):
    """Raise UserError, before anything is written, if a tensor of {name: tensor} is not finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{path}: not written, {name} holds NaN or infinity "
                            f"in {str(tensor.dtype)[6:]}; what was there stays")


def is_finite(tensor):
    """Whether a tensor has no NaN and no infinity. One pass without a copy, as NaN is both the
    smallest and the largest number: 0.3 s for 10^9 numbers in float16, 0.5 s in float32."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:                # float8 has no aminmax
        tensor = tensor.half()
    return all(math.isfinite(end) for end in tensor.aminmax())


def read_metadata(path):
    """The metadata of a safetensors file, {key: str}. Raises CheckpointError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: {what_it_is(path, e)}; remove it") from None


def what_it_is(path, error):
    """What to say of a file that is not a whole safetensors file."""
    if is_lfs_pointer(path):
        return "a Git LFS pointer, not the weights: git lfs pull"
    return f"not a whole safetensors file ({first_line(error)})"


def first_line(error):
    """The first line of an error's message, shortened."""
    line = (str(error).splitlines() or [""])[0]
    return line if len(line) <= 200 else line[:200] + "..."


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
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError):
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
