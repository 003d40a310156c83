"""The edge of the command line: what a person sees when something is wrong."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from sinks.cli import main as cli
from sinks.errors import CapacityError, SinksError, UnknownName

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Run a command that raises the given error, and return the exit status."""

    def run(error: BaseException) -> int:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.command()
        def fail(size: int = 1) -> None:
            raise error

        monkeypatch.setattr(cli, "build", lambda commands: app)
        return cli.main([])

    return run


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys, sinks.cli.main as cli; status = cli.main(['--help']);"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib')))"
    )
    took: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        took.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
    assert statistics.median(took) < 1.0


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(arguments: list[str], run_sinks: Run):
    result = run_sinks(*arguments)
    assert result.returncode == 0 and not result.stderr
    assert all(f"\n  {name} " in result.stdout for name in cli.COMMANDS)


def test_version(run_sinks: Run):
    assert run_sinks("--version").stdout.startswith("sinks 0.")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["compar"], "sinks: No such command 'compar'. Did you mean 'compare'? See sinks --help\n"),
        (["qzx"], "sinks: No such command 'qzx'. See sinks --help\n"),
        (["--nope"], "sinks: No such option: --nope. See sinks --help\n"),
        (
            ["compare", "--windw", "9"],
            "sinks: No such option: --windw (Possible options: --window). See sinks compare --help\n",
        ),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], line: str, run_sinks: Run):
    result = run_sinks(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (CapacityError("4 sinks + 9000 recent tokens\nexceed 8192"), 2, "4 sinks + 9000 recent tokens exceed 8192"),
        (UnknownName("no model 'gtp2'"), 2, "no model 'gtp2'"),
        (SinksError("any other"), 1, "any other"),
        (PermissionError(13, "Permission denied", "out/x"), 1, "[Errno 13] Permission denied: 'out/x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError: by zero; SINKS_DEBUG=1 shows where"),
    ],
)
def test_an_error_is_one_line(
    error: BaseException,
    status: int,
    line: str,
    failing: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert failing(error) == status
    assert capsys.readouterr().err == f"sinks: {line}\n"


def test_debugging_shows_the_traceback(
    failing: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(cli.DEBUG, "1")
    assert failing(ZeroDivisionError("by zero")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "sinks: unexpected ZeroDivisionError: by zero"


def test_a_command_ends_with_the_status_it_asks_for(failing: Callable[[BaseException], int]):
    assert failing(typer.Exit(3)) == 3


def test_a_reader_that_leaves_early_is_no_error():
    program = "import time; time.sleep(0.5); from sinks.cli.main import run; run()"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


# Standard streams


def sinks_through_a_shell(line: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    python = f"'{sys.executable}'"
    return subprocess.run(["sh", "-c", line.format(python=python)], capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize("arguments", ["--version", "models", "compare"])
def test_a_closed_standard_output_is_said_at_once(arguments: str):
    result = sinks_through_a_shell(f"{{python}} -m sinks {arguments} >&-")
    assert result.returncode == 2
    assert result.stderr.startswith(b"sinks: standard output is closed") and result.stderr.count(b"\n") == 1


def test_a_closed_standard_error_is_told_nothing():
    result = sinks_through_a_shell("{python} -m sinks nonsense 2>&-")
    assert (result.returncode, result.stdout) == (2, b"")


def test_a_full_standard_output_is_named(full: Path):
    with full.open("wb") as out:
        result = subprocess.run([sys.executable, "-m", "sinks", "--help"], stdout=out, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr.startswith(b"sinks: standard output cannot be written (No space left on device)")
    assert result.stderr.count(b"\n") == 1


PRINTING = r"""
import sys, typer, sinks.cli.main as cli
app = typer.Typer()
app.command()(lambda: print("r\u00e9sum\u00e9 \udcff"))
cli.build = lambda commands: app
cli.run()
"""


def test_a_locale_of_ascii_costs_no_output():
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([sys.executable, "-c", PRINTING], capture_output=True, env=os.environ | plain)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"r?sum? ?\n", b"")


# Ctrl-C


INTERRUPTED = """
import os, signal, sys, types
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
{how}
"""
AT_ENTRY = """
sys.modules["typer"] = None
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "sinks.cli.main": interrupt()
sys.meta_path.insert(0, Finder())
from sinks.__main__ import run
run()
"""
IN_A_COMMAND = """
import typer, sinks.cli.main as cli
def command():
    {what}
app = typer.Typer()
app.command()(command)
cli.build = lambda commands: app
cli.run()
"""
INSIDE_AN_IMPORT = """
    import time
    class Swallower:
        def find_spec(self, name, path=None, target=None):
            try:
                interrupt()
            except BaseException: pass
    sys.meta_path.insert(0, Swallower())
    try:
        import nothing_of_that_name
    except ImportError: pass
    time.sleep(20)
"""


@pytest.mark.parametrize(
    "how",
    [
        AT_ENTRY,
        IN_A_COMMAND.replace("{what}", "interrupt()"),
        IN_A_COMMAND.replace("{what}", "exec('interrupt()')"),
        IN_A_COMMAND.replace("{what}", INSIDE_AN_IMPORT.strip()),
    ],
    ids=["at entry", "in a command", "in text given to exec", "swallowed by an import"],
)
def test_ctrl_c_is_one_line(how: str):
    program = INTERRUPTED.replace("{how}", how)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "sinks: interrupted\n")
