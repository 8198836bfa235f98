"""What a command line of sample.py or of a tool asks for: the model, the prompts, and for each
picture its seed and its file.

    run = prepare(parser, parse_like(parser, argv))           # a parser with the flags of sample.py
    for batch in run.batches():
        ids = sample.fill_in(run, batch, ...)
"""
import argparse
import math
import os
import re
import zlib
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from engine import hub, rerank
from engine.checkpoint import UserError, read_file
from engine.cli import say
from engine.edit import Edit, read_edit
from engine.image_files import SUFFIXES
from engine.pipeline import Pipeline
from engine.settings import SOFTWARE, check_like, parameters_text, settings_of

DEFAULT_PROMPT = "a red circle above a blue square on a white background"
# What a one-step generator takes of these flags: what changes nothing
ONE_STEP = {"steps": 1, "cfg": 1.0, "schedule": None, "remask": 0, "best_of": 1, "negative": "",
            "image": None}
MAX_PICTURES = 100_000                    # of a run
MAX_TOKENS_AT_ONCE = 2 ** 20              # in a batch, 256 pictures of 1024 pixels
MAX_PROMPT_FILE = 2 ** 26                 # bytes
MAX_DEPTH = 200                           # folders of --out
NAME_BYTES = 255                          # of a file name, on most file systems
ROOM = 40                                 # bytes for -film.gif, a free number, a temporary name


class Job(NamedTuple):
    """One picture to make. A path of None: it is made, but not written."""
    prompt: str
    seed: int
    path: Path | None


