"""Massive activations: a few enormous numbers in the residual stream that act as built-in biases.

Which are they, how large against the median, on which tokens and in which dimensions, where are they born, where do
they die, and do the values and keys of the sinks drain with them? (Sun et al., arXiv 2402.17762; Gu et al., 2410.10781.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sinks.types import Stage, unwatched


@dataclass(frozen=True)
class Peak:
    """One massive activation: the largest number of one depth, as the texts agree on it.

    `position` and `dim` are those most texts have it at; `share` is how many of the texts that is; `value` is the mean
    there, `ratio` the median over texts of its magnitude over the median magnitude of that text and depth; `variation`
    is its coefficient of variation over texts (0 where causality makes it the same for every text: see `fixed`).
    """

    depth: int
    position: int
    dim: int
    token: str
    share: float
    value: float
    ratio: float
    variation: float


@dataclass(frozen=True, eq=False)
class Massive:
    """Massive activations by depth (0 enters block 0, b + 1 leaves block b), each text on its own.

    `largest`, `median`: magnitudes; `position`, `dim`: where the largest stands. `flagged`: share of texts that pass
    the flag of Sun et al., over 100 and over 1,000 medians. `first_norm`: norm of the first token over the mean norm of
    the others. `kurtosis_first`, `kurtosis_rest`: over the width, as shares of the most there can be. `lives`: runs of
    depths [born, dies) during which the largest is at least a tenth of its peak and 100 medians. `value_ratio`,
    `key_ratio`: norm of the sink token's over the mean of the others', by layer and key head; a ratio below 1 is a
    drain. `sink` is the position that was taken for it. `fixed`: the sink token is the same in every text, so that
    causality alone makes its activation constant, and its variation says nothing.
    """

    texts: int
    tokens: int
    sink: int
    fixed: bool
    largest: Float[np.ndarray, "texts depths"]
    median: Float[np.ndarray, "texts depths"]
    position: Int[np.ndarray, "texts depths"]
    dim: Int[np.ndarray, "texts depths"]
    flagged: Float[np.ndarray, " depths"]
    first_norm: Float[np.ndarray, " depths"]
    kurtosis_first: Float[np.ndarray, " depths"]
    kurtosis_rest: Float[np.ndarray, " depths"]
    value_ratio: Float[np.ndarray, "layers kv_heads"]
    key_ratio: Float[np.ndarray, "layers kv_heads"]
    peaks: tuple[Peak, ...]
    lives: tuple[tuple[int, int], ...]
