"""What keys receive: the mean attention on each, and every query's on the first; from blocks or from summaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinks.errors import InvalidInput
from sinks.kernels.lens import Sight
from sinks.kernels.summary.summary import FIRST, Summary

FEW = 4
"""First keys whose attention is also taken together."""


class Importance:
    """Collects, by text, layer and head, the mean attention that each key receives from the queries that see it.

    Feed it batches of texts of one length, without pads: `probe(model, see=collector.see, sum_up=collector.sum_up)`,
    then `close` after each batch. `sink` is the key whose share of later queries' attention is wanted, `kept` how many
    of the first keys are (None: all, which on a GPU takes a second pass over queries and keys). Keeps texts x layers x
    heads x kept numbers.

    Raises InvalidInput where the sink is not among the keys that are kept.
    """

    def __init__(self, tokens: int, sink: int = 0, kept: int | None = None) -> None:
        self.tokens, self.sink, self.kept = tokens, sink, min(tokens if kept is None else kept, tokens)
        if not 0 <= sink < self.kept:
            raise InvalidInput(f"sink={sink} is not among the {self.kept} keys that are kept")
        self._received: dict[tuple[int, int], Tensor] = {}
        self._on_sink: dict[tuple[int, int], Tensor] = {}
        self._on_four: dict[tuple[int, int], Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._floor: dict[int, Tensor] = {}
        self._batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def see(self, sight: Sight) -> None:
        """Add one block."""
        view, keys = sight.view, sight.view.keys[0]
        real = keys >= 0  # a key that a lens has added is nobody's token
        kept = _columns(real & (keys < self.kept))
        received = sight.received()[..., kept]  # summed in the model's own precision: half the memory on long texts
        on_sink = self._later(sight, torch.tensor([self.sink]), self.sink + 1)
        on_four = self._later(sight, torch.arange(FEW), FEW)
        for index, head in enumerate(view.heads):
            place = (view.layer, head)
            sums = self._received.setdefault(place, received.new_zeros(len(received), self.kept))
            sums.index_add_(1, keys[kept], received[:, index].to(sums.dtype))
            self._on_sink[place] = self._on_sink.get(place, 0) + on_sink[:, index]
            self._on_four[place] = self._on_four.get(place, 0) + on_four[:, index]
        if view.heads.start == 0 and not self._batches:  # who sees whom is the same for every head and text
            for sums, more in zip((self._seen, self._floor), _seen_of(sight, real), strict=True):
                total = sums.setdefault(view.layer, more.new_zeros(self.kept))
                total.index_add_(0, keys[kept], more[kept])

    def _later(self, sight: Sight, keys: Tensor, first: int) -> Float[Tensor, "batch heads"]:
        """Weight on `keys` together, summed over the queries from position `first` on."""
        later = (sight.view.queries >= first).double()
        return torch.einsum("bhqw,bq->bh", sight.on(keys.to(later.device)).double(), later)

    @property
    def sum_up(self) -> Callable[[Summary], None] | None:
        """Adds one layer's summary; None where the sink is none of the keys that a summary knows one by one."""
        return self._sum_up if self.sink < FIRST else None

    def _sum_up(self, summary: Summary) -> None:
        first = summary.first_received
        received = _filled(first if self.kept <= FIRST else summary.received(self.kept), self.kept)
        on_sink = first[..., self.sink] - _early(summary, self.sink, self.sink + 1)  # but for its own query
        on_four = first[..., :FEW].sum(dim=-1) - _early(summary, 0, FEW)
        for sums, more in ((self._received, received), (self._on_sink, on_sink), (self._on_four, on_four)):
            for head, part in enumerate(more.unbind(dim=1)):
                place = (summary.layer, head)
                sums[place] = sums[place] + part if place in sums else part
        if not self._batches:
            shares = (1 / summary.visible.double()).flip(0).cumsum(dim=0).flip(0)
            for sums, more in ((self._seen, summary.visible.double().flip(0)), (self._floor, shares)):
                sums[summary.layer] = sums.get(summary.layer, 0) + _filled(more, self.kept)

    def close(self) -> None:
        """End a batch."""
        layers, heads = (1 + max(place[axis] for place in self._received) for axis in (0, 1))
        batch = []
        for sums in (self._received, self._on_sink, self._on_four):
            rows = [torch.stack([sums.pop((layer, head)) for head in range(heads)], dim=1) for layer in range(layers)]
            batch.append(torch.stack(rows, dim=1).cpu().numpy())
        self._batches.append((batch[0], batch[1], batch[2]))

    @property
    def received(self) -> Float[np.ndarray, "texts layers heads keys"]:
        """Attention that each key received, summed over queries."""
        return np.concatenate([batch[0] for batch in self._batches]).astype(np.float64)

    @property
    def alpha(self) -> Float[np.ndarray, "texts layers heads keys"]:
        """Importance of the keys that are kept: the mean over the queries that see one; 0 where nobody does."""
        return self.received / np.maximum(self.seen[:, None, :], 1)

    @property
    def seen(self) -> Float[np.ndarray, "layers keys"]:
        """How many queries see each key."""
        return _by_layer(self._seen)

    @property
    def floor(self) -> Float[np.ndarray, "layers keys"]:
        """The importance that each key would have if every query attended uniformly to what it sees."""
        return _by_layer(self._floor) / np.maximum(self.seen, 1)

    @property
    def sink_mass(self) -> Float[np.ndarray, "texts layers heads"]:
        """Mean attention on the sink, over the queries after it."""
        return np.concatenate([batch[1] for batch in self._batches]) / (self.tokens - self.sink - 1)

    @property
    def four_mass(self) -> Float[np.ndarray, "texts layers heads"]:
        """Mean attention on the first four keys together, over the queries after them."""
        return np.concatenate([batch[2] for batch in self._batches]) / (self.tokens - FEW)


