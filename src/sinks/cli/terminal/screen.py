"""What a person sees: the answer as it comes, a line about the stream, notes; or plain text where nobody looks."""

import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinks.stream.session import Session

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Standard output. `lively` is a person at a terminal; else answers are plain text, and notes go to standard error.

    Colours follow the terminal; none, nor anything else but text, with NO_COLOR set.
    """

    def __init__(self, lively: bool) -> None:
        from rich.console import Console

        self.lively = lively
        self.colours = None if os.environ.get("NO_COLOR") else "auto"
        self._console = Console(highlight=False, color_system=self.colours)
        self._terminal = sys.stdout.isatty()

    def piece(self, text: str) -> None:
        """Part of an answer, at once. A terminal gets no control characters: a model must not move its cursor."""
        sys.stdout.write(_CONTROL.sub("\ufffd", text) if self._terminal else text)
        sys.stdout.flush()

    def line(self, text: str = "") -> None:
        """A line that was asked for."""
        self.piece(f"{text}\n")

    def note(self, text: str) -> None:
        """A line that was not asked for."""
        if self.lively:
            from rich.text import Text

            self._console.print(Text(_CONTROL.sub("\ufffd", text), style="dim"), soft_wrap=True)
        else:
            print(text, file=sys.stderr)

    def status(self, session: "Session", rate: float | None) -> None:
        """Where the stream stands, in one line, cut to what the terminal has room for; a person at a terminal only."""
        if self.lively:
            self.note(fitted(status(session, rate), self._console.width))


def status(session: "Session", rate: float | None) -> list[str]:
    """Tokens seen, tokens visible, bytes of keys and values, tokens a second: the most important first."""
    parts = [
        f"{counted(session.seen, 'token')} seen",
        f"{session.visible.tokens:,} visible",
        f"{session.nbytes / 1e6:,.1f} MB cache",
    ]
    return parts if rate is None else [*parts, f"{rate:.1f} tokens/s"]


def counted(number: int, noun: str) -> str:
    """A number and what it counts: `1 line`, `2,000 lines`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def fitted(parts: list[str], width: int) -> str:
    """As many parts as fit into `width` columns, one at least."""
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts = parts[:-1]
    return " · ".join(parts)
