"""The parts of a page: grids, hover texts, numbers in words."""

import re

import numpy as np
import pytest

from sinks.report.scan.charts import Axis, Line, by_cell_or_column, curves, figures, steps
from sinks.report.scan.markup import MOST_CELLS, Key, runs, svg
from sinks.report.scan.words import stretches


def test_runs_cover_exactly_the_chosen_cells():
    chosen = np.random.default_rng(0).random((7, 11)) < 0.5
    covered = np.zeros_like(chosen)
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", runs(chosen)):
        assert not covered[int(y), int(x) : int(x) + int(width)].any()
        covered[int(y), int(x) : int(x) + int(width)] = True
    np.testing.assert_array_equal(covered, chosen)


def test_steps():
    values = np.array([[0.0, 0.04999, 0.05, 1.0, 2.0, -1.0, np.nan]])
    assert steps(values, 0, 1).tolist() == [[0, 0, 1, 19, 19, 0, -1]]


def test_too_many_cells_speak_by_column():
    few, many = np.full((3, 4), 0.5), np.full((40, MOST_CELLS // 40 + 1), 0.5)
    many[7, 2], many[:, 3] = 0.9, np.nan
    assert by_cell_or_column(few)[1][2] == "layer 1, head 2: 0.500"
    told = by_cell_or_column(many)
    assert told[2] == "layer 2: mean 0.510, most 0.900 at head 7" and told[3] == "layer 3: not measured"


def test_a_hover_text_stands_where_its_point_is():
    line = Line(Key("a", "blue"), np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.5, 1.0]))
    drawing = curves("one", Axis("layer"), Axis("", percent=True), [line])
    text = svg(drawing, "")
    spots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5"><title>(.*?)</title>', text)
    assert [words for _, _, words in spots] == ["a, layer 0: 0.0 %", "a, layer 1: 50.0 %", "a, layer 2: 100.0 %"]
    path = re.search(r'<path d="M ([\d.]+) ([\d.]+) +L ([\d.]+) ([\d.]+) +L ([\d.]+) ([\d.]+) *"[^>]*--blue', text)
    assert path is not None
    drawn = np.array(path.groups(), float).reshape(3, 2)
    np.testing.assert_allclose(drawn, np.array([spot[:2] for spot in spots], float), atol=0.11)


@pytest.mark.parametrize(("numbers", "words"), [([], ""), ([3], "3"), ([0, 1], "0, 1"), ([0, 1, 2, 5], "0 to 2, 5")])
def test_stretches(numbers: list[int], words: str):
    assert stretches(numbers) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0.000"),
        (0.00966, "0.00966"),
        (1.06312, "1.063"),
        (12.34, "12.34"),
        (540365.3, "540,365"),
        (1.3e7, "1.30e+07"),
    ],
)
def test_figures(value: float, words: str):
    assert figures(value) == words
