"""Where the tokens of one forward pass stand: worked out once, shared by every layer that keeps the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinks.cache.plan import Plan
from sinks.kernels.band.packed import Standing
from sinks.kernels.chunked import BLOCK, block_bias
from sinks.kernels.phase import Rotary

Tables = tuple[Tensor, Tensor]


def stream_positions(
    seen: Sequence[int], columns: int, real: Bool[Tensor, "batch columns"] | None, device: torch.device
) -> Int[Tensor, "batch columns"]:
    """Stream position of each new token after `seen` tokens of its row, -1 at a pad."""
    before = torch.tensor(seen, dtype=torch.int64, device=device).unsqueeze(1)
    if real is None:
        return before + torch.arange(columns, device=device)
    return (before + real.cumsum(dim=1) - 1).masked_fill(~real, -1)


def count_on(seen: Sequence[int], columns: int, real: Bool[Tensor, "batch columns"] | None) -> list[int]:
    """Real tokens of each row once these columns are added."""
    counts = [columns] * len(seen) if real is None else real.sum(dim=1).tolist()
    return [before + count for before, count in zip(seen, counts, strict=True)]


@dataclass(eq=False)
class Block:
    """A run of new columns, no longer than the window unless it is `Arrival.whole`, and the slots before it is written.

    `seen` counts each row's real tokens before the block, `real` marks pads as False (None: no pads).
    """

    plan: Plan
    columns: slice
    seen: Sequence[int]
    real: Bool[Tensor, "batch columns"] | None
    start: int
    device: torch.device
    _memo: dict[object, object] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """How many columns."""
        return self.columns.stop - self.columns.start

    @cached_property
    def positions(self) -> Int[Tensor, "batch columns"]:
        """Stream position of each new token, -1 at a pad."""
        return stream_positions(self.seen, self.width, self.real, self.device)

    @cached_property
    def seen_after(self) -> list[int]:
        """Real tokens of each row once the block is written."""
        return count_on(self.seen, self.width, self.real)

    @property
    def is_step(self) -> bool:
        """One real token for every row: its slot can be written first, over the key that has just left the window."""
        return self.width == 1 and self.real is None

    @cached_property
    def filled(self) -> int:
        """Slots in use by any row when the block attends."""
        return self.plan.filled(max(self.seen_after if self.is_step else self.seen))

    @cached_property
    def slot_positions(self) -> Int[Tensor, "batch slots"]:
        """Stream position held by each slot in use when the block attends, -1 where a row has none."""
        seen = torch.tensor(self.seen_after if self.is_step else self.seen, device=self.device).unsqueeze(1)
        slots = torch.arange(self.filled, device=self.device)
        turns = (seen - 1 - slots).div(self.plan.window, rounding_mode="floor")
        latest = slots + turns * self.plan.window * (slots >= self.plan.sinks)
        return latest.where(slots < seen, -1)

    @cached_property
    def key_positions(self) -> Int[Tensor, "batch keys"]:
        """Stream position of every key that the block meets: the slots, and the block where it is still unwritten."""
        return self.slot_positions if self.is_step else torch.cat((self.slot_positions, self.positions), dim=1)

    @cached_property
    def writes(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(rows, slots, columns) to write; rows and columns are None where every row writes the same slots."""
        past_sinks = self.positions - self.plan.sinks
        slots = self.positions.where(past_sinks < 0, self.plan.sinks + past_sinks % self.plan.window)
        if self.real is None and len(set(self.seen)) == 1:
            return None, slots[0], None
        rows, columns = (self.positions >= 0).nonzero(as_tuple=True)
        return rows, slots[rows, columns], columns

    @cached_property
    def standing(self) -> Standing:
        """Where the block stands as one chunk, for rows that have seen equally much and have no pads."""
        return Standing(self.plan.sinks, self.plan.window, self.seen[0], self.width, self.start)

    @cached_property
    def staying(self) -> list[Block]:
        """Without pads: the runs of its columns, counted from its first, that still have a slot at its end."""
        sinks = min(self.width, max(0, self.plan.sinks - self.seen[0]))
        begin = max(sinks, self.width - self.plan.window)
        runs = [slice(0, sinks), slice(begin, self.width)] if sinks < begin else [slice(0, self.width)]
        return [
            Block(self.plan, run, [seen + run.start for seen in self.seen], None, self.start, self.device)
            for run in runs
            if run.start < run.stop
        ]

    def steps(self, rotary: Rotary) -> Int[Tensor, " pairs"]:
        """What one position adds to each phase, on the device."""
        if id(rotary) not in self._memo:
            self._memo[id(rotary)] = rotary.steps.to(self.device)
        return self._memo[id(rotary)]  # type: ignore[return-value]

    def tables(self, rotary: Rotary, dtype: torch.dtype) -> tuple[Tables, Tables | None]:
        """Angles of the new tokens at their stream positions, and at their cache positions where those differ."""
        key = (id(rotary), dtype)
        if key not in self._memo:
            recent = rotary.tables(self.positions + self.start, dtype)
            full = max(self.seen_after) > self.plan.capacity and self.plan.sinks
            in_cache = self.positions.clamp(max=self.plan.capacity - 1) + self.start
            self._memo[key] = (recent, rotary.tables(in_cache, dtype) if full else None)
        return self._memo[key]  # type: ignore[return-value]

    def bias(self, slopes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores against the slots, and against the block itself where it is still unwritten."""
        if self.is_step and slopes is None and self.filled == self.plan.filled(min(self.seen_after)):
            return None
        key = (id(slopes), dtype)
        if key not in self._memo:
            seen = {"sinks": self.plan.sinks, "window": self.plan.window}
            self._memo[key] = block_bias(self.positions, self.key_positions, **seen, slopes=slopes, dtype=dtype)
        return self._memo[key]  # type: ignore[return-value]


class Arrival:
    """The new tokens of one forward pass of the whole model."""

    def __init__(
        self, seen: Sequence[int], columns: int, mask: Bool[Tensor, "batch columns"] | None, start: int
    ) -> None:
        self.seen = list(seen)
        self.columns = columns
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.start = start
        self._blocks: dict[tuple[Plan, torch.device], list[Block]] = {}
        self._wholes: dict[tuple[Plan, torch.device], Block] = {}

    def blocks(self, plan: Plan, device: torch.device) -> list[Block]:
        """The pass cut into blocks for the layers of one plan on one device, in order."""
        if (plan, device) not in self._blocks:
            self._blocks[plan, device] = self._cut(plan, device)
        return self._blocks[plan, device]

    @property
    def is_even(self) -> bool:
        """Whether every row has seen equally much and has no pad."""
        return self.mask is None and len(set(self.seen)) == 1

    def whole(self, plan: Plan, device: torch.device) -> Block:
        """The pass as one block, however long, for rows that are even."""
        if (plan, device) not in self._wholes:
            columns = slice(0, self.columns)
            self._wholes[plan, device] = Block(plan, columns, self.seen, None, self.start, device)
        return self._wholes[plan, device]

    def _cut(self, plan: Plan, device: torch.device) -> list[Block]:
        blocks: list[Block] = []
        seen = self.seen
        for columns in plan.blocks(self.columns, BLOCK):
            real = None if self.mask is None else self.mask[:, columns].to(device)
            if real is not None and bool(real.all()):
                real = None
            blocks.append(Block(plan, columns, seen, real, self.start, device))
            seen = blocks[-1].seen_after
        return blocks

    @property
    def seen_after(self) -> list[int]:
        """Real tokens of each row once the pass is over."""
        return count_on(self.seen, self.columns, self.mask)

    @property
    def positions(self) -> Int[Tensor, "batch columns"]:
        """Stream position of every new token, -1 at a pad."""
        device = torch.device("cpu") if self.mask is None else self.mask.device
        return stream_positions(self.seen, self.columns, self.mask, device)
