"""`sinks scan` from end to end on tiny models: pages, tables, an atlas, and one clear line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from sinks.cli import main as cli
from tests.models.looking import save_tokenizer, tiny_bert, tiny_vit
from tests.reading.tiny import tiny_folder

Command = Callable[..., int]

FEW = ("--parts", "sink_rates,massive", "--texts", "4", "--context", "128")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {number:04} of {number % 7}\n" for number in range(600)))
    return path


@pytest.fixture
def scan(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in an empty folder. Returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_root", lambda: None)  # the checker balks: typer's context is no typer.Context
    return lambda *arguments: cli.main(["scan", "--text", str(text), "--quick", *FEW, *arguments])


def test_one_model(scan: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert scan(str(model)) == 0
    folder = tmp_path / "sinks-scan"
    names = {path.name for path in folder.iterdir()}
    assert {"scan.html", "survey.json", "heads.parquet", "layers.parquet"} <= names
    saved = json.loads((folder / "survey.json").read_text())
    assert saved["about"]["model"]["name"] == str(model)
    assert saved["about"]["settings"]["texts"] == 4 and saved["about"]["settings"]["long_tokens"] == 128
    assert saved["about"]["sources"][0]["name"] == "text.txt" and "text" not in saved["about"]["sources"][0]
    assert saved["advice"] is None and saved["left_out"]["advice"] == "not asked for"
    assert parquet.read_table(folder / "heads.parquet").num_rows >= 2 * 4
    shown = capsys.readouterr()
    assert shown.err == "", "no bars where nobody sees them"
    assert "Attention sinks:" in shown.out and "Wrote sinks-scan/scan.html" in shown.out
    assert "left out: entropy, mixing, semantics, repetition, interventions, advice (not asked for)" in " ".join(
        shown.out.split()
    )


def test_several_models_give_an_atlas_and_what_was_saved_is_not_measured_again(
    scan: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert scan(str(model), "--out", "first") == 0
    tiny_bert().save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    assert scan("first", "bert", "--out", "second") == 0
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"first", "bert", "atlas.html"}
    page = (tmp_path / "second" / "atlas.html").read_text()
    assert 'href="first/scan.html"' in page and 'href="bert/scan.html"' in page
    again = (tmp_path / "second" / "first" / "survey.json").read_text()
    assert again == (tmp_path / "first" / "survey.json").read_text()


def test_pictures(scan: Command, tmp_path: Path):
    tiny_vit().save_pretrained(tmp_path / "vit")
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    assert scan("vit", "--picture", "a.png", "--picture", "b.png", "--out", "out") == 0
    saved = json.loads((tmp_path / "out" / "survey.json").read_text())
    assert saved["about"]["sources"] == ["a.png", "b.png"]
    assert [one["condition"]["tokens"] for one in saved["sink_rates"]["conditions"]] == ["pictures"]


def test_json_goes_to_standard_output_alone(scan: Command, model: Path, capsys: pytest.CaptureFixture[str]):
    assert scan(str(model), "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["sink_rates"]["bound_to"]
    assert "Wrote" in shown.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--parts", "sinks"), 2, "no part is called 'sinks': the parts are sink_rates, massive"),
        (("--context", "0"), 2, "--context 0: give at least 16 tokens"),
        (("--picture", "a.png"), 2, "reads text: leave --picture to vision transformers"),
        (("--epsilon", "2"), 2, "epsilon=2.0: give a share of attention above 0 and below 1"),
        (("--texts", "4000"), 2, "windows of 64 tokens, and 4000 are wanted"),
        (("nothing-here",), 2, "no built-in model, folder or file is called 'nothing-here'"),
        (("--text", "missing.txt"), 2, "no text or file is called 'missing.txt'"),
        (("--device", "abacus"), 2, "device 'abacus' cannot be used here"),
    ],
)
def test_mistakes_are_one_line(
    scan: Command,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    status: int,
    message: str,
):
    named = () if arguments[0] == "nothing-here" else (str(model),)
    assert scan(*named, *arguments) == status
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1 and shown.startswith("sinks: ")


def test_a_file_that_holds_no_survey(scan: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "other.json").write_text('{"schema": 1}')
    assert scan("other.json") == 2
    assert "holds no survey that this version can read" in capsys.readouterr().err
    assert not (tmp_path / "sinks-scan").exists(), "nothing is left behind"


def test_two_models_of_one_name(scan: Command, model: Path, capsys: pytest.CaptureFixture[str]):
    assert scan(str(model), str(model)) == 2
    assert "written to one folder" in capsys.readouterr().err


def test_every_name_is_checked_before_the_first_model_is_measured(
    scan: Command, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def measure(*arguments: object, **named: object) -> None:
        raise AssertionError("measured too early")

    monkeypatch.setattr("sinks.analysis.survey.measure", measure)
    assert scan(str(model), "nothing-here") == 2
    assert "'nothing-here'" in capsys.readouterr().err
