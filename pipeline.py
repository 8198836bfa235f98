"""One checkpoint as a line from text to pixels; where checkpoints come from, and what they run on.

    pipeline = Pipeline("weights/shapes")
    picture, = pipeline(["a red circle above a blue square"], seeds=[0])

Text -> CLIP tower -> transformer that fills in masked tokens -> VQ decoder -> pixels (SPEC: paper section 2).
Letters: B pictures, H W pixels, h w tokens.
"""
import json
import re
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
ROUNDED = dict(int8=torch.int8, fp8=torch.float8_e4m3fn)
PARTS = ("transformer", "vqvae", "text_encoder")
MOST_TOKENS = 4096                                # of a batch, and of an edit unless --size says otherwise
JUDGED = (0.95, 0.95, 0.9, 0.9, 0.85, 0.8, 0.75)  # shares masked where candidates are compared: all masked says nothing
MOST_PARTS = 16                                   # of a prompt that are left out in turn there, at the first four shares


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


def fingerprint(folder, dtype):
    """A checksum of a checkpoint: of the first MiB of each part's weights."""
    crc = 0
    for part in PARTS:
        with open(vq.weight_files(folder / part, stem_of(part), wanted_dtype(part, dtype))[0], "rb") as file:
            crc = zlib.crc32(file.read(2 ** 20), crc)
    return f"{crc:08x}"


# ---------------------------------------------------------------------------------------------------------
# What it runs on


def choose_device(name):
    """--device -> (torch.device, why). Raises UserError for one that is unknown or not there."""
    if name is None and torch.cuda.is_available():
        return torch.device("cuda"), "the default"
    if name is None:
        return torch.device("cpu"), "no CUDA GPU" + (" that PyTorch can use" if torch.version.cuda else ", and a PyTorch without CUDA")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)                          # Triton and graphs go by the current one
        if device.type == "meta":
            raise RuntimeError("meta tensors hold no data")
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0][:150]}") from None
    return device, "--device"


def choose_dtype(name, device):
    """--dtype -> (torch.dtype of the arithmetic, that of the rounded weights or None, why)."""
    if name and name not in ROUNDED:
        return getattr(torch, name), None, "--dtype"
    if device.type == "cuda":
        chip = torch.cuda.get_device_capability(device)
        if name == "fp8" and chip < (8, 9):
            raise UserError("--dtype fp8 needs compute capability 8.9 (Ada, Hopper) or more; int8 runs here")
        dtype, why = (torch.bfloat16, "compute capability 8.0 or more") if chip >= (8, 0) else \
            (torch.float16, "compute capability below 8.0")
    elif device.type == "cpu" and multiplies_bfloat16():
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


def check_parts(folder, tokenizer, text, transformer, pixels):
    """Raises CheckpointError where the parts of a model, told by their configs, do not fit each other."""
    if text.hidden_size != transformer.joint_attention_dim or text.projection_dim != transformer.pooled_projection_dim:
        raise vq.CheckpointError(f"{folder}: text encoder and transformer do not fit each other")
    if tokenizer.bpe.get_vocab_size() > text.vocab_size or tokenizer.length > text.max_position_embeddings:
        raise vq.CheckpointError(f"{folder}: the tokenizer has more words or positions than the text encoder")
    if pixels.num_vq_embeddings != transformer.codebook_size:
        raise vq.CheckpointError(f"{folder}: the VQ model has {pixels.num_vq_embeddings} codes, "
                                 f"the transformer {transformer.codebook_size}")


