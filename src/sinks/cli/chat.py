"""`sinks chat`: a conversation without an end, at constant memory."""

import functools
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinks.cli.flags import AcceptTerms, CacheKind, Device, Dtype, Quant, check_saved, kind_of, take_up

if TYPE_CHECKING:
    from sinks.cli.terminal.stopping import Stopper
    from sinks.models.load import Loaded
    from sinks.stream.opening import Sinks
    from sinks.stream.session import Session


@dataclass(frozen=True)
class Flags:
    """What can be asked of `sinks chat`."""

    model: Annotated[
        str | None,
        typer.Argument(
            help="Name, Hub id, folder or GGUF file of a chat model; by default the built-in model.",
            show_default=False,
        ),
    ] = None
    system: Annotated[str | None, typer.Option(help="System prompt; by default what the model's template says.")] = None
    pin: Annotated[
        bool | None,
        typer.Option(
            "--pin/--no-pin",
            help="Keep the system prompt for ever, as sinks beside the window. By default if --system is given.",
            show_default=False,
        ),
    ] = None
    sinks: Annotated[
        str | None, typer.Option(help="First tokens kept for ever, or auto to measure how many; by default 4.")
    ] = None
    window: Annotated[int | None, typer.Option(help="Most recent tokens kept; by default 1020.")] = None
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; larger is more varied.")] = 0.7
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that reach this probability.")] = 0.9
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 for all.")] = 0
    min_p: Annotated[float, typer.Option(help="Only tokens this fraction as probable as the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Makes what was said less likely; 1 for none.")] = 1.1
    seed: Annotated[int | None, typer.Option(help="Begins the random numbers of the conversation.")] = None
    max_tokens: Annotated[int, typer.Option(help="Tokens of one answer at most; 0 for no limit.")] = 512
    load: Annotated[
        Path | None, typer.Option(help="Go on from a saved moment, with its sinks and window.", show_default=False)
    ] = None
    cache: CacheKind = "full"
    device: Device = "cpu"
    dtype: Dtype = "float32"
    quant: Quant = "none"
    accept_terms: AcceptTerms = False


def register(app: typer.Typer) -> None:
    """Add `chat` to `app`."""

    @app.command("chat")
    @functools.wraps(Flags, assigned=("__annotations__",), updated=())  # typer reads the flags from the class's fields
    def command(**flags: Any) -> None:
        """Talk with a model for as long as you like: memory and time a token stay what they are.

        Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. In a pipe each line is a message, and only the
        answers are printed.
        """
        run(Flags(**flags))


def run(flags: Flags) -> None:
    """Check everything that can be wrong, load, and talk."""
    from sinks.cli.terminal.commands import talk
    from sinks.cli.terminal.conversation import Conversation
    from sinks.cli.terminal.keyboard import piped, typed
    from sinks.cli.terminal.screen import Screen
    from sinks.cli.terminal.stopping import Stopper
    from sinks.models.load import load

    sampling, max_tokens, sinks = sampling_of(flags), max_tokens_of(flags), sinks_of(flags)
    if flags.load is not None:
        check_saved(flags.load)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says: vocabularies are UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    screen, stopper = Screen(sys.stdin.isatty() and sys.stdout.isatty()), Stopper()
    loaded = load(
        flags.model, dtype=flags.dtype, device=flags.device, quant=flags.quant, accept_terms=flags.accept_terms
    )
    session = open_session(flags, loaded, sinks, stopper)
    conversation = Conversation(session, sampling, max_tokens, screen, stopper)
    if screen.lively:
        plan = session.plan
        screen.note(
            f"{loaded.source.name} keeps the first {plan.sinks:,} tokens and the last {plan.window:,}; "
            "/help lists the commands"
        )
    if session.dialogue.strips_reasoning:
        screen.note("this model's template leaves reasoning out of earlier answers; here it stays until it is let go")
    if screen.lively:
        with stopper.watching():  # Ctrl-C between an answer and the prompt must not end the program
            talk(conversation, typed(screen.note, stopper.prompting(input)))
    else:
        talk(conversation, piped(sys.stdin))


def open_session(flags: Flags, loaded: "Loaded", sinks: "Sinks | None", stopper: "Stopper") -> "Session":
    """A session as the flags ask for it, known to have a chat template that can be followed."""
    from sinks.cache.cache import DEFAULT_SINKS
    from sinks.cli.terminal.conversation import check_dialogue
    from sinks.stream.session import Session

    pin = flags.system is not None if flags.pin is None else flags.pin
    session = Session.open(
        loaded,
        sinks=DEFAULT_SINKS if sinks is None else sinks,
        window=flags.window,
        system=flags.system,
        pin="system" if pin else None,
        cache=kind_of(flags.cache),
        on_evict=stopper.heard,
    )
    if flags.load is not None:
        take_up(session, flags.load)
        check_dialogue(session, flags.load)
    _ = session.dialogue  # raises here, before anything was typed
    return session


def sampling_of(flags: Flags) -> Any:
    """How tokens are chosen. Raises InvalidInput."""
    from sinks.stream.sampling import Sampling

    return Sampling(
        temperature=flags.temperature,
        top_p=flags.top_p,
        top_k=flags.top_k,
        min_p=flags.min_p,
        repetition_penalty=flags.repetition_penalty,
        seed=flags.seed,
    )


def max_tokens_of(flags: Flags) -> int | None:
    """Tokens of one answer, None for no limit. Raises InvalidInput."""
    from sinks.errors import InvalidInput

    if flags.max_tokens < 0:
        raise InvalidInput(f"--max-tokens {flags.max_tokens}: give a number of tokens, or 0 for no limit")
    return flags.max_tokens or None


def sinks_of(flags: Flags) -> "Sinks | None":
    """How many sinks were asked for. Raises InvalidInput, also where a saved moment would bring its own."""
    from sinks.errors import InvalidInput

    given = {"--sinks": flags.sinks, "--window": flags.window, "--system": flags.system, "--pin": flags.pin}
    given["--cache"] = None if flags.cache == "full" else flags.cache
    wrong = [name for name, value in given.items() if value is not None]
    if flags.load is not None and wrong:
        raise InvalidInput(f"{', '.join(wrong)}: a saved moment brings its own; leave it out, or --load")
    if flags.sinks is None or flags.sinks == "auto":
        return flags.sinks
    if not flags.sinks.isdecimal():
        raise InvalidInput(f"--sinks {flags.sinks}: give a whole number, or auto")
    return int(flags.sinks)
