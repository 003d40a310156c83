"""Runs the arms of a comparison over one stream and turns their scores into numbers that may be set side by side."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinks.evals.arms import Settings
from sinks.evals.contenders import Contender, Pace
from sinks.evals.memory import Meter, watch
from sinks.evals.perplexity import Listener, Score, perplexity

Stage = Callable[[str, int], Listener]  # told an arm's name and its amount of work, it returns who listens to that arm


@dataclass(frozen=True)
class Arm:
    """One arm, measured.

    Attributes:
        name: as in the table.
        contender: what was run.
        score: what it found.
        peak_bytes: most memory held while it ran, above the loaded model.
        seconds: wall clock of the whole arm.
        measured_as: the arm whose run this is; another name if two arms have the same contender.
    """

    name: str
    contender: Contender
    score: Score
    peak_bytes: int
    seconds: float
    measured_as: str

    @property
    def cache_bytes(self) -> int:
        """Most bytes of keys and values held between two steps."""
        return int(self.score.cache_bytes.max())


@dataclass(frozen=True)
class Ratio:
    """Perplexity of one arm over that of another, on the targets that both scored.

    Attributes:
        value: exp of the mean difference in surprise; 1.25 means 25 % more perplexed.
        error: standard error of `value`, tokens taken as independent.
        targets: how many targets both scored.
        first, last: the first and the last of them, as indices into the stream.
    """

    value: float
    error: float
    targets: int
    first: int
    last: int


@dataclass(frozen=True)
class Comparison:
    """All arms over one stream of `tokens`, by name."""

    settings: Settings
    tokens: int
    arms: Mapping[str, Arm]
    memory_method: str

    @property
    def scorable(self) -> np.ndarray:
        """bool [tokens]: targets that every arm could score."""
        return np.arange(self.tokens) >= self.settings.first_target

    @property
    def after_eviction(self) -> np.ndarray:
        """bool [tokens]: targets whose query stands at t >= C, so that something was let go before it."""
        return np.arange(self.tokens) > self.settings.capacity

    @property
    def last_quarter(self) -> np.ndarray:
        """bool [tokens]: targets in the last quarter of the stream."""
        return np.arange(self.tokens) >= self.tokens - self.tokens // 4

    @property
    def sampled(self) -> np.ndarray:
        """bool [tokens]: targets at which re-computation was measured; none without that arm."""
        arm = self.arms.get("recompute")
        return arm.score.scored if arm else np.zeros(self.tokens, bool)

    def nll(self, arm: str) -> np.ndarray:
        """float64 [tokens], the surprise that counts: NaN where some arm could not have been scored."""
        return np.where(self.scorable, self.arms[arm].score.nll, np.nan)

    def perplexity(self, arm: str, where: np.ndarray) -> float:
        """Perplexity of an arm on its own scored targets among `where` [tokens]; NaN if there is none."""
        return perplexity(self.nll(arm), where)

    def covers(self, arm: str, where: np.ndarray) -> bool:
        """Whether the arm read the whole of `where`; one that stopped half-way must not be read as if it had."""
        stop = self.arms[arm].contender.stops_at(self.tokens)
        return stop is None or stop >= np.flatnonzero(where)[-1]

    def ratio(self, arm: str, against: str, where: np.ndarray | None = None) -> Ratio | None:
        """How much more perplexed `arm` is than `against` on shared targets (by default those after the first eviction); None if
        they share fewer than two."""
        difference = self.nll(arm) - self.nll(against)
        shared = ~np.isnan(difference) & (self.after_eviction if where is None else where)
        at = np.flatnonzero(shared)
        if len(at) < 2:
            return None
        value = float(np.exp(difference[at].mean()))
        error = value * float(difference[at].std(ddof=1)) / len(at) ** 0.5
        return Ratio(value, error, len(at), int(at[0]), int(at[-1]))


def compare(
    model: PreTrainedModel, ids: Tensor, settings: Settings, contenders: Mapping[str, Contender], meter: Meter, stage: Stage
) -> Comparison:
    """Measures every contender over `ids` [tokens], one after the other, each different one once.

    Args:
        model: attached, on its device.
        contenders: from `sinks.evals.arms.contenders`.
        stage: told when an arm begins.
    """
    warm_up(model, ids, settings.chunk)
    done: dict[Contender, Arm] = {}
    arms: dict[str, Arm] = {}
    for name, contender in contenders.items():
        if contender not in done:
            pace = Pace(settings.chunk, settings.singles, stage(name, contender.work(len(ids))))
            done[contender] = measure(name, contender, model, ids, pace, meter)
        first = done[contender]
        arms[name] = Arm(name, contender, first.score, first.peak_bytes, first.seconds, first.name)
    return Comparison(settings, len(ids), arms, meter.method)


def measure(name: str, contender: Contender, model: PreTrainedModel, ids: Tensor, pace: Pace, meter: Meter) -> Arm:
    """One contender's score, peak memory and time."""
    began = time.perf_counter()
    with watch(meter) as peak:
        score = contender.read(model, ids, pace)
    return Arm(name, contender, score, peak.bytes, time.perf_counter() - began, name)


@torch.inference_mode()
def warm_up(model: PreTrainedModel, ids: Tensor, chunk: int) -> None:
    """One chunk and one token without a cache: weights become resident and libraries allocate what they keep, before any arm is measured."""
    for count in (chunk, 1):
        model(input_ids=ids[None, :count], use_cache=False)
