"""Brings the writers to the start: the same model as everybody takes it, and a line for each who cannot come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sinks.assets.catalogue import DEFAULT_MODEL, find_model
from sinks.assets.fetch import fetch_model
from sinks.errors import SinksError, UnsupportedOption
from sinks.evals.speed.measure import Bench, Cost, surprises
from sinks.evals.speed.writers import LlamaCpp, Ours, Transformers, Writer
from sinks.models.attach import attach
from sinks.models.families import describe
from sinks.models.load import Loaded, Source, load, quantized
from sinks.models.step.blocks import why_not
from sinks.models.step.hasten import hasten, steps_of
from sinks.reading.tokens import stream_ids
from sinks.types import Stage

OURS = {"none": "sinks, float32", "int8": "sinks, int8", "int4": "sinks, int4"}
"""Our writers by quantisation."""


@dataclass(frozen=True, eq=False)
class Entrants:
    """Who takes part; `absent` says in a line each who does not, `notes` what was done to whose weights."""

    source: Source
    ids: list[int]
    writers: list[Writer]
    absent: list[str]
    costs: dict[str, Cost]
    notes: dict[str, str]


def gather(name: str | None, text: str, bench: Bench, *, accept_terms: bool, stage: Stage) -> Entrants:
    """Load the model once for each writer, and read `bench.scored` tokens of `text` to see what rounding costs.

    Raises what `load`, `attach` and `SinkCache.for_model` raise; that a model cannot be quantised, or that a peer is
    not there, raises nothing and is said in `absent`.
    """
    plain = load(name, accept_terms=accept_terms)
    ids, _ = stream_ids(plain.tokenizer, text[: 16 * max(bench.levels[-1], bench.scored + 1)])
    made = Entrants(plain.source, ids, [], [], {}, {})
    scored = torch.tensor(ids[: bench.scored + 1])
    listen = stage("perplexity", 3)
    exact = load(name, accept_terms=accept_terms)
    attach(exact.model)
    nll = surprises(exact.model, scored, bench.plan)
    listen(1)
    _enter(made, "none", _hastened(exact), bench)
    for quant in ("int8", "int4"):
        try:
            rounded = quantized(load(name, accept_terms=accept_terms), quant)
        except SinksError as error:
            made.absent.append(f"{OURS[quant]}: {error}")
            continue
        attach(rounded.model)
        made.costs[OURS[quant]] = Cost(nll, surprises(rounded.model, scored, bench.plan))
        listen(1)
        _enter(made, quant, rounded, bench)
    _enter_peers(made, plain, name, bench, accept_terms)
    return made


def _hastened(loaded: Loaded) -> Loaded:
    if why_not(loaded.model) is None:
        hasten(loaded.model)
    return loaded


def _enter(made: Entrants, quant: str, loaded: Loaded, bench: Bench) -> None:
    said = [loaded.source.note, steps_of(loaded.model)] if quant == "none" else [loaded.source.note]
    made.notes[OURS[quant]] = "; ".join(filter(None, said))
    made.writers.append(Ours(OURS[quant], loaded, bench.plan))


def _enter_peers(made: Entrants, plain: Loaded, name: str | None, bench: Bench, accept_terms: bool) -> None:
    trained, needed = describe(plain.model).trained_length, bench.levels[-1] + bench.written
    if trained is None or needed <= trained:
        made.writers.append(Transformers(plain.model))
    else:
        made.absent.append(f"transformers: it would keep {needed:,} tokens, and this model was trained on {trained:,}")
    try:
        gguf = gguf_of(plain.source, name, accept_terms)
        made.writers.append(LlamaCpp(gguf, bench.plan.capacity, torch.get_num_threads()))
    except SinksError as error:
        made.absent.append(str(error))


def gguf_of(source: Source, name: str | None, accept_terms: bool) -> Path:
    """The GGUF file that a model was read from. Raises UnsupportedOption where there is none."""
    asset = find_model(name or DEFAULT_MODEL)
    if asset is not None:
        return fetch_model(asset, accept_terms=accept_terms)
    if source.kind == "gguf":
        return Path(source.name)
    raise UnsupportedOption("llama.cpp: it reads GGUF files, and this model is none")
