"""Ctrl-C wherever no command listens to it: one exception that reaches the edge, whatever is under way."""

import _thread
import signal
import threading
from types import FrameType

AGAIN = 0.05
"""Seconds after which a Ctrl-C that came inside an import is tried again."""


def listen() -> None:
    """From here on Ctrl-C is `hear`d, unless this process was told to ignore it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, hear)


def hear(_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not inside an import.

    Compiled modules swallow it there, print it, or make of it a module that cannot be imported.
    """
    if not importing(frame):
        raise KeyboardInterrupt
    timer = threading.Timer(AGAIN, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported somewhere above this frame."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def stop_listening() -> None:
    """The process ends already: Ctrl-C must not show how, nor be what it died of.

    Python notes a Ctrl-C inside any text given to `exec`, as dataclasses do, and at the end kills the process by that
    signal however it was handled since. Another `exec` takes the note back.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exec("")
