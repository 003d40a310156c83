"""One session, hundreds of thousands of tokens: does its memory grow, does it slow down, does it get worse?

    python benchmarks/soak.py --tokens 300000 --json docs/soak.json --picture docs/soak.png

The stream is one text over and over: as many tokens of it as are a sixth of the stream (50,000 of 300,000), so that
every block is the same text and perplexities may be compared. A copy of the session is parked early (after 10,000 of
300,000 tokens). At the end parked and old session decode in turn, a token each, so that a busy machine slows both; the
early one is also timed at the time. Resident memory is what the system says, nothing is freed or trimmed for it.

The JSON is written anew after every sample, `complete` being false until the end.
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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sinks.assets.texts import read_text
from sinks.models.load import load
from sinks.reading.provenance import machine, now, versions
from sinks.reading.tokens import cut, stream_ids
from sinks.stream.session import Session

BLOCKS = 6
SAMPLES = 30
"""Times that resident memory is taken along the stream; the first of them is when the copy is parked."""

LIMITS = {"resident_growth": 0.02, "decode_change": 0.05, "perplexity_change": 0.03}
"""What is promised, as shares of the early value."""


@dataclass
class Measured:
    """Everything that is found, in the order in which it is found.

    `resident` holds (tokens, bytes); `decode_*` milliseconds of single tokens: `early` when the copy was parked, and
    `parked` and `old` in turn at the end. `blocks` are the perplexities of all tokens of a block, `blocks_full` those
    without its first sinks + window tokens, so that the beginning of the very first block is left out of it.
    """

    resident: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 0.0
    decode_early: list[float] = field(default_factory=list)
    decode_parked: list[float] = field(default_factory=list)
    decode_old: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    blocks_full: list[float] = field(default_factory=list)


def main() -> None:
    """Feed, decode, judge, write."""
    parser = argparse.ArgumentParser(description="One session fed a long stream: memory, speed and perplexity.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="PNG file; none by default")
    parser.add_argument("--tokens", type=int, default=18_000, help="a multiple of 30; 300000 takes ten minutes")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--decoded", type=int, default=200, help="tokens decoded for each median")
    given = parser.parse_args()
    if given.tokens % SAMPLES:
        parser.error(f"--tokens {given.tokens} is no multiple of {SAMPLES}")
    text, loaded = read_text(), load()
    block = given.tokens // BLOCKS
    loop = cut(stream_ids(loaded.tokenizer, text.text)[0], block, block, given.sinks + given.window).tolist()
    about = {
        "created": now(),
        "machine": machine(loaded.model.device),
        "versions": versions(),
        "model": asdict(loaded.source),
        "text": {"name": text.name, "sha256": text.sha256, "loop_tokens": block},
        "settings": {name: getattr(given, name) for name in ("tokens", "sinks", "window", "decoded")},
    }
    session = Session.open(loaded, sinks=given.sinks, window=given.window)
    measured = Measured()
    parked = feed(session, loop, given, about, measured)
    in_turn(parked, session, given.decoded, measured)
    result = report(about, measured, session.nbytes)
    write(given.json, result)
    if given.picture:
        FigureCanvasAgg(figure(result)).print_figure(str(given.picture), dpi=150, facecolor="white")
    print(json.dumps(result["found"], indent=2))


def feed(session: Session, loop: list[int], given: argparse.Namespace, about: dict[str, Any], measured: Measured):
    """Score the whole stream; returns the copy that was parked at the first sample."""
    step, process, parked = given.tokens // SAMPLES, psutil.Process(), session
    of_block: list[np.ndarray] = []
    for begin in range(0, given.tokens, step):
        at = begin % len(loop)
        began = time.perf_counter()
        of_block.append(session.score(loop[at : at + step]).nll)
        measured.seconds += time.perf_counter() - began
        if begin == 0:
            parked = session.fork()
            measured.decode_early = decode(session.fork(), given.decoded)
        if at + step == len(loop):
            nll = np.concatenate(of_block)
            measured.blocks.append(perplexity(nll))
            measured.blocks_full.append(perplexity(nll[given.sinks + given.window :]))
            of_block = []
        measured.resident.append((session.seen, process.memory_info().rss))
        write(given.json, report(about, measured, session.nbytes, complete=False))
        speed = session.seen / measured.seconds
        memory = measured.resident[-1][1] / 1e6
        print(f"{session.seen:>9,} tokens  {speed:5.0f} tokens/s  {memory:7.1f} MB resident", flush=True)
    return parked


def perplexity(nll: np.ndarray) -> float:
    """Of all but the first token of a stream, which has no surprise."""
    return math.exp(float(np.nanmean(nll)))


def decode(session: Session, tokens: int) -> list[float]:
    """Milliseconds of each of so many decoded tokens, after one that is not counted."""
    return [single(session) for _ in range(tokens + 1)][1:]


def single(session: Session) -> float:
    """Milliseconds of one greedy token: a forward pass, and its choice."""
    began = time.perf_counter()
    for _ in session.generate(1):
        pass
    return 1e3 * (time.perf_counter() - began)


def in_turn(parked: Session, old: Session, tokens: int, measured: Measured) -> None:
    """Decode with both, a token each; who is first changes every time."""
    for session in (parked, old):
        single(session)
    for turn in range(tokens):
        ways = [(parked, measured.decode_parked), (old, measured.decode_old)]
        for session, times in ways if turn % 2 else reversed(ways):
            times.append(single(session))


def report(about: dict[str, Any], measured: Measured, cache_bytes: int, complete: bool = True) -> dict[str, Any]:
    """Everything as plain data; `found` is what the limits are about, null as long as it is not known."""
    resident, blocks = measured.resident, measured.blocks
    # Three samples in is a tenth of the stream: 30,000 of 300,000 tokens.
    growth = resident[-1][1] / resident[2][1] - 1 if len(resident) > 2 else None
    medians = {
        name: float(np.median(times)) if times else None
        for name, times in (
            ("early", measured.decode_early),
            ("parked", measured.decode_parked),
            ("old", measured.decode_old),
        )  # fmt: skip
    }
    old, before, early = medians["old"], medians["parked"], medians["early"]
    found: dict[str, float | None] = {
        "resident_growth": growth,
        "decode_change": old / before - 1 if old and before else None,
        "decode_change_at_the_time": old / early - 1 if old and early else None,
        "perplexity_change": largest_change(blocks),
        "perplexity_change_after_filling": largest_change(measured.blocks_full),
    }
    kept = {name: abs(value) < LIMITS[name] for name, value in found.items() if name in LIMITS and value is not None}
    return about | {
        "complete": complete,
        "found": found,
        "limits": LIMITS,
        "kept": kept,
        "cache_bytes": cache_bytes,
        "tokens_per_second": resident[-1][0] / measured.seconds if resident else None,
        "decode_milliseconds": medians,
        "measured": asdict(measured),
    }


def largest_change(blocks: list[float]) -> float | None:
    """How far the perplexity of a later block is from the first one's, at most, as a share and with its sign."""
    return max((later / blocks[0] - 1 for later in blocks[1:]), key=abs, default=None)


