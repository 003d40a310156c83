"""Puts packed layers in the place of a model's linear ones, or says why it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from sinks.errors import InvalidInput, UnsupportedModel
from sinks.models.attach import attachment_of
from sinks.models.weights.packed import GROUP, Int4Linear, Int4Rows, Int8Linear, PackedLinear

Quant = Literal["none", "int8", "int4"]

QUANTS: tuple[Quant, ...] = get_args(Quant)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NOTES: dict[Quant, str] = {
    "int8": "linear weights int8 by row",
    "int4": f"linear weights int4 in groups of {GROUP}, output head int8 by row",
}
"""What is said of a model beside every number measured on it."""


def check_quant(quant: str, device: torch.device, dtype: torch.dtype) -> Quant:
    """The quantisation of this name, if it can be had on this device with activations of this element type.

    Raises:
        InvalidInput: there is no such quantisation, or not there.
    """
    if quant not in QUANTS:
        raise InvalidInput(f"quant={quant!r} is unknown: choose one of {', '.join(QUANTS)}")
    if quant != "none" and device.type not in ("cpu", "cuda"):
        raise InvalidInput(
            f"quant={quant!r} on {device}: its kernels are for CPUs and CUDA GPUs; use quant='none', or device='cpu'"
        )
    if quant != "none" and dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise InvalidInput(
            f"quant={quant!r} with {name}: its kernels take 8 bits of an activation; use dtype='float32'"
        )
    return quant


def quantize(model: PreTrainedModel, quant: Quant) -> PreTrainedModel:
    """Replace every linear layer of `model`, which is changed and returned; embeddings and norms stay as they are.

    With int4, the output head gets int8: a row of it is a token, and half a step of int4 costs 5 % of perplexity
    there (SmolLM2-135M) where everything else together costs less than can be measured.

    Raises:
        InvalidInput: on a device without kernels, in float64, or attached or quantised already.
        UnsupportedModel: it has weights other than those of linear layers, embeddings and norms, or rows that do not
            divide into groups. Nothing has been changed then.
    """
    check_quant(quant, model.device, model.dtype)
    if quant == "none":
        return model
    _check_layers(model, quant)
    head: Any = model.get_output_embeddings()
    four: type[PackedLinear] = Int4Rows if model.device.type == "cuda" else Int4Linear
    for owner, name, layer in list(_linears(model)):
        kind = four if quant == "int4" and layer is not head else Int8Linear
        setattr(owner, name, kind.of(layer.weight, layer.bias))
    return model


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether `quantize` changed this model."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for owner in model.modules():
        for name, layer in owner.named_children():
            if type(layer) is nn.Linear:
                yield owner, name, layer


def _check_layers(model: PreTrainedModel, quant: Quant) -> None:
    if attachment_of(model) is not None:
        raise InvalidInput("this model is attached, and attaching looks at its layers: quantise first, then attach")
    if is_quantized(model):
        raise InvalidInput("this model is quantised already: load it again to quantise it otherwise")
    model_type = model.config.model_type
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding):
            continue
        if any(weight.ndim > 1 for weight in module.parameters(recurse=False)):
            kind = type(module).__name__
            raise UnsupportedModel(
                f"{name} of this {model_type} is a {kind}, which cannot be quantised: use quant='none'"
            )
    group = GROUP if quant == "int4" else 1
    head: Any = model.get_output_embeddings()
    for _, name, layer in _linears(model):
        if layer is not head and layer.in_features % group:
            raise UnsupportedModel(
                f"{name} of this {model_type} has rows of {layer.in_features} weights, which are no whole groups of "
                f"{group}: use quant='int8'"
            )
