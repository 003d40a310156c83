"""Scoring a long text in chunks against feeding it token by token: speed, equality of logits, and memory.

    python benchmarks/scoring.py --json benchmarks/results/scoring.json

Token by token is too slow for the whole text, so its time is an estimate: while the text is scored in chunks, every
`--every` chunks a copy of the cache is fed `--singles` of the next tokens one by one. So both are measured all along
the stream, with a full cache, and a busy machine slows both. Equality is checked there too, and from the very start of
the stream until well after the first eviction.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinks.assets.texts import read_text
from sinks.cache.cache import SinkCache
from sinks.evals.compare import warm_up
from sinks.models.attach import attach
from sinks.models.load import load
from sinks.reading.memory import meter_for, watch
from sinks.reading.perplexity import score, surprise
from sinks.reading.provenance import machine, now, versions
from sinks.reading.tokens import stream_ids

SIZES = ((4, 252), (4, 1020))
"""Sinks and window."""

LENGTHS = (10_000, 40_000)
"""Tokens at which peak memory is compared."""


@dataclass
class Tally:
    """Seconds and tokens of each way, and how far their logits are apart beside their rms."""

    chunked_seconds: float = 0.0
    chunked_tokens: int = 0
    single_seconds: float = 0.0
    single_tokens: int = 0
    largest_difference: float = 0.0
    squares: float = 0.0
    compared: int = 0

    @property
    def relative_difference(self) -> float:
        """Largest difference of two logits as a share of the rms of all that were compared."""
        return self.largest_difference / (self.squares / self.compared) ** 0.5

    @property
    def speedup(self) -> float:
        """Tokens a second in chunks over tokens a second one by one."""
        return self.chunked_tokens / self.chunked_seconds * self.single_seconds / self.single_tokens


def main() -> None:
    """Measure both sizes, write the JSON, and print what it says."""
    parser = argparse.ArgumentParser(description="Scoring a text in chunks against token by token.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000, help="length of the text that is scored")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--every", type=int, default=5, help="chunks between two samples of token by token")
    parser.add_argument("--singles", type=int, default=32, help="tokens of one sample")
    given = parser.parse_args()
    text, loaded = read_text(), load()
    model = attach(loaded.model)
    ids = torch.tensor(stream_ids(loaded.tokenizer, text.text)[0])
    longest = max(*LENGTHS, given.tokens)
    ids = ids.repeat(-(-longest // len(ids)))[:longest]
    warm_up(model, ids, given.chunk)
    rows = [measure(model, ids, sizes, given) for sizes in SIZES]
    result = {
        "created": now(),
        "machine": machine(model.device),
        "versions": versions(),
        "model": asdict(loaded.source),
        "text": {"name": text.name, "sha256": text.sha256},
        "memory_method": meter_for(model.device).method,
        "rows": rows,
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row, indent=2))


def measure(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, int], given: argparse.Namespace) -> dict[str, Any]:
    """Everything about one pair of sinks and window."""
    sinks, window = sizes
    start = from_the_start(model, ids, sizes, given.chunk)
    along = all_along(model, ids[: given.tokens], sizes, given)
    peaks = {length: peak_bytes(model, ids[:length], sizes, given.chunk) for length in LENGTHS}
    return {
        "sinks": sinks,
        "window": window,
        "chunk": given.chunk,
        "tokens": given.tokens,
        "chunked_seconds": along.chunked_seconds,
        "token_by_token_seconds_estimated": along.single_seconds * given.tokens / along.single_tokens,
        "token_by_token_sample": along.single_tokens,
        "speedup": along.speedup,
        "relative_difference": {"from_the_start": start.relative_difference, "all_along": along.relative_difference},
        "compared_tokens": {"from_the_start": start.single_tokens, "all_along": along.single_tokens},
        "peak_bytes": peaks,
        "peak_growth_bytes": peaks[LENGTHS[1]] - peaks[LENGTHS[0]],
    }


@torch.inference_mode()
def from_the_start(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, int], chunk: int) -> Tally:
    """Feed the stream's beginning, twice as many tokens as there are keys, to two caches."""
    sinks, window = sizes
    chunked, single = (SinkCache.for_model(model, sinks=sinks, window=window) for _ in range(2))
    tally = Tally()
    for part in ids[: 2 * (sinks + window)].split(chunk):
        compare(model, part, feed(model, part, chunked, tally), single, tally)
    return tally


@torch.inference_mode()
def all_along(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, int], given: argparse.Namespace) -> Tally:
    """Score all of `ids` in chunks, and a sample of it with copies of the cache that read one token at a time."""
    sinks, window = sizes
    cache, tally = SinkCache.for_model(model, sinks=sinks, window=window), Tally()
    parts = ids.split(given.chunk)
    for number, (part, targets) in enumerate(zip(parts, ids[1:].split(given.chunk), strict=False)):
        sampled = number % given.every == 0 and number * given.chunk >= sinks + window
        copied = copy.deepcopy(cache) if sampled else None
        logits = feed(model, part, cache, tally)
        began = time.perf_counter()
        surprise(logits[: len(targets)], targets)
        tally.chunked_seconds += time.perf_counter() - began
        if copied:
            compare(model, part[: given.singles], logits, copied, tally)
    return tally


def feed(model: PreTrainedModel, ids: Tensor, cache: Cache, tally: Tally) -> Tensor:
    """Logits [tokens, vocab] after feeding all of `ids` at once."""
    began = time.perf_counter()
    logits = model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0]
    tally.chunked_seconds += time.perf_counter() - began
    tally.chunked_tokens += len(ids)
    return logits


def compare(model: PreTrainedModel, ids: Tensor, expected: Tensor, cache: Cache, tally: Tally) -> None:
    """Feed `ids` one by one, and compare their logits with those `expected` [tokens or more, vocab]."""
    for token, row in zip(ids, expected, strict=False):
        began = time.perf_counter()
        logits = model(input_ids=token[None, None], past_key_values=cache, use_cache=True).logits[0, 0]
        tally.single_seconds += time.perf_counter() - began
        tally.single_tokens += 1
        tally.largest_difference = max(tally.largest_difference, (logits - row).abs().max().item())
        tally.squares += row.square().sum(dtype=torch.float64).item()
        tally.compared += row.numel()


def peak_bytes(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, int], chunk: int) -> int:
    """Most memory held above the model while all of `ids` is scored."""
    sinks, window = sizes
    with watch(meter_for(model.device)) as peak:
        score(model, ids, SinkCache.for_model(model, sinks=sinks, window=window), chunk)
    return peak.bytes


if __name__ == "__main__":
    main()
