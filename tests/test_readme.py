"""README.md says what is there: its file table, its commands and their flags."""
import ast
import re
import shlex
import subprocess
import sys
from functools import lru_cache

import pytest
from common import ROOT
from PIL import Image

import sample

SET_UP = "pip install -r requirements.txt && "
TOP = {"clip.py", "vq.py", "meissonic.py", "pipeline.py", "editing.py", "sample.py", "data.py", "disk.py", "dataset.py", "train.py", "train_vq.py",
       "trainer.py", "kernels", "tests", "weights", "gallery", "README.md", "requirements.txt", "LICENSE", ".gitignore", ".ci"}


@lru_cache(maxsize=None)
def readme():
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is not there"
    return path.read_text(encoding="utf-8")


def commands():
    """The shell lines of README's code blocks, without prompts, comments and what a console printed."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", readme(), re.S | re.M)
    lines = "\n".join(text for language, text in blocks if language != "python").splitlines()
    lines = [re.sub(r"^\$ ", "", line) for line in lines]
    return [line for line in lines if re.match(r"(pip|python3?|\.ci/run|cd|git|HF_)\b", line)]


def calls_of(script):
    """Argument lists of each `python SCRIPT ...` in the code blocks."""
    found = [line.split(f"python {script}", 1)[1] for line in commands() if f"python {script}" in line]
    return [shlex.split(rest.split("&&")[0], comments=True) for rest in found]


@lru_cache(maxsize=None)
def flags_of(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))


def tracked():
    """Paths that git knows or would add; all files where this is no git checkout."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [p for p in done.stdout.splitlines() if (ROOT / p).exists()]


def file_table():
    """{path: what README says of it}, from the rows whose first cell names files in backticks."""
    rows = re.findall(r"^\|\s*(`[^|]+`[^|]*)\|\s*(.+?)\s*\|", readme(), re.M)
    named = {name.rstrip("/"): text for cell, text in rows for name in re.findall(r"`([^`]+)`", cell)}
    return {n: t for n, t in named.items() if re.fullmatch(r"[\w./-]+", n) and ("." in n or (ROOT / n).is_dir())}


def test_the_file_table_names_files_that_are_there():
    assert file_table() and [n for n in file_table() if not (ROOT / n).exists()] == []


def test_every_script_and_folder_is_in_the_file_table():
    wanted = {p for p in TOP if not p.startswith(".") and p not in ("README.md", "LICENSE", "requirements.txt")}
    listed = set(file_table())
    assert [p for p in wanted if not any(n == p or n.startswith(f"{p}/") for n in listed)] == []
    kernels = {p for p in tracked() if re.fullmatch(r"kernels/[a-z]\w*\.py", p)}
    assert [p for p in kernels if p not in listed and "kernels" not in listed] == []


def test_nothing_else_lies_at_the_top():
    assert {p.split("/")[0] for p in tracked()} <= TOP


def test_the_two_commands_that_do_all_the_set_up():
    lines = commands()
    assert any(line.startswith(SET_UP + 'python sample.py --prompt "') for line in lines)
    assert SET_UP + "python -m pytest" in [line.split("  #")[0].strip() for line in lines]
    ci = ROOT / ".ci" / "run"
    assert "python -m pytest" in ci.read_text() and ci.stat().st_mode & 0o111


def test_the_first_command_is_understood():
    """The first `python sample.py` of the page, parsed as the script would; a prompt, and no file that is not there."""
    arguments = calls_of("sample.py")[0]
    args = sample.parse_arguments(arguments)
    assert args.prompt == [sample.DEFAULT_PROMPT] and args.model in ("auto", "shapes")


def test_every_sample_command_is_understood():
    assert calls_of("sample.py")
    for arguments in calls_of("sample.py"):
        sample.parse_arguments(arguments)


