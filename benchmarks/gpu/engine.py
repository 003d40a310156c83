"""What an engine costs on a GPU beside its step: random weights in the shape of Llama-3.2-1B, bfloat16.

    python benchmarks/gpu/engine.py --json benchmarks/results/engine-h200.json

`streams`: tokens a second of an engine with so many streams, greedy or sampled, of the bare step (the same rows in a
graph that is replayed and asked nothing), and of the model called in a loop that does nothing else. They take turns;
medians; `share` is of the bare step. `session`: the same for one session. `gap`: one stream writes while a long prompt
is read; the longest time between two of its tokens, against the time of one chunk and of one step. `park`:
milliseconds to put a stream away to the host, and to bring it back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sinks.cache.cache import SinkCache
from sinks.cache.group import Group
from sinks.cache.pool import Pool
from sinks.evals.speed.gpu.shapes import SHAPES
from sinks.models.attach import attach
from sinks.models.load import Loaded, Source
from sinks.models.step.hasten import hasten, steps_of
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.rows.batch import warm_up
from sinks.stream.sampling import GREEDY, Sampling
from sinks.stream.session import Session

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made(shape: str) -> Loaded:
    """A random model of this shape on the GPU, hastened, and a tokenizer that writes every token as four letters."""
    model = SHAPES[shape].build()
    settings: Any = model.generation_config
    settings.eos_token_id = None
    words = ("".join(letters) for letters in product(LETTERS, repeat=4))
    names = {next(words): token for token in range(model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(names, unk_token="aaaa"))
    tokenizer.decoder = decoders.ByteLevel()
    hasten(attach(model))
    return Loaded(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), Source(shape, "folder", "none", "", ""))


def timed(work: Callable[[], object]) -> float:
    """Wall clock of one call, seconds, the device included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def seated(loaded: Loaded, rows: int, read: int) -> tuple[Pool, list[SinkCache]]:
    """`rows` streams in a pool that have read so many tokens."""
    pool, moment = Pool(loaded.model, rows), read_by_one(loaded, read)._cache.dump()
    caches = [pool.take() for _ in range(rows)]
    for cache in caches:
        cache.adopt(moment)
    return pool, caches


def bare(loaded: Loaded, rows: int, read: int) -> Callable[[int], None]:
    """Greedy steps of `rows` streams and nothing else, not even a question: a call takes so many."""
    pool, caches = seated(loaded, rows, read)
    forward: Any = loaded.model.forward
    with torch.inference_mode():
        step = forward.captured(pool.seats)
    seats = [cache.seat.number for cache in caches if cache.seat is not None]
    step([1] * rows, seats, [read] * rows)
    return lambda count: (step.run(count), caches)[0]


def called(loaded: Loaded, rows: int, read: int) -> Callable[[int], None]:
    """The same through the model's own call, whose next tokens stay on the device."""
    model: Any = loaded.model
    _, caches = seated(loaded, rows, read)
    newest = torch.ones(rows, 1, dtype=torch.int64, device="cuda")

    @torch.inference_mode()
    def steps(count: int) -> None:
        given = newest
        for _ in range(count):
            logits = model(input_ids=given, past_key_values=Group(caches), use_cache=True).logits
            given = logits[:, -1].argmax(-1, keepdim=True)

    return steps


def read_by_one(loaded: Loaded, read: int) -> Session:
    """A session that has read so many tokens; copies of its moment fill a batch."""
    own = Session(loaded, chunk=2048)
    own.feed([1] * read)
    return own


def engine_of(loaded: Loaded, rows: int, read: int, sampling: Sampling) -> Engine:
    """An engine all of whose slots write, without end."""
    engine, moment = Engine(loaded, rows, queue=rows, chunk=2048), read_by_one(loaded, read)
    warm_up(engine._ground)
    requests = [engine.join(moment).submit(sampling=sampling) for _ in range(rows)]
    while any(not request.tokens for request in requests):
        engine.step()
    return engine


def drained(engine: Engine, steps: int) -> None:
    """So many steps, their pieces taken by their readers."""
    for _ in range(steps):
        engine.step()
    for request in list(engine._register.requests.values()):
        request.take()


def streams(
    loaded: Loaded, rows: int, read: int, steps: int, turns: int, sampling: Sampling = GREEDY
) -> dict[str, float]:
    """Tokens a second of the engine and of the bare step, in turn."""
    engine, alone = engine_of(loaded, rows, read, sampling), bare(loaded, rows, read)
    asked = called(loaded, rows, read)
    works = [lambda: drained(engine, steps), lambda: alone(steps), lambda: asked(steps)]
    for work in works:
        work()
    found = [[timed(work) for work in works] for _ in range(turns)]
    engine.close()
    together, step, call = (statistics.median(column) / steps for column in zip(*found, strict=True))
    return {
        "engine_tok_s": rows / together, "bare_tok_s": rows / step, "engine_ms": 1000 * together,
        "bare_ms": 1000 * step, "called_ms": 1000 * call, "share": step / together,
    }  # fmt: skip


