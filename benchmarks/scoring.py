"""Scoring a long text in chunks against feeding it token by token: speed, equality of logits, and memory.

    python benchmarks/scoring.py --json benchmarks/results/scoring.json

One stream is fed to two caches in turn, a chunk to one and the same tokens singly to the other, so that a busy machine
slows both, and the logits are compared on the way. Token by token is too slow for the whole text: its time is measured
on `--sample` tokens with the cache full, and said to be an estimate. Chunks read the whole text.
"""

from __future__ import annotations

import argparse
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
from sinks.evals.memory import meter_for, watch
from sinks.evals.perplexity import score
from sinks.evals.tokens import stream_ids
from sinks.models.attach import attach
from sinks.models.load import load
from sinks.report.provenance import machine, now, versions

SIZES = ((4, 252), (4, 1020))
"""Sinks and window."""

LENGTHS = (10_000, 40_000)
"""Tokens at which peak memory is compared."""


@dataclass(frozen=True)
class Pair:
    """The same tokens both ways: seconds of each, and the largest difference of two logits beside their rms."""

    tokens: int
    chunked_seconds: float
    single_seconds: float
    largest_difference: float
    logit_rms: float


def main() -> None:
    """Measure both sizes, write the JSON, and print what it says."""
    parser = argparse.ArgumentParser(description="Scoring a text in chunks against token by token.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000, help="length of the text that is scored")
    parser.add_argument("--sample", type=int, default=512, help="tokens whose time is measured both ways")
    parser.add_argument("--chunk", type=int, default=256)
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
    pair = both_ways(model, ids, sizes, given.sample, given.chunk)
    began = time.perf_counter()
    score(model, ids[: given.tokens], SinkCache.for_model(model, sinks=sinks, window=window), given.chunk)
    seconds = time.perf_counter() - began
    estimate = given.tokens * pair.single_seconds / pair.tokens
    peaks = {length: peak_bytes(model, ids[:length], sizes, given.chunk) for length in LENGTHS}
    return {
        "sinks": sinks,
        "window": window,
        "chunk": given.chunk,
        "tokens": given.tokens,
        "chunked_seconds": seconds,
        "chunked_tokens_per_second": given.tokens / seconds,
        "token_by_token_seconds_estimated": estimate,
        "speedup": estimate / seconds,
        "speedup_on_the_sample": pair.single_seconds / pair.chunked_seconds,
        "sample": asdict(pair),
        "relative_difference": pair.largest_difference / pair.logit_rms,
        "peak_bytes": peaks,
        "peak_growth_bytes": peaks[LENGTHS[1]] - peaks[LENGTHS[0]],
    }


@torch.inference_mode()
def both_ways(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, int], sample: int, chunk: int) -> Pair:
    """Feed the stream's beginning to two caches, in chunks and singly; time `sample` tokens after both are full."""
    sinks, window = sizes
    chunked, single = (SinkCache.for_model(model, sinks=sinks, window=window) for _ in range(2))
    full = -(-(sinks + window) // chunk) * chunk
    chunked_seconds = single_seconds = difference = squares = 0.0
    count = 0
    for start in range(0, full + sample, chunk):
        part = ids[start : min(start + chunk, full + sample)]
        expected, seconds = clock(model, part, chunked)
        chunked_seconds += seconds if start >= full else 0.0
        for row, token in zip(expected, part, strict=True):
            logits, seconds = clock(model, token[None], single)
            single_seconds += seconds if start >= full else 0.0
            difference = max(difference, (logits[0] - row).abs().max().item())
        squares, count = squares + expected.square().sum(dtype=torch.float64).item(), count + expected.numel()
    return Pair(sample, chunked_seconds, single_seconds, difference, (squares / count) ** 0.5)


def clock(model: PreTrainedModel, ids: Tensor, cache: Cache) -> tuple[Tensor, float]:
    """Logits [tokens, vocab] after feeding `ids`, and the seconds it took."""
    began = time.perf_counter()
    logits = model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0]
    return logits, time.perf_counter() - began


def peak_bytes(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, int], chunk: int) -> int:
    """Most memory held above the model while all of `ids` is scored."""
    sinks, window = sizes
    with watch(meter_for(model.device)) as peak:
        score(model, ids, SinkCache.for_model(model, sinks=sinks, window=window), chunk)
    return peak.bytes


if __name__ == "__main__":
    main()
