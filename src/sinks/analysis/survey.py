"""`survey`: every measure over texts, as one value that can be saved, drawn and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sinks.analysis.entropy import Entropy
from sinks.analysis.interventions import Interventions
from sinks.analysis.massive import Massive
from sinks.analysis.mixing import Mixing
from sinks.analysis.repetition import Repetition
from sinks.analysis.semantics import Semantics
from sinks.analysis.sink_rate import SinkRates
from sinks.reading.advice import Advice


@dataclass(frozen=True)
class Finding:
    """One thing that the survey found by itself: a headline, the sentence with its numbers, and how it was decided."""

    title: str
    text: str
    rule: str


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found in one model. A part that was not asked for, or does not exist for this kind of model, is None
    with its reason in `left_out`.

    `about`: model, source, text, versions, machine, settings. `massive` has one entry without BOS and one with it,
    where the model has a BOS. `seconds` by stage.
    """

    about: Mapping[str, Any]
    sink_rates: SinkRates | None
    massive: Mapping[str, Massive]
    entropy: Entropy | None
    mixing: Mixing | None
    semantics: Semantics | None
    repetition: Repetition | None
    interventions: Interventions | None
    advice: Advice | None
    findings: tuple[Finding, ...]
    left_out: Mapping[str, str]
    seconds: Mapping[str, float]
