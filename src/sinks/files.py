"""Files that a person names: which may be read, which may be written, and how new content takes the place of old.

Whatever exists and is no regular file is refused without being opened: a device would be replaced by a file, and the
opening of a FIFO waits for somebody at its other end.
"""

import os
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sinks.errors import InvalidInput

NODES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
"""What may stand where a file is looked for."""


@dataclass(frozen=True)
class Target:
    """A file that may be written. `path` is no link but where links led; `mode` is None where there is no file yet."""

    path: Path
    mode: int | None

    def beside(
        self, parts: Iterable[bytes | memoryview], *, suffix: str = "", mode: int = 0o600, durable: bool = False
    ) -> Path:
        """Write `parts` to a new file in the same folder, to be renamed by `os.replace`, and return it.

        It gets the mode of the file that it will replace, or else `mode`. If writing fails, nothing is left of it.
        """
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=suffix, dir=self.path.parent)
        try:
            try:
                for part in parts:
                    rest = memoryview(part)
                    while rest:
                        rest = rest[os.write(handle, rest) :]
                if durable:
                    os.fsync(handle)
            finally:
                os.close(handle)
            os.chmod(name, mode if self.mode is None else self.mode)  # mkstemp makes private files
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)


def expanded(named: str | Path) -> Path:
    """The path with `~` as the home folder, as a shell would give it. Raises InvalidInput for the home of nobody."""
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise InvalidInput(f"'{named}' begins with a home folder that is not known here: write it out") from error


def node(path: Path) -> str | None:
    """What `path` is, or leads to, if that is no regular file; None for a file, and for nothing at all."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if kind == stat.S_IFREG else NODES.get(kind, "no regular file")


def writable(named: str | Path) -> Target:
    """Where to write a file that is called `named`: a new one, or in the place of an older one. Nothing is opened.

    Raises InvalidInput if that cannot be done: no regular file is there, no folder, or no permission.
    """
    path = expanded(named)
    real = Path(os.path.realpath(path))
    try:
        if found := node(path):
            wrong = f"is {found}: name a file{' in it' if found == 'a folder' else ''}"
        elif not real.parent.is_dir():
            wrong = "is in no folder that exists: make it first"
        elif real.exists() and not os.access(real, os.W_OK):
            wrong = "you may not write: choose another name, or change its permissions"
        else:
            mode = stat.S_IMODE(real.stat().st_mode) if real.exists() else None
            prove(real.parent)
            return Target(real, mode)
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInput(f"nothing can be written to '{path}' ({reason}): choose another name or folder") from error
    raise InvalidInput(f"nothing can be written to '{path}', which {wrong}")


def prove(folder: Path) -> None:
    """Make a file without a name in `folder`, which goes away at once. Raises OSError if that cannot be done."""
    with tempfile.TemporaryFile(dir=folder):
        pass
