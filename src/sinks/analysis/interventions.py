"""Interventions: reversible edits of a running model, each with a matched control. Causes, not only correlations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sinks.analysis.estimate import Estimate


@dataclass(frozen=True)
class Effect:
    """What one edit did, against the same texts without it; the edited tokens' own predictions are not counted.

    `group` names the family of edits ("massive activation", "sink attention", "first tokens", "sink logits", "added
    keys"); `control_of` is the name of the edit that this one is the control of, or empty. `loss` is the mean
    difference in nats a token, `ratio` its exp (perplexity over perplexity); `kl` from base to edited, nats a token;
    `agreement` how often the likeliest next token stays. `sink_rate` is at the sink and `next_rate` at the key after
    it, with the edit on (NaN: not measured).
    """

    name: str
    group: str
    control_of: str
    perplexity: Estimate
    loss: Estimate
    ratio: Estimate
    kl: Estimate
    agreement: Estimate
    sink_rate: float
    next_rate: float


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """Loss difference (nats a token) when the sink is taken from one head, the rest renormalised, and when an ordinary
    key of equal... is; NaN where a head was not tried."""

    removed: Float[np.ndarray, "layers heads"]
    control: Float[np.ndarray, "layers heads"]
    low: Float[np.ndarray, "layers heads"]
    high: Float[np.ndarray, "layers heads"]


@dataclass(frozen=True, eq=False)
class Interventions:
    """All effects; the heads, if they were tried; and what it comes to in one line."""

    base: Estimate
    texts: int
    tokens: int
    effects: tuple[Effect, ...]
    heads: HeadEffects | None
    verdict: str
