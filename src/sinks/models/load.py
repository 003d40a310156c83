"""One door for every model: the built-in ones, a Hub id, a local folder, a GGUF file. Never a pickle.

A built-in model, a folder, a GGUF file and a Hub model that is already in the Hub's cache are loaded without touching
the network.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
import transformers
from torch.distributed.device_mesh import DeviceMesh

from sinks.assets.catalogue import DEFAULT_MODEL, ModelAsset, find_model, model_names, models_of, suggestion
from sinks.assets.fetch import fetch_model
from sinks.assets.progress import Progress, reporting
from sinks.errors import InvalidInput, UnknownName, UnsupportedModel
from sinks.files import expanded
from sinks.models.checkpoints.convert import Converted, convert, converted, digest
from sinks.models.checkpoints.folder import check_config, gguf_inside, is_pickle, refuse_pickle
from sinks.models.checkpoints.hub import snapshot
from sinks.models.checkpoints.pretrained import (
    element_type,
    licence_of,
    placement,
    read_model,
    read_tokenizer,
    refuse_missing,
)
from sinks.models.checkpoints.quiet import quiet
from sinks.models.parallel.share import check_parallel, share
from sinks.models.step.blocks import why_not
from sinks.models.step.hasten import hasten, steps_of
from sinks.models.weights.quantize import NOTES, check_quant, quantize

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """Where a model comes from; belongs beside every number measured on it.

    `licence` is what the source states, or "not stated". `revision` is the commit of a Hub model, the SHA-256 of a GGUF
    file or of a built-in model's weights, and empty for a folder. `note` says what was done to the weights, such as
    "Q4_1 widened to float32", or is empty.
    """

    name: str
    kind: Literal["built-in", "hub", "folder", "gguf"]
    licence: str
    revision: str
    note: str


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer, and where both come from."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    source: Source


def load(
    name: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    accept_terms: bool = False,
    quant: str = "none",
    parallel: DeviceMesh | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Load a causal language model and its tokenizer.

    The first load of a built-in model downloads it (93 MB for the default) and converts it; later ones take a second
    and no network. A built-in name goes before a folder of the same name, and a folder before a Hub id.

    Args:
        name: a built-in model ("smollm2", "gemma3-270m"), a folder, a `.gguf` file, or a Hub id ("owner/name");
            None for the default, SmolLM2-135M-Instruct.
        dtype: element type of the weights, by name or as a torch dtype: float32, bfloat16, float16 or float64.
        device: where the model goes.
        trust_remote_code: run Python code that the model brings along. Never on by itself.
        accept_terms: the user has read and accepts the terms of a built-in model that has some.
        quant: "int8" or "int4" rounds the linear weights (see `quantize`) and, where the model is
            Llama-shaped, hastens its decode steps (see `hasten`); `Source.note` says both. "none" leaves it alone.
        parallel: keep this process's share of the model alone, on its device of this mesh (see `share` and `line` in
            `sinks.models.parallel`); `device` then names the type of the mesh's devices.
        progress: told about downloaded bytes; None draws a bar when standard error is a terminal.

    Raises:
        UnknownName: nothing has this name.
        UnsafeCheckpoint: it is a pickle, or needs code while `trust_remote_code` is off.
        UnsupportedModel: it is no causal language model, one that transformers does not know, or one that cannot be
            quantised or shared.
        FetchError: it could not be downloaded; the message says what to do without a network.
        ChecksumError: what was downloaded is not what was asked for.
        AssetError: it is damaged or incomplete, its terms are not accepted, or the cache folder cannot be written.
        InvalidInput: no such dtype, device or quantisation, or not together; or the processes do not divide the model.
    """
    element, place = element_type(dtype), placement(device)
    check_quant(quant, place, element)
    if parallel is not None:
        check_parallel(parallel, place, quant)
    with reporting(progress) as report:
        folder, source = _find(name, trust_remote_code, accept_terms, report)
    check_config(folder, trust_remote_code)
    if source.note and element != torch.float32:
        source = replace(source, note=f"{source.note}, then rounded to {str(element).removeprefix('torch.')}")
    with quiet():
        model, missing = read_model(transformers.AutoModelForCausalLM, folder, element, trust_remote_code)
        refuse_missing(folder, missing)
        tokenizer = read_tokenizer(folder, trust_remote_code)
    model.eval()
    if parallel is not None:
        note = "; ".join(filter(None, (source.note, f"shared between {parallel.size()} processes")))
        return Loaded(share(model, parallel), tokenizer, replace(source, note=note))
    cast(torch.nn.Module, model).to(place)  # the annotation of transformers' own `to` lost its `self`
    return quantized(Loaded(model, tokenizer, source), quant)


