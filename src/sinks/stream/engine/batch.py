"""What the rows of one step do together: the pass that reads their newest tokens, and the choice of the next ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinks.cache.group import Group
from sinks.errors import SinksError
from sinks.stream.answer import Answer
from sinks.stream.engine.row import Row
from sinks.stream.sampling import likeliest, no_choice


@torch.inference_mode()
def read_newest(rows: Sequence[Row], size: int) -> None:
    """Read the newest token of each row in one pass, of `size` rows if that is more; each row then has its logits.

    If the model raises on the way, every row is as it was before.
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
    for row, own in zip(rows, logits, strict=False):
        row.logits = own


def choose_together(writing: Sequence[tuple[Row, Answer]]) -> list[int | SinksError | None]:
    """The next token of the answers that take the likeliest as it is, or why there is none; None for the others.

    The device is waited for once, not once a row.
    """
    plain = [row.logits if answer.sampler.sampling.plain else None for row, answer in writing]
    logits = [each for each in plain if each is not None]
    told = iter(likeliest(logits) if logits else ())
    found: list[int | SinksError | None] = []
    for each in plain:
        token = None if each is None else next(told)
        found.append(no_choice(each.dtype) if each is not None and token is None else token)
    return found
