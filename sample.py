"""Text to image.

    python sample.py --prompt "a red circle above a blue square on a white background"
    python sample.py --model meissonic --prompt "a lighthouse in a storm, oil painting"    # 1024 x 1024, fetched once
    python sample.py --prompt "a star" "a heart" --n 4 --seed 7 --steps 32 --cfg 5 --out pictures
    python sample.py --score                                   # how often pictures show what their captions say

Text -> CLIP tower -> transformer that fills in masked tokens -> VQ decoder -> pixels (SPEC: paper section 2).
`Pipeline` is that line; `find_model` turns a name into a folder; `main` only reads arguments.
"""
import argparse
import json
import re
import sys
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import clip
import data
import kernels
import meissonic
import vq

BUNDLED = Path(__file__).parent / "weights" / "shapes"
HUB = dict(meissonic="MeissonFlow/Meissonic", monetico="Collov-Labs/Monetico")
DEFAULT_PROMPT = "a red circle above a blue square on a white background"
ROUNDED = dict(int8=torch.int8, fp8=torch.float8_e4m3fn)
PARTS = ("transformer", "vqvae", "text_encoder")


class UserError(Exception):
    """Something the user can mend; the message says how. The command line prints it and exits with status 2."""


# ---------------------------------------------------------------------------------------------------------
# Where a model lives


def complete(folder, dtype):
    """Whether a folder holds all that a Pipeline reads."""
    try:
        for part in PARTS:
            vq.weight_files(folder / part, stem_of(part), wanted_dtype(part, dtype))
    except vq.CheckpointError:
        return False
    has = lambda *names: all((folder / name).is_file() for name in names)
    return has(*(f"{part}/config.json" for part in PARTS), "scheduler/scheduler_config.json") and (
        has("tokenizer/vocab.json", "tokenizer/merges.txt") or has("tokenizer/tokenizer.json"))


def stem_of(part):
    return "model" if part == "text_encoder" else "diffusion_pytorch_model"


def wanted_dtype(part, dtype):
    """The dtype whose files are read: 16-bit twins are sound for all but the text encoder, which is read in full
    and cast (its published twin is faulty)."""
    return torch.float32 if part == "text_encoder" else dtype


def hub_files(names, dtype):
    """Of a hub repository's file names, those that are needed: small files, and for each part the one set of
    weights that vq.weight_files would take."""
    wanted = [n for n in names if n == "model_index.json" or n.startswith(("tokenizer/", "scheduler/"))]
    for part in PARTS:
        stem = f"{part}/{stem_of(part)}"
        full = weights_of(names, stem, "", f"{stem}.safetensors.index.json")
        twin = weights_of(names, stem, ".fp16", f"{stem}.safetensors.index.fp16.json") or \
            weights_of(names, stem, ".fp16", f"{stem}.fp16.safetensors.index.json")
        wanted += [f"{part}/config.json", *(full or twin if wanted_dtype(part, dtype) == torch.float32 else twin or full)]
    return [n for n in wanted if n in names]


def weights_of(names, stem, mark, index):
    """The whole file, or an index with its shards, or nothing."""
    if f"{stem}{mark}.safetensors" in names:
        return [f"{stem}{mark}.safetensors"]
    shards = [n for n in names if re.fullmatch(re.escape(stem + mark) + r"-\d+-of-\d+\.safetensors", n)]
    return [index, *shards] if index in names else []


def cached(repo, dtype):
    """The folder of a repository in the hub cache if it holds all that is needed, else None. No network."""
    from huggingface_hub import try_to_load_from_cache
    try:
        index = try_to_load_from_cache(repo, "model_index.json")
    except ValueError as e:                                   # the hub's rules for names
        raise UserError(f"--model {repo}: not a hub id ({e})") from None
    return Path(index).parent if isinstance(index, str) and complete(Path(index).parent, dtype) else None


