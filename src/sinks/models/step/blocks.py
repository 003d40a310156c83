"""The weights of a Llama-shaped model as a decode step meets them: projections of one input fused into one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinks.errors import UnsupportedModel
from sinks.models.families import base_of
from sinks.models.parallel.share import share_of
from sinks.models.weights.packed import PackedLinear

Layer = Callable[[Tensor], Tensor]

SHAPED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Model types whose blocks are: norm, attention, add; norm, gated MLP, add; Gemma has norms before adding, too."""

ACTIVATIONS: dict[str, Layer] = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}

ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})


@dataclass(frozen=True, eq=False)
class StepBlock:
    """One block: `qkv` and `gate_up` give the outputs of their projections side by side.

    Head norms only in Qwen 3 and Gemma; what comes after attention and MLP is a norm in Gemma and nothing elsewhere.
    """

    before_attention: Layer
    qkv: Layer
    head_norms: tuple[Layer, Layer] | None
    out: Layer
    after_attention: Layer
    before_mlp: Layer
    gate_up: Layer
    activation: Layer
    down: Layer
    after_mlp: Layer


@dataclass(frozen=True, eq=False)
class StepModel:
    """What a decode step needs of a model. `heads` are query and key heads; `scale` multiplies scores."""

    embed: Layer
    blocks: tuple[StepBlock, ...]
    norm: Layer
    head: Layer
    heads: tuple[int, int]
    head_dim: int
    scale: float


def why_not(model: PreTrainedModel) -> str | None:
    """What keeps this model from a lean decode step, as a sentence; None if nothing does."""
    if share_of(model) is not None:
        return "it is shared between processes"
    if len({weight.device for weight in model.parameters()}) > 1:
        return "its weights are on several devices"
    held = vars(model).get("forward")
    if held is not None and not hasattr(held, "lean"):
        return "something else has taken the place of its forward"
    base: Any = base_of(model)
    config = base.config
    if config.model_type not in SHAPED:
        return f"{config.model_type} is not among {', '.join(SHAPED)}"
    if base is model or model.get_output_embeddings() is None:
        return "it has no output head"
    if activation_of(config) not in ACTIVATIONS:
        return f"its activation is {activation_of(config)}, none of {', '.join(ACTIVATIONS)}"
    if any(getattr(config, f"{what}_logit_softcapping", None) for what in ("attn", "final")):
        return "it caps its scores or logits"
    for block in base.layers:
        names = {name for name, _ in block.self_attn.named_children()}
        if names not in ATTENTION:
            return f"its attention is made of {', '.join(sorted(names))}"
    return None


def activation_of(config: Any) -> str | None:
    """The activation of a model's MLP, by transformers' name."""
    return getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)


def step_model(model: PreTrainedModel) -> StepModel:
    """Gather a model's weights, sharing their memory. Raises UnsupportedModel with the reason."""
    if reason := why_not(model):
        raise UnsupportedModel(f"this model has no lean decode step: {reason}")
    base: Any = base_of(model)
    attention = base.layers[0].self_attn
    query_heads, key_heads = base.config.num_attention_heads, base.config.num_key_value_heads
    head: Any = model.get_output_embeddings()
    return StepModel(
        embed=base.embed_tokens,
        blocks=tuple(_block(layer, ACTIVATIONS[str(activation_of(base.config))]) for layer in base.layers),
        norm=_norm(base.norm),
        head=_product(head),
        heads=(query_heads, key_heads),
        head_dim=attention.head_dim,
        scale=attention.scaling,
    )


def _block(layer: Any, activation: Layer) -> StepBlock:
    attention, mlp = layer.self_attn, layer.mlp
    four = hasattr(layer, "pre_feedforward_layernorm")
    before_mlp = layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm
    has_norms = hasattr(attention, "q_norm")
    return StepBlock(
        before_attention=_norm(layer.input_layernorm),
        qkv=joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=(_norm(attention.q_norm), _norm(attention.k_norm)) if has_norms else None,
        out=_product(attention.o_proj),
        after_attention=_norm(layer.post_attention_layernorm) if four else _as_it_is,
        before_mlp=_norm(before_mlp),
        gate_up=joined([mlp.gate_proj, mlp.up_proj]),
        activation=activation,
        down=_product(mlp.down_proj),
        after_mlp=_norm(layer.post_feedforward_layernorm) if four else _as_it_is,
    )


def joined(parts: Sequence[Any]) -> Layer:
    """Several projections of one input as one product, their outputs side by side."""
    kinds = {type(part) for part in parts}
    made: Any = None
    if kinds == {nn.Linear}:
        return _fused(parts)
    if len(kinds) == 1 and issubclass(type(parts[0]), PackedLinear):
        made = type(parts[0]).beside(parts)
    return _product(made) if made is not None else partial(_apart, [_product(part) for part in parts])


def _fused(parts: Sequence[nn.Linear]) -> Layer:
    """The parts' weights become views of the joined one, so that nothing is held twice and edits in place are seen."""
    weight = torch.cat([part.weight.detach() for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
    begin = 0
    for part in parts:
        rows = slice(begin, begin + part.out_features)
        part.weight.data = weight[rows]
        if bias is not None:
            part.bias.data = bias[rows]
        begin = rows.stop
    return partial(F.linear, weight=weight, bias=bias)


def _apart(parts: Sequence[Layer], given: Tensor) -> Tensor:
    return torch.cat([part(given) for part in parts], dim=-1)


def _product(layer: Any) -> Layer:
    """A layer without the machinery of modules."""
    if type(layer) is nn.Linear:
        return partial(F.linear, weight=layer.weight, bias=layer.bias)
    return layer.forward if isinstance(layer, PackedLinear) else layer


def _as_it_is(given: Tensor) -> Tensor:
    return given


def _norm(module: Any) -> Layer:
    """RMSNorm; in float32 written out, otherwise, where the model's own casts matter, the model's own."""
    if module.weight.dtype is not torch.float32 or not hasattr(module, "variance_epsilon"):
        return module
    return partial(_rms_norm, module.weight.detach(), module.variance_epsilon)


def _rms_norm(weight: Float[Tensor, " width"], epsilon: float, given: Tensor) -> Tensor:
    # F.rms_norm takes twice as long for one row on a CPU (torch 2.13).
    return weight * (given * torch.rsqrt(given.square().mean(dim=-1, keepdim=True) + epsilon))
