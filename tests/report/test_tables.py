"""The table, as a terminal shows it."""

import io

import pytest
from rich.console import Console

from sinks.report.tables import summary
from tests.report.fake import fake_comparison


def shown(width: int = 80, **changes: object) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary(fake_comparison(**changes), "tiny reads"))  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_into_80_columns(width: int):
    lines = shown(width)
    assert not any("…" in line for line in lines)
    assert "arm        keeps          all  evict.  quarter  sinks  token    cache    memory" in [
        line.rstrip() for line in lines
    ]
    start = next(index for index, line in enumerate(lines) if line.startswith("dense"))
    names = [line.split()[0] for line in lines[start : start + 12] if line]
    assert names == ["dense", "window", "recompute", "sinks", *(f"sweep-{kept}" for kept in (0, 1, 2, 4, 8)), "newlines"]


def test_one_line_an_arm():
    lines = {line.split()[0]: line for line in shown() if line}
    assert lines["sinks"].split() == "sinks 4 + 252 12.17 12.17 12.07 34.0 11.8 MB 102 MB".split()
    assert lines["window"].split() == "window 0 + 256 24.50 24.50 24.30 2.01x 34.0 11.8 MB 102 MB".split()
    assert lines["sweep-0"].split() == "sweep-0 0 + 256 24.50 24.50 24.30 2.01x = window".split()
    assert lines["sweep-4"].split()[-2:] == ["=", "sinks"]
    assert lines["newlines"].split()[1:5] == [r"4", r"\n", "+", "252"]
    recompute = lines["recompute"].split()
    assert recompute[1:3] == ["256", "fresh"]
    assert all(cell.endswith("*") for cell in recompute[3:6])
    assert recompute[6:] == ["1.00x", "950", "0", "B", "90.0", "MB"]


def test_an_arm_that_stopped_says_so():
    lines = {line.split()[0]: line for line in shown(limit=1000) if line}
    assert "stopped" in lines["dense"]


def test_few_arms():
    lines = shown(leave_out=("dense", "recompute", "newlines", *(f"sweep-{kept}" for kept in (0, 1, 2, 4, 8))))
    assert [line.split()[0] for line in lines if line.startswith(("window", "sinks"))] == ["window", "sinks"]
