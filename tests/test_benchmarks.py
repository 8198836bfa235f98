"""tools/benchmarks.py: folders as the official scorers read them, resuming, and processes."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from common import GOLDEN_MODEL, ROOT, SMALL_RUN, assert_refused, environment, open_picture, tree
from shared_pipeline import load_once      # noqa: F401

from tools import benchmarks

pytestmark = pytest.mark.usefixtures("load_once")

PROMPTS = ["a photo of a bench", "a photo of two clocks", "a photo of a red \u2028 dog", "x", ""]
SMALL = (*SMALL_RUN, "--batch", 3)
GENEVAL = ("geneval", "--metadata", "metadata.jsonl", "--out", "g", *SMALL)
PICTURES = [f"{i:05d}/samples/{k:05d}.png" for i in range(5) for k in range(4)]


def write_metadata(folder="."):
    """A file like GenEval's, with made-up prompts -> its lines."""
    entries = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": p}
               for p in PROMPTS]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    Path(folder, "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def write_prompts(**lists):
    for style, prompts in lists.items():
        Path(f"{style.replace('_', '-')}.json").write_text(json.dumps(prompts))


def contents(folder):
    """{path: bytes} of all files below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def drawn_by(monkeypatch):
    """-> a list to which the path of each picture that is drawn from now on is added."""
    paths = []
    draw = benchmarks.draw

    def noted(run, batch, lines):
        paths.extend(str(job.path) for job in batch)
        draw(run, batch, lines)

    monkeypatch.setattr(benchmarks, "draw", noted)
    return paths


# -------------------------------------------------------------------------------------------------
# Layout


def scored_by_geneval(folder):
    """What the official evaluate_images.py finds -> {prompt: names of its pictures}."""
    found = {}
    for subfolder in os.listdir(folder):
        path = Path(folder, subfolder)
        if path.is_dir() and subfolder.isdigit():
            prompt = json.loads((path / "metadata.jsonl").read_text(encoding="utf-8"))["prompt"]
            names = os.listdir(path / "samples")
            found[prompt] = sorted(name for name in names if re.match(r"\d+\.png", name))
    return found


def test_the_folders_of_geneval(cli):
    lines = write_metadata()
    status, out, err = cli(*GENEVAL, script="tools.benchmarks")
    assert status == 0 and "drew 20 pictures" in out, err
    assert scored_by_geneval("g") == {p: [f"{k:05d}.png" for k in range(4)] for p in PROMPTS}
    assert sorted(contents("g")) == sorted(PICTURES + [f"{i:05d}/metadata.jsonl" for i in range(5)])
    for i, line in enumerate(lines):
        assert Path(f"g/{i:05d}/metadata.jsonl").read_text(encoding="utf-8") == line + "\n"
    pictures = [open_picture(f"g/{name}") for name in PICTURES]
    assert {picture.size for picture in pictures} == {(64, 64)}
    assert len({picture.tobytes() for picture in pictures}) == 20


def test_the_folders_of_hps(cli):
    """Every entry of the folder is a style."""
    write_prompts(anime=["a girl", "a boy"], concept_art=["a ship"])
    status, _, err = cli("hps", "--prompts", "anime.json", "concept-art.json", "--out", "new/h",
                         *SMALL, script="tools.benchmarks")
    assert status == 0, err
    assert tree("new/h") == ["anime", "anime/00000.jpg", "anime/00001.jpg", "concept-art",
                             "concept-art/00000.jpg"]
    with open_picture("new/h/anime/00001.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (64, 64)


def test_a_picture_is_the_one_of_sample(cli):
    """Picture k of prompt i has seed SEED + 4 i + k; --like of sample.py makes it again."""
    write_metadata()
    cli(*GENEVAL, "--seed", 7, "--batch", 1, script="tools.benchmarks")
    assert cli("--prompt", PROMPTS[1], *SMALL_RUN, "--seed", 7 + 4 + 2, "--out", "a.png")[0] == 0
    assert cli("--like", "g/00001/samples/00002.png", "--out", "b.png")[0] == 0
    pixels = [open_picture(name).tobytes()
              for name in ("a.png", "b.png", "g/00001/samples/00002.png")]
    assert pixels[0] == pixels[1] == pixels[2]


# -------------------------------------------------------------------------------------------------
# Settings


def test_the_settings_are_beside_the_folder(cli):
    write_metadata()
    cli(*GENEVAL, "--negative", "blurry", "--cfg", 5, script="tools.benchmarks")
    settings = json.loads(Path("g.json").read_text())
    expected = {"negative": "blurry", "cfg": 5.0, "steps": 2, "text_encoder": "own", "seed": 0,
                "model": str(GOLDEN_MODEL), "size": [64, 64], "pictures": 4, "benchmark": "geneval"}
    assert expected.items() <= settings.items() and {"weights", "prompts_crc"} <= settings.keys()


@pytest.mark.parametrize("name, flags", [
    ("steps", ["--steps", 3]), ("cfg", ["--cfg", 2]), ("seed", ["--seed", 1]),
    ("pictures", ["--pictures", 5]), ("negative", ["--negative", "ugly"]),
    ("dtype", ["--dtype", "bfloat16"]), ("prompts_crc", [])])
def test_other_settings_are_refused(cli, name, flags):
    """In the same folder, with a message that names one of them; nothing is drawn."""
    write_metadata()
    assert cli(*GENEVAL, "--pictures", 1, script="tools.benchmarks")[0] == 0
    if not flags:
        text = Path("metadata.jsonl").read_text(encoding="utf-8")
        Path("metadata.jsonl").write_text(text.replace("bench", "chair"), encoding="utf-8")
    before = contents("g")
    status, _, err = cli(*GENEVAL, "--pictures", 1, *flags, script="tools.benchmarks")
    assert status == 2 and f"g.json: its pictures have {name} " in err, err
    assert contents("g") == before


def test_pictures_without_settings_are_refused(cli):
    write_metadata()
    cli(*GENEVAL, "--pictures", 1, script="tools.benchmarks")
    Path("g.json").unlink()
    assert_refused(cli, [*GENEVAL, "--pictures", 1], "g.json is missing", script="tools.benchmarks")


@pytest.mark.parametrize("arguments, word", [
    (["geneval", "--out", "g"], "--metadata"), (["hps", "--out", "g"], "--prompts"),
    (["geneval", "--metadata", "metadata.jsonl"], "--out"), (["coco", "--out", "g"], "coco"),
    ([*GENEVAL, "--prompt", "a star"], "--prompt"), ([*GENEVAL, "--seed", -1], "--seed"),
    ([*GENEVAL[:2], "nowhere.jsonl", *GENEVAL[3:]], "nowhere.jsonl"),
    ([*GENEVAL[:2], "bad.jsonl", *GENEVAL[3:]], "prompt 1"),
    ([*GENEVAL[:2], "empty.jsonl", *GENEVAL[3:]], "no prompts"),
    (["hps", "--prompts", "sketch.json", "--out", "g"], "sketch.json"),
    (["hps", "--prompts", "anime.json", "--out", "g"], "list"),
    (["hps", "--prompts", "photo.json", "photo.json", "--out", "g"], "twice"),
    (["hps", "--prompts", "photo.json", "--pictures", 2, "--out", "g"], "--pictures"),
    ([*GENEVAL, "--n", 2], "--n")])
def test_what_makes_no_sense(cli, arguments, word):
    write_metadata()
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    Path("empty.jsonl").write_text("\n\n")
    write_prompts(sketch=["a"], anime={"a": "b"}, photo=["a"])
    assert_refused(cli, arguments, word, script="tools.benchmarks")


# -------------------------------------------------------------------------------------------------
# Going on, and several processes


def test_what_is_there_is_not_drawn_again(cli, monkeypatch):
    """A finished run draws nothing; of an unfinished one what is missing, with the same seeds."""
    write_metadata()
    cli(*GENEVAL, "--batch", 1, script="tools.benchmarks")
    before = contents("g")
    drawn = drawn_by(monkeypatch)
    status, out, _ = cli(*GENEVAL, "--batch", 1, script="tools.benchmarks")
    assert status == 0 and not drawn and "drew 0 pictures, 20 were there" in out
    missing = [f"g/{PICTURES[i]}" for i in (2, 11, 19)]
    for name in missing:
        Path(name).unlink()
    cli(*GENEVAL, "--batch", 1, script="tools.benchmarks")
    assert sorted(drawn) == missing and contents("g") == before


KILLED = """
import os, signal, sys
from PIL import Image
from tools import benchmarks
save, calls = Image.Image.save, []
def dies(self, path, *rest, **options):
    save(self, path, *rest, **options)
    calls.append(path)
    if len(calls) == 6:
        half = os.path.getsize(path) // 2
        os.truncate(path, half)
        os.kill(os.getpid(), signal.SIGKILL)
Image.Image.save = dies
benchmarks.main()
"""


def test_a_killed_run_goes_on(cli, monkeypatch):
    """Killed while it writes its sixth picture. Five are whole, none is half; the same command
    draws the others, and the folder is that of a run without interruption."""
    write_metadata()
    Path("killed.py").write_text(KILLED)
    call = [sys.executable, "killed.py", *map(str, GENEVAL), "--batch", "1"]
    done = subprocess.run(call, env=environment(PYTHONPATH=ROOT, OMP_NUM_THREADS=1),
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = sorted(str(path) for path in Path("g").rglob("*.png"))
    assert there == [f"g/{name}" for name in PICTURES[:5]]
    for name in there:
        open_picture(name)
    assert list(Path("g").rglob("*.part"))                    # guards the next assertion
    before = {name: (Path(name).stat().st_mtime_ns, Path(name).read_bytes()) for name in there}
    drawn = drawn_by(monkeypatch)
    status, out, err = cli(*GENEVAL, "--batch", 1, script="tools.benchmarks")
    assert status == 0 and "drew 15 pictures, 5 were there" in out, err
    assert sorted(there + drawn) == [f"g/{name}" for name in PICTURES]
    for name, old in before.items():
        assert (Path(name).stat().st_mtime_ns, Path(name).read_bytes()) == old
    whole = [*GENEVAL[:4], "whole", *SMALL, "--batch", 1]
    assert cli(*whole, script="tools.benchmarks")[0] == 0
    assert contents("g") == contents("whole")


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_each_process_draws_its_share(cli, monkeypatch, processes):
    """Together everything, no picture twice, prompts whole; also when the first run had another
    number of processes."""
    write_metadata()
    drawn = drawn_by(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        before = len(drawn)
        assert cli(*GENEVAL, script="tools.benchmarks")[0] == 0
        mine = drawn[before:]
        assert len(mine) % 4 == 0 and len(mine) <= 4 * -(-5 // processes)
    assert sorted(drawn) == [f"g/{name}" for name in PICTURES]
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    cli(*GENEVAL, script="tools.benchmarks")
    assert len(drawn) == 20


@pytest.mark.slow
def test_torchrun(tmp_path):
    """Two processes at once, with the bundled model: no picture twice, all whole."""
    write_metadata(tmp_path)
    arguments = ["geneval", "--metadata", tmp_path / "metadata.jsonl", "--out", tmp_path / "g",
                 "--model", "shapes", "--steps", 2, "--best-of", 1, "--remask", 0, "--pictures", 2]
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
            "-m", "tools.benchmarks", *arguments]
    done = subprocess.run([str(word) for word in call], cwd=ROOT, capture_output=True, text=True,
                          env=environment(OMP_NUM_THREADS=1))
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if "drew" in line)
    numbers = [int(re.search(r"drew (\d+) pictures, 0 were there", line)[1]) for line in lines]
    assert numbers in ([4, 6], [6, 4]), lines
    pictures = sorted(Path(tmp_path, "g").rglob("*.png"))
    assert len(pictures) == 10 and len({open_picture(p).tobytes() for p in pictures}) == 10
    assert not [path for path in Path(tmp_path, "g").rglob("*") if path.name.startswith(".")]
