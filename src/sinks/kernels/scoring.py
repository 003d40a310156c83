"""What a score is made of, apart from who sees whom: shared by every implementation of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinks.kernels.phase import Rotary


@dataclass(frozen=True, eq=False)
class Scoring:
    """How a query and a key become a score.

    `scale` multiplies the product. `rotary` turns both (None: NoPE). `slopes` add ALiBi's `-slope * distance`
    (arXiv 2108.12409). `softcap` c bends a score z to `c * tanh(z / c)` (Gemma 2). `sink_logits` b add `exp(b)` to
    the denominator of the softmax, with no value (gpt-oss; softmax-off-by-one at b = 0).
    """

    scale: float
    rotary: Rotary | None = None
    slopes: Float[Tensor, " heads"] | None = None
    softcap: float | None = None
    sink_logits: Float[Tensor, " heads"] | None = None

    def __post_init__(self) -> None:
        for name in ("slopes", "sink_logits"):  # kernels read a number a head, one behind the other
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else given.contiguous())

    def of_heads(self, heads: range) -> Scoring:
        """The scoring of some of the query heads."""
        part = slice(heads.start, heads.stop)
        slopes, logits = (None if each is None else each[part] for each in (self.slopes, self.sink_logits))
        return replace(self, slopes=slopes, sink_logits=logits)


def visible(
    queries: Int[Tensor, "batch queries"], keys: Int[Tensor, "batch keys"], sinks: int, window: int
) -> Bool[Tensor, "batch queries keys"]:
    """Which key each query sees, by stream position: the first `sinks`, and the last `window` with itself.

    A negative position is a pad or an empty slot: as a key nobody sees it.
    """
    distance = queries.unsqueeze(2) - keys.unsqueeze(1)
    kept = (keys < sinks).unsqueeze(1) | (distance < window)
    return (distance >= 0) & kept & (keys >= 0).unsqueeze(1)


def cache_distance(
    queries: Int[Tensor, "batch queries"], keys: Int[Tensor, "batch keys"], sinks: int, window: int
) -> Int[Tensor, "batch queries keys"]:
    """How far apart query and key stand inside the cache: a sink stays where the full cache put it."""
    in_cache = queries.clamp(max=sinks + window - 1)
    is_sink = (keys < sinks).unsqueeze(1)
    return in_cache.unsqueeze(2).where(is_sink, queries.unsqueeze(2)) - keys.unsqueeze(1)
