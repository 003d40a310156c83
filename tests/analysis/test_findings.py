"""The rules that find things, on numbers made to have them."""

from __future__ import annotations

import numpy as np

from sinks.analysis.findings import findings, gaps, home_of
from sinks.analysis.inputs import Condition
from sinks.analysis.measures.massive import Massive, Peak
from sinks.analysis.measures.sink_rate import SinkRate, SinkRates
from sinks.reading.estimate import Estimate


def rate_of(condition: Condition, by_layer: list[float], mass: float = 0.4) -> SinkRate:
    """A condition whose layers have these shares of sink heads."""
    heads = np.repeat(np.array(by_layer)[:, None], 2, axis=1)
    value = float(heads.mean())
    one = Estimate(value, value - 0.01, value + 0.01, 9)
    return SinkRate(
        condition, 9, 64, 0.3, 0, 0.07, heads[:, :, None], np.array([value]), heads, one, value, {0.3: one}, one, (0,),
        Estimate(mass, mass, mass, 9), one, one, heads[:, 0], one,
    )  # fmt: skip


def body_of(norm: list[float], value: list[float], lives: tuple[tuple[int, int], ...]) -> Massive:
    """A residual stream: norms of the first token by depth, value ratios by layer."""
    depths = len(norm)
    largest = np.tile(np.array(norm) * 100, (3, 1))
    ratio = np.array(value)[:, None]
    peaks = tuple(Peak(depth, 0, 507, "<s>", 1.0, 100.0 * norm[depth], norm[depth], 0.0) for depth in range(depths))
    zeros = np.zeros(depths)
    return Massive(
        3, 64, 0, False, largest, np.ones((3, depths)), np.zeros((3, depths), int), np.full((3, depths), 507),
        zeros, np.array(norm), zeros, zeros, ratio, ratio, peaks, lives, zeros,
    )  # fmt: skip


RATES = [0.0, 0.8, 0.7, 0.0, 0.05, 0.9, 1.0]
NORMS = [1.0, 3.0, 8.0, 1.2, 1.0, 170.0, 160.0, 50.0]
VALUES = [1.0, 0.2, 0.2, 0.8, 1.5, 0.3, 0.2]


def test_the_gap_is_found_with_all_three_signatures():
    rates = SinkRates((rate_of(Condition("natural", "none"), RATES),), (), "position", "64 % of heads")
    found = {one.title: one.text for one in findings(rates, {"without BOS": body_of(NORMS, VALUES, ((2, 3), (5, 8)))})}
    gap = found["The sinks pause in layers 3 to 4"]
    assert "The three signatures go and come together" in gap
    assert "up to 1.2 times" in gap and "170 times where layer 5" in gap and "0.80 to 1.50" in gap
    assert found["The sink is bound to the first position"] == "64 % of heads."
    assert "gone after block 2" in found["A massive activation is born in block 1, without BOS"]
    assert "lives to the last block" in found["A massive activation is born again in block 4, without BOS"]
    assert "In 4 of 4 layers" in found["Values drain where sinks are"]
    assert "Sinks without a massive activation" not in found


def test_a_sink_without_a_massive_activation_is_found():
    rates = SinkRates((rate_of(Condition("natural", "first"), [0.6, 0.9, 0.8]),), (), "token", "")
    body = body_of([1.0, 40.0, 60.0, 30.0], [0.9, 0.8, 0.2], ((1, 4),))
    found = {one.title: one.text for one in findings(rates, {"with BOS": body})}
    assert "In layer 0, 60 % of heads pass" in found["Sinks without a massive activation"]
    assert "In 1 of 3 layers" in found["Values drain in few sink layers"]
    assert not any("pause" in title for title in found)


def test_a_gap_of_the_sinks_alone_is_not_said_of_all_three():
    """Gemma's layer 7: no sink heads, but the massive activation and the drain go on."""
    rates = SinkRates((rate_of(Condition("natural", "none"), RATES),), (), "position", "")
    body = body_of([1.0, 20.0, 18.0, 17.0, 16.0, 15.0, 14.0, 9.0], [0.9, 0.2, 0.2, 0.3, 0.3, 0.3, 0.2], ((1, 8),))
    gap = {one.title: one.text for one in findings(rates, {"without BOS": body})}["The sinks pause in layers 3 to 4"]
    assert "The sinks pause alone" in gap and "together" not in gap


def test_gaps_are_inside_only():
    assert gaps(np.array([0.0, 0.0, 0.5, 0.0, 0.2, 0.05, 0.6, 0.0])) == [(3, 3), (5, 5)]
    assert gaps(np.zeros(4)) == []


def test_home_is_where_the_sinks_are():
    away, home = rate_of(Condition("natural", "none"), [0.0]), rate_of(Condition("natural", "first"), [0.8])
    random = rate_of(Condition("random", "first"), [0.9])
    assert home_of(SinkRates((away, home, random), (), "", "")) is home
    assert home_of(SinkRates((random,), (), "", "")) is None


def test_a_repeated_token_without_a_sink_is_said():
    rates = SinkRates((rate_of(Condition("repeated", "none"), [0.0, 0.0], mass=0.058),), (), "none", "0 %")
    texts = [one.text for one in findings(rates, {})]
    assert any("5.8 % of later attention" in text for text in texts)
    assert findings(None, {}) == ()
