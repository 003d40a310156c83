"""Scores a stream: the surprise of every token, in memory that does not grow with the text.

The stream is fed in chunks, and after each chunk only the surprise of its tokens is kept. Logits live for one chunk, [chunk, vocab], and
the log-softmax widens them to float32 a few rows at a time.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.evals.memory import bytes_held

Listener = Callable[[int], None]  # hears how many more tokens were read

SLICE_ELEMENTS = 1 << 22  # logits widened to float32 at a time: 16 MiB


def ignore(_: int) -> None:
    """A listener for those who do not watch."""


@dataclass(frozen=True)
class Score:
    """What one reader thought of one stream.

    Attributes:
        nll: float64 [tokens], nats. `nll[i]` = -log p(token i | what was visible); NaN where token i was not scored, as token 0 never is.
        read: int64 [steps], tokens read when each step ended.
        milliseconds: float64 [steps], wall clock of each step: forward pass and log-softmax.
        cache_bytes: int64 [steps], bytes of keys and values held when each step ended.
        singles: how many of the last steps read exactly one token; their time is the latency.
    """

    nll: np.ndarray
    read: np.ndarray
    milliseconds: np.ndarray
    cache_bytes: np.ndarray
    singles: int

    @property
    def scored(self) -> np.ndarray:
        """bool [tokens]: which targets have a surprise."""
        return ~np.isnan(self.nll)

    @property
    def latency(self) -> float:
        """Median milliseconds of a step that reads one token; NaN if there was none."""
        return float(np.median(self.milliseconds[-self.singles :])) if self.singles else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Tokens read a second in the steps before the single ones; over all steps if there are only single ones."""
        bulk = len(self.read) - self.singles
        if bulk == 0:
            return 1e3 * len(self.read) / float(self.milliseconds.sum())
        return 1e3 * float(self.read[bulk - 1]) / float(self.milliseconds[:bulk].sum())


def perplexity(nll: np.ndarray, where: np.ndarray | slice = slice(None)) -> float:
    """exp of the mean surprise over the scored targets among `where`; NaN if none of them was scored.

    Args:
        nll: float [tokens], nats, NaN where not scored.
        where: a mask [tokens] or a slice.
    """
    chosen = nll[where]
    chosen = chosen[~np.isnan(chosen)]
    return float(np.exp(chosen.mean())) if chosen.size else float("nan")


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[targets], in float32 or wider whatever the model computes in.

    Args:
        logits: [queries, vocab].
        targets: [queries], token ids.

    Returns:
        float32 or float64 [queries], nats. No copy of `logits` larger than 16 MiB (or one row) is made.
    """
    rows = max(1, SLICE_ELEMENTS // logits.shape[-1])
    parts = []
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        wide = part if part.dtype == torch.float64 else part.float()
        parts.append(wide.logsumexp(-1) - wide.gather(-1, target[:, None])[:, 0])
    return torch.cat(parts)


@torch.inference_mode()
def score(
    model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int = 256, *, singles: int = 0, listen: Listener = ignore
) -> Score:
    """Reads `ids` through `cache` and returns the surprise of every token after the first.

    The last token is a target only and is never fed. With `chunk=1` this is the token-by-token route.

    Args:
        model: a causal language model; one that `attach` prepared, if `cache` is a `SinkCache`.
        ids: int64 [tokens], one stream, on the model's device.
        cache: an empty cache; it holds the end of the stream afterwards.
        chunk: tokens fed in one forward pass.
        singles: how many tokens at the end are fed one by one, to measure latency with the cache full.
        listen: called after each step with the number of tokens it read.

    Raises:
        InvalidInput: fewer than two tokens, `chunk` below 1, or `singles` not in 0 .. tokens - 1.
        UnsupportedOption: the model's logits are not finite in its data type.
    """
    feed = ids.numel() - 1
    if ids.ndim != 1 or feed < 1:
        raise InvalidInput(f"a stream to score is one row of at least 2 tokens, got shape {tuple(ids.shape)}")
    if chunk < 1 or not 0 <= singles <= feed:
        raise InvalidInput(f"chunk must be at least 1 and singles in 0..{feed}, got chunk={chunk}, singles={singles}")
    nll = np.full(ids.numel(), np.nan)
    steps: list[tuple[int, float, int]] = []
    for start, stop in spans(feed, chunk, singles):
        began = time.perf_counter()
        logits = model(input_ids=ids[None, start:stop], past_key_values=cache, use_cache=True).logits[0]
        found = surprise(logits, ids[start + 1 : stop + 1]).cpu()
        steps.append((stop, 1e3 * (time.perf_counter() - began), bytes_held(cache)))
        nll[start + 1 : stop + 1] = finite(found, start + 1, model.dtype)
        del logits  # two chunks of logits must never be alive at once
        listen(stop - start)
    read, milliseconds, held = zip(*steps, strict=True)
    return Score(nll, np.array(read), np.array(milliseconds), np.array(held), singles)


def spans(feed: int, chunk: int, singles: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of every step: chunks first, then `singles` steps of one token."""
    bulk = feed - singles
    yield from ((start, min(start + chunk, bulk)) for start in range(0, bulk, chunk))
    yield from ((start, start + 1) for start in range(bulk, feed))


def finite(nll: Tensor, first: int, dtype: torch.dtype) -> np.ndarray:
    """`nll` [queries] as numpy, or an error: a surprise that is not a number must not pass for 'not scored'."""
    wrong = ~torch.isfinite(nll)
    if wrong.any():
        at = first + int(wrong.nonzero()[0])
        raise UnsupportedOption(f"the model's surprise at token {at} is not finite in {dtype}; use --dtype float32")
    return nll.double().numpy()
