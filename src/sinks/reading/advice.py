"""How many sinks a model's streams need, and how long a window: perplexity along a stream, and the advice it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.errors import CapacityError, InvalidInput, TextTooShort
from sinks.models.families import describe
from sinks.reading.estimate import Estimate, estimate, exponential
from sinks.reading.perplexity import score
from sinks.types import Stage, unwatched

BEST_WITHIN = 1.01
"""The fewest sinks whose perplexity is within 1 % of the best are enough."""
WINDOW_WITHIN = 1.05
"""The shortest window whose perplexity is within 5 % of the longest one's is enough."""
DEPENDENT = 1.05
"""Without sinks, a model that needs none stays below this ratio."""
SEGMENT = 64
"""Tokens that an interval takes as one sample: neighbours share their surprise."""


@dataclass(frozen=True)
class AdviceSettings:
    """What is tried: each of `counts` sinks at `capacity` keys in all; then the best count at each of `capacities`.

    A stream has `tokens` tokens, and all are compared on those after the longest window has overflowed.
    """

    capacity: int = 256
    counts: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    capacities: tuple[int, ...] = (64, 128, 256, 512, 1024)
    tokens: int = 3072
    chunk: int = 256

    def __post_init__(self) -> None:
        if 0 not in self.counts or len(set(self.counts)) < 2 or min(self.counts) < 0:
            raise InvalidInput(f"counts={self.counts}: give 0 and at least one other number of sinks")
        if max(self.counts) >= min(self.capacity, *self.capacities):
            raise InvalidInput(
                f"{max(self.counts)} sinks leave no window within {min(self.capacity, *self.capacities)} keys: "
                "try fewer sinks or larger capacities"
            )

    @property
    def first_scored(self) -> int:
        """The first token that is compared."""
        return max(self.capacity, *self.capacities) + 1


@dataclass(frozen=True)
class Advice:
    """`perplexity` by sinks kept, `capacity` keys each; `by_capacity` with `sinks` kept; `dense` is full attention on
    the same tokens (None: the stream is longer than the model was trained on).

    `sinks`: the fewest within 1 % of the best perplexity. `window`: the rest of the smallest capacity within 5 % of the
    largest. `ratio`: perplexity without sinks over perplexity with them, and the ends of its 95 % interval; the model
    is `dependent` where all of it is over 1.05. `tokens` were compared. `reason` is the advice in a sentence.
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
    by_capacity: Mapping[int, float] = field(default_factory=dict)


def advise(
    model: PreTrainedModel,
    ids: Int[Tensor, " tokens"],
    settings: AdviceSettings | None = None,
    *,
    stage: Stage = unwatched,
) -> Advice:
    """Stream `ids` (from its first token on, BOS included where the model has one) with every number of sinks.

    `model` is attached. Capacities beyond the trained length are left out.

    Raises TextTooShort if nothing would be left to compare, CapacityError if no capacity fits the model.
    """
    settings = settings or AdviceSettings()
    ids = ids[: settings.tokens].to(model.device)
    if len(ids) < settings.first_scored + 2 * SEGMENT:
        raise TextTooShort(
            f"the text has {len(ids)} tokens, and {settings.first_scored + 2 * SEGMENT} are needed to compare windows "
            f"of up to {settings.first_scored - 1} keys: give a longer text, or try smaller capacities"
        )
    trained = describe(model).trained_length
    capacities = [each for each in settings.capacities if trained is None or each <= trained]
    if not capacities or (trained is not None and settings.capacity > trained):
        raise CapacityError(f"this model was trained on {trained} positions: try capacities of at most that")
    stream = Stream(model, ids, settings, stage)
    dense = stream.dense() if trained is None or len(ids) <= trained else None
    by_count = {count: stream.with_sinks(count, settings.capacity) for count in settings.counts}
    best = fewest({count: _perplexity(nll) for count, nll in by_count.items()}, BEST_WITHIN)
    by_capacity = {
        each: by_count[best] if each == settings.capacity else stream.with_sinks(best, each) for each in capacities
    }
    longest = {each: _perplexity(nll) for each, nll in by_capacity.items()}
    enough = min(each for each in longest if longest[each] <= WINDOW_WITHIN * longest[max(longest)])
    ratio = compared(by_count[0], by_count[best or min(set(by_count) - {0})])
    dependent = bool(best) and ratio.low > DEPENDENT
    return Advice(
        sinks=best,
        window=enough - best,
        capacity=settings.capacity,
        dependent=dependent,
        ratio=ratio.value,
        low=ratio.low,
        high=ratio.high,
        tokens=len(ids) - settings.first_scored,
        perplexity={count: _perplexity(nll) for count, nll in by_count.items()},
        dense=None if dense is None else _perplexity(dense),
        reason=(
            f"Sink-dependent: {'yes' if dependent else 'no'}. Without sinks {ratio.value:.2f} times the perplexity "
            f"[{ratio.low:.2f}, {ratio.high:.2f}] within {settings.capacity} keys. Keep {best}, with a window of "
            f"{enough - best}."
        ),
        by_capacity=longest,
    )


@dataclass(frozen=True, eq=False)
class Stream:
    """One text, read in several ways; every reading gives the surprise of the tokens that are compared."""

    model: PreTrainedModel
    ids: Int[Tensor, " tokens"]
    settings: AdviceSettings
    stage: Stage

    def with_sinks(self, sinks: int, capacity: int) -> Float[np.ndarray, " tokens"]:
        """Keeping `sinks` first tokens and the most recent ones, `capacity` in all."""
        cache = SinkCache.for_model(self.model, sinks=sinks, window=capacity - sinks)
        return self._read(cache, f"advice: {sinks} + {capacity - sinks}")

    def dense(self) -> Float[np.ndarray, " tokens"]:
        """Keeping everything."""
        return self._read(DynamicCache(config=self.model.config), "advice: dense")

    def _read(self, cache: SinkCache | DynamicCache, name: str) -> Float[np.ndarray, " tokens"]:
        listen = self.stage(name, len(self.ids) - 1)
        found = score(self.model, self.ids, cache, self.settings.chunk, listen=listen)
        return found.nll[self.settings.first_scored :]


def fewest(perplexity: Mapping[int, float], within: float) -> int:
    """The smallest key whose perplexity is at most `within` times the best."""
    best = min(perplexity.values())
    return min(count for count, value in perplexity.items() if value <= within * best)


def compared(over: Float[np.ndarray, " tokens"], under: Float[np.ndarray, " tokens"]) -> Estimate:
    """Perplexity of one reading over that of another, with its interval over segments of 64 tokens."""
    difference = over - under
    whole = len(difference) // SEGMENT * SEGMENT
    segments: Sequence[float] | np.ndarray = difference[:whole].reshape(-1, SEGMENT).mean(axis=1)
    return exponential(estimate(np.asarray(segments)))


def _perplexity(nll: Float[np.ndarray, " tokens"]) -> float:
    return float(np.exp(nll.mean()))
