"""How the rows of a step choose their next tokens: the settings of every seat, and the kernels in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.kernels.device.language import on
from sinks.models.step.device.choice.penalties import penalise
from sinks.models.step.device.choice.race import measure, race, race_again, verify
from sinks.models.step.device.choice.search import choose, choose_best
from sinks.models.step.device.linear import chained, power

PLACES = 64
"""Where programs of the output head leave their best, and the most chunks of a vocabulary: one would be fought for."""

HISTORY = 1024
"""The newest tokens that are held for penalties."""

BIASES = 512
"""Tokens that may be biased."""

CHUNK = 4096
"""Logits of a program, or more where a vocabulary has too many."""

GROUP = 64
"""Logits side by side, of which the largest is known to a row that has a top-k."""

FEW = 128
"""A top-k up to this is found in so many groups at most, which fit into registers."""

NOBODY = -(2**63)
"""Less than any packed logit."""

REALS, WHOLES = 8, 8


@dataclass(frozen=True)
class Drawing:
    """How one stream's next tokens are chosen, as `Sampling` of sinks.stream says it; temperature 0: the likeliest.

    `top_k` 0 keeps all; the two penalties look at the `lookback` newest tokens.
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
    def is_plain(self) -> bool:
        """Whether this is the likeliest token of the logits as they are."""
        return self.temperature == 0 and not self.lookback and not self.bias

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
        self.parts, self.tops = room(2, 5, rows, PLACES), room(rows, PLACES, self.chunk // GROUP)
        self.listed, self.kept = room(rows, FEW, dtype=torch.int32), room(rows, HISTORY + BIASES)
        self.told = room(2, rows, dtype=torch.int64)
        self._busy = set[int]()

    def install(
        self, seats: Sequence[int], drawings: Sequence[Drawing], histories: Sequence[Sequence[int]],
        positions: Sequence[int],
    ) -> None:  # fmt: skip
        """From now on these seats choose so. `histories[i]`: the tokens before position `positions[i]`, newest last."""
        for seat, drawing in zip(seats, drawings, strict=True):
            (self._busy.discard if drawing.is_plain else self._busy.add)(seat)
        sent = partial(on_device, device=self.device)
        with on(self.device):
            places = sent(torch.tensor(seats))
            self.reals.index_copy_(0, places, sent(torch.tensor([each.reals for each in drawings])))
            wholes = torch.tensor([each.wholes(self.vocab) for each in drawings])
            self.wholes.index_copy_(0, places, sent(wholes))
            for seat, drawing, history, position in zip(seats, drawings, histories, positions, strict=True):
                if drawing.lookback:
                    self.recent[seat].copy_(sent(_ring(history, position)), non_blocking=True)
                if drawing.bias:
                    here = slice(len(drawing.bias))
                    tokens, values = torch.tensor(list(drawing.bias)), torch.tensor(list(drawing.bias.values()))
                    self.biased[seat, here].copy_(sent(tokens.int()), non_blocking=True)
                    self.bias[seat, here].copy_(sent(values.float()), non_blocking=True)

    def are_plain(self, seats: Iterable[int]) -> bool:
        """Whether all of these take the likeliest token of the logits as they are."""
        return self._busy.isdisjoint(seats)

    def launch_best(self, control: Int[Tensor, "3 rows"], best: Tensor, pdl: int = 0) -> None:
        """As `launch`, for seats that are plain."""
        ids, rows, positions = control
        with on(self.device):
            choose_best[(control.shape[1],)](
                best, ids, rows, positions, self.newest, self.told, PLACES=PLACES, num_warps=1, **chained(pdl)
            )

    def launch(
        self, logits: Float[Tensor, "more vocab"], control: Int[Tensor, "3 rows"], best: Tensor | None, pdl: int = 0
    ) -> None:
        """Choose for all rows: `control` is ids, seats, positions of the tokens that were fed, and is moved on.

        `best` `[rows, PLACES]` are the packed best of the logits, if they are known; it is emptied.
        """
        ids, rows, positions = control
        grid = (control.shape[1], -(-self.vocab // self.chunk))
        where, vocab, known = (rows, positions, self.reals, self.wholes), self.vocab, best is not None
        shape = {"CHUNK": self.chunk, "PLACES": PLACES, **chained(pdl)}
        kept, found = {"HISTORY": HISTORY, "BIASES": BIASES}, (logits, *where, self.measured, self.parts, vocab)
        with on(self.device):
            penalise[grid[:1]](
                logits, ids, *where, self.recent, self.biased, self.bias, self.kept, vocab, **kept, **chained(pdl)
            )
            measure[grid](logits, *where, self.measured, self.tops, vocab, KNOWN=known, GROUP=GROUP, **shape)
            race[grid](*found, FEW=FEW, **shape)
            verify[grid](*found, SECOND=False, FEW=FEW, **shape)
            race_again[grid](*found, FEW=FEW, **shape)
            verify[grid](*found, SECOND=True, FEW=FEW, **shape)
            choose[grid[:1]](
                self.measured if best is None else best, logits, ids, *where, self.recent, self.biased, self.kept,
                self.measured, self.parts, self.tops, self.listed, self.newest, self.told, vocab, KNOWN=known,
                GROUP=GROUP, BLOCK=8192, FEW=FEW, num_warps=16, **kept, **shape,
            )  # fmt: skip


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Small tensors of the host on the device, without waiting for what a GPU has still to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _ring(history: Sequence[int], position: int) -> Tensor:
    """The tokens before `position` in their places."""
    recent = list(history[-HISTORY:])
    made = torch.full((HISTORY,), -1, dtype=torch.int32)
    if recent:
        made[torch.arange(position - len(recent), position) % HISTORY] = torch.tensor(recent, dtype=torch.int32)
    return made
