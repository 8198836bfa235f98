"""Pictures in the folders that the official scorers of GenEval and HPS v2 read.

    python -m tools.benchmarks geneval --metadata evaluation_metadata.jsonl --out runs/geneval
    python -m tools.benchmarks hps --prompts anime.json concept-art.json --out runs/hps
    torchrun --nproc_per_node=8 -m tools.benchmarks geneval --metadata FILE --out runs/geneval

Takes the flags of sample.py that choose the model and the sampling. The text encoder is the
checkpoint's own, as in the paper; `--text-encoder laion` takes that of the official programs.

    geneval   OUT/00000/metadata.jsonl, the line of the prompt; OUT/00000/samples/00000.png to
              00003.png, with seeds SEED + 4 i + k for picture k of prompt i
    hps       OUT/anime/00000.jpg; the styles are the names of the files, which hold JSON lists of
              prompts; seeds SEED + i. Quality is Pillow's default, as in the authors' example

A run that was interrupted goes on where it was: pictures that are there are not drawn again. Under
torchrun each process draws its share of the prompts. The settings are in OUT.json, beside the
folder, because the scorer of HPS v2 takes all that is in it for styles. A run with other settings
is refused.
"""
import json
import os
import zlib
from pathlib import Path

from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import sample
from engine import hub, rerank
from engine.checkpoint import UserError, read_file, read_json, write_json
from engine.cli import note, number_of_pictures, path, say, script
from engine.distributed import own_device
from engine.jobs import Job, Run, load_pipeline
from engine.settings import SOFTWARE, setting_flags

STYLES = ("anime", "concept-art", "paintings", "photo")
PICTURES = {"geneval": 4, "hps": 1}                       # of each prompt
MAX_FILE = 2 ** 26                                        # bytes
NOT_HERE = ("prompt", "prompt_file", "n", "like", "image", "mask", "invert_mask", "outpaint",
            "feather", "strength", "source")                        # flags of sample.py
MAY_DIFFER = ("batch", "compile", "device", "software")   # change pictures by rounding alone


@script("tools.benchmarks", out_of_memory=sample.OUT_OF_MEMORY,
        stopped="stopped; the same command goes on")
