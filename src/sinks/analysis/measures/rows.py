"""What each query's row of attention comes to: entropies and masses, and their means; from blocks or from summaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.analysis.measures.importance import runs_of
from sinks.kernels.lens import Sight
from sinks.kernels.summary.summary import FIRST, Summary


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


class Rows:
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


class Means:
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
        self, layer: int, values: Float[Tensor, "statistics batch heads queries"], ends: Sequence[int]
    ) -> None:
        """The same for all queries of a layer in order, where the divisions are runs of neighbours up to `ends`."""
        known = ~values.isnan()
        both = torch.stack((values.where(known, 0), known.to(values.dtype))).sum(dim=2)
        sums, counts = runs_of(both, ends).transpose(1, 2)
        self._count(layer, range(values.shape[2]), sums, counts)

    def _count(self, layer: int, heads: range, sums: Tensor, counts: Tensor) -> None:
        for kept, all_more in ((self._sums, sums), (self._counts, counts)):
            for head, more in zip(heads, all_more.unbind(dim=0), strict=True):
                before = kept.get((layer, head))
                kept[layer, head] = more if before is None else before + more

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
        self._means = Means()
        self._along = None if stream is None else torch.zeros(2, *stream, dtype=torch.float64)

    def see(self, sight: Sight) -> None:
        """Count one block."""
        rows = Rows(sight, self.sink)
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
        return None if self._along is not None or bool((self.sink >= FIRST).any()) else self._sum_up

    def _sum_up(self, summary: Summary) -> None:
        sink_mass, left, on_sink, rest = _apart(summary, self.sink.tolist())
        entropy = on_sink + rest
        normalised = _normalised(entropy, summary)
        # The rest's weights made to sum to one: -sum (p / left) log(p / left).
        without = torch.where(left > 0, (left.log() + rest / left).clamp(min=0), torch.nan)
        ends = [min(end, summary.queries) for end in self.ends[:-1].tolist()] + [summary.queries]
        self._means.add_runs(summary.layer, torch.stack((entropy, normalised, without, sink_mass)), ends)

    def profile(self, name: str) -> Profile:
        """What was seen, as means."""
        entropy, normalised, without_sink, sink_mass = self._means.of(self.layers)
        return Profile(name, self.ends, entropy, normalised, without_sink, sink_mass)

    def along(self) -> Float[np.ndarray, "segments positions"]:
        """Normalised entropy at every position of every segment, mean over layers and heads; NaN: none."""
        sums, counts = (torch.zeros(2, 0, 0) if self._along is None else self._along).numpy()
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _normalised(entropy: Float[Tensor, "batch heads queries"], summary: Summary) -> Tensor:
    """Entropy over the log of how many keys a query sees; NaN where it sees one."""
    seen = summary.visible.float()
    return torch.where(seen > 1, entropy / seen.clamp(min=2).log(), torch.nan)


def _apart(summary: Summary, sinks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mass on the sinks, mass on all other keys, and -sum p log p over each, `[batch, heads, queries]`."""
    others = [key for key in range(FIRST) if key not in sinks]
    found = []
    for first, rest in ((summary.first, summary.rest), (summary.first_terms, summary.rest_terms)):
        on_sinks, on_others = (_total(first, keys) for keys in (sinks, others))
        found += [on_sinks, on_others + rest]
    return found[0], found[1], found[2], found[3]


def _total(first: Float[Tensor, "batch heads queries few"], keys: Sequence[int]) -> Tensor:
    """Sum over some of the first keys; where they are neighbours nothing is copied, and nothing waited for."""
    if not keys:
        return torch.zeros_like(first[..., 0])
    if list(keys) == list(range(keys[0], keys[-1] + 1)):
        return first[..., keys[0] : keys[-1] + 1].sum(dim=-1)
    return first[..., torch.tensor(keys, device=first.device)].sum(dim=-1)


class Masses:
    """Where heads look, for queries from position `first` on: sink mass, entropy, distance, and mass at distances."""

    def __init__(self, sink: Tensor, first: int, distances: Sequence[tuple[int, int]]) -> None:
        self.sink, self.first, self.distances = sink, first, distances
        self._means = Means()

    def see(self, sight: Sight) -> None:
        """Count one block."""
        into = (sight.view.queries >= self.first).double()[..., None]
        if not bool(into.any()):
            return
        rows = Rows(sight, self.sink)
        masses = [rows.at_distance(*distances) for distances in self.distances]
        self._means.add(sight, torch.stack((rows.sink_mass, rows.normalised, rows.mean_distance, *masses)), into)

    @property
    def sum_up(self) -> Callable[[Summary], None] | None:
        """Counts one layer's summary; None where it does not know the sink keys one by one."""
        return None if bool((self.sink >= FIRST).any()) else self._sum_up

    def _sum_up(self, summary: Summary) -> None:
        if self.first >= summary.queries:
            return
        sinks, query = self.sink.tolist(), torch.arange(summary.queries, device=summary.first.device)
        sink_mass, left, on_sink, rest = _apart(summary, sinks)
        normalised = _normalised(on_sink + rest, summary)
        reach = summary.reach()
        masses = [summary.at_distance(*distances) for distances in self.distances]
        for key in range(FIRST):
            weight, distance = summary.first[..., key], (query - key).clamp(min=0)
            if key not in sinks:
                reach = reach + weight * distance
                continue
            for index, (least, most) in enumerate(self.distances):  # what stands at a distance includes the sinks
                masses[index] = masses[index] - weight * ((distance >= least) & (distance < most) & (query >= key))
        mean_distance = torch.where(left > 0, reach / left, torch.nan)
        values = torch.stack((sink_mass, normalised, mean_distance, *masses))
        self._means.add_runs(summary.layer, values[..., self.first :], [summary.queries - self.first])

    def means(self, layers: int) -> Float[np.ndarray, "statistics layers some_heads"]:
        """Sink mass, normalised entropy, mean distance, and the mass at each of the distances."""
        return self._means.of(layers)[..., 0]
