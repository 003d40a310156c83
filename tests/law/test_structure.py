"""Where things stand: the floors, the doors between rooms, names, docstrings, and tests that mirror the rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.law.tree import ROOT, SOURCE, modules, project_files, python_files, rooms

ATTICS = {"common", "helper", "helpers", "misc", "util", "utils"}

OWN_TESTS = {
    "families": "every family of models that is supported, across the rooms",
    "law": "the code itself",
    "oracle": "the second route to every number, written apart from the first",
    "whole": "the whole on the real built-in model",
}


def test_imports_keep_the_floors():
    """The contracts stand in pyproject.toml; this is `lint-imports`, so that `make test` alone tells a breach."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def through_own_door(path: Path) -> Iterator[str]:
    """The imports of a module that go through the `__init__` of the room it is in."""
    room = ".".join(path.parent.relative_to("src").parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            used = [alias.name for alias in node.names if alias.name == room]
        elif isinstance(node, ast.ImportFrom) and (node.module == room or (node.level == 1 and node.module is None)):
            used = [alias.name for alias in node.names if f"{room}.{alias.name}" not in modules()]
        else:
            continue
        yield from (f"{path}:{node.lineno}: {name}" for name in used)


def test_siblings_do_not_use_their_own_door():
    """Inside a room a module imports `sinks.room.module`, never a name from `sinks.room`: that is how cycles begin."""
    siblings = [path for path in python_files("src/sinks") if path.name != "__init__.py"]
    assert not [name for path in siblings for name in through_own_door(path)]


def test_no_attic():
    """A name such as `utils` says nothing about what is inside."""
    assert not [path for path in project_files() if ATTICS & {Path(part).stem for part in path.parts}]


def undocumented(tree: ast.Module) -> Iterator[str]:
    """The public classes and functions without a docstring; a method may leave its words to the Protocol it fulfils."""
    if ast.get_docstring(tree) is None:
        yield "the module itself"
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, documented) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and not is_overload(node):
            yield node.name


def is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether this is one of several signatures of a function whose words stand at its body."""
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def test_what_is_public_has_a_docstring():
    trees = [(path, ast.parse((ROOT / path).read_text())) for path in python_files("src/sinks")]
    silent = [f"{path}: {name}" for path, tree in trees for name in undocumented(tree)]
    assert not silent, "no docstring:\n" + "\n".join(silent)


def test_tests_mirror_the_rooms():
    """tests/ROOM/ tests src/sinks/ROOM/; a test beside them tests the module of its name. Helpers may live anywhere."""
    tests = [path.relative_to("tests") for path in python_files("tests") if path.name.startswith("test_")]
    alone = [path for path in tests if len(path.parts) == 1]
    homeless = [path for path in alone if not (SOURCE / path.name.removeprefix("test_")).exists()]
    assert not homeless, f"no module has this name: {homeless}"
    folders = {path.parts[0] for path in tests if path not in alone}
    assert not folders - rooms() - OWN_TESTS.keys(), f"no room has this name: {folders - rooms() - OWN_TESTS.keys()}"
    assert not rooms() - folders, f"no test mirrors {rooms() - folders}"
