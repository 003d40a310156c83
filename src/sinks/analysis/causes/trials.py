"""Which edits are tried, each beside its matched control: the plan of `interventions`. Means come from other texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.causes.edits import (
    add_keys,
    bias_scores,
    inserted,
    moved,
    null_embeddings,
    replaced,
    scale_attention,
    set_residual,
    shift_sink_logits,
    sink_logits_of,
    without,
)
from sinks.analysis.inputs import MOVED_TO, alike
from sinks.analysis.probe import Residual, probe
from sinks.kernels.lens import Arrival
from sinks.models.families import base_of

FIRST = 4
"""How many first tokens are replaced, and how many times BOS is said."""


@dataclass(frozen=True)
class Spot:
    """Where the massive activation is edited: a depth (b + 1 leaves block b), a position and some dims."""

    depth: int
    position: int
    dims: tuple[int, ...]

    def __str__(self) -> str:
        """In words, dims left out."""
        return f"token {self.position} " + (f"after block {self.depth - 1}" if self.depth else "before block 0")


@dataclass(frozen=True, eq=False)
class Known:
    """What other texts say: means of the residual stream by depth, at the sink and elsewhere, and of keys by layer.

    `start` and `size` (of magnitudes) are at the sink; `rest` is over all other tokens. `keys` `[kv_heads, head_dim]`
    leave the sink out.
    """

    start: Float[Tensor, "depths width"]
    size: Float[Tensor, "depths width"]
    rest: Float[Tensor, "depths width"]
    keys: Mapping[int, Tensor]
    values: Mapping[int, int]

    def spot(self, position: int, count: int = 2) -> Spot:
        """The `count` largest dims at the first depth where the largest is at least half of what it ever becomes."""
        largest = self.size.amax(dim=1)
        depth = int((largest >= largest.max() / 2).nonzero()[0])
        return Spot(depth, position, tuple(self.size[depth].topk(count).indices.tolist()))


@torch.inference_mode()
def known(model: PreTrainedModel, ids: Int[Tensor, "texts tokens"], sink: int, batch: int) -> Known:
    """Read `ids`, and keep the means that edits need."""
    sums: dict[tuple[str, int], Tensor] = {}
    values: dict[int, int] = {}

    def keep(what: str, index: int, found: Tensor) -> None:
        sums[what, index] = sums.get((what, index), 0) + found.double().sum(dim=0)

    def residual(at: Residual) -> None:
        start = at.hidden[:, sink].double()
        keep("start", at.depth, start)
        keep("size", at.depth, start.abs())
        keep("rest", at.depth, (at.hidden.double().sum(dim=1) - start) / (at.hidden.shape[1] - 1))

    def arrive(at: Arrival) -> None:
        others = torch.arange(at.key.shape[2], device=at.key.device) != sink
        keep("keys", at.layer, at.key[:, :, others].double().mean(dim=2))
        values[at.layer] = at.value.shape[-1]

    with probe(model, arrive=arrive, residual=residual):
        for rows in ids.split(batch):
            base_of(model)(rows, use_cache=False)

    def means(what: str) -> dict[int, Tensor]:
        return {index: found / len(ids) for (kind, index), found in sums.items() if kind == what}

    start, size, rest = (torch.stack(list(means(what).values())) for what in ("start", "size", "rest"))
    return Known(start, size, rest, means("keys"), values)


Edit = Callable[[PreTrainedModel], AbstractContextManager[None]]


def _nothing(_: PreTrainedModel) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, eq=False)
class Trial:
    """One edit: of the model, of what it reads, or of neither (the base).

    `source` is the column of the unedited text that each column of `ids` holds, -1 for a token that is new. `spared`
    are columns whose predictions are not counted; `watch` those whose sink rates are reported.
    """

    name: str
    group: str
    control_of: str
    ids: Int[Tensor, "texts tokens"]
    source: Int[Tensor, " tokens"]
    watch: tuple[int, int]
    edit: Edit = _nothing
    spared: tuple[int, ...] = ()

    def shared(self) -> tuple[Tensor, Tensor]:
        """The columns, here and in the unedited text, from which both predict the same next token."""
        here, following = self.source[:-1], self.source[1:]
        counted = (here >= 0) & (following == here + 1)
        counted[list(self.spared)] = False
        columns = counted.nonzero()[:, 0]
        return columns, here[columns]


@dataclass(eq=False)
class Bench:
    """What trials are made from. `other` is the key that stands in for the sink in controls, nearly as old as it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Int[Tensor, "texts tokens"]
    known: Known
    spot: Spot
    sink: int
    bos: int | None
    seed: int = 0
    other: int = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.other = int(others(self.sink, self.tokens, 1, self.generator))

    @property
    def tokens(self) -> int:
        """Length of the unedited texts."""
        return self.ids.shape[1]

    def trials(self) -> Iterator[Trial]:
        """Everything that is tried, each edit before its controls."""
        for family in (_massive, _attention, _scores, _added, _embeddings, _inputs):
            yield from family(self)

    def base(self) -> Trial:
        """Nothing edited."""
        return self.edited("base", "", _nothing, ())

    def edited(self, name: str, group: str, edit: Edit, spared: Sequence[int], control_of: str = "") -> Trial:
        """The same texts, the model edited."""
        watch = (self.sink, self.sink + 1)
        return Trial(name, group, control_of, self.ids, torch.arange(self.tokens), watch, edit, tuple(spared))

    def read(
        self, name: str, change: Callable[[Tensor, bool], Tensor], control_of: str = "", next_at: int | None = None
    ) -> Trial:
        """Other texts: `change(ids, False)`, and the same of column numbers, `change(numbers, True)`, new ones -1."""
        source = change(torch.arange(self.tokens)[None], True)[0]
        watch = (self.sink, self.sink + 1 if next_at is None else next_at)
        return Trial(name, "first tokens", control_of, change(self.ids, False), source, watch)


