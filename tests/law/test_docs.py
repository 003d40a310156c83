"""The documentation is generated, and what was generated is what was committed."""

import runpy

import pytest
import typer

from sinks.cli.main import COMMANDS, build
from tests.law.tree import ROOT, SOURCE


def test_help_page_is_what_the_commands_say():
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["render"]()
    assert (ROOT / "docs" / "help.md").read_text() == page, "run `make docs` and commit docs/help.md"


def test_every_command_file_is_a_command():
    written = {path.stem for path in (SOURCE / "cli").glob("*.py") if "\ndef register(" in path.read_text()}
    assert written == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str):
    group = typer.main.get_command(build())
    command = vars(group)["commands"][name]
    assert command.help, f"sinks {name} says nothing about itself"
    silent = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert not silent, f"sinks {name}: {silent} say nothing about themselves"
