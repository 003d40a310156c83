"""Does a sink acquire meaning? Linear probes and retrieval from what a sink carries, against controls."""

from __future__ import annotations

from dataclasses import dataclass

from sinks.analysis.estimate import Estimate


@dataclass(frozen=True)
class Reading:
    """How well one source tells which of `classes` texts (or kinds of text) it was taken from.

    `source`: "sink", "other token", ...; `carrier`: "value" or "residual"; `prefix`: how the sink was made ("text",
    "BOS", "4 x BOS", "null embedding"); `where`: "prompt" or "stream". `accuracy` is of a linear probe on held-out
    passages, `shuffled` that of the same probe trained on shuffled labels, `retrieval` the share of passages whose
    nearest other one by cosine is of the same class, `chance` = 1 / classes.
    """

    source: str
    carrier: str
    prefix: str
    where: str
    classes: int
    accuracy: Estimate
    shuffled: Estimate
    retrieval: Estimate
    chance: float


@dataclass(frozen=True, eq=False)
class Semantics:
    """All readings, and the verdict: yes or no, with the size of the effect."""

    readings: tuple[Reading, ...]
    meaningful: bool
    verdict: str
