"""Who writes on a GPU: our step, a model's own modules over our rings, and transformers, each as a count of steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from sinks.cache.plan import Plan
from sinks.errors import UnsupportedOption
from sinks.evals.speed.gpu.absent import reason
from sinks.evals.speed.gpu.clock import Burst, bursts, captured
from sinks.evals.speed.gpu.ring import ModuleSteps
from sinks.evals.speed.gpu.shapes import ceiling, ring_bytes, weight_bytes
from sinks.evals.speed.writers import Ours
from sinks.models.attach import attach
from sinks.models.families import describe
from sinks.models.load import Loaded
from sinks.models.step.blocks import why_not
from sinks.models.step.device.step import DeviceModel
from sinks.models.step.hasten import hasten
from sinks.models.step.slots import Seats

NEAR, FAR = 5_000, 10_000_000
"""Positions in a stream that has let go of most of what it read, and of nearly everything."""

SLOW = 8
"""Steps a burst of `generate()`: a call has a price of its own, and a step that a host drives is slow."""

ROOM = 8
"""Slots that transformers' cache of fixed size has beyond the keys that are there and the steps of a burst."""

READ = 65_536
"""Tokens of all rows that transformers reads in one pass before it writes."""

Run = Callable[[int], Any]


@dataclass(frozen=True)
class Writer:
    """Who writes, greedy steps of all rows; each must read `read` bytes."""

    burst: Burst
    read: int


Entrant = tuple[str, Callable[[], Writer]]
"""A writer's name, and how to bring it to the start."""


@dataclass(frozen=True)
class Decoded:
    """What one writer did: milliseconds a step by round, and what they come to."""

    model: str
    rows: int
    window: int
    writer: str
    milliseconds: tuple[float, ...]
    ceiling: float

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, from the median."""
        return 1e3 * self.rows / statistics.median(self.milliseconds)

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.tokens_per_second / self.ceiling


@dataclass(frozen=True)
class Flatness:
    """Milliseconds a step of ours, by round, at positions `NEAR` and `FAR`."""

    model: str
    rows: int
    window: int
    near: tuple[float, ...]
    far: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Late over early, median of the rounds."""
        return statistics.median(late / early for early, late in zip(self.near, self.far, strict=True))


class StaticSteps:
    """Greedy steps of transformers with its cache of fixed size, in one CUDA graph; `kept` keys to begin with.

    It attends over all its slots, the masked ones too, as `generate` with a compiled static cache does: at most `most`
    steps a burst, and so many slots more.
    """

    def __init__(self, model: PreTrainedModel, rows: int, kept: int, most: int) -> None:
        self._model, self._kept, self._most = model, kept, most
        self._cache = StaticCache(config=model.config, max_cache_len=kept + most + ROOM)
        self._ids = torch.randint(model.config.vocab_size, (rows, 1), device=model.device)
        with torch.no_grad():
            self._step()
            for layer in self._layers():
                layer.keys.normal_()
                layer.values.normal_()
            self._rewind()
            self._graph = captured(self._step)

    def run(self, steps: int) -> None:
        """Replay so many steps behind the first `kept` keys."""
        if steps > self._most:
            raise UnsupportedOption(f"{steps} steps a burst: its cache has room for {self._most}")
        self._rewind()
        for _ in range(steps):
            self._graph.replay()

    def _layers(self) -> list[Any]:
        return list(self._cache.layers)

    def _rewind(self) -> None:
        for layer in self._layers():
            layer.cumulative_length.fill_(self._kept)

    def _step(self) -> None:
        logits = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True).logits[:, -1]
        self._ids.copy_(logits.argmax(dim=-1, keepdim=True))


