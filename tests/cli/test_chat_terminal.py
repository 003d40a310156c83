"""`sinks chat` at a terminal: what is typed, what is shown, and Ctrl-C under a real pseudo-terminal."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sinks.cli.terminal.keyboard import piped, typed
from sinks.cli.terminal.screen import Screen, fitted
from tests.stream.templates import chat_folder

# The keyboard and the screen


def scripted(*events: str | type[BaseException]) -> Callable[[str], str]:
    """A person who types these lines, and then leaves with Ctrl-D."""
    left: Iterator[str | type[BaseException]] = iter([*events, EOFError])

    def read(prompt: str) -> str:
        event = next(left)
        if isinstance(event, str):
            return event
        raise event

    return read


@pytest.mark.parametrize(
    ("events", "messages"),
    [
        (["one", "", "  ", "two"], ["one", "two"]),
        (["one\\", "two\\", "three", "four"], ["one\ntwo\nthree", "four"]),
        (['"""', "one", "", "/two\\", '"""', "three"], ["one\n\n/two\\", "three"]),
        (['"""one"""', '"""two', 'three"""'], ["one", "two\nthree"]),
        (["one", KeyboardInterrupt, "two", KeyboardInterrupt, KeyboardInterrupt, "three"], ["one", "two"]),
        (['"""', "lost", KeyboardInterrupt, "kept"], ["kept"]),
    ],
)
def test_what_is_typed(events: list[str | type[BaseException]], messages: list[str]):
    assert list(typed(lambda text: None, scripted(*events))) == messages


def test_the_first_ctrl_c_at_the_prompt_says_how_to_leave():
    notes: list[str] = []
    assert not list(typed(notes.append, scripted(KeyboardInterrupt, KeyboardInterrupt, "never read")))
    assert notes == ["", "Ctrl-C again, or Ctrl-D, leaves", ""]


def test_what_is_piped():
    assert list(piped(["one\n", "\n", " two\\\r\n", '"""\n', "last"])) == ["one", " two\\", '"""', "last"]


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Screen(lively=False).line("a\x1b[2Jb\x9b\x07\r\tc\nd é")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffd\ufffd\tc\nd é\n"


@pytest.mark.parametrize(("width", "shown"), [(80, "one · two · three"), (12, "one · two"), (3, "one"), (1, "one")])
def test_a_narrow_terminal_gets_what_fits(width: int, shown: str):
    assert fitted(["one", "two", "three"], width) == shown


# All of it


class Terminal:
    """`sinks chat` under a pseudo-terminal of `columns` columns."""

    def __init__(self, columns: int, *flags: str, **environment: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.handle, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sinks", "chat", *flags],
            stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C becomes a signal
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
            | {"TERM": "xterm-256color"} | environment,
        )  # fmt: skip
        os.close(inside)
        self.shown, self.unread = "", b""

    def until(self, text: str, seconds: float = 60) -> str:
        """What is shown from here on up to `text`; what comes behind it is left for the next call."""
        end = time.monotonic() + seconds
        while text.encode() not in self.unread:
            assert time.monotonic() < end, f"{text!r} never came: {self.shown + self.unread.decode(errors='replace')}"
            if select.select([self.handle], [], [], 0.1)[0]:
                self.unread += os.read(self.handle, 4096)
        before, found, self.unread = self.unread.partition(text.encode())
        told = (before + found).decode(errors="replace")
        self.shown += told
        return told

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.handle)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_at_a_terminal(no_color: str, tmp_path: Path):
    """An answer without an end is stopped by Ctrl-C; the conversation goes on, and ends at the second one."""
    folder = str(chat_folder(tmp_path, endless=True))
    flags = ("--max-tokens", "0", "--window", "50", "--temperature", "0")
    with Terminal(24, folder, *flags, NO_COLOR=no_color) as terminal:
        stop_and_leave(terminal)
    assert ("\x1b[2m" in terminal.shown) == (not no_color)


def stop_and_leave(terminal: Terminal) -> None:
    """Say hello, stop the answer, look, and leave."""
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("hello\r\n")
    time.sleep(1)
    assert terminal.process.poll() is None
    terminal.type("\x03")
    told = terminal.until("\n> ")
    status = next(line for line in told.splitlines() if "tokens seen" in line)
    assert "MB" not in status and "visible" not in status  # no room for it in 24 columns
    terminal.type("/visible\n")
    assert "user\r\nhello" in terminal.until("tokens visible]") or "let go" in terminal.shown
    for _ in range(2):
        terminal.until("> ")
        time.sleep(1)  # readline shows the prompt before it waits; a signal in between would wait for a key
        terminal.type("\x03")
    assert "leaves" in terminal.shown
    assert terminal.process.wait(20) == 0
