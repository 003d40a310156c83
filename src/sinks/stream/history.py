"""Which tokens of a stream are visible, by their ids: the first few, the last few, and a count of the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from sinks.cache.plan import Plan
from sinks.errors import InvalidInput

Listen = Callable[[int, list[int]], None]
"""Hears what is let go: the stream position of the first token, and the ids, in order."""


class History:
    """The ids of the visible tokens of one row, and how many there have been; constant size.

    `seen` is a Python integer: it never overflows.
    """

    def __init__(self, plan: Plan, on_evict: Listen | None = None) -> None:
        if on_evict is not None and not callable(on_evict):
            raise InvalidInput(f"on_evict={on_evict!r}: give a function of a position and a list of ids, or None")
        self.plan = plan
        self.on_evict = on_evict
        self.seen = 0
        self.first: list[int] = []
        self.recent: deque[int] = deque(maxlen=plan.window)

    def extend(self, ids: Sequence[int]) -> None:
        """These tokens arrive; what leaves the window is told once everything is in its place."""
        if len(ids) == 1 and not self.on_evict and self.seen >= self.plan.sinks:  # a decode step has no time to lose
            self.recent.append(ids[0])
            self.seen += 1
            return
        begin = self.plan.sinks + self.evicted
        arriving = ids[max(0, self.plan.sinks - self.seen) :]
        leaving = max(0, len(self.recent) + len(arriving) - self.plan.window)
        gone = [*islice(self.recent, leaving), *arriving[: max(0, leaving - len(self.recent))]] if self.on_evict else []
        self.first.extend(ids[: len(ids) - len(arriving)])
        self.recent.extend(arriving)
        self.seen += len(ids)
        if self.on_evict and gone:
            self.on_evict(begin, gone)

    @property
    def evicted(self) -> int:
        """How many tokens are gone for ever."""
        return self.plan.evicted(self.seen)

    @property
    def newest(self) -> int | None:
        """The last token to arrive."""
        return self.recent[-1] if self.recent else self.first[-1] if self.first else None

    def last(self, count: int) -> list[int]:
        """The newest `count` visible tokens, oldest first; all if there are fewer."""
        recent = list(islice(self.recent, max(0, len(self.recent) - count), None))
        missing = count - len(recent)
        return self.first[max(0, len(self.first) - missing) :] + recent if missing > 0 else recent

    @property
    def spans(self) -> list[tuple[int, list[int]]]:
        """Runs of visible tokens without a gap: the stream position of the first, and the ids."""
        if not self.seen:
            return []
        if not self.evicted:
            return [(0, [*self.first, *self.recent])]
        runs = [(0, list(self.first)), (self.seen - len(self.recent), list(self.recent))]
        return [run for run in runs if run[1]]

    def adopt(self, other: History) -> None:
        """Become what another history is; whoever listens goes on listening."""
        self.plan, self.seen, self.first, self.recent = other.plan, other.seen, other.first, other.recent

    def fork(self, on_evict: Listen | None = None) -> History:
        """The same history, to go its own way, with a listener of its own."""
        twin = History(self.plan, on_evict)
        twin.seen, twin.first, twin.recent = self.seen, list(self.first), self.recent.copy()
        return twin
