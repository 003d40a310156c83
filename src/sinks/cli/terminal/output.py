"""The standard streams of a process: what they cannot write does not end a command, and what ends it is named."""

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from sinks.errors import InvalidInput, OutputLost

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Out(io.FileIO):
    """Standard output itself, so that a write that fails is known from a file's that fails."""

    def write(self, data: "ReadableBuffer", /) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:  # no mishap: the reader, `head` say, has seen enough
            raise
        except OSError as error:
            why = error.strerror or str(error)
            raise OutputLost(f"standard output cannot be written ({why}): make room, or send it elsewhere") from error


def open_streams() -> None:
    """Make the standard streams of this process ours: once, at its beginning."""
    if sys.stderr is None:  # whoever closed it wants to hear nothing, and the next file must not get its number
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    before = sys.stdout
    if isinstance(before, io.TextIOWrapper):
        buffered = io.BufferedWriter(_Out(before.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(buffered, before.encoding, before.errors, line_buffering=before.line_buffering)


def check_output() -> None:
    """Raises InvalidInput where there is no standard output; what it cannot encode will be written as `?`.

    The second goes for every command: a locale that knows ASCII only must not cost anybody a summary.
    """
    if sys.stdout is None:
        raise InvalidInput("standard output is closed, and what was asked for is written there: send it to a file")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def give_up(stream: TextIO | None) -> None:
    """Let go what is still buffered for a stream that takes no more, or Python tries again when it ends."""
    with suppress(OSError, ValueError, AttributeError):  # a stand-in for a stream has no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def tell_person(line: str) -> None:
    """A line on standard error; where nobody can be told any more, as after a terminal was closed, it is not."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)
