"""The ways to read a stream that `sinks compare` sets against each other, one small class each, all with the same verbs.

`work(tokens)` says how much there is to do (tokens or samples), `read(model, ids, pace)` does it and returns a `Score` over all of `ids`.
Contenders are values: two that are equal do the same, and are measured once.
"""

import inspect
import time
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.evals.perplexity import Listener, Score, finite, ignore, score, surprise


@dataclass(frozen=True)
class Pace:
    """How a stream is fed: `chunk` tokens at a time, the last `singles` one by one, telling `listen` how many were read."""

    chunk: int = 256
    singles: int = 32
    listen: Listener = ignore


class Contender(Protocol):
    """One way to read a stream."""

    @property
    def keeps(self) -> str:
        """What stays visible, in a few characters: `4 + 252`."""
        ...

    def work(self, tokens: int) -> int:
        """How many units `read` will report to the listener for a stream of `tokens`."""
        ...

    def stops_at(self, tokens: int) -> int | None:
        """After how many tokens it stops reading a stream of `tokens`; None if it reads on to the end."""
        ...

    def read(self, model: PreTrainedModel, ids: Tensor, pace: Pace) -> Score:
        """Scores `ids` [tokens]; targets that this contender does not score are NaN."""
        ...


@dataclass(frozen=True)
class Dense:
    """Full attention over everything read so far, in transformers' own cache. It stops after `limit` tokens (None: never)."""

    limit: int | None

    @property
    def keeps(self) -> str:
        return "all"

    def work(self, tokens: int) -> int:
        return self.stops_at(tokens) or tokens - 1

    def stops_at(self, tokens: int) -> int | None:
        return self.limit if self.limit is not None and self.limit < tokens - 1 else None

    def read(self, model: PreTrainedModel, ids: Tensor, pace: Pace) -> Score:
        seen = ids[: self.work(len(ids)) + 1]  # with `limit` tokens read, the next one is still predicted
        found = score(model, seen, DynamicCache(config=model.config), pace.chunk, singles=pace.singles, listen=pace.listen)
        return replace(found, nll=np.pad(found.nll, (0, len(ids) - len(seen)), constant_values=np.nan))


@dataclass(frozen=True)
class Sinks:
    """The first `sinks` tokens and the `window` most recent ones. With no sinks this is the plain sliding window."""

    sinks: int
    window: int

    @property
    def keeps(self) -> str:
        return f"{self.sinks} + {self.window}"

    def work(self, tokens: int) -> int:
        return tokens - 1

    def stops_at(self, tokens: int) -> None:
        return None

    def read(self, model: PreTrainedModel, ids: Tensor, pace: Pace) -> Score:
        cache = SinkCache.for_model(model, sinks=self.sinks, window=self.window)
        return score(model, ids, cache, pace.chunk, singles=pace.singles, listen=pace.listen)


@dataclass(frozen=True)
class Newlines:
    """`Sinks`, but the first tokens of the stream, BOS included, are replaced by line breaks (StreamingLLM, Table 1): is it the
    position that makes a sink, or the token? Targets that were replaced are not scored."""

    sinks: int
    window: int
    line_break: int

    @property
    def keeps(self) -> str:
        return f"{self.sinks} \\n + {self.window}"

    def work(self, tokens: int) -> int:
        return tokens - 1

    def stops_at(self, tokens: int) -> None:
        return None

    def read(self, model: PreTrainedModel, ids: Tensor, pace: Pace) -> Score:
        replaced = ids.clone()
        replaced[: self.sinks] = self.line_break
        found = Sinks(self.sinks, self.window).read(model, replaced, pace)
        found.nll[: self.sinks] = np.nan
        return found


@dataclass(frozen=True)
class Recompute:
    """A fresh forward pass over the last `keys` tokens for every token: no cache, O(keys^2) a token, so only `samples` are scored.

    One position is drawn at random from each of `samples` equal stretches of the stream after the first `keys` tokens. If streams of this
    model begin with BOS (`prefix`), so does every fresh pass, within the same number of keys.
    """

    keys: int
    samples: int
    seed: int
    prefix: int | None = None

    @property
    def keeps(self) -> str:
        return f"{self.keys} fresh"

    def work(self, tokens: int) -> int:
        return len(self.positions(tokens))

    def stops_at(self, tokens: int) -> None:
        return None

    def positions(self, tokens: int) -> np.ndarray:
        """int64 [samples], the query positions t, increasing: after the first eviction, with a target left to predict."""
        first, last = self.keys, tokens - 1
        count = min(self.samples, last - first)
        edges = np.linspace(first, last, count + 1).astype(np.int64)
        return np.random.default_rng(self.seed).integers(edges[:-1], edges[1:])

    def read(self, model: PreTrainedModel, ids: Tensor, pace: Pace) -> Score:
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
    def predict(self, model: PreTrainedModel, ids: Tensor, t: int) -> Tensor:
        """[1], the surprise of token t + 1 after a fresh pass over the `keys` tokens up to t."""
        visible = ids[t + 1 - self.keys : t + 1]
        if self.prefix is not None:
            visible = torch.cat([visible.new_tensor([self.prefix]), visible[1:]])
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        logits = model(input_ids=visible[None], use_cache=False, **last_only).logits[0, -1:]
        return surprise(logits, ids[t + 1 : t + 2]).cpu()
