"""What the kernel is made of: CuTe, imported when it is first asked for, and what changes the kernel's code."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any


@cache
def tools() -> Any:
    """CuTe and what flash-attn-4 has of it, imported when first asked for: they take seconds."""
    names = {
        "cutlass": "cutlass", "cute": "cutlass.cute", "warp": "cutlass.cute.nvgpu.warp",
        "language": "cutlass.cutlass_dsl", "layouts": "quack.layout_utils", "fake": "quack.compile_utils",
        "barriers": "flash_attn.cute.named_barrier", "calls": "flash_attn.cute.interface",
        "memory": "cutlass.memory.smem",
    }  # fmt: skip
    found = {name: importlib.import_module(module) for name, module in names.items()}
    return SimpleNamespace(kernel=found["calls"].FlashAttentionForwardSm90, **found)


@dataclass(frozen=True)
class Build:
    """Everything that changes the kernel's code.

    `kind` is the type of heads by CuTe's name, `group` counts the heads of a key head; `several` rows are told apart
    by where they begin; `meets`: scores are found here.
    """

    kind: str
    head_dim: int
    group: int
    several: bool
    sinks: int
    meets: bool
    logits: bool

    @property
    def depth(self) -> int:
        """Sinks of one matrix instruction."""
        return 8 if self.sinks <= 8 else 16

    @property
    def each(self) -> int:
        """Sinks of those that one thread weighs."""
        return self.depth // 4

    @property
    def chunks(self) -> range:
        """So many of them."""
        return range(-(-self.sinks // self.depth))

    @property
    def offsets(self) -> list[int]:
        """Those, counted from the first one: two beside each other, and two more 8 further, of every chunk."""
        return [chunk * self.depth + place for chunk in self.chunks for place in (0, 1, 8, 9)[: self.each]]

    @property
    def registers(self) -> int:
        """Registers of values, two of half precision each, that the matrix instructions of a warp take in all."""
        return len(self.chunks) * self.each // 2 * self.head_dim // 8

    @property
    def met(self) -> range:
        """Matrix instructions beside each other, of 8 sinks each, that find the scores."""
        return range(-(-self.sinks // 8))
