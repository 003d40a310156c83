"""Turning and packing on a GPU against `kernels.phase`; interpreted where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sinks.kernels.device.forward import Band
from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.tiles import circle
from sinks.kernels.device.turn import meet, turn, turn_back
from sinks.kernels.phase import Rotary, rotate
from tests.kernels.interpreted import DEVICE, needs_triton

pytestmark = needs_triton
SHAPES = [
    pytest.param(64, False, 0, id="halves"), pytest.param(64, True, 0, id="interleaved"),
    pytest.param(48, False, 8, id="partial"), pytest.param(32, True, 16, id="partial interleaved"),
    pytest.param(24, False, 40, id="the last"),
]  # fmt: skip


@jit
def _around(phases: Value, cosines: Value, sines: Value, COUNT: constexpr) -> None:
    place = tl.arange(0, COUNT)
    cos, sin = circle(tl.load(phases + place))
    tl.store(cosines + place, cos)
    tl.store(sines + place, sin)


def test_the_circle_is_right_at_every_eighth_and_between() -> None:
    phases = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    corners = [-(2**31), 2**31 - 1, *(k * 2**29 + more for k in range(-3, 4) for more in (-1, 0, 1))]
    phases[: len(corners)] = torch.tensor(corners)
    cos, sin = (torch.empty(4096, device=DEVICE) for _ in range(2))
    _around[(1,)](phases.int().to(DEVICE), cos, sin, COUNT=4096)
    angles = phases.double() * (2 * math.pi / 2**32)
    # Two roundings of float32 near 1, and 3e-8 of the series cut off at an eighth of a turn.
    assert (cos.cpu() - angles.cos()).abs().max() < 1.5e-7
    assert (sin.cpu() - angles.sin()).abs().max() < 1.5e-7


@pytest.mark.parametrize(("width", "interleaved", "first"), SHAPES)
@pytest.mark.parametrize("sinks", [3, 12])
def test_queries_keys_and_scores_equal_those_of_phase(width: int, interleaved: bool, first: int, sinks: int) -> None:
    rotary, rows, (query, key) = drawn(width, interleaved, first)
    band = Band(sinks, 9, 1.0)
    found = turn(query.half(), key.half(), rows, rotary, band)
    place = torch.arange(40, device=DEVICE).expand(2, -1)
    wide_query, wide_key = (turned(part, place, rotary) for part in (query, key))
    assert close(found.query, rows.pack(wide_query)) and close(found.key, rows.pack(wide_key))
    in_cache = turned(query, place.clamp(max=band.sinks + band.window - 1), rotary)
    scores = torch.einsum("bhtd,bhsd->hbts", in_cache, wide_key[:, :, :sinks].repeat_interleave(2, 1))
    assert found.scores is not None
    # Half precision rounds both factors of 64 products: 2^-11 of numbers of size 1, with random signs, five sigma.
    assert (found.scores - scores.flatten(1, 2)).abs().max() < 5 * 8 * 2**-10


@pytest.mark.parametrize(("width", "interleaved", "first"), SHAPES)
@pytest.mark.parametrize("sinks", [3, 12])
def test_turning_back_is_the_transpose_of_turning(width: int, interleaved: bool, first: int, sinks: int) -> None:
    """<turn(query), given> + <scores, slopes> = <query, turn_back(given, slopes)>, whatever the two gradients."""
    rotary, rows, (query, key) = drawn(width, interleaved, first)
    band, made = Band(sinks, 9, 1.0), torch.Generator().manual_seed(1)
    there = turn(query.half(), key.half(), rows, rotary, band)
    assert there.scores is not None
    given = torch.randn(there.query.shape, generator=made).to(DEVICE)
    slopes = torch.randn(there.scores.shape, generator=made).to(DEVICE)
    back = turn_back(given.half(), (there.key, there.sinks), slopes, rows, rotary, band.sinks + band.window)
    one = (there.query.double() * given).sum() + (there.scores.double() * slopes).sum()
    other = (back.double() * query).sum()
    # 2 x 4 x 40 x 64 products of size 1 to 4, each off by a few 2^-11, with random signs.
    assert abs(float(one - other)) < 2.0
    assert abs(float(one)) > 20.0  # else the bound would say nothing


@pytest.mark.parametrize("sinks", [3, 12])
def test_queries_that_are_not_turned_meet_the_sinks_of_their_row(sinks: int) -> None:
    _, _, (query, key) = drawn(64, False, 0)
    positions = (torch.arange(40, device=DEVICE) - torch.tensor([[0], [9]], device=DEVICE)).clamp(min=-1)
    rows = Rows.of(positions)
    found = meet(query.half(), rows.pack(key.half()), rows, Band(sinks, 9, 1.0))
    assert found is not None
    for row, begin in enumerate((0, 9)):
        scores = torch.einsum("htd,hsd->hts", query[row], key[row, :, begin : begin + sinks].repeat_interleave(2, 0))
        mine = found[:, slice(*rows.begins[row : row + 2].tolist())]
        # Products of halves are exact in float32; 64 of them of size one are added.
        assert (mine - scores[:, begin:]).abs().max() < 64 * 2**-20
    assert meet(query.half(), rows.pack(key.half()), rows, Band(0, 9, 1.0)) is None


def drawn(width: int, interleaved: bool, first: int) -> tuple[Rotary, Rows, list[Tensor]]:
    """Queries of four heads and keys of two, [2, heads, 40, 64], no pads."""
    made = torch.Generator().manual_seed(width + first)
    inv_freq = (1.0 / 10000 ** (torch.arange(width // 2) / (width // 2))).double().to(DEVICE)
    heads = [torch.randn(2, h, 40, 64, generator=made).half().double().to(DEVICE) for h in (4, 2)]
    return Rotary(inv_freq, interleaved, first), Rows.whole(2, 40, DEVICE), heads


def turned(heads: Tensor, place: Tensor, rotary: Rotary) -> Tensor:
    """In float64."""
    return rotate(heads, *rotary.tables(place, torch.float64), rotary)


def close(found: Tensor, want: Tensor) -> bool:
    """To one rounding of half precision, and float32's on the way."""
    return bool(((found.double() - want).abs() <= want.abs() * 2**-11 + 1e-5).all())
