"""The document and the tables of `sinks bench gpu`, from made-up times."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sinks.evals.speed.gpu.band import Attended, Statistics, Text
from sinks.evals.speed.gpu.bench import QUICK, Measured
from sinks.evals.speed.gpu.decode import Decoded, Flatness
from sinks.report import gpu_speed
from sinks.report.document import to_json
from sinks.report.gpu_speed import gpu_document, gpu_summary

TEXT = Text(16_384, 1_020, 128)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Measured:
    monkeypatch.setattr(gpu_speed, "machine", lambda: {"gpu": "A GPU", "torch": "9.9", "triton": "8.8"})
    return Measured(
        copy_rate=4.2,
        product_rate=750.0,
        decoded=[
            Decoded("a shape", 1, 1020, "sinks", (1.0, 1.25, 1.5), 1_000.0),
            Decoded("a shape", 64, 1020, "transformers, one graph", (6.4, 6.4), 40_000.0),
        ],
        flat=[
            Flatness("a shape", 1, 1020, (1.0, 1.0), (1.01, 1.01)),
            Flatness("a shape", 64, 1020, (2.0, 4.0), (1.98, 3.96)),
            Flatness("another", 1, 1020, (1.0,), (1.0,)),
        ],
        attended=[Attended(TEXT, "FlexAttention", 1.2, 6.0), Attended(TEXT, "sinks, flash", 0.6, 2.4)],
        statistics=[Statistics(TEXT, 2.0, 2.2)],
        absent=["sinks on [a shape]: no Triton"],
    )


def test_every_number_is_in_the_document(found: Measured):
    told = json.loads(to_json(gpu_document(QUICK, found)))
    assert told["machine"]["gpu"] == "A GPU"
    assert told["ceilings"] == {"copy_TB_s": 4.2, "product_TFLOP_s": 750.0}
    first, second = told["decode"]
    assert first["milliseconds"] == [1.0, 1.25, 1.5]
    assert first["tokens_per_second"] == 800.0 and first["share_of_ceiling"] == 0.8
    assert second["tokens_per_second"] == 10_000.0 and second["share_of_ceiling"] == 0.25
    assert [(each["model"], each["rows"], each["ratio"]) for each in told["flat"]] == [
        ("a shape", 1, 1.01),
        ("a shape", 64, 0.99),
        ("another", 1, 1.0),
    ]
    assert told["attention"][1]["way"] == "sinks, flash" and told["attention"][1]["tokens"] == 16_384
    assert told["attention"][1]["forward_useful_TFLOP_s"] == pytest.approx(TEXT.operations / 0.6e9, abs=0.1)
    assert told["attention"][1]["both_useful_TFLOP_s"] == pytest.approx(3.5 * TEXT.operations / 2.4e9, abs=0.1)
    assert told["statistics"][0]["ratio"] == 1.1
    assert told["absent"] == found.absent
    assert told["settings"]["models"] == ["SmolLM2-135M", "Llama-3.2-1B"]


def test_the_tables_say_it_in_words(found: Measured):
    out = io.StringIO()
    Console(file=out, width=120).print(gpu_summary(found))
    shown = out.getvalue()
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "tokens a second, bfloat16, A GPU" in lines
    assert "a shape sinks 1 1,020 800 1.250 80%" in lines
    assert "transformers, one graph 64 1,020 10,000 6.400 25%" in lines
    assert any(line.startswith("sinks, flash 0.600") and line.count("2.00x") == 1 and "2.50x" in line for line in lines)
    assert "copies 4.20 TB/s, bfloat16 products 750 TFLOP/s" in lines
    assert "a shape: a step at position 10,000,000 takes 0.990 to 1.010 times one at 5,000" in lines
    assert "another: a step at position 10,000,000 takes 1.000 times one at 5,000" in lines
    assert any(line.endswith("1.10 times the forward pass without them") for line in lines)
    assert "sinks on [a shape]: no Triton" in shown
    assert "torch 9.9, triton 8.8" in shown


def test_a_part_that_was_not_measured_has_no_table(found: Measured):
    found.decoded, found.attended = [], []
    out = io.StringIO()
    Console(file=out, width=120).print(gpu_summary(found))
    assert "A GPU" not in out.getvalue() and "copies 4.20 TB/s" in out.getvalue()
