"""Which tiles make a whole decode step fastest: one product after the other, all else as it is.

    python -m benchmarks.gpu.tune --cases 1B:1 1B:64

What wins belongs into `tiles_for` (models/step/device/linear.py).
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.decode import build, replay, seats_of
from sinks.models.step.device.linear import Product, Tiles, tiles_for
from sinks.models.step.device.step import PLACES, Chain, DeviceModel, DeviceStep
from sinks.models.step.device.weights import DeviceWeights

NEAR = 2_000
CHAINS = (Chain(1, False), Chain(2, False), Chain(1, True), Chain(2, True))
ONE: dict[str, tuple[tuple[Any, ...], ...]] = {
    "deep": ((2, 2048, 4), (4, 2048, 8), (4, 2048, 4), (8, 2048, 8), (4, 1024, 4), (2, 1024, 4), (8, 1024, 4)),
    "down": ((2, 2048, 4), (4, 2048, 8), (2, 4096, 8), (1, 8192, 8), (2, 8192, 16), (4, 4096, 16),
             (2, 2048, 4, 4, False, 1, 64, 8192), (4, 2048, 8, 4, False, 1, 64, 8192)),
    "head": ((2, 512, 1), (4, 1024, 4), (4, 512, 2), (8, 512, 2), (4, 2048, 4), (2, 1024, 2)),
    "flat": ((4, 1024, 4), (8, 1024, 4), (2, 1024, 4), (4, 1024, 2), (8, 64, 1), (32, 64, 2), (16, 64, 1),
             (16, 128, 2), (16, 128, 4), (8, 256, 2), (4, 512, 4), (2, 2048, 4), (4, 2048, 4)),
}  # fmt: skip
FEW: tuple[tuple[Any, ...], ...] = (
    (16, 256, 2, 4), (16, 256, 4, 4), (16, 512, 4, 3), (32, 128, 4, 4), (64, 64, 4, 6, True), (64, 128, 4, 4, True),
    (32, 256, 4, 3), (16, 128, 2, 6), (16, 256, 2, 4, False, 1, 64, 4096), (64, 64, 4, 6, True, 1, 64, 4096),
)  # fmt: skip
MANY: tuple[tuple[Any, ...], ...] = (
    (64, 64, 4, 5, True), (64, 128, 4, 4, True), (32, 128, 4, 4), (64, 128, 4, 3), (128, 64, 4, 4, True),
    (128, 64, 8, 4, True), (64, 64, 4, 6), (16, 128, 4, 5), (64, 64, 4, 5, True, 1, 64, 4096),
)  # fmt: skip
SPLITS = {8: (1, 2, 4), 64: (1, 2, 4, 8)}


def main() -> None:
    """Print a line for each try."""
    parser = argparse.ArgumentParser(description="Tiles of the products of a decode step.")
    parser.add_argument("--cases", nargs="+", required=True, help="a shape and a number of rows, as 1B:64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm", action="store_true", help="only compile")
    given = parser.parse_args()
    models: dict[str, Any] = {}
    for case in given.cases:
        shape, rows = case.split(":")
        models[shape] = models.get(shape) or build(shape)
        print(case, flush=True)
        if given.warm:
            warm(parts(DeviceModel(models[shape]).weights), int(rows))
        else:
            tune(models[shape], int(rows), given.rounds)


def candidates(name: str, product: Product, rows: int) -> list[Tiles]:
    """What may be worth a try."""
    if rows == 1:
        kind = "head" if name == "head" and product.depth > 1024 else "flat" if product.depth < 2048 else "deep"
        tiles = [Tiles(*each) for each in ONE["down" if product.depth > 4096 else kind]]
        most = 2**12 * (1 if product.gated else 2)
        return [each for each in tiles if each.cols * each.depth <= most * each.warps // 2]
    tiles = [Tiles(*each) for each in (FEW if rows <= 16 else MANY)]
    if not product.splits:
        return tiles
    return [
        replace(each, splits=splits)
        for each in tiles for splits in SPLITS.get(rows, (1, 2, 4))
        if 96 <= product.outputs // each.cols * splits <= 600 or splits == 1
    ]  # fmt: skip


def parts(weights: DeviceWeights) -> dict[str, Product]:
    """One product of a kind."""
    first = weights.blocks[0]
    return {"head": weights.head, "qkv": first.qkv, "out": first.out, "gate_up": first.gate_up, "down": first.down}


def tune(model: Any, rows: int, rounds: int) -> None:
    """One product after the other."""
    weights, seats = DeviceModel(model).weights, seats_of(model, rows)
    products = parts(weights)
    sizes = {(each.depth, each.outputs): name for name, each in products.items()}
    chosen = {name: tiles_for(each, rows) for name, each in products.items()}
    warm(products, rows)

    def time(chain: Chain) -> float:
        step = DeviceStep(weights, seats, chain, lambda product, _: chosen[sizes[product.depth, product.outputs]])
        step([1] * rows, list(range(rows)), [NEAR] * rows)
        return replay(step, rounds)

    chain = Chain(1, False)
    for each in CHAINS:
        print(f"rows {rows} {each} {time(each):8.1f} us", flush=True)
    for name, product in products.items():
        tried = []
        for tiles in dict.fromkeys([chosen[name], *candidates(name, product, rows)]):
            chosen[name] = tiles
            try:
                tried.append((time(chain), tiles))
            except Exception as error:
                print("failed", name, tiles, type(error).__name__, str(error)[:120], flush=True)
        tried.sort(key=lambda each: each[0])
        chosen[name] = tried[0][1]
        print(f"rows {rows} {name}", *(f"{us:8.1f} {tiles}" for us, tiles in tried), sep="\n    ", flush=True)
    for each in CHAINS:
        print(f"rows {rows} {each} {time(each):8.1f} us", flush=True)


def warm(products: dict[str, Product], rows: int) -> None:
    """Compile in many threads."""

    def one(work: Any) -> None:
        name, product, tiles, pdl = work
        high = max(16, rows)
        kind = torch.float32 if name in ("head", "out", "down") else torch.bfloat16
        best = torch.zeros(rows, PLACES, device="cuda", dtype=torch.int64) if name == "head" else None
        out = torch.zeros(8, high, product.outputs, device="cuda", dtype=kind)
        try:
            if rows == 1:
                fused = torch.float32 if product.gain is not None else torch.bfloat16
                x = torch.zeros(high, product.depth, device="cuda", dtype=fused)
                product.one(x, out, tiles, residual=product.splits, best=best, pdl=pdl)
            else:
                x = torch.zeros(high, product.depth, device="cuda", dtype=torch.bfloat16)
                product.many(x, out, rows, tiles, best=best, pdl=pdl)
        except Exception as error:
            print("failed", name, tiles, type(error).__name__, str(error)[:120], flush=True)

    work = [(name, each, tiles, 1) for name, each in products.items() for tiles in candidates(name, each, rows)]
    work += [(name, each, tiles_for(each, rows), pdl) for name, each in products.items() for pdl in (0, 1, 2)]
    with ThreadPoolExecutor(15) as pool:
        list(pool.map(one, work))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
