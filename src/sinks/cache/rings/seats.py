"""The rings of a cache laid open for a captured step, where they are as `Seats` asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinks.cache.rings.ring import Ring
from sinks.kernels.phase import Rotary
from sinks.models.step.slots import Seats


@dataclass(frozen=True, eq=False)
class Seat:
    """One seat of a pool: its number, what a captured step takes (None where `reason` says why not), the way out."""

    number: int
    seats: Seats | None
    reason: str | None
    give_back: Callable[[], object]


def why_not_open(rings: Sequence[Ring], parts: Iterable[Sequence[Tensor]], slopes: Tensor | None) -> str | None:
    """What keeps these rings, which hold `parts` layer by layer, from being laid open; None if nothing does."""
    if slopes is not None:
        return "its scores are biased by distance (ALiBi), and nothing is turned"
    tensors = list(parts)
    if len({part.device for layer in tensors for part in layer}) > 1:
        return "its layers are on several devices"
    if len({next(part.dtype for part in layer if part.dtype != torch.int8) for layer in tensors}) > 1:
        return "its layers keep several data types"
    for ring, layer in zip(rings, tensors, strict=True):
        keys, values = layer[: len(layer) // 2], layer[len(layer) // 2 :]
        if any(one.shape != other.shape for one, other in zip(keys, values, strict=True)):
            return "its keys and values have different widths"
        if not all(part.is_contiguous() for part in layer):
            return f"the tensors of {type(ring).__name__} are not contiguous"
    return None


def laid_open(
    rings: Sequence[Ring], parts: Iterable[Sequence[Tensor]], rotaries: Sequence[Rotary | None], start: int
) -> Seats:
    """The seats whose tensors are `parts`; see `why_not_open`."""
    return Seats(
        rings=[tuple(layer) for layer in parts],
        sizes=[(ring.plan.sinks, ring.plan.window) for ring in rings],
        rotaries=list(rotaries),
        start=start,
    )
