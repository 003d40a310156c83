"""Any order of joining, asking, stepping, cancelling, forking, parking, resuming and leaving, against plain lists.

The tokens of each stream are noted after every step, as they come into sight; from then on what is visible must be what
the list says, and what is expected next must be what a fresh session that has read the list expects.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from torch import Tensor

from sinks.errors import EngineError, QueueFull
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.request import Request, Stream
from sinks.stream.engine.rows import row as room
from sinks.stream.engine.rows.row import Row
from sinks.stream.session import Session
from tests.stream.opened import SINKS, WINDOW, opened, tiny_loaded
from tests.stream.test_session_stateful import IDS, SAMPLING, STOPS

SLOTS = 3


class Held:
    """A stream of the engine, all its tokens so far, and the file it is parked in, if it is."""

    def __init__(self, stream: Stream, ids: list[int]) -> None:
        self.stream = stream
        self.ids = ids
        self.parked: Path | None = None
        self.requests: list[Request] = []
        self.gone = False

    def catch_up(self) -> None:
        """Note what the engine read and wrote since, from what is visible; called after every step."""
        row = self.stream.moment
        if row is None:
            return
        seen = {start + n: token for start, ids in row.history.spans for n, token in enumerate(ids)}
        self.ids += [seen[position] for position in range(len(self.ids), row.history.seen)]

    @property
    def busy(self) -> bool:
        return any(request.finish is None for request in self.requests)


class Engines(RuleBasedStateMachine):
    """One engine with few slots and a short queue, and sessions of the same model beside it."""

    streams = Bundle("streams")
    seats = False
    """Whether slots are seats of a pool, as on a GPU: a stream at rest is put away for one that needs its slot."""

    @initialize()
    def begin(self) -> None:
        self.takes_seats, room.takes_seats = room.takes_seats, lambda model: self.seats
        self.folder = tempfile.TemporaryDirectory()
        self.engine = Engine(tiny_loaded(), SLOTS, SINKS, WINDOW, queue=4, chunk=5)
        self.all: list[Held] = []
        self.files = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()
            room.takes_seats = self.takes_seats

    @property
    def full(self) -> bool:
        scheduler = self.engine._register.scheduler
        return self.engine.held == SLOTS and not (self.seats and any(not scheduler.busy(n) for n in scheduler.held))

    def held(self, stream: Stream, ids: list[int]) -> Held:
        self.all.append(Held(stream, ids))
        return self.all[-1]

    @rule(target=streams, ids=IDS, from_session=st.booleans())
    def join(self, ids: list[int], from_session: bool) -> Held:
        if not from_session:
            return self.held(self.engine.join(), [])
        session = opened()
        session.feed(ids)
        if self.full:
            with pytest.raises(QueueFull):
                self.engine.join(session)
            return multiple()  # type: ignore[return-value]
        return self.held(self.engine.join(session), list(ids))

    @rule(held=streams, ids=IDS, count=st.integers(0, 12), sampling=SAMPLING, stop=STOPS)
    def ask(self, held: Held, ids: list[int], count: int, sampling: object, stop: tuple[str, ...]) -> None:
        if held.gone:
            with pytest.raises(EngineError, match="has left"):
                held.stream.submit(ids or [1])
            return
        waiting = self.engine.waiting
        try:
            request = held.stream.submit(ids or [1], max_tokens=count, sampling=sampling, stop=stop)  # type: ignore[arg-type]
        except QueueFull:
            assert waiting == 4
        else:
            held.requests.append(request)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            present = [held for held in self.all if held.stream.row is not None]
            self.engine.step()
            for held in present:
                assert held.stream.seen - len(held.ids) <= 6, "a step reads one chunk of 5 and writes one token"
            for held in self.all:
                if held.stream.row is not None:
                    held.parked = None
                held.catch_up()

    @rule(held=streams)
    def cancel(self, held: Held) -> None:
        for request in held.requests:
            open_yet = request.finish is None
            request.cancel()
            assert request.finish is not None and (request.finish == "cancelled") >= open_yet

    @rule(target=streams, held=streams)
    def fork(self, held: Held) -> Held:
        if held.gone or held.stream.moment is None or self.full:
            with pytest.raises(EngineError):
                held.stream.fork()
            return multiple()  # type: ignore[return-value]
        return self.held(held.stream.fork(), list(held.ids))

    @rule(held=streams)
    def park(self, held: Held) -> None:
        self.files += 1
        path = Path(self.folder.name) / str(self.files)
        running = self.engine._register.scheduler.busy(held.stream.number)
        if held.gone or held.stream.moment is None or running:
            with pytest.raises(EngineError):
                held.stream.park(path)
            return
        held.stream.park(path)
        held.parked = path

    @rule(held=streams)
    def park_on_the_host(self, held: Held) -> None:
        running = self.engine._register.scheduler.busy(held.stream.number)
        if held.gone or held.stream.moment is None or running:
            with pytest.raises(EngineError):
                held.stream.park()
            return
        held.stream.park()
        assert held.stream.row is None and held.stream.seen == len(held.ids)

    @rule(target=streams, held=streams)
    def resume(self, held: Held) -> Held:
        """A second stream from the file that the first one is parked in."""
        if held.parked is None:
            return multiple()  # type: ignore[return-value]
        again = self.held(self.engine.resume(held.parked), list(held.ids))
        again.parked = held.parked
        return again

    @rule(held=streams)
    def leave(self, held: Held) -> None:
        held.stream.leave()
        held.gone, held.parked = True, None
        assert not held.busy

    @invariant()
    def everyone_sees_what_it_should(self) -> None:
        for held in getattr(self, "all", ()):
            row = held.stream.moment
            if row is None:
                continue
            ids, first = held.ids, max(SINKS, len(held.ids) - WINDOW)
            kept = {n: token for n, token in enumerate(ids) if n < SINKS or n >= first}
            assert {start + n: token for start, run in row.history.spans for n, token in enumerate(run)} == kept
            assert (held.stream.seen, held.stream.evicted) == (len(ids), len(ids) - len(kept))

    @invariant()
    def everyone_expects_what_a_fresh_reader_expects(self) -> None:
        for held in getattr(self, "all", ()):
            row = held.stream.moment
            session = opened()
            if row is not None:
                twin = row.fork()
                session._cache, session._history, session._logits = twin.cache, twin.history, twin.logits
            elif held.parked is not None:
                session.load(held.parked)
            else:
                continue
            told = session.score([7, 200, 31]).nll
            expected = Session(tiny_loaded(), SINKS, WINDOW).score([*held.ids, 7, 200, 31]).nll[-3:]
            np.testing.assert_allclose(told, expected, rtol=0, atol=1e-9, equal_nan=True)

    @invariant()
    def the_slots_and_the_queue_are_bounded(self) -> None:
        if hasattr(self, "all"):
            rows = [held for held in self.all if held.stream.row is not None]
            assert len(rows) <= self.engine.held <= SLOTS and self.engine.waiting <= 4
            assert all(held.stream.row is None for held in self.all if held.gone or held.parked)
            assert not self.seats or self.engine._ground.pool.free == SLOTS - len(rows)
            assert self.engine.nbytes == sum(held.stream.row.cache.nbytes for held in rows)

    @invariant()
    def nobody_shares_memory(self) -> None:
        rows = [held.stream.moment for held in getattr(self, "all", ()) if held.stream.moment is not None]
        tensors = [tensor for row in rows for tensor in tensors_of(row)]
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        own = [tensor for row in rows if row.cache.seat is None for tensor in tensors_of(row)]
        assert len({tensor.untyped_storage().data_ptr() for tensor in own}) == len(own)


def tensors_of(row: Row) -> list[Tensor]:
    """The keys and values of a row; logits of one step are rows of one tensor, and never written to."""
    return [tensor for ring in row.cache.rings if ring.is_initialized for tensor in ring.held]


class SeatedEngines(Engines):
    """The same with seats."""

    seats = True


for machine in (Engines, SeatedEngines):
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestEngines = pytest.mark.slow(Engines.TestCase)
TestSeatedEngines = pytest.mark.slow(SeatedEngines.TestCase)
