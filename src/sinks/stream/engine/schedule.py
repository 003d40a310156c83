"""Who is admitted, who reads and who writes: whole numbers only, so that fairness can be tested without a model.

The rules:

1. Requests are admitted in the order of their submission. One whose stream holds a slot needs no other; one whose
   stream is busy with an earlier request waits for that, and holds up nobody else.
2. Every writer writes one token at every turn.
3. Readers take turns: at every turn the one that has waited longest reads at most `chunk` tokens, and what is left of
   the chunk goes to the next. So a turn costs no writer more than one chunk, however long the prompts are.
4. A slot is held from a stream's first request until it leaves. With `parks`, a stream that is at rest may lose it:
   where one that waits for its turn finds none, the stream that has rested longest is put away, first one for which
   no request waits. Its own next request waits for a slot again, in its turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sinks.cache.plan import check_whole
from sinks.errors import QueueFull

LEAST = 32
"""Tokens that a read is charged at least: below that, reading the weights is what a pass costs."""


@dataclass(frozen=True)
class Turn:
    """What one step does: `reads` are (request, tokens), each once; `writers` are requests, each one token."""

    reads: tuple[tuple[int, int], ...]
    writers: tuple[int, ...]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.reads and not self.writers


class Scheduler:
    """Requests and the streams they belong to, by number; `slots` streams at once, `queue` requests waiting at most."""

    def __init__(self, slots: int, queue: int, chunk: int, parks: bool = False) -> None:
        for name, value in (("slots", slots), ("queue", queue), ("chunk", chunk)):
            check_whole(name, value, least=1)
        self.slots, self.queue, self.chunk = slots, queue, chunk
        self.parks = parks
        self.held: set[int] = set()
        self.parting: dict[int, None] = {}
        self._rests: dict[int, None] = {}  # streams in slots, the one that was used last comes last
        self._waiting: dict[int, int] = {}  # request -> stream, in order of submission
        self._running: dict[int, int] = {}  # request -> stream, admitted
        self._admitted: dict[int, None] = {}  # running, and not begun
        self._unread: dict[int, int] = {}  # reader -> tokens left to read
        self._readers: deque[int] = deque()
        self._writers: dict[int, None] = {}

    parting: dict[int, None]
    """Streams that lost their slot to another one: put each away, and say so with `parted`, before anybody begins."""

    def submit(self, request: int, stream: int) -> None:
        """Queue a request. Raises QueueFull."""
        if len(self._waiting) >= self.queue:
            raise QueueFull(f"{self.queue} requests wait already: try again when some are over, or give a larger queue")
        self._waiting[request] = stream

    def admit(self) -> tuple[int, ...]:
        """Give slots to those whose turn it is; returns everybody who was admitted and not begun: `begin` each."""
        busy = set(self._running.values())
        for request, stream in list(self._waiting.items()):
            if stream in busy or not self.hold(stream):
                continue
            busy.add(stream)
            self._running[request] = self._waiting.pop(request)
            self._admitted[request] = None
        return tuple(self._admitted)

    def hold(self, stream: int) -> bool:
        """Give a stream a slot, if there is one for it or it has one; it then counts as just used."""
        if stream not in self.held and len(self.held) >= self.slots:
            longest = self._longest_at_rest() if self.parks else None
            if longest is None:
                return False
            self.leave(longest)
            self.parting[longest] = None
        self.held.add(stream)
        self._used(stream)
        return True

    def _longest_at_rest(self) -> int | None:
        busy, asked = set(self._running.values()), set(self._waiting.values())
        resting = [stream for stream in self._rests if stream not in busy]
        return next((stream for stream in resting if stream not in asked), next(iter(resting), None))

    def _used(self, stream: int) -> None:
        if stream in self.held:
            self._rests.pop(stream, None)
            self._rests[stream] = None

    def parted(self, stream: int) -> None:
        """A stream of `parting` was put away. It may hold another slot by now."""
        self.parting.pop(stream, None)

    def begin(self, request: int, tokens: int) -> None:
        """An admitted request has `tokens` to read before it writes."""
        del self._admitted[request]
        if tokens:
            self._unread[request] = tokens
            self._readers.append(request)
        else:
            self._writers[request] = None

    def turn(self, may_write: Callable[[int], bool]) -> Turn:
        """Who reads and who writes now; those who have nothing more to read write from the next turn on."""
        writers = tuple(request for request in self._writers if may_write(request))
        reads, budget = list[tuple[int, int]](), self.chunk
        for _ in range(len(self._readers)):
            if budget <= 0:
                break
            request = self._readers.popleft()
            count = min(self._unread[request], budget)
            budget -= max(count, LEAST)
            reads.append((request, count))
            self._unread[request] -= count
            if self._unread[request]:
                self._readers.append(request)
            else:
                del self._unread[request]
                self._writers[request] = None
        return Turn(tuple(reads), writers)

    def finish(self, request: int) -> None:
        """This request is over, wherever it was; its stream keeps its slot."""
        self._waiting.pop(request, None)
        stream = self._running.pop(request, None)
        if stream is not None:
            self._used(stream)
        self._admitted.pop(request, None)
        self._writers.pop(request, None)
        if self._unread.pop(request, None) is not None:
            self._readers.remove(request)

    def reserve(self, request: int, stream: int) -> None:
        """Keep the requests of an idle stream waiting until `finish(request)`."""
        self._running[request] = stream

    def leave(self, stream: int) -> None:
        """Give the slot of a stream back."""
        self.held.discard(stream)
        self._rests.pop(stream, None)
        self.parting.pop(stream, None)

    def busy(self, stream: int) -> bool:
        """Whether a request of this stream is admitted and not over."""
        return stream in self._running.values()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests are admitted and not over."""
        return len(self._running)
