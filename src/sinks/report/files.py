"""Results on disk: every file is tried before any work is done, and the files of a result appear whole."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from sinks.errors import InvalidInput
from sinks.files import Target, expanded, prove, writable


@contextmanager
def results_folder(folder: Path, names: Iterable[str] = ()) -> Iterator[Path]:
    """Make `folder` if need be, and prove that the files `names` can be made in it, before the work inside begins.

    If the work fails, folders made here are taken away again. Raises InvalidInput if a file cannot be made there.
    """
    folder = expanded(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prove(folder)
    except OSError as error:
        reason = f"no result can be written to {str(folder)!r} ({error.strerror})"
        raise InvalidInput(f"{reason}: choose another folder") from error
    try:
        for name in names:
            writable(folder / name)
        yield folder
    except BaseException:
        for path in made:
            with suppress(OSError):  # someone else put something there
                path.rmdir()
        raise


@contextmanager
def results_file(path: Path | None, mark: str) -> Iterator[Callable[[str], None]]:
    """What writes a JSON document to `path`, each time in the place of the last; for None it writes nothing.

    Whether that can be done is known before the work inside begins. A file with content is replaced only if it is such
    a document itself: an object that has `mark`. Raises InvalidInput for any other.
    """
    if path is None:
        yield lambda text: None
        return
    path = expanded(path)
    with results_folder(path.parent, [path.name]) as folder:
        refuse_foreign(path, mark)

        def write(text: str) -> None:
            write_together(folder, {path.name: text.encode()})

        yield write


def refuse_foreign(path: Path, mark: str) -> None:
    """Raises InvalidInput if `path` has content, and that is no JSON object that has `mark`."""
    try:
        content = path.read_bytes() if path.exists() else b""
        found = json.loads(content) if content else {mark: None}
    except OSError as error:
        raise InvalidInput(f"'{path}' cannot be looked at ({error.strerror}): choose another name") from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or mark not in found:
        raise InvalidInput(f"'{path}' is no earlier result of this kind, and stays as it is: choose another name")


def write_together(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write each content under its name in `folder`, replacing what was there, and return the paths.

    Everything is on disk under temporary names before the first name changes, so nobody ever sees half a file. A link
    is followed, and what is replaced leaves its mode. Raises InvalidInput if something else than a file is there.
    """
    public = 0o666 & ~current_umask()  # results are ordinary files
    waiting: list[tuple[Path, Target]] = []
    try:
        for name, content in contents.items():
            target = writable(folder / name)
            waiting.append((target.beside([content], mode=public), target))
        for temporary, target in waiting:
            os.replace(temporary, target.path)
    finally:
        for temporary, _ in waiting:
            temporary.unlink(missing_ok=True)
    return [folder / name for name in contents]


def current_umask() -> int:
    """The process's file mode mask, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
