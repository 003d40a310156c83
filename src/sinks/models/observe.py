"""`observe(model, lens)`: lets a lens into the attention of a model, for as long as a `with` block lasts.

Any model of transformers that calls the registered attention function can be observed: causal ones, BERT-like ones,
vision transformers. A forward pass with a `SinkCache` shows the lens the stream's own blocks; any other pass is
attended block by block, so that neither the scores nor the mask are ever T x T, or, on a GPU and where every lens takes
summaries, by a kernel that sums up each layer while it attends. `how_observed` says which, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from sinks.errors import CacheError, UnsupportedModel, UnsupportedOption
from sinks.kernels.lens import Arrival, Lens
from sinks.kernels.scoring import Scoring
from sinks.kernels.summary.attend import attend_summarised, refuse
from sinks.kernels.written import Meeting, attend_dense
from sinks.models.attach import (
    LENSES,
    OBSERVED,
    attachment_of,
    check_options,
    scoring_options,
    stream_attention,
    streaming,
)
from sinks.models.families import base_of
from sinks.models.parallel.share import refuse_shared

SUMMARISED_ON = ("cuda",)
"""Kinds of devices on which a pass may be summed up."""


@dataclass(frozen=True, eq=False)
class Observed:
    """A forward pass of an observed model: its lenses, and the block that each of its modules belongs to."""

    lenses: list[Lens]
    block: dict[nn.Module, int]


@dataclass(frozen=True, eq=False)
class LazyMask:
    """A mask as transformers describes it, not yet written out."""

    description: dict[str, Any]

    def visible(self, begin: int, end: int) -> Tensor:
        """The rows of queries `begin` to `end`, `[batch | 1, 1, end - begin, keys]`."""
        here = {"q_length": end - begin, "q_offset": int(self.description["q_offset"]) + begin}
        never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**(self.description | here | never))

    @property
    def padding(self) -> Tensor | None:
        """The 2-D padding mask `[batch, columns]`, if the model was given one."""
        return self.description.get("attention_mask")

    @property
    def first_key(self) -> int:
        """The column of the first key."""
        return int(self.description["kv_offset"])

    @property
    def is_causal(self) -> bool:
        """Whether every query sees its own key and all before it, and nothing else."""
        plain = self.description["mask_function"] is causal_mask_function and self.padding is None
        return plain and int(self.description["q_offset"]) == 0 == self.first_key


@dataclass(frozen=True)
class Way:
    """How one layer's attention is observed: summed up by a kernel while it attends, or block by block; and why."""

    summarised: bool
    because: str


_NOW: ContextVar[Observed | None] = ContextVar("sinks_observed_pass", default=None)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a transformer, first to last. Raises UnsupportedModel where there is no such list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in base_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedModel(f"{model.config.model_type} has no list of {count} blocks, so there is nothing to observe")


@contextmanager
def observe(model: PreTrainedModel, lens: Lens) -> Iterator[None]:
    """Let `lens` see, and bend, the attention of every forward pass inside the block. Lenses stack.

    Raises UnsupportedModel if the model does not ask a registered function for its attention, UnsupportedOption for a
    pass that cannot be observed, with the way that can, and for a model that is shared between processes.
    """
    refuse_shared(model, "observation")
    base = base_of(model)
    if base in LENSES:
        LENSES[base].append(lens)
        try:
            yield
        finally:
            LENSES[base].remove(lens)
        return
    with ExitStack() as undo:
        LENSES[base] = [lens]
        undo.callback(LENSES.pop, base)
        _install(model, base, undo)
        yield


def _install(model: PreTrainedModel, base: PreTrainedModel, undo: ExitStack) -> None:
    attachment = attachment_of(model)
    if attachment is not None and attachment.scheme.family.route == "projections":
        return  # the pass itself carries the lenses: see models/attach.py
    AttentionInterface.register(OBSERVED, _attention)
    AttentionMaskInterface.register(OBSERVED, _mask)
    stock = str(model.config._attn_implementation)
    model.set_attn_implementation(OBSERVED)
    undo.callback(model.set_attn_implementation, stock)
    if base.config._attn_implementation != OBSERVED:
        raise UnsupportedModel(
            f"{model.config.model_type} does not ask a registered function for its attention, so it cannot be "
            "observed: attach(model) and read it through a SinkCache, if it can stream"
        )
    block = {module: index for index, part in enumerate(blocks_of(model)) for module in part.modules()}
    undo.callback(base.register_forward_pre_hook(_beginner(Observed(LENSES[base], block))).remove)
    undo.callback(base.register_forward_hook(_end, always_call=True).remove)