def others(sink: int, tokens: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Random keys soon after the sink, so that nearly as many queries see them: the next but one, and an eighth on."""
    return sink + 2 + torch.randint(max(tokens // 8, 1), (count,), generator=generator)


def _massive(bench: Bench) -> Iterator[Trial]:
    spot, size, group = bench.spot, bench.known.size[bench.spot.depth], "massive activation"
    start, rest = bench.known.start[spot.depth], bench.known.rest[spot.depth]
    dims, count = list(spot.dims), len(spot.dims)
    free = [dim for dim in torch.randperm(len(size), generator=bench.generator).tolist() if dim not in spot.dims]
    ordinary = (size - size.median()).abs().argsort()[:count].tolist()

    def trial(name: str, dims: list[int], values: Tensor, of: str = "", position: int = spot.position) -> Trial:
        edit = partial(set_residual, depth=spot.depth, positions=[position], dims=dims, values=values)
        return bench.edited(name, group, edit, [position], of)

    fixed = bench.bos is not None and spot.position == 0
    nothing = torch.zeros(count)
    zero = f"dims {', '.join(map(str, dims))} of {spot} set to 0"
    mean = "the same set to their mean over other texts" + (" (no change by construction: fixed BOS)" if fixed else "")
    yield trial(zero, dims, nothing)
    yield trial(f"{count} random dims of the same token set to 0", free[:count], nothing, zero)
    yield trial(f"{count} median-size dims of the same token set to 0", ordinary, nothing, zero)
    yield trial(f"the same dims of token {bench.other} set to 0", dims, nothing, zero, bench.other)
    yield trial("the same halved (half their mean)", dims, start[dims] / 2)
    yield trial(mean, dims, start[dims])
    yield trial(f"{count} random dims set to their mean", free[:count], start[free[:count]], mean)
    yield trial("the same set to the mean of the other tokens", dims, rest[dims])


def _attention(bench: Bench) -> Iterator[Trial]:
    for name, factor, renormalise in (
        ("removed, the rest renormalised", 0.0, True),
        ("removed, the rest as it is", 0.0, False),
        ("halved, the rest renormalised", 0.5, True),
    ):
        edit = partial(scale_attention, factor=factor, renormalise=renormalise)
        full = f"attention on key {bench.sink} {name}"
        yield bench.edited(full, "sink attention", partial(edit, keys=[bench.sink]), [bench.sink])
        control = f"attention on key {bench.other} {name}"
        yield bench.edited(control, "sink attention", partial(edit, keys=[bench.other]), [bench.other], full)


def _scores(bench: Bench) -> Iterator[Trial]:
    for bias in (-2.0, -5.0):
        names = [f"bias {bias:g} on the scores of key {key}" for key in (bench.sink, bench.other)]
        for key, name, of in zip((bench.sink, bench.other), names, ("", names[0]), strict=True):
            yield bench.edited(name, "sink logits", partial(bias_scores, bias=bias, keys=[key]), [key], of)
    learned = sink_logits_of(bench.model)
    if learned:
        taken, less = "learned sink logits taken away", "learned sink logits less 2"
        yield bench.edited(taken, "sink logits", partial(shift_sink_logits, shift=-1e4), ())
        yield bench.edited(less, "sink logits", partial(shift_sink_logits, shift=-2.0), ())


def _added(bench: Bench) -> Iterator[Trial]:
    keys = bench.known.keys
    values = {layer: torch.zeros(len(key), 1, bench.known.values[layer]) for layer, key in keys.items()}
    chances = {
        layer: torch.nn.functional.normalize(torch.randn(key.shape, generator=bench.generator), dim=-1)
        * key.norm(dim=-1, keepdim=True).cpu()
        for layer, key in keys.items()
    }
    mean = "mean key, zero value added"
    for name, of, made in (
        ("zero key, zero value added (softmax-off-by-one)", "", {layer: 0 * key for layer, key in keys.items()}),
        (mean, "", keys),
        ("random key of the same norm, zero value added", mean, chances),
    ):
        added = {layer: key.unsqueeze(1) for layer, key in made.items()}
        yield bench.edited(name, "added keys", partial(add_keys, keys=added, values=values), (), of)


def _embeddings(bench: Bench) -> Iterator[Trial]:
    null = f"token {bench.sink} embedded as zeros"
    for position, name, of in ((bench.sink, null, ""), (bench.other, f"token {bench.other} embedded as zeros", null)):
        yield bench.edited(name, "first tokens", partial(null_embeddings, positions=[position]), [position], of)


def _inputs(bench: Bench) -> Iterator[Trial]:
    sink, other, middle = bench.sink, bench.other, bench.tokens // 2
    word = "BOS" if bench.bos is not None and sink == 0 else f"token {sink}"
    drop, move = f"{word} dropped", f"{word} moved to {MOVED_TO}"
    yield bench.read(drop, lambda ids, _: without(ids, sink))
    yield bench.read(f"token {other} dropped", lambda ids, _: without(ids, other), drop)
    yield bench.read(move, lambda ids, _: moved(ids, sink, MOVED_TO), next_at=MOVED_TO)
    yield bench.read(f"token {middle} moved to {MOVED_TO}", lambda ids, _: moved(ids, middle, MOVED_TO), move)
    chance = alike(bench.ids[:, :FIRST], "random", bench.tokenizer, bench.seed)
    lines: list[int] = bench.tokenizer("\n", add_special_tokens=False, verbose=False).input_ids
    new = [("random tokens", chance)] + ([("line breaks", torch.tensor(lines[-1:]))] if lines else [])
    for kind, tokens in new:
        name = f"the first {FIRST} tokens replaced by {kind}"
        for begin, full, of in ((0, name, ""), (middle, f"{FIRST} middle tokens replaced by {kind}", name)):
            where = range(begin, begin + FIRST)
            yield bench.read(full, partial(_replaced, where=where, tokens=tokens), of)
    if bench.bos is not None:
        often = f"BOS said {FIRST} times"
        for name, tokens, of in (
            (often, torch.full((1, FIRST - 1), bench.bos), ""),
            (f"{FIRST - 1} random tokens after BOS", chance[:, 1:], often),
        ):
            yield bench.read(name, partial(_inserted, tokens=tokens), of)


def _replaced(ids: Tensor, numbers: bool, *, where: range, tokens: Tensor) -> Tensor:
    return replaced(ids, where, -1 if numbers else tokens)


def _inserted(ids: Tensor, numbers: bool, *, tokens: Tensor) -> Tensor:
    return inserted(ids, 1, torch.full_like(tokens[:1], -1) if numbers else tokens)
