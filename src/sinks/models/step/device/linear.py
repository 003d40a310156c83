"""A weight, what stands before and behind it, and the tiles that carry it at the speed of the memory bus."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sinks.kernels.device.language import on, tl
from sinks.models.step.device.products import thin, wide

WAVE = 128
"""Programs that fill an H200, which has 132 multiprocessors."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: outputs and depth of a tile, warps of a program.

    For more rows than one also: how many tiles are on their way, whether the weight is the matrix units' left operand,
    among how many programs the depth is split, and how many rows a program takes at most."""

    cols: int
    depth: int
    warps: int
    stages: int = 4
    turned: bool = False
    splits: int = 1
    rows: int = 64


@dataclass(frozen=True, eq=False)
class Product:
    """`weight` `[outputs, depth]`, twice as high with `gated`: gates first, then what they let through.

    A weight is a number, int8, or int4 in pairs (uint8); `scales` are then one number a row, or scale and centre of
    every group. `dtype` is that of a matrix unit's factors. `gain` and `epsilon` are those of the RMSNorm in front, to
    whose weight `offset` is added. `splits`: the result may come in parts to be added up.
    """

    weight: Tensor
    dtype: torch.dtype
    gain: Tensor | None = None
    epsilon: float = 0.0
    offset: float = 0.0
    scales: Tensor | None = None
    bias: Tensor | None = None
    gated: bool = False
    gelu: bool = False
    splits: bool = False

    @property
    def outputs(self) -> int:
        """Numbers a row of the result."""
        return len(self.weight) // (2 if self.gated else 1)

    @property
    def depth(self) -> int:
        """Numbers a row of the input."""
        return self.weight.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def bits(self) -> int:
        """Bits of a weight; 16 says that it is a number by itself."""
        return {torch.int8: 8, torch.uint8: 4}.get(self.weight.dtype, 16)

    @property
    def bytes(self) -> int:
        """What a step reads."""
        return self.weight.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def programs(self, tiles: Tiles) -> int:
        """How many share the outputs out."""
        return -(-self.outputs // tiles.cols)

    def one(
        self, given: Tensor, out: Tensor, tiles: Tiles, *, residual: bool = False, best: Tensor | None = None,
        pdl: int = 0,
    ) -> None:  # fmt: skip
        """The first row of `given`, normalised here, into that of `out`, or added to it.

        `best` `[rows, places]` takes the largest outputs, and where they stand (`choose` empties it).
        """
        programs, absent = self.programs(tiles), self.weight
        with on(absent.device):
            thin[(programs,)](
                given, absent if self.gain is None else self.gain, *self._held(), out,
                absent if best is None else best,
                (self.depth, self.outputs, 1, programs, self.epsilon, len(self.weight)),
                NORM=self.gain is not None, OFFSET=self.offset, WHOLE=tiles.depth >= self.depth,
                **self._constants(tiles, residual, best, pdl),
            )  # fmt: skip

    def many(
        self, given: Tensor, out: Tensor, rows: int, tiles: Tiles, *, best: Tensor | None = None, pdl: int = 0
    ) -> None:
        """The first `rows` of `given`, which the norm is behind, into those of `out`; with splits, [splits, rows]."""
        programs, absent = self.programs(tiles), self.weight
        taken = min(tiles.rows, max(16, power(rows)))  # a matrix unit takes 16 rows or more: the buffers have them
        deep = -(-self.depth // tiles.depth // tiles.splits) * tiles.depth
        with on(absent.device):
            wide[(-(-rows // taken), programs, tiles.splits)](
                given, *self._held(), out, absent if best is None else best,
                (self.depth, self.outputs, rows, programs, 0.0, len(self.weight), deep, rows * self.outputs),
                ROWS=taken, TURNED=tiles.turned, STAGES=tiles.stages, TYPE=_KINDS[self.dtype], num_stages=tiles.stages,
                **self._constants(tiles, False, best, pdl),
            )  # fmt: skip

    def _held(self) -> list[Tensor]:
        return [self.weight if part is None else part for part in (self.weight, self.scales, self.bias)]

    def _constants(self, tiles: Tiles, residual: bool, best: Tensor | None, pdl: int) -> dict[str, Any]:
        return {
            "COLS": tiles.cols, "DEPTH": tiles.depth, "GATED": self.gated, "GELU": self.gelu, "RESIDUAL": residual,
            "BIAS": self.bias is not None, "BITS": self.bits, "PLACES": 0 if best is None else best.shape[1],
            "num_warps": tiles.warps, **chained(pdl),
        }  # fmt: skip


_KINDS = {} if tl is None else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def power(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def chained(pdl: int) -> dict[str, Any]:
    """What launches a kernel before the one ahead has finished; it waits where it must (`ahead`)."""
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": 0}


def tiles_for(product: Product, rows: int) -> Tiles:
    """What measured fastest on an H200 (benchmarks/gpu/tune.py); few large ones where each is a Python call."""
    if product.weight.device.type == "cpu":
        return Tiles(64, 256, 4, 2, rows > 16, 2 if product.splits and rows > 1 else 1)
    if product.dtype is torch.float32 and rows > 1:
        return Tiles(16, 64, 4, 3)
    if rows == 1:
        return _tiles_for_one(product)
    if rows <= 16:
        return _tiles_for_few(product)
    if rows > 64 and product.bits == 16 and (tiles := _tiles_for_many(product, rows)):
        return tiles
    if product.splits:
        return Tiles(64, 128, 4, 4, True, 4) if product.depth > 4096 else Tiles(32, 128, 4, 4, splits=2)
    return Tiles(32, 128, 4, 4) if product.outputs < 4096 else Tiles(64, 64, 4, 5, True)


def _tiles_for_one(product: Product) -> Tiles:
    if product.outputs > 2**15:
        return Tiles(8, 512, 2) if product.depth > 1024 else Tiles(16, 64, 1)
    if product.gated:
        return Tiles(8 if product.depth > 1024 else 4, 1024, 4)
    if product.depth > 2048:
        return Tiles(2, 2048, 4)
    if product.depth > 1024:
        return Tiles(4, 1024, 4) if product.depth == 2048 else Tiles(4, 2048, 4)
    return Tiles(4, 1024, 4 if product.splits else 2)


def _tiles_for_few(product: Product) -> Tiles:
    if product.gated:
        return Tiles(32, 128, 4, 4)
    if product.depth > 4096:
        return Tiles(64, 128, 4, 4, True, 4 if product.splits else 1)
    if product.outputs > 2**15:
        return Tiles(64, 128, 4, 4, True)
    return Tiles(16, 128, 2, 6, splits=2 if product.splits else 1)


def _tiles_for_many(product: Product, rows: int) -> Tiles | None:
    """Tiles of 128 rows, so that a weight is fetched half as often, larger ones where small ones take a second wave.

    None: nobody measured so short a depth, or they would leave a third of the GPU without work.
    """
    if product.depth < 2048:
        return None
    if product.gated and rows >= 256:
        return Tiles(64, 64, 8, 4, True, rows=256)
    small, large = Tiles(64, 64, 4, 5, True, rows=128), Tiles(128, 64, 8, 4, True, rows=128)
    programs = product.programs(small) * -(-rows // small.rows)
    if product.splits and programs < WAVE:
        small, programs = replace(small, splits=2), 2 * programs
    if programs < 2 / 3 * WAVE:
        return None
    return small if product.splits or programs <= WAVE else large
