"""A real stream of ten million tokens on one GPU: perplexity, memory and speed of every million.

    python benchmarks/gpu/stream.py --write-ids ids.npy                     # here: a text as token ids, 2 MB
    python benchmarks/gpu/stream.py --ids ids.npy --json docs/ten-million.json          # where the GPU is
    python benchmarks/gpu/stream.py --draw docs/ten-million.json --picture docs/ten-million.png

The stream is the first million tokens of one text over and over, so that every million is the same text and
perplexities may be compared; only the first one begins with an empty cache. One `Session` scores it in chunks. Memory
is the most that PyTorch held at any moment of a million, counted anew for each. At the end the old session and one
parked after the first million decode in turn, a token each.

The GPU needs no network: `--model` takes the built-in model's GGUF file or any folder that `load` takes (None: the
cache folder, `SINKS_CACHE`), and `--ids` a file that `--write-ids` made with the same tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from sinks.assets.texts import read_text
from sinks.models.load import load
from sinks.reading.provenance import machine, now, version_of, versions
from sinks.reading.tokens import cut, stream_ids
from sinks.stream.session import Session

LIMITS = {"perplexity_change": 0.03, "memory_growth": 0.01}
"""What is promised, as shares of the first million's value."""


@dataclass
class Measured:
    """Of every lap of the loop: perplexity, tokens a second, bytes; and milliseconds of single tokens.

    `peak_bytes` is the most that the GPU held, `held_bytes` what it held afterwards, `resident_bytes` the host process.

    `perplexities_full` leave out the first sinks + window tokens of each lap, and so the cold start of the first.
    """

    perplexities: list[float] = field(default_factory=list)
    perplexities_full: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    held_bytes: list[int] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    decode_parked: list[float] = field(default_factory=list)
    decode_old: list[float] = field(default_factory=list)


def main() -> None:
    """Write the ids, or stream them, or draw what came of it."""
    given = arguments()
    if given.write_ids:
        text = read_text(given.text)
        ids = cut(stream_ids(load(given.model).tokenizer, text.text)[0], given.loop, given.loop, 2)
        np.save(given.write_ids, ids.numpy().astype(np.uint16 if int(ids.max()) < 1 << 16 else np.uint32))
        print(f"{len(ids):,} tokens of {text.name} ({text.sha256[:12]}) in {given.write_ids}")
    elif given.draw:
        draw(json.loads(given.draw.read_text()), given.picture)
    else:
        result = stream(given)
        given.json.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result | {"measured": {}}, indent=2))


def arguments() -> argparse.Namespace:
    """What to do, and with what."""
    parser = argparse.ArgumentParser(description="Ten million tokens through one session.")
    parser.add_argument("--model", help="what load() takes; the built-in model by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", default="bible", help="text of the catalogue whose ids are written")
    parser.add_argument("--ids", type=Path, help=".npy file of the loop's token ids")
    parser.add_argument("--loop", type=int, default=1_000_000, help="tokens of one lap")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="a multiple of --loop")
    parser.add_argument("--chunk", type=int, help="tokens of one forward pass; the device's own by default")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--decoded", type=int, default=100, help="tokens decoded for each median")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-ids", type=Path)
    parser.add_argument("--draw", type=Path, help="JSON file to draw instead")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if sum(each is not None for each in (given.json, given.write_ids, given.draw)) != 1:
        parser.error("give one of --json, --write-ids and --draw")
    if given.json and (given.ids is None or given.tokens % given.loop):
        parser.error(f"--json needs --ids, and --tokens {given.tokens} must be a multiple of --loop {given.loop}")
    if given.draw and given.picture is None:
        parser.error("--draw needs --picture")
    return given


