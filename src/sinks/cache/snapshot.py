"""One moment of a stream as one file: written whole or not at all, read whole or refused.

The file is safetensors. Everything that changes from token to token is a tensor of fixed shape, so the file of a stream
that has been read from has one size for ever. Its metadata name the format version, the model's fingerprint, the sizes,
and a SHA-256 over every byte of the file (with the digest itself written as zeros).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import KINDS, RINGS, SinkCache
from sinks.errors import DamagedSnapshot, InvalidInput, OtherModel, OtherVersion, SnapshotError
from sinks.files import Target, expanded, node, writable

VERSION = 2
FORMAT = "sinks.snapshot"
CHUNK = 1 << 23
"""Bytes written, and hashed, at a time."""

_LONGEST_HEADER = 1 << 22
_MARKED = 1 << 12
"""Bytes at the beginning of a snapshot that hold its metadata, which come first."""

_NO_DIGEST = b"0" * 64
_DIGEST_KEY = b'"checksum":"'
_OWN = {"cache", *(name for kind in KINDS for name in RINGS[kind].names)}
"""What the names of a cache's own tensors begin with, before a dot."""


@dataclass(frozen=True)
class Header:
    """What the beginning of a snapshot says about the rest. `digest_at` is where its checksum stands in the file."""

    metadata: Mapping[str, str]
    size: int
    digest_at: int


def check_target(path: str | Path) -> Target:
    """Where a snapshot that is called `path` is written: to a new file, or in the place of an older snapshot.

    Raises SnapshotError if it cannot be written there, or if that would destroy something else.
    """
    try:
        target = writable(path)
        begin = b""
        if target.mode is not None:
            with target.path.open("rb") as file:
                begin = file.read(_MARKED)
    except InvalidInput as error:
        raise SnapshotError(str(error)) from error
    except OSError as error:
        raise SnapshotError(f"'{path}' cannot be looked at ({error.strerror or error}): choose another name") from error
    if begin and FORMAT.encode() not in begin:
        raise SnapshotError(f"'{path}' is no saved session, and stays as it is: choose another name, or delete it")
    return target


def write_snapshot(path: str | Path, cache: SinkCache, model_print: str, extras: Mapping[str, Tensor]) -> None:
    """Save `cache`, and tensors that belong beside it, as `path`: `~` is the home folder, and a link is followed.

    `model_print` is the `fingerprint` of the cache's model. Whatever happens on the way, `path` afterwards holds either
    what it held before or the whole new file: it is written beside `path`, made durable, and renamed. A process killed
    in between leaves a file `.NAME.*.saving` behind, which may be deleted. A new file is private; one that takes the
    place of another has its mode.

    Raises SnapshotError if the folder cannot be written to, or what is there is no snapshot (see `check_target`),
    BrokenCache if a forward pass failed half-way.
    """
    target = check_target(path)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": model_print,
        "sinks": str(cache.sinks),
        "window": str(cache.window),
        "start": str(cache.start),
        "cache": cache.kind,
        "checksum": _NO_DIGEST.decode(),
    }
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in (cache.dump() | dict(extras)).items()}
    data = safetensors.torch.save(held, metadata)
    at = data.index(_DIGEST_KEY + _NO_DIGEST) + len(_DIGEST_KEY)
    digest = hashlib.sha256(data).hexdigest().encode()
    view = memoryview(data)
    try:
        _replace(target, [view[:at], memoryview(digest), view[at + len(digest) :]])
    except OSError as error:
        raise SnapshotError(
            f"{path} cannot be written ({error.strerror or error}): what it held before is untouched; "
            "choose a folder with room that you may write to"
        ) from error


