"""Products of many rows in tiles, against float64; and that no tile asks for more than a GPU must have."""

from __future__ import annotations

import itertools

import pytest
import torch

from sinks.kernels.device.language import SHARED_BYTES
from sinks.models.step.device.linear import Product, Tiles, tiles_for
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

HALF = torch.bfloat16 if HAS_GPU else torch.float16
"""Triton's interpreter takes bfloat16 for integers where a scalar meets it (3.6)."""

TILES = (
    Tiles(128, 64, 8, 4, True, rows=128),
    Tiles(64, 64, 4, 5, True, rows=128),
    Tiles(64, 64, 4, 5, True, 2, 128),
    Tiles(64, 64, 8, 4, True, rows=256),
)


def drawn(rows: int, outputs: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and a weight; a buffer of inputs has as many rows as the next power of two."""
    made = torch.Generator().manual_seed(rows)
    x = torch.randn(1 << (rows - 1).bit_length(), depth, generator=made)
    return x.to(HALF), torch.randn(outputs, depth, generator=made).to(HALF)


@needs_triton
@pytest.mark.parametrize("rows", [65, 128, 200])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_rows_beyond_a_tile_and_outputs_and_depth_beside_it(tiles: Tiles, rows: int):
    """Sums of 320 products in float32, then one rounding: parts are left in float32."""
    x, weight = drawn(rows, 200, 320)
    product = Product(weight.to(DEVICE), HALF, splits=tiles.splits > 1)
    out = torch.full((tiles.splits, rows, 200), torch.nan, device=DEVICE)
    product.many(x.to(DEVICE), out, rows, tiles)
    expected = x[:rows].double() @ weight.double().T
    assert (out.sum(0).cpu().double() - expected).abs().max() < 320 * 2**-24 * float(expected.abs().max())


@needs_triton
@pytest.mark.parametrize("rows", [128, 200])
@pytest.mark.parametrize("tiles", [TILES[0], TILES[3]], ids=str)
def test_a_gated_product_of_many_rows(tiles: Tiles, rows: int):
    x, weight = drawn(rows, 2 * 150, 128)
    product = Product(weight.to(DEVICE), HALF, gated=True)
    out = torch.full((rows, 150), torch.nan, device=DEVICE, dtype=HALF)
    product.many(x.to(DEVICE), out, rows, tiles)
    gates, through = (x[:rows].double() @ weight.double().T).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gates) * through
    band = torch.finfo(HALF).eps * expected.abs() + 1e-4 * float(expected.abs().max())
    assert ((out.cpu().double() - expected).abs() <= band).all()


@pytest.mark.parametrize(
    ("outputs", "depth", "gated", "splits", "rows", "expected"),
    [
        (128_256, 4096, False, False, 256, TILES[0]),  # Llama-3-8B: head, qkv, out, gates, down
        (6144, 4096, False, False, 256, TILES[0]),
        (4096, 4096, False, True, 256, TILES[1]),
        (14_336, 4096, True, False, 256, TILES[3]),
        (4096, 14_336, False, True, 256, TILES[1]),
        (6144, 4096, False, False, 128, TILES[1]),
        (4096, 4096, False, True, 128, TILES[2]),
        (14_336, 4096, True, False, 128, TILES[0]),
        (3072, 2048, False, False, 256, TILES[1]),  # Llama-3.2-1B: qkv, out, gates, down
        (2048, 2048, False, True, 256, TILES[2]),
        (8192, 2048, True, False, 256, TILES[3]),
        (2048, 8192, False, True, 256, TILES[2]),
        (896, 4864, False, True, 256, Tiles(64, 128, 4, 4, True, 4)),  # Qwen2.5-0.5B, down: 28 tiles of 128 rows
        (49_152, 576, False, False, 256, Tiles(64, 64, 4, 5, True)),  # SmolLM2-135M, head: nobody measured others
    ],
)
def test_tiles_of_many_rows_are_those_that_measured_fastest(
    outputs: int, depth: int, gated: bool, splits: bool, rows: int, expected: Tiles
):
    """Within 1 % of a step with the best of benchmarks/results/tiles-h200.json; a GPU not filled keeps others."""
    weight = torch.empty(outputs * (2 if gated else 1), depth, dtype=torch.bfloat16, device="meta")
    assert tiles_for(Product(weight, torch.bfloat16, gated=gated, splits=splits), rows) == expected


def test_no_tile_asks_for_more_memory_than_a_gpu_must_have():
    """What is on its way at once: a tile of the weight, gates too, and one of the inputs, `stages` times."""
    sizes = (576, 960, 1536, 2048, 3072, 4096, 6144, 8192, 14_336, 28_672, 49_152, 128_256)
    cases = itertools.product(sizes, sizes[:10], (False, True), (False, True), (2, 8, 16, 64, 128, 256, 1024))
    for outputs, depth, gated, splits, rows in cases:
        weight = torch.empty(outputs * (2 if gated else 1), depth, dtype=torch.bfloat16, device="meta")
        tiles = tiles_for(Product(weight, torch.bfloat16, gated=gated, splits=splits), rows)
        taken = min(tiles.rows, max(16, rows))
        held = tiles.cols * (2 if gated else 1) + taken
        assert 2 * tiles.depth * held * tiles.stages <= SHARED_BYTES, (outputs, depth, gated, rows, tiles)
        assert tiles.splits == 1 or splits
