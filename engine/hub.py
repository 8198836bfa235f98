"""Where models come from, and what they run on: --model, --text-encoder, --device and --dtype.

    device, why = choose_device(None)
    dtype, quantized, why = choose_dtype(None, device)
    model = find_model("shapes", device, dtype)           # or "meissonic": in the hub's cache
    pipe = Pipeline(model.folder, device, dtype, text_encoder=model.text_encoder)

Each choice comes with its reason, for the line that a run prints first. Choices raise UserError.
"""
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

import clip
import kernels
import meissonic
import vq
from engine.checkpoint import CheckpointError, UserError, weight_files
from engine.cli import note, visible

BUNDLED = Path(__file__).parent.parent / "weights" / "shapes"
MEISSONIC, MONETICO = "MeissonFlow/Meissonic", "Collov-Labs/Monetico"
DIMO = "Yuanzhi/DiMO"                                     # a transformer; the rest is Meissonic's
DIMO_TRANSFORMER = "meissonic/transformer"                # its folder there
MODELS = {"shapes": BUNDLED, "meissonic": MEISSONIC, "monetico": MONETICO, "dimo": DIMO}
PARTS = {"transformer": meissonic.Transformer, "vqvae": vq.VQModel,
         "text_encoder": clip.TextEncoder}                # folder of a checkpoint -> its model
OWN_TEXT = {"text_encoder": clip.TextEncoder}
OTHER_TEXT = {"": clip.TextEncoder}                       # a repository that is a text encoder
WITHOUT_TEXT = {part: kind for part, kind in PARTS.items() if part not in OWN_TEXT}
QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# Defaults of the official programs. Meissonic's takes the original CLIP tower in place of its own,
# fine-tuned one, as sampling is more stable with it; the paper's numbers are with its own.
TEXT_ENCODERS = {"laion": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
OFFICIAL_TEXT_ENCODER = {MEISSONIC: "laion", MONETICO: "own"}
OFFICIAL_NEGATIVE = ("worst quality, low quality, low res, blurry, distortion, watermark, logo, "
                     "signature, text, jpeg artifacts, signature, sketch, duplicate, ugly, "
                     "identifying mark")


# --------------------------------------------------------------------------------------------------
# Models


class Model(NamedTuple):
    """What --model and --text-encoder stand for."""
    folder: Path
    why: str
    text_encoder: Path                                    # folder of the text encoder
    text_encoder_name: str                                # own, laion, a folder or a hub id
    negative: str                                         # the default of --negative
    transformer: Path | None = None                       # folder of another one than the model's
    schedule: meissonic.OneStep | None = None             # and how that one is sampled


def find_model(name, device, dtype, text_encoder=None):
    """--model, --text-encoder -> Model. text_encoder None: the official program's, or the model's
    own. `auto` alone never fails: the bundled model is always there."""
    if name == "auto":
        return find_default(device, dtype, text_encoder)
    return find_parts(find_place(name, MODELS, "model"), name, dtype, text_encoder)


def find_default(device, dtype, text_encoder):
    """Meissonic on a CUDA GPU if its weights can be downloaded, else the bundled model."""
    bundled = "shapes, the small bundled model"
    if device.type != "cuda":
        reason = f"it runs on {device}" if torch.cuda.is_available() else "there is no CUDA GPU"
        return find_parts(BUNDLED, f"{bundled}, as {reason}", dtype, text_encoder)
    try:
        return find_parts(MEISSONIC, "meissonic, as there is a CUDA GPU", dtype, text_encoder)
    except UserError as e:
        return find_parts(BUNDLED, f"{bundled}: {e}", dtype, text_encoder)


def find_place(name, short_names, what):
    """A short name, a folder or a hub id -> folder (Path) or repository (str). Where OWNER is a
    folder here, OWNER/NAME is one too, or a mistake."""
    if name in short_names:
        return short_names[name]
    folder = Path(name)
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise UserError(f"{what} {name}: a file; name the folder that has transformer, vqvae, "
                        "text_encoder" if what == "model" else f"{what} {name}: not a folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/", "~")):
        raise UserError(f"no {what} {name!r}: neither a folder, nor {', '.join(short_names)}, "
                        "nor a hub id OWNER/NAME")
    if folder.parent.is_dir():
        raise UserError(f"no {what} {name}: there is a folder {folder.parent}, but no "
                        f"{folder.name} in it")
    return name


