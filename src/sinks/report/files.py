"""Results on disk: the folder is tried before any work is done, and the files of a result appear whole."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from sinks.errors import InvalidInput


@contextmanager
def results_folder(folder: Path) -> Iterator[Path]:
    """Make `folder` if need be, and prove that files can be made in it, before the work inside begins.

    If the work fails, folders made here are taken away again. Raises InvalidInput if no file can be made there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"no result can be written to {str(folder)!r} ({error.strerror})"
        raise InvalidInput(f"{reason}: choose another folder") from error
    try:
        yield folder
    except BaseException:
        for path in made:
            with suppress(OSError):  # someone else put something there
                path.rmdir()
        raise


def write_together(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write each content under its name in `folder`, replacing what was there, and return the paths.

    Everything is on disk under temporary names before the first name changes, so nobody ever sees half a file.
    """
    waiting: list[tuple[Path, Path]] = []
    try:
        for name, content in contents.items():
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            waiting.append((Path(temporary), folder / name))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp makes private files; results are ordinary ones
        for temporary, final in waiting:
            temporary.replace(final)
    finally:
        for temporary, _ in waiting:
            temporary.unlink(missing_ok=True)
    return [final for _, final in waiting]


def current_umask() -> int:
    """The process's file mode mask, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
