"""One token through one layer's ring on a GPU, in a CUDA graph: time, and the rate at which keys and values are read.

    python benchmarks/gpu/step.py --json benchmarks/results/step-h200.json

A graph holds as many layers as fill several times the L2 cache, each with a ring of its own. `statistics` is the same
with sink mass, entropy and maximum; `far` the same at position 10,000,000.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sinks.kernels import Rotary, Scoring, Step, attend_step

CASES = (
    (1, 32, 8, 64), (1, 32, 8, 128), (1, 9, 3, 64), (8, 32, 8, 64), (64, 32, 8, 64), (64, 32, 8, 128), (256, 9, 3, 64),
)  # fmt: skip
"""(rows, query heads, key heads, head size): a layer of Llama-3.2-1B, of an 8B model, of SmolLM2-135M, and batches."""

WINDOWS, SINKS, NEAR, FAR = (1_020, 4_092), 4, 2_000, 10_000_000


def main() -> None:
    """Time every case and print a table."""
    parser = argparse.ArgumentParser(description="The fused step, one layer at a time.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=50)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    rows = [measure(*case, window, given.rounds) for case in CASES for window in WINDOWS]
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(machine)
    for row in rows:
        print(row)


def measure(batch: int, heads: int, kv_heads: int, head_dim: int, window: int, rounds: int) -> dict[str, Any]:
    """Median microseconds a layer."""
    each = 2 * batch * kv_heads * (SINKS + window) * head_dim * 2
    layers = max(16, min(64, 2**28 // each))
    shape, device = (batch, kv_heads, SINKS + window, head_dim), "cuda"
    held = torch.randn(layers, 2, *shape, device=device, dtype=torch.bfloat16)
    rings = [(ring[0], ring[1]) for ring in held]
    query, key, value = (
        torch.randn(batch, h, head_dim, device=device, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)
    )
    rotary = Rotary(1.0 / 10000 ** (torch.arange(head_dim // 2, device=device).double() / (head_dim // 2)))
    found: dict[str, Any] = {"batch": batch, "heads": f"{heads}/{kv_heads}", "head_dim": head_dim, "window": window}
    splits = 0
    ways = (("us", None, max(NEAR, 2 * window)), ("us_statistics", SINKS, NEAR * 5), ("us_far", None, FAR))
    for name, first_keys, position in ways:
        step = Step.prepare(
            query, rings[0][0], sinks=SINKS, window=window, scoring=Scoring(head_dim**-0.5, rotary),
            first_keys=first_keys,
        )  # fmt: skip
        where = torch.full((batch,), position, dtype=torch.int64, device=device)
        attend_step(step, query, key, value, *rings[0], where)
        splits = step.splits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for ring in rings:
                attend_step(step, query, key, value, *ring, where)
            where += 1
        found[name] = round(replay(graph, rounds) * 1000 / layers, 2)
    found |= {"splits": splits, "TB_s": round(each / found["us"] / 1e6, 3)}
    return found


def replay(graph: torch.cuda.CUDAGraph, rounds: int) -> float:
    """Median milliseconds of a replay."""
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[rounds // 2]


if __name__ == "__main__":
    main()