def how_observed(
    lenses: Sequence[Lens], query: Tensor, key: Tensor, value: Tensor, *, scoring: Scoring, causal: bool
) -> Way:
    """How `observe` goes about one layer's attention, before anything is computed; nothing else is tried after it.

    `causal` says that each query sees exactly the keys up to its own: a dense causal pass without pads.
    """
    if any(lens.needs_blocks for lens in lenses):
        return Way(False, "a lens bends or adds something, or takes no summaries")
    if torch.is_grad_enabled() and any(heads.requires_grad for heads in (query, key, value)):
        return Way(False, "gradients are wanted, and summaries are made without")
    if query.device.type not in SUMMARISED_ON:
        return Way(False, f"on {query.device.type} there is no kernel that sums up")
    if not causal or key.shape[2] != query.shape[2]:
        return Way(False, "attention is not dense and causal: it has a window, pads, a past or a mask of its own")
    try:
        refuse(query, value, scoring)
    except UnsupportedOption as reason:
        return Way(False, str(reason))
    return Way(True, "dense causal attention, and every lens takes summaries")


def _beginner(observed: Observed) -> Callable[[Any, Any], None]:
    def begin(base: Any, args: Any) -> None:
        if base.config._attn_implementation != OBSERVED:
            raise CacheError("the attention implementation changed under observation: attach(model) before observing")
        _NOW.set(observed)

    return begin


def _end(base: nn.Module, args: Any, output: Any) -> None:
    _NOW.set(None)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The function registered with transformers: [batch, heads, columns, head_dim] in, columns before heads out."""
    now = _NOW.get()
    if now is None:
        raise CacheError("attention was asked for outside of a forward pass of the observed model")
    if streaming() is not None:
        return stream_attention(module, query, key, value, **kwargs)
    check_options(kwargs, "an observed pass")
    layer, scoring = now.block[module], Scoring(**scoring_options(query, kwargs))
    causal = _is_causal(module, attention_mask, kwargs)
    if how_observed(now.lenses, query, key, value, scoring=scoring, causal=causal).summarised:
        out = _summarised((query, key, value), layer, scoring, now.lenses)
    else:
        meeting = _meeting(module, query, key, attention_mask, kwargs)
        out = attend_dense(query, key, value, layer=layer, meeting=meeting, scoring=scoring, lenses=now.lenses)
    return out.transpose(1, 2).contiguous(), None


def _summarised(heads: tuple[Tensor, Tensor, Tensor], layer: int, scoring: Scoring, lenses: Sequence[Lens]) -> Tensor:
    query, key, value = heads
    positions = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    for lens in lenses:
        if lens.arrive is not None:
            lens.arrive(Arrival(layer, positions, query, key, value))
    out, summary = attend_summarised(query, key, value, layer=layer, scoring=scoring)
    for lens in lenses:
        if lens.sum_up is not None:
            lens.sum_up(summary)
    return out


def _is_causal(module: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a layer's attention is dense and causal, as far as its mask says."""
    if isinstance(mask, LazyMask):
        return mask.is_causal
    causal = kwargs.get("is_causal")
    return mask is None and bool(getattr(module, "is_causal", False) if causal is None else causal)


def _mask(**description: Any) -> LazyMask | None:
    """The mask function registered with transformers: keeps the description for the blocks."""
    return None if streaming() is not None else LazyMask(description)


def _meeting(module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Meeting:
    columns, keys, device = query.shape[2], key.shape[2], query.device
    if isinstance(mask, LazyMask):
        first = mask.first_key
        positions = _positions(mask.padding, first, keys, device).expand(query.shape[0], -1)
        return Meeting(positions[:, keys - columns :], positions, mask.visible)
    positions = torch.arange(keys, device=device).expand(query.shape[0], -1)
    queries = positions[:, keys - columns :]
    if isinstance(mask, Tensor):
        allowed = mask if mask.dtype is torch.bool else mask == 0
        if mask.dtype is not torch.bool and bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()):
            raise UnsupportedOption("a mask that adds numbers other than 0 and -inf cannot be observed")
        return Meeting(queries, positions, lambda begin, end: allowed[:, :, begin:end, :keys])
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal

    def visible(begin: int, end: int) -> Tensor:
        rows = queries[:1, begin:end, None]
        seen = positions[:1, None, :] <= rows if causal else torch.ones_like(positions[:1, None, :] <= rows)
        return seen.unsqueeze(1)

    return Meeting(queries, positions, visible)


def _positions(padding: Tensor | None, first: int, keys: int, device: torch.device) -> Int[Tensor, "batch keys"]:
    """Position of each key in its row, -1 at a pad."""
    if padding is None:
        return torch.arange(first, first + keys, device=device)[None]
    real = padding.to(device).bool()
    positions = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
    return positions[:, first : first + keys]
