"""Attention over sinks and window on a GPU: ours against FlexAttention and a plain window, in one run.

    python benchmarks/gpu/band.py --json benchmarks/results/band-h200.json

Useful TFLOP/s count visible pairs only: 4 d H pairs forward, 3.5 times that forward and backward. Heads are turned
already, but for `turning too`, which is the whole of `attend` from unturned heads. `flex one call` is FlexAttention
with sinks and window as one mask, the bar; `flash plain` is flash-attn-4's window without sinks, the ceiling.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinks.kernels import Rotary, Scoring, attend
from sinks.kernels.band import flash
from sinks.kernels.band.operator import attend_packed
from sinks.kernels.device import forward
from sinks.kernels.device.forward import Band
from sinks.kernels.device.rows import Rows

CASES = ((16_384, 1_020, 128), (65_536, 4_092, 128), (16_384, 1_020, 64))
SINKS, HEADS, KV_HEADS = 4, 32, 8


def main() -> None:
    """Time every case and print a table."""
    parser = argparse.ArgumentParser(description="Sinks and window against FlexAttention.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    rows = [row for case in CASES for row in measure(*case, given.rounds)]
    rows += measure_statistics(131_072, 1_020, given.rounds)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton")}
    ceiling = {"bf16 product TFLOP/s": round(product_rate(), 1)}
    given.json.write_text(json.dumps({"machine": machine, "ceiling": ceiling, "rows": rows}, indent=2) + "\n")
    print(machine, ceiling)
    for row in rows:
        print(row)


def version(package: str) -> str:
    """The version of a package that is installed."""
    return str(importlib.import_module(package).__version__)


def clock(*calls: Callable[[], Any], rounds: int) -> list[float]:
    """Median milliseconds of each call, taken in turn: a hot GPU slows all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 3):
        for call, mine in zip(calls, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= 3:  # the first ones compile
                mine.append(start.elapsed_time(end))
    return [sorted(mine)[rounds // 2] for mine in times]


def product_rate() -> float:
    """bf16 TFLOP/s of a large product of random numbers."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / clock(lambda: one @ other, rounds=20)[0] / 1e9


def heads_of(length: int, head_dim: int) -> list[Tensor]:
    """Query, sink query, key, value and gradient, packed."""
    made = torch.Generator("cuda").manual_seed(length)
    counts = (HEADS, HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(length, h, head_dim, device="cuda", dtype=torch.bfloat16, generator=made) for h in counts]


def contenders(length: int, window: int, heads: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Every way to the same result, as a call of heads that ask for gradients, and the plain window."""
    query, sink_query, key, value = heads
    rows = Rows.of(torch.arange(length, device="cuda")[None])
    band, scale = Band(SINKS, window, query.shape[-1] ** -0.5), query.shape[-1] ** -0.5
    calls = importlib.import_module("torch.nn.attention.flex_attention")

    def seen(row: Tensor, head: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return (one >= other) & ((one - other < window) | (other < SINKS))

    mask = calls.create_block_mask(seen, None, None, length, length, device="cuda")
    walk = torch.compile(calls.flex_attention, dynamic=False)
    pairs = query.shape[-1] // 2
    scoring = Scoring(scale, Rotary(1.0 / 10000 ** (torch.arange(pairs, device="cuda").double() / pairs)))

    def batch() -> list[Tensor]:
        return [part[None].transpose(1, 2) for part in (query, key, value)]

    ways = {
        "flex one call": lambda: walk(*batch(), block_mask=mask, scale=scale, enable_gqa=True),
        "triton, turning too": lambda: attend(*batch(), sinks=SINKS, window=window, scoring=scoring, impl="triton"),
        "triton": lambda: attend_packed(query, sink_query, key, value, None, rows, band, "triton"),
    }
    if flash.has_flash():
        plain = importlib.import_module("flash_attn.cute.interface").flash_attn_func
        ways["flash"] = lambda: attend_packed(query, sink_query, key, value, None, rows, band, "flash")
        ways["flash, turning too"] = lambda: attend(
            *batch(), sinks=SINKS, window=window, scoring=scoring, impl="flash"
        )
        ways["flash plain"] = lambda: plain(
            query[None], key[None], value[None], softmax_scale=scale, causal=True, window_size=(window - 1, 0)
        )[0]
    return ways


def measure(length: int, window: int, head_dim: int, rounds: int) -> list[dict[str, Any]]:
    """Forward, and forward and backward, of every contender."""
    *heads, given = heads_of(length, head_dim)
    pairs = length * (SINKS + window) - window * window / 2
    useful, ways = 4 * head_dim * HEADS * pairs / 1e9, contenders(length, window, heads)
    with torch.no_grad():
        ahead = clock(*ways.values(), rounds=rounds)
    for part in heads:
        part.requires_grad_()

    def both(name: str, way: Callable[[], Tensor]) -> Callable[[], Any]:
        there = heads if name in ("triton", "flash") else [heads[0], *heads[2:]]
        return lambda: torch.autograd.grad(out := way(), there, in_order_of(out, given))

    whole = clock(*(both(name, way) for name, way in ways.items()), rounds=rounds)
    return [
        {
            "tokens": length, "window": window, "head_dim": head_dim, "way": name,
            "forward_ms": round(forward_ms, 3), "forward_tflops": round(useful / forward_ms, 1),
            "both_ms": round(both_ms, 3), "both_tflops": round(3.5 * useful / both_ms, 1),
        }
        for name, forward_ms, both_ms in zip(ways, ahead, whole, strict=True)
    ]  # fmt: skip


def in_order_of(out: Tensor, given: Tensor) -> Tensor:
    """The gradient in the order of axes of a result: tokens before heads, or FlexAttention's other way round."""
    return given.view(out.shape) if out.shape[-2] == HEADS else given[None].transpose(1, 2)


def measure_statistics(length: int, window: int, rounds: int) -> list[dict[str, Any]]:
    """The forward pass with and without statistics, in turn."""
    found = []
    for head_dim in (128, 64):
        query, sink_query, key, value, _ = heads_of(length, head_dim)
        rows, band = Rows.of(torch.arange(length, device="cuda")[None]), Band(SINKS, window, head_dim**-0.5)
        without, along = clock(
            lambda: forward.forward(query, sink_query, key, value, None, rows, band),  # noqa: B023
            lambda: forward.forward(query, sink_query, key, value, None, rows, band, SINKS),  # noqa: B023
            rounds=rounds,
        )
        found.append({
            "tokens": length, "window": window, "head_dim": head_dim, "way": "triton with statistics",
            "forward_ms": round(without, 3), "with_statistics_ms": round(along, 3), "ratio": round(along / without, 3),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