@pytest.mark.parametrize("script", ("sample.py", "train.py"))
def test_flags_of_commands(script):
    used = {a.split("=")[0] for call in calls_of(script) for a in call if a.startswith("--")}
    assert calls_of(script) and used <= flags_of(script)


def test_every_flag_in_the_text_belongs_to_a_script():
    """Flags in backticks anywhere: of ours, or of pip, pytest, git and python."""
    others = {"--version", "--durations", "--upgrade", "--index-url", "--extra-index-url", "--depth"}
    named = {m for code in re.findall(r"`([^`\n]+)`", readme()) for m in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named <= flags_of("sample.py") | flags_of("train.py") | others


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)#\s]+)", readme()) + re.findall(r'src="([^"]+)"', readme())
    assert [t for t in targets if not re.match(r"https?:|mailto:", t) and not (ROOT / t).exists()] == []
    start = readme()[:3000]
    assert re.search(r"!\[|<img", start), "pictures near the top"


def test_the_gallery_is_made_by_the_commands_beside_it():
    """Each PNG tells the settings of its command; all are small."""
    files = [p for p in (ROOT / "gallery").iterdir()]
    assert files and sum(p.stat().st_size for p in files) <= 1.5e6
    made = [sample.parse_arguments(call) for call in calls_of("sample.py") if "gallery" in " ".join(call) and "--out" in call]
    assert len(made) >= 5
    for args in made:
        with Image.open(ROOT / args.out) as picture:
            about = picture.text
        asked = {k: v for k, v in sample.settings_of(args, prompt=args.prompt[0]).items() if k not in ("device", "dtype", "batch", "size")}
        assert {k: about.get(k) for k in asked} == asked, args.out


def test_what_the_readme_reports():
    """Scores by task, and how the bundled model was trained: command, time, machine."""
    text = readme().lower()
    assert all(re.search(rf"\b{word}", text) for word in ("single", "two", "counting", "colours", "position", "attribution", "overall"))
    assert "train.py" in text and re.search(r"\b(hours?|minutes)\b", text) and "cores" in text
    assert "--score" in text and "apache" in text


def test_requirements():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    names = {re.split(r"[=<>;\s]", line)[0].lower().replace("-", "_") for line in lines if line}
    assert {"torch", "triton", "numpy", "safetensors", "tokenizers", "pillow", "pytest", "hypothesis"} <= names
    assert names <= {"torch", "triton", "numpy", "safetensors", "tokenizers", "pillow", "pytest", "hypothesis",
                     "huggingface_hub", "tqdm"}
    pinned = " ".join(lines)
    assert re.search(r"torch==2\.13\.0", pinned) and re.search(r"triton==3\.7\.1\s*;.*linux", pinned)
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:400]


def imports(path):
    """Top names of all modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}


def test_dependencies_are_those_alone():
    """No import of diffusers, transformers or anything else that requirements.txt does not name."""
    ours = {p.removesuffix(".py") for p in TOP} | {"common"}
    allowed = {"torch", "triton", "numpy", "safetensors", "tokenizers", "PIL", "tqdm", "huggingface_hub"} | ours
    for path in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")]:
        assert imports(path) - allowed <= set(sys.stdlib_module_names), path


def test_imports_run_one_way():
    """kernels, data and disk know no model; the models know kernels; who uses them knows those before; nobody knows train."""
    known = dict(data=set(), disk=set(), vq={"kernels"}, clip={"kernels", "vq"}, meissonic={"kernels", "vq"})
    for name in ("pipeline", "editing", "sample", "trainer", "dataset", "train_vq", "train"):
        known[name] = {"kernels", *known}
    assert {f"{name}.py" for name in known} == {path.name for path in ROOT.glob("*.py")}
    ours = set(known) | {"kernels"}
    for name, allowed in known.items():
        assert imports(ROOT / f"{name}.py") & ours <= allowed, name
    for path in ROOT.glob("kernels/*.py"):
        assert imports(path) & ours <= {"kernels"}, path
