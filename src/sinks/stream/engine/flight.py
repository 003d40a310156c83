"""Steps that a GPU computes while the host still hands out the tokens of the one before.

A captured step chooses each row's next token itself and keeps it at the row's seat. So a step is launched on tokens
that nobody has read yet; then those of the step before are fetched, which are long there, and become text. Between two
calls of `Engine.step` one flight is under way, and every row in it stands, for the host, behind the token that the
flight reads: what is saved, forked or put away then is that moment.

A token that turns out not to be wanted (the answer had ended, the request was cancelled) is dropped. Nothing is lost
by that: the one slot that its flight wrote is written again when the stream goes on, and held a key that nobody sees
any more. Two such tokens would be one too many, so a row flies on an unread token only if that one will be taken.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from sinks.models.step.device.step import CHOSEN, DeviceStep, Told
from sinks.models.step.hasten import LeanForward
from sinks.stream.answer import Answer
from sinks.stream.engine.request import Request
from sinks.stream.engine.rows.row import Ground, Row
from sinks.stream.sampling import Sampler

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Aboard:
    """A row of a flight: its next token is chosen for `answer`, and will be number `place` of its stream."""

    request: Request
    row: Row
    answer: Answer
    place: int


@dataclass(frozen=True, eq=False)
class Flight:
    """One launched step: who is aboard, in the order of its rows, and what they chose."""

    aboard: tuple[Aboard, ...]
    told: Told

    def landing(self) -> list[tuple[Aboard, int | None]]:
        """Everybody and the token chosen, None where there was none; waits until the step is done."""
        return list(zip(self.aboard, self.told.wait(), strict=False))  # rows may have been left idle behind them


class Flights:
    """The steps under way, oldest first, of streams that sit in one pool.

    `lock` guards the requests, as in `Register`; `accept` takes a token that was chosen for a row, None where there was
    none; `cancel` ends a request that was cancelled while it could not be.
    """

    def __init__(
        self,
        ground: Ground,
        lock: AbstractContextManager[Any],
        accept: Callable[[Aboard, int | None], None],
        cancel: Callable[[Request], None],
    ) -> None:
        self._ground, self._lock, self._accept, self._cancel = ground, lock, accept, cancel
        self._under_way: deque[Flight] = deque()
        self._step: DeviceStep | None = None
        self._installed: dict[int, tuple[Sampler, int]] = {}  # by seat: who draws there, and the place it is at
        self._busy: set[Request] = set()
        self._cancelled: set[Request] = set()
        self._broken_off = False  # a step may have been launched that nobody noted
        self._failed = False

    def __len__(self) -> int:
        return len(self._under_way)

    def cancel(self, request: Request) -> None:
        """End this request; where a step builds on its token, once that is said."""
        with self._lock:
            if request in self._busy:
                self._cancelled.add(request)
            else:
                self._cancel(request)

    def fly(self, rows: Mapping[Request, Row], size: int) -> bool:
        """Launch a step, and hand out what the one before has chosen. False where it could not be launched."""
        with self._lock:
            rows = {request: row for request, row in rows.items() if request.finish is None}
            self._busy = set(rows)
        try:
            self.land(leave=1 if self.launch(rows, size) else 0)
            return True
        except Exception:
            if len(self) > 1:
                raise
            if not self._failed:
                LOG.exception(
                    "a captured step could not be launched: this one, and others like it, go the ordinary way"
                )
                self._failed = True
            return False  # nothing has begun: the ordinary way finds out whose fault it is
        finally:
            with self._lock:
                self._busy.clear()
                while self._cancelled:
                    self._cancel(self._cancelled.pop())

    def land(self, leave: int = 0) -> None:
        """Wait for flights and hand out what they chose, but for so many of the newest."""
        while len(self) > leave:
            for each, token in self._under_way[0].landing():
                unwanted = each.request.finish is not None and not self._is_built_on(each)
                if not unwanted and each.row.history.seen == each.place:  # else it was landed before a breaking off
                    self._accept(each, token)
            self._over()

    def _over(self) -> None:
        self._under_way.popleft()

    def drop(self) -> None:
        """Forget all flights, once the GPU is done with them, and the step, whose graphs go with its seats."""
        try:
            while self._under_way:
                self._under_way.popleft().told.wait()
        finally:
            self._under_way.clear()
            self._step, self._installed = None, {}

    def _is_built_on(self, each: Aboard) -> bool:
        """Whether a later flight has read the token that this one chose."""
        later = islice(self._under_way, 1, None)
        return any(other.request is each.request for flight in later for other in flight.aboard)

    def _ahead(self) -> set[Request]:
        return {each.request for each in self._under_way[-1].aboard} if self._under_way else set()

    @torch.inference_mode()
    def can_take(self, rows: Mapping[Request, Row]) -> bool:
        """Whether a captured step takes all of these rows, chooses their tokens too, and nobody looks on."""
        pool, forward = self._ground.pool, self._ground.loaded.model.forward
        if pool is None or pool.seats is None or not isinstance(forward, LeanForward):
            return False
        step = forward.captured(pool.seats)
        if step is not self._step:
            if self._under_way:
                return False  # what is under way was chosen by another step: it has to be landed first
            self._step, self._installed = step, {}
        ahead = self._ahead()
        return step is not None and all(
            request in ahead or _fits(request, row, step.draws.vocab) for request, row in rows.items()
        )

    def launch(self, rows: Mapping[Request, Row], size: int) -> bool:
        """Begin a step for those of these rows whose next token may be read now, of `size` rows if that is more.

        False where there are none: what they have under way may be the last that they want.
        """
        if self._broken_off:
            self._installed = {}
            if self._under_way:  # the newest token at a seat may be one further on than these
                return False
        ahead, aboard, ids = self._ahead(), list[Aboard](), list[int]()
        for request, row in rows.items():
            answer, newest, place = request.answer, row.history.newest, row.history.seen
            assert answer is not None and newest is not None  # `can_take` has looked
            if request not in ahead:
                row.check_moment()
            elif answer.left == 1 or request.nearly_full:
                continue
            else:
                newest, place = CHOSEN, place + 1
            aboard.append(Aboard(request, row, answer, place))
            ids.append(newest)
        if aboard:
            self._begin(aboard, ids, [each.row.seat for each in aboard], max(0, size - len(aboard)))
        return bool(aboard)

    def _begin(self, aboard: list[Aboard], ids: list[int], seats: list[int], idle: int) -> None:
        step = self._step
        assert step is not None
        self._install(step, aboard, seats)
        positions = [each.place - 1 for each in aboard]
        self._broken_off = True
        step([*ids, *[0] * idle], [*seats, *[0] * idle], [*positions, *[-1] * idle])
        self._under_way.append(Flight(tuple(aboard), step.told()))
        self._broken_off = False
        for each, seat in zip(aboard, seats, strict=True):
            self._installed[seat] = each.answer.sampler, each.place + 1

    def _install(self, step: DeviceStep, aboard: Sequence[Aboard], seats: Sequence[int]) -> None:
        """Settings, seed and newest tokens of those who do not go on where their seat stands."""
        new = [
            (seat, each)
            for each, seat in zip(aboard, seats, strict=True)
            if self._installed.get(seat) != (each.answer.sampler, each.place)
        ]
        if new:
            drawings = [each.answer.sampler.drawing for _, each in new]
            histories = [each.row.history.last(own.lookback) for (_, each), own in zip(new, drawings, strict=True)]
            step.install([seat for seat, _ in new], drawings, histories, [each.place for _, each in new])


def _fits(request: Request, row: Row, vocab: int) -> bool:
    """Logits that are there were made for another choice, and the first token of a stream claims its memory."""
    answer = request.answer
    assert answer is not None  # it has begun
    return row.logits is None and row.history.seen > 1 and answer.sampler.fits_graph(row.history.plan.window, vocab)
