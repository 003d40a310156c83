"""`sinks bench gpu` from the outside: what it refuses, and that what it measures reaches the file and the screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sinks.cli import main as cli
from sinks.evals.speed.gpu import bench, clock
from sinks.evals.speed.gpu.bench import GpuBench, Keep, Measured
from sinks.evals.speed.gpu.decode import Decoded
from sinks.report import gpu_speed
from tests.kernels.interpreted import HAS_GPU


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_root", lambda: None)  # the checker balks: typer's context is no typer.Context


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[GpuBench]:
    """Pretend a GPU; what was asked of it."""
    asked: list[GpuBench] = []

    def measure(settings: GpuBench, stage: object, keep: Keep) -> Measured:
        asked.append(settings)
        found = Measured(4.2, 750.0, decoded=[Decoded("a shape", 1, 1020, "sinks", (1.0,), 2_000.0)])
        keep(found)
        if settings.parts == ("attention",):  # stands for somebody who has waited enough
            raise KeyboardInterrupt
        found.absent, found.whole = ["x: y"], True
        keep(found)
        return found

    monkeypatch.setattr(clock, "need_gpu", lambda what: None)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(gpu_speed, "machine", lambda: {"gpu": "A GPU", "torch": "9.9"})
    return asked


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "gpu", "--quick"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "bench gpu needs a CUDA GPU" in shown.err and "sinks bench cpu" in shown.err


def test_an_unknown_part_is_one_line(measured: list[GpuBench], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "gpu", "--only", "everything"]) == 2
    assert "everything: there is no such part: choose of decode, attention" in capsys.readouterr().err
    assert not measured


def test_what_is_measured_is_written_and_shown(
    measured: list[GpuBench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["bench", "gpu", "--quick", "--only", "decode", "--json", "gpu.json"]) == 0
    assert measured[0].parts == ("decode",) and measured[0].models == bench.QUICK.models
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["decode"][0]["tokens_per_second"] == 1000.0 and told["absent"] == ["x: y"]
    assert told["whole"]
    shown = capsys.readouterr()
    assert "A GPU" in shown.out and "1,000" in shown.out and "x: y" in shown.out and shown.err == ""


def test_a_bench_that_is_stopped_leaves_what_it_has_found(measured: list[GpuBench], tmp_path: Path):
    assert cli.main(["bench", "gpu", "--only", "attention", "--json", "gpu.json"]) == 130
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["decode"][0]["tokens_per_second"] == 1000.0 and not told["whole"]


def test_a_file_that_cannot_be_written_is_found_out_first(measured: list[GpuBench], tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "gpu", "--json", "file/gpu.json"]) in (1, 2)
    assert not measured
