"""Edits of a running model, each undone at the end of its `with` block; and edits of what it is given to read.

Edits stack, and none changes a weight for good. Those of attention are lenses: they work for every pass that can be
observed, a `SinkCache`'s too, and name keys by stream position. Those of the residual stream and of the embeddings
are hooks on modules, which see columns only: they are for passes that read a text from its first token, without pads,
and refuse any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.lens import ADDED, Arrival, Lens, View
from sinks.models.families import base_of
from sinks.models.observe import blocks_of, observe

Numbers = float | Tensor
"""One number for all, or a tensor that broadcasts."""


# The residual stream and the embeddings


@contextmanager
def set_residual(
    model: PreTrainedModel,
    depth: int,
    positions: Sequence[int],
    dims: Sequence[int],
    values: Numbers,
    *,
    how: Literal["set", "add"] = "set",
) -> Iterator[None]:
    """Set some numbers of the residual stream, or add to them, at one depth (0 enters block 0, b + 1 leaves block b).

    `positions` are columns of the pass; `values` broadcast to `[batch, positions, dims]`: 0 takes a massive activation
    away, its mean over other texts keeps it without its content (Sun et al., arXiv 2402.17762, section 4).

    Raises InvalidInput for a depth that is not there, UnsupportedOption for a pass that goes on with a cache or has
    pads.
    """
    blocks = blocks_of(model)
    if not 0 <= depth <= len(blocks):
        raise InvalidInput(f"depth={depth}: this model has depths 0 to {len(blocks)}")

    def edited(hidden: Tensor) -> Tensor:
        where = _columns(positions, hidden.shape[1], "position")[:, None], _columns(dims, hidden.shape[2], "dim")
        new = torch.as_tensor(values, dtype=hidden.dtype, device=hidden.device)
        hidden = hidden.clone()
        hidden[:, *where] = hidden[:, *where] + new if how == "add" else new
        return hidden

    with ExitStack() as undo:
        undo.callback(_only_whole_texts(model).remove)
        if depth == 0:
            undo.callback(blocks[0].register_forward_pre_hook(_on_input(edited), with_kwargs=True).remove)
        else:
            undo.callback(blocks[depth - 1].register_forward_hook(_on_output(edited)).remove)
        yield


@contextmanager
def null_embeddings(model: PreTrainedModel, positions: Sequence[int]) -> Iterator[None]:
    """Embed the tokens in these columns as zero vectors: a token with a place and no content.

    Raises UnsupportedOption for a pass that goes on with a cache or has pads.
    """

    def emptied(embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        embedded[:, _columns(positions, embedded.shape[1], "position")] = 0
        return embedded

    with ExitStack() as undo:
        undo.callback(_only_whole_texts(model).remove)
        undo.callback(model.get_input_embeddings().register_forward_hook(_on_output(emptied)).remove)
        yield


def _columns(wanted: Sequence[int], there: int, what: str) -> Int[Tensor, " wanted"]:
    wrong = [index for index in wanted if not 0 <= index < there]
    if wrong:
        raise InvalidInput(f"{what} {wrong[0]} is to be edited, and the pass has {what}s 0 to {there - 1}")
    return torch.tensor(list(wanted), dtype=torch.int64)


def _on_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    return enter


def _on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    return leave


def _only_whole_texts(model: PreTrainedModel) -> Any:
    """A hook that refuses passes whose columns are not the positions of a text."""

    def check(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if past is not None and past.get_seq_length() > 0:
            raise UnsupportedOption("this edit is made by column, so it cannot go on with a cache: feed the whole text")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            raise UnsupportedOption("this edit is made by column, so rows cannot be padded: feed texts of one length")

    return base_of(model).register_forward_pre_hook(check, with_kwargs=True)


# Attention


@contextmanager
def scale_attention(
    model: PreTrainedModel,
    factor: float,
    keys: Sequence[int],
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
    *,
    renormalise: bool = True,
) -> Iterator[None]:
    """Multiply the attention on `keys` (stream positions) by `factor`, 0 to remove it; None: all layers, all heads.

    With `renormalise` the other keys share what is left, in proportion, so that a query's weights sum to what they did
    (what a sink logit took stays taken), and a query that sees no other key keeps what it had. Without, what was taken
    is gone, and the output shrinks.
    """

    def bend(view: View, weights: Tensor) -> Tensor:
        where = chosen(view, keys, layers, heads)
        return weights if where is None else scaled(weights, where, factor, renormalise=renormalise)

    with observe(model, Lens(bend_weights=bend)):
        yield


@contextmanager
def bias_scores(
    model: PreTrainedModel,
    bias: float,
    keys: Sequence[int],
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> Iterator[None]:
    """Add `bias` to the scores of `keys` (stream positions) before the softmax; -1e4 hides them, from sink logits too.

    A query that sees nothing else still sees them, since a softmax knows differences only. Raises InvalidInput for a
    bias that is not finite.
    """
    if not torch.isfinite(torch.tensor(bias)):
        raise InvalidInput(f"bias={bias}: a query that sees only such keys would see nothing; -1e4 hides a key as well")

    def bend(view: View, scores: Tensor) -> Tensor:
        where = chosen(view, keys, layers, heads)
        return scores if where is None else scores + bias * where.to(scores.dtype)

    with observe(model, Lens(bend_scores=bend)):
        yield


@contextmanager
def add_keys(model: PreTrainedModel, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> Iterator[None]:
    """Let every query of a layer see more keys: by layer, `[kv_heads, added, head_dim]` and their values.

    They are used as they are, turned by nothing. A key and a value of zeros make the softmax-off-by-one; a value of
    zeros alone is a K bias (Gu et al., arXiv 2410.10781, section 7). Raises InvalidInput if keys and values differ in
    their layers.
    """
    if keys.keys() != values.keys():
        raise InvalidInput(f"keys are given for layers {sorted(keys)} and values for {sorted(values)}: give both")

    def add(layer: int) -> tuple[Tensor, Tensor] | None:
        return (keys[layer], values[layer]) if layer in keys else None

    with observe(model, Lens(add=add)):
        yield


@contextmanager
def add_sink_logits(model: PreTrainedModel, logits: Numbers) -> Iterator[None]:
    """Give every head a sink logit: an added key without a value, whose score is the same for every query.

    `logits` broadcast to `[layers, heads]`; 0 is the softmax-off-by-one. Raises UnsupportedOption beside another edit
    that adds keys.
    """
    table = torch.atleast_2d(torch.as_tensor(logits))
    nothing: dict[int, tuple[Tensor, Tensor]] = {}

    def arrive(arrival: Arrival) -> None:  # comes before keys are added
        key, value = arrival.key[0, :, :1], arrival.value[0, :, :1]
        nothing[arrival.layer] = torch.zeros_like(key), torch.zeros_like(value)

    def bend(view: View, scores: Tensor) -> Tensor:
        added = view.keys[0] == ADDED
        if int(added.sum()) != 1:
            raise UnsupportedOption("sink logits cannot be added beside other added keys: add one or the other")
        own = table[view.layer if len(table) > 1 else 0].to(scores)
        own = own[view.heads.start : view.heads.stop] if len(own) > 1 else own
        return torch.where(added, own.view(1, -1, 1, 1), scores)

    with observe(model, Lens(arrive=arrive, add=nothing.__getitem__, bend_scores=bend)):
        yield


@contextmanager
def shift_sink_logits(model: PreTrainedModel, shift: Numbers) -> Iterator[None]:
    """Add `shift`, `[heads]` or one number, to the learned sink logits of every layer (gpt-oss); -1e4 takes them away.

    Raises UnsupportedOption for a model without them.
    """
    learned = sink_logits_of(model)
    if not learned:
        raise UnsupportedOption(f"{model.config.model_type} has no learned sink logits: add some with add_sink_logits")
    kept = [logits.detach().clone() for logits in learned]
    with torch.no_grad():
        try:
            for logits in learned:
                logits.add_(torch.as_tensor(shift, dtype=logits.dtype, device=logits.device))
            yield
        finally:
            for logits, old in zip(learned, kept, strict=True):
                logits.copy_(old)


def sink_logits_of(model: PreTrainedModel) -> list[nn.Parameter]:
    """The learned sink logits `[heads]` of each layer that has them, first to last."""
    found = (getattr(module, "sinks", None) for block in blocks_of(model) for module in block.modules())
    return [logits for logits in found if isinstance(logits, nn.Parameter)]


def chosen(
    view: View, keys: Sequence[int], layers: Collection[int] | None, heads: Collection[int] | None
) -> Bool[Tensor, "batch some_heads 1 keys"] | None:
    """Where a block has these keys, in these layers and heads; None where it has none of them."""
    if layers is not None and view.layer not in layers:
        return None
    here = [heads is None or head in heads for head in view.heads]
    if not any(here):
        return None
    wanted = torch.tensor(list(keys), dtype=view.keys.dtype, device=view.keys.device)
    there = torch.isin(view.keys, wanted)
    return there[:, None, None] & torch.tensor(here, device=there.device)[None, :, None, None]


def scaled(
    weights: Float[Tensor, "batch heads queries keys"],
    where: Bool[Tensor, "some_batch some_heads 1 keys"],
    factor: float,
    *,
    renormalise: bool,
) -> Float[Tensor, "batch heads queries keys"]:
    """`weights` with those at `where` multiplied by `factor`; renormalised, the others grow so that the sum stays.

    What the others hold is summed, never taken as 1 - p: next to a sink of 0.999 the difference has no digits left.
    """
    touched = torch.where(where, weights * factor, weights)
    if not renormalise:
        return touched
    taken = weights.where(where, 0).sum(dim=-1, keepdim=True)
    rest = weights.where(~where, 0).sum(dim=-1, keepdim=True)
    grown = torch.where(where, touched, weights * (1 + (1 - factor) * taken / rest))
    return torch.where(rest > torch.finfo(weights.dtype).tiny, grown, weights)


# What is read


def without(ids: Int[Tensor, "texts tokens"], position: int) -> Int[Tensor, "texts fewer"]:
    """The texts without one token."""
    return torch.cat((ids[:, :position], ids[:, position + 1 :]), dim=1)


def moved(ids: Int[Tensor, "texts tokens"], position: int, to: int) -> Int[Tensor, "texts tokens"]:
    """The texts with the token of one position taken out and put back so that it stands at `to`."""
    rest = without(ids, position)
    return torch.cat((rest[:, :to], ids[:, position : position + 1], rest[:, to:]), dim=1)


def replaced(
    ids: Int[Tensor, "texts tokens"], positions: Sequence[int], tokens: int | Tensor
) -> Int[Tensor, "texts tokens"]:
    """The texts with other tokens at these positions: one for all, or a tensor that broadcasts."""
    changed = ids.clone()
    changed[:, list(positions)] = torch.as_tensor(tokens, dtype=ids.dtype, device=ids.device)
    return changed


def inserted(
    ids: Int[Tensor, "texts tokens"], position: int, tokens: Int[Tensor, "some_texts more"]
) -> Int[Tensor, "texts longer"]:
    """The texts with `tokens` before the one at `position`: `inserted(ids, 0, [[bos] * 3])` before `[bos] + text`."""
    new = tokens.to(ids).expand(len(ids), -1)
    return torch.cat((ids[:, :position], new, ids[:, position:]), dim=1)
