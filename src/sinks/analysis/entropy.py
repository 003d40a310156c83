"""Attention entropy by layer, head and position; and what kind of head each one is, by a stated rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

KINDS = ("sink", "previous", "local", "induction", "uniform", "mixed")


@dataclass(frozen=True, eq=False)
class Profile:
    """Entropy of attention (nats) under one way of reading.

    `ends` are the positions at which bins end. `normalised` divides by the log of how many keys a query sees (queries
    that see one key are left out); `without_sink` is the entropy of what is left once the sink keys are taken out and
    the rest is renormalised: sinks lower the entropy of a healthy head.
    """

    name: str
    ends: Int[np.ndarray, " bins"]
    entropy: Float[np.ndarray, "layers heads bins"]
    normalised: Float[np.ndarray, "layers heads bins"]
    without_sink: Float[np.ndarray, "layers heads bins"]
    sink_mass: Float[np.ndarray, "layers heads bins"]


@dataclass(frozen=True, eq=False)
class Heads:
    """What each head does: the measures, and the kind that follows from them (`KINDS`, by index)."""

    kind: Int[np.ndarray, "layers heads"]
    sink_mass: Float[np.ndarray, "layers heads"]
    previous_mass: Float[np.ndarray, "layers heads"]
    local_mass: Float[np.ndarray, "layers heads"]
    induction_mass: Float[np.ndarray, "layers heads"]
    normalised_entropy: Float[np.ndarray, "layers heads"]
    mean_distance: Float[np.ndarray, "layers heads"]


@dataclass(frozen=True)
class Folklore:
    """The saying that entropy along a stream has a spike at the start, a plateau, and a cliff when the first token is
    let go: each part as a number, and whether it holds, by the stated rule."""

    claim: str
    measured: float
    low: float
    high: float
    holds: bool
    rule: str


@dataclass(frozen=True, eq=False)
class Entropy:
    """Profiles of dense attention, of a stream with sinks and of a plain window; the heads; the folklore."""

    profiles: tuple[Profile, ...]
    heads: Heads
    folklore: tuple[Folklore, ...]
