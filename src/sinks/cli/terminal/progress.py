"""What commands share of the terminal: how wide a table is, and how far the work has come."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinks.types import Listener, Stage

PLAIN_WIDTH = 120
"""Columns of a table when nobody's terminal says how many there are."""


@contextmanager
def progress_bars() -> Iterator["Stage"]:
    """One bar a stage on standard error while it is a terminal; nothing otherwise."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description:10}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:

        def stage(name: str, work: int) -> "Listener":
            task = display.add_task(name, total=work)
            return lambda count: display.advance(task, count)

        yield stage
