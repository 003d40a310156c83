"""`compare.json`: strict, complete, and of known form."""

import json
from typing import Any

import numpy as np
import pytest

from sinks.report.document import bin_ends, document, to_json
from tests.report.fake import BYTES_PER_TOKEN, fake_comparison

ABOUT = {"model": {"name": "tiny"}, "text": {}, "machine": {}, "versions": {}, "created": "now"}

NUMBERS = (
    "perplexity", "perplexity_after_eviction", "perplexity_at_samples", "scored_tokens", "scored_after_eviction",
    "ms_per_token", "ms_samples", "tokens_per_second", "cache_bytes", "peak_bytes", "seconds",
)  # fmt: skip


@pytest.fixture
def written() -> dict[str, Any]:
    """What a reader of the file gets, dense having stopped at 1,000 tokens."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = document(fake_comparison(limit=1000), ABOUT, "It holds.")
    return json.loads(to_json(content), parse_constant=refuse)


def test_it_has_everything_needed_to_repeat_it(written: dict[str, Any]):
    assert written["schema"] == 1
    assert ABOUT.items() <= written.items()
    assert written["settings"] == {
        "sinks": 4, "window": 252, "arms": ["dense", "window", "recompute", "sinks", "sweep", "newlines"], "seed": 0,
        "samples": 16, "chunk": 256, "singles": 8, "beyond_trained_length": False, "cache": "full", "tokens": 2048,
        "capacity": 256,
    }  # fmt: skip
    assert (written["first_target"], written["reading"]) == (4, "It holds.")


def test_every_arm_has_every_number(written: dict[str, Any]):
    arms = {arm["arm"]: arm for arm in written["arms"]}
    assert list(arms) == [
        "dense", "window", "recompute", "sinks", "sweep-0", "sweep-1", "sweep-2", "sweep-4", "sweep-8", "newlines",
    ]  # fmt: skip
    for arm in arms.values():
        assert all(isinstance(arm[number], int | float) for number in NUMBERS)
        others = {"arm", "keeps", "settings", "measured_as", "perplexity_last_quarter", "stopped_at"}
        assert set(arm) == {*NUMBERS, *others}
    assert arms["sweep-4"] | {"arm": "sinks"} == arms["sinks"]
    assert arms["newlines"]["settings"] == {"sinks": 4, "window": 252, "line_break": 198}


def test_every_field_that_needs_it_is_defined(written: dict[str, Any]):
    plain = {"arm", "keeps", "settings", "scored_after_eviction", "ms_samples"}
    assert "repeated_tokens" in written["definitions"]
    assert set(written["arms"][0]) - plain <= set(written["definitions"])


def test_dense_says_where_it_stopped(written: dict[str, Any]):
    dense, window = written["arms"][:2]
    assert (dense["stopped_at"], dense["scored_tokens"], dense["scored_after_eviction"]) == (1000, 997, 744)
    assert dense["perplexity_last_quarter"] is None
    assert (window["stopped_at"], window["scored_tokens"], window["scored_after_eviction"]) == (None, 2044, 1791)
    assert window["perplexity_last_quarter"] > 0


def test_ratios_say_what_they_are_over(written: dict[str, Any]):
    ratios = {(ratio["arm"], ratio["against"]): ratio for ratio in written["ratios"]}
    assert len(ratios) == 18
    assert ratios["sinks", "dense"]["range"] == [257, 1000]
    assert ratios["sinks", "dense"]["targets"] == 744
    assert ratios["window", "sinks"]["range"] == [257, 2047]
    assert ratios["window", "sinks"]["ratio"] == pytest.approx(np.exp(0.7))
    assert ratios["recompute", "sinks"]["targets"] == 16
    assert ratios["window", "sinks"]["ratio_without_repeats"] == pytest.approx(np.exp(0.7))
    assert written["repeated_tokens"] == 0


def test_curves(written: dict[str, Any]):
    curves = written["curves"]
    assert curves["ends"] == list(range(128, 2049, 128))
    assert curves["bin"] == 128
    assert set(curves["perplexity"]) == set(curves["cache_bytes"])
    assert set(curves["perplexity"]) == {"dense", "window", "sinks", "sweep-1", "sweep-2", "sweep-8", "newlines"}
    for values in (*curves["perplexity"].values(), *curves["cache_bytes"].values()):
        assert len(values) == 16
    assert curves["perplexity"]["dense"][7] is not None, "1,000 is beyond the middle of the eighth bin"
    assert curves["perplexity"]["dense"][8:] == [None] * 8
    assert curves["cache_bytes"]["dense"][:2] == [256 * BYTES_PER_TOKEN] * 2
    assert curves["cache_bytes"]["dense"][8:] == [None] * 8
    assert curves["cache_bytes"]["sinks"] == [256 * BYTES_PER_TOKEN] * 16


def test_samples(written: dict[str, Any]):
    samples = written["samples"]
    assert len(samples["tokens"]) == 16
    assert set(samples["nll"]) == {*written["curves"]["perplexity"], "recompute"}
    assert all(len(values) == 16 for values in samples["nll"].values())
    stopped = [token > 1000 for token in samples["tokens"]]
    assert [value is None for value in samples["nll"]["dense"]] == stopped
    (recompute,) = (arm for arm in written["arms"] if arm["arm"] == "recompute")
    assert np.exp(np.mean(samples["nll"]["recompute"])) == pytest.approx(recompute["perplexity"])


@pytest.mark.parametrize(
    ("tokens", "bins", "width"),
    [(8192, 32, 256), (8300, 32, 256), (4096, 16, 256), (97, 16, 6), (1_000_000, 256, 3907)],
)
def test_bins(tokens: int, bins: int, width: int):
    ends = bin_ends(tokens)
    widths = np.diff(ends, prepend=0)
    assert (len(ends), ends[0], ends[-1]) == (bins, width, tokens)
    assert (widths[:-1] == width).all()
    assert width / 2 <= widths[-1] <= 1.5 * width
