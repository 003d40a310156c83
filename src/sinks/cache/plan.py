"""Which tokens stay, and in which slot: integers only, so that it can be tested to exhaustion.

A stream counts its tokens from 0. The first `sinks` stay for ever in the first slots; the others share `window` slots
as a ring, each overwriting the one that has just left the window. Slot order means nothing to softmax, so nothing is
ever moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sinks.errors import InvalidInput


def check_whole(name: str, value: int, least: int) -> None:
    """Raise InvalidInput unless `value` is a whole number of at least `least`."""
    if type(value) is not int:
        raise InvalidInput(f"{name}={value!r} is not a whole number")
    if value < least:
        raise InvalidInput(f"{name}={value} is too small: give {least} or more")


@dataclass(frozen=True)
class Plan:
    """`sinks` first tokens and `window` most recent ones, the current one included."""

    sinks: int
    window: int

    def __post_init__(self) -> None:
        check_whole("sinks", self.sinks, least=0)
        check_whole("window", self.window, least=1)

    @property
    def capacity(self) -> int:
        """The most keys that are ever held."""
        return self.sinks + self.window

    def slot(self, position: int) -> int:
        """Where the token at this stream position is kept while it is kept."""
        if position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % self.window

    def occupant(self, slot: int, seen: int) -> int:
        """The stream position held by a slot after `seen` tokens, or -1."""
        if slot >= seen:
            return -1
        if slot < self.sinks:
            return slot
        return slot + (seen - 1 - slot) // self.window * self.window

    def filled(self, seen: int) -> int:
        """How many slots are in use after `seen` tokens: always the first ones."""
        return min(seen, self.capacity)

    def cache_position(self, position: int) -> int:
        """Where the newest token stands inside the cache (StreamingLLM, section 3.2)."""
        return min(position, self.capacity - 1)

    def visible(self, seen: int) -> list[int]:
        """Stream positions that the newest of `seen` tokens sees, in order."""
        first_recent = max(self.sinks, seen - self.window)
        return [*range(min(self.sinks, seen)), *range(first_recent, seen)]

    def evicted(self, seen: int) -> int:
        """How many of `seen` tokens are gone for ever."""
        return max(0, seen - self.capacity)

    def blocks(self, columns: int, largest: int) -> Iterator[slice]:
        """Cut a chunk into blocks, none longer than the window.

        Inside such a block every earlier token is still in every later one's window, so a block needs no eviction
        of its own, and a sink that arrives in it stands at its true distance.
        """
        size = min(self.window, largest)
        for begin in range(0, columns, size):
            yield slice(begin, min(begin + size, columns))
