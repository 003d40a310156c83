"""Attention entropy by layer, head and position; and what kind of head each one is, by a stated rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sinks.analysis.probe import probe, read
from sinks.cache.cache import SinkCache
from sinks.errors import InvalidInput, TextTooShort
from sinks.kernels.lens import Sight
from sinks.kernels.summary import summary as summaries
from sinks.kernels.summary.summary import Summary
from sinks.models.families import base_of
from sinks.models.observe import blocks_of
from sinks.reading.estimate import ratio_of_means
from sinks.types import Listener, Stage, unwatched

KINDS = ("sink", "previous", "local", "induction", "uniform", "mixed")

INDUCTION, PREVIOUS, SINK, LOCAL, UNIFORM = 0.3, 0.3, 0.3, 0.5, 0.9
"""The least of its measure that makes a head of a kind; on one key, it is the epsilon of Gu et al."""

NEAR = 16
"""Keys that count as local, the query's own included."""

REPEATED, REPEATS = 48, 16
"""Random tokens that are repeated once to find induction heads, and how many such texts are read."""

TURNS = 3
"""A stream is cut into segments of this many capacities, each read from an empty cache."""

LEAST = 8
"""Keys of the smallest window whose start, plateau and end can be told apart."""

START = 16
"""Queries that count as the start of a stream."""

SPIKE, FLAT, CLIFF = 1.1, 0.05, 0.9
"""What is held to be a spike at least, a plateau's change at most, and a cliff's ratio at most."""

CHUNK = 128
"""Columns of a stream that are fed at a time."""

RULE = (
    f"The first that fits: induction, at least {INDUCTION:.0%} of attention on the token after the last occurrence of "
    f"the current one, when random tokens are repeated; previous, at least {PREVIOUS:.0%} on the token before; sink, "
    f"at least {SINK:.0%} on the sink; local, at least {LOCAL:.0%} on the last {NEAR} tokens, sink left out; uniform, "
    f"entropy at least {UNIFORM:.0%} of its maximum; mixed, none of these. Masses are means over the second half of "
    "each text, the induction mass over the repetition."
)
"""How a head's kind follows from its measures."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Entropy of attention (nats) under one way of reading.

    `ends` are the positions at which bins end, each a mean over its queries. `normalised` divides by the log of how
    many keys a query sees (queries that see one key are left out); `without_sink` is the entropy of what is left once
    the sink keys are taken out and the rest is renormalised (queries for which nothing is left are left out): sinks
    lower the entropy of a healthy head. A sink key that a query does not see has mass 0. A learned sink logit counts
    as one more key, and as a sink. NaN where a bin has no query.
    """

    name: str
    ends: Int[np.ndarray, " bins"]
    entropy: Float[np.ndarray, "layers heads bins"]
    normalised: Float[np.ndarray, "layers heads bins"]
    without_sink: Float[np.ndarray, "layers heads bins"]
    sink_mass: Float[np.ndarray, "layers heads bins"]


