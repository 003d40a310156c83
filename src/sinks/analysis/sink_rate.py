"""The sink rate: which share of heads puts more than epsilon of its attention on one early token.

Gu et al. (arXiv 2410.10781), section 3.2: importance of key k is alpha_k = 1/(T - k) sum_{i >= k} p_ik, and the sink
rate the share of (text, layer, head) with alpha_k > epsilon, thresholded text by text, then averaged. It is a fraction
of heads, not of attention, and means nothing without epsilon, T, and where BOS stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sinks.analysis.estimate import Estimate
from sinks.analysis.inputs import Condition


@dataclass(frozen=True, eq=False)
class SinkRate:
    """One condition. `sink` is the position that stands for the sink here: 0, or where BOS was moved to.

    `importance`: mean over texts of alpha_k for the first keys. `rate_at`: sink rate at each of the first keys.
    `rate`: sink rate at `sink`; `aggregated` is the same with the texts' mean importance thresholded instead.
    `heads`: share of texts in which a head passes at `sink`. `curve`: the rate by epsilon. `anywhere`: heads for which
    some key of the first half passes; `sinks`: keys of the first half that more than a quarter of all heads pass.
    `first_mass`, `first_four_mass`: mean attention on them over queries after them; `mass_by_layer` is the former.
    `sink_mass`: on all of `sinks` together (tells dispersal from loss). `argmax`: heads whose largest importance, over
    the floor of uniform attention, is at `sink`.
    """

    condition: Condition
    texts: int
    tokens: int
    epsilon: float
    sink: int
    floor: float
    importance: Float[np.ndarray, "layers heads first"]
    rate_at: Float[np.ndarray, " first"]
    heads: Float[np.ndarray, "layers heads"]
    rate: Estimate
    aggregated: float
    curve: Mapping[float, Estimate]
    anywhere: Estimate
    sinks: tuple[int, ...]
    first_mass: Estimate
    first_four_mass: Estimate
    sink_mass: Estimate
    mass_by_layer: Float[np.ndarray, " layers"]
    argmax: Estimate


@dataclass(frozen=True, eq=False)
class Lengths:
    """Sink rate and mass at the first token by length of the text, every length from one pass over the longest."""

    condition: Condition
    epsilon: float
    rate: Mapping[int, Estimate]
    mass: Mapping[int, Estimate]


@dataclass(frozen=True, eq=False)
class SinkRates:
    """All conditions, the dependence on length, and what binds the sink: "position", "token", "none" or "both"."""

    conditions: tuple[SinkRate, ...]
    lengths: tuple[Lengths, ...]
    bound_to: str
    verdict: str
