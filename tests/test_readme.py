"""README.md and NOTES.md agree with the repository: files, references, commands, pictures.

The examples in the modules' docstrings are run, too, or where that takes too much, their calls are
compared with the signatures.
"""
import ast
import importlib
import inspect
import re
import shlex
import sys
import textwrap
import types
from functools import lru_cache

import numpy as np
import pytest
import torch
from common import ROOT, masked_grid, photos, random_conditioning, tiny_transformer
from PIL import Image

import sample
import train
from engine import options, settings
from tools import sweep

NOT_LISTED = {"README.md", "NOTES.md", "LICENSE", "requirements.txt", "pytest.ini"}
FOLDERS = ("", "engine", "kernels", "shapes", "tools")
STAND_IN = object()                                # an argument whose value does not matter


@lru_cache(maxsize=None)
def page(name="README.md"):
    return (ROOT / name).read_text(encoding="utf-8")


def project_files():
    """Paths of the modules, relative to the repository."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in paths]


def load(path):
    """The module in a file: "engine/fast.py" -> engine.fast."""
    return importlib.import_module(path.removesuffix(".py").removesuffix("/__init__")
                                   .replace("/", "."))


# --------------------------------------------------------------------------------------------------
# Files and references


def table(first_cell):
    """The rows, lists of cells, of the README's table whose head begins with this cell."""
    lines = page().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def in_code(text):
    return re.findall(r"`([^`]+)`", text)


def test_the_file_table_is_what_lies_at_the_top():
    listed = {name.rstrip("/") for row in table("where") for name in in_code(row[0])}
    there = {path.name for path in ROOT.iterdir()
             if path.suffix == ".py" or path.is_dir() and not path.name.startswith((".", "__"))}
    assert listed == there - {"out", "runs"}


def test_the_tools_are_those_of_the_table():
    row, = [row for row in table("where") if row[0] == "`tools/`"]
    there = {path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__"}
    assert set(in_code(row[1])) - {"python -m tools.NAME"} <= there


@pytest.mark.parametrize("name", ("README.md", "NOTES.md"))
def test_references_lead_somewhere(name):
    """Every `file.py:function` and `file.py:Class.method` exists."""
    found = re.findall(r"`([\w/]+\.py):([\w.]+)`", page(name))
    assert found
    for path, attributes in found:
        thing = load(path)
        for attribute in attributes.split("."):
            assert hasattr(thing, attribute), f"{path}:{attributes}"
            thing = getattr(thing, attribute)


@pytest.mark.parametrize("name", ("README.md", "NOTES.md"))
def test_links_and_files_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)#\s]+)\)|src=\"([^\"]+)\"", page(name))
    targets = [one or other for one, other in targets]
    targets += re.findall(r"`([\w/]+/[\w.]+\.py)`", page(name))
    assert targets
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_change_one_thing_names_a_test_for_each():
    rows = table("what")
    assert len(rows) >= 8
    for what, where, test in rows:
        assert in_code(where) and (ROOT / in_code(test)[0]).is_file(), what


# --------------------------------------------------------------------------------------------------
# Commands


