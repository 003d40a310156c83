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

from sinks.cli.flags import AcceptTerms, CacheKind, Device, Dtype, Quant, kind_of

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
    reader = Reader(flags, opened(flags), usual)
    if sys.stdin.isatty():
        typer.echo("sinks: reading what is typed; Ctrl-D ends it", err=True)
    with Patience() as patience:
        try:
            reader.read(patience)
            if flags.continue_ is not None and not patience.asked:
                reader.go_on()
        except KeyboardInterrupt:  # while it waited: between two lines, so the stream is whole
            patience.asked = True
        except BrokenPipeError:  # nobody listens any more, and what was read is still worth keeping
            reader.keep()
            raise
        typer.echo(reader.summary(), err=True)  # before anything can fail
        reader.keep()
    if patience.asked:
        raise typer.Exit(130)


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
    loaded = load(
        flags.model, dtype=flags.dtype, device=flags.device, quant=flags.quant, accept_terms=flags.accept_terms
    )
    if flags.load is not None:
        session = Session.open(loaded, sinks=0, window=1)  # fits any model; the file brings its own sizes
        session.load(flags.load)
        return session
    sinks = DEFAULT_SINKS if flags.sinks is None else flags.sinks
    return Session.open(loaded, sinks=sinks, window=flags.window, cache=kind_of(flags.cache))


class Patience:
    """Ctrl-C while the model reads is kept until it has read: a pass broken off would leave a stream of no use.

    While nothing is read it ends the waiting at once, and the second one is never kept.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waits = False
        self._before: Any = None

    def __enter__(self) -> "Patience":
        if threading.current_thread() is threading.main_thread():  # only there are signals heard
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, Ctrl-C raises KeyboardInterrupt."""
        self._waits = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._waits = False

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        if self._waits or self.asked:
            raise KeyboardInterrupt
        self.asked = True


@dataclass
class Reader:
    """Reads standard input through one session, and prints what it finds; counts, and keeps nothing else."""

    flags: Flags
    session: "Session"
    usual: "Usual"
    lines: int = 0
    tokens: int = 0
    unusual: int = 0
    nats: float = 0.0
    scored: int = 0

    def read(self, patience: Patience) -> None:
        """To the end of the input."""
        from sinks.reading.pipe import Lines

        pipe: Any = sys.stdin.buffer  # buffered, whatever its type says
        lines = Lines()
        while True:
            with patience.waiting():
                data = pipe.read1(AT_ONCE)
            self.take(lines.push(data) if data else lines.finish(), patience)
            if not data:
                return

    def take(self, lines: "list[Line]", patience: Patience) -> None:
        """Read these lines, as many together as fit into one pass; Ctrl-C is heard between two passes."""
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
            with patience.waiting():
                pass
        self.flush(waiting)

    def ids(self, line: "Line", first: bool) -> list[int]:
        """The tokens of one line; the first of a stream begins as streams of this model do."""
        from sinks.reading.tokens import stream_ids

        tokenizer: Any = self.session.loaded.tokenizer
        if first and not self.session.seen:
            return stream_ids(tokenizer, line.fed)[0]
        return tokenizer(line.fed, add_special_tokens=False, verbose=False).input_ids

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
        text = "".join(self.session.fork().generate(self.flags.continue_))
        if self.flags.json:
            tell(json.dumps({"after_line": self.lines, "continuation": text}, ensure_ascii=False))
        else:
            tell("\n".join(f"> {line.translate(VISIBLE_CONTROLS)}" for line in text.split("\n")))

    def keep(self) -> None:
        """Save the stream, if that was asked for."""
        if self.flags.save is not None:
            self.session.save(self.flags.save)

    def summary(self) -> str:
        """What was read, in one line."""
        surprise = f", {self.nats / self.scored / math.log(2):.2f} bits a token" if self.scored else ""
        judged = f", {self.unusual:,} unusual" if self.flags.scores else ""
        return f"{self.lines:,} lines, {self.tokens:,} tokens{judged}{surprise}; cache {self.session.nbytes:,} bytes"


def tell(line: str) -> None:
    """Print a line at once, with `?` for what standard output cannot write: a log may hold anything."""
    encoding = sys.stdout.encoding or "utf-8"
    typer.echo(line.encode(encoding, "replace").decode(encoding))
