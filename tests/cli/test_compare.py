"""`sinks compare` from end to end on a tiny model: files, tables, and one clear line for every mistake."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW
from sinks.cli import main as cli
from sinks.evals import compare as evals
from sinks.evals.arms import ARMS, Settings
from tests.reading.tiny import tiny_folder

Command = Callable[..., int]

SIZES = ("--tokens", "200", "--sinks", "4", "--window", "28", "--samples", "5", "--chunk", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, trained on 128 tokens."""
    return tiny_folder(tmp_path_factory.mktemp("model"), trained=128)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {number:04}\n" for number in range(40)))
    return path


@pytest.fixture
def compare(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in an empty folder; of a flag given twice the later one counts. Returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_root", lambda: None)  # the checker balks: typer's context is no typer.Context
    return lambda *flags: cli.main(["compare", "--model", str(model), "--text", str(text), *SIZES, *flags])


def test_both_files_and_a_table(compare: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compare() == 0
    folder = tmp_path / "sinks-compare"
    assert {path.name for path in folder.iterdir()} == {"compare.json", "compare.png"}
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    result: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    names = [arm["arm"] for arm in result["arms"]]
    assert names == [*ARMS[:4], "sweep-0", "sweep-1", "sweep-2", "sweep-4", "sweep-8", "newlines"]
    assert {arm["arm"]: arm["scored_tokens"] for arm in result["arms"]} == dict.fromkeys(names, 196) | {
        "dense": 125,
        "recompute": 5,
    }
    asked = {"tokens": 200, "sinks": 4, "window": 28, "capacity": 32, "samples": 5, "chunk": 32, "seed": 0}
    assert asked.items() <= result["settings"].items()
    assert set(result["versions"]) == {"python", "sinks", "torch", "transformers", "numpy"}
    assert result["machine"]["threads"] >= 1
    assert len(result["text"]["sha256"]) == 64
    assert "text" not in result["text"], "the text itself is not ours to copy"
    assert (result["text"]["tokens"], result["text"]["bos"]) == (400, None)
    assert {"kind": "folder", "dtype": "float32", "device": "cpu", "note": ""}.items() <= result["model"].items()
    shown = capsys.readouterr()
    assert shown.err == "", "no bars where nobody sees them"
    assert result["reading"] in " ".join(shown.out.split())
    assert "dense stops at 128 tokens" in shown.out
    assert "Wrote sinks-compare/compare.json and sinks-compare/compare.png" in shown.out


def test_json_stands_alone_on_standard_output(compare: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compare("--json", "--arms", "sinks, window", "--out", "here/results") == 0
    shown = capsys.readouterr()
    assert shown.out == (tmp_path / "here" / "results" / "compare.json").read_text()
    assert [arm["arm"] for arm in json.loads(shown.out)["arms"]] == ["window", "sinks"]
    assert "peak" in shown.err


def test_eight_bits_beside_full_precision(compare: Command, capsys: pytest.CaptureFixture[str]):
    assert compare("--arms", "sinks,window", "--cache", "int8") == 0
    result = json.loads(Path("sinks-compare/compare.json").read_text())
    arms = {arm["arm"]: arm for arm in result["arms"]}
    assert list(arms) == ["window", "sinks", "sinks-int8"]
    assert arms["sinks-int8"]["cache_bytes"] < arms["sinks"]["cache_bytes"] == arms["window"]["cache_bytes"]
    (ratio,) = [each["ratio"] for each in result["ratios"] if (each["arm"], each["against"]) == ("sinks-int8", "sinks")]
    assert 0.9 < ratio < 1.1 and ratio != 1
    assert f"{ratio:.3f} times that of full precision" in " ".join(capsys.readouterr().out.split())


def test_rounded_weights_stand_in_the_record(compare: Command, capsys: pytest.CaptureFixture[str]):
    assert compare("--json", "--arms", "sinks", "--quant", "int8") == 0
    model: dict[str, Any] = json.loads(capsys.readouterr().out)["model"]
    assert model["quant"] == "int8" and model["note"].startswith("linear weights int8 by row; ")


def test_dense_reads_on_if_asked_to(compare: Command, capsys: pytest.CaptureFixture[str]):
    assert compare("--json", "--arms", "dense", "--beyond-trained-length") == 0
    (dense,) = json.loads(capsys.readouterr().out)["arms"]
    assert (dense["stopped_at"], dense["scored_tokens"]) == (None, 196)


def test_the_same_flags_give_the_same_numbers(compare: Command, capsys: pytest.CaptureFixture[str]):
    found = []
    for seed in ("7", "7", "8"):
        assert compare("--json", "--arms", "recompute,newlines", "--seed", seed) == 0
        found.append([arm["perplexity"] for arm in json.loads(capsys.readouterr().out)["arms"]])
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


def test_old_results_are_replaced_and_other_files_left(compare: Command, tmp_path: Path):
    (tmp_path / "compare.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    assert compare("--arms", "sinks", "--out", ".") == 0
    assert json.loads((tmp_path / "compare.json").read_text())["schema"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tokens", "64"], "64 tokens are to be read, and 65 are needed"),
        (["--tokens", "401"], "the text has 400 tokens, and 401 are to be read"),
        (["--tokens", "-1"], "tokens must be at least 1, got -1"),
        (["--window", "-5"], "window must be at least 1, got -5"),
        (["--sinks", "0"], "the arm without sinks is 'window'"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--chunk", "0"], "chunk must be at least 1"),
        (["--window", "125"], "this model was trained on 128: choose a window of at most 124"),
        (["--arms", "sinks,dens"], f"no arm is called 'dens': the arms are {', '.join(ARMS)}"),
        (["--arms", ","], "no arm was asked for"),
        (["--dtype", "int3"], "int3"),
        (["--cache", "int4"], "cache 'int4' is unknown: choose one of full, int8"),
        (["--cache", "int8", "--arms", "dense"], "add it to the arms"),
        (["--quant", "int3"], "quant='int3' is unknown: choose one of none, int8, int4"),
        (["--text", "no such text"], "no such text"),
        (["--model", "no such model"], "no such model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flags: list[str], says: str, compare: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert compare(*flags) in (1, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("sinks: ")
    assert says in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_text_shorter_than_the_window(compare: Command, text: Path, capsys: pytest.CaptureFixture[str]):
    short = text.with_name("short.txt")
    short.write_text("too short")
    assert compare("--text", str(short), "--tokens", "9") == 2
    assert "the text has 9 tokens, and 65 are needed to fill sinks and window" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    compare: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sinks.models.load.load", lambda *_, **__: pytest.fail("work began"))
    assert compare("--out", "file/results") == 2
    assert "no result can be written to 'file/results'" in capsys.readouterr().err


def test_an_interruption_keeps_nothing(
    compare: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    measure = evals.measure

    def interrupted(name: str, *rest: Any) -> evals.Arm:
        if name == "sinks":
            raise KeyboardInterrupt
        return measure(name, *rest)

    monkeypatch.setattr(evals, "measure", interrupted)
    assert compare() == 130
    assert capsys.readouterr().err == "sinks: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_help_tells_the_true_defaults(run_sinks: Callable[..., subprocess.CompletedProcess[str]]):
    shown = " ".join(run_sinks("compare", "--help").stdout.split())
    assert f"First tokens kept for ever; by default {DEFAULT_SINKS}." in shown
    assert f"the current one included; by default {DEFAULT_WINDOW}." in shown
    assert f"Which of {', '.join(ARMS)}, with commas between" in shown
    ours = Settings(DEFAULT_SINKS, DEFAULT_WINDOW)
    for flag, value in (("--seed", ours.seed), ("--samples", ours.samples), ("--chunk", ours.chunk)):
        assert f"[default: {value}]" in shown.split(f" {flag} <int>")[1].split(" --")[0]
