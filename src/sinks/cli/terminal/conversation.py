"""One conversation: its session, what was kept of earlier moments, and how answers are written."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sinks.cli.flags import take_up
from sinks.cli.terminal.screen import Screen, counted
from sinks.cli.terminal.stopping import Stopped, Stopper
from sinks.errors import InvalidInput

if TYPE_CHECKING:
    from sinks.stream.sampling import Sampling
    from sinks.stream.session import Session


@dataclass
class Conversation:
    """A dialogue that goes on with `session`.

    `sampling` and `max_tokens` are those of every answer; a seed begins the random numbers of the dialogue, not of each
    answer, so `fresh` says whether it is still to be used. `kept` holds earlier moments by name.
    """

    session: "Session"
    sampling: "Sampling"
    max_tokens: int | None
    screen: Screen
    stopper: Stopper
    kept: dict[str, "Session"] = field(default_factory=dict)
    fresh: bool = True

    def say(self, message: str) -> None:
        """Read a message, and show the answer until it ends or Ctrl-C stops it."""
        with self.stopper.watching():
            self.stopper.reading = True
            try:
                pieces = self.session.say(message, max_tokens=self.max_tokens, sampling=self._sampling())
            except Stopped:
                self.screen.note(f"stopped while reading: {counted(self.session.seen, 'token')} in the stream")
                return
            finally:
                self.stopper.reading = False
            self._show(pieces)

    def go_on(self) -> None:
        """Go on with an answer that was stopped, or cut."""
        if not self.session.answering:
            raise InvalidInput("there is no unfinished answer to go on with: say something")
        with self.stopper.watching():
            self._show(self.session.generate(self.max_tokens, sampling=self._sampling()))

    def forget(self) -> None:
        """Begin anew; the system prompt stays, and what was kept."""
        self.session.reset()
        self.fresh = True

    def resize(self, window: int) -> None:
        """Go on with another window, having read what is visible now and nothing else."""
        self.session = self.session.resized(window, on_evict=self.stopper.heard)

    def take_up(self, file: str) -> None:
        """Go on from a saved moment. Raises InvalidInput for no such moment, or no dialogue; nothing changes then."""
        session = self.session.fork(on_evict=self.stopper.heard)
        take_up(session, file)
        check_dialogue(session, file)
        self.session = session

    def keep(self, name: str) -> str:
        """Keep this moment; returns its name, which is a number where none is given."""
        name = name or str(next(number for number in range(1, len(self.kept) + 2) if str(number) not in self.kept))
        if name in self.kept:
            raise InvalidInput(f"a moment called {name} is kept already: choose another name")
        self.kept[name] = self.session.fork()
        return name

    def go_back(self, name: str) -> None:
        """Go on from a moment that was kept, which stays kept."""
        if name not in self.kept:
            known = ", ".join(self.kept) or "none; /fork keeps one"
            raise InvalidInput(f"no moment called {name} is kept: there are {known}")
        self.session = self.kept[name].fork(on_evict=self.stopper.heard)

    def _sampling(self) -> "Sampling":
        fresh, self.fresh = self.fresh, False
        return self.sampling if fresh else replace(self.sampling, seed=None)

    def _show(self, pieces: Iterator[str]) -> None:
        begun, seen = time.perf_counter(), self.session.seen
        with contextlib.suppress(Stopped):
            for piece in pieces:
                self.screen.piece(piece)
                if self.stopper.asked:
                    break
        self.screen.line()
        written = self.session.seen - seen
        if self.session.finish == "length":
            self.screen.note(f"cut after {counted(written, 'token')}; /more goes on")
        self.screen.status(self.session, written / (time.perf_counter() - begun))


def check_dialogue(session: "Session", file: object) -> None:
    """Raises InvalidInput if what was loaded from a file cannot be talked to."""
    if session.seen and not session.in_dialogue:
        raise InvalidInput(f"{file} holds a stream that is no dialogue: go on with it by sinks stream --load {file}")
