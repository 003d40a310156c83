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


@pytest.mark.parametrize(("width", "window"), [(80, 252), (80, 1020), (120, 252)])
def test_it_fits_into_80_columns(width: int, window: int):
    lines = shown(width, window=window)
    assert not any("…" in line for line in lines)
    (header,) = (line for line in lines if line.startswith("arm"))
    assert header.split() == "arm keeps all evict. quarter sinks token cache memory".split()
    assert sum(line.startswith("sweep-") for line in lines) == sum("= " in line for line in lines) + 3
    start = next(index for index, line in enumerate(lines) if line.startswith("dense"))
    names = " ".join(line.split()[0] for line in lines[start : start + 12] if line)
    assert names == "dense window recompute sinks sweep-0 sweep-1 sweep-2 sweep-4 sweep-8 newlines"


def rows(**changes: object) -> dict[str, str]:
    """The first line that begins with each word."""
    return {line.split()[0]: line for line in reversed(shown(**changes)) if line}  # type: ignore[arg-type]


def test_one_line_an_arm():
    lines = rows()
    assert lines["sinks"].split() == "sinks 4 + 252 12.19 12.18 12.07 34.0 11.8 MB 102 MB".split()
    assert lines["window"].split() == "window 0 + 256 24.56 24.53 24.30 2.01x 34.0 11.8 MB 102 MB".split()
    assert lines["sweep-0"].split() == "sweep-0 0 + 256 24.56 24.53 24.30 2.01x = window".split()
    assert lines["sweep-4"].split()[-2:] == ["=", "sinks"]
    assert lines["newlines"].split()[1:4] == [r"4\n", "+", "252"]
    recompute = lines["recompute"].split()
    assert recompute[1:3] == ["256", "fresh"]
    assert all(cell.endswith("*") for cell in recompute[3:6])
    assert recompute[6:] == ["1.00x", "950", "0", "B", "90.0", "MB"]


def test_an_arm_that_stopped_says_so():
    assert "stopped" in rows(limit=1000)["dense"]


def test_few_arms():
    lines = shown(leave_out=("dense", "recompute", "newlines", *(f"sweep-{kept}" for kept in (0, 1, 2, 4, 8))))
    assert [line.split()[0] for line in lines if line.startswith(("window", "sinks"))] == ["window", "sinks"]


def test_no_column_against_sinks_that_were_not_measured():
    heading = next(line for line in shown(leave_out=("sinks", "sweep-4")) if line.startswith("arm"))
    assert "sinks" not in heading
    assert (
        rows(leave_out=("sinks", "sweep-4"))["window"].split()
        == "window 0 + 256 24.56 24.53 24.30 34.0 11.8 MB 102 MB".split()
    )
