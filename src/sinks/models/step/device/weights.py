"""What a step on a GPU reads of a model: its own weights, projections of one input side by side in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinks.errors import UnsupportedModel
from sinks.kernels.device.language import why_no_triton
from sinks.kernels.device.step.launch import HEAD_DIMS
from sinks.models.families import base_of
from sinks.models.step.blocks import activation_of, why_not
from sinks.models.step.device.linear import Product
from sinks.models.weights.packed import Int4Rows, Int8Linear

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm by itself: its weight counts from `offset`."""

    gain: Tensor
    epsilon: float
    offset: float


@dataclass(frozen=True, eq=False)
class DeviceBlock:
    """One block. Norms behind attention and MLP, before the residual, only in Gemma; head norms in Qwen 3 and Gemma."""

    qkv: Product
    head_norms: tuple[Norm, Norm] | None
    out: Product
    after_attention: Norm | None
    gate_up: Product
    down: Product
    after_mlp: Norm | None
    scale: float


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """A whole model. `factor` multiplies embeddings; `heads` are query and key heads."""

    embed: Tensor
    factor: float
    blocks: tuple[DeviceBlock, ...]
    head: Product
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype


def why_no_device_step(model: PreTrainedModel) -> str | None:
    """What keeps this model from a decode step in one CUDA graph, as a sentence; None if nothing does."""
    base: Any = base_of(model)
    if reason := why_not(model):
        return reason
    head_dim = base.layers[0].self_attn.head_dim
    if head_dim not in HEAD_DIMS:
        return f"its heads have {head_dim} dimensions, not one of {', '.join(map(str, HEAD_DIMS))}"
    if model.dtype not in DTYPES:
        return f"its kernels are not for {str(model.dtype).removeprefix('torch.')}"
    kinds = {type(part) for block in base.layers for part in _linears(block)} | {type(model.get_output_embeddings())}
    if others := kinds - {nn.Linear, Int4Rows, Int8Linear}:
        return f"its layers are {', '.join(sorted(kind.__name__ for kind in others))}"
    return why_no_triton(model.device)


def device_weights(model: PreTrainedModel) -> DeviceWeights:
    """Gather a model's weights, sharing their memory. Raises UnsupportedModel with the reason."""
    if reason := why_no_device_step(model):
        raise UnsupportedModel(f"this model has no decode step of its own on a GPU: {reason}")
    base: Any = base_of(model)
    embed, head = base.embed_tokens, [model.get_output_embeddings()]
    factor = getattr(embed, "embed_scale", None)
    return DeviceWeights(
        embed=embed.weight.detach(),
        factor=1.0 if factor is None else float(torch.as_tensor(factor).to(model.dtype)),
        blocks=tuple(_block(layer, activation_of(base.config) != "silu", model.dtype) for layer in base.layers),
        head=_product(head, norm_of(base.norm), model.dtype),
        heads=(base.config.num_attention_heads, base.config.num_key_value_heads),
        head_dim=base.layers[0].self_attn.head_dim,
        dtype=model.dtype,
    )


def _linears(block: Any) -> list[Any]:
    attention, mlp = block.self_attn, block.mlp
    inward = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    return [*inward, attention.o_proj, mlp.down_proj]


def _block(layer: Any, gelu: bool, dtype: torch.dtype) -> DeviceBlock:
    attention, mlp = layer.self_attn, layer.mlp
    four = hasattr(layer, "pre_feedforward_layernorm")
    head_norms = (norm_of(attention.q_norm), norm_of(attention.k_norm)) if hasattr(attention, "q_norm") else None
    before_mlp = norm_of(layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm)
    return DeviceBlock(
        qkv=_product([attention.q_proj, attention.k_proj, attention.v_proj], norm_of(layer.input_layernorm), dtype),
        head_norms=head_norms,
        out=_product([attention.o_proj], None, dtype, splits=True),
        after_attention=norm_of(layer.post_attention_layernorm) if four else None,
        gate_up=_product([mlp.gate_proj, mlp.up_proj], before_mlp, dtype, gated=True, gelu=gelu),
        down=_product([mlp.down_proj], None, dtype, splits=True),
        after_mlp=norm_of(layer.post_feedforward_layernorm) if four else None,
        scale=attention.scaling,
    )


def norm_of(module: Any) -> Norm:
    """Gemma's norms count their weight from 1."""
    gemma = type(module).__name__.startswith("Gemma")
    epsilon = module.eps if gemma else module.variance_epsilon
    return Norm(module.weight.detach(), epsilon, 1.0 if gemma else 0.0)


def _product(parts: Sequence[Any], norm: Norm | None, dtype: torch.dtype, **more: Any) -> Product:
    if norm is not None:
        more |= {"gain": norm.gain, "epsilon": norm.epsilon, "offset": norm.offset}
    bias = None if all(part.bias is None for part in parts) else beside([part.bias for part in parts])
    kinds = {type(part) for part in parts}
    if kinds == {nn.Linear}:
        return Product(beside([part.weight for part in parts]), dtype, bias=bias, **more)
    name = "values" if kinds == {Int8Linear} else "packed"
    weight, scales = (beside([getattr(part, held) for part in parts]) for held in (name, "scales"))
    return Product(weight, dtype, scales=scales, bias=bias, **more)


def beside(parts: Sequence[Any]) -> Tensor:
    """The parts one below the other. They become views of the result, so that nothing is held twice."""
    first = parts[0].detach()
    end, together = first.data_ptr(), True
    for part in parts:
        together = together and part.is_contiguous() and part.data_ptr() == end
        end += part.numel() * part.element_size()
    sizes = [len(part) for part in parts]
    same = all(part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in parts)
    if together and same:
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride(), first.storage_offset())
    made = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, made.split(sizes), strict=True):
        part.data = view
    return made
