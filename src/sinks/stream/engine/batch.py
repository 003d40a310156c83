"""The pass that reads the newest tokens of all rows of one step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sinks.cache.group import Group
from sinks.stream.engine.row import Row
from sinks.stream.sampling import Likeliest


@torch.inference_mode()
def read_newest(rows: Sequence[Row], size: int) -> None:
    """Read the newest token of each row in one pass, of `size` rows if that is more; each row then has its logits.

    A GPU has not computed them yet when this returns. If the model raises on the way, every row is as it was before.
    """
    model, newest = rows[0].ground.loaded.model, list[list[int]]()
    for row in rows:
        row.check_moment()
        assert row.history.newest is not None  # nothing is written behind an empty stream
        newest.append([row.history.newest])
    idle = max(0, size - len(rows))
    group = Group([row.cache for row in rows], idle)
    fed = torch.tensor([*newest, *[[0]] * idle], device=model.device)
    try:
        logits: Tensor = model(input_ids=fed, past_key_values=group, use_cache=True).logits[:, -1]
    except BaseException:
        group.close_pass(False)  # transformers' hooks do so too, but not for Ctrl-C
        raise
    best = Likeliest(logits)
    for number, (row, own) in enumerate(zip(rows, logits, strict=False)):
        row.logits, row.best = own, partial(best.of, number)