def find_parts(place, why, dtype, text_encoder):
    """Folder or repository of a model, --text-encoder -> Model. Downloads what is missing."""
    name = text_encoder or OFFICIAL_TEXT_ENCODER.get(place, "own")
    negative = OFFICIAL_NEGATIVE if place in OFFICIAL_TEXT_ENCODER else ""
    parts = PARTS if name == "own" else WITHOUT_TEXT
    generator = one_step_transformer(place)
    wanted = []
    if generator:
        layout = {generator: meissonic.Transformer}
        wanted.append(Wanted(place, (layout,), "pass --model FOLDER"))
        place = MEISSONIC                                 # has the other parts
        parts = {part: kind for part, kind in parts.items() if part != "transformer"}
        why = f"{why}, a one-step generator, with the other parts of {place}"
    wanted.append(Wanted(place, (parts,), "pass --model FOLDER"))
    if name != "own":
        other = find_place(name, TEXT_ENCODERS | {"own": None}, "text encoder")
        wanted.append(Wanted(other, (OTHER_TEXT, OWN_TEXT), "pass --text-encoder FOLDER or own",
                             place))
    folders = obtain(wanted, dtype)
    folder = folders[1] if generator else folders[0]
    text_folder = folder if name == "own" else folders[-1]
    if name == "own" or not (text_folder / "config.json").is_file():          # of a whole model
        text_folder = text_folder / "text_encoder"
    model = Model(folder, why, text_folder, name, negative)
    if generator:
        model = model._replace(transformer=folders[0] / generator, schedule=meissonic.OneStep())
    return model


def one_step_transformer(place):
    """The path of the transformer in a repository or folder that holds, as Di[M]O's, that of a
    one-step generator and no other part of a model; else None."""
    if place == DIMO:
        return DIMO_TRANSFORMER
    if not isinstance(place, Path) or (place / "vqvae").exists() or (place / "scheduler").exists():
        return None
    paths = DIMO_TRANSFORMER, "transformer"               # the repository, or its folder meissonic
    return next((path for path in paths if (place / path / "config.json").is_file()), None)


# --------------------------------------------------------------------------------------------------
# The hub


class Wanted(NamedTuple):
    """A model or a text encoder that a run needs."""
    place: Path | str                                     # a folder, or a repository of the hub
    layouts: tuple                                        # dicts like PARTS; it has one of them
    advice: str                                           # what helps where it cannot be fetched
    spares: Path | str | None = None                      # model whose own text encoder it replaces


class Download(NamedTuple):
    """The files of a repository that a run needs."""
    repo: str
    files: list
    size: int                                             # bytes that the cache does not have yet
    advice: str                                           # of its Wanted


def obtain(wanted, dtype):
    """List of Wanted -> their folders. All that has to be fetched is told before any of it is."""
    folders = [find_folder(one, dtype) for one in wanted]
    missing = [one for one, folder in zip(wanted, folders) if folder is None]
    downloads = [plan_download(one, dtype) for one in missing]
    if downloads:
        announce(missing, downloads, dtype)
    fetched = iter([fetch(download) for download in downloads])
    return [folder or next(fetched) for folder in folders]


def find_folder(wanted, dtype):
    """The folder of a Wanted if it is one or is in the hub's cache, else None."""
    if isinstance(wanted.place, Path):
        return wanted.place
    folders = (cached(wanted.place, layout, dtype) for layout in wanted.layouts)
    return next((folder for folder in folders if folder), None)


def cached(repo, parts, dtype):
    """The folder of a repository in the hub's cache if these parts are complete, else None. No
    network."""
    config = config_name(next(iter(parts)))
    path = find_in_cache(repo, config)
    if path is None:
        return None
    folder = Path(path).parents[config.count("/")]
    return folder if is_complete(folder, parts, dtype) else None