def fetch(repo, dtype):
    """Download what is needed of a hub repository, once -> its folder. Raises UserError without retries when the
    hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    try:
        names = [s.rfilename for s in HfApi().model_info(repo, timeout=5).siblings]
        return Path(snapshot_download(repo, allow_patterns=hub_files(names, dtype)))
    except KeyboardInterrupt:
        raise
    except Exception as e:                                    # the hub's transport errors differ between its versions
        reason = str(e).strip().splitlines()
        raise UserError(f"{repo} is not in the hub cache and cannot be fetched ({reason[0] if reason else type(e).__name__}); "
                        "connect to the network, or download it elsewhere and pass --model FOLDER") from None


def find_model(name, device, dtype):
    """--model -> (folder, why). `auto` never fails: the bundled model is always there."""
    if name == "auto":
        if device.type != "cuda":
            return BUNDLED, "shapes, the small bundled model, as there is no CUDA GPU"
        try:
            repo = HUB["meissonic"]
            return cached(repo, dtype) or fetch(repo, dtype), "meissonic, as there is a CUDA GPU"
        except UserError as e:
            return BUNDLED, f"shapes, the small bundled model: {e}"
    if name == "shapes":
        return BUNDLED, "shapes"
    if Path(name).is_dir():
        return Path(name), name
    repo = HUB.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or name.startswith((".", "/", "~")):
        raise UserError(f"no model {name!r}: neither a folder, nor shapes, meissonic, monetico, nor a hub id OWNER/NAME")
    return cached(repo, dtype) or fetch(repo, dtype), name


# ---------------------------------------------------------------------------------------------------------
# The pipeline


class Pipeline:
    """Tokenizer, text encoder, transformer and VQ model of one checkpoint folder.

    Everything is checked at once, but each model is read when it is first used, and `release` lets go of it: they work
    in turn and need never be in memory together.

    Attributes of use to others: `encoder`, `transformer`, `vq`; `mask_token`; `tokens_f` and `f`, pixels for each token
    and for each block position along a side (sizes must divide by `f`); and the checkpoint's defaults `size` (width,
    height), `steps`, `cfg`, `score_condition`.
    """

    def __init__(self, folder, device="cpu", dtype=torch.float32, lora=None, rounded=None):
        """`lora`: a file of low-rank terms to merge. `rounded`: int8 or float8_e4m3fn, for the weights of the
        transformer's blocks. Raises vq.CheckpointError, naming the part at fault."""
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.lora, self.rounded = lora, rounded
        if not self.folder.is_dir():
            raise vq.CheckpointError(f"{folder}: no such folder")
        self.tokenizer = clip.Tokenizer.from_pretrained(self.folder / "tokenizer")
        text = clip.TextEncoder.from_pretrained(self.folder / "text_encoder", dtype, "meta").config
        config = meissonic.Transformer.from_pretrained(self.folder / "transformer", dtype, "meta").config
        pixels = vq.VQModel.from_pretrained(self.folder / "vqvae", dtype, "meta").config
        if text.hidden_size != config.joint_attention_dim or text.projection_dim != config.pooled_projection_dim:
            raise vq.CheckpointError(f"{folder}: text encoder and transformer do not fit each other")
        if self.tokenizer.bpe.get_vocab_size() > text.vocab_size or self.tokenizer.length > text.max_position_embeddings:
            raise vq.CheckpointError(f"{folder}: the tokenizer has more words or positions than the text encoder")
        if pixels.num_vq_embeddings != config.codebook_size:
            raise vq.CheckpointError(f"{folder}: the VQ model has {pixels.num_vq_embeddings} codes, "
                                     f"the transformer {config.codebook_size}")
        self.mask_token, self.tokens_f, self.f = config.mask_token, pixels.f, pixels.f * config.compression
        self.read_scheduler(self.folder / "scheduler" / "scheduler_config.json", config.downsample)

    @cached_property
    def encoder(self):
        return clip.TextEncoder.from_pretrained(self.folder / "text_encoder", self.dtype, self.device)

    @cached_property
    def transformer(self):
        model = meissonic.Transformer.from_pretrained(
            self.folder / "transformer", self.dtype, "cpu" if self.rounded else self.device, meissonic.Transformer.ADAPTIVE)
        if self.lora:
            meissonic.merge_lora(model, self.lora)
        return model.lean(self.device, self.rounded) if self.rounded else model

    @cached_property
    def vq(self):                                                  # NOTE the published decoder overflows in float16
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        return vq.VQModel.from_pretrained(self.folder / "vqvae", dtype, self.device)

    def release(self, part):
        """Let go of `encoder`, `transformer` or `vq`; the next use reads it again."""
        self.__dict__.pop(part, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def read_scheduler(self, path, compressed):
        try:
            raw = json.loads(path.read_text())
            known = dict(raw.get("defaults", {}))
        except (OSError, ValueError, TypeError, AttributeError):
            raise vq.CheckpointError(f"{path}: missing, or not a scheduler's JSON") from None
        self.convention = raw.get("rate_condition", "step")
        if self.convention not in ("step", "rate", "rate1000"):
            raise vq.CheckpointError(f"{path}: unknown rate_condition {self.convention!r}")
        if raw.get("mask_token_id", self.mask_token) != self.mask_token:
            raise vq.CheckpointError(f"{path}: mask_token_id {raw['mask_token_id']} is not the transformer's last token")
        side = known.get("size", 1024 if compressed else 512)
        self.size = (side, side)
        self.steps, self.cfg = known.get("steps", 48), known.get("cfg", 9.0)
        self.score_condition = known.get("score_condition", 6.0)

    def check_size(self, width, height):
        """Raises UserError, naming the nearest size that fits, if the model's grid cannot take these pixels."""
        if width < 1 or height < 1 or width % self.f or height % self.f:
            fit = [max(self.f, round(side / self.f) * self.f) for side in (width, height)]
            raise UserError(f"size {width}x{height} does not fit: width and height must be positive multiples of "
                            f"{self.f}, for example {fit[0]}x{fit[1]}")

    @torch.no_grad()
    def encode_text(self, prompts, width, height, score):
        """list of str -> meissonic.Text, equal prompts encoded once; micro conditions: size in pixels, no crop, score."""
        where = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self.tokenizer(list(where)).to(self.device)
        hidden, pooled = (torch.cat(parts) for parts in zip(*map(self.encoder, ids.split(64))))
        micro = torch.tensor([[width, height, 0, 0, score]], device=self.device, dtype=torch.float32)
        return meissonic.Text(hidden, pooled, micro.expand(len(where), 5)).rows([where[prompt] for prompt in prompts])

    def paint(self, tokens, text, against, seeds, steps=None, cfg=None, temperature=(2.0, 0.0), schedule="cosine", progress=iter):
        """meissonic.sample with this model, None its defaults: tokens (B, h, w), mask_token where unknown -> (B, h, w)."""
        return meissonic.sample(self.transformer, text, against, tokens, seeds, steps or self.steps,
                                self.cfg if cfg is None else cfg, temperature, schedule, self.convention, progress)

    @torch.no_grad()
    def decode(self, tokens):
        """(B, h, w) -> list of PIL images, made one at a time."""
        images = [self.vq.decode(one).float().clamp(0, 1) for one in tokens.split(1)]         # (1, 3, H, W) each
        arrays = [(x[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy() for x in images]
        return [Image.fromarray(a) for a in arrays]

    def blank(self, number, width, height):
        """(number, h, w) tokens, all unknown."""
        return torch.full((number, height // self.tokens_f, width // self.tokens_f), self.mask_token, device=self.device)

    def __call__(self, prompts, seeds, negative="", size=None, score=None, **settings):
        """One batch: prompts (list of str) and seeds (list of int), one for each picture; size (width, height) in pixels
        and score, None the checkpoint's defaults; settings of `paint` -> list of PIL images."""
        width, height = size or self.size
        self.check_size(width, height)
        text = self.encode_text([*prompts, negative], width, height, self.score_condition if score is None else score)
        against = text.rows([len(prompts)] * len(prompts))
        return self.decode(self.paint(self.blank(len(prompts), width, height), text.rows(slice(len(prompts))), against, seeds, **settings))


class Invented(Pipeline):
    """The published model's sizes with random weights and random prompts, for --bench."""

    def __init__(self, device, dtype, rounded=None):
        self.device, self.dtype, self.rounded, self.convention = torch.device(device), dtype, rounded, "step"
        config = meissonic.Config()
        self.mask_token, self.tokens_f, self.f = config.mask_token, 16, 32
        self.size, self.steps, self.cfg, self.score_condition = (1024, 1024), 48, 9.0, 6.0

    def tokenizer(self, prompts):
        return torch.stack([torch.randint(49408, (77,), generator=torch.Generator().manual_seed(zlib.crc32(p.encode()))) for p in prompts])

    def invent(self, model, dtype, device):
        with torch.device("meta"):
            model = model(model.CONFIG())
        model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        torch.manual_seed(0)                                       # the same again after a release
        for p in model.parameters():
            p.fill_(1) if p.dim() == 1 else p.normal_(std=p[0].numel() ** -0.5)
        return model

    @cached_property
    def encoder(self):
        return self.invent(clip.TextEncoder, self.dtype, self.device)

    @cached_property
    def transformer(self):
        return self.invent(meissonic.Transformer, self.dtype, "cpu").lean(self.device, self.rounded)

    @cached_property
    def vq(self):
        return self.invent(vq.VQModel, torch.float32 if self.dtype == torch.float16 else self.dtype, self.device)


def score_tasks(pipeline, number=100, batch=50, tasks=data.TASKS + ("unseen",), progress=tqdm, **settings):
    """The share of pictures that show what their caption says, for `number` held-out captions of each task of
    the world of shapes, seeds 0, 1, ... -> {task: share}, "overall" the mean of the six GenEval tasks."""
    shares = {}
    pairs = [(task, text, claim) for task in tasks for text, claim in data.test_claims(task, number)]
    right = []
    for i in progress(range(0, len(pairs), batch)):
        part = pairs[i:i + batch]
        pictures = pipeline([text for _, text, _ in part], list(range(i, i + len(part))), **settings)
        right += [data.shows(picture, claim) for picture, (_, _, claim) in zip(pictures, part)]
    for task in tasks:
        shares[task] = float(np.mean([r for r, (t, _, _) in zip(right, pairs) if t == task]))
    shares["overall"] = float(np.mean([shares[t] for t in tasks if t in data.TASKS]))
    return shares


# ---------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_size(text):
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or WxH in pixels")
    return int(match[1]), int(match[2] or match[1])


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def finite(text):
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def parse_arguments(argv):
    p = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", nargs="+", metavar="TEXT", help=f'one or more; "" is allowed (default: "{DEFAULT_PROMPT}")')
    p.add_argument("--prompt-file", type=Path, metavar="FILE", help="more prompts, one on each line, UTF-8")
    p.add_argument("--negative", default="", metavar="TEXT", help="what to steer away from (default: the empty prompt)")
    p.add_argument("--steps", type=positive, help="sampling steps (default: the model's; 48 for meissonic, 16 for shapes)")
    p.add_argument("--cfg", type=finite, help="guidance scale, 1 is none (default: the model's; 9 for meissonic, 3 for shapes)")
    p.add_argument("--size", type=parse_size, metavar="N|WxH", help="pixels (default: the model's; 1024 for meissonic, 64 for shapes)")
    p.add_argument("--n", type=positive, default=1, help="pictures for each prompt, with seeds SEED, SEED + 1, ... (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (default: 0)")
    p.add_argument("--temperature", type=finite, nargs=2, default=(2.0, 0.0), metavar=("A", "B"),
                   help="of the noise that chooses what to mask again, first to last step (default: 2 0)")
    p.add_argument("--score-condition", type=finite, help="how good a picture to ask for (default: 6)")
    p.add_argument("--model", default="auto", help="shapes, meissonic, monetico, a hub id or a folder (default: auto: "
                   "meissonic where there is a CUDA GPU and the weights can be had, else shapes)")
    p.add_argument("--lora", type=Path, metavar="FILE", help="low-rank terms, from train.py --lora or in PEFT's layout, to merge")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16", *ROUNDED),
                   help="of the weights; int8 and fp8 round those of the transformer's blocks (default: on CUDA bfloat16 from "
                        "compute capability 8.0, else float16; on a CPU bfloat16 for a large model if the chip multiplies it, else float32)")
    p.add_argument("--batch", type=positive, help="pictures made at a time (default: as many as 4096 tokens hold)")
    p.add_argument("--out", type=Path, default=Path("out"), metavar="PATH",
                   help="a .png file for one picture, else a folder (default: out)")
    p.add_argument("--bench", action="store_true", help="print what a batch of --n pictures takes, plainly and as it is done; "
                   "of meissonic's sizes with random weights where those are not cached (--steps 2 is enough on a CPU)")
    p.add_argument("--score", type=positive, nargs="?", const=100, metavar="N",
                   help="print how often pictures of N held-out captions for each task are right (default N: 100); "
                        "for models of the world of shapes")
    return p.parse_args(argv)


def choose_device(name):
    """--device -> (torch.device, why). Raises UserError for one that is unknown or not there."""
    if name is None:
        return (torch.device("cuda"), "the default") if torch.cuda.is_available() else (torch.device("cpu"), "no CUDA GPU")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("meta tensors hold no data")
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0][:150]}") from None
    return device, "--device"


def choose_dtype(name, device, model="auto"):
    """--dtype -> (torch.dtype of the arithmetic, that of the rounded weights or None, why). On a CPU that multiplies
    bfloat16 large models take it; the small ones here are not faster for it."""
    if name and name not in ROUNDED:
        return getattr(torch, name), None, "--dtype"
    if device.type == "cuda":
        chip = torch.cuda.get_device_capability(device)
        if name == "fp8" and chip < (8, 9):
            raise UserError("--dtype fp8 needs compute capability 8.9 (Ada, Hopper) or more; int8 runs here")
        dtype, why = (torch.bfloat16, "compute capability 8.0 or more") if chip >= (8, 0) else \
            (torch.float16, "compute capability below 8.0")
    elif device.type == "cpu" and model not in ("auto", "shapes") and not Path(model).is_dir() and multiplies_bfloat16():
        dtype, why = torch.bfloat16, "this CPU multiplies it"
    else:
        dtype, why = torch.float32, f"the default on {device.type}"
    return dtype, ROUNDED.get(name), f"--dtype, in {str(dtype)[6:]}" if name else why


def multiplies_bfloat16():
    """Whether the CPU has instructions for it; where PyTorch cannot tell, no."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def kernel_path(device, dtype):
    """kernels.path, for the line that a run prints. Raises UserError where MEISSONIC_KERNELS asks for what is not there."""
    try:
        return kernels.path(device, dtype)
    except RuntimeError as e:
        raise UserError(str(e)) from None


def read_prompts(args):
    prompts = list(args.prompt or [])
    if args.prompt_file:
        try:
            prompts += args.prompt_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--prompt-file {args.prompt_file}: cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8'})") from None
        if not prompts:
            raise UserError(f"--prompt-file {args.prompt_file}: no prompts in it")
    for prompt in (*prompts, args.negative):
        if any("\ud800" <= c <= "\udfff" for c in prompt):                # what Python makes of bytes that are not UTF-8
            raise UserError(f"prompt {prompt!r} is not valid UTF-8")
    return prompts or [DEFAULT_PROMPT]


def output_paths(out, prompts, seeds):
    """[(prompt, seed, path)]. Raises UserError if a path cannot be written; leaves nothing behind."""
    jobs = [(p, s) for p in prompts for s in seeds]
    if out.suffix.lower() == ".png" and len(jobs) > 1:
        raise UserError(f"--out {out} is one file, but {len(jobs)} pictures were asked for; name a folder")
    if out.suffix and out.suffix.lower() != ".png" and not out.is_dir():
        raise UserError(f"--out {out}: pictures are written as .png")
    folder = out.parent if out.suffix.lower() == ".png" else out
    try:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".sample-{id(jobs)}"
        probe.touch()
        probe.unlink()
        for made in missing:
            made.rmdir()
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror})") from None
    if out.suffix.lower() == ".png":
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder")
        return [(p, s, out) for p, s in jobs]
    slug = lambda p: re.sub(r"[^\w]+", "-", p.lower()).strip("-")[:60] or "empty"
    names, paths = set(), []
    for i, (p, s) in enumerate(jobs):
        name = f"{slug(p)}-{s}"
        while name in names:                                             # two prompts may share a slug
            name = f"{name}-{i}"
        names.add(name)
        paths.append((p, s, out / f"{name}.png"))
    return paths


def run(args):
    device, why_device = choose_device(args.device)
    dtype, rounded, why_dtype = choose_dtype(args.dtype, device, args.model)
    if not -2 ** 63 <= args.seed <= 2 ** 63 - args.n:
        raise UserError(f"--seed {args.seed} does not fit 64 bits")
    prompts, seeds = read_prompts(args), range(args.seed, args.seed + args.n)
    try:
        folder, why_model = find_model(args.model, device, dtype)
        pipeline = Pipeline(folder, device, dtype, args.lora, rounded)
    except UserError:
        if not (args.bench and args.model == "meissonic"):
            raise
        pipeline, why_model = Invented(device, dtype, rounded), "meissonic's sizes, random weights"
    size = args.size or pipeline.size
    pipeline.check_size(*size)
    print(f"model: {why_model} | device: {device} ({why_device}) | dtype: {args.dtype or str(dtype)[6:]} ({why_dtype}) | "
          f"kernels: {kernel_path(device, dtype)} | seed: {args.seed}")
    settings = dict(steps=args.steps, cfg=args.cfg, temperature=tuple(args.temperature))
    if args.bench:
        from kernels import bench                                   # measures, and is of no use to a picture
        return bench.picture(pipeline, size, args.n, args.steps or pipeline.steps, pipeline.cfg if args.cfg is None else args.cfg)
    if args.score:
        for task, share in score_tasks(pipeline, args.score, negative=args.negative, size=size, score=args.score_condition, **settings).items():
            print(f"{task:12} {share:.2f}")
        return
    make_pictures(pipeline, output_paths(args.out, prompts, seeds), args.negative, size, args.score_condition, args.batch, settings)


def make_pictures(pipeline, jobs, negative, size, score, batch, settings):
    """Text encoder, transformer and decoder in turn, each for all (prompt, seed, path) of `jobs`, and alone in memory.
    Interrupted, what is painted by then is still decoded and written."""
    score = pipeline.score_condition if score is None else score
    text = pipeline.encode_text([negative, *(prompt for prompt, _, _ in jobs)], *size, score)
    pipeline.release("encoder")
    blank = pipeline.blank(len(jobs), *size)
    batch, painted, stopped = batch or max(1, 4096 // blank[0].numel()), [], False
    for part in torch.arange(len(jobs)).split(batch):
        bar = lambda steps: tqdm(steps, f"pictures {part[0] + 1} to {part[-1] + 1} of {len(jobs)}" if len(jobs) > 1 else "steps")
        try:
            painted += pipeline.paint(blank[part], text.rows(part + 1), text.rows([0] * len(part)),
                                      [jobs[i][1] for i in part], progress=bar, **settings).split(1)
        except KeyboardInterrupt:
            stopped = True
            break
    pipeline.release("transformer")
    for tokens, (_, _, path) in zip(painted, jobs):
        path.parent.mkdir(parents=True, exist_ok=True)
        vq.write_whole(path, lambda beside: pipeline.decode(tokens)[0].save(beside, "PNG"))
        print(f"wrote {path}")
    if stopped:
        raise KeyboardInterrupt


def main(argv=None):
    args = parse_arguments(argv)
    try:
        run(args)
    except (UserError, vq.CheckpointError) as e:
        sys.exit(fail(e))
    except OSError as e:
        sys.exit(fail(f"{e.filename or args.out}: {e.strerror or e}"))
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit(fail("out of memory: lower --size, --batch or --n, or use --dtype bfloat16"))
    except RuntimeError as e:
        if not re.search("allocate memory|Storage size calculation overflowed", str(e)):     # PyTorch's words on a CPU
            raise
        sys.exit(fail("out of memory: lower --size, --batch or --n, or use --dtype bfloat16"))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def fail(message):
    print(f"sample.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
