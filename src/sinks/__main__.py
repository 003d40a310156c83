"""`python -m sinks` is `sinks`, and both begin here.

Until the command line itself is imported, which takes a moment, Ctrl-C leaves at once: there is nothing to clean up,
and a traceback of somebody's imports would tell nobody anything.
"""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def run() -> NoReturn:
    """Run `sinks` on the arguments of this process, and end the process with its exit status."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is told to a process in the background
        signal.signal(signal.SIGINT, _leave)
    from sinks.cli.main import run as run_command  # which listens to Ctrl-C in its own way

    run_command()


def _leave(_number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):  # nobody may be there to be told
        os.write(2, b"sinks: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    run()
