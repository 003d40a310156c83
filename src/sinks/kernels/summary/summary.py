"""What one layer's dense causal attention came to, query by query, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST = 16
"""Keys whose weights are kept one by one: what a matrix instruction takes at least, so fewer would cost as much."""


@dataclass(frozen=True, eq=False)
class Summary:
    """One layer of a dense causal pass without pads, where query i sees the keys 0 to i. Natural units, float32.

    `log_sum_exp` is of each query's scores and `maximum` its largest weight. `first` are its weights on each of the
    first 16 keys, 0 where it does not see one. All keys behind them are the rest: `rest` is the weight on them
    together, and `rest_entropy` the entropy in nats of their weights once these are made to sum to one, 0 where there
    are none. Both are summed by themselves, so that they keep their digits where the first keys take nearly all.

    What takes a pass of its own is made when it is asked for: `columns(kept)` what each of the first keys received;
    `at_distance(least, most)` the weight `[batch, heads, queries]` on all keys at distances from `least` to below
    `most`; `reach()` weight times distance, summed over the rest.
    """

    layer: int
    log_sum_exp: Float[Tensor, "batch heads queries"]
    maximum: Float[Tensor, "batch heads queries"]
    first: Float[Tensor, "batch heads queries few"]
    rest: Float[Tensor, "batch heads queries"]
    rest_entropy: Float[Tensor, "batch heads queries"]
    columns: Callable[[int], Tensor]
    at_distance: Callable[[int, int], Tensor]
    reach: Callable[[], Tensor]

    @property
    def queries(self) -> int:
        """Tokens of each row, which are its keys as well."""
        return self.first.shape[2]

    @cached_property
    def visible(self) -> Int[Tensor, " queries"]:
        """How many keys each query sees."""
        return torch.arange(1, self.queries + 1, device=self.first.device)

    @cached_property
    def first_terms(self) -> Float[Tensor, "batch heads queries few"]:
        """-p log p of the weight on each of the first keys, nats."""
        return torch.special.entr(self.first)

    @cached_property
    def rest_terms(self) -> Float[Tensor, "batch heads queries"]:
        """-sum p log p over the rest, nats."""
        return self.rest * self.rest_entropy + torch.special.entr(self.rest)

    @cached_property
    def entropy(self) -> Float[Tensor, "batch heads queries"]:
        """-sum p log p, nats."""
        return self.first_terms.sum(dim=-1) + self.rest_terms

    @cached_property
    def first_received(self) -> Float[Tensor, "batch heads few"]:
        """Weight that each of the first keys received, summed over all queries in float64."""
        return self.first.sum(dim=2, dtype=torch.float64)

    def received(self, kept: int) -> Float[Tensor, "batch heads some_keys"]:
        """Weight that each of the first `kept` keys received, summed over all queries: a second pass."""
        return self.columns(min(kept, self.queries))
