"""Tiny random models of every family, for tests that need the true module tree of transformers and no download.

``build("gemma2", layers=3)`` gives a float64 model in eval mode whose weights are all random: norms, biases, learned
sink logits and router weights too, because a mistake hides wherever a parameter is 0 or 1. Query and key projections
are large enough that attention is far from uniform.

transformers computes norms, router softmaxes and eager attention softmaxes in float32 even when the model is float64.
That would hide differences below 1e-7, so ``build`` gives norms and routers forwards that stay in float64
(`_doubled`), and ``exactly()`` does the same to everything called inside it, rotary angles included. The attention
code under test is never run inside ``exactly()``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.families.cases import CASES, VOCABULARY


class _Wide(TorchFunctionMode):
    """Calls that ask for float32 get float64: `.float()`, `.to(float32)`, `softmax(dtype=float32)` and their like."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Inside, transformers' own code computes in float64 throughout. For references only."""
    with _Wide():
        yield


@functools.cache
def _doubled(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Wide():
            return cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _is_pointwise(module: nn.Module) -> bool:
    """A norm, or a mixture of experts or its router: modules with float32 inside and no attention in them."""
    return type(module).__name__.lower().endswith(("norm", "router", "gating", "gate", "moeblock", "moe", "experts"))


def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    heavy = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "Wqkv", "q_b_proj", "kv_b_proj", "kv_a_proj")
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        leaf = name.rsplit(".", 1)[-1]
        module = name.rsplit(".", 2)[-2] if "." in name else ""
        if leaf == "sinks":
            value = noise
        elif "bias" in leaf:
            value = 0.3 * noise
        elif parameter.ndim == 1:  # a norm weight, whether it counts from 0 (gemma) or from 1
            value = parameter.detach().double() + 0.3 * noise
        elif "embed" in name or "wte" in name:
            value = noise
        elif "norm" in module:  # per-head norms (cohere, stablelm)
            value = parameter.detach().double() + 0.3 * noise
        else:
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else min(parameter.shape[-2:])
            value = noise * (1.6 if any(word in name for word in heavy) else 1.0) / math.sqrt(fan_in)
        parameter.data = value.to(parameter.dtype)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
            buffer.copy_(0.3 * noise)


def build(
    name: str,
    layers: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of case `name`, in eval mode, without gradients.

    Weights depend on `name`'s configuration and `seed` only, not on `dtype`.
    """
    case = CASES[name]
    options = {**case.options(layers), **overrides}
    config = AutoConfig.for_model(case.model_type, **options)
    # eager experts: the grouped matrix products of the default do not exist in float64
    implementations = {"attn_implementation": attention or case.attention, "experts_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **implementations)
    model = model.to(torch.float64)
    _randomise(model, torch.Generator().manual_seed(1000 + seed))
    if dtype is torch.float64:
        for module in model.modules():
            if _is_pointwise(module):
                module.__class__ = _doubled(type(module))
    else:
        model = model.to(dtype)
        _restore_frequencies(model)
    return model.eval().requires_grad_(False)


def _restore_frequencies(model: PreTrainedModel) -> None:
    """`model.to(bfloat16)` rounds `inv_freq`; a model loaded with `from_pretrained(dtype=)` keeps it in float32."""
    fresh = type(model)(copy.deepcopy(model.config))
    buffers = dict(fresh.named_buffers())
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            buffer.data = buffers[name].data


def tokens(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random token ids, int64[batch, length], all different from their neighbours often enough to matter."""
    generator = torch.Generator().manual_seed(7_000 + seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)
