"""A mean over texts and how sure it is: percentile bootstrap, texts as the unit.

Heads and layers of one model are no independent samples, so an interval is over texts and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """`value`, and the ends of its 95 % interval over `texts` texts; an end is NaN where one text gives none."""

    value: float
    low: float
    high: float
    texts: int


def estimate(by_text: Float[np.ndarray, " texts"], seed: int = 0) -> Estimate:
    """The mean over texts with its 95 % bootstrap interval (2,000 resamples). NaN marks a text without the measure."""
    found = by_text[~np.isnan(by_text)]
    value = float(found.mean()) if len(found) else float("nan")
    if len(found) < 2:
        return Estimate(value, float("nan"), float("nan"), len(found))
    low, high = np.percentile(found[_draws(len(found), seed)].mean(axis=1), (2.5, 97.5))
    return Estimate(value, float(low), float(high), len(found))


def ratio_of_means(over: Float[np.ndarray, " texts"], under: Float[np.ndarray, " texts"], seed: int = 0) -> Estimate:
    """sum(over) / sum(under) with its interval, each text drawn as a pair."""
    pairs = np.stack((over, under), axis=1)
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    value = float(pairs[:, 0].sum() / pairs[:, 1].sum()) if len(pairs) else float("nan")
    if len(pairs) < 2:
        return Estimate(value, float("nan"), float("nan"), len(pairs))
    drawn = pairs[_draws(len(pairs), seed)].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    return Estimate(value, float(low), float(high), len(pairs))


def exponential(of: Estimate) -> Estimate:
    """exp of an estimate: a mean surprise becomes a perplexity, a mean difference a ratio."""
    value, low, high = (float(np.exp(end)) for end in (of.value, of.low, of.high))
    return Estimate(value, low, high, of.texts)


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