@dataclass(frozen=True, eq=False)
class Heads:
    """What each head does: the measures, and the kind that follows from them (`KINDS`, by index; see `RULE`).

    The first that fits, in this order: "induction" if `induction_mass` is at least 0.3, "previous" if `previous_mass`
    is at least 0.3, "sink" if `sink_mass` is at least 0.3, "local" if `local_mass` is at least 0.5, "uniform" if
    `normalised_entropy` is at least 0.9, else "mixed". Induction comes first because such heads rest on the sink
    wherever there is nothing to copy.

    Measures are means over the queries of the second half of each text, under dense attention: `sink_mass` on the sink
    keys (and a learned sink logit), `previous_mass` on the token before, `local_mass` on the last 16 tokens without
    the sink, `mean_distance` of what is not on the sink, in tokens. `induction_mass` is on the token after the last
    occurrence of the current one, in texts of 48 different random tokens, repeated once; the queries are those of the
    repetition.
    """

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
    let go: each part as a number, and whether it holds, by the stated rule.

    Each number is a ratio of mean normalised entropies (over heads, layers and queries) of two stretches of a stream;
    `low` and `high` are the ends of its 95 % interval, segments of the stream drawn as pairs (NaN: one segment).
    """

    claim: str
    measured: float
    low: float
    high: float
    holds: bool
    rule: str


@dataclass(frozen=True, eq=False)
class Entropy:
    """Profiles of dense attention, of a stream with sinks and of a plain window; the heads; the folklore.

    Without a stream there is only the first profile, and no folklore.
    """

    profiles: tuple[Profile, ...]
    heads: Heads
    folklore: tuple[Folklore, ...]


def measure(
    model: PreTrainedModel,
    ids: Int[Tensor, "texts tokens"],
    stream: Int[Tensor, " stream_tokens"] | None = None,
    *,
    sinks: int = 4,
    window: int = 252,
    sink_keys: Sequence[int] = (0,),
    batch: int = 16,
    stage: Stage = unwatched,
) -> Entropy:
    """Read texts densely, `batch` at a time, and a stream through `sinks` + `window` and through a plain window.

    The plain window holds as many keys. The stream is cut into as many segments of 3 (sinks + window) tokens as it
    has (or is one, if it is shorter), read side by side, each from an empty cache: every one has a start and lets its
    first token go. `sink_keys` are the positions whose keys count as sinks. If all texts begin with the same token, as
    with a BOS, so do the segments, and the random texts, which are made of tokens of the texts. The model must be
    attached to read a stream.

    Raises InvalidInput for sizes that make no sense, TextTooShort where no segment would let anything go.
    """
    sink = torch.tensor(sorted(set(sink_keys)))
    texts, tokens = ids.shape
    if tokens < 2 or texts < 1 or batch < 1:
        raise InvalidInput(f"{texts} texts of {tokens} tokens, {batch} at a time: give at least 1 text of 2 tokens")
    first = ids[0, :1] if texts > 1 and bool((ids[:, 0] == ids[0, 0]).all()) else ids[0, :0]
    segments = None if stream is None else cut(stream, sinks + window, first)
    repeated, distance = repeated_tokens(ids, first)
    streamed = 0 if segments is None else 2 * segments.numel()
    listen = stage("attention entropy", ids.numel() + repeated.numel() + streamed)
    layers = len(blocks_of(model))

    dense = Bins(layers, ends_of(tokens), sink)
    masses = _Masses(sink, tokens // 2, ((1, 2), (0, NEAR)))
    with probe(model, see=dense.see), probe(model, see=masses.see):
        _read(model, ids, batch, listen)
    copies = _Masses(sink, repeated.shape[1] - distance - 1, ((distance, distance + 1),))
    with probe(model, see=copies.see):
        _read(model, repeated, batch, listen)
    heads = _heads(masses.means(layers), copies.means(layers))
    profiles, folklore = [dense.profile("dense attention")], []
    if segments is not None:
        for kept, name in ((sinks, f"{sinks} sinks + {window}"), (0, f"plain window of {sinks + window}")):
            cache = SinkCache.for_model(model, sinks=kept, window=sinks + window - kept)
            found = Bins(layers, ends_of(segments.shape[1], cache.capacity), sink, segments.shape)
            with probe(model, see=found.see):
                _stream(model, segments, cache, listen)
            profiles.append(found.profile(name))
            folklore += judge(name, found.along(), cache.capacity)
    return Entropy(tuple(profiles), heads, tuple(folklore))


def cut(
    stream: Int[Tensor, " tokens"], capacity: int, first: Int[Tensor, " some"] | None = None
) -> Int[Tensor, "segments length"]:
    """The stream as segments of `TURNS` capacities, each behind `first`; a shorter stream is one segment.

    Raises TextTooShort where less than a quarter of the capacity would be read after the first token is let go.
    """
    if capacity < LEAST:
        raise InvalidInput(f"sinks + window = {capacity}: a stream to be judged keeps at least {LEAST} keys")
    first = stream[:0] if first is None else first.to(stream)
    if len(first) and torch.equal(stream[: len(first)], first):
        stream = stream[len(first) :]
    needed = capacity + capacity // 4 - len(first)
    if len(stream) < needed:
        raise TextTooShort(
            f"the stream has {len(stream)} tokens, and {needed} are needed to see what happens when the first one is "
            "let go: give a longer one, or choose a smaller window"
        )
    length = min(TURNS * capacity - len(first), len(stream))
    count = len(stream) // length
    return torch.cat((first.expand(count, -1), stream[: count * length].view(count, length)), dim=1)


def repeated_tokens(
    ids: Int[Tensor, "texts tokens"], first: Int[Tensor, " some"], seed: int = 0
) -> tuple[Int[Tensor, "repeats length"], int]:
    """Texts of different random tokens, repeated once, behind `first`; and how far back the token to copy stands.

    The tokens are those of `ids`, drawn without return.
    """
    known = torch.unique(ids)
    known = known[~torch.isin(known, first)]
    if len(known) < 2:
        raise InvalidInput("all tokens of the texts are the same: give texts of different tokens")
    count = min(REPEATED, len(known))
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([known[torch.randperm(len(known), generator=generator)[:count]] for _ in range(REPEATS)])
    return torch.cat((first.expand(REPEATS, -1), once, once), dim=1), count - 1


def ends_of(tokens: int, capacity: int | None = None) -> Int[np.ndarray, " bins"]:
    """Where bins of positions end: powers of two, counted afresh (from 16) once the first token has been let go."""
    turn = tokens if capacity is None else min(capacity, tokens)
    ends = [2**power for power in range(1, tokens.bit_length() + 1) if 2**power < turn] + [turn]
    ends += [turn + 2**power for power in range(4, tokens.bit_length() + 1) if turn + 2**power < tokens]
    return np.array(sorted({*ends, tokens}))


def _read(model: PreTrainedModel, ids: Tensor, batch: int, listen: Listener) -> None:
    for part in ids.split(batch):
        read(model, part)
        listen(part.numel())


@torch.inference_mode()
def _stream(model: PreTrainedModel, segments: Tensor, cache: SinkCache, listen: Listener) -> None:
    for part in segments.split(CHUNK, dim=1):
        base_of(model)(input_ids=part.to(model.device), past_key_values=cache, use_cache=True)
        listen(part.numel())


class _Rows:
    """What each row of attention of one block comes to, `[batch, heads, queries]`, in float64."""

    def __init__(self, sight: Sight, sink: Int[Tensor, " sinks"]) -> None:
        self._sight = sight
        keys, few = sight.view.keys, len(sink)
        sink = sink.to(keys.device)
        if few < keys.shape[1] and bool((keys[:, :few] == sink).all()):  # slices: no copy of anything
            on_keys, self._first = sight.weights[..., :few].sum(dim=-1).double(), few
            self.rest = sight.weights[..., few:]
        else:
            is_sink = torch.isin(keys, sink)
            on_keys, self._first = (sight.weights @ is_sink.to(sight.weights)[:, None, :, None])[..., 0].double(), 0
            self.rest = sight.weights.masked_fill(is_sink[:, None, None], 0) if bool(is_sink.any()) else sight.weights
        self.logit_mass = 0.0 if sight.logit_mass is None else sight.logit_mass.double()
        self.sink_mass = on_keys + self.logit_mass
        self.left = self.rest.sum(dim=-1).double()
        """Mass without the sinks', summed afresh: 1 - mass has no digits left where it is small."""

    @cached_property
    def _expected(self) -> Tensor:
        """Sum of weight times score without the sinks."""
        if self._first:
            return self._sight.expected_score(self._first).double()
        seen = self._sight.scores.clamp(min=torch.finfo(self._sight.scores.dtype).min)
        return torch.linalg.vecdot(self.rest, seen).double()

    @cached_property
    def entropy(self) -> Tensor:
        """-sum p log p; a sink logit is one more outcome."""
        sight, few = self._sight, self._first
        if sight.bent or sight.logit_mass is not None or not few:
            return sight.entropy.double()
        seen = sight.scores[..., :few].clamp(min=torch.finfo(sight.scores.dtype).min)
        on_sinks = torch.linalg.vecdot(sight.weights[..., :few], seen).double()
        return (sight.log_sum_exp.double() - on_sinks - self._expected).clamp(min=0)

    @cached_property
    def normalised(self) -> Tensor:
        """Entropy over the log of how many outcomes there are; NaN where there is one."""
        outcomes = self._sight.visible.double() + (self._sight.logit_mass is not None)
        return torch.where(outcomes > 1, self.entropy / outcomes.clamp(min=2).log(), torch.nan)

    @cached_property
    def without_sink(self) -> Tensor:
        """E' = log-sum-exp + log(left) - sum over the rest of p s / left; NaN where nothing is left.

        The same as [E - h(m) - m E_S] / (1 - m), which subtracts what it is to find where the sink takes nearly all.
        """
        if self._sight.bent:
            found = self.left.log() + torch.special.entr(self.rest).sum(dim=-1).double() / self.left
        else:
            mean_score = self._expected / self.left
            found = self._sight.log_sum_exp.double() + self.left.log() - mean_score
        return torch.where(self.left > 0, found.clamp(min=0), torch.nan)

    def at_distance(self, least: int, most: int) -> Tensor:
        """Mass at distances from `least` to below `most`, sinks left out."""
        distance = self._distance
        return self._on((distance >= least) & (distance < most))

    @cached_property
    def mean_distance(self) -> Tensor:
        """Mean distance of what is not on the sinks; NaN where nothing is."""
        return torch.where(self.left > 0, self._on(self._distance) / self.left, torch.nan)

    @cached_property
    def _distance(self) -> Int[Tensor, "batch queries keys"]:
        return self._sight.view.queries[:, :, None] - self._sight.view.keys[:, None, self._first :]

    def _on(self, columns: Tensor) -> Tensor:
        return torch.linalg.vecdot(self.rest, columns[:, None].to(self.rest.dtype)).double()


