"""Attention over sinks and window on a GPU: ours against FlexAttention and a plain window, in one run.

    python benchmarks/gpu/band.py --json benchmarks/results/band-h200.json

Useful TFLOP/s count visible pairs only: 4 d H pairs forward, 3.5 times that forward and backward. `ours, ...` is the
whole of `attend` from heads as a model gives them, two angles, turning included; `turning` is what one angle costs by
the same kernels. `flex one call` is FlexAttention with sinks and window as one mask, the bar, and `flash plain`
flash-attn-4's window without sinks, the ceiling: both get heads for nothing turned already, so `turning` is theirs to
add. `..., no rotary` has nothing to turn and compares as it stands. Times are the GPU's: it is kept busy until the host
has launched everything. `parts` are the kernels of `ours, flash` one by one.
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
from sinks.kernels.device import forward
from sinks.kernels.device.forward import Band
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.sink_part import Finished, merge_sinks, settle, sink_gradients
from sinks.kernels.device.turn import turn, turn_back

CASES = ((16_384, 1_020, 128), (65_536, 4_092, 128), (16_384, 1_020, 64))
SINKS, HEADS, KV_HEADS = 4, 32, 8
Calls = dict[str, Callable[..., Any]]


def main() -> None:
    """Time every case and print a table."""
    parser = argparse.ArgumentParser(description="Sinks and window against FlexAttention.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    rows = [row for case in CASES for row in measure(*case, given.rounds)]
    rows += [measure_parts(*case, given.rounds) for case in CASES if flash.has_flash()]
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


def clock(calls: Calls, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn: a hot GPU slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(20_000_000)  # about ten milliseconds, in which the host gets ahead
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= 3:  # the first ones compile
                times[name].append(start.elapsed_time(end))
    return {name: sorted(mine)[rounds // 2] for name, mine in times.items()}


def product_rate() -> float:
    """bf16 TFLOP/s of a large product of random numbers."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / clock({"product": lambda: one @ other}, 20)["product"] / 1e9


def heads_of(length: int, head_dim: int) -> list[Tensor]:
    """Query, key, value and gradient [1, heads, tokens, head_dim], laid out as projections leave them."""
    made = torch.Generator("cuda").manual_seed(length)
    shapes = [(1, length, h, head_dim) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    drawn = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=made) for shape in shapes]
    return [part.transpose(1, 2) for part in drawn]


def rotary_of(head_dim: int) -> Rotary:
    """The plain rotary embedding, base 10,000."""
    pairs = head_dim // 2
    return Rotary(1.0 / 10000 ** (torch.arange(pairs, device="cuda").double() / pairs))


