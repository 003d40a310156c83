"""ALiBi slopes of each family that has them (arXiv 2108.12409, section 3)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def geometric_slopes(heads: int) -> Float[Tensor, " heads"]:
    """Bloom's and Falcon's: 2^(-8k/n) for the nearest power of two below, every other one of the next for the rest."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    slopes += [2 ** (-8 * k / (2 * power)) for k in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float64)


def mpt_slopes(heads: int) -> Float[Tensor, " heads"]:
    """MPT's, as transformers runs it: those of the nearest power of two above, odd ones first."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    if power != heads:
        slopes = (slopes[1::2] + slopes[::2])[:heads]
    return torch.tensor(slopes, dtype=torch.float64)
