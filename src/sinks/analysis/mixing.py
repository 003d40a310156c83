"""Mixing: do sinks keep tokens from blending into each other? (Barbero et al., arXiv 2504.02732.)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sinks.analysis.estimate import Estimate


@dataclass(frozen=True, eq=False)
class Spread:
    """How far the change of one token travels, under one condition.

    `by_depth[d, p]` is the mean over texts of |h - h'| / |h| at depth d and position p (positions before the changed
    token are 0 by causality); `overall` the mean over later positions by depth; `middle` and `late` its estimates at
    the middle depth and at the last but one.
    """

    condition: str
    changed: int
    by_depth: Float[np.ndarray, "depths positions"]
    overall: Float[np.ndarray, " depths"]
    middle: Estimate
    late: Estimate


@dataclass(frozen=True, eq=False)
class Geometry:
    """Shape of the residual stream by depth, with all rows and without the sink's.

    Matrix entropy is -sum p log p / log min(T, d) with p = sigma^2 / sum sigma^2 (not centred); effective rank is
    exp(-sum p log p); similarity is the mean cosine of pairs; `spread` is |X - mean|_F / |X|_F.
    """

    matrix_entropy: Float[np.ndarray, " depths"]
    matrix_entropy_without: Float[np.ndarray, " depths"]
    effective_rank: Float[np.ndarray, " depths"]
    effective_rank_without: Float[np.ndarray, " depths"]
    similarity: Float[np.ndarray, " depths"]
    similarity_without: Float[np.ndarray, " depths"]
    spread: Float[np.ndarray, " depths"]
    spread_without: Float[np.ndarray, " depths"]


@dataclass(frozen=True, eq=False)
class Mixing:
    """Spreads by condition (BOS kept, removed, evicted), geometry, and what the comparison says in one line."""

    spreads: tuple[Spread, ...]
    geometry: Geometry
    verdict: str