def contenders(length: int, window: int, head_dim: int) -> Calls:
    """Every way to the same result, and the plain window: calls of query, key and value."""
    calls, scale = importlib.import_module("torch.nn.attention.flex_attention"), head_dim**-0.5

    def seen(row: Tensor, head: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return (one >= other) & ((one - other < window) | (other < SINKS))

    mask = calls.create_block_mask(seen, None, None, length, length, device="cuda")
    walk = torch.compile(calls.flex_attention, dynamic=False)

    def ours(impl: Any, rotary: Rotary | None) -> Callable[..., Tensor]:
        scoring = Scoring(scale, rotary)
        return lambda *heads: attend(*heads, sinks=SINKS, window=window, scoring=scoring, impl=impl)

    ways: Calls = {"flex one call": lambda *heads: walk(*heads, block_mask=mask, scale=scale, enable_gqa=True)}
    for impl in ("triton", "flash") if flash.has_flash() else ("triton",):
        ways |= {f"ours, {impl}": ours(impl, rotary_of(head_dim)), f"ours, {impl}, no rotary": ours(impl, None)}
    if flash.has_flash():
        plain = importlib.import_module("flash_attn.cute.interface").flash_attn_func
        ways["flash plain"] = lambda *heads: plain(
            *(part.transpose(1, 2) for part in heads), softmax_scale=scale, causal=True, window_size=(window - 1, 0)
        )[0].transpose(1, 2)
    return ways


def measure(length: int, window: int, head_dim: int, rounds: int) -> list[dict[str, Any]]:
    """Forward, and forward and backward, of every contender."""
    *heads, given = heads_of(length, head_dim)
    leaves = [part.detach().requires_grad_() for part in heads]
    rows, rotary, band = Rows.whole(1, length, given.device), rotary_of(head_dim), Band(0, window, 1.0)
    ways = contenders(length, window, head_dim)
    ahead: Calls = {name: lambda way=way: way(*heads) for name, way in ways.items()}
    whole: Calls = {
        name: lambda way=way: torch.autograd.grad(way(*leaves), leaves, given) for name, way in ways.items()
    }
    turned = turn(heads[0], heads[1], rows, rotary, band)
    ahead["turning"] = lambda: turn(heads[0], heads[1], rows, rotary, band)
    whole["turning"] = lambda: (
        turn(heads[0], heads[1], rows, rotary, band),
        turn_back(turned.query, (turned.key, None), None, rows, rotary, window),
        turn_back(turned.key, (turned.key, None), None, rows, rotary, window),
    )
    with torch.no_grad():
        forward_ms = clock(ahead, rounds)
    both_ms = clock(whole, rounds)
    useful = 4 * head_dim * HEADS * (length * (SINKS + window) - window * window / 2) / 1e9
    return [
        {
            "tokens": length, "window": window, "head_dim": head_dim, "way": name,
            "forward_ms": round(forward_ms[name], 3), "both_ms": round(both_ms[name], 3),
        } | ({} if name == "turning" else {
            "forward_tflops": round(useful / forward_ms[name], 1),
            "both_tflops": round(3.5 * useful / both_ms[name], 1),
        })
        for name in ahead
    ]  # fmt: skip


def measure_parts(length: int, window: int, head_dim: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each step of `ours, flash`, forward and backward."""
    query, key, value, given = heads_of(length, head_dim)
    rows, rotary = Rows.whole(1, length, given.device), rotary_of(head_dim)
    band, value, given = Band(SINKS, window, head_dim**-0.5), rows.pack(value), rows.pack(given)
    turned = turn(query, key, rows, rotary, band)
    out, log_sums = flash.window_forward(turned.query, turned.key, value, rows, band)
    merge_sinks(turned.scores, value, None, (out, log_sums), rows, band)
    done = Finished(query, turned.query, turned.key, value, turned.scores, None, out, log_sums)
    part = sink_gradients(done, given, rows, band)
    back = flash.window_gradients(done, given, rows, band)
    steps: Calls = {
        "turn": lambda: turn(query, key, rows, rotary, band),
        "window": lambda: flash.window_forward(turned.query, turned.key, value, rows, band),
        "merge": lambda: merge_sinks(turned.scores, value, None, (out, log_sums), rows, band),
        "sink gradient": lambda: sink_gradients(done, given, rows, band),
        "window gradient": lambda: flash.window_gradients(done, given, rows, band),
        "settle": lambda: settle(done, part, back[1], back[2], rows, band, rotary),
        "turn query back": lambda: turn_back(
            back[0], (turned.key, turned.sinks), part.slopes, rows, rotary, SINKS + window
        ),
        "turn key back": lambda: turn_back(back[1], (back[1], None), None, rows, rotary, SINKS + window),
    }
    found = {name: round(taken, 4) for name, taken in clock(steps, rounds).items()}
    return {"tokens": length, "window": window, "head_dim": head_dim, "way": "parts", "ms": found}


def measure_statistics(length: int, window: int, rounds: int) -> list[dict[str, Any]]:
    """The forward pass with and without statistics, in turn."""
    found = []
    for head_dim in (128, 64):
        query, key, value, _ = heads_of(length, head_dim)
        rows, band = Rows.whole(1, length, query.device), Band(SINKS, window, head_dim**-0.5)
        turned, value = turn(query, key, rows, rotary_of(head_dim), band), rows.pack(value)

        def walk(first_keys: int | None) -> object:
            return forward.forward(
                turned.query, turned.key, value, turned.scores, None, rows, band, first_keys  # noqa: B023
            )  # fmt: skip

        taken = clock({"without": lambda: walk(None), "along": lambda: walk(SINKS)}, rounds)  # noqa: B023
        found.append({
            "tokens": length, "window": window, "head_dim": head_dim, "way": "triton with statistics",
            "forward_ms": round(taken["without"], 3), "with_statistics_ms": round(taken["along"], 3),
            "ratio": round(taken["along"] / taken["without"], 3),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
