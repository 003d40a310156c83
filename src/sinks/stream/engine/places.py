"""Who holds which slot: streams come to one, leave it between two steps, and on a GPU may be put away for another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sinks.errors import EngineError, QueueFull
from sinks.stream.engine.request import Stream
from sinks.stream.engine.rows.row import Row
from sinks.stream.engine.schedule import Scheduler


class Places:
    """The streams in slots. `lock` guards the scheduler, as in `Register`; `lost` hears of a stream that cannot be put
    away.

    A stream that leaves while a step runs keeps its seat until that is over: nobody else may be seated under it.
    """

    def __init__(self, scheduler: Scheduler, lock: AbstractContextManager[Any], lost: Callable[[Stream], None]) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self._lost = lost
        self._stepping = threading.RLock()  # the rows; held during a step, and always taken before `lock`
        self._streams: dict[int, Stream] = {}
        self._leavers: list[Row] = []

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """No step runs inside, and afterwards the seats of those who left are free."""
        with self._stepping:
            try:
                yield
            finally:
                self._clear()

    def rows(self) -> list[Row]:
        """The rows in slots."""
        with self._lock:
            return [stream.row for stream in self._streams.values() if stream.row is not None]

    def seat(self, stream: Stream, row: Row) -> None:
        """A stream that the scheduler gave a slot has its row now."""
        with self._lock:
            stream.row, stream.source = row, None
            self._streams[stream.number] = stream

    def bring(self, stream: Stream, row: Row) -> None:
        """Give a new stream a slot at once, between two steps. Raises QueueFull where none is to be had."""
        with self._lock:
            if not self._scheduler.hold(stream.number):
                raise QueueFull(f"all {len(self._scheduler.held)} slots are taken: park a stream, or let one leave")
        try:
            self.make_room()
            row.sit()
        except BaseException:
            self.release(stream)
            raise
        stream.begun = True
        self.seat(stream, row)

    def make_room(self) -> None:
        """Between two steps: whose stream is over gives its seat back, and who lost the slot goes on on the host."""
        with self._lock:
            parting = [self._streams[number] for number in self._scheduler.parting if number in self._streams]
        for stream in parting:
            try:
                self._put_away(stream)
            except Exception as error:
                told = f"this stream could not be put away ({type(error).__name__}: {error}): join() again"
                stream.gone = EngineError(told)
                self._lost(stream)
        self._clear()

    def _put_away(self, stream: Stream) -> None:
        row = stream.row
        assert row is not None  # it is listed
        row.away()
        with self._lock:
            stream.row, stream.source = None, row
            self._streams.pop(stream.number)
            self._scheduler.parted(stream.number)

    def _clear(self) -> None:
        with self._lock:
            leavers, self._leavers = self._leavers, []
        for row in leavers:
            row.stand_up()

    def release(self, stream: Stream) -> None:
        """Free a stream's slot, and its memory once no step runs."""
        with self._lock:
            self._scheduler.leave(stream.number)
            row, stream.row = stream.row, None
            if stream.gone is not None:
                stream.source = None  # it may lie in memory of the host, and nobody comes for it
            if row is not None:
                self._leavers.append(row)
            self._streams.pop(stream.number, None)

    def release_all(self) -> None:
        """Free every slot."""
        with self._lock:
            for stream in list(self._streams.values()):
                self.release(stream)
