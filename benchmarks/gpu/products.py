"""Which tiles carry the products of a decode step fastest: microseconds, and the rate at which weights are read.

    python benchmarks/gpu/products.py --rows 1 8 64

Each product is timed in a CUDA graph over copies of its weight that fill several times the L2 cache. The last columns
are PyTorch's own product of the same weight, norm and activation left out.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F

from sinks.models.step.device.linear import Product, Tiles

SHAPES = {
    "1B qkv": (2048, 3072, "norm"), "1B out": (2048, 2048, "residual"), "1B gate_up": (2048, 8192, "gated"),
    "1B down": (8192, 2048, "residual"), "1B head": (2048, 128256, "norm"), "135M qkv": (576, 960, "norm"),
    "135M out": (576, 576, "residual"), "135M gate_up": (576, 1536, "gated"), "135M down": (1536, 576, "residual"),
    "135M head": (576, 49152, "norm"),
}  # fmt: skip
"""(depth, outputs, what stands around the product)."""

THIN = tuple(Tiles(*each) for each in (
    (1, 2048, 4), (2, 2048, 4), (4, 2048, 8), (4, 1024, 4), (8, 1024, 8), (4, 512, 2), (8, 512, 4), (2, 512, 1),
))  # fmt: skip
FEW = tuple(Tiles(*each) for each in (
    (16, 128, 4, 5), (16, 256, 4, 4), (16, 256, 2, 4), (32, 128, 4, 4), (64, 64, 4, 5, True), (64, 128, 4, 4, True),
))  # fmt: skip
MANY = tuple(Tiles(*each) for each in (
    (32, 128, 4, 4), (64, 64, 4, 5, True), (64, 128, 4, 4, True), (64, 128, 4, 3), (128, 64, 4, 4, True),
    (16, 128, 4, 5),
))  # fmt: skip


def main() -> None:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description="The products of a decode step.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, "copy TB/s", round(copy_rate(), 2), flush=True)
    for rows in given.rows:
        tiles = {1: THIN, 8: (*THIN[3:7], *FEW)}.get(rows, MANY)
        if rows == 4:
            tiles = (*THIN, *FEW)
        warm(rows, tiles)
        for name, shape in SHAPES.items():
            if given.only in name:
                print(f"{name} rows {rows}", *table(rows, shape, tiles, given.rounds), sep="\n   ", flush=True)


def copy_rate() -> float:
    """TB/s, bytes read and written."""
    a, b = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * 2**30 / timed(lambda: b.copy_(a), 1, 9) / 1e6


def make(shape: tuple[int, int, str], weight: Any, rows: int) -> Product:
    """A product around this weight."""
    depth, _, kind = shape
    gain = torch.randn(depth, device="cuda").bfloat16() if kind != "residual" and rows <= 8 else None
    return Product(weight, torch.bfloat16, gain, 1e-5, gated=kind == "gated", residual=kind == "residual")


def buffers(shape: tuple[int, int, str], rows: int) -> tuple[Any, Any]:
    """Input and output, as the step has them."""
    depth, outputs, kind = shape
    wide = torch.float32 if kind in ("residual", "norm") else torch.bfloat16
    x = torch.randn(max(16, rows), depth, device="cuda", dtype=torch.bfloat16 if kind == "residual" or rows > 8 else torch.float32)
    return x, torch.zeros(max(16, rows), outputs, device="cuda", dtype=wide)


def room(product: Product, tiles: Tiles, rows: int, kind: str) -> Any:
    """Where the best go."""
    if kind != "best":
        return None
    shape = (max(16, rows), product.programs(tiles))
    return torch.zeros(shape, device="cuda"), torch.zeros(shape, device="cuda", dtype=torch.int32)


def warm(rows: int, tiles: tuple[Tiles, ...]) -> None:
    """Compile in many threads."""

    def one(work: Any) -> None:
        shape, each, pdl = work
        depth, outputs, kind = shape
        weight = torch.randn(outputs * (2 if kind == "gated" else 1), depth, device="cuda").bfloat16()
        product, (x, out) = make(shape, weight, rows), buffers(shape, rows)
        try:
            product(x, out, rows, each, room(product, each, rows, kind), pdl)
        except Exception as error:  # noqa: BLE001
            print("failed", shape, each, pdl, type(error).__name__, str(error)[:300], flush=True)

    kinds = [(2048, 2048, kind) for kind in ("norm", "residual", "gated", "norm")]
    with ThreadPoolExecutor(14) as pool:
        list(pool.map(one, [(kind, each, pdl) for kind in kinds for each in tiles for pdl in (False, True)]))
    torch.cuda.synchronize()


def table(rows: int, shape: tuple[int, int, str], tiles: tuple[Tiles, ...], rounds: int) -> list[str]:
    """A line for each way of cutting, the fastest first."""
    depth, outputs, kind = shape
    height = outputs * (2 if kind == "gated" else 1)
    copies = max(4, min(128, 2**28 // (height * depth * 2)))
    weights = torch.randn(copies, height, depth, device="cuda", dtype=torch.bfloat16)
    x, out = buffers(shape, rows)
    products, size = [make(shape, weight, rows) for weight in weights], height * depth * 2
    lines = []
    for each in tiles:
        if each.stages == 0 and each.cols * each.depth * (2 if kind == "gated" else 1) > 2**16:
            continue
        found = []
        for pdl in (False, True):
            best = room(products[0], each, rows, kind)

            def go(pdl: bool = pdl, each: Tiles = each, best: Any = best) -> None:
                for product in products:
                    product(x, out, rows, each, best, pdl)

            try:
                found.append(timed(go, copies, rounds))
            except Exception as error:  # noqa: BLE001
                found.append(float("nan"))
                torch.cuda.synchronize()
                lines.append((1e9, f"{each} {type(error).__name__} {str(error)[:100]}"))
        text = " ".join(f"{us:7.2f} us {size / us / 1e6:5.2f} TB/s" for us in found)
        lines.append((min(found), f"{text}  {each}"))
    given = x[:rows].bfloat16()
    us = timed(lambda: [F.linear(given, weight) for weight in weights], copies, rounds)
    return [text for _, text in sorted(lines, key=lambda line: line[0])] + [
        f"{us:7.2f} us {size / us / 1e6:5.2f} TB/s  F.linear"
    ]


def timed(work: Any, count: int, rounds: int) -> float:
    """Median microseconds of one of `count` in a captured graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[rounds // 2] * 1000 / count


if __name__ == "__main__":
    main()
