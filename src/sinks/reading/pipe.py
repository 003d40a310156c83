"""Lines out of a pipe that never ends, and which of them are unusual: both in memory that does not grow.

Bytes become lines whatever they are: an encoding that is broken, a line without end, no last line break. How unusual a
line is says a robust z-score: how far its surprise is above the median of the lines before it, in units of their usual
distance from it. A median and not a mean, so that the unusual lines of the past do not hide the next one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sinks.errors import InvalidInput

LONGEST = 4096
"""Bytes of a line that are read in one piece: a longer one comes in parts."""

NORMAL = 1.4826
"""Standard deviations in the median distance from the median, if numbers are normally distributed."""


@dataclass(frozen=True)
class Line:
    """A line, or a part of one longer than `LONGEST` bytes: lines and their parts count from 1.

    `ends` is whether its line break was read. Bytes that are no UTF-8 are U+FFFD.
    """

    number: int
    part: int
    text: str
    ends: bool

    @property
    def fed(self) -> str:
        """What a stream reads of it."""
        return self.text + "\n" if self.ends else self.text


class Lines:
    """Cuts bytes into lines as they come; holds back less than one part of a line."""

    def __init__(self, longest: int = LONGEST) -> None:
        if longest < 4:
            raise InvalidInput(f"longest={longest}: a part has at least 4 bytes, or no character fits")
        self.longest = longest
        self._held = bytearray()
        self._number, self._part = 1, 1

    def push(self, data: bytes) -> list[Line]:
        """The lines, and parts of lines, that are complete with `data`."""
        self._held += data
        found, begin = [], 0
        while True:
            at = self._held.find(b"\n", begin, begin + self.longest + 1)
            if at >= 0:
                found.append(self._line(self._held[begin:at].removesuffix(b"\r"), ends=True))
                begin = at + 1
            elif len(self._held) - begin > self.longest:
                at = self._boundary(begin + self.longest)
                found.append(self._line(self._held[begin:at], ends=False))
                begin = at
            else:
                break
        del self._held[:begin]
        return found

    def finish(self) -> list[Line]:
        """The last line, if no line break ended it."""
        left, self._held = self._held, bytearray()
        return [self._line(left, ends=False)] if left else []

    def _boundary(self, end: int) -> int:
        """The end of the last whole character before `end`, if there is UTF-8."""
        for at in range(end, end - 4, -1):
            if self._held[at] & 0xC0 != 0x80:
                return at
        return end

    def _line(self, data: bytes | bytearray, ends: bool) -> Line:
        line = Line(self._number, self._part, data.decode("utf-8", "replace"), ends)
        self._number, self._part = (self._number + 1, 1) if ends else (self._number, self._part + 1)
        return line


@dataclass(frozen=True)
class Rule:
    """When a line is unusual, among the last `past` lines, and never before there are `warm_up` of them.

    Both must hold: z = (surprise - median) / max(1.4826 * median distance from the median, `floor`) is at least
    `threshold`, and at most a share `rare` of those lines is as surprising. The floor keeps a log of equal lines from
    flagging every comma; the share, a log of two kinds of lines from flagging all of the rarer kind.
    """

    threshold: float = 4.0
    past: int = 512
    warm_up: int = 64
    floor: float = 0.25
    rare: float = 0.01

    def __post_init__(self) -> None:
        for name in ("threshold", "floor"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name}={getattr(self, name)}: give a number above 0")
        if not 0 <= self.rare <= 1:
            raise InvalidInput(f"rare={self.rare}: give a share from 0 to 1")
        if not 2 <= self.warm_up <= self.past:
            given = f"warm_up={self.warm_up}, past={self.past}"
            raise InvalidInput(f"{given}: warm up for 2 lines at least, and for no more than the past")


@dataclass(frozen=True)
class Verdict:
    """A line among the lines before it; `z` is None, and the line not unusual, where they are too few."""

    z: float | None
    unusual: bool


class Usual:
    """What has been usual lately: the surprise of the last lines, in order of arrival and of size."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._past: deque[float] = deque()
        self._sorted: list[float] = []

    def judge(self, surprise: float) -> Verdict:
        """A new line among the lines before it, which it then joins."""
        verdict = self._verdict(surprise) if len(self._past) >= self.rule.warm_up else Verdict(None, False)
        if len(self._past) == self.rule.past:
            del self._sorted[bisect_left(self._sorted, self._past.popleft())]
        self._past.append(surprise)
        insort(self._sorted, surprise)
        return verdict

    def _verdict(self, surprise: float) -> Verdict:
        z = self._z(surprise)
        as_surprising = len(self._sorted) - bisect_left(self._sorted, surprise)
        return Verdict(z, z >= self.rule.threshold and as_surprising <= self.rule.rare * len(self._sorted))

    def _z(self, surprise: float) -> float:
        middle = _middle(self._sorted)
        spread = NORMAL * median(abs(each - middle) for each in self._sorted)
        return (surprise - middle) / max(spread, self.rule.floor)


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
