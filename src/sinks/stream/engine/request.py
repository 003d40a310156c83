"""What a caller holds: a request, whose pieces arrive while the engine steps, and the stream it belongs to."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sinks.cache.plan import check_whole
from sinks.errors import InvalidInput, RequestFailed, SinksError
from sinks.stream.answer import Answer, Finish
from sinks.stream.engine.rows.row import Given, Row
from sinks.stream.sampling import GREEDY, Sampling, check_sampling

LOG = logging.getLogger("sinks")

if TYPE_CHECKING:
    from sinks.stream.engine.engine import Engine

End = Finish | Literal["cancelled", "failed"]
"""Why a request is over: as an answer is, or it was cancelled, or a step failed under it."""

BUFFER = 256
"""Pieces that wait for their reader at most: a writer that is so far ahead pauses, and delays nobody."""


@dataclass(frozen=True)
class Ask:
    """What is asked for: read `given` (None: nothing), then write at most `max_tokens` tokens (None: no limit)."""

    given: Given | None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        check_sampling(self.sampling)
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, least=0)


class Request:
    """One answer on its way. Iterate over it for the pieces of text; `finish` says why it is over, None if it is not.

    `tokens` counts what was written so far. A request may be read and cancelled from any thread, and read by one.
    """

    def __init__(
        self, engine: Engine, number: int, stream: Stream, ask: Ask, on_news: Callable[[], None] | None
    ) -> None:
        self.number = number
        self.stream = stream
        self.ask = ask
        self.ids: list[int] = []  # still to be read
        self.begins = False  # whether they were made for the beginning of a stream
        self.answer: Answer | None = None
        self.finish: End | None = None
        self.error: Exception | None = None
        self.tokens = 0
        self._engine = engine
        self._on_news = on_news
        self._pieces: deque[str] = deque()
        self._news = threading.Condition()

    def __iter__(self) -> Iterator[str]:
        """The pieces, as they come; never an empty one. Without a running worker, waiting for one steps the engine.

        Raises RequestFailed, or what was wrong with the request, once all pieces written before are handed out.
        """
        while True:
            with self._news:
                piece = self._pieces.popleft() if self._pieces else None
                over = self.finish is not None
            if piece is not None:
                self._engine.wake()
                yield piece
            elif over:
                break
            else:
                self._engine.advance(self)
        if self.error is not None:
            raise self.error

    def text(self) -> str:
        """The whole answer, once it is over."""
        return "".join(self)

    def take(self) -> list[str]:
        """The pieces that are there now, without waiting."""
        with self._news:
            pieces = list(self._pieces)
            self._pieces.clear()
        self._engine.wake()
        return pieces

    def prepare(self, row: Row) -> None:
        """Know which ids are to be read, now that it is known where the stream stands."""
        given, begins = self.ask.given, not row.history.seen
        if isinstance(given, str) and begins != self.begins:
            self.ids = row.ground.encode(given, begins)
        if begins and not self.ids:
            self.ids = row.ground.encode("", True)
        if begins and not self.ids:
            raise InvalidInput("nothing was fed, and this model's texts begin with no token of their own: give a text")
        if given is not None:
            row.pieces.forget()

    def cancel(self) -> None:
        """End the request where it is; takes effect within a step. What was written stays in the stream."""
        self._engine.cancel(self)

    @property
    def ready(self) -> bool:
        """Whether there is a piece, or there will be none."""
        return bool(self._pieces) or self.finish is not None

    @property
    def full(self) -> bool:
        """Whether so many pieces wait to be read that nothing more is written."""
        return len(self._pieces) >= BUFFER

    @property
    def nearly_full(self) -> bool:
        """Whether it will be `full` with one piece more."""
        return len(self._pieces) >= BUFFER - 1

    def wait(self, seconds: float | None = None) -> None:
        """Wait for news; those that came before this call do not count as waiting."""
        with self._news:
            if not self.ready:
                self._news.wait(seconds)

    def put(self, piece: str) -> None:
        """The engine has written this."""
        if piece:
            with self._news:
                self._pieces.append(piece)
                self._news.notify_all()
            self._tell()

    def close(self, finish: End, error: Exception | None = None) -> None:
        """The engine is done with it."""
        with self._news:
            self.finish, self.error = finish, error
            self._news.notify_all()
        self._tell()

    def _tell(self) -> None:
        if self._on_news is None:
            return
        try:
            self._on_news()
        except Exception:  # one caller's mistake must not stop the others
            self._on_news = None
            LOG.exception("on_news of request %d raised, and is not called again", self.number)


def failure_of(error: BaseException) -> Exception:
    """What a request raises: a mistake in the request as it is, anything else as a failed step."""
    if isinstance(error, SinksError):
        return error
    told = RequestFailed(
        f"a step failed under this request ({type(error).__name__}: {error}): other requests go on; submit it again"
    )
    told.__cause__ = error
    return told


class Stream:
    """One endless stream in an engine, for requests one after another. It holds a slot from its first request on.

    `park` writes it to a file and frees the slot, and the next request takes it up again from there.
    """

    def __init__(self, engine: Engine, number: int, *, once: bool = False) -> None:
        self.number = number
        self.once = once
        self.row: Row | None = None
        self.source: Path | Row | None = None
        self.begun = False
        self.gone: SinksError | None = None
        self._engine = engine

    def check(self, engine: Engine) -> None:
        """Raises what there is against asking this stream anything, or asking it of `engine`."""
        if self.gone is not None:
            raise self.gone
        if self._engine is not engine:
            raise InvalidInput(
                "this stream belongs to another engine: submit it there, or park it to a file and resume() it here"
            )

    def submit(
        self,
        given: Given | None = None,
        *,
        max_tokens: int | None = None,
        stop: Iterable[str] = (),
        sampling: Sampling = GREEDY,
        on_news: Callable[[], None] | None = None,
    ) -> Request:
        """Queue a request behind those of this stream that are not over; see `Engine.submit`."""
        return self._engine.submit(
            given, stream=self, max_tokens=max_tokens, stop=stop, sampling=sampling, on_news=on_news
        )

    @property
    def moment(self) -> Row | None:
        """The row, in a slot or put away in memory; None for a stream that is in a file or has not begun."""
        return self.source if isinstance(self.source, Row) else self.row

    @property
    def seen(self) -> int:
        """Tokens of the stream so far; 0 for one that is not in memory."""
        row = self.moment
        return row.history.seen if row else 0

    @property
    def evicted(self) -> int:
        """Tokens that were let go; 0 for one that is not in memory."""
        row = self.moment
        return row.history.evicted if row else 0

    @property
    def spans(self) -> list[tuple[int, list[int]]]:
        """What is visible: runs of tokens without a gap, each with the stream position of its first token."""
        with self._engine.between_steps():
            row = self.moment
            return row.history.spans if row else []

    def save(self, path: str | Path) -> None:
        """Write this moment, between two steps, also in the middle of an answer; `Session.load` takes it up too."""
        with self._engine.between_steps():
            moment = self._engine.row_of(self).fork()
            moment.away()
        moment.save(path)  # the others go on meanwhile

    def park(self, path: str | Path | None = None) -> None:
        """Save, and free the slot and its memory. The next request waits for a slot and goes on from `path`.

        Without a `path` the stream stays in memory of the host, as large as a slot, until it leaves: on a GPU that is
        what frees a seat, and happens by itself to a stream at rest when another one needs it.

        Raises EngineError while a request is running: cancel it, or wait.
        """
        with self._engine.reserved(self) as row:
            if path is None:
                with self._engine.between_steps():
                    row.away()
            else:
                with self._engine.between_steps():  # a copy: the slot may be taken away while the file is written
                    moment = row.fork()
                    moment.away()
                moment.save(path)
            self.source = row if path is None else Path(path)

    def fork(self) -> Stream:
        """Another stream at the same moment, in a slot of its own; it shares nothing with this one but the model.

        Raises QueueFull where no slot is free.
        """
        with self._engine.between_steps():
            return self._engine.adopt(self._engine.row_of(self).fork())

    def leave(self) -> None:
        """Cancel what is asked of this stream, forget it, and free its slot."""
        with self._engine.between_steps():
            self._engine.dismiss(self)
