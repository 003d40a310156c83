"""`sinks stream` on a tiny model of bytes: any input, one line of output each, and a clean end of every kind."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sinks.cli import main as cli
from sinks.models.load import load
from sinks.stream.session import Session
from tests.reading.tiny import tiny_folder

Command = Callable[..., int]

LINES = "".join(f"{number % 7} of seven\n" for number in range(100)).encode()
ODD = b"\x01$ggggggggg\n"
"""17 bits a token to this random model, and its 100 lines before have 11 and 12 at most."""
SIZES = ("--sinks", "4", "--window", "60")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), trained=128)


class Pipe:
    """Standard input, whose bytes come in the pieces of an iterator, which may do anything in between."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces
        self.buffer = self

    def read1(self, size: int) -> bytes:
        return next(self.pieces, b"")

    def isatty(self) -> bool:
        return False


@pytest.fixture
def stream(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command on some input in an empty folder; returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_root", lambda: None)  # the checker balks: typer's context is no typer.Context

    def run(given: bytes | Iterator[bytes], *flags: str) -> int:
        pipe = io.TextIOWrapper(io.BytesIO(given)) if isinstance(given, bytes) else Pipe(given)
        monkeypatch.setattr(sys, "stdin", pipe)
        sizes = () if "--load" in flags else SIZES
        return cli.main(["stream", "--model", str(model), *sizes, *flags])

    return run


def objects(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def expected(model: Path, pieces: list[str]) -> list[float]:
    """Bits a token of each piece, from one session that reads them one after the other."""
    session, found = Session.open(str(model), sinks=4, window=60), []
    for piece in pieces:
        nll = [each for each in session.score(piece).nll.tolist() if not math.isnan(each)]
        found.append(sum(nll) / len(nll) / math.log(2))
    return found


def test_every_line_has_its_surprise(stream: Command, model: Path, capsys: pytest.CaptureFixture[str]):
    assert stream(LINES, "--json", "--surprise") == 0
    found = objects(capsys)
    texts = LINES.decode().splitlines(keepends=True)
    assert [each["text"] + "\n" for each in found] == texts
    assert [each["line"] for each in found] == list(range(1, 101))
    assert [each["bits_per_token"] for each in found] == pytest.approx(expected(model, texts), abs=1e-4)
    assert [each["z"] is None for each in found] == [True] * 64 + [False] * 36


def test_an_odd_line_is_flagged_and_shown_harmlessly(stream: Command, capsys: pytest.CaptureFixture[str]):
    assert stream(LINES + ODD + LINES) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) == 201
    assert [at for at, line in enumerate(lines) if line.startswith("!")] == [100]
    assert lines[100].endswith("  ␁$ggggggggg")
    assert lines[0].split()[1:] == ["-", "0", "of", "seven"]
    assert shown.err.startswith("201 lines, 2,212 tokens, 1 unusual, ") and shown.err.count("\n") == 1
    assert stream(LINES + ODD + LINES, "--only-unusual") == 0
    assert capsys.readouterr().out.splitlines() == [lines[100]]
    assert stream(LINES + ODD, "--threshold", "1e9") == 0
    assert "!" not in {line[0] for line in capsys.readouterr().out.splitlines()}


def test_any_bytes_are_read(stream: Command, model: Path, capsys: pytest.CaptureFixture[str]):
    data = b"plain\r\n\n\xff\xfe bad\n" + "é".encode() * 3000 + b"\n  \nno end"
    assert stream(data, "--json", "--warm-up", "2") == 0
    found = objects(capsys)
    assert [(each["line"], each["part"]) for each in found] == [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (5, 1), (6, 1)]
    texts = [each["text"] for each in found]
    assert texts == ["plain", "", "\ufffd\ufffd bad", "é" * 2048, "é" * 952, "  ", "no end"]
    fed = ["plain\n", "\n", "\ufffd\ufffd bad\n", "é" * 2048, "é" * 952 + "\n", "  \n", "no end"]
    assert [each["bits_per_token"] for each in found] == pytest.approx(expected(model, fed), abs=1e-4)
    assert [at for at, each in enumerate(found) if each["z"] is None] == [0, 1, 2, 5], "blank lines are not judged"


def test_what_standard_output_cannot_write(stream: Command, monkeypatch: pytest.MonkeyPatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", written)
    assert stream("naïve 🗼\n".encode()) == 0
    assert written.buffer.getvalue().endswith(b"-  na?ve ?\n")  # type: ignore[attr-defined]


def test_no_input_at_all(
    stream: Command, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["stream", "--model", str(model)]) == 2
    assert "there is no standard input to read" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"\n", b"x"])
