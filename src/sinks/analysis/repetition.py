"""Repetition: softmax gives r equal keys r times the weight, relevant or not. Does the model undo that?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sinks.analysis.estimate import Estimate


@dataclass(frozen=True, eq=False)
class Dose:
    """One kind of repetition: "repeated" (one sentence r times), "different" (r different ones of equal length),
    each with the sink as it is or masked.

    `attention[r]` is the share of attention on the repeated span, over layers, heads, queries and texts;
    `log_odds[r]` the logit of the distractor's answer minus that of the right one; by number of repeats.
    `attention_slope`, `answer_slope`: per unit of log r; 1 is pure softmax, above 1 the model amplifies.
    """

    kind: str
    sink: str
    repeats: Int[np.ndarray, " doses"]
    attention: Float[np.ndarray, " doses"]
    log_odds: Float[np.ndarray, " doses"]
    attention_slope: Estimate
    answer_slope: Estimate


@dataclass(frozen=True, eq=False)
class Repetition:
    """All doses and what they say in one line."""

    doses: tuple[Dose, ...]
    verdict: str
