"""How long work says how far it is: a small protocol, and a bar for terminals."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called while long work goes on, from the thread that does the work."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Report `done` of `total` bytes of `step`; `total` is 0 while it is unknown."""
        ...


def silent(step: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


@contextmanager
def reporting(progress: Progress | None) -> Iterator[Progress]:
    """The caller's own `progress`, or a bar on standard error when that is a terminal, or silence."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        with terminal_bar() as bar:
            yield bar
    else:
        yield silent


@contextmanager
def terminal_bar() -> Iterator[Progress]:
    """A `Progress` that draws one rich bar a step on standard error; nothing is drawn before the first report."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TimeElapsedColumn(),
    )
    # The stream itself, not `stderr=True`: the bar must survive while somebody redirects `sys.stderr`.
    display = bars.Progress(*columns, console=Console(file=sys.stderr))
    tasks: dict[str, bars.TaskID] = {}

    def report(step: str, done: int, total: int) -> None:
        if step not in tasks:
            display.start()
            tasks[step] = display.add_task(step, total=None)
        display.update(tasks[step], completed=done, total=total or None)

    try:
        yield report
    finally:
        display.stop()