def session(loaded: Loaded, read: int, steps: int, turns: int) -> dict[str, float]:
    """Tokens a second of one session, and of the bare step."""
    own = read_by_one(loaded, read)
    writing, alone = own.generate(), bare(loaded, 1, read)
    works = [lambda: [next(writing) for _ in range(steps)], lambda: alone(steps)]
    for work in works:
        work()
    found = [[timed(work) for work in works] for _ in range(turns)]
    one, step = (statistics.median(column) / steps for column in zip(*found, strict=True))
    return {"session_tok_s": 1 / one, "bare_tok_s": 1 / step, "share": step / one}


def gap(loaded: Loaded, prompt: int, chunk: int) -> dict[str, float]:
    """Milliseconds between two tokens of a writer: the longest while a prompt is read, and the median before it."""
    engine = Engine(loaded, 2, chunk=chunk)
    warm_up(engine._ground)
    writer = engine.submit([1] * 1200)
    while writer.tokens < 50:
        engine.step()
        writer.take()

    def gaps(until: Callable[[], bool]) -> list[float]:
        found = list[float]()
        while not until():
            found.append(1000 * timed(engine.step))
            writer.take()
        return found

    quiet = gaps(lambda: writer.tokens >= 150)
    reader = engine.submit([2] * prompt, max_tokens=1)
    busy = gaps(lambda: reader.finish is not None)
    engine.close()
    cache = SinkCache.for_model(loaded.model)
    ids = torch.ones(1, chunk, dtype=torch.int64, device="cuda")
    base: Any = loaded.model.base_model
    with torch.inference_mode():
        chunks = [timed(lambda: base(input_ids=ids, past_key_values=cache, use_cache=True)) for _ in range(9)]
    return {
        "longest_ms": max(busy), "median_while_reading_ms": statistics.median(busy),
        "step_ms": statistics.median(quiet), "chunk_ms": 1000 * statistics.median(chunks[2:]), "chunk": chunk,
    }  # fmt: skip


def park(loaded: Loaded, read: int, times: int) -> dict[str, float]:
    """Milliseconds to put one stream away, for the caller and until it is there, and to bring it back."""
    engine = Engine(loaded, 1)
    stream = engine.join()
    out, back = list[float](), list[float]()
    asked, megabytes = list[float](), 0.0
    for _ in range(times):
        stream.submit([1] * read, max_tokens=1).text()
        began = time.perf_counter()
        stream.park()
        asked.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        out.append(time.perf_counter() - began)
        row = stream.moment
        assert row is not None
        back.append(timed(row.sit))
        megabytes = row.cache.nbytes / 1e6
        row.away()
    engine.close()
    return {"out_ms": 1000 * statistics.median(out), "asked_ms": 1000 * statistics.median(asked),
            "back_ms": 1000 * statistics.median(back), "megabytes": megabytes}  # fmt: skip


def main() -> None:
    """Measure, print as it comes, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.2-1B")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--read", type=int, default=1200, help="tokens each stream has read")
    parser.add_argument("--steps", type=int, default=100, help="steps of each turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=16_384, help="tokens of the prompt that interrupts")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the results here")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    loaded = made(flags.shape)
    results: dict[str, Any] = {
        "machine": {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__},
        "shape": flags.shape,
        "steps": steps_of(loaded.model),
    }
    parts: dict[str, Callable[[], object]] = {
        f"streams_{rows}": lambda rows=rows: streams(loaded, rows, flags.read, flags.steps, flags.turns)
        for rows in flags.rows
    }
    kinds = {"top_p": Sampling(0.8, top_p=0.95), "top_k_p": Sampling(0.8, top_k=50, top_p=0.95),
             "penalised": Sampling(0.8, top_p=0.95, repetition_penalty=1.1)}  # fmt: skip
    for kind, sampling in kinds.items():
        for rows in {8, 64} & set(flags.rows):
            parts[f"streams_{rows}_{kind}"] = lambda rows=rows, sampling=sampling: streams(
                loaded, rows, flags.read, flags.steps, flags.turns, sampling
            )
    parts["session"] = lambda: session(loaded, flags.read, flags.steps, flags.turns)
    parts["gap"] = lambda: gap(loaded, flags.prompt, flags.chunk)
    parts["park"] = lambda: park(loaded, flags.read, 9)
    print(json.dumps(results), flush=True)
    for name, work in parts.items():
        results[name] = work()
        print(name, json.dumps(results[name]), flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
