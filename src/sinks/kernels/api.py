"""The operator: checks what it was given, then calls the implementation that was asked for, and no other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels import chunked, reference
from sinks.kernels.band import attend as band
from sinks.kernels.band import flex
from sinks.kernels.device.forward import Statistics
from sinks.kernels.scoring import Scoring

Implementation = Literal["auto", "reference", "chunked", "flex", "triton", "flash"]
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "chunked": chunked.attend,
    "reference": reference.attend,
    "flex": flex.attend,
    "triton": partial(band.attend, walker="triton"),
    "flash": partial(band.attend, walker="flash"),
}
PADLESS = ("triton", "flash")
"""Those that need no positions where there are no pads."""


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads queries head_dim"],
    value: Float[Tensor, "batch kv_heads queries value_dim"],
    *,
    sinks: int,
    window: int,
    scoring: Scoring | None = None,
    positions: Int[Tensor, "batch queries"] | None = None,
    impl: Implementation = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Causal attention in which every query sees the first `sinks` tokens and the last `window`, itself included.

    `query` and `key` are not turned yet: positions are re-assigned inside the cache (StreamingLLM, arXiv 2309.17453,
    section 3.2), which is `scoring.rotary`'s business. `scoring` defaults to `head_dim ** -0.5` without positions.
    `positions` count the real tokens of each row from 0 and are -1 at a pad, which is nobody's key and gives zeros;
    None means no pads. Differentiable in query, key, value and sink logits.

    `impl` names one way: `reference` (the specification), `chunked` (everything, everywhere), `flex` (FlexAttention),
    `triton` (kernels of ours; Hopper GPUs and newer) or `flash` (the same with flash-attn-4 for the window). `auto` is
    what `choose` says, and nothing else is tried after it.

    Raises InvalidInput for sizes or shapes that do not fit, and UnsupportedOption for what `impl` cannot do.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise InvalidInput(f"impl={impl!r} is unknown: choose auto or one of {', '.join(IMPLEMENTATIONS)}")
    scoring = scoring or Scoring(scale=query.shape[-1] ** -0.5)
    _check((query, key, value), positions, sinks, window, scoring)
    if impl == "auto":
        impl = choose(query, value, sinks=sinks, scoring=scoring)
    if positions is None and impl not in PADLESS:
        positions = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    return IMPLEMENTATIONS[impl](query, key, value, positions, sinks=sinks, window=window, scoring=scoring)


def attend_measured(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads queries head_dim"],
    value: Float[Tensor, "batch kv_heads queries value_dim"],
    *,
    sinks: int,
    window: int,
    first_keys: int,
    scoring: Scoring | None = None,
    positions: Int[Tensor, "batch queries"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Statistics]:
    """`attend` through `triton`, and statistics of its weights from the same pass: nothing of size T x T. No gradient.

    `first_keys`, at most `sinks`, is how many of the first tokens `Statistics.mass` counts; a window as long as the
    text makes this plain causal attention. Raises what `attend` raises.
    """
    scoring = scoring or Scoring(scale=query.shape[-1] ** -0.5)
    _check((query, key, value), positions, sinks, window, scoring)
    return band.measure(
        query, key, value, positions, sinks=sinks, window=window, scoring=scoring, first_keys=first_keys
    )


def choose(query: Tensor, value: Tensor, *, sinks: int, scoring: Scoring) -> Implementation:
    """What `impl="auto"` stands for: on a GPU `flash` where it can, then `triton`; `chunked` for all else."""
    if query.device.type != "cuda":
        return "chunked"
    for walker in ("flash", "triton"):
        try:
            band.refuse(query, value, sinks, scoring, walker)
        except UnsupportedOption:
            continue
        return walker
    return "chunked"


def _check(
    heads: tuple[Tensor, Tensor, Tensor], positions: Tensor | None, sinks: int, window: int, scoring: Scoring
) -> None:
    if sinks < 0 or window < 1:
        raise InvalidInput(f"sinks={sinks}, window={window}: sinks must be 0 or more and window 1 or more")
    _check_shapes(*heads, scoring)
    if positions is not None:  # asking a GPU about its positions means waiting for it
        _check_positions(positions, heads[0])


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> None:
    (batch, heads, queries, head_dim), kv_heads = query.shape, key.shape[1]
    if not queries == key.shape[2] == value.shape[2] or not batch == key.shape[0] == value.shape[0]:
        raise InvalidInput(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} are not one sequence: a "
            "query without its own key belongs to a cache, sinks.SinkCache"
        )
    if heads % kv_heads or kv_heads != value.shape[1]:
        raise InvalidInput(f"{heads} query heads cannot share {kv_heads} key and {value.shape[1]} value heads evenly")
    for name, given in (("slopes", scoring.slopes), ("sink_logits", scoring.sink_logits)):
        if given is not None and given.shape != (heads,):
            raise InvalidInput(f"{name} has shape {list(given.shape)}: give one for each of {heads} heads")
    if scoring.rotary is not None and scoring.rotary.first + scoring.rotary.width > head_dim:
        raise InvalidInput(f"the rotary turns {scoring.rotary.width} dimensions of a head that has {head_dim}")


def _check_positions(positions: Tensor, query: Tensor) -> None:
    real = positions >= 0
    if positions.shape != (query.shape[0], query.shape[2]) or not torch.equal(
        positions, (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
    ):
        raise InvalidInput("positions must count the real tokens of each row 0, 1, 2, ... and be -1 at pads")
