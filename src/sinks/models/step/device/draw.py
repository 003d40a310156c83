"""How the rows of a step choose their next tokens: the settings of every seat, on the device, and the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.kernels.device.language import on
from sinks.models.step.device.linear import chained, power
from sinks.models.step.device.sample import choose, measure, penalise, race, verify

PLACES = 64
"""Where programs of the output head leave their best, and the most chunks of a vocabulary: one would be fought for."""

HISTORY = 1024
"""The newest tokens that are held for penalties."""

BIASES = 512
"""Tokens that may be biased."""

CHUNK = 4096
GROUPS = 16
FEW = 2048
"""Logits that count as few: they are looked at in one go."""

NOBODY = -(2**63)
"""Less than any packed logit."""

REALS, WHOLES = 8, 8


@dataclass(frozen=True)
class Drawing:
    """How one stream's next tokens are chosen, as `Sampling` of sinks.stream says it; temperature 0: the likeliest.

    `top_k` 0 keeps all. `lookback` newest tokens are penalised, `history` are those of them that are read by now, the
    newest last, which is not among them where it is still to be fed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    lookback: int = 0
    seed: int = 0
    bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    @property
    def reals(self) -> list[float]:
        """The row of the table of the same name."""
        own = [self.temperature, self.top_p, self.min_p, self.repetition_penalty, self.presence_penalty]
        return own + [0.0] * (REALS - len(own))

    def wholes(self, vocab: int) -> list[int]:
        """The row of the table of the same name."""
        top_k = self.top_k if self.top_k < vocab else 0
        return [top_k, self.lookback, len(self.bias), self.seed] + [0] * (WHOLES - 4)


class Draws:
    """Settings of so many seats, and what kernels hand each other for so many rows of `vocab` logits."""

    def __init__(self, seats: int, rows: int, vocab: int, device: torch.device) -> None:
        def room(*shape: int, dtype: torch.dtype = torch.float32, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.vocab, self.device = vocab, device
        self.chunk = max(CHUNK, power(-(-vocab // PLACES)))
        self.reals, self.wholes = room(seats, REALS), room(seats, WHOLES, dtype=torch.int64)
        self.recent = room(seats, HISTORY, dtype=torch.int32)
        self.biased, self.bias = room(seats, BIASES, dtype=torch.int32), room(seats, BIASES)
        self.newest = room(seats, dtype=torch.int64, value=-1)
        self.measured = room(rows, PLACES, dtype=torch.int64, value=NOBODY)
        self.parts, self.tops = room(5, rows, PLACES), room(rows, PLACES, GROUPS)
        self.keys, self.found = room(rows, vocab), room(rows, 2, FEW)
        self.kept = room(rows, HISTORY + BIASES)
        self.told = room(2, rows, dtype=torch.int64)

    def install(
        self, seats: Sequence[int], drawings: Sequence[Drawing], histories: Sequence[Sequence[int]],
        positions: Sequence[int],
    ) -> None:  # fmt: skip
        """From now on these seats draw so. `histories[i]`: the tokens before position `positions[i]`, newest last."""
        with on(self.device):
            places = self._sent(torch.tensor(seats))
            self.reals.index_copy_(0, places, self._sent(torch.tensor([each.reals for each in drawings])))
            wholes = torch.tensor([each.wholes(self.vocab) for each in drawings])
            self.wholes.index_copy_(0, places, self._sent(wholes))
            for seat, drawing, history, position in zip(seats, drawings, histories, positions, strict=True):
                if drawing.lookback:
                    self.recent[seat].copy_(self._sent(_ring(history, position)), non_blocking=True)
                if drawing.bias:
                    here = slice(len(drawing.bias))
                    tokens, values = torch.tensor(list(drawing.bias)), torch.tensor(list(drawing.bias.values()))
                    self.biased[seat, here].copy_(self._sent(tokens.int()), non_blocking=True)
                    self.bias[seat, here].copy_(self._sent(values.float()), non_blocking=True)

    def _sent(self, values: Tensor) -> Tensor:
        """On the device, without waiting for what it has still to do."""
        if self.device.type != "cuda":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def launch(
        self, logits: Float[Tensor, "more vocab"], control: Int[Tensor, "3 rows"], best: Tensor | None, pdl: int = 0
    ) -> None:
        """Choose for all rows: `control` is ids, seats, positions of the tokens that were fed, and is moved on.

        `best` `[rows, PLACES]` are the packed best of the logits, if they are known; it is emptied.
        """
        ids, rows, positions = control
        count, chunks = control.shape[1], -(-self.vocab // self.chunk)
        where, tables = (rows, positions), (self.reals, self.wholes)
        shape = {"CHUNK": self.chunk, "PLACES": PLACES, **chained(pdl)}
        known, vocab = best is not None, self.vocab
        kept = {"HISTORY": HISTORY, "BIASES": BIASES}
        with on(self.device):
            penalise[(count,)](
                logits, ids, *where, *tables, self.recent, self.biased, self.bias, self.kept, vocab, **kept,
                **chained(pdl),
            )  # fmt: skip
            measure[(count, chunks)](
                logits, *where, *tables, self.measured, self.tops, vocab, KNOWN=known, GROUPS=GROUPS, **shape
            )
            race[(count, chunks)](logits, *where, *tables, self.measured, self.parts, self.keys, vocab, **shape)
            verify[(count, chunks)](logits, *where, *tables, self.measured, self.parts, vocab, **shape)
            choose[(count,)](
                self.measured if best is None else best, logits, ids, *where, *tables, self.recent, self.biased,
                self.kept, self.measured, self.parts, self.keys, self.found, self.tops, self.newest, self.told, vocab,
                KNOWN=known, GROUPS=GROUPS, BLOCK=8192, FEW=FEW, num_warps=8, **kept, **shape,
            )  # fmt: skip


def _ring(history: Sequence[int], position: int) -> Tensor:
    """The tokens before `position` in their places."""
    recent = list(history[-HISTORY:])
    made = torch.full((HISTORY,), -1, dtype=torch.int32)
    if recent:
        made[torch.arange(position - len(recent), position) % HISTORY] = torch.tensor(recent, dtype=torch.int32)
    return made