def find_in_cache(repo, name, revision=None):
    """The path of a file in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache
    try:
        path = try_to_load_from_cache(repo, name, revision=revision)
    except ValueError as e:                               # the name breaks the hub's rules
        raise UserError(f"{repo}: not a hub id ({e})") from None
    return path if isinstance(path, str) else None


def plan_download(wanted, dtype):
    """-> Download. Raises UserError without retries when the hub cannot be reached."""
    from huggingface_hub import HfApi
    repo = wanted.place
    try:
        info = HfApi().model_info(repo, timeout=5, files_metadata=True)
    except Exception as e:                # the hub's transport errors differ between its versions
        raise hub_error(repo, e, f"{repo} is not in the hub cache and cannot be fetched "
                        f"({first_line(e)}); connect to the network, or {wanted.advice}") from None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    fitting = [parts for parts in wanted.layouts
               if all(config_name(part) in sizes for part in parts)]
    files = hub_files(sizes, dtype, (fitting or wanted.layouts)[0])
    missing = [name for name in files if not find_in_cache(repo, name, info.sha)]
    return Download(repo, files, sum(sizes[name] for name in missing), wanted.advice)


def announce(wanted, downloads, dtype):
    """Say on stderr what is fetched, how large it is, where to, and what would make it less."""
    from huggingface_hub import constants
    total = in_bytes(sum(download.size for download in downloads))
    note(f"fetching {total} to {constants.HF_HUB_CACHE}, once; if it is cut, the next run goes on:")
    for one, download in zip(wanted, downloads):
        line = f"    {in_bytes(download.size)}  {one.place}"
        if isinstance(one.spares, str):
            own = plan_download(Wanted(one.spares, (OWN_TEXT,), one.advice), dtype)
            line += f" for its text encoder (--text-encoder own: {in_bytes(own.size)} instead)"
        note(line)


def in_bytes(size):
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def fetch(download):
    """Download the files of a Download that the cache lacks -> folder."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(download.repo, allow_patterns=download.files))
    except Exception as e:                                # see plan_download
        raise hub_error(download.repo, e, f"{download.repo} could not be fetched "
                        f"({first_line(e)}); the next run goes on from there; or "
                        f"{download.advice}") from None


