"""The `sinks` command: gathers the commands, and is the one place where an error becomes a line for a person.

Each command is a file of this room with a function `register(app)`; what is heavy (torch, transformers, matplotlib) it
imports inside the command, so that `sinks --help` answers at once.

Exit status: 0 done, 1 could not be done, 2 the input was wrong, 130 interrupted.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import NoReturn

import typer

from sinks.cli.terminal.interrupt import listen, stop_listening
from sinks.cli.terminal.output import check_output, give_up, open_streams, tell_person
from sinks.errors import InvalidInput, NoModel, OutputLost, SinksError, UnknownName

COMMANDS = ("chat", "stream", "compare", "scan", "bench", "models")

DEBUG = "SINKS_DEBUG"
"""Name of the environment variable that, set to anything, shows the traceback of an error."""

_INTERRUPTED = 130


def run() -> NoReturn:
    """Run `sinks` on the arguments of this process, and end the process with its exit status."""
    open_streams()
    listen()
    status = main(sys.argv[1:])
    stop_listening()
    sys.exit(status)


def main(arguments: Sequence[str]) -> int:
    """Run `sinks` on `arguments` (program name left out) and return the exit status.

    Bad input never shows a traceback: every error ends as one line `sinks: ...` on standard error.
    """
    try:
        check_output()
        return _invoke(arguments)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        give_up(sys.stdout)
        return 1
    except OutputLost as error:
        give_up(sys.stdout)
        return _complain(str(error), status=1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", status=_INTERRUPTED)
    except typer.TyperException as error:
        return _complain(_with_help(error), status=error.exit_code)
    except (InvalidInput, NoModel, UnknownName) as error:
        return _complain(str(error), status=2)
    except SinksError as error:
        return _complain(str(error), status=1)
    except OSError as error:
        return _complain(str(error), status=1)
    except Exception as error:
        if _was_interrupted(error):
            return _complain("interrupted", status=_INTERRUPTED)
        advice = "" if os.environ.get(DEBUG) else f"; {DEBUG}=1 shows where"
        return _complain(f"unexpected {type(error).__name__}: {error}{advice}", status=1)


def build(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """The application with these commands registered.

    Typer's own pretty tracebacks are off, since `main` handles errors, and so is its rich help: plain help is faster,
    can be piped, and is the same text in docs/help.md.
    """
    app = typer.Typer(
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True, epilog=_EPILOG)(_root)
    for name in commands:
        import_module(f"sinks.cli.{name}").register(app)
    return app


_EPILOG = (
    "Exit status: 0 done, 1 could not be done, 2 the input was wrong, 130 interrupted. "
    f"Set {DEBUG}=1 to see the traceback of an error."
)


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True),
) -> None:
    """Stream a language model for ever at constant memory, and see what its attention sinks do."""
    if version:
        typer.echo(f"sinks {metadata.version('sinks')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _invoke(arguments: Sequence[str]) -> int:
    """Parse and run, without the error handling of `typer`: that is `main`'s."""
    wanted = arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS  # one command loads one file
    command = typer.main.get_command(build(wanted))
    try:
        with command.make_context("sinks", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as request:
        status = request.exit_code
    else:
        status = 0
    sys.stdout.flush()  # here, where a broken pipe is still caught
    return status


def _with_help(error: typer.TyperException) -> str:
    """The message of a usage error, and where to read on: the help of the command in which it was made."""
    context: typer.Context | None = getattr(error, "ctx", None)
    path = "sinks" if context is None else context.command_path
    message = error.format_message().rstrip(".")
    return f"{message}{'' if message.endswith('?') else '.'} See {path} --help"


def _complain(message: str, *, status: int) -> int:
    """Print one line on standard error, after the traceback if it is wanted, and pass `status` on."""
    if os.environ.get(DEBUG):
        traceback.print_exc()
    tell_person(f"sinks: {' '.join(message.split())}")
    return status


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error is what somebody made of a Ctrl-C: a module broken off says that it cannot be imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