def commands():
    """Argument lists of the commands in README's code blocks, for instance
    [("sample.py", ["--steps", "32"])], ("tools.film", [...])."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```", page(), re.S | re.M):
        for line in block.splitlines():
            words = shlex.split(line.split("&& ")[-1], comments=True) if "python" in line \
                or line.startswith("torchrun") else []
            if words[:2] == ["python", "-m"]:
                found.append((words[2], words[3:]))
            elif words and words[1] != "-c":
                first = 1 if words[0] == "python" else 2
                found.append((words[first], words[first + 1:]))
    return found


def commands_of(script):
    found = [arguments for name, arguments in commands() if name == script]
    assert found, script
    return found


def test_sample_commands_are_understood():
    parser = sample.make_parser()
    for arguments in commands_of("sample.py"):
        parser.parse_args(arguments)


def test_train_commands_are_understood():
    for arguments in commands_of("train.py"):
        options.parse_arguments(train.PRESETS, train.STAGES, "", arguments)


def test_flags_in_the_text_exist(capsys):
    """Flags in the commands of tools, and flags in backticks anywhere: of sample.py or train.py, or
    of a tool where the text is its command."""
    known = flags_of(capsys, sample.main) | flags_of(capsys, train.main)
    known |= {"--index-url"}                       # of pip
    for name, arguments in commands():
        if name.startswith("tools."):
            flags = {word for word in arguments if word.startswith("--")}
            assert flags <= flags_of(capsys, importlib.import_module(name).main), name
    for text in in_code(page()):
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        tool = re.match(r"python -m (tools\.\w+)", " ".join(text.split()))
        if tool and flags:
            assert flags <= flags_of(capsys, importlib.import_module(tool[1]).main), text
        else:
            assert flags <= known, text


def flags_of(capsys, main):
    with pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))


def test_the_gallery_is_made_by_the_commands_beside_it():
    """Each PNG carries the settings of its command; those that a command leaves open may vary."""
    made = []
    for name, arguments in commands():
        parser = sample.make_parser()
        if name == "tools.sweep":
            parser.add_argument("--axes")
            arguments = sweep.leading_as_flag(arguments)
        if name not in ("sample.py", "tools.film", "tools.sweep"):
            continue
        args = parser.parse_args(arguments)
        if args.out.parts[0] != "gallery":
            continue
        asked = settings.settings_of(parser, args, prompt=args.prompt[0])
        with Image.open(ROOT / args.out) as picture:
            assert asked.items() <= picture.text.items(), args.out
        made.append(args.out)
    assert len(made) >= 5
    files = list((ROOT / "gallery").iterdir())
    assert sum(path.stat().st_size for path in files) <= 1.5e6


# --------------------------------------------------------------------------------------------------
# Requirements


def test_requirements_are_what_is_imported():
    """No import of diffusers, transformers or anything else that requirements.txt does not name."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[=<>;\s]", line)[0].replace("-", "_") for line in lines if line.strip()}
    allowed = (names - {"pillow"}) | {"PIL"} | set(sys.stdlib_module_names)
    ours = {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)
    for path in project_files():
        imported = set()
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported <= allowed | ours, path


# --------------------------------------------------------------------------------------------------
# Examples in docstrings


@lru_cache(maxsize=None)
def examples(path):
    """The Python examples in a module's docstring: indented blocks that parse and call something ->
    list of source texts."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = []
    for block in re.findall(r"(?:^    .*\n)+", (ast.get_docstring(tree) or "") + "\n", re.M):
        source = textwrap.dedent(block)
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue
        if any(isinstance(node, ast.Call) for node in nodes):
            found.append(source)
    return found


@lru_cache(maxsize=None)
def project_names():
    """{name: value} of all modules, functions and classes of the project."""
    names = {}
    for path in project_files():
        module = load(path)
        names[module.__name__] = module
        names.setdefault(module.__name__.rpartition(".")[2], module)
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__:
                names[name] = value
    return names


def called(function, names):
    """The `func` of an ast.Call -> (what it calls, whether on an instance); (None, False) if names
    do not tell. names: {name: module, function or class, or ("instance of", class)}."""
    if isinstance(function, ast.Name):
        value = names.get(function.id)
        if isinstance(value, tuple):
            return value[1].__call__, True
        return value, False
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return None, False
    owner = names.get(function.value.id)
    if isinstance(owner, tuple):
        return getattr(owner[1], function.attr), True
    if isinstance(owner, types.ModuleType) or inspect.isclass(owner):
        return getattr(owner, function.attr), False
    return None, False


def instances(source, names):
    """{variable: ("instance of", class)} of the variables that an example makes with a class or a
    class method such as from_pretrained."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) \
                and isinstance(node.targets[0], ast.Name):
            made, _ = called(node.value.func, names | found)
            made = getattr(made, "__self__", made)
            if inspect.isclass(made):
                found[node.targets[0].id] = ("instance of", made)
    return found


