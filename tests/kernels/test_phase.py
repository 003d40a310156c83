"""Phases: exact differences, no drift, and the angle the model meant."""

from __future__ import annotations

import math

import pytest
import torch

from sinks.errors import InvalidInput
from sinks.kernels import Rotary
from sinks.kernels.phase import rotate

INV_FREQ = (1.0 / 10000 ** (torch.arange(0, 64, 2) / 64)).double()
FAR = (0, 2**16, 2**24 + 1, 2**31 - 100, 2**33, 2**40, 2**53)


def test_a_step_is_the_nearest_fraction_of_a_turn() -> None:
    for theta, step in zip(INV_FREQ.tolist(), Rotary(INV_FREQ).steps.tolist(), strict=True):
        assert abs(step - theta / (2 * math.pi) * 2.0**64) <= 2**11, "half a unit in the last place of a float64"


def test_the_angle_is_position_times_frequency() -> None:
    positions = torch.arange(5000)
    cos, sin = Rotary(INV_FREQ).tables(positions, torch.float64)
    angles = positions[:, None] * INV_FREQ
    # A float64 product is off by half a unit in the last place: 5000 * 2^-53, twice over.
    assert torch.allclose(cos, angles.cos(), rtol=0, atol=2e-12)
    assert torch.allclose(sin, angles.sin(), rtol=0, atol=2e-12)


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(far: int, interleaved: bool) -> None:
    rotary = Rotary(INV_FREQ, interleaved)
    query, key = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64).unbind(0)

    def score(origin: int) -> torch.Tensor:
        q = rotate(query, *rotary.tables(torch.tensor([[origin + 1020]]), torch.float64), rotary)
        k = rotate(key, *rotary.tables(torch.tensor([[origin]]), torch.float64), rotary)
        return (q * k).sum()

    # Phases differ by an exact integer; what is left is the rounding of 64 products of angles below pi.
    assert abs(score(far) - score(0)) < 64 * 4 * 2**-52 * 10


def test_only_the_rotary_dimensions_turn() -> None:
    heads = torch.randn(1, 2, 3, 20, dtype=torch.float64)
    rotary = Rotary(INV_FREQ[:4], first=6)
    turned = rotate(heads, *rotary.tables(torch.arange(1, 4)[None], torch.float64), rotary)
    assert torch.equal(turned[..., :6], heads[..., :6])
    assert torch.equal(turned[..., 14:], heads[..., 14:])
    assert not torch.allclose(turned[..., 6:14], heads[..., 6:14])
    assert torch.allclose(turned.norm(dim=-1), heads.norm(dim=-1))


def test_pairings_are_the_same_up_to_the_order_of_dimensions() -> None:
    heads = torch.randn(1, 1, 5, 64, dtype=torch.float64)
    tables = Rotary(INV_FREQ).tables(torch.arange(5)[None], torch.float64)
    half = rotate(heads, *tables, Rotary(INV_FREQ))
    paired = torch.stack(heads.chunk(2, dim=-1), dim=-1).flatten(-2)
    interleaved = rotate(paired, *tables, Rotary(INV_FREQ, interleaved=True))
    assert torch.equal(torch.cat((interleaved[..., ::2], interleaved[..., 1::2]), dim=-1), half)


def test_half_precision_is_rounded_once() -> None:
    heads = torch.randn(1, 2, 3, 64).bfloat16()
    rotary = Rotary(INV_FREQ)
    positions = torch.tensor([[2**33, 2**33 + 1, 2**33 + 2]])
    exact = rotate(heads.double(), *rotary.tables(positions, torch.float64), rotary)
    rounded = rotate(heads, *rotary.tables(positions, torch.float32), rotary)
    # bfloat16 keeps 8 bits: half a unit in the last place of the result, and float32 noise far below it.
    assert bool(((rounded.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all())


def test_a_frequency_that_aliases_is_refused() -> None:
    with pytest.raises(InvalidInput, match="half a turn"):
        Rotary(torch.tensor([math.pi], dtype=torch.float64))
