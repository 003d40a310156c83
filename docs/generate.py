"""Writes docs/help.md from what the commands themselves say: `make docs`. tests/law/test_docs.py keeps it true."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from typer.main import get_command

from sinks.cli.main import COMMANDS, build

TARGET = Path(__file__).with_name("help.md")

HEADER = """# Commands

Written by `make docs` from the `--help` of every command; do not edit.
"""


def help_of(*command: str) -> str:
    """What `sinks COMMAND --help` prints on a terminal of 80 columns."""
    return subprocess.run(
        [sys.executable, "-m", "sinks", *command, "--help"],
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def every_command() -> Iterator[tuple[str, ...]]:
    """The program itself, each command, and each command of a command."""
    yield ()
    for name in COMMANDS:
        yield (name,)
        command = get_command(build([name]))
        group = getattr(command, "commands", {}).get(name, command)
        yield from ((name, below) for below in getattr(group, "commands", {}) if below != name)


def render() -> str:
    """The whole page."""
    sections = [(" ".join(["sinks", *command]), help_of(*command)) for command in every_command()]
    return HEADER + "".join(f"\n## {title}\n\n```text\n{text.rstrip()}\n```\n" for title, text in sections)


if __name__ == "__main__":
    TARGET.write_text(render())
