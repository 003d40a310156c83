"""What an entry of the catalogue is: a file inside a package, a payload of packages, a model, a text, a picture."""

from dataclasses import dataclass
from typing import Literal

Registry = Literal["python", "debian"]

Kind = Literal["causal", "encoder", "vision"]
"""What a model reads: a text from left to right, a text as a whole, or a picture."""


@dataclass(frozen=True)
class Member:
    """One file inside a package archive.

    `path` is relative to the archive's root with forward slashes; `size` is unpacked, in bytes; `sha256` hexadecimal.
    """

    path: str
    size: int
    sha256: str

    @property
    def file(self) -> str:
        """Its name without the folders."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Package:
    """One package archive of exactly one version, and what is wanted from it.

    `file` is the archive's name as its registry serves it; `size` (bytes) and `sha256` are those of the archive.
    `member` is the file that is wanted; `beside` are small ones that belong into the same folder, as they are.
    """

    name: str
    version: str
    registry: Registry
    file: str
    size: int
    sha256: str
    member: Member
    beside: tuple[Member, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Payload:
    """One file that packages carry, whole or in parts, and what lies beside it.

    The members of `packages`, joined in order, are the file `file` with `size` (bytes) and `sha256`. The members that
    are to lie beside it keep their own names.
    """

    file: str
    size: int
    sha256: str
    packages: tuple[Package, ...]

    @property
    def download_bytes(self) -> int:
        """Size of all archives together, in bytes."""
        return sum(package.size for package in self.packages)

    @property
    def sizes(self) -> dict[str, int]:
        """Every file that there is to be, in one folder, with its size in bytes; the main one comes first."""
        beside = {member.file: member.size for package in self.packages for member in package.beside}
        return {self.file: self.size, **beside}


@dataclass(frozen=True)
class ModelAsset:
    """A model. A causal one is a GGUF file, an encoder safetensors with a tokenizer beside, a vision model ONNX.

    `terms` is set when its licence must be accepted before the first read.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    payload: Payload
    licence: str
    terms: Payload | None = None
    kind: Kind = "causal"


@dataclass(frozen=True)
class TextAsset:
    """A text. `payload` is None when the text is already on the machine and nothing is fetched."""

    name: str
    title: str
    licence: str
    source: str
    payload: Payload | None = None


@dataclass(frozen=True)
class PictureAsset:
    """A photograph: the file `file` beside the main one of `payload`, or that one itself.

    Without a payload nothing is fetched: `file` is then the path inside the installed distribution `source`.
    """

    name: str
    title: str
    licence: str
    source: str
    file: str
    payload: Payload | None = None


def single(package: Package) -> Payload:
    """The payload that is one member of one package, with what lies beside it there."""
    return Payload(package.member.file, package.member.size, package.member.sha256, (package,))
