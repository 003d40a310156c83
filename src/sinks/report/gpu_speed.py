"""What `sinks bench gpu` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sinks.evals.speed.gpu.band import Attended
from sinks.evals.speed.gpu.bench import OURS, GpuBench, Measured
from sinks.evals.speed.gpu.clock import machine
from sinks.evals.speed.gpu.decode import FAR, NEAR, Decoded
from sinks.reading.provenance import now

SCHEMA = 2
BAR = "FlexAttention"

DEFINITIONS = {
    "copy_TB_s": "a large copy inside the device, bytes read and written both counted; the rate behind every ceiling",
    "product_TFLOP_s": "an 8192^3 bfloat16 product of random numbers",
    "milliseconds": "of one step of all rows, one number a round, from the first launch until the device is done; "
    "writers take turns within a round",
    "ceiling": "tokens a second if weights, keys and values are read once at the copy rate and nothing else takes time",
    "flat": f"our step begun at position {FAR:,} over the same at {NEAR:,}, median over rounds",
    "useful_TFLOP_s": "visible pairs only: 4 d H pairs forward, 3.5 times that forward and backward",
    "dense SDPA": "sees every key, and is credited with the visible pairs alone",
    "weights": "random, but for the built-in model",
}


def gpu_document(bench: GpuBench, found: Measured) -> dict[str, Any]:
    """The whole result as plain data."""
    return {
        "schema": SCHEMA,
        "created": now(),
        "whole": found.whole,
        "machine": machine(),
        "settings": asdict(bench),
        "definitions": DEFINITIONS,
        "ceilings": {"copy_TB_s": round(found.copy_rate, 3), "product_TFLOP_s": round(found.product_rate, 1)},
        "decode": [_decoded(each) for each in found.decoded],
        "flat": [asdict(each) | {"ratio": round(each.ratio, 4)} for each in found.flat],
        "attention": [_attended(each) for each in found.attended],
        "statistics": [
            asdict(each.text)
            | {"without_ms": each.without, "with_ms": each.along, "ratio": round(each.along / each.without, 3)}
            for each in found.statistics
        ],
        "absent": list(found.absent),
    }


def _decoded(each: Decoded) -> dict[str, Any]:
    return {
        "model": each.model,
        "rows": each.rows,
        "window": each.window,
        "writer": each.writer,
        "milliseconds": [round(value, 5) for value in each.milliseconds],
        "tokens_per_second": round(each.tokens_per_second, 1),
        "ceiling": round(each.ceiling, 1),
        "share_of_ceiling": round(each.share, 4),
    }


def _attended(each: Attended) -> dict[str, Any]:
    ahead, both = each.rates
    times = {"forward_ms": round(each.forward, 4), "both_ms": round(each.both, 4)}
    rates = {"forward_useful_TFLOP_s": round(ahead, 1), "both_useful_TFLOP_s": round(both, 1)}
    return asdict(each.text) | {"way": each.way} | times | rates


def gpu_summary(found: Measured) -> Group:
    """Tables and notes for one `print` of a rich console."""
    tables = []
    if found.decoded:
        tables.append(_decode_table(found))
    if found.attended:
        tables.append(_attention_table(found.attended))
    return Group(*(Padding(table, (1, 0, 1, 0)) for table in tables), Text("\n".join(_words(found)), style="dim"))


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", title_style="", box=None, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _decode_table(found: Measured) -> Table:
    table = _table(
        f"tokens a second, bfloat16, {machine()['gpu']}",
        ("model", "writer"),
        ("rows", "window", "tok/s", "ms a\nstep", "of its\nceiling"),
    )
    previous = ""
    for each in found.decoded:
        case = f"{each.rows}", f"{each.window:,}"
        told = f"{each.tokens_per_second:,.0f}", f"{1e3 * each.rows / each.tokens_per_second:.3f}", f"{each.share:.0%}"
        name = each.model if each.model != previous else ""
        table.add_row(name, each.writer, *case, *told, style="bold" if each.writer == OURS else "")
        previous = each.model
    return table


def _attention_table(attended: Sequence[Attended]) -> Table:
    table = _table(
        f"attention over whole texts, {machine()['gpu']}",
        ("tokens, window, d", "way"),
        ("forward\nms", "useful\nTFLOP/s", "vs\nFlex", "and back\nms", "useful\nTFLOP/s", "vs\nFlex"),
    )
    previous = ""
    for each in attended:
        text = each.text
        case = f"{text.tokens:,}, {text.window:,}, {text.head_dim}"
        bar = next((other for other in attended if other.text == text and other.way == BAR), None)
        ratios = ["", ""] if bar is None else [f"{bar.forward / each.forward:.2f}x", f"{bar.both / each.both:.2f}x"]
        ahead, both = (f"{rate:.0f}" for rate in each.rates)
        cells = (f"{each.forward:.3f}", ahead, ratios[0], f"{each.both:.3f}", both, ratios[1])
        bold = "bold" if each.way.startswith(OURS) else ""
        table.add_row(case if case != previous else "", each.way, *cells, style=bold)
        previous = case
    return table


def _words(found: Measured) -> list[str]:
    lines = [f"copies {found.copy_rate:.2f} TB/s, bfloat16 products {found.product_rate:.0f} TFLOP/s"]
    for name in dict.fromkeys(each.model for each in found.flat):
        ratios = sorted(each.ratio for each in found.flat if each.model == name)
        told = " to ".join(dict.fromkeys(f"{ratio:.3f}" for ratio in (ratios[0], ratios[-1])))
        lines.append(f"{name}: a step at position {FAR:,} takes {told} times one at {NEAR:,}")
    for each in found.statistics:
        text = each.text
        lines.append(
            f"statistics at {text.tokens:,} tokens, window {text.window:,}, d {text.head_dim}: "
            f"{each.along / each.without:.2f} times the forward pass without them"
        )
    told = ", ".join(f"{name} {version}" for name, version in machine().items() if name != "gpu")
    return [*lines, *found.absent, told]
