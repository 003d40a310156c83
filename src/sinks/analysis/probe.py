"""`probe`: shows a model's attention and residual stream to functions, for as long as a `with` block lasts.

Statistics come out of the attention pass itself, block by block, and residuals through module hooks. What a function
does not keep is gone, so collectors keep running sums and nothing of size T x T exists at any time. Probes stack.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.kernels.lens import Arrival, Lens, Sight
from sinks.kernels.summary.summary import Summary
from sinks.models.attach import attachment_of
from sinks.models.families import base_of
from sinks.models.observe import blocks_of, observe
from sinks.reading.memory import trim_heap

LONG = 16_384
"""Tokens of a pass on a CPU from which on what each part of a block has freed is returned to the system at once."""


@dataclass(frozen=True, eq=False)
class Residual:
    """The residual stream at one depth: 0 is what enters block 0, b + 1 is what block b puts out.

    The last depth is before the final norm, which is where massive activations vanish.
    """

    depth: int
    hidden: Float[Tensor, "batch columns width"]


@contextmanager
def probe(
    model: PreTrainedModel,
    *,
    see: Callable[[Sight], None] | None = None,
    sum_up: Callable[[Summary], None] | None = None,
    arrive: Callable[[Arrival], None] | None = None,
    residual: Callable[[Residual], None] | None = None,
) -> Iterator[None]:
    """Call `see` for every block of attention, `arrive` for every layer's new heads, `residual` for every depth.

    Works for every forward pass inside the block: dense, with a cache of transformers in chunks, or with a `SinkCache`
    (the model attached), on any device. `see` and `arrive` have attention computed block by block; `residual` alone
    leaves it as it is. On a GPU a function that is given as `sum_up` beside `see` is called in its place, once for a
    layer, where `how_observed` (models/observe.py) says so: dense causal passes, if every probe on the pass has one.

    Raises UnsupportedModel or UnsupportedOption where the model or a pass cannot be observed, InvalidInput for a
    `sum_up` without `see`.
    """
    with ExitStack() as stack:
        if see is not None or sum_up is not None or arrive is not None:
            stack.enter_context(observe(model, Lens(see=see, sum_up=sum_up, arrive=arrive)))
        if residual is not None:
            for handle in _hook_blocks(model, residual):
                stack.callback(handle.remove)
        yield


@torch.inference_mode()
def read(model: PreTrainedModel, inputs: Tensor | Mapping[str, Tensor]) -> None:
    """One dense forward pass for the sake of who watches it: token ids `[texts, tokens]`, or named inputs.

    No logits are made. A model that computes its attention itself is read through a `SinkCache` that lets nothing go,
    which is the same attention; attach it first.
    """
    base = base_of(model)
    named = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    named = {name: value.to(model.device) for name, value in named.items()}
    with _trimming(model, max(value.numel() for value in named.values())):
        _read(model, base, named)


def _read(model: PreTrainedModel, base: Any, named: dict[str, Tensor]) -> None:
    attachment = attachment_of(model)
    if attachment is not None and attachment.scheme.family.route == "projections":
        cache = SinkCache.for_model(model, sinks=0, window=named["input_ids"].shape[1])
        base(**named, past_key_values=cache, use_cache=True)
    elif "use_cache" in inspect.signature(base.forward).parameters:
        base(**named, use_cache=False)
    else:
        base(**named)


@contextmanager
def _trimming(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Keep the peak of a long pass near what is alive: 180 MB of freed scores lay under the MLP at 32,768 tokens."""
    with ExitStack() as stack:
        if model.device.type == "cpu" and tokens >= LONG:
            for block in blocks_of(model):
                for part in block.children():
                    stack.callback(part.register_forward_hook(_trim).remove)
        yield


def _trim(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    trim_heap()


def _hook_blocks(model: PreTrainedModel, residual: Callable[[Residual], None]) -> Iterator[Any]:
    blocks = blocks_of(model)
    yield blocks[0].register_forward_pre_hook(_entering(residual), with_kwargs=True)
    for index, block in enumerate(blocks):
        yield block.register_forward_hook(_leaving(residual, index + 1))


def _entering(residual: Callable[[Residual], None]) -> Callable[..., None]:
    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        residual(Residual(0, args[0] if args else kwargs["hidden_states"]))

    return enter


def _leaving(residual: Callable[[Residual], None], depth: int) -> Callable[..., None]:
    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        residual(Residual(depth, output if isinstance(output, Tensor) else output[0]))

    return leave
