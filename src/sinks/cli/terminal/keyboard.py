"""What a person says: lines typed at a terminal, or lines of a pipe, each one message."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module

PROMPT = "> "
MORE = ". "
QUOTES = '"""'


def piped(lines: Iterable[str]) -> Iterator[str]:
    """One message a line; empty lines are none."""
    for line in lines:
        if line.strip():
            yield line.rstrip("\r\n")


def typed(note: Callable[[str], None], read: Callable[[str], str] = input) -> Iterator[str]:
    """Messages as they are typed, until Ctrl-D, or Ctrl-C twice at the prompt; `note` tells about the first.

    A message of several lines has a backslash at the end of each but the last, or stands between triple quotes.
    """
    with contextlib.suppress(ImportError):  # not on every system
        import_module("readline")  # lines can be edited, and earlier ones recalled, for as long as the program runs
    interrupted = False
    while True:
        try:
            message = _message(read)
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            if interrupted:
                return
            interrupted = True
            note("Ctrl-C again, or Ctrl-D, leaves")
            continue
        interrupted = False
        if message.strip():
            yield message


def _message(read: Callable[[str], str]) -> str:
    line = read(PROMPT)
    if line.lstrip().startswith(QUOTES):
        return _quoted(line.lstrip().removeprefix(QUOTES), read)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(MORE))
    return "\n".join(lines)


def _quoted(first: str, read: Callable[[str], str]) -> str:
    """Lines until one that ends with the quotes; the quotes are no part of it, nor an empty line beside them."""
    lines = [first]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read(MORE))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip("\n")
