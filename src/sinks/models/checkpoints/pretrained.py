"""Reading a folder with `from_pretrained`: safetensors only, nothing from a network, every failure an `AssetError`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.repocard import metadata_load
from safetensors import SafetensorError

from sinks.errors import AssetError, InvalidInput

Result = TypeVar("Result")

_FAILURES = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,  # a configuration with a value of the wrong type
)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The element types that a model can be loaded in."""


def read_model(auto: Any, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Any, list[str]]:
    """The model in `folder`, by the class `auto` of transformers, and the weights that it should have but has not.

    transformers filled those with random numbers and told nobody: see `refuse_missing`.

    Raises:
        AssetError: it cannot be read.
    """

    def read() -> Any:
        return auto.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )

    model, info = reading(read, folder, "a model")
    return model, sorted(info["missing_keys"])


def refuse_missing(folder: Path, missing: Sequence[str]) -> None:
    """Refuse a model of which weights are missing.

    Raises:
        AssetError: there are such weights.
    """
    if missing:
        raise AssetError(
            f"the weights in {folder} lack {len(missing)} tensors ({missing[0]}, ...): copy or download it again"
        )


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        AssetError: it cannot be read.
    """

    def read() -> transformers.PreTrainedTokenizerBase:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )

    return reading(read, folder, "a tokenizer")


def licence_of(folder: Path) -> str:
    """What the model card in `folder` says, or "not stated"."""
    card = folder / "README.md"
    metadata = (metadata_load(card) or {}) if card.is_file() else {}
    return str(metadata.get("license_name") or metadata.get("license") or "not stated")


def element_type(dtype: str | torch.dtype) -> torch.dtype:
    """The element type of this name.

    Raises:
        InvalidInput: it is none of `DTYPES`.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidInput(f"dtype {name!r} is none that a model can be loaded in: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def placement(device: str | torch.device) -> torch.device:
    """The device of this name, after a try.

    Raises:
        InvalidInput: this build of torch, or this machine, does not have it.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)  # names a device that this build of torch, or this machine, does not have
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidInput(f"device {str(device)!r} cannot be used here ({reason}): use 'cpu'") from error
    return place


def reading(read: Callable[[], Result], folder: Path, what: str) -> Result:
    """What `read` returns, which reads `what` from `folder`.

    Raises:
        AssetError: it fails.
    """
    try:
        return read()
    except _FAILURES as error:
        raise AssetError(
            f"{what} could not be read from {folder} ({' '.join(str(error).split())}): "
            f"copy or download it again, or give another"
        ) from error
