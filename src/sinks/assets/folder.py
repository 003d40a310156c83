"""The user's cache folder: where fetched and converted files stay.

| folder | what is in it |
|---|---|
| `packages` | archives on their way in; a person without a network may place one here by hand |
| `files` | what was taken out of them, named by SHA-256 |
| `models` | GGUF and ONNX models rewritten as safetensors, named by the SHA-256 of the original |
| `digests` | SHA-256 of the user's own GGUF files, so that each is hashed once |
| `terms` | which licence terms were accepted |
| `native` | steps compiled for this processor |
| `work` | unfinished work; nothing in it is ever read as a result |
| `locks` | so that two processes do not do the same work twice |
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from sinks.errors import AssetError
from sinks.files import expanded

VARIABLE = "SINKS_CACHE"


def cache_folder() -> Path:
    """The cache folder, which need not exist yet; nothing is created.

    `$SINKS_CACHE` when set, else the platform's own place: `$XDG_CACHE_HOME/sinks` or `~/.cache/sinks`,
    `~/Library/Caches/sinks` on macOS, `%LOCALAPPDATA%\\sinks\\Cache` on Windows.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return expanded(chosen).absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sinks" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sinks"
    # The XDG specification asks that a relative value be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "sinks"


def writable(*parts: str) -> Path:
    """The folder `parts` below the cache folder, created if needed.

    Raises:
        AssetError: it cannot be created or written; the message names it and `SINKS_CACHE`.
    """
    folder = cache_folder().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise AssetError(
            f"the cache folder {cache_folder()} cannot be written ({reason}): "
            f"make it writable or set {VARIABLE} to a folder that is"
        )
    return folder


@contextmanager
def workspace(key: str) -> Iterator[Path]:
    """An empty folder for one piece of work, held by one process at a time and removed at the end.

    A second process with the same `key` waits until the first is done, so it should look once more for the result.
    What an interrupted process left behind is swept away by the next one.

    Raises:
        AssetError: the cache folder cannot be written.
    """
    with FileLock(writable("locks") / f"{key}.lock"):
        folder = writable("work") / key
        shutil.rmtree(folder, ignore_errors=True)
        folder = writable("work", key)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