def check_compile(device):
    """Raises UserError where torch.compile does not run: on a CPU it wants a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except RuntimeError as e:
        raise UserError(f"--compile: {str(e).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------------------------
# The pipeline


class Pipeline:
    """Tokenizer, text encoder, transformer and VQ model of one checkpoint folder.

    Everything is checked at once, but each model is read when it is first used. Where `lean` is set they work in turn:
    what is read lets go of the others, and encoded prompts are kept.

    Attributes of use to others: `encoder`, `transformer`, `vq`; `mask_token`; `tokens_f` and `f`, pixels for each token
    and for each block position along a side (sizes must divide by `f`); and the checkpoint's defaults `size` (width,
    height), `steps`, `cfg`, `temperature`, `redraws`, `candidates`, `score_condition`.
    """

    def __init__(self, folder, device="cpu", dtype=torch.float32, lora=None, rounded=None, compiled=False):
        """`lora`: a file of low-rank terms to merge. `rounded`: int8 or float8_e4m3fn, for the weights of the
        transformer's blocks. `compiled`: torch.compile these, once for each size of a batch. Raises vq.CheckpointError,
        naming the part at fault."""
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.lora, self.rounded, self.compiled, self.lean, self.held = lora, rounded, compiled, False, {}
        if not self.folder.is_dir():
            raise vq.CheckpointError(f"{folder}: no such folder")
        self.tokenizer = clip.Tokenizer.from_pretrained(self.folder / "tokenizer")
        text = clip.TextEncoder.from_pretrained(self.folder / "text_encoder", dtype, "meta").config
        config = meissonic.Transformer.from_pretrained(self.folder / "transformer", dtype, "meta").config
        pixels = vq.VQModel.from_pretrained(self.folder / "vqvae", dtype, "meta").config
        check_parts(folder, self.tokenizer, text, config, pixels)
        self.mask_token, self.tokens_f, self.f = config.mask_token, pixels.f, pixels.f * config.compression
        self.read_scheduler(self.folder / "scheduler" / "scheduler_config.json", config.downsample)

    @cached_property
    def encoder(self):
        self.make_room()
        return clip.TextEncoder.from_pretrained(self.folder / "text_encoder", self.dtype, self.device)

    @cached_property
    def transformer(self):
        self.make_room()
        model = meissonic.Transformer.from_pretrained(
            self.folder / "transformer", self.dtype, "cpu" if self.rounded else self.device, meissonic.Transformer.ADAPTIVE)
        if self.lora:
            meissonic.merge_lora(model, self.lora)
        for block in model.blocks if self.compiled else ():
            block.compile(dynamic=False)
        return model.lean(self.device, self.rounded) if self.rounded else model

    @cached_property
    def vq(self):                                                  # NOTE the published decoder overflows in float16
        self.make_room()
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        return vq.VQModel.from_pretrained(self.folder / "vqvae", dtype, self.device)

    def make_room(self):
        if self.lean:
            self.release("encoder", "transformer", "vq")

    def release(self, *parts):
        """Let go of some of `encoder`, `transformer` and `vq`; the next use reads them again."""
        for part in parts:
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
        try:
            self.set_defaults(**{"size": 1024 if compressed else 512} | known)
        except TypeError as e:
            raise vq.CheckpointError(f"{path}: defaults: {e}") from None

    def set_defaults(self, size, steps=48, cfg=9.0, temperature=(2.0, 0.0), redraws=0, candidates=1, score_condition=6.0):
        self.size, self.steps, self.cfg, self.temperature = (size, size), steps, cfg, tuple(temperature)
        self.redraws, self.candidates, self.score_condition = redraws, candidates, score_condition

    def check_size(self, width, height):
        """Raises UserError, naming the nearest size that fits, if the model's grid cannot take these pixels."""
        if width < 1 or height < 1 or width % self.f or height % self.f:
            fit = [max(self.f, round(side / self.f) * self.f) for side in (width, height)]
            raise UserError(f"size {width}x{height} does not fit: width and height must be positive multiples of "
                            f"{self.f}, for example {fit[0]}x{fit[1]}")

    def fit(self, width, height):
        """The size at which a picture of these pixels is edited: the nearest that the grid takes, not too large."""
        shrink = min(1, (MOST_TOKENS * self.tokens_f ** 2 / (width * height)) ** 0.5)
        return tuple(max(self.f, round(side * shrink / self.f) * self.f) for side in (width, height))

    @torch.no_grad()
    def encode_text(self, prompts, width, height, score):
        """list of str -> meissonic.Text, equal prompts encoded once; micro conditions: size in pixels, no crop, score."""
        held = self.held if self.lean else {}
        for prompt in prompts:
            if prompt not in held:                                 # alone: rounding does not tell what it stood beside
                held[prompt] = self.encoder(self.tokenizer([prompt]).to(self.device))
        hidden, pooled = (torch.cat(parts) for parts in zip(*(held[prompt] for prompt in prompts)))
        micro = torch.tensor([[width, height, 0, 0, score]], device=self.device, dtype=torch.float32)
        return meissonic.Text(hidden, pooled, micro.expand(len(prompts), 5))

    def paint(self, tokens, text, against, seeds, steps=None, cfg=None, temperature=None, schedule="cosine",
              redraws=None, progress=iter, watch=None):
        """Fill in the tokens (B, h, w) that are mask_token; see meissonic.sample. None takes the checkpoint's default."""
        return meissonic.sample(self.transformer, text, against, tokens, seeds, steps or self.steps,
                                self.cfg if cfg is None else cfg, temperature or self.temperature, schedule, self.convention,
                                self.redraws if redraws is None else redraws, progress, watch)

    @torch.no_grad()
    def decode(self, tokens):
        """(B, h, w) -> list of RGB Images, made one at a time."""
        images = [self.vq.decode(one).float().clamp(0, 1) for one in tokens.split(1)]         # (1, 3, H, W) each
        arrays = [(x[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy() for x in images]
        return [Image.fromarray(a) for a in arrays]

    @torch.no_grad()
    def encode_picture(self, image):
        """RGB Image whose sides divide by f -> tokens (1, h, w)."""
        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)[None]                # (1, 3, H, W)
        return self.vq.encode(pixels / 255)

    def draw(self, prompts, seeds, negative="", size=None, score=None, tokens=None, candidates=None, watch=None, **settings):
        """One batch: prompts (list of str) and seeds (list of int), one for each picture; size (width, height) in pixels
        and score, None the checkpoint's; `tokens` (B, h, w) to start from, masked where to draw (None: everywhere); how
        many `candidates` are drawn for each picture, of which the one that fits best is taken; `watch`, which sees that one, and the
        other settings of `paint` -> tokens (B, h, w)."""
        width, height = size or self.size
        self.check_size(width, height)
        each, moments = candidates or self.candidates, []
        told = told_of(prompts, each)
        text = self.encode_text([*sum(told, []), negative], width, height, self.score_condition if score is None else score)
        if tokens is None:
            shape = len(prompts), height // self.tokens_f, width // self.tokens_f
            tokens = torch.full(shape, self.mask_token, device=self.device)
        rows = [i for i in range(len(prompts)) for _ in range(each)]
        seeds = [candidate_seed(seed, k) for seed in seeds for k in range(each)]
        drawn = self.paint(tokens[rows], text.rows(rows), text.rows([-1] * len(rows)), seeds,
                           watch=watch and (lambda *seen: moments.append(seen)), **settings)
        best = slice(None)
        if each > 1:
            texts = (text.rows([k * len(prompts) + i for i in rows]) for k in range(len(told)))
            fits = self.fit_of(drawn, *texts).view(-1, each)                                                      # (B, each)
            best = [k * each + i for k, i in enumerate(fits.argmax(1).tolist())]
        for n, believed, masked in moments:
            watch(n, believed[best], masked[best])
        return drawn[best]

    def fit_of(self, tokens, text, *less):
        """How well each picture of a batch fits its prompt -> (B,) float32, in nats for a token: its log-likelihood, less
        four times what each part of the prompt takes away from it. `less`: the Texts without one part each; what shows
        no sign of a word is likelier where the word is not said. Rates and weight: README, Candidates."""
        likely = meissonic.likelihoods(self.transformer, tokens, [text], JUDGED, self.convention).mean((0, 2, 3))
        told, *untold = meissonic.likelihoods(self.transformer, tokens, [text, *less], JUDGED[:4], self.convention).mean((2, 3))
        return likely - 4 * sum((without - told).clamp(min=0) for without in untold)

    def __call__(self, *arguments, **settings):
        """`draw`, decoded -> list of RGB Images."""
        return self.decode(self.draw(*arguments, **settings))


def shortened(prompt):
    """A prompt without each of its words -> list of str; without stretches of some, where it has over MOST_PARTS."""
    words = prompt.split()
    parts = min(len(words), MOST_PARTS)
    cuts = [len(words) * k // parts for k in range(parts + 1)] if words else []
    return [" ".join(words[:a] + words[b:]) for a, b in zip(cuts, cuts[1:])]


def told_of(prompts, candidates):
    """What is told the model of a batch: [the prompts, and for candidates to be judged each without its first part, its
    second, ...], lists of B; a prompt that has no kth part is whole there."""
    parts = [shortened(prompt) for prompt in prompts] if candidates > 1 else []
    return [list(prompts)] + [[part[k] if k < len(part) else prompt for prompt, part in zip(prompts, parts)]
                              for k in range(max(map(len, parts), default=0))]


def candidate_seed(seed, k):
    """The kth candidate's seed, the 0th's being the picture's own: far apart, so that seeds side by side share none."""
    return (seed + k * 0x9E3779B97F4A7C15 + 2 ** 63) % 2 ** 64 - 2 ** 63


class Invented(Pipeline):
    """The published model's sizes with random weights and random prompts, for --bench."""

    def __init__(self, device, dtype, rounded=None):
        self.device, self.dtype, self.rounded, self.lean, self.convention = torch.device(device), dtype, rounded, False, "step"
        config = meissonic.Config()
        self.mask_token, self.tokens_f, self.f = config.mask_token, 16, 32
        self.set_defaults(1024)

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


# ---------------------------------------------------------------------------------------------------------
# How well it draws


def score_tasks(pipeline, number=100, batch=16, tasks=data.TASKS + ("unseen",), progress=tqdm, **settings):
    """The share of pictures that show what their caption says, for `number` held-out captions of each task of
    the world of shapes, seeds 0, 1, ... -> {task: share}, "overall" the mean of the six GenEval tasks."""
    pairs = [(task, text, claim) for task in tasks for text, claim in data.test_claims(task, number)]
    right = []
    for i in progress(range(0, len(pairs), batch)):
        part = pairs[i:i + batch]
        pictures = pipeline([text for _, text, _ in part], list(range(i, i + len(part))), **settings)
        right += [data.shows(picture, claim) for picture, (_, _, claim) in zip(pictures, part)]
    shares = {task: float(np.mean(right[i * number:(i + 1) * number])) for i, task in enumerate(tasks)}
    shares["overall"] = float(np.mean([shares[t] for t in tasks if t in data.TASKS]))
    return shares
