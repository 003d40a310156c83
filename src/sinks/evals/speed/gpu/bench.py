"""The whole of `sinks bench gpu`: ceilings, attention, decoding, one after the other on one GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from transformers import PreTrainedModel

from sinks.assets.catalogue import DEFAULT_MODEL
from sinks.cache.plan import Plan
from sinks.errors import InvalidInput, SinksError
from sinks.evals.speed.gpu.absent import reason
from sinks.evals.speed.gpu.band import Attended, Statistics, Text, attended, statistics_cost
from sinks.evals.speed.gpu.clock import Burst, copy_rate, need_gpu, product_rate
from sinks.evals.speed.gpu.decode import (
    FAR,
    Case,
    Decoded,
    Entrant,
    Flatness,
    Packed,
    Writer,
    decode,
    entrants,
    flatness,
    sessions,
)
from sinks.evals.speed.gpu.shapes import SHAPES, ring_bytes, weight_bytes
from sinks.models.load import Loaded, load
from sinks.models.step.device.step import DeviceModel
from sinks.models.weights.quantize import QUANTS, Quant, quantize
from sinks.types import Stage, unwatched

PARTS = ("decode", "attention")
OURS = "sinks"
BUILT_IN = f"{DEFAULT_MODEL} (built in)"


@dataclass(frozen=True)
class GpuBench:
    """What is measured: `models` name shapes, and the built-in model comes last where it is here.

    Weights rounded as `quants` say take part under the first plan. A decode burst is `steps` tokens at most; `rounds`
    of them, and of every call of attention, are timed.
    """

    models: tuple[str, ...] = tuple(SHAPES)
    rows: tuple[int, ...] = (1, 8, 64, 256)
    plans: tuple[Plan, ...] = (Plan(4, 1020), Plan(4, 4092))
    steps: int = 64
    rounds: int = 9
    texts: tuple[Text, ...] = (Text(16_384, 1_020, 128), Text(65_536, 4_092, 128), Text(16_384, 1_020, 64))
    watched: tuple[Text, ...] = (Text(131_072, 1_020, 128), Text(131_072, 1_020, 64))
    quants: tuple[Quant, ...] = QUANTS
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise InvalidInput(f"{', '.join(unknown)}: there is no such part: choose of {', '.join(PARTS)}")


QUICK = GpuBench(
    models=("SmolLM2-135M", "Llama-3.2-1B"), rows=(1, 64), plans=(Plan(4, 1020),), steps=32, rounds=5,
    texts=(Text(16_384, 1_020, 128),), watched=(Text(131_072, 1_020, 128),), quants=("none",),
)  # fmt: skip


@dataclass(eq=False)
class Measured:
    """Everything that was found; `absent` says in a line each who or what could not be measured, and why."""

    copy_rate: float
    product_rate: float
    decoded: list[Decoded] = field(default_factory=list)
    flat: list[Flatness] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    whole: bool = False
    """Whether that is all, and not what was found so far."""


Keep = Callable[[Measured], object]
"""What to do with what was found so far: a bench takes minutes, and may be stopped."""


def measure(bench: GpuBench, stage: Stage = unwatched, keep: Keep = lambda found: None) -> Measured:
    """Measure what `bench` says on the GPU of this process; `keep` sees it grow, a case or a text at a time.

    Raises InvalidInput where there is no GPU.
    """
    need_gpu("bench gpu")
    found = Measured(copy_rate(), product_rate())
    if "attention" in bench.parts:
        listen = stage("attention", len(bench.texts) + len(bench.watched))
        for text in bench.texts:
            found.attended += attended(text, bench.rounds, found.absent)
            _clear()
            keep(found)
            listen(1)
        for text in bench.watched:
            try:
                found.statistics.append(statistics_cost(text, bench.rounds))
            except (SinksError, torch.cuda.OutOfMemoryError) as error:
                found.absent.append(f"statistics at {text.tokens:,} tokens: {error}")
            _clear()
            keep(found)
            listen(1)
    if "decode" in bench.parts:
        for candidate in candidates(bench, found.absent):
            _decode(candidate, bench, found, stage, keep)
            _clear()
    found.absent, found.whole = list(dict.fromkeys(found.absent)), True
    keep(found)
    return found


@dataclass(frozen=True)
class Candidate:
    """A model to be decoded: `build` makes it on the GPU; `load` gives it with its tokenizer, where it has one."""

    name: str
    build: Callable[[], PreTrainedModel]
    load: Callable[[], Loaded] | None = None


def candidates(bench: GpuBench, absent: list[str]) -> Iterator[Candidate]:
    """The shapes with random weights, and the built-in model as it is, if it can be had."""
    for name in bench.models:
        yield Candidate(f"{name} shape", SHAPES[name].build)
    fetched = partial(load, dtype="bfloat16", device="cuda")
    try:
        fetched()
    except SinksError as error:
        absent.append(f"{BUILT_IN}: {error}")
    else:
        yield Candidate(BUILT_IN, lambda: fetched().model, fetched)


def _decode(candidate: Candidate, bench: GpuBench, found: Measured, stage: Stage, keep: Keep) -> None:
    name, cases = candidate.name, list(product(bench.plans, bench.rows))
    listen = stage(name, len(cases))
    try:
        model = candidate.build()
    except (SinksError, torch.cuda.OutOfMemoryError) as error:
        found.absent.append(f"{name}: {error}")
        return
    ours = list(_packed(candidate, model, bench.quants, found.absent))
    for plan, rows in cases:
        if plan != bench.plans[0]:
            del ours[1:]
        _case(Case(name, model, plan, rows), ours, candidate, bench, found)
        _clear()
        keep(found)
        listen(1)


def _case(case: Case, ours: Sequence[Packed], candidate: Candidate, bench: GpuBench, found: Measured) -> None:
    everybody = [*entrants(case, ours, bench.steps)]
    if candidate.load is not None and case.rows == 1:
        everybody.append(("sinks Session", partial(_session, candidate.load, case.plan, bench.steps)))
    ready = _ready(case, everybody, found.absent)
    times = decode(case, ready, found.copy_rate, bench.rounds, found.absent)
    found.decoded += times
    if OURS in {each.writer for each in times}:
        try:
            found.flat.append(flatness(case, ours[0], bench.steps, bench.rounds))
        except Exception as error:
            found.absent.append(f"position {FAR:,} on {case}: {reason(error)}")


def _session(load: Callable[[], Loaded], plan: Plan, steps: int) -> Writer:
    loaded = load()
    read = weight_bytes(loaded.model) + ring_bytes(loaded.model, plan, 1)
    return Writer(Burst(sessions(loaded, plan), steps), read)


def _packed(
    candidate: Candidate, whole: PreTrainedModel, quants: Sequence[Quant], absent: list[str]
) -> Iterator[Packed]:
    """Our weights: the model's own, and rounded from a model of their own."""
    for quant in quants:
        name = OURS if quant == "none" else f"{OURS}, {quant}"
        try:
            model = whole if quant == "none" else quantize(candidate.build(), quant)
            yield Packed(name, model, DeviceModel(model))
        except (SinksError, torch.cuda.OutOfMemoryError) as error:
            absent.append(f"{name} on {candidate.name}: {error}")


def _ready(case: Case, everybody: Iterable[Entrant], absent: list[str]) -> dict[str, Writer]:
    """Those who come to the start: whoever fails there is absent, with the reason."""
    ready: dict[str, Writer] = {}
    for who, prepare in everybody:
        try:
            ready[who] = prepare()
            ready[who].burst.run(2)
        except Exception as error:
            ready.pop(who, None)
            absent.append(f"{who} on {case}: {reason(error)}")
    return ready


def _clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()