def check_arguments(node, function, on_instance):
    """Raises TypeError unless the function takes the arguments of an ast.Call."""
    positional = [argument for argument in node.args
                  if not (isinstance(argument, ast.Constant) and argument.value is ...)]
    stand_ins = [STAND_IN] * (len(positional) + on_instance)
    keywords = {keyword.arg: STAND_IN for keyword in node.keywords}
    signature = inspect.signature(function)
    if len(positional) < len(node.args):           # "...": the rest
        signature.bind_partial(*stand_ins, **keywords)
    else:
        signature.bind(*stand_ins, **keywords)


@pytest.mark.parametrize("path", [path for path in project_files() if examples(path)])
def test_examples_call_what_exists(path):
    """Every function of the project in an example exists and takes these arguments."""
    ours = {name.split(".")[0] for name in map(str, project_names())}
    checked = 0
    for source in examples(path):
        names = project_names() | vars(load(path))
        names |= instances(source, names)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                function, on_instance = called(node.func, names)
                if callable(function) and (function.__module__ or "").split(".")[0] in ours:
                    check_arguments(node, function, on_instance)
                    checked += 1
    assert checked


def pipeline_parts():
    """The variables that examples around meissonic.sample use."""
    model = tiny_transformer()
    g = torch.Generator().manual_seed(0)
    cond, uncond = (random_conditioning(g, 1, model) for _ in range(2))
    ids = masked_grid(0, 1, 4, 4, 10, model)
    plan = train.meissonic.Schedule(4, 3.0, (2.0, 0.0), "cosine", "rate").plan(10, 16)
    return dict(model=model, cond=cond, uncond=uncond, ids=ids, plan=plan, seeds=[0],
                mask_token=model.config.mask_token)


def meissonic_setup(folder):
    text = train.clip.TextEncoder.from_pretrained(ROOT / "weights" / "shapes" / "text_encoder")
    tokens = train.clip.Tokenizer.from_pretrained(ROOT / "weights" / "shapes" / "tokenizer")
    micro_conds = torch.tensor([[64.0, 64, 0, 0, 6]])
    with torch.no_grad():
        conds = [train.meissonic.Conditioning(*text(tokens([prompt])), micro_conds)
                 for prompt in ("a red circle on a white background", "")]
    return dict(cond=conds[0], uncond=conds[1])


def images_setup(folder):
    Image.fromarray(np.zeros((600, 700, 3), np.uint8)).save(folder / "photo.jpg")
    (folder / "out").mkdir()
    return {}


SETUPS = {                                         # path: folder -> variables of the example
    "clip.py": lambda folder: {},
    "vq.py": lambda folder: dict(images=torch.rand(1, 3, 16, 16)),
    "meissonic.py": meissonic_setup,
    "engine/fast.py": lambda folder: pipeline_parts(),
    "engine/images.py": images_setup,
    "engine/image_files.py": lambda folder: photos(folder / "photos") and {},
    "shapes/tied_codes.py": lambda folder: dict(
        transformer=train.meissonic.Transformer(train.meissonic.Config(
            **train.MODELS["tiny"]["transformer"])),
        code_features=importlib.import_module("shapes.codebook").code_features),
}


@pytest.mark.parametrize("path", SETUPS)
def test_examples_run(path, tmp_path, monkeypatch):
    """In a folder where weights/ is that of the repository."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    variables = SETUPS[path](tmp_path)
    assert examples(path)
    for source in examples(path):
        exec(source, project_names() | vars(load(path)) | variables)


@pytest.mark.slow
def test_the_pipelines_example_draws_what_it_says(monkeypatch):
    """A red circle above a blue square: engine/pipeline.py's example and README's first picture."""
    from shapes import score, world
    monkeypatch.chdir(ROOT)
    names = dict(vars(load("engine/pipeline.py")))
    exec(examples("engine/pipeline.py")[0], names)
    objects = (world.PromptObject("circle", "red"), world.PromptObject("square", "blue"))
    assert score.image_matches(names["picture"], world.PromptSpec("position", objects, "above"))
