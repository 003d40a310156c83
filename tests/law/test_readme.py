"""README.md cannot lie: its commands are run, its Python is run, its targets and its links exist.

Sizes are made small before a command is run; all else stays as it is written. Of a pipeline the last command is run, on
`PIPED`. A command that is neither `sinks` nor `make` must stand in `NOT_RUN` with the reason.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.law.tree import ROOT

README = (ROOT / "README.md").read_text()

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

SMALL = {
    "chat": {"--max-tokens": "4"},
    "compare": {"--tokens": "300", "--window": "60", "--samples": "4"},
    "scan": {"--parts": "sink_rates", "--texts": "4", "--context": "64"},
    "stream": {"--window": "60"},
}
"""What stands in for the sizes of a command; a command listed here needs the built-in model."""

PIPED = "The first line of what is piped.\nAnd the second.\n"
"""What a command that reads its standard input finds there."""

NOT_RUN: dict[str, str] = {}
"""Other commands that may stand in the README: the command, and why it is not run here."""


def commands_in(language: str, block: str) -> list[str]:
    """The commands of one block: every line of `sh`, the lines after a `$` of `console`; comments left out."""
    lines = block.replace("\\\n", " ").splitlines()
    if language == "console":
        lines = [line.removeprefix("$") for line in lines if line.startswith("$ ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [shlex.join(_last_of_pipeline(each)) for each in words if each]


def _last_of_pipeline(words: list[str]) -> list[str]:
    return _last_of_pipeline(words[words.index("|") + 1 :]) if "|" in words else words


def made_small(command: str) -> list[str]:
    """The arguments of a `sinks` command, its sizes replaced by those of `SMALL`."""
    arguments = shlex.split(command)[1:]
    for option, value in SMALL.get(arguments[0], {}).items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    return arguments


def as_parameter(command: str) -> object:
    """The command as a test's parameter, marked `whole` if it needs the built-in model."""
    needs_model = shlex.split(command)[1] in SMALL and "--help" not in command
    return pytest.param(command, marks=[pytest.mark.whole, pytest.mark.slow] if needs_model else [])


SHELL = [(language, block) for language, block in BLOCKS if language in {"sh", "console"}]

COMMANDS = [command for language, block in SHELL for command in commands_in(language, block)]


def test_every_block_says_its_language():
    assert {language for language, _ in BLOCKS} <= {"sh", "console", "python", "text"}
    assert README.count("\n```") == 2 * len(BLOCKS), "a block is not closed, or is indented"


def test_every_command_is_run_or_listed():
    others = {command for command in COMMANDS if command.split()[0] not in {"sinks", "make"}}
    assert others == NOT_RUN.keys()


def test_every_make_target_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [word for command in COMMANDS if command.startswith("make ") for word in command.split()[1:]]
    assert {"demo", "test"} <= set(named) <= set(targets)


@pytest.mark.parametrize("command", [as_parameter(command) for command in COMMANDS if command.startswith("sinks ")])
def test_command(command: str, run_sinks: Callable[..., subprocess.CompletedProcess[str]]):
    result = run_sinks(*made_small(command), piped=PIPED)
    assert result.returncode == 0, result.stderr


@pytest.mark.whole
@pytest.mark.slow
def test_python(tmp_path: Path):
    """Every Python block, one after the other in one program, as a reader would paste them."""
    program = "\n".join(block for language, block in BLOCKS if language == "python")
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip(), "the example shows nothing"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)", README))
def test_every_link_into_the_project_leads_somewhere(link: str):
    assert "://" in link or os.path.exists(ROOT / link), f"README.md links to {link}, which is not there"


def test_the_reading_of_commands():
    block = "# why\nsinks compare \\\n  --tokens 9  # so\n\nmake test\n"
    assert commands_in("sh", block) == ["sinks compare --tokens 9", "make test"]
    assert commands_in("sh", "tail -f log | sinks stream\n") == ["sinks stream"]
    assert commands_in("console", "$ sinks --help\nUsage: sinks\n") == ["sinks --help"]
    assert made_small("sinks compare --tokens 9 --samples 9") == "compare --tokens 300 --samples 4 --window 60".split()
