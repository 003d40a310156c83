"""What a step that reads and writes a cache's slots by itself must be told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sinks.kernels.phase import Rotary


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


@dataclass(frozen=True, eq=False)
class Seats:
    """The rings of many streams at addresses that never change, a seat for each: what a captured step works on.

    `rings[layer]` are that layer's tensors, seats first and contiguous: keys and values `[seats, kv_heads, sinks +
    window, head_dim]`, or the six of an int8 ring in the order of its names. `sizes[layer]` is (sinks, window) and
    `rotaries[layer]` how it turns. Position `start + j` is the phase of token j of every stream.
    """

    rings: Sequence[tuple[Tensor, ...]]
    sizes: Sequence[tuple[int, int]]
    rotaries: Sequence[Rotary | None]
    start: int


@dataclass(frozen=True, eq=False)
class Seating:
    """The one token a row of an open pass: row i sits in `rows[i]` and is token `positions[i]`, from 0, of its stream.

    A row whose position is -1 takes no part: it writes nothing, and nobody reads what comes of it.
    """

    seats: Seats
    rows: Sequence[int]
    positions: Sequence[int]


@runtime_checkable
class SeatCache(Protocol):
    """A streaming cache that may lay its seats open."""

    def step_seats(self) -> Seating | None:
        """The seats for the pass now open; None where they are not as `Seats` says."""
        ...
