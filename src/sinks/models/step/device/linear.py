"""A weight, what stands before and behind it, and the tiles that carry it at the speed of the memory bus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sinks.kernels.device.language import on, tl
from sinks.models.step.device.products import thin, wide


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: outputs and depth of a tile; `stages` 0: multiply and add, else by matrix units."""

    cols: int
    depth: int
    warps: int
    stages: int = 0
    turned: bool = False


@dataclass(frozen=True, eq=False)
class Product:
    """`weight` `[outputs, depth]`, times two with `gated`: gates first, then what they let through.
    `dtype` is that of the factors of a matrix unit.

    `gain` and `epsilon` are those of the RMSNorm in front (`offset` is added to its weight), `scales` one number a row
    of an int8 weight, `residual` says that the result is added to what is there.
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
    residual: bool = False

    @property
    def outputs(self) -> int:
        """Numbers a row of the result."""
        return len(self.weight) // (2 if self.gated else 1)

    @property
    def depth(self) -> int:
        """Numbers a row of the input."""
        return self.weight.shape[1]

    @property
    def bytes(self) -> int:
        """What a step reads."""
        return self.weight.numel() * self.weight.element_size()

    def programs(self, tiles: Tiles) -> int:
        """How many share the outputs out."""
        return -(-self.outputs // tiles.cols)

    def __call__(
        self, given: Tensor, out: Tensor, rows: int, tiles: Tiles, best: tuple[Tensor, Tensor] | None = None,
        pdl: bool = False,
    ) -> None:  # fmt: skip
        """The first `rows` of `given` -> those of `out`; `best` takes the largest of every program's outputs."""
        weight, programs = self.weight, self.programs(tiles)
        absent = weight
        constants = {
            "COLS": tiles.cols, "DEPTH": tiles.depth, "NORM": self.gain is not None, "GATED": self.gated,
            "GELU": self.gelu, "RESIDUAL": self.residual, "BIAS": self.bias is not None,
            "SCALED": self.scales is not None, "BEST": best is not None, "OFFSET": self.offset, "PDL": pdl,
            "num_warps": tiles.warps,
        }  # fmt: skip
        if pdl:
            constants["launch_pdl"] = True
        held = [absent if part is None else part for part in (self.gain, weight, self.scales, self.bias)]
        sizes = (self.depth, self.outputs, rows, programs, self.epsilon)
        places = (absent, absent) if best is None else best
        with on(weight.device):
            if tiles.stages == 0:
                thin[(programs,)](given, *held, out, places, sizes, ROWS=_power(rows), **constants)
            else:
                # a matrix unit takes 16 rows or more: the buffers have them
                wide[(programs,)](
                    given, *held, out, places, sizes, ROWS=max(16, _power(rows)), TURNED=tiles.turned,
                    STAGES=tiles.stages, TYPE=_KINDS[self.dtype], num_stages=tiles.stages, **constants,
                )  # fmt: skip


_KINDS = {} if tl is None else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def tiles_for(product: Product, rows: int) -> Tiles:
    """What measured fastest on an H200 (benchmarks/gpu/products.py); few large ones where each is a Python call."""
    if product.weight.device.type == "cpu":
        return Tiles(64, 256, 4, 0 if rows <= 4 else 2, rows > 16)
    if rows <= 4:
        depth = 512 if product.depth <= 768 else 1024 if product.depth < 2048 else 2048
        return Tiles(2 if product.gated else 4, depth, 4)
    if rows <= 16:
        return Tiles(16, 128, 4, 4)
    return Tiles(64, 64, 4, 4, turned=True)
