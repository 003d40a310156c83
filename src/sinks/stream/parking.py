"""A session's own state, beside its cache, as tensors of fixed shape, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sinks.cache.cache import SinkCache
from sinks.errors import DamagedSnapshot, InvalidInput
from sinks.stream.history import History
from sinks.stream.pieces import PENDING_BYTES, Pieces


@dataclass(frozen=True, eq=False)
class Parked:
    """What a session takes up again: visible ids, text held back, random numbers, and logits if a token was read.

    `in_dialogue` says whether the stream is a dialogue, so that the next message goes on with it.
    """

    history: History
    pending: bytes
    generator: Tensor
    logits: Tensor | None
    in_dialogue: bool

    def restore(
        self, history: History, pieces: Pieces, generator: torch.Generator, device: torch.device
    ) -> Tensor | None:
        """Put visible ids, text held back and random numbers where they belong; returns the logits, on `device`."""
        history.adopt(self.history)
        pieces.pending = self.pending
        generator.set_state(self.generator)
        return None if self.logits is None else self.logits.to(device)


def pack(
    history: History,
    pieces: Pieces,
    generator: torch.Generator,
    logits: Tensor | None,
    no_logits: Tensor,
    in_dialogue: bool,
) -> dict[str, Tensor]:
    """The state by name; `no_logits`, whose type is wide enough for any, stands in where there are none.

    Shapes and types never depend on what was read, nor on which step made the logits.
    """
    pending = pieces.pending
    return {
        "session.seen": torch.tensor([history.seen], dtype=torch.int64),
        "session.first": fixed(history.first, history.plan.sinks),
        "session.recent": fixed(list(history.recent), history.plan.window),
        "session.pending": fixed(list(pending), PENDING_BYTES),
        "session.generator": generator.get_state(),
        "session.logits": no_logits if logits is None else logits.to(no_logits.dtype),
        "session.has_logits": torch.tensor([logits is not None]),
        "session.in_dialogue": torch.tensor([in_dialogue]),
    }


def unpack(path: str | Path, held: Mapping[str, Tensor], cache: SinkCache, vocabulary: int) -> Parked:
    """What `pack` gave. Raises DamagedSnapshot where it does not agree with itself or with the cache."""
    try:
        history = History(cache.plan)
        history.seen = int(held["session.seen"])
        history.first = _filled(held["session.first"], vocabulary)
        history.recent.extend(_filled(held["session.recent"], vocabulary))
        logits = held["session.logits"] if bool(held["session.has_logits"]) else None
        read = cache.seen[0] if cache.seen else 0
        visible = len(history.first) + len(history.recent)
        if visible != cache.plan.filled(history.seen) or len(cache.seen) > 1:
            raise InvalidInput(f"{visible} tokens are visible of {history.seen}, in {len(cache.seen)} rows")
        if read != history.seen - (logits is None and history.seen > 0):
            raise InvalidInput(f"{read} tokens were read of {history.seen}")
        if logits is not None and logits.shape != (vocabulary,):
            raise InvalidInput(f"its logits are {list(logits.shape)}")
        generator = held["session.generator"]
        torch.Generator().set_state(generator)  # or it would fail half-way through being taken up
        pending = bytes(_filled(held["session.pending"], 256))
        in_dialogue = bool(held["session.in_dialogue"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:  # InvalidInput is a ValueError
        raise DamagedSnapshot(f"{path} cannot be taken up again: no state of a session ({error})") from error
    return Parked(history, pending, generator, logits, in_dialogue)


def fixed(values: list[int], size: int) -> Tensor:
    """Whole numbers as int64 `[size]`, filled up with -1."""
    if len(values) > size:
        raise InvalidInput(f"{len(values)} numbers do not fit into {size}")
    return torch.tensor(values + [-1] * (size - len(values)), dtype=torch.int64)


def _filled(row: Tensor, below: int) -> list[int]:
    """A row that `fixed` filled up, without the filling."""
    found = [value for value in row.tolist() if value != -1]
    if not all(0 <= value < below for value in found):
        raise InvalidInput(f"a number is not in 0 to {below - 1}")
    return found
