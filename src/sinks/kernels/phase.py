"""Positions without end: a rotary angle as a wrapping integer fraction of a turn.

RoPE scores depend on differences of positions only, and a difference of integers is exact however large they are.
So a frequency is held as `step`, the number of 2^-64 turns that one position adds, and the phase of position t is
`t * step` in 64-bit arithmetic that wraps by itself: phase(a) - phase(b) = phase(a - b), for ever. In floating point
the same angle is off by 0.6 of a logit at t = 10^7. The upper 32 bits are the unsigned 32-bit phase that a GPU
kernel carries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.errors import InvalidInput

TURN = 2.0**64
RADIANS = 2.0 * math.pi / TURN


@dataclass(frozen=True, eq=False)
class Rotary:
    """How one kind of layer turns its queries and keys (RoPE, arXiv 2104.09864).

    `inv_freq` holds radians a position, one for each pair of dimensions, any scaling (YaRN, Llama-3, linear, NTK)
    already inside. `interleaved` pairs dimensions (2i, 2i + 1); otherwise pair i is (i, i + pairs). The pairs begin at
    dimension `first`, and what lies outside them is not turned (partial rotary).
    """

    inv_freq: Float[Tensor, " pairs"]
    interleaved: bool = False
    first: int = 0

    def __post_init__(self) -> None:
        if self.inv_freq.numel() and float(self.inv_freq.abs().max()) >= math.pi:
            raise InvalidInput("a rotary frequency of half a turn a position or more cannot be told from a slower one")

    @property
    def width(self) -> int:
        """Dimensions of a head that are turned."""
        return 2 * self.inv_freq.numel()

    @cached_property
    def steps(self) -> Int[Tensor, " pairs"]:
        """Units of 2^-64 turns that one position adds, int64."""
        return (self.inv_freq.double() / (2.0 * math.pi) * TURN).round().long()

    def tables(
        self, positions: Int[Tensor, "*batch queries"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "*batch queries pairs"], Float[Tensor, "*batch queries pairs"]]:
        """Cosine and sine of the phase at each position: within one rounding of `dtype`, whatever the position."""
        phases = positions.unsqueeze(-1) * self.steps.to(positions.device)
        angles = phases.double() * RADIANS
        return angles.cos().to(dtype), angles.sin().to(dtype)


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision heads are turned in float32: rounded tables would cost more than the keys' own cast."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(
    heads: Float[Tensor, "batch heads queries head_dim"],
    cos: Float[Tensor, "#batch queries pairs"],
    sin: Float[Tensor, "#batch queries pairs"],
    rotary: Rotary,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Turn each head vector by its row's angles; the result has the dtype of `heads`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    before, turned, after = heads.split(
        (rotary.first, rotary.width, heads.shape[-1] - rotary.first - rotary.width), dim=-1
    )
    turned = turned.to(cos.dtype)
    if rotary.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned = turned.to(heads.dtype)
    if rotary.width == heads.shape[-1]:
        return turned
    return torch.cat((before, turned, after), dim=-1)
