"""Runs the arms of a comparison over one stream, and turns their scores into numbers that may stand side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sinks.evals.arms import Settings
from sinks.evals.contenders import Contender, Pace
from sinks.reading.memory import Meter, watch
from sinks.reading.perplexity import Score, perplexity
from sinks.reading.tokens import forgotten_repeats
from sinks.types import Stage


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm, measured.

    `peak_bytes` is the most memory held while it ran, above the loaded model; `seconds` its whole wall clock.
    `measured_as` names the arm whose run this is: another one if both have equal contenders.
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
    """Perplexity of one arm over that of another, on the tokens that both scored.

    `value` is exp of the mean difference in surprise, and `error` its standard error, tokens taken as independent.
    `targets` counts the shared tokens, from stream position `first` to `last`.
    """

    value: float
    error: float
    targets: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """All arms, by name, over one stream of `tokens`; `repeats` marks where it repeats what has left the window."""

    settings: Settings
    tokens: int
    repeats: Bool[np.ndarray, " tokens"]
    arms: Mapping[str, Arm]
    memory_method: str

    @property
    def everywhere(self) -> Bool[np.ndarray, " tokens"]:
        """Tokens that every arm can score."""
        return np.arange(self.tokens) >= self.settings.first_target

    @property
    def after_eviction(self) -> Bool[np.ndarray, " tokens"]:
        """Tokens predicted from stream position t >= sinks + window, so that something was let go before."""
        return np.arange(self.tokens) > self.settings.capacity

    @property
    def last_quarter(self) -> Bool[np.ndarray, " tokens"]:
        """Tokens in the last quarter of the stream."""
        return np.arange(self.tokens) >= self.tokens - self.tokens // 4

    @property
    def sampled(self) -> Bool[np.ndarray, " tokens"]:
        """Tokens at which re-computation was measured; none without that arm."""
        arm = self.arms.get("recompute")
        return arm.score.scored if arm else np.zeros(self.tokens, bool)

    def nll(self, arm: str) -> Float[np.ndarray, " tokens"]:
        """The surprise that counts, nats: NaN where the arm did not score, or some arm cannot."""
        return np.where(self.everywhere, self.arms[arm].score.nll, np.nan)

    def perplexity(self, arm: str, where: Bool[np.ndarray, " tokens"]) -> float:
        """An arm's perplexity on the tokens among `where` that it scored; NaN if there is none."""
        return perplexity(self.nll(arm), where)

    def perplexity_last_quarter(self, arm: str) -> float:
        """An arm's perplexity on the last quarter; NaN if it stopped before the end and so did not read it all."""
        stopped = self.arms[arm].contender.stops_at(self.tokens) is not None
        return float("nan") if stopped else self.perplexity(arm, self.last_quarter)

    def ratio(self, arm: str, against: str, where: Bool[np.ndarray, " tokens"] | None = None) -> Ratio | None:
        """How much more perplexed `arm` is than `against` on the tokens among `where` that both scored.

        By default `where` is after the first eviction. None if an arm was not measured, or they share fewer than two.
        """
        if arm not in self.arms or against not in self.arms:
            return None
        chosen = self.after_eviction if where is None else where
        difference = np.where(chosen, self.nll(arm) - self.nll(against), np.nan)
        shared = np.flatnonzero(~np.isnan(difference))
        if len(shared) < 2:
            return None
        value = float(np.exp(difference[shared].mean()))
        error = value * float(difference[shared].std(ddof=1)) / len(shared) ** 0.5
        return Ratio(value, error, len(shared), int(shared[0]), int(shared[-1]))


def compare(
    model: PreTrainedModel,
    ids: Int[Tensor, " tokens"],
    settings: Settings,
    contenders: Mapping[str, Contender],
    meter: Meter,
    stage: Stage,
) -> Comparison:
    """Measure every contender over `ids`, one after the other, equal ones once. `model` is attached; see `Stage`."""
    warm_up(model, ids, settings.chunk)
    done: dict[Contender, Arm] = {}
    arms: dict[str, Arm] = {}
    for name, contender in contenders.items():
        if contender not in done:
            pace = Pace(settings.chunk, settings.singles, stage(name, contender.work(len(ids))))
            done[contender] = measure(name, contender, model, ids, pace, meter)
        arms[name] = replace(done[contender], name=name)
    return Comparison(settings, len(ids), forgotten_repeats(ids, settings.capacity), arms, meter.method)


def measure(
    name: str, contender: Contender, model: PreTrainedModel, ids: Int[Tensor, " tokens"], pace: Pace, meter: Meter
) -> Arm:
    """One contender's score, peak memory and time."""
    began = time.perf_counter()
    with watch(meter) as peak:
        score = contender.read(model, ids, pace)
    return Arm(name, contender, score, peak.bytes, time.perf_counter() - began, measured_as=name)


@torch.inference_mode()
def warm_up(model: PreTrainedModel, ids: Int[Tensor, " tokens"], chunk: int) -> None:
    """Read a chunk and a token without a cache: weights become resident, and libraries allocate what they keep."""
    for count in (chunk, 1):
        model(input_ids=ids[None, :count], use_cache=False)