class Generate:
    """`generate()` as it comes: greedy, eager, a cache that keeps everything; it begins behind `kept` tokens."""

    def __init__(self, model: PreTrainedModel, rows: int, kept: int) -> None:
        self._model = model
        self._ids = torch.randint(model.config.vocab_size, (rows, kept + 1), device=model.device)
        self._cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for part in self._ids[:, :-1].split(max(1, READ // rows), dim=1):
                model.base_model(input_ids=part, past_key_values=self._cache, use_cache=True)

    def run(self, steps: int) -> None:
        """Write so many tokens behind all before."""
        settings = GenerationConfig(
            max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        generate: Any = self._model.generate
        mask = torch.ones_like(self._ids)
        self._ids = generate(self._ids, attention_mask=mask, past_key_values=self._cache, generation_config=settings)


@dataclass(frozen=True, eq=False)
class Packed:
    """A model whose weights our step reads, as they are or rounded."""

    name: str
    model: PreTrainedModel
    weights: DeviceModel


class Seated:
    """Our step over rings of `rows` streams, at any position of them."""

    def __init__(self, ours: Packed, seats: Seats, rows: int) -> None:
        model = ours.model
        self._step = ours.weights.step(seats)
        self._rows = list(range(rows))
        self._ids: Tensor = torch.randint(model.config.vocab_size, (rows,), device=model.device)
        self.stand_at(NEAR)

    def stand_at(self, position: int) -> None:
        """Make one step at `position`; what is written next comes behind it."""
        self._step(self._ids, self._rows, [position] * len(self._rows))

    def run(self, steps: int) -> None:
        """Write so many tokens."""
        self._step.run(steps)

    def run_at(self, position: int) -> Run:
        """Writing that begins at `position` each time: the first of the steps is fed by the host."""

        def run(steps: int) -> None:
            self.stand_at(position)
            self._step.run(steps - 1)

        return run


def sessions(loaded: Loaded, plan: Plan) -> Run:
    """`Session.generate` as a person calls it, sampler, text and all, once more than the window was read."""
    attach(loaded.model)
    if why_not(loaded.model) is None:
        hasten(loaded.model)
    writer = Ours("Session", loaded, plan)
    ids = torch.randint(loaded.model.config.vocab_size, (plan.capacity + 64,))
    writer.read(ids.tolist())
    return writer.write


def random_seats(model: PreTrainedModel, plan: Plan, rows: int) -> Seats:
    """Rings of random keys and values, a seat a row."""
    config: Any = model.config
    scheme = describe(model)
    rotaries = scheme.rotaries(plan.capacity)
    shape = (rows, config.num_key_value_heads, plan.capacity, config.head_dim)
    made: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    return Seats(
        rings=[(torch.randn(shape, **made), torch.randn(shape, **made)) for _ in scheme.layers],
        sizes=[(plan.sinks, plan.window)] * len(scheme.layers),
        rotaries=[None if layer.rotary is None else rotaries[layer.rotary] for layer in scheme.layers],
        start=0,
    )


def rings_of(seats: Seats) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, of rings that are not rounded."""
    return [(keys, values) for keys, values in seats.rings]


@dataclass(frozen=True, eq=False)
class Case:
    """A model under a plan with so many rows; all of ours work in one room, `seats`, claimed when the first comes."""

    name: str
    model: PreTrainedModel
    plan: Plan
    rows: int

    @cached_property
    def seats(self) -> Seats:
        """Random rings: what is in them costs no time."""
        return random_seats(self.model, self.plan, self.rows)

    def seated(self, ours: Packed) -> Seated:
        """Our step in them."""
        return Seated(ours, self.seats, self.rows)

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} row{'s' if self.rows > 1 else ''}, window {self.plan.window:,}"


def entrants(case: Case, ours: Sequence[Packed], steps: int) -> Iterator[Entrant]:
    """Everybody by name, and how to bring them to the start; a burst is `steps` at most."""
    model, plan, rows = case.model, case.plan, case.rows
    rings = ring_bytes(model, plan, rows)

    def writer(one: Packed) -> Writer:
        return Writer(Burst(case.seated(one).run, steps), weight_bytes(one.model) + rings)

    for one in ours:
        yield one.name, partial(writer, one)
    read = weight_bytes(model) + rings

    def modules() -> Writer:
        return Writer(Burst(ModuleSteps(model, plan, rows, NEAR, rings_of(case.seats)).run, steps), read)

    def static() -> Writer:
        return Writer(Burst(StaticSteps(model, rows, plan.capacity, steps).run, steps), read)

    def generate() -> Writer:
        return Writer(Burst(Generate(model, rows, plan.capacity).run, SLOW, SLOW), read)

    yield "its modules over our rings, one graph", modules
    yield "transformers, one graph", static
    yield "transformers generate()", generate


def decode(case: Case, writers: Mapping[str, Writer], rate: float, rounds: int, absent: list[str]) -> list[Decoded]:
    """Let the writers take turns; `rate` is the copy rate in TB/s, `absent` is told who failed on the way."""
    rows, window = case.rows, case.plan.window
    lost: dict[str, Exception] = {}
    times = bursts({who: each.burst for who, each in writers.items()}, rounds, lost)
    absent += [f"{who} on {case}: {reason(error)}" for who, error in lost.items()]
    most = {who: ceiling(each.read, rows, rate) for who, each in writers.items()}
    return [Decoded(case.name, rows, window, who, tuple(each), most[who]) for who, each in times.items()]


def flatness(case: Case, ours: Packed, steps: int, rounds: int) -> Flatness:
    """Our step early and late in the stream, in turn."""
    seated = case.seated(ours)
    times = bursts({"near": Burst(seated.run_at(NEAR), steps), "far": Burst(seated.run_at(FAR), steps)}, rounds)
    return Flatness(case.name, case.rows, case.plan.window, tuple(times["near"]), tuple(times["far"]))
