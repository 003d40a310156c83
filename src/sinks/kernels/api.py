"""The operator: checks what it was given, then calls the implementation that was asked for, and no other."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.errors import InvalidInput
from sinks.kernels import chunked, reference
from sinks.kernels.scoring import Scoring

Implementation = Literal["auto", "reference", "chunked"]
IMPLEMENTATIONS = {"auto": chunked.attend, "chunked": chunked.attend, "reference": reference.attend}


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

    Raises InvalidInput for sizes or shapes that do not fit.
    """
    if sinks < 0 or window < 1:
        raise InvalidInput(f"sinks={sinks}, window={window}: sinks must be 0 or more and window 1 or more")
    if impl not in IMPLEMENTATIONS:
        raise InvalidInput(f"impl={impl!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    if positions is None:
        positions = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    scoring = scoring or Scoring(scale=query.shape[-1] ** -0.5)
    _check_shapes(query, key, value, positions, scoring)
    return IMPLEMENTATIONS[impl](query, key, value, positions, sinks=sinks, window=window, scoring=scoring)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scoring: Scoring) -> None:
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
    real = positions >= 0
    if positions.shape != (batch, queries) or not torch.equal(
        positions, (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
    ):
        raise InvalidInput("positions must count the real tokens of each row 0, 1, 2, ... and be -1 at pads")
