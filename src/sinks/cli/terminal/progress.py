"""What commands share of the terminal: how wide a table is, and how far the work has come."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from sinks.types import Listener, Stage

PLAIN_WIDTH = 120
"""Columns of a table when nobody's terminal says how many there are."""

NARROW = 80
"""Columns that our tables fit into. A narrower terminal folds their lines itself, which loses nothing."""


GAP = 3
"""Columns between two columns of a table."""


def table_console(*, stderr: bool = False, plain: int = PLAIN_WIDTH, least: int = NARROW) -> "Console":
    """Where a result is printed: as wide as the terminal but not below `least`, or `plain` where there is none."""
    from rich.console import Console

    console = Console(stderr=stderr)
    console.width = max(console.width, least) if console.is_terminal else plain
    return console


def print_rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of plain text on standard output where it has room without breaking a word; else entry below entry."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    widths = widths_within(list(zip(titles, *rows, strict=True)), console.width - GAP * (len(titles) - 1))
    if widths is None:
        for name, *others in rows:
            told = [f"  {title}: {cell}" for title, cell in zip(titles[1:], others, strict=True) if cell]
            console.print(Text("\n".join([name, *told, ""]), overflow="fold"))
        return
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for title, width in zip(titles, widths, strict=True):
        table.add_column(title, width=width)
    for row in rows:
        table.add_row(*map(Text, row))  # as plain text: a reason may hold square brackets
    console.print(table, Text())


def widths_within(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Widths for columns of cells, the first without a line break, the others with none inside a word.

    None if they do not fit into `room`. What is left over goes to whoever lacks most.
    """
    full = [max(map(len, cells)) for cells in columns]
    least = [max((len(word) for cell in cells for word in cell.split()), default=1) for cells in columns]
    widths = [full[0], *least[1:]]
    if sum(widths) > room:
        return None
    for _ in range(min(room, sum(full)) - sum(widths)):
        neediest = max(range(len(widths)), key=lambda index: full[index] - widths[index])
        widths[neediest] += 1
    return widths


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
