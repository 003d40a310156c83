"""Which requests an engine has, and what becomes of them and of the slots of their streams; for any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

from sinks.errors import EngineError
from sinks.stream.engine.places import Places
from sinks.stream.engine.request import End, Request, Stream, failure_of
from sinks.stream.engine.schedule import Scheduler


class Register:
    """The requests that are not over, by number. `wake` is called when there may be something to do again."""

    def __init__(self, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        self.scheduler, self._wake = scheduler, wake
        self.requests: dict[int, Request] = {}
        self.lock = threading.RLock()  # the scheduler and the lists; never held during a pass
        self.places = Places(scheduler, self.lock, self.dismiss)
        self._numbers = count(1)

    def number(self) -> int:
        """One that no request and no stream has."""
        return next(self._numbers)

    def enter(self, request: Request) -> None:
        """A request waits its turn from now on. Raises QueueFull."""
        with self.lock:
            self.scheduler.submit(request.number, request.stream.number)
            self.requests[request.number] = request
            request.stream.begun = True

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request with what went wrong; inside a step only."""
        self.end(request, "failed", failure_of(error))

    def cancel(self, request: Request) -> None:
        """End a request because nobody wants it any more."""
        self.end(request, "cancelled")

    def end(self, request: Request, finish: End, error: Exception | None = None) -> None:
        """End a request, unless it is over."""
        with self.lock:
            if request.finish is not None:
                return
            self.scheduler.finish(request.number)
            del self.requests[request.number]
            request.close(finish, error)
            if request.stream.once:
                self.release(request.stream)

    def end_all(self, why: Exception) -> None:
        """End every request with what went wrong."""
        with self.lock:
            for request in list(self.requests.values()):
                self.end(request, "failed", why)

    def release(self, stream: Stream) -> None:
        """Free a stream's slot and its memory."""
        self.places.release(stream)
        self._wake()

    def dismiss(self, stream: Stream) -> None:
        """Cancel all that is asked of a stream, and forget it."""
        with self.lock:
            stream.gone = stream.gone or EngineError("this stream has left: join() again")
            for request in [each for each in self.requests.values() if each.stream is stream]:
                self.cancel(request)
            self.release(stream)
