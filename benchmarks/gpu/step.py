"""One token through one layer's ring on a GPU, in a CUDA graph: time, and the rate at which keys and values are read.

    python benchmarks/gpu/step.py --json benchmarks/results/step-h200.json

A graph holds as many layers as fill several times the L2 cache, each with a ring of its own, and angles worked out once
for all of them. `statistics` is the same with sink mass, entropy and maximum; `far` the same at position 10,000,000;
`int8` the same on a ring of codes; `alone` with the angles worked out in every layer.
"""

from __future__ import annotations

import argparse
import itertools
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
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(machine)
    rows = []
    for case, window in itertools.product(CASES, WINDOWS):
        rows.append(measure(*case, window, given.rounds))
        print(rows[-1], flush=True)
    given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def measure(batch: int, heads: int, kv_heads: int, head_dim: int, window: int, rounds: int) -> dict[str, Any]:
    """Median microseconds a layer, and how fast keys and values are read."""
    case = (batch, heads, kv_heads, head_dim)
    near = max(NEAR, 2 * window)
    found: dict[str, Any] = {"batch": batch, "heads": f"{heads}/{kv_heads}", "head_dim": head_dim, "window": window}
    for coded in (False, True):
        each = 2 * batch * kv_heads * (SINKS + window) * (head_dim + 4 if coded else 2 * head_dim)
        rings = draw(case, window, coded, max(4, min(160, 3 * 2**26 // each)))
        if coded:
            found["us_int8"] = time(case, window, rings, near, rounds)
            found["TB_s_int8"] = round(each / found["us_int8"] / 1e6, 3)
            continue
        found["us"] = time(case, window, rings, near, rounds)
        found["us_far"] = time(case, window, rings, FAR, rounds)
        found["us_statistics"] = time(case, window, rings, near, rounds, first_keys=SINKS)
        found["us_alone"] = time(case, window, rings, near, rounds, tables=False)
        found["TB_s"] = round(each / found["us"] / 1e6, 3)
    return found


def draw(case: tuple[int, int, int, int], window: int, coded: bool, layers: int) -> list[tuple[Any, Any]]:
    """Keys and values of so many rings, random."""
    batch, _, kv_heads, head_dim = case

    def heads(slots: int) -> torch.Tensor:
        return torch.randn(batch, kv_heads, slots, head_dim, device="cuda", dtype=torch.bfloat16)

    def part() -> Any:
        if not coded:
            return heads(SINKS + window)
        codes = torch.randint(-127, 128, (batch, kv_heads, window, head_dim), device="cuda", dtype=torch.int8)
        return heads(SINKS), codes, torch.rand(batch, kv_heads, window, 1, device="cuda") / 50

    return [(part(), part()) for _ in range(layers)]


def time(
    case: tuple[int, int, int, int], window: int, rings: list[tuple[Any, Any]], position: int, rounds: int,
    first_keys: int | None = None, tables: bool = True,
) -> float:  # fmt: skip
    """Microseconds a layer."""
    batch, heads, kv_heads, head_dim = case
    new: Any = torch.randn(batch, heads + 2 * kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    query, key, value = new.split([heads, kv_heads, kv_heads], dim=1)
    rotary = Rotary(1.0 / 10000 ** (torch.arange(head_dim // 2, device="cuda").double() / (head_dim // 2)))
    step = Step.prepare(
        query, rings[0][0], sinks=SINKS, window=window, scoring=Scoring(head_dim**-0.5, rotary), first_keys=first_keys
    )
    where = torch.full((batch,), position, dtype=torch.int64, device="cuda")
    out, angles = torch.empty_like(query, memory_format=torch.contiguous_format), step.tables(where)

    def run() -> None:
        for ring in rings:
            attend_step(step, query, key, value, *ring, where, out=out, tables=angles if tables else None)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if tables:
            step.tables(where, angles)
        run()
        where += 1
    return round(replay(graph, rounds) * 1000 / len(rings), 2)


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