def stream(given: argparse.Namespace) -> dict[str, Any]:
    """Feed, decode, judge."""
    loaded = load(given.model, dtype=given.dtype, device=given.device)
    loop = np.load(given.ids)[: given.loop].astype(np.int64).tolist()
    session = Session(Session.open(loaded).loaded, given.sinks, given.window, chunk=given.chunk)
    measured, parked = Measured(), session.fork()
    parked.score(loop[: 3 * session.chunk])  # compiles; and the first lap finds two sessions held, as the others do
    began = time.perf_counter()
    for lap in range(given.tokens // given.loop):
        feed(session, loop, measured)
        if lap == 0:
            parked = session.fork()
        speed, memory = measured.tokens_per_second[-1], measured.peak_bytes[-1] / 1e6
        told = f"perplexity {measured.perplexities[-1]:.4f}  {speed:,.0f} tokens/s  {memory:.1f} MB"
        print(f"{session.seen:>12,}  {told}", flush=True)
    seconds = time.perf_counter() - began
    in_turn(parked, session, given.decoded, measured)
    about = {
        "created": now(),
        "machine": machine(loaded.model.device),
        "versions": versions() | {"triton": version_of("triton")},
        "model": asdict(loaded.source),
        "settings": {name: getattr(given, name) for name in ("tokens", "loop", "sinks", "window", "dtype", "text")},
    }
    return about | judged(measured, session, seconds, given.tokens)


def feed(session: Session, loop: list[int], measured: Measured) -> None:
    """Score one lap."""
    on_gpu = session.loaded.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    nll = session.score(loop).nll
    measured.tokens_per_second.append(len(loop) / (time.perf_counter() - began))
    measured.peak_bytes.append(torch.cuda.max_memory_allocated() if on_gpu else 0)
    measured.held_bytes.append(torch.cuda.memory_allocated() if on_gpu else 0)
    measured.resident_bytes.append(psutil.Process().memory_info().rss)
    measured.perplexities.append(perplexity(nll))
    measured.perplexities_full.append(perplexity(nll[session.plan.capacity :]))


def perplexity(nll: np.ndarray) -> float:
    """Of all but the first token of a stream, which has no surprise."""
    return math.exp(float(np.nanmean(nll)))


def in_turn(parked: Session, old: Session, tokens: int, measured: Measured) -> None:
    """Decode with both, a token each, after some that are not counted; who is first changes every time."""
    for turn in range(-10, tokens):
        ways = [(parked, measured.decode_parked), (old, measured.decode_old)]
        for session, times in ways if turn % 2 else reversed(ways):
            began = time.perf_counter()
            for _ in session.generate(1):
                pass
            if turn >= 0:
                times.append(1e3 * (time.perf_counter() - began))


def judged(measured: Measured, session: Session, seconds: float, tokens: int) -> dict[str, Any]:
    """Everything as plain data; `found` is what the limits are about."""
    decoded = {name: float(np.median(getattr(measured, f"decode_{name}"))) for name in ("parked", "old")}
    found = {
        "perplexity_change": largest_change(measured.perplexities),
        "memory_growth": largest_change(measured.peak_bytes),
        "decode_change": decoded["old"] / decoded["parked"] - 1,
    }
    return {
        "found": found,
        "limits": LIMITS,
        "kept": {name: abs(found[name]) <= limit for name, limit in LIMITS.items()},
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "chunk": session.chunk,
        "cache_bytes": session.nbytes,
        "evicted": session.evicted,
        "decode_milliseconds": decoded,
        "measured": asdict(measured),
    }


def largest_change(laps: list[Any]) -> float:
    """How far a later lap's value is from the first one's, at most, as a share and with its sign; NaN without two."""
    return max((later / laps[0] - 1 for later in laps[1:] if laps[0]), key=abs, default=math.nan)


def draw(result: dict[str, Any], picture: Path) -> None:
    """Perplexity, memory and speed of every lap, on axes that begin at zero."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured, loop = result["measured"], result["settings"]["loop"]
    whole = Figure(figsize=(12, 3.6), facecolor="white", layout="constrained")
    claim = ": no worse, no larger" if all(result["kept"].values()) else ""
    length = f"{result['settings']['tokens']:,} tokens in {result['seconds']:.0f} seconds"
    whole.suptitle(f"One stream, {length}{claim}", fontweight="bold")
    panels = (
        ("Perplexity, the same text again", measured["perplexities"], 1.0),
        ("Most GPU memory held, MB", measured["peak_bytes"], 1e-6),
        ("Thousand tokens a second", measured["tokens_per_second"], 1e-3),
    )
    for axes, (title, values, unit) in zip(whole.subplots(1, 3), panels, strict=True):
        laps = range(1, len(values) + 1)
        axes.bar(laps, [value * unit for value in values], color="#0072B2")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("million tokens" if loop == 1_000_000 else f"{loop:,} tokens")
        axes.set_ylim(0, 1.15 * max(values) * unit or 1)
        axes.set_xticks(list(laps))
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(whole).print_figure(str(picture), dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
