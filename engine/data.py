"""Training pictures: where they come from, and their tokens on disk.

    source = FileSource("photos", seed=0, size=512)             # what --data names
    encode_images(source, folder, vq_model, tokenizer, "photos, seed 0, 512 px", run)
    dataset = TokenDataset(folder)
    ids, text_ids, micro_conds = dataset[epoch_indices([0], step, 64, len(dataset))]
    batches = Prefetch(make_batch, steps=6000, workers=2)       # make_batch(step, attempt)

The kinds of files that --data reads are in image_files.py. Pictures from anywhere else need a class
with the interface of `Source`.
Letters: B batch, M pictures of a file, H W pixels, h w tokens, L text positions.
"""
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.checkpoint import UserError, read_metadata, write_tensors, write_text
from engine.cli import note, visible
from engine.image_files import ImageFiles
from engine.images import PictureError, crop_square

DEFAULT_SCORE = 6.0                   # micro condition of pictures without an aesthetic score
MIN_FOR_WORKERS = 2000                # worker processes read the pictures if there are as many


class Source(Protocol):
    """The interface of what training reads pictures from."""
    size: int                                 # side of the square pictures in pixels
    skipped: list                             # what is left out: "name: reason"

    def __len__(self): ...

    def __getitem__(self, i):
        """-> uint8 (size, size, 3), caption, micro_conds (5,) float32: original width and height,
        top, left, score. The same for the same i, in any process. May raise PictureError."""

    def state(self, i):
        """Anything whose repr changes when self[i] does."""


class FileSource:
    """The Source of picture files. Each is cropped at a random place that is always the same."""

    def __init__(self, path, seed, size):
        self.images = ImageFiles(path, near=size)
        self.seed = seed
        self.size = size
        self.skipped = self.images.skipped

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, caption, score = self.images[i]
        rng = np.random.default_rng([self.seed, i])
        square, (height, width, top, left) = crop_square(image, self.size, rng)
        score = DEFAULT_SCORE if score is None else score
        return square, caption, np.array([width, height, top, left, score], np.float32)

    def state(self, i):
        return self.images.state(i)


def readable(source, number, first=0):
    """The next `number` pictures from index `first` on that can be read, fewer if the source has
    fewer; the index wraps around. -> tuples (pictures, captions, micro_conds). Raises UserError."""
    examples = []
    for i in range(first, first + len(source)):
        try:
            examples.append(source[i % len(source)])
        except PictureError:
            continue
        if len(examples) == number:
            break
    if not examples:
        raise UserError("no picture of --data could be read")
    return tuple(zip(*examples))


def to_float(pictures):
    """uint8 (B, H, W, 3) -> float32 tensor (B, 3, H, W) in [0, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------------------------------------
# Ahead of the loop


class Prefetch:
    """make(step, attempt) for one step after the other, up to `steps`, computed ahead of the
    training loop by worker processes. A call for any other step starts anew from there."""

    def __init__(self, make, steps, workers):
        self.make, self.steps = make, steps
        self.workers = workers if sys.platform == "linux" else 0    # a fork inherits `make`
        self.pool = None
        self.expected = None                              # (step, attempt) of the next call
        self.pending = deque()                            # futures

    def __call__(self, step, attempt):
        if not self.workers:
            return self.make(step, attempt)
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("fork"),
                                            begin_worker, (self.make,))
        if self.expected != (step, attempt):
            self.pending.clear()
        self.expected = step + 1, attempt
        last = min(step + 4 * self.workers, self.steps)
        for ahead in range(step + len(self.pending), max(last, step + 1)):
            self.pending.append(self.pool.submit(make_in_worker, ahead, attempt))
        try:
            item = pickle.loads(self.pending.popleft().result())
        except BrokenProcessPool:
            raise UserError("a process that prepares training data was killed; is memory "
                            "short?") from None
        if step + 1 >= self.steps:
            self.pool.shutdown()
            self.pool = None
        return item


def begin_worker(make):
    """Signals are for the main process: it stops the loop between two steps."""
    global make_item
    make_item = make
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    end_with_parent(None)


def make_in_worker(step, attempt):
    """As bytes: PyTorch would hand each tensor on as an open file in shared memory, and containers
    have little of it."""
    return pickle.dumps(make_item(step, attempt))


def worker_number(device):
    """Worker processes of a training process. On a CPU training itself needs the cores."""
    if device.type == "cpu":
        return 1
    return max(1, min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


# ------------------------------------------------------------------------------------------------
# Tokens on disk


class TokenFile(NamedTuple):
    """A file of tokens that is to be written."""
    path: Path
    metadata: dict                            # what the tokens depend on
    batches: list                             # of lists of indices


def encode_images(source, folder, vq_model, tokenizer, about, run, chunk=1000):
    """Encode all pictures of a source once, `chunk` of them to a file:
    tokens (M, h, w) int16, text (M, L) int32, micro (M, 5) float32.

    A file stays as long as `about` (a str that names source, seed, size, checksums of the models)
    and the states of its pictures are the same: an interrupted run loses one chunk at most. Each
    process writes every world_size-th file. A picture that cannot be read is left out; its name is
    printed and written to skipped.txt in run.out.
    `run` has rank, world_size, is_main, device, out, barrier().
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = math.ceil(len(source) / chunk)
    if run.is_main:
        _remove_files_beyond(folder, number)
    missing = []
    for k in range(run.rank, number, run.world_size):
        file = _token_file(source, folder, about, k, chunk)
        if not _is_up_to_date(file):
            missing.append(file)
    vq_model = vq_model.to(memory_format=torch.channels_last)                 # 1.25x on a CPU
    batches = _read_batches(source, missing, len(missing) * chunk >= MIN_FOR_WORKERS)
    for file in tqdm(missing, f"encode {folder.name}", disable=not run.is_main):
        _write_tokens(file, batches, vq_model, tokenizer, run.device)
    run.barrier()
    if run.is_main:
        _report_skipped(source, folder, run.out)