def _columns(wanted: Bool[Tensor, " keys"]) -> slice | Bool[Tensor, " keys"]:
    """Where they are the first ones, as a slice: what it picks is not copied."""
    count = int(wanted.sum())
    return slice(count) if bool(wanted[:count].all()) else wanted


def _seen_of(sight: Sight, real: Bool[Tensor, " keys"]) -> tuple[Float[Tensor, " keys"], Float[Tensor, " keys"]]:
    """How many queries see each key, and what it would receive of queries that attend uniformly to `real` keys."""
    late = (sight.scores[0, 0, :, sight.open :] > -torch.inf).double()
    share = 1 / (real[: sight.open].sum() + late @ real[sight.open :].double())
    early = late.new_ones(sight.open)
    return torch.cat((early * len(share), late.sum(dim=0))), torch.cat((early * share.sum(), share @ late))


def _filled(sums: Float[Tensor, "*places some"], count: int) -> Float[Tensor, "*places count"]:
    """The first `count` sums, zeros where there are fewer."""
    return torch.nn.functional.pad(sums[..., :count], (0, max(count - sums.shape[-1], 0)))


def _early(summary: Summary, begin: int, end: int) -> Float[Tensor, "batch heads"]:
    """Weight that the keys from `begin` to `end` have among themselves."""
    return summary.first[:, :, begin:end, begin:end].sum(dim=(2, 3), dtype=torch.float64)


def _by_layer(sums: Mapping[int, Tensor]) -> Float[np.ndarray, "layers keys"]:
    return torch.stack([sums[layer] for layer in sorted(sums)]).cpu().numpy()


class Prefixes:
    """Collects the attention on key 0, so that each prefix of a text, of `lengths` tokens, gives its own importance.

    `close` after each batch. Keeps texts x layers x heads x lengths numbers.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._batches: list[np.ndarray] = []

    def see(self, sight: Sight) -> None:
        """Add one block."""
        view = sight.view
        queries = view.queries
        on_first = sight.on(queries.new_zeros(1))[..., 0].double()
        # The first query is a prefix of its own, which is in all others.
        ends = torch.tensor((1, *self.lengths), device=queries.device)
        inside = ((queries >= 0)[..., None] & (queries[..., None] < ends)).double()
        self._add(view.layer, view.heads, torch.einsum("bhq,bqn->bhn", on_first, inside))

    def sum_up(self, summary: Summary) -> None:
        """Add one layer."""
        runs = runs_of(summary.first[..., 0], (1, *self.lengths))
        self._add(summary.layer, range(runs.shape[1]), runs.cumsum(dim=-1))

    def _add(self, layer: int, heads: range, sums: Float[Tensor, "batch heads prefixes"]) -> None:
        for head, more in zip(heads, sums.unbind(dim=1), strict=True):
            before = self._sums.get((layer, head))
            self._sums[layer, head] = more if before is None else before + more

    def close(self) -> None:
        """End a batch."""
        places = sorted(self._sums)
        self._batches.append(torch.stack([self._sums.pop(place) for place in places], dim=1).cpu().numpy())

    @property
    def sums(self) -> Float[np.ndarray, "texts layers_times_heads prefixes"]:
        """Attention on key 0, summed over the queries of each prefix: the first query alone, then `lengths`."""
        return np.concatenate(self._batches)


def runs_of(values: Float[Tensor, "*places queries"], ends: Sequence[int]) -> Float[Tensor, "*places runs"]:
    """Sums over runs of neighbouring queries, each up to one of the rising `ends`, in float64.

    Run by run: a sum over all of them at once, such as a scan or a product with ones, reads rows that are few and long
    by few programs.
    """
    lengths = [end - begin for begin, end in pairwise((0, *ends))]
    runs = values[..., : ends[-1]].split(lengths, dim=-1)
    return torch.stack([run.sum(dim=-1, dtype=torch.float64) for run in runs], dim=-1)
