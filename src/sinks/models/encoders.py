"""Models that are looked at, not streamed: encoders of text (BERT and its kin) and vision transformers.

They read their whole input at once, so there is no cache and nothing to keep; what is measured on them is where their
attention goes. `load` opens causal language models only, `load_encoder` these only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from sinks.assets.catalogue import ModelAsset, find_model, model_names, models_of, suggestion
from sinks.assets.fetch import fetch_model
from sinks.assets.progress import Progress, reporting
from sinks.errors import AssetError, InvalidInput, UnknownName, UnsupportedModel
from sinks.files import expanded
from sinks.models.checkpoints.convert import convert, converted
from sinks.models.checkpoints.dinov2 import write_dinov2
from sinks.models.checkpoints.folder import PREPROCESSOR, config_class, gguf_inside, read_json
from sinks.models.checkpoints.pretrained import (
    element_type,
    licence_of,
    placement,
    read_model,
    read_tokenizer,
    reading,
    refuse_missing,
)
from sinks.models.checkpoints.quiet import quiet
from sinks.models.load import Source

Colours = tuple[float, float, float]
Kind = Literal["encoder", "vision"]
"""Whether a model reads text, or is shown pictures."""

_POOLER = "pooler."
_NOTES: Mapping[str, str] = {"vision": "backbone of an ONNX export, stock or fine-tuned not stated; mask token zero"}


@dataclass(frozen=True)
class Encoder:
    """A model in eval mode that reads its whole input at once, and what prepares that input.

    An encoder of text has a `tokenizer`, and None in the last three. A vision transformer has no tokenizer; it was
    prepared for squares of `image_size` pixels, red, green and blue between 0 and 1 less `mean`, divided by `std` (None
    where its folder does not say).
    """

    model: transformers.PreTrainedModel
    source: Source
    tokenizer: transformers.PreTrainedTokenizerBase | None
    image_size: int | None
    mean: Colours | None
    std: Colours | None


def load_encoder(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Encoder:
    """Load an encoder of text or a vision transformer. No code that a model brings along is ever run.

    A pooler, which stands after the last layer and is often not trained, may be missing from a folder; the model then
    has none, and `source.note` says so. Any other missing weight is an error.

    Args:
        name: a built-in model ("minilm-l6", "dinov2-small"), or a folder with safetensors. A name goes before a folder.
        dtype: element type of the weights, by name or as a torch dtype: float32, bfloat16, float16 or float64.
        device: where the model goes.
        progress: told about downloaded bytes; None draws a bar when standard error is a terminal.

    Raises:
        UnknownName: nothing has this name.
        UnsafeCheckpoint: it is a pickle, or needs code of its own.
        UnsupportedModel: it is neither an encoder of text nor a vision transformer, or one unknown to transformers.
        FetchError: it could not be downloaded; the message says what to do without a network.
        ChecksumError: what was downloaded is not what was asked for.
        AssetError: it is damaged or incomplete, the cache folder cannot be written, or the package `onnx` is missing
            at the first load of "dinov2-small".
        InvalidInput: no such dtype or device, or a file instead of a folder.
    """
    element, place = element_type(dtype), placement(device)
    folder, source = _find(name, progress)
    kind = _kind(folder)
    if source.note and element != torch.float32:
        source = replace(source, note=f"{source.note}, then rounded to {str(element).removeprefix('torch.')}")
    with quiet():
        model, missing = read_model(transformers.AutoModel, folder, element)
        refuse_missing(folder, [key for key in missing if not key.startswith(_POOLER)])
        tokenizer = _tokenizer(folder) if kind == "encoder" else None
    if missing:
        model.pooler = None  # it would be random numbers
        source = replace(source, note=", ".join(filter(None, (source.note, "without its pooler"))))
    size, mean, std = _preparation(folder, model.config) if kind == "vision" else (None, None, None)
    cast(torch.nn.Module, model).to(place)
    model.eval()
    return Encoder(model, source, tokenizer, size, mean, std)


def is_encoder(name: str | Path) -> bool:
    """Whether `load_encoder` is the door for this name, rather than `load`: a built-in encoder, or a folder of one."""
    asset = find_model(str(name))
    if asset is not None:
        return asset.kind != "causal"
    folder = expanded(name)
    if not (folder / "config.json").is_file():
        return False
    try:
        _kind(folder)
    except (UnsupportedModel, AssetError):  # whatever is wrong with it, `load` says
        return False
    return True


def picture_inputs(encoder: Encoder, pictures: Sequence[Float[np.ndarray, "3 size size"]]) -> dict[str, Tensor]:
    """Pictures (values between 0 and 1) as a vision transformer takes them: `pixel_values` `[pictures, 3, size, size]`.

    Raises InvalidInput for an encoder of text.
    """
    if encoder.tokenizer is not None:
        raise InvalidInput(f"{encoder.source.name} reads text, not pictures: give it token ids")
    values = torch.from_numpy(np.stack(pictures))
    if encoder.mean is not None and encoder.std is not None:
        mean, std = (torch.tensor(colours)[:, None, None] for colours in (encoder.mean, encoder.std))
        values = (values - mean) / std
    return {"pixel_values": values.to(device=encoder.model.device, dtype=encoder.model.dtype)}


def prepare_encoder(name: str | Path, *, progress: Progress | None = None) -> Path:
    """Fetch a model, convert it if need be, and return its folder. Does nothing the second time.

    Raises what `load_encoder` raises, but for a device, a data type and weights, which are not looked at.
    """
    return look_up_encoder(name, progress=progress)[0]


def look_up_encoder(name: str | Path, *, progress: Progress | None = None) -> tuple[Path, Source, Kind]:
    """What `prepare_encoder` gives, what `load_encoder` will say of where the model comes from, and what it reads."""
    folder, source = _find(name, progress)
    return folder, source, _kind(folder)


def _find(name: str | Path, progress: Progress | None) -> tuple[Path, Source]:
    """The folder to load from, and what to say about it."""
    text = str(name)
    if asset := find_model(text):
        with reporting(progress) as report:
            folder = _built_in(asset, report)
        return folder, Source(asset.name, "built-in", asset.licence, asset.payload.sha256, _NOTES.get(asset.kind, ""))
    path = expanded(text)
    if path.is_file():
        raise InvalidInput(f"{path} is a file: give the folder that holds the model's safetensors and its config.json")
    if not text or not path.is_dir():
        known = ", ".join(asset.name for asset in models_of("encoder", "vision"))
        raise UnknownName(
            f"no built-in encoder or folder is called {text!r}{suggestion(text, model_names('encoder', 'vision'))}: "
            f"built-in ones are {known}; any other must be a folder on this machine"
        )
    if gguf := gguf_inside(path):
        raise UnsupportedModel(f"{gguf} is a GGUF file, which is not read as an encoder: give a folder of safetensors")
    return path, Source(str(path), "folder", licence_of(path), "", "")


def _built_in(asset: ModelAsset, report: Progress) -> Path:
    if asset.kind == "causal":
        raise UnsupportedModel(
            f"{asset.name} ({asset.title}) is a causal language model: load it with sinks.load({asset.name!r})"
        )
    sha256 = asset.payload.sha256
    if asset.kind == "encoder":
        return fetch_model(asset, progress=report).parent
    found = converted(sha256) or convert(fetch_model(asset, progress=report), sha256, report, write_dinov2)
    return found.folder


def _kind(folder: Path) -> Kind:
    """What the model in `folder` reads, judged by what transformers has it for.

    Raises:
        UnsafeCheckpoint: it needs code of its own.
        UnsupportedModel: it is neither an encoder of text nor a vision transformer, or unknown to transformers.
    """
    known = config_class(folder, "load_encoder runs none; give another model")
    config = reading(lambda: known.from_dict(read_json(folder / "config.json")), folder, "a configuration")
    alone = not (getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False))
    if alone and known in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return "encoder"
    # One stack of layers with one number of heads, on patches of one size: neither convolutions nor a pyramid.
    plain = all(isinstance(getattr(config, key, None), int) for key in ("patch_size", "num_attention_heads"))
    model = transformers.MODEL_MAPPING.get(known, None)
    if alone and plain and getattr(model, "main_input_name", "") == "pixel_values":
        return "vision"
    raise UnsupportedModel(
        f"{folder} is a {known.model_type} model, neither an encoder of text like BERT nor a plain vision transformer: "
        f"give one of these, or load a causal language model with sinks.load"
    )


def _tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(folder)
    # For BERT without any vocabulary transformers makes one that knows no word, and says nothing.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / file).is_file() for file in files):
        raise AssetError(f"{folder} holds no vocabulary ({' or '.join(sorted(files))}): copy or download it again")
    return tokenizer


def _preparation(folder: Path, config: Any) -> tuple[int | None, Colours | None, Colours | None]:
    """Edge in pixels, mean and standard deviation of the pictures that the model was prepared for."""
    told = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    # What is cut out last is what the model sees.
    size = told.get("crop_size") if told.get("do_center_crop", True) else None
    size = size or told.get("size") or getattr(config, "image_size", None)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not told.get("do_normalize", True):
        return size, None, None
    return size, _colours(folder, told, "image_mean"), _colours(folder, told, "image_std")


def _colours(folder: Path, told: dict[str, Any], key: str) -> Colours | None:
    if key not in told:
        return None
    try:
        red, green, blue = map(float, told[key])
    except (TypeError, ValueError) as error:
        raise AssetError(
            f"{folder / PREPROCESSOR} gives {told[key]!r} as {key}, where three numbers are expected: correct it"
        ) from error
    return red, green, blue
