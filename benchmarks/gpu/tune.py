"""Which tiles make a whole decode step fastest: one product after the other, all else as it is.

    python benchmarks/gpu/tune.py --cases Llama-3-8B:256 Llama-3.2-1B:1:int8 --json benchmarks/results/tiles-h200.json

Random weights, rings of 4 + 1,020 keys. What wins belongs into `tiles_for` (models/step/device/linear.py). Products of
every try are held to those of the tiles that are chosen today.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinks.cache.plan import Plan
from sinks.evals.speed.gpu.decode import random_seats
from sinks.evals.speed.gpu.shapes import SHAPES
from sinks.models.step.device.linear import Product, Tiles, tiles_for
from sinks.models.step.device.step import PLACES, Chain, DeviceModel, DeviceStep, chain_for
from sinks.models.step.device.weights import DeviceWeights
from sinks.models.weights.quantize import QUANTS, Quant, quantize

NEAR, PLAN = 2_000, Plan(4, 1_020)


def _all(*each: tuple[int, int, int]) -> list[Tiles]:
    return [Tiles(*one) for one in each]


ONE = {
    "Llama-3.2-1B": {
        "out": _all((2, 1024, 4), (4, 2048, 8), (8, 1024, 4)),
        "gate_up": _all((8, 1024, 8), (16, 1024, 8), (8, 512, 2), (8, 512, 4), (16, 512, 4), (4, 512, 2)),
        "down": _all((4, 1024, 4), (8, 1024, 4), (8, 512, 4), (8, 1024, 8), (4, 2048, 4)),
        "qkv": _all((4, 1024, 2), (8, 1024, 8), (8, 512, 4), (2, 1024, 2)),
        "head": _all((16, 512, 4), (8, 512, 4), (8, 256, 1), (16, 256, 2)),
    },
    "SmolLM2-135M": {
        "out": _all((4, 1024, 2), (4, 2048, 4), (8, 1024, 4)),
        "gate_up": _all((4, 1024, 8), (8, 1024, 8), (2, 1024, 4)),
        "down": _all((4, 2048, 8), (2, 2048, 8), (2, 2048, 4)),
        "qkv": _all((4, 1024, 1), (2, 1024, 2), (4, 1024, 4)),
        "head": _all((16, 64, 2), (32, 64, 4), (64, 64, 4)),
    },
}
ONE["Llama-3-8B"] = ONE["Llama-3.2-1B"]
PACKED = {
    "int8": _all((4, 2048, 4), (8, 2048, 8), (8, 1024, 4), (4, 2048, 2), (8, 2048, 4), (16, 1024, 4), (8, 512, 2)),
    "int4": _all((8, 2048, 4), (4, 4096, 4), (16, 2048, 8), (4, 2048, 2), (8, 1024, 2), (16, 1024, 4)),
}
FEW = [
    Tiles(16, 128, 2, 6), Tiles(64, 128, 4, 4, True), Tiles(64, 64, 4, 6, True), Tiles(32, 128, 4, 4),
    Tiles(16, 256, 4, 4),
]  # fmt: skip
MANY = [
    Tiles(64, 64, 4, 5, True), Tiles(64, 128, 4, 4, True), Tiles(32, 128, 4, 4), Tiles(16, 128, 4, 5),
    Tiles(64, 64, 4, 6),
]  # fmt: skip
BIG = [
    Tiles(64, 64, 4, 5, True), Tiles(64, 64, 4, 5, True, rows=128), Tiles(128, 64, 8, 4, True, rows=128),
    Tiles(128, 64, 8, 4, rows=128), Tiles(128, 128, 8, 2, True, rows=128), Tiles(64, 64, 8, 4, True, rows=256),
    Tiles(128, 64, 8, 3, True, rows=256),
]  # fmt: skip
CHAINS = (Chain(1, False), Chain(1, True), Chain(2, True))


def main() -> None:
    """Print a line for each try."""
    parser = argparse.ArgumentParser(description="Tiles of the products of a decode step.")
    parser.add_argument("--cases", nargs="+", required=True, help="shape, rows, and weights, as Llama-3-8B:64:int8")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    try:
        cases = [read(case) for case in given.cases]
    except (ValueError, KeyError) as error:
        parser.error(
            f"{given.cases}: {error}: say SHAPE:ROWS or SHAPE:ROWS:WEIGHTS, with a shape of {', '.join(SHAPES)}"
        )
    found = []
    for case in cases:
        model = quantize(SHAPES[case[0]].build(), case[2])
        print(*case, flush=True)
        warm(parts(DeviceModel(model).weights), case)
        found.append(tune(model, case, given.rounds))
        if given.json is not None:
            about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
            given.json.write_text(json.dumps({"machine": about, "cases": found}, indent=1) + "\n")


Asked = tuple[str, int, Quant]


def read(case: str) -> Asked:
    """Shape, rows and weights, as they are asked for."""
    shape, rows, quant = (*case.split(":"), "none")[:3]
    if quant not in QUANTS or int(rows) < 1:
        raise ValueError(case)
    return SHAPES[shape].name, int(rows), quant


def candidates(name: str, product: Product, case: Asked) -> list[Tiles]:
    """What may be worth a try."""
    shape, rows, quant = case
    if rows == 1 and quant == "none":
        return ONE[shape][name]
    if rows == 1:
        return PACKED["int8" if product.bits == 8 else "int4"]
    tiles = FEW if rows <= 16 else MANY if rows <= 64 else BIG
    if not product.splits:
        return tiles
    return [
        replace(each, splits=splits) for each in tiles for splits in (1, 2, 4)
        if 48 <= product.outputs // each.cols * splits * -(-rows // each.rows) <= 400 or splits == 1
    ]  # fmt: skip


def parts(weights: DeviceWeights) -> dict[str, Product]:
    """One product of a kind."""
    first = weights.blocks[0]
    return {"head": weights.head, "qkv": first.qkv, "out": first.out, "gate_up": first.gate_up, "down": first.down}


def tune(model: Any, case: Asked, rounds: int) -> dict[str, Any]:
    """One product after the other: microseconds of a step before and after, and by product and tiles, best first."""
    shape, rows, quant = case
    weights, seats = DeviceModel(model).weights, random_seats(model, PLAN, rows)
    products, chain = parts(weights), chain_for(rows)
    sizes = {(each.depth, each.outputs): name for name, each in products.items()}
    chosen = {name: tiles_for(each, rows) for name, each in products.items()}

    def time(chain: Chain = chain) -> float:
        step = DeviceStep(
            weights, seats, lambda _: chain, lambda product, _: chosen[sizes[product.depth, product.outputs]]
        )
        step([1] * rows, list(range(rows)), [NEAR] * rows)
        return round(replay(step, rounds), 1)

    before, found = time(), dict[str, list[tuple[float, str]]]()
    for name, product in products.items():
        known, tried = multiplied(name, product, chosen[name], (rows, chain.products)), {chosen[name]: time()}
        for tiles in dict.fromkeys(candidates(name, product, case)):
            chosen[name] = tiles
            try:
                check(multiplied(name, product, tiles, (rows, chain.products)), known)
                tried[tiles] = time()
            except Exception as error:
                print("failed", name, tiles, type(error).__name__, str(error)[:120], flush=True)
        chosen[name] = min(tried, key=tried.__getitem__)
        found[name] = sorted((us, str(tiles)) for tiles, us in tried.items())
        print(f"rows {rows} {name}", *(f"{us:8.1f} {tiles}" for us, tiles in found[name]), sep="\n    ", flush=True)
    chains = {str(each): time(each) for each in CHAINS}
    print(f"rows {rows}: {before} us before, {time()} after; {chains}", flush=True)
    return {"shape": shape, "rows": rows, "weights": quant, "before_us": before, "after_us": time(), "products": found}


def check(product: Tensor, known: Tensor) -> None:
    """Within two roundings to bfloat16 of what the tiles of today give, and the order of sums."""
    error = (product - known).abs()
    if not (error <= 2**-6 * known.abs() + 0.01 * known.std()).all():
        raise ArithmeticError(f"a product differs by {error.max():.3g}")


def replay(step: DeviceStep, rounds: int) -> float:
    """Median microseconds of a greedy step that asks nobody."""
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step.run(4)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 250)
    return sorted(times[3:])[rounds // 2]


def multiplied(name: str, product: Product, tiles: Tiles, case: tuple[int, int]) -> Tensor:
    """The product alone, of so many rows of random numbers, launched as `pdl` says: `case` is the two."""
    rows, pdl = case
    high, made = max(16, rows), torch.Generator("cuda").manual_seed(0)
    kind = torch.float32 if name in ("head", "out", "down") else torch.bfloat16
    best = torch.zeros(rows, PLACES, device="cuda", dtype=torch.int64) if name == "head" else None
    out = torch.zeros(8, high, product.outputs, device="cuda", dtype=kind)
    fused = torch.float32 if rows == 1 and product.gain is not None else torch.bfloat16
    x = torch.randn(high, product.depth, device="cuda", dtype=fused, generator=made)
    if rows == 1:
        product.one(x, out, tiles, residual=product.splits, best=best, pdl=pdl)
        return out[0, :1].float()
    product.many(x, out, rows, tiles, best=best, pdl=pdl)
    parts = out.view(-1)[: tiles.splits * rows * product.outputs]
    return parts.view(tiles.splits, rows, product.outputs).float().sum(0)


def warm(products: dict[str, Product], case: Asked) -> None:
    """Compile in many threads what will be tried."""
    rows = case[1]
    pdl = chain_for(rows).products

    def one(work: tuple[str, Product, Tiles]) -> None:
        try:
            multiplied(*work, (rows, pdl))
        except Exception as error:
            print("failed", *work[::2], type(error).__name__, str(error)[:120], flush=True)

    work = [(name, each, tiles) for name, each in products.items() for tiles in candidates(name, each, case)]
    work += [(name, each, tiles_for(each, rows)) for name, each in products.items()]
    with ThreadPoolExecutor(15) as pool:
        list(pool.map(one, work))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
