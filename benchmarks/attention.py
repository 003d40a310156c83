"""Two ways to compute a block with two query angles on a CPU: scores written out, and the fused kernel.

    python benchmarks/attention.py --json benchmarks/results/attention.json

Both give the same numbers; the fused one carries the sinks' scores as extra dimensions (kernels/chunked.py). Timed in
turn within one run, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sinks.kernels.chunked import _attend_explicit, _attend_fused
from sinks.kernels.scoring import Scoring

SHAPES = ((64, 1024), (128, 1024), (256, 1024), (252, 256), (512, 4096))
"""(queries of a block, keys already held), for the heads of the built-in model: 9 query, 3 key, 64 wide."""


def main() -> None:
    """Time every shape and write the table."""
    parser = argparse.ArgumentParser(description="Scores written out against the fused kernel.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    rows = [measure(queries, held, given.rounds) for queries, held in SHAPES]
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.machine()}
    given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    for row in rows:
        print(row)


def measure(queries: int, held: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of both, their ratio, and their largest difference."""
    sinks, keys = 4, held + queries
    made = torch.Generator().manual_seed(queries)
    recent, sink = (torch.randn(1, 9, queries, 64, generator=made) for _ in range(2))
    key, value = (torch.randn(1, 3, keys, 64, generator=made) for _ in range(2))
    bias = torch.zeros(1, 1, queries, keys).masked_fill_(
        torch.rand(1, 1, queries, keys, generator=made) < 0.3, -torch.inf
    )
    arguments = (recent, sink, key, value, sinks, bias, Scoring(scale=0.125))
    difference = (_attend_explicit(*arguments) - _attend_fused(*arguments)).abs().max()
    times: dict[str, list[float]] = {"explicit": [], "fused": []}
    for _ in range(rounds):
        times["explicit"].append(clock(_attend_explicit, arguments))
        times["fused"].append(clock(_attend_fused, arguments))
    explicit, fused = (statistics.median(times[name]) for name in ("explicit", "fused"))
    return {
        "queries": queries, "held": held, "explicit_ms": round(explicit, 3), "fused_ms": round(fused, 3),
        "ratio": round(explicit / fused, 2), "largest_difference": float(difference),
    }  # fmt: skip


def clock(attend: Callable[..., Tensor], arguments: tuple[object, ...]) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    attend(*arguments)
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
