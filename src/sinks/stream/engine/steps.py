"""One step of an engine after the other: who was admitted begins, prompts are read, every answer gets a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sinks.errors import BrokenCache
from sinks.stream.answer import Answer
from sinks.stream.engine.flight import Aboard, Flights
from sinks.stream.engine.register import Register
from sinks.stream.engine.request import Request
from sinks.stream.engine.rows.batch import choices, read_newest
from sinks.stream.engine.rows.row import Ground, Row
from sinks.stream.engine.schedule import Turn
from sinks.stream.sampling import no_choice


class Steps:
    """The work on rows; one thread at a time, between `Places.between_steps`. Passes have `size` rows at least."""

    def __init__(self, ground: Ground, register: Register, size: int) -> None:
        self._ground, self._register, self._size = ground, register, size
        self.flights = Flights(ground, register.lock, self._take_in, register.cancel)

    def step(self) -> bool:
        """Read a chunk, write one token of every answer, hand them out. False where there was nothing to do."""
        turn = self._schedule()
        if turn.reads or not turn.writers:
            self.flights.land()
        for number, tokens in turn.reads:
            self._read(number, tokens)
        self._write(turn.writers)
        return not turn.idle

    def _schedule(self) -> Turn:
        with self._register.lock:
            admitted = [self._register.requests[number] for number in self._register.scheduler.admit()]
        self._register.places.make_room()
        for request in [each for each in admitted if each.stream.gone is None]:  # one may be lost while room is made
            self._begin(request)
        with self._register.lock:
            return self._register.scheduler.turn(lambda number: not self._register.requests[number].full)

    def _begin(self, request: Request) -> None:
        """An admitted request: its stream gets a row, and what is to be read is known."""
        stream = request.stream
        try:
            row = stream.row or self._ground.take_up(stream.source)
            request.prepare(row)
            row.sit()
        except Exception as error:
            self._register.fail(request, error)
            if stream.row is None:
                self._register.release(stream)
            return
        with self._register.lock:
            if request.finish is not None and stream.once:
                row.stand_up()
                return  # cancelled a moment ago, and its slot is free already
            self._register.places.seat(stream, row)
            if request.finish is None:
                self._register.scheduler.begin(request.number, len(request.ids))

    def _read(self, number: int, tokens: int) -> None:
        """Read the next `tokens` of a request."""
        request = self._register.requests.get(number)
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
            self._register.fail(request, error)
            self._register.dismiss(request.stream)
            if not isinstance(error, Exception):
                raise

    def _write(self, writers: Sequence[int]) -> None:
        """One token of every request that is still there."""
        rows: dict[Request, Row] = {}
        for request in filter(None, map(self._register.requests.get, writers)):
            row = request.stream.row
            if row is not None and self._may_go_on(request, row):
                rows[request] = row
        if rows and self.flights.can_take(rows) and self.flights.fly(rows, self._size):
            return
        self.flights.land()
        self._predict({each: row for each, row in rows.items() if row.logits is None and each.finish is None})
        answers = {each: each.answer for each in rows if each.answer is not None and each.finish is None}
        chosen = choices([(rows[request], answer) for request, answer in answers.items()])
        for number, (request, answer) in enumerate(answers.items()):
            if request.finish is None:  # or it was cancelled while its logits were made; those then stay
                self._choose(request, rows[request], answer, partial(chosen.of, number))

    def _take_in(self, each: Aboard, token: int | None) -> None:
        """The token that a flight chose for one row."""
        if token is None:
            self._register.fail(each.request, no_choice(self._ground.loaded.model.dtype))
        else:
            each.row.note_read(each.place)
            self._choose(each.request, each.row, each.answer, lambda: token)

    def _may_go_on(self, request: Request, row: Row) -> bool:
        """Begin the answer if it has not begun; False where that is already its end."""
        if request.ids:  # a step was broken off before it read what it had planned to
            self._read(request.number, len(request.ids))
        if request.finish is None and request.answer is None:
            self._begin_answer(request, row)
        return request.finish is None

    def _begin_answer(self, request: Request, row: Row) -> None:
        try:
            answer = row.answer(request.ask.sampling, request.ask.max_tokens, request.ask.stop)
            held = answer.begin()
        except Exception as error:
            self._register.fail(request, error)
        else:
            request.answer = answer
            self._hand_out(request, held)

    def _predict(self, rows: dict[Request, Row]) -> None:
        """Logits for each of them, in one pass; where that fails, one by one, so that only the culprits fail."""
        if not rows:
            return
        try:
            read_newest(list(rows.values()), self._size)
        except Exception as error:
            if len(rows) == 1:
                self._register.fail(next(iter(rows)), error)
                return
            for request, row in rows.items():
                self._predict({request: row})

    def _choose(self, request: Request, row: Row, answer: Answer, chosen: Callable[[], int]) -> None:
        """The next token of one answer."""
        try:
            piece = row.take(answer, chosen())
        except Exception as error:
            self._register.fail(request, error)
        else:
            request.tokens += 1
            self._hand_out(request, piece)

    def _hand_out(self, request: Request, piece: str) -> None:
        if request.finish is None:  # nobody reads beyond the end
            request.put(piece)
        if request.answer is not None and request.answer.finish is not None:
            self._register.end(request, request.answer.finish)
