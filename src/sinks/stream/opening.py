"""What a session begins with: a model, and sizes, which a short reading may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sinks.assets.texts import read_text
from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW
from sinks.errors import InvalidInput
from sinks.models.attach import attach
from sinks.models.families import describe
from sinks.models.load import Loaded, load
from sinks.models.step.device.weights import why_no_device_step
from sinks.models.step.hasten import hasten, is_hastened, steps_of
from sinks.reading.advice import Advice, AdviceSettings, advise
from sinks.reading.tokens import stream_ids
from sinks.stream.chat import Dialogue

Sinks = int | Literal["auto"]

COUNTS = (0, 1, 2, 4, 8)
CAPACITIES = (128, 256, 512)
COMPARED = 512
"""Tokens compared after the longest window has overflowed: enough to tell windows apart by 5 %."""


@dataclass(frozen=True)
class Sizes:
    """How many sinks and how long a window, and the advice that chose them, if it was asked."""

    sinks: int
    window: int
    advice: Advice | None = None


def loaded_from(model: Loaded | str | Path | None, options: Mapping[str, Any]) -> Loaded:
    """The model by name (None: the built-in one) as `load` gives it with `options`, or as it was loaded; `ready`."""
    if isinstance(model, Loaded) and options:
        raise InvalidInput(f"{', '.join(options)}: this model is loaded already: give them to load() instead")
    if not (model is None or isinstance(model, Loaded | str | Path)):
        raise _no_model(model)
    return ready(model if isinstance(model, Loaded) else load(model, **options))


def _no_model(given: object) -> InvalidInput:
    return InvalidInput(
        f"{type(given).__name__}: give a model's name, its folder, or what load() gave; a transformers model of your "
        "own streams with attach() and SinkCache, or as Loaded(model, tokenizer, source)"
    )


def ready(loaded: Loaded) -> Loaded:
    """The same model, attached; on a GPU its decode steps are hastened where they can be, and the source says so."""
    if not isinstance(loaded, Loaded):
        raise _no_model(loaded)
    model = attach(loaded.model)
    if model.device.type != "cuda":
        return loaded
    if not is_hastened(model) and why_no_device_step(model) is None:
        hasten(model)
    if steps_of(model) in loaded.source.note:
        return loaded
    notes = [note for note in (loaded.source.note, steps_of(model)) if note]
    return replace(loaded, source=replace(loaded.source, note="; ".join(notes)))


def pinned(loaded: Loaded, system: str | None, pin: str | None) -> int:
    """How many first tokens must be sinks for what is pinned to stay; checks the template where one will be needed."""
    if pin not in (None, "system"):
        raise InvalidInput(f'pin={pin!r}: only the system prompt can be pinned: give pin="system"')
    if system is None and pin is None:
        return 0
    dialogue = Dialogue(loaded.tokenizer, system, loaded.source.name)
    return 0 if pin is None else dialogue.pinned


def sizes_for(loaded: Loaded, sinks: Sinks, window: int | None, text: str | None) -> Sizes:
    """The sizes as given, with what is "auto" or None filled in."""
    if sinks != "auto":
        if isinstance(sinks, str):
            raise InvalidInput(f'sinks={sinks!r}: give a whole number, or "auto"')
        if text is not None:
            raise InvalidInput('advice_text is read only where sinks="auto"')
        return Sizes(sinks, DEFAULT_WINDOW if window is None else window)
    advice = advised(loaded, window, read_text().text if text is None else text)
    return Sizes(advice.sinks, advice.window if window is None else window, advice)


def advised(loaded: Loaded, window: int | None, text: str) -> Advice:
    """Advice from a short reading of `text`: tens of seconds on a CPU.

    With a `window` given, only sinks are chosen, at that many keys, or at 256 where it is longer: whether the first
    tokens are missed does not depend on how long the window behind them is.
    """
    trained = describe(loaded.model).trained_length
    capacities = [each for each in CAPACITIES if trained is None or each <= trained] or [trained or CAPACITIES[0]]
    if window is not None:
        capacities = [min(window + DEFAULT_SINKS, 256, trained or 256)]
    capacity = sorted(capacities)[len(capacities) // 2]
    settings = AdviceSettings(
        capacity=capacity,
        counts=tuple(count for count in COUNTS if count < min(capacities)),
        capacities=tuple(capacities),
        tokens=max(capacities) + 1 + COMPARED,
    )
    # Tokenizing a little more than is read is enough, and a book takes seconds.
    ids, _ = stream_ids(loaded.tokenizer, text[: 16 * settings.tokens])
    return advise(loaded.model, torch.tensor(ids), settings)


def ends_of(loaded: Loaded) -> frozenset[int]:
    """The tokens that end an answer: those of the generation settings and the tokenizer's own."""
    settings: Any = loaded.model.generation_config
    ends = getattr(settings, "eos_token_id", None)
    found = {*(ends if isinstance(ends, list | tuple) else [ends])}
    own: Any = loaded.tokenizer.eos_token_id
    return frozenset(token for token in [*found, own] if isinstance(token, int))
