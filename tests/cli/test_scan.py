"""`sinks scan` from end to end on tiny models: pages, tables, an atlas, and one clear line for every mistake."""

import json
import os
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


@pytest.fixture
def bare(scan: Command) -> Command:
    """The same without any option."""
    return lambda *arguments: cli.main(["scan", *arguments])


@pytest.fixture
def refused(bare: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must refuse before it measures; returns its one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with monkeypatch.context() as patched:
            for name in ("measure", "measure_encoder"):
                patched.setattr(f"sinks.analysis.survey.{name}", lambda *_, **__: pytest.fail("measured too early"))
            assert bare(*arguments) == 2
        shown = capsys.readouterr().err
        assert len(shown.splitlines()) == 1 and shown.startswith("sinks: ")
        return shown

    return run


def save_bert(folder: Path) -> None:
    tiny_bert().save_pretrained(folder)
    save_tokenizer(folder)


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
    scan: Command, bare: Command, model: Path, text: Path, tmp_path: Path
):
    assert scan(str(model), "--out", "first") == 0
    save_bert(tmp_path / "bert")
    assert bare("first", "bert", "--text", str(text), "--quick", "--texts", "4", "--out", "second") == 0
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"first", "bert", "atlas.html"}
    page = (tmp_path / "second" / "atlas.html").read_text()
    assert 'href="first/scan.html"' in page and 'href="bert/scan.html"' in page
    again = (tmp_path / "second" / "first" / "survey.json").read_text()
    assert again == (tmp_path / "first" / "survey.json").read_text()


def test_pictures(bare: Command, tmp_path: Path):
    tiny_vit().save_pretrained(tmp_path / "vit")
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    assert bare("vit", "--picture", "a.png", "--picture", "b.png", "--parts", "sink_rates", "--out", "out") == 0
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
        (("--picture", "a.png"), 2, "--picture would change nothing: it is for vision transformers, such as"),
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


# One folder holds one survey


def test_another_model_is_not_written_between_the_files_of_one(
    scan: Command, refused: Callable[..., str], model: Path, tmp_path: Path
):
    """Some files were of the one model then, and some of the other."""
    assert scan(str(model), "--out", "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    save_bert(tmp_path / "bert")
    said = refused("bert", "--out", "out")
    assert f"out holds the survey of {model}, and the files of bert would lie between its files: choose another" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_same_model_again_replaces_all_that_was_there_and_nothing_else(
    scan: Command, bare: Command, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert scan(str(model)) == 0
    out = tmp_path / "sinks-scan"
    (out / "notes.txt").write_text("mine")
    created = json.loads((out / "survey.json").read_text())["about"]["created"]
    plain = (out / "survey.json").read_text().replace(created, "2001-02-03T04:05:06")
    (out / "survey.json").write_text(plain)
    assert "in place of" not in capsys.readouterr().out
    assert bare(str(model), "--parts", "massive", "--quick", "--text", str(text)) == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {"scan.html", "survey.json", "peaks.parquet", "notes.txt"} and "heads.parquet" not in names
    assert "Wrote sinks-scan/scan.html, in place of the survey of 2001-02-03T04:05:06" in capsys.readouterr().out


def test_a_survey_is_drawn_again_where_it_lies(scan: Command, bare: Command, model: Path, tmp_path: Path):
    assert scan(str(model), "--out", "out") == 0
    page = tmp_path / "out" / "scan.html"
    page.unlink()
    assert bare("out", "--out", "out") == 0
    assert page.is_file()


@pytest.mark.parametrize("content", ['{"name": "mine"}', "[]", "[1, 2]", "not JSON", '{"about": 3}'])
def test_a_survey_json_that_is_none_stays(content: str, refused: Callable[..., str], model: Path, tmp_path: Path):
    (tmp_path / "survey.json").write_text(content)
    assert "survey.json is no survey, and stays as it is: choose another folder" in refused(str(model), "--out", ".")
    assert (tmp_path / "survey.json").read_text() == content


@pytest.mark.parametrize("name", ["scan.html", "survey.json", "advice.parquet"])
def test_what_is_no_file_is_found_before_measuring(name: str, refused: Callable[..., str], model: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    assert f"{name}', which is a FIFO: name a file" in refused(str(model), "--out", "out")


def test_every_place_of_several_is_tried_first(refused: Callable[..., str], model: Path, tmp_path: Path):
    save_bert(tmp_path / "bert")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bert").touch()
    assert "no result can be written to 'out/bert' (File exists)" in refused(str(model), "bert", "--out", "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bert"], "nothing is left behind"
    (tmp_path / "out" / "bert").unlink()
    os.mkfifo(tmp_path / "out" / "atlas.html")
    assert "which is a FIFO" in refused(str(model), "bert", "--out", "out")


# Options that would change nothing


@pytest.mark.parametrize(
    "option",
    [
        ("--epsilon", "0.3"), ("--epsilon", "0.5"), ("--seed", "0"), ("--quick",), ("--parts", "massive"),
        ("--text", "a"), ("--texts", "9"), ("--context", "99"), ("--picture", "a"), ("--dtype", "bfloat16"),
    ],
)  # fmt: skip
def test_what_was_saved_is_measured_no_other_way(
    option: tuple[str, ...], scan: Command, refused: Callable[..., str], model: Path
):
    """A saved survey was drawn with epsilon 0.3, whatever --epsilon said."""
    assert scan(str(model), "--out", "out") == 0
    said = refused("out", *option, "--out", "again")
    assert f"{option[0]} would change nothing: it is for" in said and "out is a saved survey; leave it out" in said
    assert not Path("again").exists()


@pytest.mark.parametrize(
    ("kind", "option", "whom"),
    [
        ("vit", ("--text", "a"), "models that read text, and vit is a vision transformer"),
        ("vit", ("--texts", "9"), "models that read text, and vit is a vision transformer"),
        ("vit", ("--quick",), "models that read text, and vit is a vision transformer"),
        ("vit", ("--context", "99"), "causal language models, and vit is a vision transformer"),
        ("bert", ("--context", "99"), "causal language models, and bert is an encoder of text"),
        ("bert", ("--picture", "a"), "vision transformers, such as dinov2-small, and bert is an encoder of text"),
        ("bert", ("--parts", "massive", "--epsilon", "0.5"), "sink_rates, which --parts leaves out"),
    ],
)
def test_an_option_for_models_of_another_kind(
    kind: str, option: tuple[str, ...], whom: str, refused: Callable[..., str], tmp_path: Path
):
    tiny_vit().save_pretrained(tmp_path / "vit")
    save_bert(tmp_path / "bert")
    assert f"would change nothing: it is for {whom}" in refused(kind, *option)


@pytest.mark.parametrize("option", [("--epsilon", "0.5"), ("--texts", "9"), ("--context", "99")])
def test_an_option_of_a_part_that_is_left_out(option: tuple[str, ...], refused: Callable[..., str], model: Path):
    assert f"{option[0]} would change nothing: it is for sink_rates, which" in refused(
        str(model), "--parts", "massive", *option
    )
