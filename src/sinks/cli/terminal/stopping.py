"""Ctrl-C while a message is read or an answer written: noted at once, and obeyed where the stream can be left."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 3
"""Ctrl-C that many times during one answer ends the program, wherever it is."""


class Stopped(Exception):
    """Reading or writing was given up between two passes; what was read or written by then is in the stream."""


class Stopper:
    """Whether somebody wants the present answer to stop.

    A forward pass that is broken off leaves a cache of no use, so Ctrl-C must not raise there. The loop that writes
    looks at `asked` between two pieces; elsewhere a stream is left where it says what it lets go (`heard`).
    """

    def __init__(self) -> None:
        self.presses = 0
        self.reading = False
        self._prompting = False

    @property
    def asked(self) -> bool:
        """Whether Ctrl-C came since `watching` began."""
        return self.presses > 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, Ctrl-C is only counted; afterwards it is what it was before."""
        self.presses = 0
        before = signal.signal(signal.SIGINT, self._count)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def prompting(self, read: Callable[[str], str]) -> Callable[[str], str]:
        """`read`, in which Ctrl-C raises KeyboardInterrupt even inside `watching`: there is nothing to stop."""

        def asked(prompt: str) -> str:
            self.presses, self._prompting = 0, True
            try:
                return read(prompt)
            finally:
                self._prompting = False

        return asked

    def heard(self, start: int, ids: list[int]) -> None:
        """The session's listener (`on_evict`): its state is whole when it tells us.

        An answer is left between two pieces; asked again, also between two tokens that make no piece.
        """
        if self.asked and (self.reading or self.presses > 1):
            raise Stopped

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.presses += 1
        if self._prompting or self.presses >= PATIENCE:
            raise KeyboardInterrupt
