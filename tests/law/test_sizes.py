"""The size law: 300 lines of code a file, 50 a function, 8 parameters, 8 files a room.

A line of code is a line that carries a token which is no comment, no docstring and no blank: words are free, code is
dear (after tinygrad's `sz.py`). The lines of a function are those of its whole span, what is nested in it included.
"""

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator

from tests.law.exceptions import EXCEPTIONS
from tests.law.tree import ROOT, python_files

LIMITS = {"file": 300, "function": 50, "parameters": 8, "room": 8}

WORDLESS = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(text: str) -> set[int]:
    """The numbers of the lines that carry code."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for token in tokens if token.type not in WORDLESS for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """Every function of a file with its qualified name, nested ones and methods included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield owner + node.name, node
        named = isinstance(node, Function | ast.ClassDef)
        yield from functions(node, f"{owner}{node.name}." if named else owner)


def parameters(function: Function) -> int:
    """How many parameters a caller meets: `self` and `cls` are not among them."""
    spec = function.args
    names = [argument.arg for argument in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]]
    return len([name for name in names if name not in {"self", "cls"}]) + bool(spec.vararg) + bool(spec.kwarg)


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles it: then it takes pointers, sizes and what is known at compile time one by one."""
    made_by = [node for decorator in function.decorator_list for node in ast.walk(decorator)]
    return any(isinstance(node, ast.Name) and node.id == "jit" for node in made_by)


def measures(path: str, text: str) -> Iterator[tuple[str, str, int]]:
    """What the law weighs in one file: (path, measure, value)."""
    lines = code_lines(text)
    yield path, "file", len(lines)
    for name, function in functions(ast.parse(text)):
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        span = range(first, (function.end_lineno or first) + 1)
        yield f"{path}::{name}", "function", len(lines.intersection(span))
        if not function.name.startswith("test_") and not is_kernel(function):  # nobody calls a test
            yield f"{path}::{name}", "parameters", parameters(function)


def all_measures() -> Iterator[tuple[str, str, int]]:
    """What the law weighs in the whole project."""
    for path in python_files():
        yield from measures(path.as_posix(), (ROOT / path).read_text())
    package = [path for path in python_files("src/sinks") if path.name != "__init__.py"]
    for room, files in Counter(path.parent.as_posix() for path in package).items():
        yield room, "room", files


def test_everything_is_small_or_a_listed_exception():
    allowed = {(entry.path, entry.measure): entry.value for entry in EXCEPTIONS}
    too_large = [
        f"{path}: {measure} of {value}, at most {allowed.get((path, measure), LIMITS[measure])}"
        for path, measure, value in all_measures()
        if value > allowed.get((path, measure), LIMITS[measure])
    ]
    assert not too_large, "find the missing noun, or list the exception with its reason:\n" + "\n".join(too_large)


def test_every_listed_exception_is_needed_and_has_a_reason():
    found = {(path, measure): value for path, measure, value in all_measures()}
    for entry in EXCEPTIONS:
        assert entry.reason.strip(), f"{entry.path}: no reason given"
        value = found.get((entry.path, entry.measure), 0)
        assert value > LIMITS[entry.measure], f"{entry.path}: needs no entry any more"
    assert len(EXCEPTIONS) == len({(entry.path, entry.measure) for entry in EXCEPTIONS})


def test_the_count_itself():
    text = '''"""Words
    are free."""

# and so are these

LIMIT = 1
"""Words again."""


def outer(a, /, b, *rest, c, **more):
    """Free."""
    text = """two
    lines of code"""

    class Inner:
        @staticmethod
        def method(self, x): return [
            x,  # a comment beside code
        ]
    return text, Inner
'''
    assert list(measures("f.py", text)) == [
        ("f.py", "file", 10),
        ("f.py::outer", "function", 9),
        ("f.py::outer", "parameters", 5),
        ("f.py::outer.Inner.method", "function", 4),
        ("f.py::outer.Inner.method", "parameters", 1),
    ]