def quantized(loaded: Loaded, quant: str) -> Loaded:
    """The same model, changed: linear weights rounded, decode steps lean where it is Llama-shaped; the source says so.

    Raises what `quantize` raises.
    """
    known = check_quant(quant, loaded.model.device, loaded.model.dtype)
    if known == "none":
        return loaded
    model = quantize(loaded.model, known)
    if why_not(model) is None:
        hasten(model)
    notes = [note for note in (loaded.source.note, NOTES[known], steps_of(model)) if note]
    return Loaded(model, loaded.tokenizer, replace(loaded.source, note="; ".join(notes)))


def prepare(
    name: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    accept_terms: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Fetch and convert a model without loading it, and return its folder. Does nothing the second time.

    Raises what `load` raises, but for a device, a data type and weights, which are not looked at.
    """
    return look_up(name, trust_remote_code=trust_remote_code, accept_terms=accept_terms, progress=progress)[0]


def look_up(
    name: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    accept_terms: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, Source]:
    """What `prepare` gives, and what `load` will say of where the model comes from. Raises what `prepare` raises."""
    with reporting(progress) as report:
        folder, source = _find(name, trust_remote_code, accept_terms, report)
    check_config(folder, trust_remote_code)
    return folder, source


def _find(
    name: str | Path | None, trust_remote_code: bool, accept_terms: bool, report: Progress
) -> tuple[Path, Source]:
    """The folder to load from, and what to say about it."""
    text = DEFAULT_MODEL if name is None else str(name)
    if asset := find_model(text):
        return _from_gguf(_built_in(asset, accept_terms, report), asset.name, "built-in", asset.licence)
    path = expanded(text)
    if path.is_file():
        return _from_gguf(_file(path, report), str(path), "gguf")
    if text and path.is_dir():
        gguf = gguf_inside(path)
        if gguf is not None:
            return _from_gguf(_file(gguf, report), str(gguf), "gguf")
        return path, Source(str(path), "folder", licence_of(path), "", "")
    if not _HUB_ID.fullmatch(text) or is_pickle(text):
        raise UnknownName(
            f"no built-in model, folder or file is called {text!r}{suggestion(text, model_names('causal'))}: "
            f"built-in models are {', '.join(asset.name for asset in models_of('causal'))} "
            f"(and {', '.join(asset.name for asset in models_of('encoder', 'vision'))}, which do not stream); "
            f"a Hub model is written owner/name"
        )
    folder = snapshot(text, trust_remote_code)
    return folder, Source(text, "hub", licence_of(folder), folder.name, "")


def _built_in(asset: ModelAsset, accept_terms: bool, report: Progress) -> Converted:
    if asset.kind != "causal":
        raise UnsupportedModel(
            f"{asset.name} ({asset.title}) is no causal language model: "
            f"load it with sinks.models.encoders.load_encoder({asset.name!r})"
        )
    sha256 = asset.payload.sha256
    # A converted model needs no GGUF, and its terms were accepted when it was fetched.
    return converted(sha256) or convert(fetch_model(asset, accept_terms=accept_terms, progress=report), sha256, report)


def _file(path: Path, report: Progress) -> Converted:
    if is_pickle(path.name):
        refuse_pickle(str(path), [path.name])
    if path.suffix.lower() == ".safetensors":
        raise InvalidInput(f"{path} is one file of a model: give the folder that holds it and its config.json")
    return convert(path, digest(path), report)


def _from_gguf(
    found: Converted, name: str, kind: Literal["built-in", "gguf"], licence: str | None = None
) -> tuple[Path, Source]:
    note = "" if found.quantization == "F32" else f"{found.quantization} widened to float32"
    return found.folder, Source(name, kind, licence or found.licence, found.sha256, note)
