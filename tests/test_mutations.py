"""Damage of every kind. A mutated checkpoint is refused in one line or draws finite pictures; a run
that is killed inside every one of its writes ends with the weights of an uninterrupted one."""
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from common import GOLDEN_MODEL, ROOT
from tiny_training import RESULTS, assert_same_tensors, script, trained_run

from engine.checkpoint import UserError
from engine.pipeline import Pipeline

# -------------------------------------------------------------------------------------------------
# Mutations

VALUES = (None, True, False, 0, -1, 1, 2 ** 63, 10 ** 30, 0.5, -0.0, float("nan"), float("inf"),
          1e39, "", "two", "\x1b[31m\n", [], {}, [[]], [1, 2, 3], [None], {"a": {"b": []}})
NUMBERS = (b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\xff\xff", b"\xff\x7b")      # NaN, inf, 65504


def flip_bits(rng, raw):
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 3, 20))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut(rng, raw):
    return raw[:rng.randrange(len(raw))]


def insert(rng, raw):
    at = rng.randrange(len(raw))
    return raw[:at] + rng.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 10_000)) + raw[at:]


def repeat(rng, raw):
    at, end = sorted(rng.randrange(len(raw)) for _ in range(2))
    return raw[:end] + raw[at:]


def empty(rng, raw):
    return rng.choice((b"", b"\n", b"null", b"version https://git-lfs.github.com/spec/v1\n"))


def change_value(rng, raw):
    """A key of a JSON object, also a nested one, is dropped, renamed or given an odd value."""
    content = json.loads(raw)
    place = content
    key = rng.choice(sorted(place))
    if isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(sorted(place))
    value = place.pop(key)
    if rng.random() < 0.8:
        place[key] = rng.choice(VALUES)
    elif rng.random() < 0.5:
        place[key + "x"] = value
    return json.dumps(content).encode()


def change_header(rng, raw):
    """One entry of a safetensors header."""
    size, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    name = rng.choice(sorted(header))
    key = rng.choice(sorted(header[name]))
    header[name][key] = rng.choice((*VALUES, "I64", "BOOL", "C64", "F8_E4M3", "F64", "U16"))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size:]


def poison(rng, raw):
    """A number of the weights, most often one that is not finite."""
    size, = struct.unpack("<Q", raw[:8])
    at = 8 + size + 2 * rng.randrange((len(raw) - 8 - size) // 2)
    return raw[:at] + rng.choice(NUMBERS) + raw[at + 2:]


ANY = (flip_bits, cut, insert, repeat, empty)
MUTATIONS = {".json": (*ANY, change_value, change_value, change_value, change_value),
             ".txt": ANY, ".safetensors": (*ANY, change_header, poison, poison)}


def mutate(folder, rng):
    """Change one file, or remove it -> what was done."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    path = rng.choice(sorted(files))
    if rng.random() < 0.05:
        path.unlink()
        return f"{path.name} removed"
    mutation = rng.choice(MUTATIONS[path.suffix])
    path.write_bytes(mutation(rng, path.read_bytes()))
    return f"{path.parent.name}/{path.name}: {mutation.__name__}"


def draw(folder):
    """One picture of two steps: all parts are read and used."""
    pipe = Pipeline(folder)
    pipe.best_of = 1
    pipe.remask = 0
    pipe.schedule = replace(pipe.schedule, steps=2)
    size = pipe.multiple, pipe.multiple
    cond = pipe.encode(["a red circle"], size, pipe.score)
    uncond = pipe.encode([""], size, pipe.score)
    ids = pipe.fill_in(pipe.all_masked(1, size), cond, uncond, [0], pipe.schedule)
    pipe.decode(ids)
    assert ids.max() < pipe.mask_token
    return pipe


@pytest.mark.slow
def test_mutated_checkpoints_are_refused_or_drawn_with(tmp_path):
    """200 mutations with fixed seeds. No other exception, no message of several lines."""
    refused, wrong = 0, []
    for seed in range(200):
        folder = shutil.copytree(GOLDEN_MODEL, tmp_path / "model")
        what = mutate(folder, random.Random(seed))
        try:
            pipe = draw(folder)
            for model in (pipe.text_encoder, pipe.transformer, pipe.vq):
                if not all(p.isfinite().all() for p in model.parameters()):
                    wrong.append((seed, what, "not finite"))
        except UserError as e:
            refused += 1
            if "\n" in str(e) or len(str(e)) > 500:
                wrong.append((seed, what, str(e)))
        except BaseException as e:                # the tokenizers library has panics
            wrong.append((seed, what, repr(e)))
        shutil.rmtree(folder)
    assert not wrong
    assert 100 < refused < 200


# -------------------------------------------------------------------------------------------------
# Kills

KILLS = """                                               # before each rename, once for each name
import pathlib, re
known = pathlib.Path(os.environ["KNOWN"])
replace = os.replace

def replace_or_die(source, target):
    source, target = pathlib.Path(source), pathlib.Path(target)
    name = re.sub("meissonic-[0-9].*/", "new/", str(target))   # in a folder that is not whole yet
    name = re.sub("[0-9]*0.checkpoint", "N.checkpoint", name)
    killed = known.read_text().splitlines() if known.exists() else []
    if name not in killed:
        with open(known, "a") as file:
            file.write(name + "\\n")
        halves = [source] if source.is_file() else sorted(source.iterdir())[:1]
        if not target.name.startswith(".meissonic"):          # else it is the old folder
            for half in halves:
                os.truncate(half, half.stat().st_size // 2)
        os.kill(os.getpid(), 9)
    replace(source, target)

os.replace = replace_or_die
while True:                                                   # a child lives from kill to kill
    child = os.fork()
    if not child:
        break
    _, status = os.waitpid(child, 0)
    if status != 9:
        os._exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forked")
def test_killed_inside_every_write_then_resumed_equals_uninterrupted(tmp_path):
    """Each file and folder of a run of all stages is cut in half once, just before it is renamed,
    with kill -9. Also between the two renames that replace a folder."""
    killed = script(tmp_path / "killed.py", KILLS)
    out = tmp_path / "run"
    command = [sys.executable, killed, "--out", out, "--seed", 3, "--save-every", 10,
               "--eval-every", 1000, "--resume", "--threads", 1]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "KNOWN": tmp_path / "known"})
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.removeprefix(str(out)) for path in (tmp_path / "known").read_text().split()}
    assert {"/tokenizer", "/vqvae", "/transformer", "/.meissonic-old-transformer", "/loss.png",
            "/scheduler/scheduler_config.json", "/1-N.checkpoint.safetensors"} <= names
    assert not list(out.rglob(".meissonic*")) and not (out / "lock.json").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_same_tensors(trained_run(), out, *RESULTS)
    finally:
        torch.set_num_threads(threads)
