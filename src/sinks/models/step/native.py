"""One decode step as one call: the weights of a quantised model handed to `step.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sinks.errors import UnsupportedOption
from sinks.models.families import base_of
from sinks.models.step.build import library
from sinks.models.step.slots import StepSlots
from sinks.models.weights.packed import GROUP, Int4Linear, Int8Linear, PackedLinear

LANES = 16

_Pointer, _Whole, _Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, _Pointer) for name in ("weights", "scales", "bias")),
        *((name, _Whole) for name in ("rows", "columns", "bits")),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _Pointer) for name in ("before_attention", "before_mlp", "query_norm", "key_norm")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _Whole) for name in ("blocks", "width", "heads", "kv_heads", "head_dim", "inner")),
        *((name, _Real) for name in ("epsilon", "scale")),
        ("block", ctypes.POINTER(_Block)),
        ("norm", _Pointer),
        ("head", _Matrix),
    ]


class _Slots(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(_Pointer)) for name in ("keys", "values")),
        *((name, _Whole) for name in ("capacity", "slot", "filled", "sinks")),
        ("turns", _Pointer),
    ]


def native_reason(model: PreTrainedModel) -> str | None:
    """What keeps a Llama-shaped model from the compiled step; None if nothing does."""
    base: Any = base_of(model)
    config, first = base.config, base.layers[0]
    if config.model_type == "gemma3_text":
        return "it has no kernels for Gemma's norms"
    head: Any = model.get_output_embeddings()
    linears = [head, *(layer for block in base.layers for layer in _linears(block))]
    if not all(isinstance(layer, PackedLinear) for layer in linears):
        return "its weights are not quantised, and reading them takes longer than all else"
    if model.dtype != torch.float32:
        return f"it is compiled for float32 activations, not {str(model.dtype).removeprefix('torch.')}"
    widths = (config.hidden_size, config.intermediate_size, first.self_attn.head_dim)
    if any(width % (2 * LANES) for width in widths):
        return f"its widths {widths} are not all multiples of {2 * LANES}"
    try:
        library()
    except UnsupportedOption as error:
        return str(error)
    return None


def _linears(block: Any) -> list[Any]:
    attention, mlp = block.self_attn, block.mlp
    inward = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    return [*inward, attention.o_proj, mlp.down_proj]


class NativeStep:
    """The compiled step of one model: its weights stay alive here. int4 weights are held a second time, 4.5 bits each.

    Sessions in several threads may share it: steps go one after the other, since each takes all threads anyway.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedOption where `native_reason` has one."""
        if reason := native_reason(model):
            raise UnsupportedOption(f"no compiled step: {reason}")
        base: Any = base_of(model)
        head: Any = model.get_output_embeddings()
        attention = base.layers[0].self_attn
        self._held: list[Tensor] = []
        self._blocks = (_Block * len(base.layers))(*(self._block(layer) for layer in base.layers))
        self._model = _Model(
            blocks=len(base.layers),
            width=base.config.hidden_size,
            heads=base.config.num_attention_heads,
            kv_heads=base.config.num_key_value_heads,
            head_dim=attention.head_dim,
            inner=base.config.intermediate_size,
            epsilon=base.norm.variance_epsilon,
            scale=attention.scaling,
            block=self._blocks,
            norm=self._hold(base.norm.weight),
            head=self._matrix([head]),
        )
        self._vocabulary = head.out_features
        self._library = library()
        self._library.sinks_scratch.restype = ctypes.c_int64
        self._library.sinks_step.restype = None
        self._scratch = torch.empty(0)
        self._free = Lock()

    def __call__(self, states: Float[Tensor, "1 width"], slots: StepSlots) -> Float[Tensor, "1 vocab"]:
        """The logits behind a token whose embedding is `states`; its keys and values are in their slots afterwards."""
        states, turns = states.clone(), slots.turns.contiguous()
        logits = torch.empty(1, self._vocabulary)
        threads, capacity = torch.get_num_threads(), slots.keys[0].shape[2]
        count = len(self._blocks)
        given = _Slots(
            keys=(_Pointer * count)(*(keys.data_ptr() for keys in slots.keys)),
            values=(_Pointer * count)(*(values.data_ptr() for values in slots.values)),
            capacity=capacity,
            slot=slots.slot,
            filled=slots.filled,
            sinks=slots.sinks,
            turns=turns.data_ptr(),
        )
        model, where = ctypes.byref(self._model), ctypes.byref(given)
        needed = self._library.sinks_scratch(model, _Whole(capacity), threads)
        with self._free:
            if self._scratch.numel() < needed:
                self._scratch = torch.empty(needed)
            pointers = (_Pointer(each.data_ptr()) for each in (states, logits, self._scratch))
            self._library.sinks_step(model, where, *pointers, threads)
        return logits

    def _block(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return _Block(
            qkv=self._matrix([attention.q_proj, attention.k_proj, attention.v_proj]),
            out=self._matrix([attention.o_proj]),
            gate_up=self._matrix([mlp.gate_proj, mlp.up_proj]),
            down=self._matrix([mlp.down_proj]),
            before_attention=self._hold(layer.input_layernorm.weight),
            before_mlp=self._hold(layer.post_attention_layernorm.weight),
            query_norm=None if norms[0] is None else self._hold(norms[0].weight),
            key_norm=None if norms[1] is None else self._hold(norms[1].weight),
        )

    def _matrix(self, parts: Sequence[Any]) -> _Matrix:
        """Layers of one input, one below the other."""
        bits = 4 if isinstance(parts[0], Int4Linear) else 8
        made = [rows_of(part) for part in parts]
        weights = made[0][0] if len(made) == 1 else torch.cat([each for each, _ in made])
        scales = torch.cat([each for _, each in made])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return _Matrix(
            weights=self._hold(weights, float32=False),
            scales=self._hold(scales),
            bias=None if bias is None else self._hold(bias),
            rows=len(weights),
            columns=parts[0].in_features,
            bits=bits,
        )

    def _hold(self, tensor: Tensor, float32: bool = True) -> int:
        held = (tensor.detach().float() if float32 else tensor.detach()).contiguous()
        self._held.append(held)
        return held.data_ptr()


def rows_of(layer: Int4Linear | Int8Linear) -> tuple[Tensor, Tensor]:
    """Weights and scales as `step.c` reads them; see `Matrix` there."""
    if isinstance(layer, Int8Linear):
        return layer.values, layer.scales.float()
    scale, centre = layer.scales[:, : layer.out_features].float().permute(2, 1, 0)
    # The kernel's own layout is not ours to read: its products with unit vectors are, and 1/16 of a step away at most.
    q = (layer.weight_widened().unflatten(1, (-1, GROUP)) - centre.unsqueeze(2)) / scale.unsqueeze(2) + 8
    low, high = q.round().byte().split(GROUP // 2, dim=2)
    return (low | high << 4).flatten(1), torch.stack((scale, centre - 8 * scale), dim=2)
