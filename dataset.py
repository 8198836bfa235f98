"""What is trained on: examples (picture, caption, micro conditions), and pictures as tokens, encoded once.

    source = source_of(run, "1")                  # the world of shapes, or --data
    encode(run, "1")                              # all of it through the VQ model, to files of a thousand
    pictures = Tokens(token_folder(run, "1"))
    tokens, text, micro = pictures[examples([run.seed], step, 64, len(pictures))]

Letters: B batch, M examples of a file, H W pixels, h w tokens, L text positions.
"""
import contextlib
import json
import math
import os
import sys
import zlib
from functools import lru_cache

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import clip
import data
import disk
import trainer
import vq
from pipeline import UserError

MANY = 2000                                                  # pictures to encode for which other processes are started


# ---------------------------------------------------------------------------------------------------------
# Examples


class World:
    """`number` examples of the world of shapes; the i-th comes from a generator seeded with (seed, stage, i)."""
    def __init__(self, seed, stage, size, number, **shares):
        self.skipped = []
        self.key, self.size, self.number = [seed, trainer.number_of(stage), 2 ** 32], size, number
        self.shares = shares

    def __len__(self):
        return self.number

    def state(self, i):
        return None

    def __getitem__(self, i):                                    # -> (size, size, 3) uint8, caption, micro (5,) float32
        return data.training_example(np.random.default_rng([*self.key, i]), self.size, **self.shares)


class Disk:
    """The pictures of --data, each resized and cropped at a place of its own."""
    def __init__(self, source, seed, size):
        self.pictures, self.seed, self.size = disk.Pictures(source, near=size), seed, size
        self.skipped = self.pictures.skipped

    def __len__(self):
        return len(self.pictures)

    def state(self, i):
        return self.pictures.state(i)

    def __getitem__(self, i):                                    # as World; raises disk.PictureError
        picture, text, score = self.pictures[i]
        crop, (height, width, top, left) = disk.crop(picture, self.size, np.random.default_rng([self.seed, i]))
        return crop, text, np.array([width, height, top, left, data.CLEAN if score is None else score], np.float32)


def source_of(run, stage):
    preset = run.stages[stage]
    if run.data:
        return Disk(run.data, run.seed, preset["size"])
    return World(run.seed, stage, preset["size"], preset.get("pictures") or preset["pool"], **mixture(preset))


def mixture(preset):
    """The shares by which a stage's pictures differ from the world's usual ones; see data.training_example."""
    return {name: preset[name] for name in ("concepts", "odd", "letters") if name in preset}