@dataclass
class Run:
    """The arguments of a command line, complete, and what was made from them."""
    parser: argparse.ArgumentParser
    args: argparse.Namespace
    pipe: Pipeline
    edit: Edit | None
    jobs: list                                                # a Job for each picture
    provenance: dict                                          # {name: text} of every PNG

    @property
    def size(self):
        """(width, height) in pixels at which the model works."""
        return self.args.size or self.pipe.nearest_size(*self.edit.picture.size)

    @property
    def schedule(self):
        """The Schedule of the arguments, shortened for an edit that redraws a share only."""
        schedule = schedule_of(self.args, self.pipe)
        return self.edit.schedule(schedule) if self.edit else schedule

    def batches(self):
        """-> lists of Jobs. A single picture of --like is made in a batch of the same shape as
        before, beside copies of itself without a path: rounding depends on the shape."""
        size = self.args.batch
        if not (self.args.like and len(self.jobs) == 1):
            return [self.jobs[i:i + size] for i in range(0, len(self.jobs), size)]
        job, = self.jobs
        batch = [job._replace(path=None)] * size
        batch[int(self.args.made.get("place", 0)) % size] = job
        return [batch]

    def count_steps(self, ids):
        """How sample.fill_in draws ids (B, h, w) -> (batches of candidates, steps of each)."""
        if self.pipe.one_step:
            return 1, 1
        tokens = ids[0].numel()
        masked = int((ids[0] == self.pipe.mask_token).sum())
        plan = self.schedule.plan(masked, tokens)
        again, _ = rerank.tail(plan, masked)
        steps = len(plan) + self.args.remask * len(again)
        if self.args.best_of == 1:
            return 1, steps
        at_once = max(1, rerank.MAX_TOKENS // tokens)
        return math.ceil(len(ids) * self.args.best_of / at_once), steps

    def progress_bar(self, batch, ids):
        """A tqdm bar over the steps of filling in the ids (B, h, w) of a batch."""
        self.pipe.transformer                                 # read it before the time is taken
        label = "steps"
        if len(self.jobs) > 1:
            first = self.jobs.index(batch[0]) + 1
            label = f"pictures {first} to {first + len(batch) - 1} of {len(self.jobs)}"
        batches, steps = self.count_steps(ids)
        return tqdm(total=batches * steps, desc=label)

    def png_texts(self, batch):
        """{name: text} for the PNG of each picture of the batch that was just started -> list."""
        strength = self.edit.used_strength if self.edit else None
        size = self.edit.picture.size if self.edit else self.size
        texts = []
        for place, job in enumerate(batch):
            settings = settings_of(self.parser, self.args, prompt=job.prompt, seed=job.seed,
                                   batch=len(batch), strength=strength)
            shown = parameters_text(self.args, job.prompt, job.seed, size)
            texts.append({"parameters": shown} | settings | {"place": str(place)}
                         | self.provenance)
        return texts

    def place(self, job):
        """The path to write the picture of a Job to. A file that --out names is replaced, no other
        one."""
        return job.path if job.path == self.args.out else free_path(job.path)


def prepare(parser, args, suffix=""):
    """Check the arguments, load the model, print what runs -> Run. Names of files in a folder end
    with `suffix`. Raises UserError."""
    if args.seed + args.n > 2 ** 63:
        raise UserError(f"--seed {args.seed} + {args.n - 1} does not fit 64 bits")
    seeds = range(args.seed, args.seed + args.n)
    prompts = read_prompts(args)
    edit, checksums = read_edit(args)
    pipe = load_pipeline(args)
    provenance = {"software": SOFTWARE, "weights": hub.fingerprint(pipe.folders, pipe.dtype)}
    provenance |= checksums
    check_like(args, provenance)
    prefix = "again-" if args.like else ""
    prefix += f"{args.image.stem}-" if args.image else ""
    jobs = plan_jobs(args.out, prompts, seeds, prefix, suffix)
    run = Run(parser, args, pipe, edit, jobs, provenance)
    width, height = run.size
    tokens = width * height // pipe.f ** 2
    if args.batch is None:
        args.batch = min(16, max(1, rerank.MAX_TOKENS // (tokens * args.best_of)))
    at_once = len(run.batches()[0])
    if at_once * tokens > MAX_TOKENS_AT_ONCE:
        raise UserError(f"--batch {args.batch}: {at_once} pictures of {width}x{height} pixels at a "
                        f"time are more than {MAX_TOKENS_AT_ONCE} tokens; lower --batch or --size")
    return run


def load_pipeline(args):
    """Find and check the model of the arguments and print what runs -> Pipeline. Arguments that are
    None take the checkpoint's defaults. Raises UserError."""
    device, why_device = hub.choose_device(args.device)
    dtype, quantized, why_dtype = hub.choose_dtype(args.dtype, device)
    model = hub.find_model(args.model, device, dtype, args.text_encoder)
    pipe = Pipeline(model.folder, device, dtype, args.lora, quantized, args.compile,
                    model.text_encoder, model.transformer, model.schedule)
    pipe.check_size(*(args.size or pipe.size))
    if args.compile:
        hub.check_compile(device)                             # takes seconds: after quick checks
    args.device = str(device)
    args.dtype = args.dtype or str(dtype).removeprefix("torch.")
    say(f"model: {model.why} | device: {device} ({why_device}) | dtype: {args.dtype} "
        f"({why_dtype}) | kernels: {hub.kernel_path(device, dtype)} | seed: {args.seed}")
    if model.negative or model.text_encoder_name != "own":
        say(describe_text(args, model))
    if model.folder == hub.BUNDLED:
        args.model = "shapes"
    elif args.model == "auto":
        args.model = "meissonic"
    take_defaults(args, pipe, model)
    schedule_of(args, pipe)                                   # raises
    return pipe


def describe_text(args, model):
    """The text encoder and the negative prompt that are taken, and why, in one line."""
    official = "as the official program has it"
    why_text = "--text-encoder" if args.text_encoder else official
    negative, why_negative = args.negative, "--negative"
    if negative is None:
        negative, why_negative = model.negative, f'{official}; --negative "" for none'
    return (f"text encoder: {model.text_encoder_name} ({why_text}) | "
            f'negative: "{negative}" ({why_negative})')


def take_defaults(args, pipe, model):
    """Replace arguments that are None by the defaults of the hub.Model and its checkpoint."""
    schedule = pipe.schedule
    defaults = {"score_condition": pipe.score, "text_encoder": model.text_encoder_name}
    if pipe.one_step:
        defaults |= ONE_STEP | {"temperature": (schedule.temperature,)}
    else:
        defaults |= {
            "steps": schedule.steps,
            "cfg": schedule.cfg_scale,
            "temperature": schedule.temperature,
            "schedule": schedule.mask_schedule,
            "remask": pipe.remask,
            "best_of": pipe.best_of,
            "negative": model.negative,
        }
    if not args.image:                                        # an edit's size is the picture's
        defaults["size"] = pipe.size
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def schedule_of(args, pipe):
    """The Schedule of the arguments, with the checkpoint's timestep convention, or the OneStep.
    Raises UserError for flags that the model does not take."""
    if pipe.one_step:
        return one_step_of(args, pipe.schedule)
    if len(args.temperature) != 2:
        raise UserError("--temperature takes two numbers, at the first and the last step")
    return replace(pipe.schedule, steps=args.steps, cfg_scale=args.cfg,
                   temperature=tuple(args.temperature), mask_schedule=args.schedule)


def one_step_of(args, one_step):
    """The checkpoint's OneStep with the temperature of the arguments. Raises UserError for flags
    that make no sense with one step."""
    for name, value in ONE_STEP.items():
        if getattr(args, name) != value:
            raise UserError(f"--{name.replace('_', '-')}: this model is a one-step generator, it "
                            "draws whole pictures in one pass and without guidance")
    if len(args.temperature) != 1:
        raise UserError("--temperature takes one number with a one-step generator, the draw's")
    return replace(one_step, temperature=args.temperature[0])


# --------------------------------------------------------------------------------------------------
# Prompts and output files


def read_prompts(args):
    """The prompts of --prompt and --prompt-file, or a default one. Raises UserError for a file that
    cannot be read and for text that is not valid UTF-8."""
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += read_lines(args.prompt_file)
    for text in (*prompts, args.negative or "", args.source or ""):
        if any("\ud800" <= c <= "\udfff" for c in text):      # Python's stand-in for broken bytes
            raise UserError(f"prompt {text!r} is not valid UTF-8")
    return prompts or ["" if args.image else DEFAULT_PROMPT]


def read_lines(path):
    """The lines of --prompt-file that are not blank. Only \\n and \\r\\n end a line."""
    try:
        text = read_file(path, MAX_PROMPT_FILE).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {path}: cannot be read (not UTF-8)") from None
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"--prompt-file {path}: cannot be read ({reason})") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--prompt-file {path}: no prompts in it")
    return lines


def plan_jobs(out, prompts, seeds, prefix="", suffix=""):
    """--out -> a Job for each prompt and seed, no two of them with one path; see file_stem for the
    names. Raises UserError if a path cannot be written. Leaves no file or folder behind."""
    number = len(prompts) * len(seeds)
    one_file = out.suffix.lower() == ".png"
    if one_file and number > 1:
        raise UserError(f"--out {out} is one file, but {number} pictures were asked for; "
                        "name a folder")
    if number > MAX_PICTURES:
        raise UserError(f"--n: {number} pictures are more than {MAX_PICTURES}")
    if out.suffix.lower() in SUFFIXES and not one_file and not out.is_dir():
        raise UserError(f"--out {out}: pictures are written as .png")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    if one_file:
        jobs = [Job(prompt, seed, out) for prompt, seed in pairs]
    else:
        jobs = jobs_in_folder(out, pairs, prefix, suffix)
    check_writable(out, jobs)
    if one_file and out.is_dir():
        raise UserError(f"--out {out}: is a folder")
    return jobs


def jobs_in_folder(folder, pairs, prefix, suffix):
    """[(prompt, seed)] -> a Job for each, no two of them with one path."""
    names = set()
    jobs = []
    for i, (prompt, seed) in enumerate(pairs):
        name = file_stem(prompt, seed, prefix, suffix)
        while name in names:                                  # two prompts may have one slug
            name = f"{name}-{i}"
        names.add(name)
        jobs.append(Job(prompt, seed, folder / f"{name}.png"))
    return jobs


# Names of files


def file_stem(prompt, seed, prefix="", suffix=""):
    """The name of a picture, without .png, such as a-star-0. It is cut where it is too long for a
    file system, with ROOM for what is appended."""
    tail = f"-{seed}{suffix}"
    head = cut(prefix, 60) + slug(prompt)
    return cut(head, NAME_BYTES - ROOM - len(tail)) + tail


def slug(prompt):
    """A prompt as a file name: its letters and digits, at most 60. Without any, a checksum tells
    prompts apart."""
    letters = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60]
    if letters or not prompt:
        return letters or "empty"
    return f"prompt-{zlib.crc32(prompt.encode(errors='replace')):08x}"


def cut(text, size):
    """The beginning of a text, of at most `size` bytes."""
    return text.encode(errors="ignore")[:size].decode(errors="ignore")


def free_path(path):
    """The path of a picture, with a number appended if it, or a film of it, exists already."""
    for number in count():
        stem = f"{path.stem}-{number}" if number else path.stem
        names = (f"{stem}.png", f"{stem}-film.png", f"{stem}-film.gif")
        if not any(os.path.lexists(path.with_name(name)) for name in names):
            return path.with_name(names[0])


def check_writable(out, jobs):
    """Raises UserError if the longest name of the Jobs, with ROOM for what is appended, cannot be
    written in their folder, which need not exist yet."""
    folder = jobs[0].path.parent
    if len(folder.parts) > MAX_DEPTH:
        raise UserError(f"--out: more than {MAX_DEPTH} folders in each other, the name is too long")
    longest = max(len(os.fsencode(job.path.name)) for job in jobs)
    try:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".sample-{os.getpid()}-".ljust(longest + ROOM - len(".png"), "x")
        probe.touch()
        probe.unlink()
        for made in missing:
            if made.name != "..":
                made.rmdir()
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror})") from None
