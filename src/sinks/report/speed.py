"""What `sinks bench cpu` prints and writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sinks.evals.speed.entrants import Entrants
from sinks.evals.speed.measure import Bench, Speed
from sinks.reading.provenance import machine, now, versions

SCHEMA = 1

DEFINITIONS = {
    "milliseconds": "median over bursts of wall clock a token, greedy, one stream, everything a token costs included",
    "bursts": "the bursts themselves, in the order of the rounds; writers take turns within a round",
    "ratios": "median over rounds of the other's milliseconds over ours in the same round: above 1, ours is faster",
    "perplexity_ratio": "exp of the mean surprise with rounded weights minus with float32, on the same tokens",
    "standard_error": "of perplexity_ratio, over tokens",
}


def provenance(entrants: Entrants, text: Mapping[str, Any], load_average: Sequence[float] | None) -> dict[str, Any]:
    """Where the numbers come from; `load_average` as it was before anything was done."""
    return {
        "created": now(),
        "model": asdict(entrants.source),
        "weights": entrants.notes,
        "text": dict(text),
        "load_average_before": None if load_average is None else list(load_average),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }


def speed_document(
    bench: Bench, speeds: Sequence[Speed], entrants: Entrants, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole result as plain data."""
    return {
        "schema": SCHEMA,
        **about,
        "settings": asdict(bench),
        "definitions": DEFINITIONS,
        "writers": [_writer(speed, bench) for speed in speeds],
        "absent": list(entrants.absent),
        "ratios": ratios(speeds, bench),
        "perplexity": {
            name: {
                "perplexity": round(cost.perplexity, 4),
                "perplexity_ratio": round(cost.ratio, 5),
                "standard_error": round(cost.error, 5),
            }
            for name, cost in entrants.costs.items()
        },
    }


def _writer(speed: Speed, bench: Bench) -> dict[str, Any]:
    levels = {
        str(level): {
            "milliseconds": round(speed.milliseconds(level), 3),
            "tokens_per_second": round(speed.tokens_per_second(level), 2),
            "bursts": [round(each, 3) for each in speed.bursts[level]],
        }
        for level in bench.levels
    }
    return {"name": speed.writer, "version": speed.version, "keeps": speed.keeps, "levels": levels}


def ratios(speeds: Sequence[Speed], bench: Bench) -> dict[str, dict[str, dict[str, float]]]:
    """Ours against each other writer, round by round, at each level."""
    ours = [speed for speed in speeds if is_ours(speed)]
    others = [speed for speed in speeds if not is_ours(speed)]
    return {
        our.writer: {
            other.writer: {str(level): round(ratio(our, other, level), 3) for level in bench.levels} for other in others
        }
        for our in ours
    }


def ratio(our: Speed, other: Speed, level: int) -> float:
    """How many times as fast, median over the rounds."""
    pairs = zip(other.bursts[level], our.bursts[level], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def is_ours(speed: Speed) -> bool:
    """Whether this writer is a `Session`."""
    return speed.writer.startswith("sinks")


def speed_summary(
    bench: Bench, speeds: Sequence[Speed], entrants: Entrants, load_average: Sequence[float] | None
) -> Group:
    """Table and notes for one `print` of a rich console."""
    note = f" ({entrants.source.note})" if entrants.source.note else ""
    title = f"{entrants.source.name}{note} writes, {torch.get_num_threads()} threads"
    table = Table(title=Text(title, style="bold"), title_justify="left", title_style="", box=None, pad_edge=False)
    for name in ("writer", "keeps"):
        table.add_column(name, no_wrap=True)
    for level in bench.levels:
        table.add_column(f"tok/s at\n{level:,}", justify="right")
    table.add_column("perplexity\nvs float32", justify="right")
    for speed in speeds:
        cost = entrants.costs.get(speed.writer)
        rates = [f"{speed.tokens_per_second(level):.1f}" for level in bench.levels]
        paid = "" if cost is None else f"{cost.ratio:.4f}x"
        table.add_row(speed.writer, speed.keeps, *rates, paid, style="bold" if is_ours(speed) else "")
    words = [*entrants.absent, *_words(bench, speeds, entrants), _where(load_average)]
    return Group(Padding(table, (1, 0, 1, 0)), Text("\n".join(words), style="dim"))


def _words(bench: Bench, speeds: Sequence[Speed], entrants: Entrants) -> list[str]:
    lines = []
    for our, against in ratios(speeds, bench).items():
        for other, levels in against.items():
            told = ", ".join(f"{value:.2f}x at {int(level):,}" for level, value in levels.items())
            lines.append(f"{our} against {other}: {told}")
    for name, cost in entrants.costs.items():
        lines.append(f"{name}: perplexity {cost.perplexity:.3f}, {cost.ratio:.4f} +- {cost.error:.4f} of float32's")
    return [*lines, ", ".join(dict.fromkeys(speed.version for speed in speeds))]


def _where(load_average: Sequence[float] | None) -> str:
    here = machine(torch.device("cpu"))
    load = "unknown" if load_average is None else ", ".join(f"{value:.1f}" for value in load_average)
    told = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{here['cpu']}, {here['cores']} cores; load average before: {load}; {told}"
