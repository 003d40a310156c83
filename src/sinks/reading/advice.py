"""How many sinks a model's streams need: perplexity by sinks at equal memory, and the advice that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """`perplexity` of a stream by sinks kept, every one holding `capacity` keys; `dense` is full attention on the same
    tokens (None: the stream is longer than the model was trained on). `ratio` is none kept over `sinks` kept.

    `sinks` is the fewest whose perplexity is within 1 % of the best; `dependent` whether `ratio` is over 1.05.
    """

    sinks: int
    window: int
    capacity: int
    dependent: bool
    ratio: float
    low: float
    high: float
    tokens: int
    perplexity: Mapping[int, float]
    dense: float | None
    reason: str