def test_next_to_nothing(data: bytes, stream: Command, capsys: pytest.CaptureFixture[str]):
    assert stream(data) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == len(data)
    read, plural = len(data), "" if len(data) == 1 else "s"
    assert shown.err.startswith(f"{read} line{plural}, {read} token{plural}, 0 unusual; cache ")


def test_how_the_bytes_arrive_changes_nothing(stream: Command, capsys: pytest.CaptureFixture[str]):
    data = LINES[:704]
    outputs = []
    for size in (704, 64, 7):
        assert stream((data[at : at + size] for at in range(0, 704, size)), "--json") == 0
        outputs.append(objects(capsys))
    for other in outputs[1:]:
        assert [each["text"] for each in other] == [each["text"] for each in outputs[0]]
        bits = [each["bits_per_token"] for each in other]
        assert bits == pytest.approx([each["bits_per_token"] for each in outputs[0]], abs=1e-4)


def test_memory_does_not_grow_with_the_stream(stream: Command, capsys: pytest.CaptureFixture[str]):
    resident, process = [], psutil.Process()

    def pieces() -> Iterator[bytes]:
        for _ in range(60):
            yield LINES * 3
            resident.append(process.memory_info().rss)

    assert stream(pieces(), "--only-unusual", "--past", "100") == 0
    assert "18,000 lines" in capsys.readouterr().err
    assert resident[-1] - resident[9] < 2 << 20, "not even 1.2 bytes for each of 180,000 tokens"


def test_a_mark_of_the_vocabulary_is_read_as_its_letters(stream: Command, capsys: pytest.CaptureFixture[str]):
    assert stream(b"a <s> b\n<s>\n", "--json") == 0
    assert [each["tokens"] for each in objects(capsys)] == [7, 4], "<s> is three bytes, or one token"


# Going on


def test_lines_are_numbered_as_the_input_has_them(stream: Command, capsys: pytest.CaptureFixture[str]):
    assert stream(b"?\none\n?\n?\ntwo\n", "--continue", "2", "--ask", "?", "--surprise", "--json") == 0
    numbers = [(each.get("line"), each.get("after_line")) for each in objects(capsys)]
    assert numbers == [(2, None), (None, 2), (None, 2), (5, None), (None, 5)]


def test_a_continuation_is_what_the_model_would_write_and_is_not_read(
    stream: Command, model: Path, capsys: pytest.CaptureFixture[str]
):
    session = Session.open(load(str(model)), sinks=4, window=60)
    session.feed(LINES[:55].decode())
    first = "".join(session.fork().generate(12))
    session.feed(LINES[55:99].decode())
    second = "".join(session.generate(12))
    data = LINES[:55] + b"?\n" + LINES[55:99]
    assert stream(data, "--continue", "12", "--ask", "?", "--json") == 0
    assert objects(capsys) == [{"after_line": 5, "continuation": first}, {"after_line": 10, "continuation": second}]
    assert stream(data, "--continue", "12", "--surprise") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and lines[5].endswith("  ?") and lines[10].startswith("> ")
    assert stream(b"", "--continue", "3") == 0
    assert capsys.readouterr().out == "", "there is nothing to go on from"


def test_a_kept_stream_goes_on(stream: Command, capsys: pytest.CaptureFixture[str]):
    assert stream(LINES, "--json") == 0
    whole = [each["bits_per_token"] for each in objects(capsys)]
    assert stream(LINES[:550], "--save", "kept") == 0
    capsys.readouterr()
    assert stream(LINES[550:], "--load", "kept", "--json") == 0
    assert [each["bits_per_token"] for each in objects(capsys)] == pytest.approx(whole[50:], abs=1e-4)


