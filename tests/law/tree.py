"""The project as files and modules: what the laws speak about."""

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "sinks"


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that is, or would be, committed; paths relative to `ROOT`.

    Without git (an unpacked archive) that is every file outside folders with a leading dot and folders of output.
    """
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        found = {ROOT / name for name in listed if name}
    else:
        found = {path for path in ROOT.rglob("*") if not _is_output(path.relative_to(ROOT))}
    return tuple(sorted(path.relative_to(ROOT) for path in found if path.is_file()))


def _is_output(path: Path) -> bool:
    hidden = any(part[0] == "." or part == "__pycache__" for part in path.parts)
    return hidden or path.parts[0] in {"out", "dist", "build"}


def python_files(*folders: str) -> list[Path]:
    """The Python files among `project_files`, all of them or those below the given folders."""
    files = [path for path in project_files() if path.suffix == ".py"]
    return [path for path in files if not folders or any(path.is_relative_to(folder) for folder in folders)]


def module_name(path: Path) -> str:
    """`src/sinks/cache/rings/ring.py` -> `sinks.cache.rings.ring`; a folder's `__init__.py` -> the folder's package."""
    parts = path.relative_to("src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> list[str]:
    """The dotted name of every module of the package."""
    return [module_name(path) for path in python_files("src/sinks")]


def rooms() -> set[str]:
    """The folders directly below the package that hold more than their own door."""
    return {path.parts[2] for path in python_files("src/sinks") if len(path.parts) > 3 and path.name != "__init__.py"}
