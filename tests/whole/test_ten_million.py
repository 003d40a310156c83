"""The stream of ten million tokens in small, on the CPU: the same laps, judged and drawn in the same way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.law.tree import ROOT

LOOP, LAPS = 1500, 3


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `benchmarks/gpu/stream.py` finds in its three calls, with 4 + 252 keys in float32."""
    folder = tmp_path_factory.mktemp("stream")
    run = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "stream.py")]
    ids, found, picture = (str(folder / name) for name in ("ids.npy", "found.json", "found.png"))
    sizes = ["--loop", str(LOOP), "--tokens", str(LOOP * LAPS), "--window", "252", "--decoded", "5"]
    subprocess.run([*run, "--text", "python-reference", "--loop", str(LOOP), "--write-ids", ids], check=True)
    subprocess.run([*run, "--ids", ids, "--json", found, "--device", "cpu", "--dtype", "float32", *sizes], check=True)
    subprocess.run([*run, "--draw", found, "--picture", picture], check=True)
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    return json.loads(Path(found).read_text())


@pytest.mark.slow
def test_every_lap_is_as_predictable_as_the_first(result: dict[str, Any]):
    assert len(result["measured"]["perplexities"]) == LAPS
    assert abs(result["found"]["perplexity_change"]) < 0.03
    later = result["measured"]["perplexities_full"]
    assert abs(later[2] / later[1] - 1) < 0.01


@pytest.mark.slow
def test_all_but_sinks_and_window_was_let_go(result: dict[str, Any]):
    assert result["evicted"] == LOOP * LAPS + 10 + 5 - 256  # what was decoded, warming up included, is read too
    assert result["cache_bytes"] == 256 * 2 * 30 * 3 * 64 * 4  # keys and values, layers, heads, head_dim, bytes
