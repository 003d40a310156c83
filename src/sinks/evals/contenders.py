"""The ways to read a stream that `sinks compare` sets against each other: one small class each, the same verbs.

`work(tokens)` says how much there is to do, and `read(model, ids, pace)` does it. Contenders are values: two that are
equal do the same, and are measured once.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sinks.cache.cache import Kind, SinkCache
from sinks.reading.perplexity import Score, finite, score, surprise
from sinks.types import Listener, ignore


@dataclass(frozen=True)
class Pace:
    """How a stream is fed: `chunk` tokens at a time, the last `singles` one by one; `listen` hears of every step."""

    chunk: int = 256
    singles: int = 32
    listen: Listener = ignore


@runtime_checkable
class Contender(Protocol):
    """One way to read a stream."""

    @property
    def keeps(self) -> str:
        """What stays visible, in at most ten characters: `4 + 252`."""
        ...

    def work(self, tokens: int) -> int:
        """How many units `read` reports to its listener for a stream of `tokens`."""
        ...

    def stops_at(self, tokens: int) -> int | None:
        """After how many tokens it stops reading a stream of `tokens`; None if it reads to the end."""
        ...

    def read(self, model: PreTrainedModel, ids: Int[Tensor, " tokens"], pace: Pace) -> Score:
        """Score `ids`; tokens that this contender does not score have NaN."""
        ...


@dataclass(frozen=True)
class Dense:
    """Full attention over all that was read, in transformers' own cache; stops after `limit` tokens (None: never)."""

    limit: int | None

    @property
    def keeps(self) -> str:
        return "all"

    def work(self, tokens: int) -> int:
        return self.stops_at(tokens) or tokens - 1

    def stops_at(self, tokens: int) -> int | None:
        return self.limit if self.limit is not None and self.limit < tokens - 1 else None

    def read(self, model: PreTrainedModel, ids: Int[Tensor, " tokens"], pace: Pace) -> Score:
        seen = ids[: self.work(len(ids)) + 1]  # what is read, and one more to predict
        cache = DynamicCache(config=model.config)
        found = score(model, seen, cache, pace.chunk, singles=pace.singles, listen=pace.listen)
        return replace(found, nll=np.pad(found.nll, (0, len(ids) - len(seen)), constant_values=np.nan))


@dataclass(frozen=True)
class Sinks:
    """The first `sinks` tokens and the `window` most recent ones. With no sinks this is the plain sliding window.

    `cache` is how the recent ones are held; see `SinkCache.for_model`.
    """

    sinks: int
    window: int
    cache: Kind = "full"

    @property
    def keeps(self) -> str:
        return f"{self.sinks} + {self.window}"

    def work(self, tokens: int) -> int:
        return tokens - 1

    def stops_at(self, tokens: int) -> None:
        return None

    def read(self, model: PreTrainedModel, ids: Int[Tensor, " tokens"], pace: Pace) -> Score:
        cache = SinkCache.for_model(model, sinks=self.sinks, window=self.window, cache=self.cache)
        return score(model, ids, cache, pace.chunk, singles=pace.singles, listen=pace.listen)


@dataclass(frozen=True)
class Newlines:
    """`Sinks`, but line breaks stand in place of the first tokens, BOS included (StreamingLLM, Table 1).

    If they serve as well, it is the place that makes a sink and not the token. The tokens replaced are not scored.
    """

    sinks: int
    window: int
    line_break: int

    @property
    def keeps(self) -> str:
        return rf"{self.sinks}\n + {self.window}"

    def work(self, tokens: int) -> int:
        return tokens - 1

    def stops_at(self, tokens: int) -> None:
        return None

    def read(self, model: PreTrainedModel, ids: Int[Tensor, " tokens"], pace: Pace) -> Score:
        replaced = ids.clone()
        replaced[: self.sinks] = self.line_break
        found = Sinks(self.sinks, self.window).read(model, replaced, pace)
        return replace(found, nll=np.where(np.arange(len(ids)) < self.sinks, np.nan, found.nll))


@dataclass(frozen=True)
class Recompute:
    """A fresh forward pass over the last `keys` tokens for every token: no cache, O(keys^2) a token.

    So only `samples` positions are scored, one drawn at random from each of as many equal stretches of the stream after
    its first `keys` tokens. If streams of this model begin with BOS, so does every fresh pass, instead of its oldest
    token.
    """

    keys: int
    samples: int
    seed: int
    bos: int | None = None

    @property
    def keeps(self) -> str:
        return f"{self.keys} fresh"

    def work(self, tokens: int) -> int:
        return len(self.positions(tokens))

    def stops_at(self, tokens: int) -> None:
        return None

    def positions(self, tokens: int) -> Int[np.ndarray, " samples"]:
        """Query positions t, increasing: after the first eviction, and with a token left to predict."""
        first, last = self.keys, tokens - 1
        edges = np.linspace(first, last, min(self.samples, last - first) + 1).astype(np.int64)
        return np.random.default_rng(self.seed).integers(edges[:-1], edges[1:])

    def read(self, model: PreTrainedModel, ids: Int[Tensor, " tokens"], pace: Pace) -> Score:
        positions = self.positions(len(ids))
        nll = np.full(len(ids), np.nan)
        milliseconds = np.empty(len(positions))
        for step, t in enumerate(positions.tolist()):
            began = time.perf_counter()
            found = self.predict(model, ids, t)
            milliseconds[step] = 1e3 * (time.perf_counter() - began)
            nll[t + 1] = finite(found, t + 1, model.dtype)[0]
            pace.listen(1)
        return Score(nll, positions + 1, milliseconds, np.zeros(len(positions), np.int64), singles=len(positions))

    @torch.inference_mode()
    def predict(self, model: PreTrainedModel, ids: Int[Tensor, " tokens"], t: int) -> Float[Tensor, " 1"]:
        """The surprise of token t + 1 after a fresh pass over the `keys` tokens up to t."""
        visible = ids[t + 1 - self.keys : t + 1].clone()
        if self.bos is not None:
            visible[0] = self.bos
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        logits = model(input_ids=visible[None], use_cache=False, **last_only).logits[0, -1:]
        return surprise(logits, ids[t + 1 : t + 2]).cpu()
