"""`sinks models`: what it lists, fetches and checks."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sinks.assets import fetch
from sinks.assets.catalogue import MODELS, TEXTS, ModelAsset
from sinks.cli import models
from sinks.errors import AssetError, FetchError, UnknownName, UnsupportedModel
from sinks.models import load as door
from tests.assets import packaging
from tests.models.checkpoints import tiny_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SINKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "cache"


def run(*arguments: str, status: int = 0, answer: str | None = None) -> str:
    """What the command prints; an error that is not an exit status is raised."""
    app = typer.Typer()
    app.callback()(lambda: None)
    models.register(app)
    result = CliRunner().invoke(app, ["models", *arguments], input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def families(monkeypatch: pytest.MonkeyPatch, describe: Any = None) -> None:
    """A table of families of our own, so that this test does not change with the real one."""
    llama = SimpleNamespace(model_type="llama", positions="RoPE", route="interface", convention="half", note="[any]")
    scheme = SimpleNamespace(family=llama, layers=[SimpleNamespace(own_window=None)] * 2, trained_length=64)
    table = SimpleNamespace(
        FAMILIES={"llama": llama}, REFUSED={"gpt2": "learned positions"}, describe=describe or (lambda model: scheme)
    )
    monkeypatch.setitem(sys.modules, "sinks.models.families", table)


def test_the_list_names_everything_and_creates_nothing(cache: Path):
    output = run()
    assert all(name in output for name in (*MODELS, *TEXTS))
    assert "92.9 MB" in output and "Apache-2.0" in output and str(cache.parent) in output.replace("\n", "")
    assert not cache.exists()


@pytest.mark.parametrize("width", [20, 40, 79, 80, 100])
def test_nothing_is_lost_on_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(width))
    listed = run().split("Cache folder")[0]
    assert all(len(line) <= width for line in listed.splitlines())
    told = json.loads(run("--json"))["built_in"]
    words = listed.split()
    for entry in told:
        for word in (entry["name"], *entry["licence"].split(), *entry["title"].split()):
            assert width == 20 or word in words, f"{word} at {width} columns"
            assert word in listed.replace("\n", "")


def test_the_list_as_json(cache: Path):
    answer = json.loads(run("--json"))
    entries = {entry["name"]: entry for entry in answer["built_in"]}
    assert answer["cache_folder"] == str(cache)
    assert entries["smollm2-135m-instruct"]["default"] and not entries["smollm2-135m-instruct"]["cached"]
    assert entries["gemma3-270m"]["needs_consent"] and entries["gemma3-270m"]["download_bytes"] > 2e8
    assert entries["python-reference"]["cached"] and entries["python-reference"]["download_bytes"] == 0


def test_the_table_of_families(monkeypatch: pytest.MonkeyPatch):
    families(monkeypatch)
    output = run("--supported")
    assert all(word in output for word in ("llama", "RoPE", "interface", "half", "[any]", "gpt2", "learned positions"))
    answer = json.loads(run("--supported", "--json"))
    assert answer["refused"] == {"gpt2": "learned positions"}
    assert answer["supported"][0]["model_type"] == "llama" and answer["supported"][0]["route"] == "interface"


def test_the_real_table_of_families_has_the_fields():
    answer = json.loads(run("--supported", "--json"))
    assert {"llama", "gemma3_text"} <= {family["model_type"] for family in answer["supported"]}
    assert "gpt2" in answer["refused"]


def test_fetching_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(b"In the beginning")
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    monkeypatch.setattr("sinks.assets.catalogue.TEXTS", {"bible": replace(TEXTS["bible"], payload=payload)})
    assert "bible is ready" in run("fetch", "bible")
    assert fetch.cached(payload)


def test_fetching_what_is_here_already():
    assert "needs no fetching" in run("fetch", "python-reference")


def test_fetching_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[tuple[str, bool]] = []

    def prepare(name: str, *, accept_terms: bool) -> Path:
        asked.append((name, accept_terms))
        return tmp_path

    monkeypatch.setattr(door, "prepare", prepare)
    run("fetch", "smollm2")
    run("fetch", "gemma3-270m", "--accept-terms")
    assert asked == [("smollm2-135m-instruct", False), ("gemma3-270m", True)]


def test_fetching_nothing_known():
    with pytest.raises(UnknownName, match="did you mean 'bible'"):
        run("fetch", "bibel")


@pytest.mark.parametrize(("answer", "agreed"), [("y\n", True), ("n\n", False)])
def test_terms_are_asked_for_at_a_terminal(
    answer: str, agreed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    payload, archives = packaging.payload(b"<html>terms</html>")
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    asset = ModelAsset("model", (), "Model", MODELS["gemma3-270m"].payload, "Model Terms", payload)
    assert not models._ask_for_consent(asset), "nobody sits there"
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(models, "sys", SimpleNamespace(stdin=terminal, stderr=terminal))
    told: list[str] = []

    def confirm(question: str, err: bool) -> bool:
        told.append(question)
        return answer == "y\n"

    monkeypatch.setattr(typer, "confirm", confirm)
    assert models._ask_for_consent(asset) is agreed
    assert "Model Terms" in told[0] and str(fetch.cached(payload)) in told[0]


def test_a_refused_consent_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(b"<html>terms</html>")
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    asset = ModelAsset("model", (), "Model", MODELS["gemma3-270m"].payload, "Model Terms", payload)
    monkeypatch.setattr("sinks.assets.catalogue.MODELS", {"model": asset})
    with pytest.raises(AssetError, match="Model Terms.*not accepted"):
        run("fetch", "model")


def test_checking_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_folder(tmp_path / "model")
    families(monkeypatch)
    output = run("check", str(tmp_path / "model"))
    assert "(llama) can stream" in output and "trained length 64" in output
    answer = json.loads(run("check", str(tmp_path / "model"), "--json"))
    assert answer["supported"] and answer["scheme"]["layers"] == 2 and answer["source"]["kind"] == "folder"


def test_checking_a_model_that_cannot_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def describe(model: Any) -> None:
        raise UnsupportedModel("llama cannot stream: it is Tuesday")

    tiny_folder(tmp_path / "model")
    families(monkeypatch, describe)
    assert "cannot stream: " in run("check", str(tmp_path / "model"), status=1)
    answer = json.loads(run("check", str(tmp_path / "model"), "--json", status=1))
    assert answer["supported"] is False and "Tuesday" in answer["reason"]


def test_checking_what_cannot_be_had():
    with pytest.raises(FetchError):
        run("check", "some/model-that-is-nowhere")
