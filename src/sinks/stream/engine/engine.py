"""`Engine`: many endless streams through one model, in one batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW, Kind
from sinks.cache.plan import Plan
from sinks.cache.snapshot import look_at
from sinks.errors import BrokenCache, EngineClosed, EngineError
from sinks.models.load import Loaded
from sinks.stream.answer import Answer
from sinks.stream.engine.batch import choices, read_newest, warm_up
from sinks.stream.engine.flight import Aboard, Flights
from sinks.stream.engine.places import Places
from sinks.stream.engine.request import Ask, End, Request, Stream, failure_of
from sinks.stream.engine.row import Given, Ground, Row
from sinks.stream.engine.schedule import Scheduler, Turn
from sinks.stream.engine.worker import Worker
from sinks.stream.opening import ready
from sinks.stream.pieces import check_stops
from sinks.stream.sampling import GREEDY, Sampling, no_choice
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
        loaded = ready(loaded)
        self._ground = Ground(loaded, Plan(sinks, window), cache, slots)
        self._scheduler = Scheduler(slots, queue, self._ground.pace(chunk), parks=self._ground.pool is not None)
        self._size = slots if steady else 0
        self._requests: dict[int, Request] = {}
        self._numbers = count(1)
        self._closed: EngineClosed | None = None
        self._lock = threading.RLock()  # the scheduler and the lists; never held during a pass
        self._flights = Flights(self._ground, self._lock, self._take_in, partial(self._end, finish="cancelled"))
        self._places = Places(self._scheduler, self._lock, self.dismiss)
        self._worker = Worker(self.step, self._on_fault)

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
        ask = Ask(given, max_tokens, check_stops(stop), sampling)
        begins = stream is None or not (stream.begun or stream.source)
        ids = [] if given is None else self._ground.encode(given, begins)
        with self._lock:
            self._check_open(stream)
            stream = stream or Stream(self, next(self._numbers), once=True)
            request = Request(self, next(self._numbers), stream, ask, on_news)
            request.ids, request.begins = ids, begins
            self._scheduler.submit(request.number, stream.number)
            self._requests[request.number] = request
            stream.begun = True
        self.wake()
        return request

    def join(self, session: Session | None = None) -> Stream:
        """A stream that stays until it is told to leave: empty, or a copy of this moment of a session.

        An empty one takes a slot at its first request, a copy at once. Raises QueueFull where none is free for it, and
        InvalidInput for a session of another size.
        """
        if session is not None:
            with self.between_steps():
                return self.adopt(Row.of_session(self._ground, session))
        with self._lock:
            self._check_open(None)
            return Stream(self, next(self._numbers))

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
        self._flights.cancel(request)
        self.wake()

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot, or for an earlier request of their stream."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """How many requests are being read or written."""
        return self._scheduler.running

    @property
    def held(self) -> int:
        """How many slots are taken, by running requests or by streams that stay."""
        return len(self._scheduler.held)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in all slots."""
        return sum(row.nbytes for row in self._places.rows())

    # One step

    def step(self) -> bool:
        """Read a chunk, write one token of every answer, hand them out. False where there was nothing to do."""
        with self.between_steps():
            turn = self._schedule()
            if turn.reads or not turn.writers:
                self._flights.land()
            for number, tokens in turn.reads:
                self._read(number, tokens)
            self._write(turn.writers)
            return not turn.idle

    def run(self) -> None:
        """Step until there is nothing more to do."""
        while self.step():
            pass

    def _schedule(self) -> Turn:
        with self._lock:
            admitted = [self._requests[number] for number in self._scheduler.admit()]
        self._places.make_room()
        for request in [each for each in admitted if each.stream.gone is None]:  # one may be lost while room is made
            self._begin(request)
        with self._lock:
            return self._scheduler.turn(lambda number: not self._requests[number].full)

    def _begin(self, request: Request) -> None:
        """An admitted request: its stream gets a row, and what is to be read is known."""
        stream = request.stream
        try:
            row = stream.row or self._ground.take_up(stream.source)
            request.prepare(row)
            row.sit()
        except Exception as error:
            self._fail(request, error)
            if stream.row is None:
                self.release(stream)
            return
        with self._lock:
            if request.finish is not None and stream.once:
                row.stand_up()
                return  # cancelled a moment ago, and its slot is free already
            self._places.seat(stream, row)
            if request.finish is None:
                self._scheduler.begin(request.number, len(request.ids))

    def _read(self, number: int, tokens: int) -> None:
        """Read the next `tokens` of a request."""
        request = self._requests.get(number)
        row = None if request is None else request.stream.row
        if request is None or row is None:
            return  # cancelled a moment ago
        part, request.ids = request.ids[:tokens], request.ids[tokens:]
        try:
            row.read(part)
        except BaseException as error:
            # Some layers have overwritten keys that others still need: this stream holds no moment any more.
            request.stream.gone = BrokenCache(
                f"this stream was broken off while it was read ({type(error).__name__}: {error}): resume it from a file"
            )
            self._fail(request, error)
            self.dismiss(request.stream)
            if not isinstance(error, Exception):
                raise

    def _write(self, writers: Sequence[int]) -> None:
        """One token of every request that is still there."""
        rows: dict[Request, Row] = {}
        for request in filter(None, map(self._requests.get, writers)):
            row = request.stream.row
            if row is not None and self._may_go_on(request, row):
                rows[request] = row
        if rows and self._flights.can_take(rows) and self._flights.fly(rows, self._size):
            return
        self._flights.land()
        self._predict({each: row for each, row in rows.items() if row.logits is None and each.finish is None})
        answers = {each: each.answer for each in rows if each.answer is not None and each.finish is None}
        chosen = choices([(rows[request], answer) for request, answer in answers.items()])
        for number, (request, answer) in enumerate(answers.items()):
            if request.finish is None:  # or it was cancelled while its logits were made; those then stay
                self._choose(request, rows[request], answer, partial(chosen.of, number))

    def _take_in(self, each: Aboard, token: int | None) -> None:
        """The token that a flight chose for one row."""
        if token is None:
            self._fail(each.request, no_choice(self._ground.loaded.model.dtype))
        else:
            each.row.note_read(each.place)
            self._choose(each.request, each.row, each.answer, lambda: token)

    def _may_go_on(self, request: Request, row: Row) -> bool:
        """Begin the answer if it has not begun; False where that is already its end."""
        if request.ids:  # a step was broken off before it read what it had planned to
            self._read(request.number, len(request.ids))
        if request.finish is None and request.answer is None:
            ask = request.ask
            request.answer = row.answer(ask.sampling, ask.max_tokens, ask.stop)
            self._hand_out(request, request.answer.begin())
        return request.finish is None

    def _predict(self, rows: dict[Request, Row]) -> None:
        """Logits for each of them, in one pass; where that fails, one by one, so that only the culprits fail."""
        if not rows:
            return
        try:
            read_newest(list(rows.values()), self._size)
        except Exception as error:
            if len(rows) == 1:
                self._fail(next(iter(rows)), error)
                return
            for request, row in rows.items():
                self._predict({request: row})

    def _choose(self, request: Request, row: Row, answer: Answer, chosen: Callable[[], int]) -> None:
        """The next token of one answer."""
        try:
            piece = row.take(answer, chosen())
        except Exception as error:
            self._fail(request, error)
        else:
            request.tokens += 1
            self._hand_out(request, piece)

    def _hand_out(self, request: Request, piece: str) -> None:
        if request.finish is None:  # nobody reads beyond the end
            request.put(piece)
        if request.answer is not None and request.answer.finish is not None:
            self._end(request, request.answer.finish)

    # Ends

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request with what went wrong; inside a step only."""
        self._end(request, "failed", failure_of(error))

    def _end(self, request: Request, finish: End, error: Exception | None = None) -> None:
        """End a request, unless it is over."""
        with self._lock:
            if request.finish is not None:
                return
            self._scheduler.finish(request.number)
            del self._requests[request.number]
            request.close(finish, error)
            if request.stream.once:
                self.release(request.stream)

    def release(self, stream: Stream) -> None:
        """Free a stream's slot and its memory."""
        self._places.release(stream)
        self.wake()

    def dismiss(self, stream: Stream) -> None:
        """Cancel all that is asked of a stream, and forget it."""
        with self._lock:
            stream.gone = stream.gone or EngineError("this stream has left: join() again")
            for request in [each for each in self._requests.values() if each.stream is stream]:
                self._end(request, "cancelled")
            self.release(stream)

    # For streams

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """No step runs inside, and afterwards the slots of those who left are free.

        One flight may be under way: every row stands behind the token that it reads.
        """
        with self._places.between_steps():
            self._flights.land(leave=1)  # more are there only if a step was broken off
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
        with self.between_steps(), self._lock:
            row = self.row_of(stream)
            if self._scheduler.busy(stream.number):
                raise EngineError("a request of this stream is running: cancel it, or wait until it is over")
            number = next(self._numbers)
            self._scheduler.reserve(number, stream.number)
        try:
            yield row
            with self.between_steps():
                self.release(stream)
        finally:
            with self._lock:
                self._scheduler.finish(number)
            self.wake()

    def adopt(self, row: Row) -> Stream:
        """A stream with this row, in a free slot. Raises QueueFull."""
        with self._lock:
            self._check_open(None)
            stream = Stream(self, next(self._numbers))
        self._places.bring(stream, row)
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
        with self._places.between_steps(), self._lock:
            for request in list(self._requests.values()):
                self._end(request, "failed", why)
            self._flights.drop()
            self._places.release_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
