"""Who may import whom, read from the syntax trees; and three rules about all Python files.

Imports run one way:

    kernels, shapes.world, engine.checkpoint     nothing of the project
    clip, vq, meissonic                          kernels, engine.checkpoint
    engine.*                                     those and each other, without cycles
    sample, train                                those, not each other
    shapes.*                                     kernels, the models, engine, each other
    tools.*                                      everything

Only tools and one function of train.py, which is called for --data shapes, import shapes.
"""
import ast
from functools import cache

import pytest
from common import ROOT

MODELS = {"clip", "vq", "meissonic"}
SCRIPTS = {"sample", "train"}
FOLDERS = {"kernels", "engine", "shapes", "tools"}
NOBODY = {"engine.checkpoint", "shapes.world"}               # import nothing of the project


def python_files():
    """All Python files of the project, as paths relative to its folder."""
    folders = [".", *sorted(FOLDERS), "tests", "tests/shapes"]
    files = []
    for folder in folders:
        files += sorted((ROOT / folder).glob("*.py"))
    return [path.relative_to(ROOT) for path in files]


FILES = python_files()


def module_name(path):
    """engine/hub.py -> engine.hub, kernels/__init__.py -> kernels"""
    parts = [*path.parts[:-1], path.stem]
    return ".".join(parts[:-1] if path.stem == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES if path.parts[0] != "tests"}


@cache
def tree(module):
    return ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))


def project_modules(node, module):
    """The modules of the project that one import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert node.level == 0, f"{module}:{node.lineno}: a relative import"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    found = set()
    for name in names:
        while name and name not in MODULES:                  # engine.hub.BUNDLED -> engine.hub
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found


@cache
def imports(module):
    """{module of the project: first line} that a module imports, in functions too."""
    lines = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in project_modules(node, module):
                lines.setdefault(name, node.lineno)
    return lines


def top(module):
    return module.partition(".")[0]


def allowed(module, other):
    """Whether `module` may import `other`."""
    if module in NOBODY:
        return False
    if top(module) == "kernels":
        return top(other) == "kernels"
    below = top(other) == "kernels" or other == "engine.checkpoint"
    if module in MODELS:
        return below
    if top(module) == "engine":
        return below or other in MODELS or top(other) == "engine"
    if module in SCRIPTS:
        return below or other in MODELS or top(other) == "engine"
    if top(module) == "shapes":
        return below or other in MODELS or top(other) in ("engine", "shapes")
    return top(module) == "tools"


def test_imports_run_one_way():
    wrong = []
    for module in MODULES:
        for other, line in imports(module).items():
            of_data_shapes = module == "train" and top(other) == "shapes"
            if other != module and not allowed(module, other) and not of_data_shapes:
                wrong.append(f"{MODULES[module]}:{line} imports {other}")
    assert not wrong


def test_train_imports_shapes_in_one_function():
    functions = []
    for node in ast.walk(tree("train")):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if any(top(name) == "shapes" for name in project_modules(node, "train")):
                functions.append(enclosing_function(tree("train"), node))
    assert functions and None not in functions and len(set(functions)) == 1, functions


def enclosing_function(tree, node):
    """Name of the function of the module that holds a node, or None."""
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and node in ast.walk(function):
            return function.name
    return None


def test_there_are_no_cycles():
    """Imports within functions count, too. A package that imports its own files is no cycle."""
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module in done:
            return
        path.append(module)
        for other in imports(module):
            if other != top(module):
                visit(other)
        path.pop()
        done.add(module)

    for module in MODULES:
        visit(module)


# -------------------------------------------------------------------------------------------------
# All files


def test_no_line_has_more_than_100_characters():
    long = []
    for path in FILES:
        lines = (ROOT / path).read_text(encoding="utf-8").split("\n")
        long += [f"{path}:{i}" for i, line in enumerate(lines, 1) if len(line) > 100]
    assert not long


def test_every_module_has_a_docstring():
    without = []
    for path in FILES:
        if not ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            without.append(str(path))
    assert not without


def test_what_is_at_the_top():
    """The five files that a first reading needs."""
    assert {path.stem for path in FILES if len(path.parts) == 1} == MODELS | SCRIPTS


# -------------------------------------------------------------------------------------------------
# Guards: the checks above see what they look for


def test_imports_are_seen():
    assert {"kernels", "engine.checkpoint"} <= set(imports("meissonic"))
    assert "engine.fast" in imports("engine.pipeline")       # from engine import fast
    assert "meissonic" in imports("engine.fast")             # from meissonic import name
    assert len(FILES) > 40
    assert all(module in MODULES for module in MODELS | SCRIPTS | NOBODY | FOLDERS - {"tools"})


@pytest.mark.parametrize("module, other", [
    ("meissonic", "engine.fast"), ("meissonic", "vq"), ("kernels", "vq"), ("sample", "train"),
    ("train", "sample"), ("sample", "shapes.score"), ("engine.hub", "shapes.world"),
    ("engine.hub", "sample"), ("engine.data", "tools.film"), ("shapes.world", "kernels"),
    ("shapes.score", "sample"), ("engine.checkpoint", "kernels")])
def test_what_is_not_allowed(module, other):
    assert not allowed(module, other)
