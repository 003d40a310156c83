"""What can be asked beside talking: lines that begin with a slash."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sinks.cli.terminal.conversation import Conversation
from sinks.cli.terminal.screen import counted, status
from sinks.errors import InvalidInput, SinksError


@dataclass(frozen=True)
class Command:
    """One command: what follows its name ("" for nothing, in brackets where it may be left out), and what it does."""

    argument: str
    help: str
    run: Callable[[Conversation, str], None]


class Quit(Exception):
    """The conversation is over."""


def talk(conversation: Conversation, messages: Iterable[str]) -> None:
    """Answer every message and obey every command, until there are no more or somebody leaves.

    At a terminal a mistake is one line, and the conversation goes on; in a pipe it ends it.
    """
    for message in messages:
        try:
            answer(conversation, message)
        except Quit:
            return
        except (SinksError, OSError) as error:
            if not conversation.screen.lively:
                raise
            conversation.screen.note(f"sinks: {error}")


def answer(conversation: Conversation, message: str) -> None:
    """Obey a command, or say the message; two slashes begin a message that begins with one."""
    if not message.startswith("/") or "\n" in message:
        return conversation.say(message)
    if message.startswith("//"):
        return conversation.say(message[1:])
    name, _, argument = message[1:].strip().partition(" ")
    argument = argument.strip()
    if name not in COMMANDS:
        known = ", ".join(f"/{each}" for each in COMMANDS)
        raise InvalidInput(f"/{name} is no command: there are {known}; a message that begins with / is written //")
    command = COMMANDS[name]
    if argument and not command.argument:
        raise InvalidInput(f"/{name} takes nothing behind it, and {argument!r} was given")
    if command.argument and not argument and not command.argument.startswith("["):
        raise InvalidInput(f"/{name} needs something behind it: /{name} {command.argument}")
    command.run(conversation, argument)


def _visible(conversation: Conversation, _: str) -> None:
    session, end = conversation.session, 0
    for span in session.visible.spans:
        if span.start > end:
            conversation.screen.line(f"[... {counted(span.start - end, 'token')} let go ...]")
        conversation.screen.line(span.text)
        end = span.stop
    conversation.screen.line(f"[{session.visible.tokens:,} of {counted(session.seen, 'token')} visible]")


def _save(conversation: Conversation, file: str) -> None:
    conversation.session.save(file)
    conversation.screen.note(f"saved as {file}")


def _load(conversation: Conversation, file: str) -> None:
    conversation.take_up(file)
    conversation.screen.note(f"going on from {file}")
    conversation.screen.status(conversation.session, None)


def _fork(conversation: Conversation, name: str) -> None:
    name = conversation.keep(name)
    conversation.screen.note(f"this moment is kept as {name}; /back {name} returns to it")


def _back(conversation: Conversation, name: str) -> None:
    conversation.go_back(name)
    conversation.screen.note(f"back at {name}")
    conversation.screen.status(conversation.session, None)


def _forks(conversation: Conversation, _: str) -> None:
    for name, session in conversation.kept.items():
        conversation.screen.line(f"{name}: {', '.join(status(session, None))}")
    if not conversation.kept:
        conversation.screen.line("none; /fork keeps this moment")


def _forget(conversation: Conversation, _: str) -> None:
    conversation.forget()
    conversation.screen.note("everything is forgotten but the system prompt")


def _window(conversation: Conversation, size: str) -> None:
    if not size.isdecimal():
        raise InvalidInput(f"/window {size}: a window is a whole number of tokens, 1 or more")
    conversation.resize(int(size))
    kept = "the newest token is" if int(size) == 1 else f"the last {int(size):,} tokens are"
    anew = "; what was visible was read anew" if conversation.session.seen else ""
    conversation.screen.note(f"{kept} kept from here on{anew}")
    conversation.screen.status(conversation.session, None)


def _more(conversation: Conversation, _: str) -> None:
    conversation.go_on()


def _help(conversation: Conversation, _: str) -> None:
    usages = {f"/{name} {command.argument}".rstrip(): command.help for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    for usage, text in usages.items():
        conversation.screen.line(f"{usage:{width}}  {text}")
    conversation.screen.line('One message of several lines: a backslash at the end of all but the last, or """ around')


def _quit(conversation: Conversation, _: str) -> None:
    raise Quit


COMMANDS = {
    "visible": Command("", "show what the model still sees", _visible),
    "more": Command("", "go on with an answer that was cut or stopped", _more),
    "save": Command("FILE", "write this moment to a file", _save),
    "load": Command("FILE", "go on from a saved moment, with its sinks and window", _load),
    "fork": Command("[NAME]", "keep this moment, and go on", _fork),
    "back": Command("NAME", "go on from a kept moment", _back),
    "forks": Command("", "list the kept moments", _forks),
    "forget": Command("", "begin anew with the same system prompt", _forget),
    "window": Command("N", "keep the last N tokens; what is visible now is read anew", _window),
    "help": Command("", "show this list", _help),
    "quit": Command("", "leave; so does Ctrl-D", _quit),
}
