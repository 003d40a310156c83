"""`Engine`: many endless streams through one model, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW, Kind
from sinks.cache.plan import Plan, check_whole
from sinks.cache.snapshot import look_at
from sinks.errors import EngineClosed, EngineError, InvalidInput
from sinks.models.load import Loaded
from sinks.stream.engine.register import Register
from sinks.stream.engine.request import Ask, Request, Stream
from sinks.stream.engine.rows.batch import warm_up
from sinks.stream.engine.rows.row import Given, Ground, Row
from sinks.stream.engine.schedule import Scheduler
from sinks.stream.engine.steps import Steps
from sinks.stream.engine.worker import Worker
from sinks.stream.opening import ready
from sinks.stream.pieces import check_stops
from sinks.stream.sampling import GREEDY, Sampling
from sinks.stream.session import Session


class Engine:
    """`slots` streams at once, each of `sinks` first tokens and the last `window`; `queue` requests wait at most.

    Every stream has the same keys and values, so there is no paging: a slot is a stream's own cache. `step` reads at
    most about `chunk` tokens of new prompts (None: 256 on a CPU, 2,048 on a GPU), then writes one token of every
    answer; the rules are those of `Scheduler`. Either something calls `step` (iterating over a request does), or
    `start` has a thread do it. `submit` and `cancel` never wait for a step; what touches a stream (`park`, `save`,
    `fork`, `leave`) waits for the end of the running one.

    A row's attention, sampling and random numbers are its own: only the products with the weights are shared, and
    they may round differently for another number of rows. With `steady` every step is as large as all slots, which
    costs what a full batch costs, and a row no longer depends on who else is in the batch, to the last bit.
    """

    def __init__(
        self,
        loaded: Loaded,
        slots: int = 8,
        sinks: int = DEFAULT_SINKS,
        window: int = DEFAULT_WINDOW,
        *,
        queue: int = 64,
        chunk: int | None = None,
        steady: bool = False,
        cache: Kind = "full",
    ) -> None:
        """Raises InvalidInput for sizes that make no sense, and what `attach` and `SinkCache.for_model` raise."""
        check_whole("slots", slots, least=1)
        loaded = ready(loaded)
        self._ground = Ground(loaded, Plan(sinks, window), cache, slots)
        self._worker = Worker(self.step, self._on_fault)
        scheduler = Scheduler(slots, queue, self._ground.pace(chunk), parks=self._ground.pool is not None)
        self._register = Register(scheduler, self._worker.wake)
        self._steps = Steps(self._ground, self._register, slots if steady else 0)
        self._closed: EngineClosed | None = None

    # What is asked of it, from any thread

    def submit(
        self,
        given: Given | None = None,
        *,
        stream: Stream | None = None,
        max_tokens: int | None = None,
        stop: Iterable[str] = (),
        sampling: Sampling = GREEDY,
        on_news: Callable[[], None] | None = None,
    ) -> Request:
        """Read `given`, text or ids of any length, and go on from there; returns at once.

        Without a `stream` the request has one of its own, which leaves when the answer is over. `given=None` feeds
        nothing: what an earlier answer held back comes first. `max_tokens`, `stop` and `sampling` are those of
        `Session.generate`; the first two may end the answer before it begins, and what is given is then still read.
        `on_news` is called, mostly from the engine's thread, when a piece came or the request is over; it must not
        wait.

        Raises QueueFull, EngineClosed, and InvalidInput for a wish that makes no sense.
        """
        if on_news is not None and not callable(on_news):
            raise InvalidInput(f"on_news={on_news!r}: give a function of nothing, or None")
        ask = Ask(given, max_tokens, check_stops(stop), sampling)
        begins = stream is None or not (stream.begun or stream.source)
        ids = [] if given is None else self._ground.encode(given, begins)
        with self._register.lock:
            self._check_open(stream)
            stream = stream or Stream(self, self._register.number(), once=True)
            request = Request(self, self._register.number(), stream, ask, on_news)
            request.ids, request.begins = ids, begins
            self._register.enter(request)
        self.wake()
        return request

    def join(self, session: Session | None = None) -> Stream:
        """A stream that stays until it is told to leave: empty, or a copy of this moment of a session.

        An empty one takes a slot at its first request, a copy at once. Raises QueueFull where none is free for it, and
        InvalidInput for a session of another size.
        """
        if session is not None:
            if not isinstance(session, Session):
                raise InvalidInput(f"{type(session).__name__}: join() takes a Session, or nothing")
            with self.between_steps():
                return self.adopt(Row.of_session(self._ground, session))
        with self._register.lock:
            self._check_open(None)
            return Stream(self, self._register.number())

    def resume(self, path: str | Path) -> Stream:
        """The stream that `Stream.park`, `Stream.save` or `Session.save` wrote; it is read at its first request.

        Raises SnapshotError at once for what is no snapshot; what only a whole reading shows fails that request.
        """
        look_at(path)
        stream = self.join()
        stream.source = Path(path)
        _ = self._ground.fingerprint  # here, where nobody else waits for it
        return stream

    def cancel(self, request: Request) -> None:
        """End a request that is not over, within one step."""
        self._steps.flights.cancel(request)
        self.wake()

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot, or for an earlier request of their stream."""
        return self._register.scheduler.waiting

    @property
    def running(self) -> int:
        """How many requests are being read or written."""
        return self._register.scheduler.running

    @property
    def held(self) -> int:
        """How many slots are taken, by running requests or by streams that stay."""
        return len(self._register.scheduler.held)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in all slots."""
        return sum(row.nbytes for row in self._register.places.rows())

    # Steps

    def step(self) -> bool:
        """Read a chunk, write one token of every answer, hand them out. False where there was nothing to do."""
        with self.between_steps():
            return self._steps.step()

    def run(self) -> None:
        """Step until there is nothing more to do."""
        while self.step():
            pass

    # For streams

    def dismiss(self, stream: Stream) -> None:
        """Cancel all that is asked of a stream, and forget it."""
        self._register.dismiss(stream)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """No step runs inside, and afterwards the slots of those who left are free.

        One flight may be under way: every row stands behind the token that it reads.
        """
        with self._register.places.between_steps():
            self._steps.flights.land(leave=1)  # more are there only if a step was broken off
            yield

    def row_of(self, stream: Stream) -> Row:
        """The row of a stream that is in memory. Raises EngineError."""
        self._check_open(stream)
        if stream.moment is None:
            raise EngineError("this stream holds no slot: it is parked, or nothing was read yet; submit a request")
        return stream.moment

    @contextmanager
    def reserved(self, stream: Stream) -> Iterator[Row]:
        """The row of an idle stream, which nobody else uses inside; afterwards its slot is free.

        Steps go on meanwhile. If something is raised inside, the stream stays where it was.
        """
        with self.between_steps(), self._register.lock:
            row = self.row_of(stream)
            if self._register.scheduler.busy(stream.number):
                raise EngineError("a request of this stream is running: cancel it, or wait until it is over")
            number = self._register.number()
            self._register.scheduler.reserve(number, stream.number)
        try:
            yield row
            with self.between_steps():
                self._register.release(stream)
        finally:
            with self._register.lock:
                self._register.scheduler.finish(number)
            self.wake()

    def adopt(self, row: Row) -> Stream:
        """A stream with this row, in a free slot. Raises QueueFull."""
        with self._register.lock:
            self._check_open(None)
            stream = Stream(self, self._register.number())
        self._register.places.bring(stream, row)
        return stream

    def _check_open(self, stream: Stream | None) -> None:
        if self._closed is not None:
            raise self._closed
        if stream is not None:
            stream.check(self)

    # A thread that steps

    def start(self) -> Engine:
        """Step in a thread of its own from now on, whenever there is something to do; see `warm_up`."""
        with self.between_steps():
            self._check_open(None)
            warm_up(self._ground)
            self._worker.start()
        return self

    def wake(self) -> None:
        """There may be something to do."""
        self._worker.wake()

    def advance(self, request: Request) -> None:
        """Bring a request that has no piece forward: wait for the worker, or step."""
        if self._worker.started:
            request.wait()
        elif not self.step() and not request.ready:
            raise EngineError(
                f"nothing moves: slots taken by streams that stay: {self.held}; requests that wait: {self.waiting}; "
                "park a stream, let one leave, or read the requests whose pieces pile up"
            )

    def close(self) -> None:
        """End every request with EngineClosed, and give the memory back."""
        self._close(EngineClosed("the engine was closed: make a new one"))
        self._worker.join()
        self._ground.pool = None

    def _on_fault(self, error: Exception) -> None:
        """A fault of the engine itself: nobody may wait for it for ever."""
        why = EngineClosed(f"the engine failed ({type(error).__name__}: {error}): make a new one")
        why.__cause__ = error
        self._close(why)

    def _close(self, why: EngineClosed) -> None:
        self._closed = self._closed or why
        self._worker.end()
        with self._register.places.between_steps(), self._register.lock:
            self._register.end_all(why)
            self._steps.flights.drop()
            self._register.places.release_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
