"""`share(model, mesh)`: a Llama-shaped model divided among processes, its weights cut by PyTorch's own DTensor.

Every process holds its share of the query and key heads and of the MLP's inner width, and so its share of the keys and
values that a cache keeps; two sums over all processes a layer make the rest alike everywhere (Megatron-LM, arXiv
1909.08053). The vocabulary is divided too, in the input table and the output head. A logit is computed by one process
and gathered by all, so that all see the same bits, and all choose the same token as long as they draw the same random
numbers, which equal sessions do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from sinks.errors import InvalidInput, UnsupportedModel, UnsupportedOption
from sinks.models.families import base_of
from sinks.models.parallel.layers import ColumnLinear, RowLinear, cut, device_of, divide, join

SHAREABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks are q, k, v and o around the heads, gate, up and down around the inner width."""

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")
HEAD_NORMS = {"q_norm", "k_norm"}
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Counts of a config of which every process gets an equal part."""


@dataclass(frozen=True)
class Share:
    """Which share of a model a process holds: number `rank`, from 0, of `of`."""

    rank: int
    of: int


def share(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Keep this process's share of `model` on its device of `mesh`, and return the model; there is no way back.

    Every process of `mesh`, which has one dimension, calls this with the same weights: each takes its part of what it
    holds, and nothing is sent. What is not divided (the norms) moves to the device whole. Before or after `attach`;
    a `SinkCache` made afterwards keeps the share's own heads. From then on the processes must run the same passes.

    Raises UnsupportedModel, with the reason, for a model that is not Llama-shaped; InvalidInput where the processes do
    not divide its heads or its inner width, or the mesh is no line; UnsupportedOption for a model that is hastened or
    quantised.
    """
    _check(model, mesh)
    base: Any = base_of(model)
    head: Any = model.get_output_embeddings()
    tied = head.weight is base.embed_tokens.weight
    for layer in base.layers:
        for kind, names in ((ColumnLinear, COLUMNS), (RowLinear, ROWS)):
            for name in names:
                divide(layer.get_submodule(name), mesh, kind)
        for name in HEAD_NORMS & dict(layer.self_attn.named_children()).keys():
            join(layer.get_submodule(f"self_attn.{name}"), mesh)
    for table in (base.embed_tokens, head):
        table.weight = cut(table.weight, mesh, Shard(0))
    vocabulary: list[tuple[nn.Module, dict[str, ParallelStyle]]] = [
        (base, {"embed_tokens": RowwiseParallel(input_layouts=Replicate())}),
        (model, {"lm_head": ColwiseParallel(output_layouts=Replicate())}),
    ]
    for owner, plan in vocabulary:
        parallelize_module(owner, mesh, plan)  # the weights are cut already
    if tied:
        head.weight = base.embed_tokens.weight
    _move_the_rest(model, device_of(mesh))
    return model


def check_parallel(mesh: DeviceMesh, device: torch.device, quant: str) -> None:
    """Raises InvalidInput where what `load` was given does not go together with sharing."""
    if device.type != mesh.device_type or device.index is not None:
        raise InvalidInput(
            f"device='{device}' and a mesh of {mesh.device_type}: a shared model goes where its processes are, so give "
            f"device='{mesh.device_type}'"
        )
    if quant != "none":
        raise InvalidInput(f"quant={quant!r} and parallel=: weights are shared as they are; give one of the two")


def share_of(model: nn.Module) -> Share | None:
    """The share that this process holds of a model, or None if it is whole."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            return Share(parameter.device_mesh.get_local_rank(), parameter.device_mesh.size())
    return None


def refuse_shared(model: nn.Module, what: str) -> None:
    """Raises UnsupportedOption, saying that `what` takes a whole model, where this process holds a share of it."""
    held = share_of(model)
    if held is not None:
        raise UnsupportedOption(
            f"{what} takes a whole model, and this process holds share {held.rank} of {held.of}: load it unshared"
        )


def _check(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    base: Any = base_of(model)
    config = base.config
    if mesh.ndim != 1:
        raise InvalidInput(f"a mesh of shape {tuple(mesh.shape)}: a model is shared along one line of processes")
    if share_of(model) is not None:
        raise InvalidInput("this model is shared already: load it anew to share it otherwise")
    if config.model_type not in SHAREABLE:
        raise UnsupportedModel(f"{config.model_type} cannot be shared: only {', '.join(SHAREABLE)} are taken apart")
    if model.get_output_embeddings() is None:
        raise UnsupportedModel("this model has no output head: share a causal language model")
    for name in DIVIDED:
        count = getattr(config, name)
        if count % mesh.size():
            raise InvalidInput(
                f"{mesh.size()} processes do not divide {name} = {count} of this {config.model_type}: take a number "
                "that does"
            )
    for layer in base.layers:
        for name in (*COLUMNS, *ROWS):
            if not isinstance(layer.get_submodule(name), nn.Linear):
                raise UnsupportedOption(f"this model's {name} is quantised: share it with weights as they are")
    if "forward" in vars(model):  # an instance's own forward, which `hasten` gives it, holds the weights themselves
        raise UnsupportedOption("this model is hastened: unhasten(model) before it is shared")


def _move_the_rest(model: nn.Module, device: torch.device) -> None:
    """What is not divided goes to the device too; `model.to` would touch the divided weights."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