def pixels(pictures):
    """uint8 (B, H, W, 3) numpy -> float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def readable(source, number, first=0):
    """The `number` examples of a source from the `first` on, those left out that cannot be read; after the last comes the
    0th -> (pictures, captions, micro)."""
    examples = []
    for i in range(first, first + len(source)):
        with contextlib.suppress(disk.PictureError):
            examples.append(source[i % len(source)])
        if len(examples) == number:
            break
    if not examples:
        raise UserError("no picture of --data could be read")
    return tuple(zip(*examples))


# ---------------------------------------------------------------------------------------------------------
# Their tokens


def token_folder(run, stage):
    return run.out / "tokens" / stage


class Attempts:
    """The examples of a source, each (example, None), or (None, why it cannot be read): what processes hand over."""
    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        try:
            return self.source[i], None
        except disk.PictureError as e:
            return None, str(e)


def encode(run, stage, chunk=1000):
    """Write each picture of a stage's source as tokens, once, `chunk` to a file: tokens (M, h, w) int16, text (M, L)
    int32, micro (M, 5) float32. Files of the same pictures, VQ model and tokenizer are kept (of a disk's pictures and
    captions: of the same names, sizes and times), so that nothing is encoded twice and an interrupted run loses one chunk
    at most; each process writes every world-th file. A picture that cannot be read is skipped, counted and named in its
    file. Pictures are drawn or read by other processes, one for each core, where there are many."""
    source, folder = source_of(run, stage), token_folder(run, stage)
    tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    model = vq.VQModel.from_pretrained(run.out / "vqvae", device=run.device)
    model = model.to(memory_format=torch.channels_last)                      # 1.25x on a CPU
    files = [p for part in ("vqvae", "tokenizer") for p in sorted((run.out / part).iterdir()) if p.is_file()]
    about = {"source": f"{run.data or 'shapes'}, {len(source)} pictures, seed {run.seed}, {run.stages[stage]['size']} px, "
                       f"{mixture(run.stages[stage])}, "
                       f"{[zlib.crc32(p.read_bytes()) for p in files]}"}
    folder.mkdir(parents=True, exist_ok=True)
    count, most = math.ceil(len(source) / chunk), max(1, min(50, 2 ** 21 // run.stages[stage]["size"] ** 2))   # at 1024 pixels 3 GB
    for old in folder.glob("*.safetensors"):
        if run.first and int(old.stem) >= count:                             # of a source that was larger
            old.unlink()
    missing = []
    for k in range(run.rank, count, run.world):
        path, chosen = folder / f"{k:06d}.safetensors", range(k * chunk, min((k + 1) * chunk, len(source)))
        mine = about | {"state": f"{zlib.crc32(repr([source.state(i) for i in chosen]).encode()):08x}"}
        if not (path.is_file() and mine.items() <= trainer.metadata(path).items()):
            missing.append((path, mine, [chosen[i:i + most] for i in range(0, len(chosen), most)]))
    readers = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if len(missing) * chunk >= MANY else 0
    batches = iter(DataLoader(Attempts(source), batch_sampler=[batch for *_, batches in missing for batch in batches],
                              collate_fn=list, num_workers=min(readers, 16)))
    for path, mine, indices in tqdm(missing, f"encode {stage}", disable=not run.first):
        made, skipped = [], []
        for _ in indices:
            read, troubles = zip(*next(batches))
            skipped += filter(None, troubles)
            if any(read):
                pictures, captions, micro = zip(*filter(None, read))
                with torch.no_grad():
                    tokens = model.encode(pixels(np.stack(pictures)).to(run.device)).short().cpu()
                made.append(dict(tokens=tokens, text=tokenizer(captions, tell=False).int(), micro=torch.from_numpy(np.stack(micro))))
        flat = {k: torch.cat([part[k] for part in made]) for k in made[0]} if made else dict(tokens=torch.zeros(0, 1, 1, dtype=torch.int16))
        vq.write_whole(path, lambda p: save_file(flat, p, metadata=mine | {"skipped": json.dumps(skipped)}))
    run.wait()
    skipped = source.skipped + [name for path in sorted(folder.glob("*.safetensors")) for name in json.loads(trainer.metadata(path)["skipped"])]
    if skipped and run.first:
        print(f"{len(skipped)} pictures skipped; the first: {'; '.join(skipped[:3])}", file=sys.stderr)
        (run.out / "skipped.txt").write_text("\n".join(skipped) + "\n", encoding="utf-8")


class Tokens:
    """What `encode` wrote, mapped and not read: memory holds what is being used."""
    def __init__(self, folder):
        self.files = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if "text" in file.keys():
                    self.files.append({k: file.get_tensor(k) for k in ("tokens", "text", "micro")})
        if not self.files:
            raise UserError(f"{folder}: no picture in it could be read")
        self.ends = np.cumsum([len(f["text"]) for f in self.files])
        self.grid = self.files[0]["tokens"].shape[1:]

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        """(B,) numpy -> tokens (B, h, w) int64, text (B, L) int64, micro (B, 5) float32."""
        which = np.searchsorted(self.ends, index, side="right")
        rows = index - np.concatenate(([0], self.ends))[which]
        pick = lambda key: torch.stack([self.files[f][key][r] for f, r in zip(which, rows)])
        return pick("tokens").long() & 0xFFFF, pick("text").long(), pick("micro")


def examples(seed, step, batch, number):
    """The examples of a step, (batch,) indices: every permutation of the data is gone through before the next."""
    return np.array([order((*seed, p // number), number)[p % number] for p in range(step * batch, (step + 1) * batch)])


@lru_cache(maxsize=2)
def order(seed, number):
    return np.random.default_rng(seed).permutation(number)
