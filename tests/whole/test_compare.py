"""The main job on the built-in model and text: the window collapses, four kept tokens hold the line."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `sinks compare` finds with 4 + 252 keys over 6,144 tokens."""
    folder = tmp_path_factory.mktemp("compare")
    flags = "--window 252 --sinks 4 --tokens 6144 --arms dense,window,sinks --out".split()
    subprocess.run([sys.executable, "-m", "sinks", "compare", *flags, str(folder)], check=True)
    return json.loads((folder / "compare.json").read_text())


@pytest.mark.slow
def test_sinks_hold_the_line(result: dict[str, Any]):
    ratios = {(ratio["arm"], ratio["against"]): ratio for ratio in result["ratios"]}
    assert ratios["window", "sinks"]["ratio"] >= 1.7  # 1.85 was measured
    assert ratios["sinks", "dense"]["ratio"] <= 1.3  # 1.22
    assert ratios["sinks", "dense"]["range"] == [257, 6143]


@pytest.mark.slow
def test_memory_is_what_the_keys_take(result: dict[str, Any]):
    arms = {arm["arm"]: arm for arm in result["arms"]}
    per_token = 2 * 30 * 3 * 64 * 4  # keys and values, layers, heads, head_dim, bytes
    assert arms["sinks"]["cache_bytes"] == arms["window"]["cache_bytes"] == 256 * per_token
    assert arms["dense"]["cache_bytes"] == 6143 * per_token
    assert arms["dense"]["peak_bytes"] > arms["dense"]["cache_bytes"]
    assert arms["sinks"]["peak_bytes"] < arms["dense"]["peak_bytes"] / 2
    curve = result["curves"]["cache_bytes"]
    assert set(curve["sinks"]) == {256 * per_token}


@pytest.mark.slow
def test_where_it_comes_from_is_said(result: dict[str, Any]):
    assert result["model"]["note"] == "Q4_1 widened to float32"
    assert result["text"]["name"] == "python-reference"
    assert "times the perplexity of four sinks and 252 recent tokens" in result["reading"]


@pytest.mark.slow
def test_sinks_and_window_beyond_the_trained_length(run_sinks: Callable[..., subprocess.CompletedProcess[str]]):
    done = run_sinks("compare", "--window", "8192")
    assert done.returncode == 2
    assert done.stderr.startswith("sinks: sinks=4 + window=8192 is 8196 positions")
    assert done.stderr.count("\n") == 1
