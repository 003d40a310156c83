"""What a folder with a model holds, judged from names and JSON alone, before anything in it is loaded."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sinks.errors import AssetError, InvalidInput, NoModel, UnsafeCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of checkpoints that Python unpickles, which runs code that the file brings along."""


def is_pickle(name: str) -> bool:
    """Whether a file of this name would be unpickled."""
    return name.lower().endswith(PICKLES)


def refuse_pickle(where: str, files: list[str]) -> NoReturn:
    """Raise for a model of which there are only pickles.

    Raises:
        UnsafeCheckpoint: always; the message names the files and says what to do.
    """
    named = ", ".join(sorted(files)[:3]) + (", ..." if len(files) > 3 else "")
    raise UnsafeCheckpoint(
        f"{where} holds its weights as pickle ({named}), which runs code when it is loaded: "
        f"convert it to safetensors (save_pretrained, in a place you trust) or use a copy that has them"
    )


def missing_weights(folder: Path) -> list[str]:
    """Names of the safetensors files that `folder` should hold but does not; empty when the weights are complete.

    Raises:
        AssetError: the index of the shards cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return []
    if not (folder / WEIGHTS_INDEX).is_file():
        return [WEIGHTS]
    weight_map: dict[str, str] = read_json(folder / WEIGHTS_INDEX).get("weight_map", {})
    return sorted({name for name in weight_map.values() if not (folder / name).is_file()})


def gguf_inside(folder: Path) -> Path | None:
    """The GGUF file that is the model of `folder`, or None when the model is a complete set of safetensors.

    Raises:
        UnsafeCheckpoint: there are only pickles.
        UnsupportedModel: an adapter without its base model.
        InvalidInput: more than one GGUF file.
        NoModel: no weights at all.
        AssetError: a shard is missing, or `config.json`.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if WEIGHTS in names or WEIGHTS_INDEX in names:
        _expect_complete(folder, names)
        return None
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return folder / ggufs[0]
    if ggufs:
        raise InvalidInput(f"{folder} holds {len(ggufs)} GGUF files: give the path of one, such as {folder / ggufs[0]}")
    if "adapter_config.json" in names:
        raise UnsupportedModel(
            f"{folder} holds an adapter, not a model: merge it into its base model, save that, and give that folder"
        )
    if pickles := [name for name in names if is_pickle(name)]:
        refuse_pickle(str(folder), pickles)
    raise NoModel(f"{folder} holds no model: expected {WEIGHTS} and config.json, or one .gguf file")


def _expect_complete(folder: Path, names: list[str]) -> None:
    missing = missing_weights(folder) or [name for name in ("config.json",) if name not in names]
    if missing:
        raise AssetError(f"{folder} is incomplete, it lacks {', '.join(missing[:3])}: copy or download it again")


def check_config(folder: Path, trust_remote_code: bool) -> None:
    """Refuse what transformers cannot build by itself.

    Raises:
        UnsafeCheckpoint: the model needs Python code that it brings along, and `trust_remote_code` is off.
        UnsupportedModel: transformers knows no such model, or knows it but not as a causal language model.
        AssetError: `config.json` is not what it should be.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if trust_remote_code and "auto_map" in read_json(folder / "config.json"):
        return
    remedy = "read that code, then pass trust_remote_code=True (--trust-remote-code on the command line)"
    known = config_class(folder, remedy)
    if known not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{folder} is a {known.model_type} model, which is no causal language model: give one")


def config_class(folder: Path, remedy: str) -> "type[PreTrainedConfig]":
    """What transformers itself calls the configuration of the model in `folder`.

    Args:
        folder: holds `config.json`.
        remedy: what a person can do whose model needs code of its own, as the end of a sentence.

    Raises:
        UnsafeCheckpoint: the model needs Python code that it brings along.
        UnsupportedModel: transformers knows no such model.
        AssetError: `config.json` is not what it should be.
    """
    from transformers import CONFIG_MAPPING, __version__

    config = read_json(folder / "config.json")
    model_type = str(config.get("model_type"))
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    if "auto_map" in config:
        raise UnsafeCheckpoint(f"{folder} needs Python code that it brings along (model type {model_type!r}): {remedy}")
    raise UnsupportedModel(
        f"{folder} has the model type {model_type!r}, which transformers {__version__} does not know: "
        f"use a model type that it knows"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        AssetError: the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} cannot be read ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise AssetError(f"{path} holds no JSON object: copy or download it again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object that `read_json` reads.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
