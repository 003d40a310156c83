"""The picture: a valid file of a sensible size, with the panels that the arms allow, and no global state."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from matplotlib.axes import Axes

from sinks.evals.arms import SWEEP
from sinks.report.plots import apart, comparison_figure, png
from tests.report.fake import fake_comparison

ALL_SWEPT = tuple(f"sweep-{kept}" for kept in SWEEP)


def check_png(content: bytes) -> tuple[int, int]:
    """Every chunk's checksum, and the size in pixels."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds = 8, []
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        body = content[position + 4 : position + 8 + length]
        (checksum,) = struct.unpack(">I", content[position + 8 + length : position + 12 + length])
        assert zlib.crc32(body) == checksum
        kinds.append(kind)
        position += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_picture():
    content = png(comparison_figure(fake_comparison(), "tiny reads"))
    assert check_png(content) == (1800, 1080)
    assert 50_000 < len(content) < 1_000_000


def test_panels_and_names():
    figure = comparison_figure(fake_comparison(), "tiny reads")
    assert len(figure.axes) == 4
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["Four kept tokens hold the line", "tiny reads"]
    above, memory, time, _ = figure.axes
    assert not any("repeats" in text for text in written(above))
    assert above.get_yscale() == "log"
    assert {"24.5  window only", "12.2  sinks", "10.0  dense", "12.3  line breaks as sinks"} <= written(above)
    assert {"94.3 MB  dense", "11.8 MB  sinks"} <= written(memory)
    assert {"34", "950"} <= written(time)


def written(axes: Axes) -> set[str]:
    """Everything that is written in a panel."""
    return {text.get_text() for text in axes.texts}


@pytest.mark.parametrize(
    ("leave_out", "panels"),
    [
        ((), 4),
        (("dense", "recompute"), 4),
        (ALL_SWEPT, 3),
        (("sweep-8",), 3),
        (("window", "dense", "newlines", *ALL_SWEPT), 3),
        (("sinks", "recompute", "dense", "newlines", *ALL_SWEPT), 3),
        (("sinks", "window", "dense", "newlines", *ALL_SWEPT), 3),
        (("sinks", "window", "dense", "newlines", "recompute"), 4),
    ],
)
def test_any_choice_of_arms(leave_out: tuple[str, ...], panels: int):
    figure = comparison_figure(fake_comparison(leave_out=leave_out), "tiny reads")
    assert len(figure.axes) == panels
    assert check_png(png(figure, dpi=40)) == (480, 288)


@pytest.mark.parametrize("limit", [100, 257, 1000])
def test_a_line_ends_where_its_arm_stopped(limit: int):
    figure = comparison_figure(fake_comparison(limit=limit), "tiny reads")
    dense = next(line for line in figure.axes[0].lines if line.get_color() == "#1a1a1a")
    ys = np.asarray(dense.get_ydata(), float)
    assert np.isnan(ys).any()
    check_png(png(figure, dpi=40))


def test_bins_that_repeat_what_was_let_go_are_shaded():
    figure = comparison_figure(fake_comparison(repeats=slice(1500, 1800)), "tiny reads")
    above = figure.axes[0]
    spans = [patch.get_extents().transformed(above.transData.inverted()) for patch in above.patches]
    assert sorted(round(span.x0) for span in spans) == [1536, 1664]
    assert {round(span.width) for span in spans} == {128}
    assert "the text repeats what the window let go" in written(above)
    check_png(png(figure, dpi=40))


def test_a_thousandfold_collapse_still_has_ticks():
    figure = comparison_figure(fake_comparison({"window": 9.0}), "tiny reads")
    png(figure, dpi=40)
    low, high = figure.axes[0].get_ylim()
    ticks = [tick for tick in figure.axes[0].get_yticks() if low <= tick <= high]
    assert 3 <= len(ticks) <= 12


def test_names_are_moved_apart_as_little_as_needed():
    assert apart([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    close = apart([0.52, 0.5, 0.51], 0.1)
    assert np.diff(sorted(close)) == pytest.approx([0.1, 0.1], abs=1e-5)
    assert np.argsort(close).tolist() == [1, 2, 0]
    assert np.mean(close) == pytest.approx(0.51)


def test_pyplot_is_never_imported():
    program = "import sys, sinks.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
