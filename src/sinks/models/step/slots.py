"""What a step that reads and writes a cache's slots by itself must be told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepSlots:
    """Where the one token of an open pass goes, the same in every layer.

    `keys[layer]` and `values[layer]` are `[1, kv_heads, capacity, head_dim]`, contiguous float32 on the CPU; the
    token's own go into `slot`. It sees the first `filled` slots. `turns` are cosine and sine at its stream position,
    by which its key is turned, and its query for all slots but the first `sinks`; then cosine and sine at its cache
    position, by which its query is turned for those.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    slot: int
    filled: int
    sinks: int
    turns: Float[Tensor, "4 pairs"]


@runtime_checkable
class SlotCache(Protocol):
    """A streaming cache that may hand its slots out."""

    def step_slots(self) -> StepSlots | None:
        """The slots for the pass now open; None where they are not as `StepSlots` says."""
        ...