def hub_error(repo, error, otherwise):
    """An error of the hub's client -> UserError: a repository that wants a permission, one that is
    not there, or the words `otherwise`. The hub answers 401 for missing and for private ones."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return UserError(f"{repo} asks for a permission: accept its terms on its page of the hub "
                         "and log in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return UserError(f"{repo}: the hub has no such public repository; check the name, or log "
                         "in with `hf auth login` if it is private")
    return UserError(otherwise)


def first_line(error, length=150):
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return visible(lines[0][:length]) if lines else type(error).__name__


def config_name(part):
    return in_part(part, "config.json")


def in_part(part, name):
    """The path of a file in a part of a checkpoint; part "" is its top."""
    return f"{part}/{name}" if part else name


def is_complete(folder, parts, dtype):
    """Whether a folder holds these parts and, of a model, every other file that is read."""
    try:
        for part, kind in parts.items():
            part_files(folder / part, kind, dtype)
    except CheckpointError:
        return False
    configs = [config_name(part) for part in parts]
    if "vqvae" not in parts:                              # not a whole model
        return has_files(folder, configs)
    configs += ["scheduler/scheduler_config.json", "model_index.json"]
    tokenizers = (["tokenizer/vocab.json", "tokenizer/merges.txt"], ["tokenizer/tokenizer.json"])
    return has_files(folder, configs) and any(has_files(folder, names) for names in tokenizers)


def has_files(folder, names):
    return all((folder / name).is_file() for name in names)


def part_files(folder, kind, dtype):
    """The weight files of a model of this kind -> list of paths."""
    return weight_files(folder, kind.STEM, stored_dtype(kind, dtype))


def stored_dtype(kind, dtype):
    """The dtype of the files to read. The text encoder is read in float32 and cast: its published
    .fp16 twin is faulty."""
    return dtype if kind.FP16_VARIANT else torch.float32


def fingerprint(folders, dtype):
    """A checksum of a checkpoint: of the first MiB of each part's weights -> 8 hex digits.
    folders: {part: its folder}."""
    crc = 0
    for part, kind in PARTS.items():
        with open(part_files(folders[part], kind, dtype)[0], "rb") as file:
            crc = zlib.crc32(file.read(2 ** 20), crc)
    return f"{crc:08x}"


def hub_files(names, dtype, parts=PARTS):
    """The needed files among a hub repository's file names: for each part its config and the same
    set of weights that checkpoint.weight_files would choose; of a model the small files, too."""
    wanted = []
    if "vqvae" in parts:
        wanted = ["model_index.json"]
        wanted += [n for n in names if n.startswith(("tokenizer/", "scheduler/"))]
    for part, kind in parts.items():
        stem = in_part(part, kind.STEM)
        full = weight_names(names, stem, f"{stem}.safetensors.index.json")
        half = (weight_names(names, f"{stem}.fp16", f"{stem}.safetensors.index.fp16.json")
                or weight_names(names, f"{stem}.fp16", f"{stem}.fp16.safetensors.index.json"))
        prefer_full = stored_dtype(kind, dtype) == torch.float32
        wanted.append(config_name(part))
        wanted += full or half if prefer_full else half or full
    return [n for n in wanted if n in names]


def weight_names(names, stem, index):
    """One set of weights among file names: the whole file, or an index and its shards, or none."""
    if f"{stem}.safetensors" in names:
        return [f"{stem}.safetensors"]
    if index not in names:
        return []
    pattern = re.escape(stem) + r"-\d+-of-\d+\.safetensors"
    return [index] + [n for n in names if re.fullmatch(pattern, n)]


# --------------------------------------------------------------------------------------------------
# Devices and dtypes


def choose_device(name):
    """--device -> (torch.device, why). Raises UserError if it is unknown or not available."""
    if name is not None:
        error = device_error(name)
        if error:
            raise UserError(f"device {name!r} cannot be used: {error}")
        return torch.device(name), "--device"
    if torch.cuda.is_available():
        error = device_error("cuda")
        if error is None:
            return torch.device("cuda"), "the default"
        return torch.device("cpu"), f"the CUDA GPU does not run this PyTorch's kernels: {error}"
    if torch.version.cuda:
        return torch.device("cpu"), "no CUDA GPU that PyTorch can use"
    return torch.device("cpu"), "no CUDA GPU, and a PyTorch without CUDA"


def device_error(name):
    """Why the smallest kernel does not run on a device, or None. A PyTorch that was built without
    kernels for a GPU sees that GPU all the same. The GPU of a name like cuda:1 becomes the current
    one, which is where Triton and CUDA graphs run."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device) + 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            if device.index is not None:
                torch.cuda.set_device(device)
        if device.type == "meta":
            raise RuntimeError("meta tensors hold no data")
    except (RuntimeError, AssertionError, ImportError) as e:
        return first_line(e)
    return None


def choose_dtype(name, device):
    """--dtype -> (dtype of the arithmetic, dtype of quantized weights or None, why)."""
    if name and name not in QUANTIZED:
        return getattr(torch, name), None, "--dtype"
    if name == "fp8" and device.type == "cuda" and capability(device) < (8, 9):
        raise UserError("--dtype fp8 needs compute capability 8.9 (Ada, Hopper) or more; "
                        "int8 runs here")
    dtype, why = default_dtype(device)
    if name:
        why = f"--dtype, in {str(dtype)[6:]}"
    return dtype, QUANTIZED.get(name), why


def default_dtype(device):
    """-> (dtype, why)."""
    if device.type == "cuda" and has_bfloat16(device):
        return torch.bfloat16, "compute capability 8.0 or more"
    if device.type == "cuda":
        return torch.float16, "compute capability below 8.0"
    if has_bfloat16(device):
        return torch.bfloat16, "this CPU multiplies it"
    return torch.float32, f"the default on {device.type}"


def has_bfloat16(device):
    """Whether the device has instructions for bfloat16 products; no if PyTorch cannot tell."""
    if device.type == "cuda":
        return capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def capability(device):
    return torch.cuda.get_device_capability(device)


def kernel_path(device, dtype):
    """kernels.path, for the line that a run prints. Raises UserError if MEISSONIC_KERNELS asks for
    a path that is not available."""
    try:
        return kernels.path(device, dtype)
    except RuntimeError as e:
        raise UserError(str(e)) from None


def check_compile(device):
    """Raises UserError if torch.compile does not run: on a CPU it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except RuntimeError as e:
        raise UserError(f"--compile: {str(e).splitlines()[0]}") from None
