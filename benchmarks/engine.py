"""What a batch gains, and what a long prompt costs the others: the built-in model, float32, on the CPU.

    python benchmarks/engine.py --json benchmarks/results/engine.json

`speed`: one session, and an engine of as many ragged streams as it has slots, take the same number of steps in turn;
tokens a second of each, and the median of the ratios of a turn. `gap`: one row writes while a prompt is read in chunks;
the longest time between two of its tokens, against the time of one chunk, which a session alone reads for comparison.
`profile`: where the time of a batched step goes, with the model's own products alone beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sinks.assets.texts import read_text
from sinks.models.attach import attach
from sinks.models.load import Loaded, load
from sinks.reading.provenance import machine, now, versions
from sinks.reading.tokens import stream_ids
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.request import Request
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session


def timed(work: Callable[[], object]) -> float:
    """Wall clock of one call, seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def endless(loaded: Loaded) -> Sampling:
    """Greedy, with the end token forbidden."""
    return Sampling(logit_bias={int(loaded.tokenizer.eos_token_id): float("-inf")})  # type: ignore[arg-type]


def filled(loaded: Loaded, ids: list[int], slots: int, longest: int) -> tuple[Engine, list[Request]]:
    """An engine all of whose rows write, ragged: the n-th has read n / `slots` of `longest` tokens."""
    engine = Engine(loaded, slots)
    lengths = [longest * (n + 1) // slots for n in range(slots)]
    prompts = [ids[17 * n : 17 * n + length] for n, length in enumerate(lengths)]
    requests = [engine.submit(prompt, sampling=endless(loaded)) for prompt in prompts]
    while any(request.tokens < 2 for request in requests):
        engine.step()
    return engine, requests


def speed(loaded: Loaded, ids: list[int], slots: int, longest: int, steps: int, turns: int) -> dict[str, Any]:
    """Tokens a second of one session and of the engine, in turn; the session has read `longest` tokens."""
    session = Session(loaded)
    session.feed(ids[:longest])
    writing = session.generate(sampling=endless(loaded))
    next(writing)
    engine, requests = filled(loaded, ids, slots, longest)

    def one() -> float:
        before = session.seen
        spent = timed(lambda: [next(writing) for _ in range(steps)])
        return (session.seen - before) / spent

    def many() -> float:
        before = sum(request.tokens for request in requests)
        spent = timed(lambda: [engine.step() for _ in range(steps)])
        for request in requests:
            request.take()
        return (sum(request.tokens for request in requests) - before) / spent

    found = [(one(), many()) for _ in range(turns)]
    engine.close()
    return {
        "slots": slots,
        "prompt_tokens": [longest * (n + 1) // slots for n in range(slots)],
        "session_tokens_per_second": [each for each, _ in found],
        "engine_tokens_per_second": [each for _, each in found],
        "ratio": statistics.median(many / one for one, many in found),
        "ratio_of_best": max(many for _, many in found) / max(one for one, _ in found),
    }


def gap(loaded: Loaded, ids: list[int], prompt: int, chunk: int) -> dict[str, Any]:
    """Times between two tokens of a writer while a prompt is read, and the chunks of that prompt alone."""
    engine = Engine(loaded, 2, chunk=chunk)
    writer = engine.submit(ids[:64], sampling=endless(loaded))
    while writer.tokens < 5:
        engine.step()
    undisturbed = [timed(engine.step) for _ in range(10)]
    reader = engine.submit(ids[:prompt], max_tokens=1)
    gaps: list[float] = []
    while reader.finish is None:
        before = writer.tokens
        gaps.append(timed(engine.step))
        assert writer.tokens == before + 1
        writer.take()
    engine.close()
    session = Session(loaded, chunk=chunk)
    chunks = [timed(lambda at=at: session.feed(ids[at : at + chunk])) for at in range(0, prompt, chunk)]
    step, one = statistics.median(undisturbed), max(chunks)
    return {
        "prompt_tokens": prompt,
        "chunk": chunk,
        "longest_gap_seconds": max(gaps),
        "median_gap_seconds": statistics.median(gaps),
        "undisturbed_step_seconds": step,
        "longest_chunk_seconds": one,
        "median_chunk_seconds": statistics.median(chunks),
        "longest_gap_over_chunk_and_step": max(gaps) / (one + step),
    }


@torch.inference_mode()
def profile(loaded: Loaded, ids: list[int], slots: int, longest: int, steps: int) -> dict[str, float]:
    """Milliseconds: a batched step, and the same tokens through the model alone, which is its products."""
    engine, _ = filled(loaded, ids, slots, longest)
    fed = torch.tensor(ids[:slots])[:, None]
    works = [engine.step, lambda: read_alone(loaded, fed), lambda: read_alone(loaded, fed[:1])]
    found = [[timed(work) for work in works] for _ in range(steps)]
    engine.close()
    step, products, single = (1000 * statistics.median(column) for column in zip(*found, strict=True))
    return {"step_ms": step, "products_of_all_rows_ms": products, "products_of_one_row_ms": single}


def read_alone(loaded: Loaded, fed: torch.Tensor) -> None:
    """One token a row through the model, without a past."""
    loaded.model(input_ids=fed, use_cache=False)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--longest", type=int, default=1600, help="tokens read by the longest row")
    parser.add_argument("--steps", type=int, default=20, help="steps of each turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt that interrupts; 0: none")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    loaded = load()
    attach(loaded.model)
    ids = stream_ids(loaded.tokenizer, read_text().text[:60_000])[0]
    results = {
        "created": now(),
        "model": loaded.source.name,
        "machine": machine(loaded.model.device),
        "versions": versions(),
        "threads": flags.threads,
        "speed": speed(loaded, ids, flags.slots, flags.longest, flags.steps, flags.turns),
        "profile": profile(loaded, ids, flags.slots, flags.longest, flags.steps),
        "gap": gap(loaded, ids, flags.prompt, flags.chunk) if flags.prompt else None,
    }
    print(json.dumps({key: results[key] for key in ("speed", "profile", "gap")}, indent=1))
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
