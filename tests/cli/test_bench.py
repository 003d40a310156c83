"""`sinks bench cpu` from end to end on a tiny model: who takes part, who cannot and why, every number in the file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sinks.cli import main as cli
from sinks.errors import InvalidInput
from sinks.evals.speed import measure, writers
from sinks.evals.speed.measure import Bench
from tests.reading.tiny import tiny_folder

Command = Callable[..., int]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in a folder with a tiny model and a text, over streams of a few tokens."""
    tiny_folder(tmp_path / "model", trained=256)
    (tmp_path / "text.txt").write_text("".join(f"line {number:04}\n" for number in range(40)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_root", lambda: None)  # the checker balks: typer's context is no typer.Context
    monkeypatch.setattr(measure, "QUICK", Bench(levels=(8, 40), rounds=3, burst=2, scored=100))
    flags = ("--model", "model", "--text", "text.txt", "--window", "28", "--quick", "--threads", "1")
    return lambda *more: cli.main(["bench", "cpu", *flags, *more])


def test_everybody_is_in_the_file_and_the_table(bench: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench("--json", "cpu.json") == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    names = [writer["name"] for writer in found["writers"]]
    assert names == ["sinks, float32", "sinks, int8", "sinks, int4", "transformers generate(), float32"]
    for writer in found["writers"]:
        for level in writer["levels"].values():
            assert len(level["bursts"]) == 3 and min(level["bursts"]) > 0
            assert level["milliseconds"] == sorted(level["bursts"])[1]
            assert level["tokens_per_second"] == pytest.approx(1e3 / level["milliseconds"], rel=0.01)
    assert set(found["perplexity"]) == {"sinks, int8", "sinks, int4"}
    assert found["perplexity"]["sinks, int8"]["perplexity_ratio"] == pytest.approx(1, abs=0.1)
    assert found["settings"]["plan"] == {"sinks": 4, "window": 28}
    assert "int8 by row" in found["weights"]["sinks, int8"]
    assert set(found["ratios"]["sinks, int4"]) == {"transformers generate(), float32"}
    assert found["load_average_before"] is None or len(found["load_average_before"]) == 3
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "llama.cpp: it reads GGUF files, and this model is none" in shown.out
    for name in names:
        assert name in shown.out


def test_a_peer_that_is_not_installed_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(writers.UnsupportedOption, match="llama.cpp: not installed"):
        writers.llama_cpp()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--threads", "0"], "threads=0: give 1 to"),
        (["--window", "0"], "window=0 is too small"),
        (["--window", "300"], "choose a window of at most 252"),
        (["--model", "no such model"], "no such model"),
        (["--json", "text.txt/cpu.json"], "no result can be written"),
        (["--json", "text.txt"], "'text.txt' is no earlier result of this kind, and stays as it is"),
        (["--json", "model"], "which is a folder: name a file in it"),
        (["--json", "model/config.json"], "is no earlier result of this kind"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str],
    says: str,
    bench: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(measure, "race", lambda *_: pytest.fail("it measured first"))
    assert bench(*flags) in (1, 2)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and says in shown.err


def test_levels_must_leave_room_for_what_is_written():
    with pytest.raises(InvalidInput, match="set the levels further apart"):
        Bench(levels=(8, 16), rounds=3, burst=4)
    with pytest.raises(InvalidInput, match="levels that rise"):
        Bench(levels=(16, 8))
