"""Writers take turns, burst by burst, so that whatever else the machine does slows all of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.cache.plan import Plan
from sinks.errors import InvalidInput
from sinks.evals.speed.writers import Writer
from sinks.reading.perplexity import perplexity, score
from sinks.types import Stage, unwatched


@dataclass(frozen=True)
class Bench:
    """At each of `levels` (tokens in the stream) every writer writes `rounds` bursts of `burst` tokens."""

    levels: tuple[int, ...] = (128, 1000, 4000)
    rounds: int = 9
    burst: int = 16
    scored: int = 4096
    plan: Plan = Plan(4, 1020)

    def __post_init__(self) -> None:
        wrong = [name for name in ("rounds", "burst", "scored") if getattr(self, name) < 1]
        if wrong or not self.levels or list(self.levels) != sorted(set(self.levels)) or self.levels[0] < 1:
            raise InvalidInput(f"{self}: give counts of at least 1, and levels that rise")
        gaps = [after - before for before, after in zip(self.levels, self.levels[1:], strict=False)]
        if min(gaps, default=self.written) < self.written:
            raise InvalidInput(f"{self.written} tokens are written at each level: set the levels further apart")

    @property
    def written(self) -> int:
        """Tokens that a writer adds at a level; the first burst is not timed."""
        return (self.rounds + 1) * self.burst


QUICK = Bench(levels=(64, 256), rounds=3, burst=8, scored=512)


@dataclass(frozen=True)
class Speed:
    """Milliseconds a token of one writer's bursts at each level."""

    writer: str
    version: str
    keeps: str
    bursts: dict[int, list[float]]

    def milliseconds(self, level: int) -> float:
        """Median of the bursts."""
        return statistics.median(self.bursts[level])

    def tokens_per_second(self, level: int) -> float:
        """The median, the other way round."""
        return 1e3 / self.milliseconds(level)


@dataclass(frozen=True, eq=False)
class Cost:
    """Surprise of the same tokens with float32 and with rounded weights, nats."""

    exact: Float[np.ndarray, " tokens"]
    rounded: Float[np.ndarray, " tokens"]

    @property
    def perplexity(self) -> float:
        """With the rounded weights."""
        return perplexity(self.rounded)

    @property
    def ratio(self) -> float:
        """exp of the mean difference: the rounded weights' perplexity over the exact ones'."""
        return float(np.exp(np.nanmean(self.rounded - self.exact)))

    @property
    def error(self) -> float:
        """Standard error of the ratio: tokens of another text would move it by this."""
        apart = self.rounded - self.exact
        known = apart[~np.isnan(apart)]
        return self.ratio * float(known.std() / max(1, len(known)) ** 0.5)


def race(writers: Sequence[Writer], ids: Sequence[int], bench: Bench, stage: Stage = unwatched) -> list[Speed]:
    """Let the writers take turns at every level. `ids` are read to get there: at least as many as the last level."""
    if len(ids) < bench.levels[-1]:
        raise InvalidInput(f"the text has {len(ids)} tokens, and {bench.levels[-1]} are to be read: give a longer text")
    bursts: list[dict[int, list[float]]] = [{level: [] for level in bench.levels} for _ in writers]
    reached = 0
    for level in bench.levels:
        listen = stage(f"{level:,}", len(writers) * (bench.rounds + 1))
        for writer in writers:
            writer.read(ids[reached:level])
            writer.write(bench.burst)  # warm
            listen(1)
        for turn in range(bench.rounds):
            for index in np.roll(range(len(writers)), turn):  # nobody always comes after the same one
                bursts[index][level].append(writers[index].write(bench.burst) / bench.burst)
                listen(1)
        reached = level + bench.written
    return [Speed(one.name, one.version, one.keeps, times) for one, times in zip(writers, bursts, strict=True)]


def surprises(model: PreTrainedModel, ids: Int[Tensor, " tokens"], plan: Plan) -> Float[np.ndarray, " tokens"]:
    """Surprise of every token, read through sinks and window; NaN for the first."""
    return score(model, ids, SinkCache.for_model(model, sinks=plan.sinks, window=plan.window)).nll


def load_average() -> list[float] | None:
    """Of 1, 5 and 15 minutes, or None where the system keeps none."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def use_threads(count: int) -> None:
    """Let torch use so many threads. Raises InvalidInput for more than the machine has, or none."""
    cores = os.cpu_count() or 1
    if not 1 <= count <= cores:
        raise InvalidInput(f"threads={count}: give 1 to {cores}")
    torch.set_num_threads(count)