def _replace(target: Target, parts: list[memoryview]) -> None:
    """Put a file with these bytes in the place of `target`, durably and in one step."""
    chunks = (part[at : at + CHUNK] for part in parts for at in range(0, len(part), CHUNK))
    written = target.beside(chunks, suffix=".saving", durable=True)
    try:
        os.replace(written, target.path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    _sync_folder(target.path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable too, where a system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_snapshot(path: str | Path, model: PreTrainedModel, model_print: str) -> tuple[SinkCache, dict[str, Tensor]]:
    """The cache saved as `path`, as a new one for `model`, and the tensors that were saved beside it, on the CPU.

    No tensor is made before the whole file is known to be what was written, for this model.

    Raises SnapshotError if there is no such file, DamagedSnapshot, OtherVersion or OtherModel if it cannot be taken up.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            header = read_header(path, file)
            _check_digest(path, file, header)
            if header.metadata.get("model") != model_print:
                raise OtherModel(
                    f"{path} was saved from another model, or from other weights or another data type of this one: "
                    "open the model that it was saved from"
                )
            file.seek(0)
            held = safetensors.torch.load(file.read())
    except SafetensorError as error:
        _refuse(path, f"its tensors do not agree with its header: {error}")
    try:
        sizes = {name: int(header.metadata[name]) for name in ("sinks", "window", "start")}
        kinds = dict(zip(map(str, KINDS), KINDS, strict=True))
        cache = SinkCache.for_model(model, **sizes, cache=kinds[header.metadata["cache"]])
        own = [name for name in held if name.partition(".")[0] in _OWN]
        cache.adopt({name: held.pop(name).to(model.device) for name in own})
    except (KeyError, ValueError) as error:  # InvalidInput is a ValueError
        _refuse(path, f"what it holds is no stream of this model: {error}")
    return cache, held


def look_at(path: str | Path) -> Header:
    """The header of a snapshot, if that is what it is; reads nothing else.

    Raises SnapshotError if there is no such file, DamagedSnapshot or OtherVersion if it cannot be taken up.
    """
    path = Path(path)
    with _opened(path) as file:
        return read_header(path, file)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file that is called `path`, open for reading. Raises SnapshotError if it cannot be read, or is no file."""
    try:
        real = expanded(path)
    except InvalidInput as error:
        raise SnapshotError(str(error)) from error
    try:
        if found := node(real):
            raise SnapshotError(f"{path} cannot be read, for it is {found}: give a saved session")
        with real.open("rb") as file:
            yield file
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read ({error.strerror or error}): give a saved session") from error


def read_header(path: Path, file: BinaryIO) -> Header:
    """Read and check the beginning of a snapshot: its format, its version, and that the file is as long as it says."""
    actual = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(actual - 8, _LONGEST_HEADER):
        _refuse(path, "it has no safetensors header, or was cut short inside it")
    raw = file.read(length)
    try:
        described: Any = json.loads(raw)
        metadata = described.pop("__metadata__")
        size = 8 + length + max((int(each["data_offsets"][1]) for each in described.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        _refuse(path, "its header is no header of a saved session")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        _refuse(path, "its header is no header of a saved session")
    if metadata.get("version") != str(VERSION):
        raise OtherVersion(
            f"{path} is in format version {metadata.get('version')!r}, and this version of sinks reads {VERSION}: "
            "use the version of sinks that wrote it"
        )
    if actual != size:
        what = "cut short" if actual < size else "longer than what was written"
        _refuse(path, f"it is {what}: {actual:,} bytes, and its header asks for {size:,}")
    at = raw.find(_DIGEST_KEY)
    if at < 0:
        _refuse(path, "it has no checksum")
    return Header(metadata, size, 8 + at + len(_DIGEST_KEY))


def _check_digest(path: Path, file: BinaryIO, header: Header) -> None:
    """Compare the checksum with that of every byte of the file, in constant memory."""
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(file.read(header.digest_at))
    told = file.read(len(_NO_DIGEST))
    digest.update(_NO_DIGEST)
    while part := file.read(CHUNK):
        digest.update(part)
    if told != digest.hexdigest().encode():
        _refuse(path, "its checksum does not agree with its content")


def _refuse(path: Path, why: str) -> NoReturn:
    raise DamagedSnapshot(f"{path} cannot be taken up again: {why}. Use an older snapshot, or begin a new session")