def write(path: Path, result: dict[str, Any]) -> None:
    """The JSON, in one step: a reader never sees half of it."""
    half = path.with_name(path.name + ".part")
    half.write_text(json.dumps(result, indent=2) + "\n")
    half.replace(path)


# The picture


def figure(result: dict[str, Any]) -> Figure:
    """Resident memory, decode time and perplexity along the stream."""
    whole = Figure(figsize=(12, 3.6), facecolor="white", layout="constrained")
    tokens = result["settings"]["tokens"]
    claim = ": no larger, no slower, no worse" if all(result["kept"].values()) else ""
    whole.suptitle(f"One session, {tokens:,} tokens{claim}", fontweight="bold")
    memory, speed, quality = whole.subplots(1, 3)
    measured = result["measured"]
    seen, held = zip(*measured["resident"], strict=True)
    memory.plot([0, *seen], [held[0] / 1e6, *(each / 1e6 for each in held)], color="#0072B2", lw=2)
    dress(memory, "Resident memory, MB", "tokens read", max(held) / 1e6)
    for name, label, colour in (("parked", "parked early", "#999999"), ("old", f"after {tokens:,}", "#0072B2")):
        speed.plot(measured[f"decode_{name}"], color=colour, lw=1, label=label)
    dress(speed, "Milliseconds a decoded token, in turn", "tokens decoded", 2 * result["decode_milliseconds"]["old"])
    speed.legend(frameon=False)
    quality.bar(range(1, BLOCKS + 1), measured["blocks"], color="#0072B2")
    dress(quality, f"Perplexity, the same {tokens // BLOCKS:,} tokens again", "block", max(measured["blocks"]))
    return whole


def dress(axes: Axes, title: str, along: str, most: float) -> None:
    """Axes that begin at zero, or a flat line would not look flat."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(along)
    axes.set_ylim(0, 1.15 * most)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
