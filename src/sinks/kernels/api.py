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
    if query.shape[1] % key.shape[1]:
        raise InvalidInput(f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads evenly")
    if impl not in IMPLEMENTATIONS:
        raise InvalidInput(f"impl={impl!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    if positions is None:
        positions = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    scoring = scoring or Scoring(scale=query.shape[-1] ** -0.5)
    return IMPLEMENTATIONS[impl](query, key, value, positions, sinks=sinks, window=window, scoring=scoring)