def test_ctrl_c_while_waiting_keeps_the_stream(stream: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def pieces() -> Iterator[bytes]:
        yield LINES[:550]
        os.kill(os.getpid(), signal.SIGINT)
        yield pytest.fail("it went on waiting")

    before = signal.getsignal(signal.SIGINT)
    assert stream(pieces(), "--save", "kept") == 130
    assert signal.getsignal(signal.SIGINT) is before
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 50
    assert shown.err.startswith("50 lines, 550 tokens") and shown.err.count("\n") == 1
    assert (tmp_path / "kept").is_file()


def test_ctrl_c_while_reading_waits_for_the_pass(
    stream: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    score = Session.score

    def interrupted(session: Session, given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return score(session, given)

    monkeypatch.setattr(Session, "score", interrupted)
    assert stream(LINES, "--save", "kept") == 130
    shown = capsys.readouterr()
    assert 20 <= len(shown.out.splitlines()) < 30, "the lines of one pass"
    assert shown.err.count("\n") == 1
    monkeypatch.undo()
    assert (tmp_path / "kept").is_file()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--continue", "0"], "continue must be at least 1 token, got 0"),
        (["--ask", "?"], "say with --continue how many tokens"),
        (["--continue", "5", "--only-unusual"], "add --surprise"),
        (["--load", "kept", "--sinks", "4"], "leave out --sinks, --window and --cache"),
        (["--load", "nothing"], "nothing"),
        (["--save", "no/such/folder/kept"], "in no folder that exists"),
        (["--save", "fifo"], "nothing can be written to 'fifo', which is a FIFO: name a file"),
        (["--load", "fifo"], "fifo cannot be read, for it is a FIFO: give a saved session"),
        (["--threshold", "-1"], "give a number above 0"),
        (["--warm-up", "600"], "warm up for 2 lines at least"),
        (["--window", "200"], "choose a window of at most"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], says: str, stream: Command, capsys: pytest.CaptureFixture[str]):
    os.mkfifo("fifo")
    assert stream(LINES, *flags) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("sinks: ") and shown.err.count("\n") == 1
    assert says in shown.err


# As a process


def started(model: Path, *flags: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "sinks", "stream", "--model", str(model), *SIZES, *flags]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes)  # type: ignore[call-overload]


def test_a_line_is_answered_before_the_next_one_comes(model: Path):
    with started(model) as process:
        assert process.stdin and process.stdout and process.stderr
        for line in (b"first\n", b"second\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().endswith(line)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read().startswith(b"2 lines, 13 tokens")


def test_a_reader_that_has_seen_enough(model: Path, tmp_path: Path):
    with started(model, "--save", str(tmp_path / "kept")) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"first\n")
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b"second\n")
        process.stdin.flush()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""
    assert (tmp_path / "kept").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_request_to_end_keeps_the_stream(number: signal.Signals, model: Path, tmp_path: Path):
    with started(model, "--save", str(tmp_path / "kept")) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"first\n")
        process.stdin.flush()
        process.stdout.readline()
        if number == signal.SIGHUP:  # nobody is left to be told
            process.stdout.close()
            process.stderr.close()
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert (tmp_path / "kept").is_file()


def test_a_full_standard_output_costs_no_stream(model: Path, tmp_path: Path, full: Path):
    command = [sys.executable, "-m", "sinks", "stream", "--model", str(model), *SIZES, "--save", str(tmp_path / "kept")]
    with full.open("wb") as out:
        result = subprocess.run(command, input=b"first\n", stdout=out, stderr=subprocess.PIPE)
    summary, error = result.stderr.decode().splitlines()
    assert result.returncode == 1 and summary.startswith("1 line, 6 tokens")
    assert error.startswith("sinks: standard output cannot be written (No space left on device)")
    assert (tmp_path / "kept").is_file()


def test_an_input_that_breaks_costs_no_stream(stream: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def pieces() -> Iterator[bytes]:
        yield LINES[:550]
        raise OSError(5, "Input/output error")

    assert stream(pieces(), "--save", "kept") == 1
    summary, error = capsys.readouterr().err.splitlines()
    assert summary.startswith("50 lines, 550 tokens")
    assert error.startswith("sinks: standard input cannot be read (Input/output error)")
    assert (tmp_path / "kept").is_file()


def test_what_this_process_was_told_to_ignore_stays_ignored(stream: Command, capsys: pytest.CaptureFixture[str]):
    def pieces() -> Iterator[bytes]:
        yield LINES[:55]
        os.kill(os.getpid(), signal.SIGHUP)
        yield LINES[55:110]

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stream(pieces()) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(capsys.readouterr().out.splitlines()) == 10
