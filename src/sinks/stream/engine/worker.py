"""A thread that steps whenever there is something to do."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Worker:
    """Calls `step` until it returns False, then waits for `wake`; after a fault, `on_fault` is told, and it ends."""

    def __init__(self, step: Callable[[], bool], on_fault: Callable[[Exception], None]) -> None:
        self._step = step
        self._on_fault = on_fault
        self._work = threading.Event()
        self._over = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; a second time changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sinks-engine", daemon=True)
            self._thread.start()

    @property
    def started(self) -> bool:
        """Whether somebody steps."""
        return self._thread is not None

    def wake(self) -> None:
        """There may be something to do."""
        self._work.set()

    def end(self) -> None:
        """Step no more; whatever runs now is the last."""
        self._over = True
        self.wake()

    def join(self) -> None:
        """Wait for the end, unless it is this thread that asks."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._over:
            self._work.clear()
            try:
                if self._step():
                    continue
            except Exception as error:
                self._on_fault(error)
                return
            if not self._over:
                self._work.wait()
