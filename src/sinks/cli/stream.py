"""`sinks stream`: a model reads a pipe for ever, and says which lines surprise it."""

import functools
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinks.cli.flags import AcceptTerms, CacheKind, Device, Dtype, Quant, check_saved, kind_of, take_up
from sinks.cli.terminal.output import tell_person
from sinks.cli.terminal.screen import counted
from sinks.errors import InputLost

if TYPE_CHECKING:
    from sinks.reading.pipe import Line, Usual
    from sinks.stream.session import Session

AT_ONCE = 1 << 16
"""Bytes taken from the pipe at most before they are read by the model."""

TOGETHER = 256
"""Tokens of waiting lines that go into one forward pass."""

VISIBLE_CONTROLS = {code: 0x2400 + code for code in range(32) if code != 9} | {127: 0x2421}
"""A terminal would obey what a log line tells it, so control characters are shown by their pictures."""


@dataclass(frozen=True)
class Flags:
    """What can be asked of `sinks stream`."""

    surprise: Annotated[
        bool, typer.Option("--surprise", help="Say how surprising each line is; what happens without --continue too.")
    ] = False
    continue_: Annotated[
        int | None,
        typer.Option("--continue", help="At the end of the input, write this many tokens as it might go on."),
    ] = None
    ask: Annotated[
        str | None, typer.Option(help="With --continue: a line that is just this is not read, but asks for it at once.")
    ] = None
    threshold: Annotated[float, typer.Option(help="Robust z-score from which a line can be unusual.")] = 4.0
    past: Annotated[int, typer.Option(help="With how many lines before it a line is compared, at most.")] = 512
    warm_up: Annotated[int, typer.Option(help="Lines before the first that can be unusual.")] = 64
    only_unusual: Annotated[bool, typer.Option("--only-unusual", help="Print unusual lines only.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False
    save: Annotated[Path | None, typer.Option(help="File to keep the stream in when it ends, to go on later.")] = None
    load: Annotated[Path | None, typer.Option(help="File of an earlier stream to go on from.")] = None
    model: Annotated[
        str | None, typer.Option(help="Name, Hub id, folder or GGUF file; by default the built-in model.")
    ] = None
    sinks: Annotated[int | None, typer.Option(help="First tokens kept for ever; by default 4.")] = None
    window: Annotated[
        int | None, typer.Option(help="Most recent tokens kept, the current one included; by default 1020.")
    ] = None
    cache: CacheKind = "full"
    device: Device = "cpu"
    dtype: Dtype = "float32"
    quant: Quant = "none"
    accept_terms: AcceptTerms = False

    @property
    def scores(self) -> bool:
        """Whether lines are scored."""
        return self.surprise or self.continue_ is None


def register(app: typer.Typer) -> None:
    """Add `stream` to `app`."""

    @app.command("stream")
    @functools.wraps(Flags, assigned=("__annotations__",), updated=())  # typer reads the flags from the class's fields
    def command(**flags: Any) -> None:
        """Read text from a pipe for ever, in constant memory: how surprising is each line, and which are unusual?

        Each line is printed with its surprise in bits a token and its robust z-score among the lines before it. `!`
        marks the unusual ones: z is --threshold or more, and at most one line in a hundred is as surprising. Ctrl-C
        ends the reading, and so does the end of the input; a summary follows.

        journalctl -f | sinks stream --surprise
        """
        run(Flags(**flags))


def run(flags: Flags) -> None:
    """Open the session, read to the end, keep it if asked to, and say what was read."""
    from sinks.reading.pipe import Rule, Usual

    usual = Usual(Rule(threshold=flags.threshold, past=flags.past, warm_up=flags.warm_up))
    session = opened(flags)
    if sys.stdin.isatty():
        tell_person("sinks: reading what is typed; Ctrl-D ends it")
    with Patience() as patience:
        reader = Reader(flags, session, usual, patience)
        try:
            reader.read()
        except KeyboardInterrupt:  # between two passes, so the stream is whole
            reader.end()
        except BrokenPipeError:  # nobody listens any more, and what was read is still worth keeping
            reader.keep()
            raise
        except BaseException:  # a full disk behind standard output, say: nor does that cost the stream
            reader.end_failed()
            raise
        else:
            reader.end()
    if patience.asked:
        raise typer.Exit(128 + patience.asked)


def opened(flags: Flags) -> "Session":
    """The session that the flags ask for. Raises InvalidInput for flags that do not go together."""
    from sinks.cache.cache import DEFAULT_SINKS
    from sinks.cache.snapshot import check_target
    from sinks.errors import InvalidInput, SnapshotError
    from sinks.models.load import load
    from sinks.stream.session import Session

    if sys.stdin is None:  # closed by whoever started this process
        raise InvalidInput("there is no standard input to read: pipe a text into sinks stream")
    if flags.continue_ is not None and flags.continue_ < 1:
        raise InvalidInput(f"continue must be at least 1 token, got {flags.continue_}")
    if flags.ask is not None and flags.continue_ is None:
        raise InvalidInput("--ask asks for a continuation: say with --continue how many tokens it has")
    if flags.only_unusual and not flags.scores:
        raise InvalidInput("--only-unusual needs to know how surprising lines are: add --surprise")
    if flags.load is not None and (flags.sinks is not None or flags.window is not None or flags.cache != "full"):
        raise InvalidInput("a loaded stream has its sinks and window: leave out --sinks, --window and --cache")
    if flags.save is not None:
        try:
            check_target(flags.save)
        except SnapshotError as error:
            raise InvalidInput(f"--save: {error}") from error
    if flags.load is not None:
        check_saved(flags.load)
    loaded = load(
        flags.model, dtype=flags.dtype, device=flags.device, quant=flags.quant, accept_terms=flags.accept_terms
    )
    if flags.load is not None:
        session = Session.open(loaded, sinks=0, window=1)  # fits any model; the file brings its own sizes
        take_up(session, flags.load)
        return session
    sinks = DEFAULT_SINKS if flags.sinks is None else flags.sinks
    return Session.open(loaded, sinks=sinks, window=flags.window, cache=kind_of(flags.cache))


class Patience:
    """A request to end is kept until the model has read: a pass broken off would leave a stream of no use.

    Such requests are Ctrl-C, the end of a service (SIGTERM) and a closed terminal (SIGHUP). While nothing is read one
    ends the waiting at once, and a second Ctrl-C is never kept. A process begun in the background of a script, which
    shells tell to ignore Ctrl-C, hears it all the same: the script has no other way to say it.
    """

    def __init__(self) -> None:
        self.asked = 0
        """The signal that asked for the end; 0 while none did."""
        self._waits = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Patience":
        if threading.current_thread() is not threading.main_thread():  # only there are signals heard
            return self
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            ignored = number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN  # by nohup, say
            if number not in self._before and not ignored:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a request to end raises KeyboardInterrupt."""
        self._waits = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._waits = False

    def look(self) -> None:
        """Raises KeyboardInterrupt if somebody asked for the end: to be called where the stream is whole."""
        with self.waiting():
            pass

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        again, self.asked = bool(self.asked), self.asked or number
        if self._waits or (again and number == signal.SIGINT):
            self._waits = False  # a terminal that closes may say so twice: the second must not break off the saving
            raise KeyboardInterrupt


@dataclass
class Reader:
    """Reads standard input through one session, and prints what it finds; counts, and keeps nothing else.

    `number` is that of the last line of the input that the model read; `lines` are all it read.
    """

    flags: Flags
    session: "Session"
    usual: "Usual"
    patience: Patience
    number: int = 0
    lines: int = 0
    tokens: int = 0
    unusual: int = 0
    nats: float = 0.0
    scored: int = 0

    def read(self) -> None:
        """To the end of the input, and on from there if that was asked for."""
        from sinks.reading.pipe import Lines

        lines = Lines()
        data = b"some"
        while data:
            with self.patience.waiting():
                data = self.more()
            self.take(lines.push(data) if data else lines.finish())
        if self.flags.continue_ is not None:
            self.go_on()

    def more(self) -> bytes:
        """Bytes that have come; waits for the first, and there are none at the end of the input."""
        pipe: Any = sys.stdin.buffer  # buffered, whatever its type says
        try:
            return pipe.read1(AT_ONCE)
        except OSError as error:
            raise InputLost(f"standard input cannot be read ({error.strerror or error}): start it again") from error

    def take(self, lines: "list[Line]") -> None:
        """Read these lines, as many together as fit into one pass; requests to end are heard between two passes."""
        waiting: list[tuple[Line, list[int]]] = []
        for line in lines:
            if self.flags.ask is not None and line.ends and line.part == 1 and line.text == self.flags.ask:
                self.flush(waiting)
                waiting = []
                self.go_on()
                continue
            ids = self.ids(line, first=not waiting)
            if waiting and sum(len(each) for _, each in waiting) + len(ids) > TOGETHER:
                self.flush(waiting)
                waiting = []
            waiting.append((line, ids))
            self.patience.look()
        self.flush(waiting)

    def ids(self, line: "Line", first: bool) -> list[int]:
        """The tokens of one line; the first of a stream begins as streams of this model do."""
        from sinks.reading.tokens import plain_ids

        return plain_ids(self.session.loaded.tokenizer, line.fed, begins=first and not self.session.seen)

    def flush(self, waiting: "list[tuple[Line, list[int]]]") -> None:
        """Read these lines in one pass, and print each."""
        together = [token for _, ids in waiting for token in ids]
        nll = None
        if self.flags.scores:
            nll = self.session.score(together).nll.tolist()
        else:
            self.session.feed(together)
        self.tokens += len(together)
        begin = 0
        for line, ids in waiting:
            self.number = line.number
            self.lines += line.ends or line.part == 1
            if nll is not None:
                self.judge(line, [each for each in nll[begin : begin + len(ids)] if not math.isnan(each)])
            begin += len(ids)

    def judge(self, line: "Line", nll: list[float]) -> None:
        """Say how surprising a line was, its tokens having these nats. Empty lines are neither judged nor compared."""
        from sinks.reading.pipe import Verdict

        self.nats += sum(nll)
        self.scored += len(nll)
        bits = sum(nll) / len(nll) / math.log(2) if nll else None
        verdict = self.usual.judge(bits) if bits is not None and line.text.strip() else Verdict(None, False)
        z, unusual = verdict.z, verdict.unusual
        self.unusual += unusual
        if self.flags.only_unusual and not unusual:
            return
        if self.flags.json:
            told = {"line": line.number, "part": line.part, "tokens": len(nll), "bits_per_token": bits, "z": z}
            tell(json.dumps(told | {"unusual": unusual, "text": line.text}, ensure_ascii=False))
            return
        shown = line.text.translate(VISIBLE_CONTROLS)
        numbers = " ".join(f"{'-' if each is None else f'{each:.2f}':>7}" for each in (bits, z))
        tell(f"{'!' if unusual else ' '} {numbers}  {shown}")

    def go_on(self) -> None:
        """Write what might come next, on a copy of the stream, which itself does not read it."""
        if not self.session.seen:
            return
        pieces: list[str] = []
        for piece in self.session.fork().generate(self.flags.continue_):
            self.patience.look()
            pieces.append(piece)
        text = "".join(pieces)
        if self.flags.json:
            tell(json.dumps({"after_line": self.number, "continuation": text}, ensure_ascii=False))
        else:
            tell("\n".join(f"> {line.translate(VISIBLE_CONTROLS)}" for line in text.split("\n")))

    def end(self) -> None:
        """Keep the stream, whether or not anybody is left to be told what was read; then tell it."""
        try:
            self.keep()
        finally:
            tell_person(self.summary())

    def end_failed(self) -> None:
        """End as well as can be, so that the error under way is what the command ends with."""
        from sinks.errors import SinksError

        try:
            self.end()
        except SinksError as error:
            tell_person(f"sinks: {error}")

    def keep(self) -> None:
        """Save the stream, if that was asked for."""
        if self.flags.save is not None:
            self.session.save(self.flags.save)

    def summary(self) -> str:
        """What was read, in one line."""
        surprise = f", {self.nats / self.scored / math.log(2):.2f} bits a token" if self.scored else ""
        judged = f", {self.unusual:,} unusual" if self.flags.scores else ""
        read = f"{counted(self.lines, 'line')}, {counted(self.tokens, 'token')}"
        return f"{read}{judged}{surprise}; cache {counted(self.session.nbytes, 'byte')}"


def tell(line: str) -> None:
    """Print a line at once: a log is followed as it grows."""
    print(line, flush=True)
