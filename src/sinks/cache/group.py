"""Several streams of one row each, read in one forward pass of one token each: continuous batching without paging.

The products with the weights, which read every weight once, are shared by the rows. Attention is each row's own, over
its own ring, by the code that a stream alone runs: nothing is padded to the longest row, no mask is built, and a row
joins or leaves by being in the next list or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sinks.cache.arrival import Arrival
from sinks.cache.cache import SinkCache
from sinks.cache.rings.ring import turn
from sinks.errors import CacheError, InvalidInput
from sinks.kernels.lens import Lens
from sinks.models.step.slots import Seating, StepSlots


class Group(Cache):
    """Caches of one row each as the rows of one pass, `[rows, 1]` tokens; made for a pass, it holds nothing of its own.

    `idle` more rows may follow, whose tokens nobody reads and whose attention is zeros: they fill a batch up to a fixed
    size. A pass that is broken off leaves every cache as it was before: see `SinkCache.retract_pass`.
    """

    def __init__(self, caches: Sequence[SinkCache], idle: int = 0) -> None:
        if not caches or any(len(cache.seen) > 1 or cache.start != caches[0].start for cache in caches):
            raise InvalidInput("a group is made of caches of one row each, all with one start")
        if len({id(cache) for cache in caches}) < len(caches):
            raise InvalidInput("a cache cannot be two rows of one group: fork() it")
        super().__init__(layers=[*caches[0].rings])  # what transformers asks of layers, any row's can answer
        self.caches = caches
        self.idle = idle
        self._arrival: Arrival | None = None

    @property
    def seen(self) -> list[int]:
        """Real tokens fed so far, by row."""
        return [sum(cache.seen) for cache in self.caches] + [0] * self.idle

    def open_pass(self, model: object, shape: tuple[int, int], mask: Tensor | None, positions: Tensor | None) -> None:
        """Begin a pass of `shape` = (rows, 1); see `SinkCache.open_pass`."""
        rows = len(self.caches) + self.idle
        if shape != (rows, 1) or mask is not None or positions is not None:
            raise InvalidInput(f"a group of {rows} rows reads one token a row, without a mask: it was fed {shape}")
        opened: list[SinkCache] = []
        try:
            for cache in self.caches:
                cache.open_pass(model, (1, 1), None, None)
                opened.append(cache)
        except BaseException:
            for cache in opened:
                cache.retract_pass()
            raise
        self._arrival = Arrival(self.seen, 1, None, self.caches[0].start)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, lenses: Sequence[Lens] = (), **options: Any
    ) -> Tensor:
        """Attention of one layer's new tokens, each over its own row's keys; see `SinkCache.attend`."""
        if self._arrival is None:
            raise CacheError("no forward pass is open on this Group: only an attached model may drive it")
        first = self.caches[0]
        plan, observed = first.rings[layer].plan, (layer, lenses) if lenses else None
        scoring = first.scoring(layer, **options)
        with torch.no_grad():
            turned = turn(query, key, self._arrival.blocks(plan, query.device)[0], scoring)
            parts: list[Tensor] = []
            for row, cache in enumerate(self.caches):
                block = cache.step_of(layer, query.device)
                heads = turned.row(row, full=max(block.seen_after) > plan.capacity)
                here = value[row : row + 1]
                parts.append(cache.rings[layer].attend_turned(heads, here, block, scoring, observed))
            if self.idle:
                parts.append(parts[0].new_zeros(self.idle, *parts[0].shape[1:]))
            return torch.cat(parts)

    def step_seats(self) -> Seating | None:
        """The seats of the pass now open, where all caches sit in one pool; idle rows have position -1."""
        first = self.caches[0].seat
        if self._arrival is None or first is None or first.seats is None:
            return None
        rows = list[int]()
        for cache in self.caches:
            seat = cache.seat
            if seat is None or seat.seats is not first.seats:
                return None
            rows.append(seat.number)
        positions = list(self._arrival.seen)
        for cache, position in zip(self.caches, positions, strict=False):
            if position == 0:
                cache.claim()
        positions[len(rows) :] = [-1] * self.idle
        return Seating(first.seats, rows + rows[:1] * self.idle, positions)

    def step_slots(self) -> StepSlots | None:
        """The slots of the pass now open, where it is one row's, for a step that takes one row alone."""
        return self.caches[0].step_slots() if len(self.caches) == 1 and not self.idle else None

    def close_pass(self, complete: bool) -> None:
        """End the pass: count its tokens, or, if the model raised on the way, take every row back to before it."""
        self._arrival = None
        for cache in self.caches:
            if complete:
                cache.close_pass(True)
            else:
                cache.retract_pass()
