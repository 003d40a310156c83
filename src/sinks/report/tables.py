"""The table that a comparison prints."""

from __future__ import annotations

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sinks.evals.compare import Arm, Comparison
from sinks.evals.contenders import Recompute
from sinks.report.words import decimal, notes, reading, size

VERSUS = "vs\nsinks"
COLUMNS = ("all", "after\nevict.", "last\nquarter", VERSUS, "ms a\ntoken", "cache", "peak\nmemory")
"""Headings after the arm and what it keeps, narrow enough for 80 columns; the first three are perplexities."""


def comparison_table(comparison: Comparison, title: str) -> Table:
    """One row an arm; an arm that repeats another one's setting names it instead of repeating its costs."""
    caption = Text(title, style="bold")  # as it is: a name may hold what rich would take for markup
    table = Table(title=caption, title_justify="left", title_style="", header_style="bold", box=None, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    table.add_column("keeps", no_wrap=True)
    against = "sinks" in comparison.arms
    for name in COLUMNS:
        if against or name != VERSUS:
            table.add_column(name, justify="right")
    previous = ""
    for arm in comparison.arms.values():
        group = arm.name.partition("-")[0]
        if previous and group != previous and "sweep" in (group, previous):
            table.add_row()
        table.add_row(*row(comparison, arm), style=style(arm))
        previous = group
    return table


def row(comparison: Comparison, arm: Arm) -> list[str]:
    """The cells of one arm."""
    name, repeats = arm.name, arm.measured_as != arm.name
    sampled = "*" if isinstance(arm.contender, Recompute) else ""
    stopped = arm.contender.stops_at(comparison.tokens) is not None
    ratio = comparison.ratio(name, "sinks")
    against = f"{ratio.value:.2f}x" if ratio and arm.measured_as != "sinks" else ""
    perplexities = [
        decimal(comparison.perplexity(name, comparison.everywhere)) + sampled,
        decimal(comparison.perplexity(name, comparison.after_eviction)) + sampled,
        "stopped" if stopped else decimal(comparison.perplexity_last_quarter(name)) + sampled,
        *([against] if "sinks" in comparison.arms else []),
    ]
    costs = [milliseconds(arm), size(arm.cache_bytes), size(arm.peak_bytes)]
    return [name, arm.contender.keeps, *perplexities, *(["", "", f"= {arm.measured_as}"] if repeats else costs)]


def milliseconds(arm: Arm) -> str:
    """An arm's latency with three figures that matter."""
    return f"{arm.score.latency:,.{1 if arm.score.latency < 100 else 0}f}"


def style(arm: Arm) -> str:
    """The one arm that this library is about stands out; repetitions stand back."""
    if arm.measured_as != arm.name:
        return "dim"
    return "bold" if arm.name == "sinks" else ""


def summary(comparison: Comparison, title: str) -> Group:
    """Table, notes and the reading in words, for one `print` of a rich console."""
    return Group(
        Padding(comparison_table(comparison, title), (1, 0, 0, 0)),
        Padding(Text("\n".join(notes(comparison)), style="dim"), (1, 0)),
        Text(reading(comparison)),
    )
