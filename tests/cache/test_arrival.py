"""Where new tokens stand: the tensors of a pass against the integers of the plan."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks.cache.arrival import Arrival
from sinks.cache.plan import Plan

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    plan=st.builds(Plan, st.integers(0, 4), st.integers(1, 6)),
    seen=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    columns=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_slots_are_read_and_written_as_planned(plan: Plan, seen: list[int], columns: int, seed: int) -> None:
    real = torch.rand(len(seen), columns, generator=torch.Generator().manual_seed(seed)) < 0.7 + 0.1 * seed
    slots = [[plan.occupant(slot, count) for slot in range(plan.capacity)] for count in seen]
    counts = list(seen)
    for block in Arrival(seen, columns, real, 0).blocks(plan, CPU):
        before = block.slot_positions.tolist()
        for row, count in enumerate(counts):
            expected = [plan.occupant(slot, count + block.is_step) for slot in range(block.filled)]
            assert before[row] == expected
        rows, written, chosen = block.writes
        every = range(block.width)
        for n, slot in enumerate(written.tolist()):
            for row in range(len(seen)) if rows is None else [int(rows[n])]:
                column = every[n] if chosen is None else int(chosen[n])
                slots[row][slot] = int(block.positions[row, column])
        counts = block.seen_after
        assert slots == [[plan.occupant(slot, count) for slot in range(plan.capacity)] for count in counts]
    assert counts == [n + int(r.sum()) for n, r in zip(seen, real, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    plan=st.builds(Plan, st.integers(0, 4), st.integers(1, 6)),
    seen=st.integers(0, 30),
    columns=st.integers(1, 40),
)
def test_of_a_long_pass_the_plan_keeps_what_it_would_keep(plan: Plan, seen: int, columns: int) -> None:
    whole = Arrival([seen, seen], columns, None, 0).whole(plan, CPU)
    slots = [plan.occupant(slot, seen) for slot in range(plan.capacity)]
    for run in whole.staying:
        rows, written, _ = run.writes
        assert rows is None and len(set(written.tolist())) == run.width  # no slot twice: their order is nobody's
        for column, slot in enumerate(written.tolist()):
            slots[slot] = seen + run.columns.start + column
    assert slots == [plan.occupant(slot, seen + columns) for slot in range(plan.capacity)]
    standing = whole.standing
    assert (standing.kept, standing.keys) == (plan.filled(seen), plan.filled(seen) + columns)
