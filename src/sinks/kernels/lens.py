"""A lens: what looks at attention as it happens, or bends it, one block of queries at a time.

Nothing of size T x T is ever built: a lens meets the scores and weights of one block, takes what it needs, and the
block is gone. Lenses are plain records of functions, so they are stacked by putting them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.errors import InvalidInput
from sinks.kernels.summary.summary import Summary


@dataclass(frozen=True, eq=False)
class View:
    """Which block: a layer, some of its query heads, and who stands where.

    `queries` and `keys` are stream positions, -1 at a pad or an empty slot, -2 at a key that a lens has added; `heads`
    is the range of query heads, `group` how many of them share one key head.
    """

    layer: int
    heads: range
    group: int
    queries: Int[Tensor, "batch queries"]
    keys: Int[Tensor, "batch keys"]

    @property
    def kv_heads(self) -> range:
        """The key heads that these query heads read."""
        return range(self.heads.start // self.group, (self.heads.stop - 1) // self.group + 1)

    def of(self, heads: range) -> View:
        """The same block, other heads."""
        return replace(self, heads=heads)


@dataclass(frozen=True, eq=False)
class Sight:
    """One block as it was attended to: natural units, at least float32.

    `scores` are what the softmax was given, -inf where a query does not see a key. `weights` are its result after
    every lens that bends it; they sum to one, less what sink logits took (`logit_mass`). Rows of pads mean nothing.
    They are there for as long as a lens sees them, and another block is written over them then: keep copies.
    Before column `open` every query sees every key; `visible` is how many each sees in all.
    `query`, `key` and `value` are the heads that met, turned; a sink's score was made with another angle of the query.
    """

    view: View
    scores: Float[Tensor, "batch heads queries keys"]
    weights: Float[Tensor, "batch heads queries keys"]
    logit_mass: Float[Tensor, "batch heads queries"] | None
    bent: bool
    open: int
    visible: Int[Tensor, "#batch some_heads #queries"]
    query: Float[Tensor, "batch heads queries head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]

    @cached_property
    def maximum(self) -> Float[Tensor, "batch heads queries"]:
        """The largest weight of each query."""
        return self.weights.amax(dim=-1)

    @cached_property
    def log_sum_exp(self) -> Float[Tensor, "batch heads queries"]:
        """log of the softmax's denominator, the sink logit included, before any lens bends the weights."""
        if self.bent or self.logit_mass is not None:
            content = torch.logsumexp(self.scores, dim=-1)
            return content if self.logit_mass is None else content - torch.log1p(-self.logit_mass)
        # The largest score and the largest weight belong to the same key, and log p = s - log_sum_exp there.
        return self.scores.amax(dim=-1) - self.maximum.log()

    def expected_score(self, first: int = 0) -> Float[Tensor, "batch heads queries"]:
        """sum of weight times score over the keys from column `first` on."""
        middle = max(self.open, first)
        # What is not seen has weight 0, and 0 times -inf would be NaN; clamping copies, so only where there is need.
        last = self.scores[..., middle:].clamp(min=torch.finfo(self.scores.dtype).min)
        found = torch.linalg.vecdot(self.weights[..., middle:], last)
        if middle == first:
            return found
        return found + torch.linalg.vecdot(self.weights[..., first:middle], self.scores[..., first:middle])

    @cached_property
    def entropy(self) -> Float[Tensor, "batch heads queries"]:
        """-sum p log p, nats; a sink logit's share is one more outcome."""
        if self.bent or self.logit_mass is not None:
            found = torch.special.entr(self.weights).sum(dim=-1)
            return found if self.logit_mass is None else found + torch.special.entr(self.logit_mass)
        return (self.log_sum_exp - self.expected_score()).clamp_(min=0)

    def received(self) -> Float[Tensor, "batch heads keys"]:
        """Weight that each key received from the block, summed over the queries that are no pads."""
        real = (self.view.queries >= 0).to(self.weights.dtype)
        return torch.einsum("bhqk,bq->bhk", self.weights, real) if not real.all() else self.weights.sum(dim=-2)

    def on(self, positions: Tensor) -> Float[Tensor, "batch heads queries wanted"]:
        """Weight on the keys that stand at these stream positions `[wanted]`; 0 where such a key is not there."""
        if torch.equal(self.view.keys[:1, : len(positions)], positions[None]) and len(self.view.keys) == 1:
            return self.weights[..., : len(positions)].clone()
        match = (self.view.keys.unsqueeze(2) == positions).to(self.weights.dtype)
        return torch.einsum("bhqk,bkw->bhqw", self.weights, match)


@dataclass(frozen=True, eq=False)
class Arrival:
    """The new tokens of one layer: turned heads as they enter attention, with their stream positions (-1 at a pad)."""

    layer: int
    positions: Int[Tensor, "batch columns"]
    query: Float[Tensor, "batch heads columns head_dim"]
    key: Float[Tensor, "batch kv_heads columns head_dim"]
    value: Float[Tensor, "batch kv_heads columns value_dim"]


@dataclass(frozen=True, eq=False)
class Lens:
    """What to do with each block; None leaves it alone.

    `arrive` sees new heads. `add(layer)` gives keys and values `[kv_heads, added, head_dim]` that every query sees.
    `bend_scores(view, scores)` returns the scores the softmax is to have, after scale, soft cap, mask and positions.
    `bend_weights(view, weights)` returns the weights that multiply the values. `see` sees the block as it came out;
    `sum_up` may be given a layer's summary in its place, where that can be had and every lens on the pass takes it.

    Raises InvalidInput for `sum_up` without `see`, which would miss whatever cannot be summed up.
    """

    arrive: Callable[[Arrival], None] | None = None
    add: Callable[[int], tuple[Tensor, Tensor] | None] | None = None
    bend_scores: Callable[[View, Tensor], Tensor] | None = None
    bend_weights: Callable[[View, Tensor], Tensor] | None = None
    see: Callable[[Sight], None] | None = None
    sum_up: Callable[[Summary], None] | None = None

    def __post_init__(self) -> None:
        if self.sum_up is not None and self.see is None:
            raise InvalidInput("sum_up takes the place of see only where it can: give see as well")

    @property
    def needs_blocks(self) -> bool:
        """Whether it bends or adds something, or sees blocks and takes no summary for them."""
        changes = (self.add, self.bend_scores, self.bend_weights)
        return any(change is not None for change in changes) or (self.see is not None and self.sum_up is None)


class Room:
    """Where the blocks of one layer write their scores and weights, each over those of the last.

    Fresh results make a CPU's heap fetch its pages anew for every block: a tenth of a scan of 8,192 tokens.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def of(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Numbers of this name, of any value, in `shape`."""
        count, held = math.prod(shape), self._held.get(name)
        if held is None or len(held) < count or held.dtype != like.dtype:
            held = self._held[name] = like.new_empty(count)
        return held[:count].view(*shape)


@dataclass(frozen=True, eq=False)
class Look:
    """A block, the lenses that are on it, and where it is written (None: anew)."""

    view: View
    lenses: Sequence[Lens]
    room: Room | None = None


ADDED = -2
"""The position of a key that a lens has added."""
