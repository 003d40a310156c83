"""The slots of a cache laid open for one step, where they are simple enough: see `StepSlots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sinks.cache.arrival import Arrival
from sinks.cache.plan import Plan
from sinks.cache.rings.ring import Ring
from sinks.kernels.phase import Rotary
from sinks.models.step.slots import StepSlots


def open_slots(rings: Sequence[Ring], plan: Plan, arrival: Arrival, rotary: Rotary) -> StepSlots | None:
    """The slots of `rings`, if all keep `plan` and one row of float32 on the CPU, and `arrival` is one token."""
    if arrival.columns != 1 or arrival.mask is not None or len(arrival.seen) != 1:
        return None
    if not all(_is_simple(ring, plan, rotary) for ring in rings):
        return None
    (block,) = arrival.blocks(plan, torch.device("cpu"))
    recent, in_cache = block.tables(rotary, torch.float32)
    return StepSlots(
        keys=[ring.held[0] for ring in rings],
        values=[ring.held[1] for ring in rings],
        slot=plan.slot(arrival.seen[0]),
        filled=block.filled,
        sinks=plan.sinks,
        turns=torch.cat((*recent, *(recent if in_cache is None else in_cache))).view(4, -1),
    )


def _is_simple(ring: Ring, plan: Plan, rotary: Rotary) -> bool:
    keys: Any = ring.keys
    return (
        type(ring) is Ring
        and ring.is_initialized
        and ring.plan == plan
        and keys.dtype is torch.float32
        and keys.device.type == "cpu"
        and keys.shape[-1] == rotary.width == ring.held[1].shape[-1]
        and not rotary.interleaved
    )
