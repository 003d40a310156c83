"""How fast a stream reads on a GPU, by the length of its chunks: the kernels, and block by block.

    python benchmarks/gpu/chunk.py --json benchmarks/results/chunk-h200.json

Models of two shapes with random weights in bfloat16 read random tokens through a full ring of 4 + 1,020. A chunk is a
forward pass, its logits, and the surprise of its tokens; medians. `attention` is one layer's alone, by whoever walks
the window; `pack_ms` is what lays its heads out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sinks.cache import cache as cache_module
from sinks.cache.cache import SinkCache
from sinks.evals.speed.gpu.shapes import SHAPES
from sinks.kernels import Rotary, Scoring
from sinks.kernels.band import flash
from sinks.kernels.band.arriving import attend_arriving, choose_arriving
from sinks.kernels.band.operator import Walker
from sinks.kernels.band.packed import Standing, pack
from sinks.models.attach import attach
from sinks.reading.perplexity import surprise

SINKS, WINDOW = 4, 1020
CHUNKS = {"SmolLM2-135M": (256, 2048, 8192, 16_384), "Llama-3.2-1B": (256, 2048, 8192)}
LAYERS = ((9, 3, 64, 1020), (32, 8, 64, 1020), (32, 8, 128, 1020), (32, 8, 128, 4092), (4, 1, 256, 1020))
"""Heads, key heads, head size and window of a layer timed alone, at 8,192 tokens."""


def main() -> None:
    """Time everything and print it."""
    parser = argparse.ArgumentParser(description="Chunks of a stream on a GPU.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    rows = [told(row) for name in CHUNKS for row in chunks(name, given.rounds)]
    rows += [told(row) for layer in LAYERS for row in layers(*layer, given.rounds)]
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed at once."""
    print(row, flush=True)
    return row


def clock(call: Callable[[], Any], rounds: int) -> float:
    """Median milliseconds, after two calls that compile."""
    times: list[float] = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[rounds // 2]


def chunks(name: str, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of one shape, at every length and in every way."""
    model = attach(SHAPES[name].build())
    rows = []
    for count in CHUNKS[name]:
        ids = torch.randint(0, SHAPES[name].vocabulary, (1, count), device="cuda")
        for way in ("kernels", "int8", "block by block"):
            if way == "block by block" and count > 2048:
                continue  # seconds
            chosen = (lambda *heads, **options: None) if way == "block by block" else choose_arriving
            cache = SinkCache.for_model(model, sinks=SINKS, window=WINDOW, cache="int8" if way == "int8" else "full")
            with torch.inference_mode(), mock.patch.object(cache_module, "choose_arriving", chosen):
                took = clock(lambda: read(model, ids, cache), rounds)  # noqa: B023
            rows.append({"shape": name, "chunk": count, "way": way, "ms": round(took, 2),
                         "tokens_per_second": round(1e3 * count / took)})  # fmt: skip
    return rows


def read(model: Any, ids: torch.Tensor, cache: SinkCache) -> torch.Tensor:
    """One chunk, scored."""
    return surprise(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0], ids[0])


def layers(heads: int, kv_heads: int, head_dim: int, window: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one layer's attention for 8,192 tokens behind a full ring."""
    standing, kinds = Standing(SINKS, window, 100_000, 8192, 0), (heads, kv_heads, kv_heads)
    new = [torch.randn(1, 8192, each, head_dim, device="cuda").bfloat16().transpose(1, 2) for each in kinds]
    held = [torch.randn(1, kv_heads, SINKS + window, head_dim, device="cuda").bfloat16() for _ in range(2)]
    rotary = Rotary(1.0 / 10000 ** (torch.arange(head_dim // 2).double() / (head_dim // 2)))
    scoring, steps = Scoring(head_dim**-0.5, rotary), rotary.steps.cuda()

    def packed() -> Any:
        return pack((new[0], new[1], new[2]), (held[0], held[1]), standing, rotary, steps)

    walkers: tuple[Walker, ...] = ("triton", "flash") if flash.has_flash() else ("triton",)
    whole = packed()
    took = {walker: clock(lambda: attend_arriving(whole, scoring, walker), rounds) for walker in walkers}  # noqa: B023
    where: dict[str, Any] = {"heads": [heads, kv_heads], "head_dim": head_dim, "window": window}
    where["pack_ms"] = round(clock(packed, rounds), 4)
    return [{"attention": walker, **where, "ms": round(each, 4)} for walker, each in took.items()]


if __name__ == "__main__":
    main()