def main(argv=None):
    args = parse_arguments(argv)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    jobs, lines = geneval_jobs(args) if args.benchmark == "geneval" else hps_jobs(args)
    run = open_run(args, jobs)
    out = args.out.resolve()
    keep_settings(out.with_name(f"{out.name}.json"), settings(run), jobs)
    share = [job for i, job in enumerate(jobs) if i // args.pictures % processes == rank]
    missing = [job for job in share if not job.path.exists()]
    with tqdm(total=len(share), initial=len(share) - len(missing), disable=rank > 0) as bar:
        for start in range(0, len(missing), args.batch):
            batch = missing[start:start + args.batch]
            draw(run, batch, lines)
            bar.update(len(batch))
    of_process = f" (process {rank} of {processes})" if processes > 1 else ""
    say(f"{args.out}: drew {len(missing)} pictures, {len(share) - len(missing)} were there"
        f"{of_process}")


def open_run(args, jobs):
    """Load the model on this process's own device -> Run."""
    args.device = own_device(args.device)
    pipe = load_pipeline(args)
    provenance = {"software": SOFTWARE, "weights": hub.fingerprint(pipe.folders, pipe.dtype)}
    run = Run(sample.make_parser(), args, pipe, None, jobs, provenance)
    width, height = run.size
    tokens = width * height // pipe.f ** 2
    args.batch = args.batch or min(16, max(1, rerank.MAX_TOKENS // (tokens * args.best_of)))
    return run


def parse_arguments(argv):
    parser = sample.make_parser("tools.benchmarks", __doc__)
    parser.add_argument("benchmark", choices=tuple(PICTURES))
    parser.add_argument("--metadata", type=path, metavar="FILE",
                        help="evaluation_metadata.jsonl of GenEval")
    parser.add_argument("--prompts", type=path, nargs="+", metavar="FILE",
                        help=f"JSON lists of HPS v2: {', '.join(f'{s}.json' for s in STYLES)}")
    parser.add_argument("--pictures", type=number_of_pictures, metavar="N",   # torchrun refuses --n
                        help="of each prompt (default: 4 for GenEval; HPS v2 takes 1)")
    parser.set_defaults(out=None, text_encoder="own")
    args = parser.parse_args(argv)
    for name in NOT_HERE:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is no flag of a benchmark")
    needed = "metadata" if args.benchmark == "geneval" else "prompts"
    for name in ("out", needed):
        if getattr(args, name) is None:
            parser.error(f"{args.benchmark} needs --{name}")
    if args.benchmark == "hps" and args.pictures not in (None, 1):
        parser.error("--pictures: HPS v2 takes one of each prompt")
    if not 0 <= args.seed < 2 ** 62:
        parser.error("--seed: a benchmark needs one from 0 to 2^62")
    args.pictures = args.pictures or PICTURES[args.benchmark]
    return args


# --------------------------------------------------------------------------------------------------
# What to draw: a Job for each picture, the pictures of a prompt one after the other


def geneval_jobs(args):
    """-> (Jobs, {folder of a prompt: its line of --metadata}). Raises UserError."""
    jobs, lines = [], {}
    for line in read_text(args.metadata).split("\n"):       # splitlines() knows others, too
        if line.strip():
            prompt = prompt_of(line, f"--metadata {args.metadata}, prompt {len(lines)}")
            folder = args.out / f"{len(lines):05d}"
            lines[folder] = line
            for k in range(args.pictures):
                jobs.append(Job(prompt, args.seed + len(jobs), folder / "samples" / f"{k:05d}.png"))
    if not jobs:
        raise UserError(f"--metadata {args.metadata}: no prompts in it")
    return jobs, lines


def prompt_of(line, name):
    """The prompt of a line of --metadata. Raises UserError, which begins with `name`."""
    entry = parse_json(line, name)
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError(f'{name}: not a JSON object with a "prompt"')
    return entry["prompt"]


def hps_jobs(args):
    """-> (Jobs, {}). Raises UserError."""
    jobs = []
    for file in args.prompts:
        if file.stem not in STYLES:
            raise UserError(f"--prompts {file}: the name is none of the styles {', '.join(STYLES)}")
        prompts = parse_json(read_text(file), f"--prompts {file}")
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise UserError(f"--prompts {file}: not a JSON list of texts")
        for i, prompt in enumerate(prompts):
            jobs.append(Job(prompt, args.seed + i, args.out / file.stem / f"{i:05d}.jpg"))
    if not jobs or len({job.path for job in jobs}) < len(jobs):
        raise UserError("--prompts: no prompts, or one style twice")
    return jobs, {}


def read_text(file):
    """Raises UserError."""
    try:
        return read_file(file, MAX_FILE).decode("utf-8-sig")
    except (OSError, ValueError) as e:                    # ValueError: too large, not UTF-8
        raise UserError(f"{file}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


def parse_json(text, name):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{name}: not JSON") from None


# --------------------------------------------------------------------------------------------------
# Settings


def settings(run):
    """What the pictures of a folder have in common -> dict for JSON."""
    prompts = "\n".join(job.prompt for job in run.jobs)
    values = {"benchmark": run.args.benchmark, "pictures": run.args.pictures,
              "prompts_crc": f"{zlib.crc32(prompts.encode(errors='replace')):08x}"}
    for action in setting_flags(run.parser).values():
        if action.dest not in NOT_HERE:
            value = getattr(run.args, action.dest)
            values[action.dest] = str(value) if isinstance(value, Path) else value
    return json.loads(json.dumps(values | run.provenance))     # tuples become lists


def keep_settings(file, values, jobs):
    """Write the settings, or compare them with those of the pictures that are there. All processes
    call it. Raises UserError if they differ, or if there are pictures without settings."""
    if file.exists():
        before = read_json(file)
        for name in values | before:
            if before.get(name) != values.get(name) and name not in MAY_DIFFER:
                raise UserError(f"{file}: its pictures have {name} {before.get(name)!r:.80}, not "
                                f"{values.get(name)!r:.80}; name another --out")
        if before.get("software") != values["software"]:
            note(f"note: {file}: begun with {before.get('software')!s:.200}")
    elif any(job.path.exists() for job in jobs):
        raise UserError(f"{file} is missing, but there are pictures; name another --out")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, values)


# --------------------------------------------------------------------------------------------------
# Pictures


def draw(run, batch, lines):
    """Draw and write the pictures of some Jobs."""
    ids = sample.starting_ids(run, batch)
    ids = sample.fill_in(run, batch, ids, sample.encode(run, batch))
    for job, picture, text in zip(batch, ids, run.png_texts(batch)):
        folder = job.path.parent.parent
        if folder in lines:
            write_whole(folder / "metadata.jsonl",
                        lambda path: path.write_text(lines[folder] + "\n", encoding="utf-8"))
        write_picture(job.path, sample.decode(run, picture), text)


def write_picture(path, image, text):
    """Write a PNG with its settings, or a JPEG without."""
    if path.suffix == ".jpg":
        write_whole(path, lambda temporary: image.save(temporary, "JPEG"))
        return
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value.encode(errors="replace").decode())
    write_whole(path, lambda temporary: image.save(temporary, "PNG", pnginfo=info))


def write_whole(path, write):
    """Call write(temporary path) and rename the result to `path`, which one process writes. The
    temporary name depends on the path alone: what a killed run leaves, the next one overwrites,
    because the file is still missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
