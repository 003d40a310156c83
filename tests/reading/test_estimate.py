"""Means over texts and their intervals."""

import math

import numpy as np
import pytest

from sinks.reading.estimate import estimate, exponential, ratio_of_means


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        found = estimate(generator.normal(1.0, 2.0, size=60), seed=trial)
        inside += found.low <= 1.0 <= found.high
    assert 0.90 < inside / 300 < 0.99


def test_texts_without_the_measure_are_left_out():
    found = estimate(np.array([1.0, np.nan, 3.0]))
    assert (found.value, found.texts) == (2.0, 2)
    assert 1.0 <= found.low <= 2.0 <= found.high <= 3.0


@pytest.mark.parametrize("values", [[], [5.0]])
def test_one_text_gives_no_interval(values: list[float]):
    found = estimate(np.array(values))
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.value == 5.0 if values else math.isnan(found.value)


def test_a_ratio_of_means_is_not_a_mean_of_ratios():
    found = ratio_of_means(np.array([1.0, 30.0]), np.array([1.0, 10.0]))
    assert found.value == pytest.approx(31 / 11)
    assert (found.low, found.high) == (1.0, 3.0)


def test_exponential_keeps_the_order():
    found = exponential(estimate(np.array([0.1, 0.2, 0.4])))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(math.exp(0.7 / 3))
