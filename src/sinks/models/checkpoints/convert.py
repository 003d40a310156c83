"""GGUF to safetensors, once: reading a GGUF takes half a minute, reading what is written here takes a second.

What is stored, and when it is used again, is the same for other formats, which bring a `Writer` of their own.
Quantised weights are widened to float32, so the logits are exactly those of the GGUF. A converted model takes four
bytes a weight in the cache folder.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.quantization_config import GgufConfig

from sinks.assets.archives import sha256_of
from sinks.assets.folder import cache_folder, workspace, writable
from sinks.assets.progress import Progress
from sinks.errors import AssetError, NoModel, UnsupportedModel
from sinks.models.checkpoints.quiet import quiet

_LAYOUT = 1
"""Raised when what is written changes, so that older conversions are made anew."""

_MANIFEST = "sinks.json"
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Converted:
    """A model rewritten from GGUF, or from another format that `from_pretrained` does not read.

    `sha256` is that of the original, `quantization` how it stored most weights ("Q4_1"), `licence` what its header
    says, `files` maps each file of the folder to its size in bytes.
    """

    sha256: str
    quantization: str
    licence: str
    layout: int
    files: dict[str, int]

    @property
    def folder(self) -> Path:
        """Where the model is, readable by `from_pretrained`."""
        return cache_folder() / "models" / self.sha256


@dataclass(frozen=True)
class Header:
    """What a file says about the weights in it: how it stores most of them, and under which licence."""

    quantization: str
    licence: str


Writer = Callable[[Path, Path], Header]
"""Reads the file at the first path, writes a folder for `from_pretrained` at the second, and tells the header."""


def converted(sha256: str) -> Converted | None:
    """The conversion of the file with this SHA-256, or None. Looks only; compares sizes, not contents."""
    folder = cache_folder() / "models" / sha256
    try:
        found = Converted(**json.loads((folder / _MANIFEST).read_text(encoding="utf-8")))
        whole = all((folder / name).stat().st_size == size for name, size in found.files.items())
    except (OSError, ValueError, TypeError):  # nothing there, or not something that this layout wrote
        return None
    return found if whole and found.layout == _LAYOUT else None


def write_gguf(gguf: Path, folder: Path) -> Header:
    """Write the language model and the tokenizer of a GGUF file into `folder`.

    Raises:
        UnsupportedModel: transformers cannot read this architecture from GGUF.
        AssetError: the file is damaged or lacks weights.
        OSError: the folder cannot be written.
    """
    model, tokenizer, header = _read(gguf)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return header


def convert(origin: Path, sha256: str, report: Progress, write: Writer = write_gguf) -> Converted:
    """Rewrite the file at `origin`, whose SHA-256 is `sha256`, unless that was done before.

    The folder appears under its final name only when it is complete; an interrupted conversion leaves nothing behind
    that would be used.

    Raises:
        UnsupportedModel: transformers cannot read this architecture.
        AssetError: the file is damaged, lacks weights, or the cache folder cannot be written.
    """
    if found := converted(sha256):
        return found
    with workspace(f"convert-{sha256}") as work:
        if found := converted(sha256):  # by the process that held the workspace before us
            return found
        step = f"convert {origin.name}, once"
        report(step, 0, 0)
        folder = work / "model"
        try:
            manifest = _manifest(write(origin, folder), sha256, folder)
            final = writable("models") / sha256
            shutil.rmtree(final, ignore_errors=True)  # what is there was found wanting above
            os.replace(folder, final)
        except OSError as error:
            raise AssetError(
                f"could not store the converted {origin.name} in {cache_folder()} ({error.strerror or error}): "
                f"it takes four bytes a weight; make room or set SINKS_CACHE to another folder"
            ) from error
        size = sum(manifest.files.values())
        report(step, size, size)
        return manifest


def digest(gguf: Path) -> str:
    """SHA-256 of a GGUF file of the user's, remembered by path, size and time of change.

    Raises:
        NoModel: it is not a GGUF file.
        AssetError: it cannot be read.
    """
    try:
        with gguf.open("rb") as file:
            magic = file.read(len(_MAGIC))
        state = gguf.stat()
    except OSError as error:
        raise AssetError(f"{gguf} cannot be read ({error.strerror}): check its permissions") from error
    if magic != _MAGIC:
        raise NoModel(f"{gguf} is not a GGUF file (it begins with {magic!r}): download it again or give another file")
    key = f"{gguf.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    note = hashlib.sha256(key.encode()).hexdigest()
    known = cache_folder() / "digests" / note
    if known.is_file() and len(text := known.read_text()) == 64:
        return text
    value = sha256_of(gguf)
    with workspace(f"digest-{note}") as work:
        (work / note).write_text(value)
        os.replace(work / note, writable("digests") / note)
    return value


def _manifest(header: Header, sha256: str, folder: Path) -> Converted:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = Converted(sha256, header.quantization, header.licence, _LAYOUT, files)
    # Last, so that a folder without it is known to be unfinished.
    (folder / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
    return manifest


def _read(gguf: Path) -> tuple[Any, Any, Header]:
    """Model in float32, tokenizer and header of a GGUF file."""
    where = {"gguf_file": gguf.name, "local_files_only": True}
    # The dequantising loop draws a tqdm bar that no option turns off, on whatever `sys.stderr` is at that moment.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            header = _header(gguf)
            # Annotated as a model alone, whatever is asked for.
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **where,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
        except Exception as error:  # a damaged file fails anywhere in two parsers, with any exception
            if "architecture" in str(error) and "not supported" in str(error):
                raise UnsupportedModel(f"{gguf}: {error} Use the model's safetensors instead") from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise AssetError(
                f"{gguf} cannot be read as a GGUF language model ({reason}): download it again or give another file"
            ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise AssetError(f"{gguf} lacks weights ({sorted(info['missing_keys'])[0]}, ...): download it again")
    return model, tokenizer, header


def _header(gguf: Path) -> Header:
    from gguf import GGUFReader, LlamaFileType

    reader = GGUFReader(gguf)

    def value(key: str) -> Any:
        field = reader.fields.get(key)
        return None if field is None else field.parts[field.data[0]]

    kind, licence = value("general.file_type"), value("general.license")
    if kind is None:
        quantization = "/".join(sorted({tensor.tensor_type.name for tensor in reader.tensors}))
    else:
        quantization = LlamaFileType(int(kind[0])).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return Header(quantization, "not stated" if licence is None else bytes(licence).decode("utf-8"))