class _Means:
    """Means of some statistics of queries, by layer and head and some division of the queries."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: dict[tuple[int, int], Tensor] = {}

    def add(
        self,
        sight: Sight,
        values: Float[Tensor, "statistics batch heads queries"],
        into: Float[Tensor, "batch queries divisions"],
    ) -> None:
        """Count the values that are not NaN into the divisions that their queries belong to."""
        known = ~values.isnan()
        sums = torch.einsum("sbhq,bqd->hsd", values.where(known, 0), into)
        counts = torch.einsum("sbhq,bqd->hsd", known.double(), into)
        self._count(sight.view.layer, sight.view.heads, sums, counts)

    def add_runs(
        self,
        layer: int,
        values: Float[Tensor, "statistics batch heads queries"],
        last: Int[Tensor, " divisions"],
    ) -> None:
        """The same for all queries of a layer in order, where division d ends with query `last[d]`."""
        known = ~values.isnan()
        ended = []
        for each in (values.where(known, 0), known.double()):
            run = each.sum(dim=1).cumsum(dim=-1)[..., last]
            ended.append(run.diff(dim=-1, prepend=torch.zeros_like(run[..., :1])).transpose(0, 1))
        self._count(layer, range(values.shape[2]), ended[0], ended[1])

    def _count(self, layer: int, heads: range, sums: Tensor, counts: Tensor) -> None:
        for index, head in enumerate(heads):
            for kept, more in ((self._sums, sums), (self._counts, counts)):
                before = kept.get((layer, head))
                kept[layer, head] = more[index] if before is None else before + more[index]

    def of(self, layers: int) -> Float[np.ndarray, "statistics layers some_heads divisions"]:
        """The means; NaN where there was nothing to count."""
        heads = 1 + max(head for _, head in self._sums)
        shape = next(iter(self._sums.values())).shape
        found = np.full((shape[0], layers, heads, shape[1]), np.nan)
        for (layer, head), sums in self._sums.items():
            count = self._counts[layer, head]
            found[:, layer, head] = (sums / count.where(count > 0, torch.nan)).cpu().numpy()
        return found


class Bins:
    """Entropies of a reading by position, and, for a stream, along every segment."""

    def __init__(
        self, layers: int, ends: Int[np.ndarray, " bins"], sink: Tensor, stream: Sequence[int] | None = None
    ) -> None:
        self.layers, self.ends, self.sink = layers, ends, sink
        self._means = _Means()
        self._along = None if stream is None else torch.zeros(2, *stream, dtype=torch.float64)
        self._there: tuple[Tensor, Tensor] | None = None

    def see(self, sight: Sight) -> None:
        """Count one block."""
        rows = _Rows(sight, self.sink)
        values = torch.stack((rows.entropy, rows.normalised, rows.without_sink, rows.sink_mass))
        queries = sight.view.queries.contiguous()
        ends = torch.from_numpy(self.ends).to(queries.device)
        bins = torch.bucketize(queries, ends, right=True).clamp(max=len(ends) - 1)
        into = torch.nn.functional.one_hot(bins, len(ends)).double() * (queries >= 0)[..., None]
        self._means.add(sight, values, into)
        if self._along is not None:
            found = torch.stack((rows.normalised.nansum(dim=1), (~rows.normalised.isnan()).double().sum(dim=1)))
            row = torch.arange(len(queries))[:, None]
            self._along[:, row, queries.cpu()] += found.cpu()

    @property
    def sum_up(self) -> Callable[[Summary], None] | None:
        """Counts one layer's summary; None for a stream, and where it does not know the sink keys one by one."""
        return None if self._along is not None or int(self.sink.max()) >= summaries.FIRST else self._sum_up

    def _sum_up(self, summary: Summary) -> None:
        if self._there is None:  # once: what is not on the device is waited for
            is_sink = torch.isin(torch.arange(summaries.FIRST), self.sink)
            self._there = (is_sink.to(summary.first.device), torch.from_numpy(self.ends - 1).to(summary.first.device))
        is_sink, last = self._there
        sink_mass, left, on_sink, rest = _apart(summary, is_sink)
        outcomes = summary.visible.double()
        entropy = on_sink + rest
        normalised = torch.where(outcomes > 1, entropy / outcomes.clamp(min=2).log(), torch.nan)
        # The rest's weights made to sum to one: -sum (p / left) log(p / left).
        without = torch.where(left > 0, (left.log() + rest / left).clamp(min=0), torch.nan)
        values = torch.stack((entropy, normalised, without, sink_mass))
        self._means.add_runs(summary.layer, values, last.clamp(max=summary.queries - 1))

    def profile(self, name: str) -> Profile:
        """What was seen, as means."""
        entropy, normalised, without_sink, sink_mass = self._means.of(self.layers)
        return Profile(name, self.ends, entropy, normalised, without_sink, sink_mass)

    def along(self) -> Float[np.ndarray, "segments positions"]:
        """Normalised entropy at every position of every segment, mean over layers and heads; NaN: none."""
        sums, counts = (torch.zeros(2, 0, 0) if self._along is None else self._along).numpy()
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _apart(summary: Summary, is_sink: Bool[Tensor, " few"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mass on the sinks, mass on all other keys, and -sum p log p over each, `[batch, heads, queries]` in float64."""
    found = []
    for first, rest in ((summary.first, summary.rest), (summary.first_terms, summary.rest_terms)):
        on_sinks = first.where(is_sink, 0).sum(dim=-1, dtype=torch.float64)
        found += [on_sinks, first.where(~is_sink, 0).sum(dim=-1, dtype=torch.float64) + rest]
    return found[0], found[1], found[2], found[3]


class _Masses:
    """Where heads look, for queries from position `first` on: sink mass, entropy, distance, and mass at distances."""

    def __init__(self, sink: Tensor, first: int, distances: Sequence[tuple[int, int]]) -> None:
        self.sink, self.first, self.distances = sink, first, distances
        self._means = _Means()

    def see(self, sight: Sight) -> None:
        """Count one block."""
        into = (sight.view.queries >= self.first).double()[..., None]
        if not bool(into.any()):
            return
        rows = _Rows(sight, self.sink)
        masses = [rows.at_distance(*distances) for distances in self.distances]
        self._means.add(sight, torch.stack((rows.sink_mass, rows.normalised, rows.mean_distance, *masses)), into)

    def means(self, layers: int) -> Float[np.ndarray, "statistics layers some_heads"]:
        """Sink mass, normalised entropy, mean distance, and the mass at each of the distances."""
        return self._means.of(layers)[..., 0]


def _heads(masses: Float[np.ndarray, "5 layers heads"], copies: Float[np.ndarray, "4 layers heads"]) -> Heads:
    sink_mass, normalised, distance, previous, local = masses
    induction = copies[3]
    fits = {
        "induction": induction >= INDUCTION,
        "previous": previous >= PREVIOUS,
        "sink": sink_mass >= SINK,
        "local": local >= LOCAL,
        "uniform": normalised >= UNIFORM,
    }
    kind = np.select(list(fits.values()), [KINDS.index(name) for name in fits], KINDS.index("mixed"))
    return Heads(kind, sink_mass, previous, local, induction, normalised, distance)


def judge(reader: str, along: Float[np.ndarray, "segments positions"], capacity: int) -> list[Folklore]:
    """The three parts of the saying, for one reader of `capacity` keys."""
    quarter = capacity // 4
    start = max(min(START, quarter), 2)

    def part(claim: str, over: slice, under: slice, rule: str, bounds: tuple[float, float]) -> Folklore:
        means = [np.nanmean(along[:, stretch], axis=1) for stretch in (over, under)]
        found = ratio_of_means(means[0], means[1])
        least, most = bounds
        # One segment has no interval: the number alone must do.
        low, high = (found.value if np.isnan(end) else end for end in (found.low, found.high))
        holds = least <= low and high <= most
        return Folklore(f"{claim} ({reader})", found.value, found.low, found.high, holds, rule)

    before, after = slice(capacity - quarter, capacity), slice(capacity, capacity + quarter)
    infinity = float("inf")
    return [
        part("a spike at the start", slice(1, start), slice(quarter, capacity),
             f"normalised entropy of tokens 1 to {start - 1} over tokens {quarter} to {capacity - 1}, over segments: "
             f"the interval is above {SPIKE}", (SPIKE, infinity)),
        part("then a plateau", slice(2 * quarter, capacity), slice(quarter, 2 * quarter),
             f"tokens {2 * quarter} to {capacity - 1} over tokens {quarter} to {2 * quarter - 1}: the interval is "
             f"within {FLAT:.0%} of 1", (1 - FLAT, 1 + FLAT)),
        part("a cliff when the first token is let go", after, before,
             f"the {quarter} tokens from {capacity} on over the {quarter} before: the interval is below {CLIFF}",
             (0.0, CLIFF)),
    ]  # fmt: skip
