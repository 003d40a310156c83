"""What the rows of one step do together: the pass that reads their newest tokens, and the choice of the next ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinks.cache.group import Group
from sinks.models.step.hasten import LeanForward
from sinks.stream.answer import Answer
from sinks.stream.engine.rows.row import Ground, Row
from sinks.stream.sampling import Asked, Choices

ALONE = 8
"""Rows up to which compiled steps of one row each are no slower than a pass of all (int4, int8; see docs/engine.md)."""


@torch.inference_mode()
def read_newest(rows: Sequence[Row], size: int) -> None:
    """Read the newest token of each row, in one pass of `size` rows if that is more; each row then has its logits.

    Where a step for one row is compiled, a few rows take it one after the other, as a session alone does. A GPU has not
    computed the logits yet when this returns. If the model raises on the way, every row is as it was before.
    """
    before = {row: row.cache.seen for row in rows}
    alone = max(size, len(rows)) <= ALONE and all(_steps_alone(row) for row in rows)
    try:
        for part in [[row] for row in rows] if alone else [rows]:
            _read(part, 0 if alone else max(0, size - len(rows)))
    except BaseException:
        for row, seen in before.items():
            row.cache.take_back(seen)  # the layers may be through, and the output head or another row not
            row.logits = None
        raise


def _steps_alone(row: Row) -> bool:
    forward = row.ground.loaded.model.forward
    return isinstance(forward, LeanForward) and forward.native is not None and row.cache.kind == "full"


def _read(rows: Sequence[Row], idle: int) -> None:
    model, newest = rows[0].ground.loaded.model, list[list[int]]()
    for row in rows:
        row.check_moment()
        assert row.history.newest is not None  # nothing is written behind an empty stream
        newest.append([row.history.newest])
    group = Group([row.cache for row in rows], idle)
    fed = torch.tensor([*newest, *[[0]] * idle], device=model.device)
    try:
        logits: Tensor = model(input_ids=fed, past_key_values=group, use_cache=True).logits[:, -1]
    except BaseException:
        group.close_pass(False)  # transformers' hooks do so too, but not for Ctrl-C
        raise
    for row, own in zip(rows, logits, strict=False):
        row.logits = own


def choices(writing: Sequence[tuple[Row, Answer]]) -> Choices:
    """The next token of each of these answers, whose rows have their logits."""
    asked = list[Asked]()
    for row, answer in writing:
        assert row.logits is not None
        history = row.history
        asked.append((answer.sampler, row.logits, history.last(answer.sampler.sampling.lookback), history.seen))
    return Choices(asked)


def warm_up(ground: Ground) -> None:
    """Capture the step of every number of rows now, not when it is first met, which takes up to a second each."""
    forward, pool = ground.loaded.model.forward, ground.pool
    if not isinstance(forward, LeanForward) or forward.device is None or pool is None or pool.seats is None:
        return
    step = forward.device.step(pool.seats)
    for power in range((pool.size - 1).bit_length() + 1):
        step.warm_up(1 << power)
