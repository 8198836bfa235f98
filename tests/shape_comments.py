"""Checks the shape comments at the end of a file's lines while the code runs.

    with ShapeComments(meissonic, C=16) as comments:
        meissonic.sample(...)
    assert not comments.wrong and not comments.unseen()

A comment such as `# (B, h w, 3 C)` at the end of a statement is compared with the tensors that it
assigns or returns; one of the form `# (B, N, C) -> (B, C)` at the end of a def with the arguments
and the result. A letter is one of those given, an int variable of the function with that name, or
else unknown: then it must stand for the same number everywhere in one pass of a loop, and B in the
whole call.
"""
import ast
import re
import sys
import tokenize
from pathlib import Path

import torch

SHAPE = re.compile(r"\([\w/ .]+,[\w/ ,.]*\)")                # (B,) or (B, h/2, 4 C), with a comma


class ShapeComments:
    def __init__(self, *modules, **letters):
        self.letters = letters
        self.wrong = []                                      # descriptions
        self.seen = set()                                    # (file name, line)
        self.files = {module.__file__: Comments(module.__file__) for module in modules}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def unseen(self):
        """Lines with a shape comment that did not run."""
        lines = set()
        for name, comments in self.files.items():
            lines |= {(Path(name).name, line) for line in comments.lines}
        return sorted(lines - self.seen)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files or frame.f_code.co_name.startswith("<"):
            return None                                      # elsewhere, or a comprehension
        call = Call(self, frame, self.files[frame.f_code.co_filename])
        call.enter()
        return call.trace


class Comments:
    """The shape comments of one file, with the syntax trees they belong to."""
    def __init__(self, path):
        with open(path, "rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        texts = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
        self.lines = {}                                      # {first line: comment}
        self.nodes = {}                                      # {first line: statement or def}
        self.defs = {}                                       # {line of def or decorator: of def}
        for function in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(function, ast.FunctionDef):
                decorators = [d.lineno for d in function.decorator_list]
                self.defs[min([function.lineno, *decorators])] = function.lineno
                for node in [function, *ast.walk(function)]:
                    if isinstance(node, ast.stmt):
                        self.add(node, texts)

    def add(self, node, texts):
        last = node.end_lineno
        if hasattr(node, "body"):                            # def, for, if, with: the header
            last = node.body[0].lineno - 1 if node.body[0].lineno > node.lineno else node.lineno
        for line in range(node.lineno, last + 1):
            if SHAPE.search(texts.get(line, "")):
                self.lines[node.lineno] = texts[line]
                self.nodes[node.lineno] = node


class Call:
    """One call of a function whose lines are followed."""
    def __init__(self, owner, frame, comments):
        self.owner, self.frame, self.comments = owner, frame, comments
        self.pending = None                                  # first line of the statement that runs
        self.line = 0                                        # that ran last
        self.unknown = {}                                    # {letter: number}

    def enter(self):
        line = self.comments.defs.get(self.frame.f_code.co_firstlineno)
        self.function = self.comments.nodes.get(line)
        if self.function:
            text = self.comments.lines[line].partition("->")[0]
            names = [a.arg for a in self.function.args.args if a.arg != "self"]
            items = re.findall(r"\([^)]*\)|[^,()#]+", text)
            items = [item for item in items if item.strip()]
            for name, item in zip(names, items):
                self.compare(line, [self.frame.f_locals[name]], SHAPE.findall(item))

    def trace(self, frame, event, argument):
        node = self.comments.nodes.get(self.pending)
        inside = node and node.lineno <= frame.f_lineno <= node.end_lineno
        if event == "line":
            if node and not (inside and isinstance(node, (ast.Assign, ast.Expr))):
                self.check_statement(node)
                self.pending = None
            if frame.f_lineno < self.line:                   # the next pass of a loop
                self.unknown = {k: v for k, v in self.unknown.items() if k == "B"}
            self.line = frame.f_lineno
            if frame.f_lineno in self.comments.nodes:
                self.pending = frame.f_lineno
        elif event == "return":
            self.finish(node, argument)
        return self.trace

    def finish(self, node, result):
        if isinstance(node, ast.Return):
            self.compare(node.lineno, [result], SHAPE.findall(self.comments.lines[node.lineno]))
        elif node:
            self.check_statement(node)
        if self.function:
            line = self.function.lineno
            wanted = self.comments.lines[line].partition("->")[2]
            self.compare(line, [result], SHAPE.findall(wanted))

    def check_statement(self, node):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.For):
            targets = [node.target]
        elif isinstance(node, ast.Expr) and isinstance(node.value.func, ast.Attribute):
            targets = [node.value.func.value]                # of list.append or tensor.copy_
        else:
            return
        values = []
        for target in targets:
            for part in getattr(target, "elts", [target]):
                text = ast.unparse(part)
                value = eval(text, self.frame.f_globals, self.frame.f_locals)
                values.append(value[-1] if type(value) is list else value)
        self.compare(node.lineno, values, SHAPE.findall(self.comments.lines[node.lineno]))

    def compare(self, line, values, shapes):
        """One shape is that of every tensor among the values; several go with them in turn."""
        tensors = list(tensors_of(values))
        if not tensors or not shapes:
            return
        if len(shapes) == 1:
            shapes = shapes * len(tensors)
        name = Path(self.frame.f_code.co_filename).name
        self.owner.seen.add((name, line))
        for tensor, shape in zip(tensors, shapes):
            if not self.matches(tuple(tensor.shape), shape):
                self.owner.wrong.append(f"{name}:{line}: {shape} is {tuple(tensor.shape)}")

    def matches(self, sizes, shape):
        dims = [dim.strip() for dim in shape[1:-1].split(",") if dim.strip()]
        if dims[0] == "...":
            dims = dims[1:]
            sizes = sizes[len(sizes) - len(dims):]
        return len(dims) == len(sizes) and all(self.is_size(d, n) for d, n in zip(dims, sizes))

    def is_size(self, dim, size):
        """Whether `4 C`, `h/2` or `2B` is this number. Learns the value of one unknown name."""
        product, _, divisor = dim.partition("/")
        known, unknown = 1, []
        for factor in re.findall(r"\d+|[A-Za-z_]\w*", product):
            value = self.value(factor)
            if value is None:
                unknown.append(factor)
            else:
                known *= value
        size *= int(divisor or 1)
        if len(unknown) == 1 and size % known == 0:
            self.unknown[unknown[0]] = size // known
            return True
        return bool(unknown) or known == size

    def value(self, name):
        if name.isdigit():
            return int(name)
        local = self.frame.f_locals.get(name)
        if isinstance(local, int):
            return local
        return self.owner.letters.get(name, self.unknown.get(name))


def tensors_of(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from tensors_of(value)
