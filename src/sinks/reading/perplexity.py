"""Scores a stream: the surprise of every token, in memory that does not grow with the text.

The stream is fed in chunks, and of each chunk only the surprise of its tokens is kept. Logits, [chunk, vocab], live
for one chunk, and the log-softmax widens them to float32 a few rows at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.surprise import can_read_once, surprise_read_once
from sinks.reading.memory import bytes_held
from sinks.reading.pace import natural_chunk
from sinks.types import Listener, ignore

SLICE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits widened to float32 at a time: 4 MiB, which stay in a CPU's cache, or 512 MiB, worth a GPU's launches."""


@dataclass(frozen=True, eq=False)
class Score:
    """What one reader thought of one stream.

    `nll[i]` is -log p(token i | what was visible) in nats, NaN where token i was not scored, as token 0 never is.
    For every step: `read`, the tokens read when it ended; `milliseconds`, wall clock of its forward pass and
    log-softmax; `cache_bytes`, keys and values held when it ended. The last `singles` steps read one token each.
    """

    nll: Float[np.ndarray, " tokens"]
    read: Int[np.ndarray, " steps"]
    milliseconds: Float[np.ndarray, " steps"]
    cache_bytes: Int[np.ndarray, " steps"]
    singles: int

    @property
    def scored(self) -> Bool[np.ndarray, " tokens"]:
        """Which tokens have a surprise."""
        return ~np.isnan(self.nll)

    @property
    def latency(self) -> float:
        """Median milliseconds of the single steps; NaN if there was none."""
        return float(np.median(self.milliseconds[-self.singles :])) if self.singles else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Speed of the steps before the single ones; of the single ones if there are no others."""
        bulk = len(self.read) - self.singles
        tokens, steps = (self.read[bulk - 1], slice(bulk)) if bulk else (self.singles, slice(None))
        return 1e3 * float(tokens) / float(self.milliseconds[steps].sum())


def perplexity(nll: Float[np.ndarray, " tokens"], where: Bool[np.ndarray, " tokens"] | None = None) -> float:
    """exp of the mean of `nll` over the scored tokens among `where` (None: all); NaN if none of them was scored."""
    chosen = nll if where is None else nll[where]
    chosen = chosen[~np.isnan(chosen)]
    return float(np.exp(chosen.mean())) if chosen.size else float("nan")


def surprise(logits: Float[Tensor, "queries vocab"], targets: Int[Tensor, " queries"]) -> Float[Tensor, " queries"]:
    """-log softmax(logits) at `targets`, nats, in float32 or wider.

    A GPU copies nothing, see `can_read_once`; elsewhere a slice of the logits is widened at a time.
    """
    if can_read_once(logits):
        return surprise_read_once(logits, targets)
    rows = max(1, SLICE_ELEMENTS.get(logits.device.type, SLICE_ELEMENTS["cpu"]) // logits.shape[-1])
    parts = []
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        wide = part if part.dtype == torch.float64 else part.float()
        parts.append(wide.logsumexp(-1) - wide.gather(-1, target[:, None])[:, 0])
    return torch.cat(parts)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    ids: Int[Tensor, " tokens"],
    cache: Cache,
    chunk: int | None = None,
    *,
    singles: int = 0,
    listen: Listener = ignore,
) -> Score:
    """Read `ids` through an empty `cache`, and return the surprise of every token after the first.

    `chunk` tokens are fed in one forward pass (None: `natural_chunk`); `chunk=1` is the token-by-token route. The last
    `singles` tokens are fed one by one, which measures latency with the cache full. The very last token is only a
    target and is never fed. The memory needed beyond the cache is that of one chunk, and about 8 bytes for each token
    read.

    Raises InvalidInput for a stream of fewer than two tokens or sizes that make no sense, and UnsupportedOption where
    the model's output is not finite in its data type.
    """
    feed, chunk = ids.numel() - 1, natural_chunk(model) if chunk is None else chunk
    if feed < 1:
        raise InvalidInput(f"a stream to score has at least 2 tokens, got {ids.numel()}")
    if chunk < 1 or not 0 <= singles <= feed:
        raise InvalidInput(f"chunk must be at least 1 and singles from 0 to {feed}, got {chunk} and {singles}")
    nll = np.full(ids.numel(), np.nan)
    steps: list[tuple[int, float, int]] = []
    for start, stop in spans(feed, chunk, singles):
        began = time.perf_counter()
        logits = model(input_ids=ids[None, start:stop], past_key_values=cache, use_cache=True).logits[0]
        found = surprise(logits, ids[start + 1 : stop + 1]).cpu()
        steps.append((stop, 1e3 * (time.perf_counter() - began), bytes_held(cache)))
        nll[start + 1 : stop + 1] = finite(found, start + 1, model.dtype)
        del logits  # the next chunk's must not be made while these are alive
        listen(stop - start)
    read, milliseconds, held = zip(*steps, strict=True)
    return Score(nll, np.array(read), np.array(milliseconds), np.array(held), singles)


def spans(feed: int, chunk: int, singles: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of every step: chunks first, then `singles` steps of one token."""
    bulk = feed - singles
    yield from ((start, min(start + chunk, bulk)) for start in range(0, bulk, chunk))
    yield from ((start, start + 1) for start in range(bulk, feed))


def finite(nll: Float[Tensor, " queries"], first: int, dtype: torch.dtype) -> Float[np.ndarray, " queries"]:
    """The surprise of tokens `first`, `first` + 1, ... as numpy; NaN in it must not pass for 'not scored'."""
    wrong = ~torch.isfinite(nll)
    if wrong.any():
        at = first + int(wrong.nonzero()[0])
        raise UnsupportedOption(f"the model's surprise at token {at} is not finite in {dtype}: load it as float32")
    return nll.double().numpy()
