"""The soak in small: one session of the built-in model over the same text six times, no larger, slower or worse."""

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.law.tree import ROOT

TOKENS = 20_010


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `benchmarks/soak.py` finds with 4 + 252 keys; a minute on one idle core."""
    folder = tmp_path_factory.mktemp("soak")
    flags = ["--tokens", str(TOKENS), "--window", "252", "--decoded", "60"]
    files = ["--json", str(folder / "soak.json"), "--picture", str(folder / "soak.png")]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "soak.py"), *flags, *files], check=True)
    assert (folder / "soak.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(Path(folder / "soak.json").read_text())


@pytest.mark.slow
def growths_of(resident: list[list[float]]) -> list[float]:
    """Of medians of neighbouring quarters, the least first, and then of the last quarter over the first."""
    ends = (0.1, 0.325, 0.55, 0.775, 1.1)
    quarters = [
        statistics.median(held for seen, held in resident if begin <= seen / TOKENS < end)
        for begin, end in itertools.pairwise(ends)
    ]
    return [*sorted(late / early - 1 for early, late in itertools.pairwise(quarters)), quarters[-1] / quarters[0] - 1]


def test_a_leak_is_told_from_a_step():
    looks = [TOKENS * n / 30 for n in range(1, 31)]
    step = growths_of([[seen, 1077e6 + 22e6 * (seen > 0.55 * TOKENS)] for seen in looks])
    leak = growths_of([[seen, 1077e6 * (1 + 0.02 * seen / TOKENS)] for seen in looks])
    assert step[0] == 0 and 0.0025 < leak[0] < leak[-1] < 0.02


def test_memory_does_not_grow(result: dict[str, Any]):
    """From a tenth of the stream on, as in the long run. Resident memory is about 1 GB, weights included.

    What leaks leaks in every quarter; the heap also rises by 22 MB once, at any moment, and stays there. So the least
    growth between medians of neighbouring quarters is bounded, at half of 2 % over the whole, and the whole at 5 %.
    """
    assert result["complete"]
    resident = result["measured"]["resident"]
    assert resident[-1][0] == TOKENS
    assert growths_of(resident)[0] < 0.0025 and growths_of(resident)[-1] < 0.05
    assert result["cache_bytes"] == 256 * 2 * 30 * 3 * 64 * 4  # keys and values, layers, heads, head_dim, bytes


@pytest.mark.slow
def test_decoding_does_not_slow_down(result: dict[str, Any]):
    """In turn with a copy parked early. The promise is 5 %; 20 % leaves room for a machine that does other work."""
    assert len(result["measured"]["decode_old"]) == len(result["measured"]["decode_parked"]) == 60
    assert abs(result["found"]["decode_change"]) < 0.2


@pytest.mark.slow
def test_the_same_text_is_as_predictable_as_before(result: dict[str, Any]):
    assert len(result["measured"]["blocks"]) == 6
    assert abs(result["found"]["perplexity_change_after_filling"]) < 0.03
