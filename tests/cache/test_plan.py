"""The slot plan, to exhaustion, against a list that forgets."""

from __future__ import annotations

import pytest

from sinks.cache.plan import Plan
from sinks.errors import InvalidInput

PLANS = [Plan(sinks, window) for sinks in range(5) for window in range(1, 7)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_slots_hold_what_a_list_would_keep(plan: Plan) -> None:
    slots = [-1] * plan.capacity
    for position in range(4 * plan.capacity):
        slots[plan.slot(position)] = position
        seen = position + 1
        kept = sorted(p for p in slots if p >= 0)
        assert kept == plan.visible(seen)
        assert kept == [p for p in range(seen) if p < plan.sinks or p >= seen - plan.window]
        assert [plan.occupant(slot, seen) for slot in range(plan.capacity)] == slots
        assert len(kept) == plan.filled(seen) == seen - plan.evicted(seen)
        assert plan.cache_position(position) == len(kept) - 1


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_blocks_cover_a_chunk_and_never_outgrow_the_window(plan: Plan) -> None:
    for columns in range(20):
        blocks = list(plan.blocks(columns, largest=4))
        assert [i for b in blocks for i in range(b.start, b.stop)] == list(range(columns))
        assert all(0 < b.stop - b.start <= min(plan.window, 4) for b in blocks)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("sinks", "window"), [(-1, 4), (4, 0), (4, -3), (1.5, 4), (True, 4), ("4", 4)])
def test_sizes_that_make_no_sense_are_named(sinks: int, window: int) -> None:
    with pytest.raises(InvalidInput, match="sinks|window"):
        Plan(sinks, window)