def _remove_files_beyond(folder, number):
    """Remove the token files of a source that was larger."""
    for path in folder.glob("*.safetensors"):
        if int(path.stem) >= number:
            path.unlink()


def _token_file(source, folder, about, k, chunk):
    indices = range(k * chunk, min((k + 1) * chunk, len(source)))
    states = repr([source.state(i) for i in indices])
    metadata = {"source": about, "state": f"{zlib.crc32(states.encode()):08x}"}
    size = max(1, min(50, 2 ** 21 // source.size ** 2))       # 2 at 1024 px: 3 GB in the VQ encoder
    batches = [indices[i:i + size] for i in range(0, len(indices), size)]
    return TokenFile(folder / f"{k:06d}.safetensors", metadata, batches)


def _is_up_to_date(file):
    return file.path.is_file() and file.metadata.items() <= read_metadata(file.path).items()


class _Attempts:
    """source[i] -> (example, None), or (None, reason) if it cannot be read."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        try:
            return self.source[i], None
        except PictureError as e:
            return None, str(e)


def _read_batches(source, files, use_workers):
    """-> iterator of lists of attempts, one for each batch of the files in turn."""
    workers = worker_number(torch.device("cuda")) if use_workers else 0
    sampler = [batch for file in files for batch in file.batches]
    return iter(DataLoader(_Attempts(source), batch_sampler=sampler, collate_fn=list,
                           num_workers=workers, worker_init_fn=end_with_parent))


def end_with_parent(worker):
    """Let this worker process end within a second after its parent, also if that was killed. It
    would wait for ever to hand on its last pictures."""
    parent = multiprocessing.parent_process().pid

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_tokens(file, batches, vq_model, tokenizer, device):
    """Encode the batches of one file and write it."""
    parts = []
    skipped = []
    for _ in file.batches:
        attempts = next(batches)
        examples = [example for example, _ in attempts if example]
        skipped += [reason for _, reason in attempts if reason]
        if examples:
            parts.append(_encode_batch(examples, vq_model, tokenizer, device))
    tensors = {"tokens": torch.zeros(0, 1, 1, dtype=torch.int16)}             # none was readable
    if parts:
        tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    metadata = file.metadata | {"skipped": json.dumps(skipped)}
    write_tensors(file.path, tensors, metadata)


@torch.no_grad()
def _encode_batch(examples, vq_model, tokenizer, device):
    """[(picture, caption, micro_conds)] -> {"tokens", "text", "micro": tensor} as stored."""
    pictures, captions, micro_conds = zip(*examples)
    images = to_float(np.stack(pictures)).to(device)                          # (B, 3, H, W)
    return {"tokens": vq_model.encode(images).short().cpu(),
            "text": tokenizer(captions, warn=False).int(),
            "micro": torch.from_numpy(np.stack(micro_conds))}


def _report_skipped(source, folder, out):
    skipped = list(source.skipped)
    for path in sorted(folder.glob("*.safetensors")):
        skipped += json.loads(read_metadata(path)["skipped"])
    if skipped:
        first = "; ".join(skipped[:3])
        note(f"{len(skipped)} pictures skipped; the first: {first}")
        write_text(out / "skipped.txt", "\n".join(map(visible, skipped)) + "\n")


class TokenDataset:
    """What `encode_images` wrote. The files are memory-mapped: only what is used takes memory.
    `grid` is (h, w). Raises UserError if there is no picture."""

    def __init__(self, folder):
        self.files = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if "text" in file.keys():
                    keys = ("tokens", "text", "micro")
                    self.files.append({key: file.get_tensor(key) for key in keys})
        if not self.files:
            raise UserError(f"{folder}: no picture in it could be read")
        self.ends = np.cumsum([len(file["text"]) for file in self.files])
        self.grid = self.files[0]["tokens"].shape[1:]

    def __len__(self):
        return int(self.ends[-1])

    def indices(self, seed, step, batch):
        return epoch_indices(seed, step, batch, len(self))

    def __getitem__(self, index):
        """(B,) array -> ids (B, h, w) int64, text_ids (B, L) int64, micro_conds (B, 5) float32."""
        numbers = np.searchsorted(self.ends, index, side="right")             # (B,) which file
        rows = index - np.concatenate(([0], self.ends))[numbers]
        places = list(zip(numbers, rows))
        ids = torch.stack([self.files[n]["tokens"][row] for n, row in places])
        text_ids = torch.stack([self.files[n]["text"][row] for n, row in places])
        micro_conds = torch.stack([self.files[n]["micro"][row] for n, row in places])
        return ids.long() & 0xFFFF, text_ids.long(), micro_conds              # int16 wraps: undo it


def epoch_indices(seed, step, batch, number):
    """The examples of a step -> (batch,) indices below `number`. Each epoch is a permutation of all
    examples that depends on `seed`, a sequence of integers, and on the epoch."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, number)
        indices.append(_permutation((*seed, epoch), number)[place])
    return np.array(indices)


@lru_cache(maxsize=2)
def _permutation(seed, number):
    return np.random.default_rng(seed).permutation(number)
