"""The picture of a comparison: perplexity along the stream, and what it costs in memory, time and kept tokens.

This is the only room with matplotlib. Figures are made as objects and drawn by Agg, so nothing global is touched.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sinks.evals.arms import SWEEP
from sinks.evals.compare import Comparison
from sinks.report.document import along, bin_ends
from sinks.report.words import decimal, headline, size

INK, FAINT, GRID = "#1a1a1a", "#666666", "#e4e4e4"
BELOW = {2: ((0.055, 0.32), (0.62, 0.33)), 3: ((0.055, 0.205), (0.475, 0.2), (0.765, 0.185))}
"""Left edge and width of the lower panels, as shares of the figure, by how many there are."""
LABEL_GAP = 0.07
"""Least distance between two names beside an axis, as a share of its height."""


Point = tuple[float | int, float | int]


@dataclass(frozen=True)
class Pen:
    """How an arm is drawn. The colours are Okabe and Ito's, which every kind of colour vision tells apart."""

    name: str
    colour: str
    width: float
    dashes: tuple[float, ...] = ()


PENS = {
    "window": Pen("window only", "#D55E00", 2.2),
    "dense": Pen("dense", INK, 1.6),
    "sinks": Pen("sinks", "#0072B2", 3.0),
    "sinks-int8": Pen("sinks, 8 bits", "#56B4E9", 1.8, (4.0, 1.5)),
    "newlines": Pen("line breaks as sinks", "#009E73", 1.6, (2.5, 1.2)),
    "recompute": Pen("re-computed", "#CC79A7", 1.6),
}


@dataclass(frozen=True)
class Label:
    """Text beside the point (x, y), in data units."""

    x: float
    y: float
    text: str
    colour: str


def comparison_figure(comparison: Comparison, subtitle: str) -> Figure:
    """The picture, 12 x 7.2 inches on white, with the panels that the measured arms allow."""
    figure = Figure(figsize=(12, 7.2), facecolor="white")
    figure.text(0.055, 0.945, headline(comparison), fontsize=23, fontweight="bold", color=INK, va="center")
    figure.text(0.055, 0.892, subtitle, fontsize=10.5, color=FAINT, va="center")
    draw_perplexity(figure.add_axes((0.055, 0.43, 0.735, 0.36)), comparison)
    panels = [draw_memory, draw_time]
    if all(f"sweep-{kept}" in comparison.arms for kept in SWEEP):
        panels.append(draw_sweep)
    for draw, (left, width) in zip(panels, BELOW[len(panels)], strict=True):
        draw(figure.add_axes((left, 0.065, width, 0.185)), comparison)
    return figure


def png(figure: Figure, dpi: int = 150) -> bytes:
    """`figure` as the bytes of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


# The panels


def draw_perplexity(axes: Axes, comparison: Comparison) -> None:
    """Perplexity in bins along the stream, log scale; a line is named at its end, with its value after eviction."""
    ends = bin_ends(comparison.tokens)
    middles = (np.append(0, ends[:-1]) + ends) / 2
    labels = []
    for name, pen in pens(comparison, "window", "dense", "sinks", "sinks-int8", "newlines"):
        values = np.array(along(comparison.nll(name), ends), dtype=float)
        line = axes.plot(middles, values, color=pen.colour, lw=pen.width, solid_capstyle="round")[0]
        if pen.dashes:
            line.set_dashes(pen.dashes)
        if np.isnan(values).all():
            continue
        last = np.flatnonzero(~np.isnan(values))[-1]
        text = f"{decimal(overall(comparison, name), 1)}  {pen.name}"
        labels.append(Label(float(middles[last]), float(values[last]), text, pen.colour))
    axes.set_yscale("log")
    capacity = comparison.settings.capacity
    axes.axvline(capacity, color=FAINT, lw=1, ls=(0, (1, 2)))
    detail = f"bins of {ends[0]:,} tokens, log scale; numbers on the right: all tokens after the first eviction"
    style(axes, "Perplexity along the stream", detail)
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=low / (high / low) ** 0.1)  # room for remarks below the lines
    log_ticks(axes, most=9)
    along_stream(axes, comparison.tokens)
    remark(axes, capacity, "left", f"{capacity:,} keys: the first token leaves")
    mark_repeats(axes, comparison.repeats, ends)
    name_points(axes, labels)


def mark_repeats(axes: Axes, repeats: Bool[np.ndarray, " tokens"], ends: Int[np.ndarray, " bins"]) -> None:
    """Shade the bins that mostly repeat what has left the window, and say so once."""
    starts = np.append(0, ends[:-1])
    bins = zip(starts.tolist(), ends.tolist(), strict=True)
    shaded = [(start, end) for start, end in bins if repeats[start:end].mean() > 0.5]
    for start, end in shaded:
        axes.axvspan(start, end, color=GRID, alpha=0.7, lw=0, zorder=0)
    if shaded:
        start, end = shaded[-1]
        at, side = (start, "right") if start > ends[-1] / 2 else (end, "left")
        remark(axes, at, side, "the text repeats what the window let go")


def remark(axes: Axes, at: int, side: Literal["left", "right"], text: str) -> None:
    """A few words at the foot of a panel, beginning (or, at the "right", ending) at stream position `at`."""
    axes.annotate(text, (at, 0), (5 if side == "left" else -5, 5), textcoords="offset points", ha=side, fontsize=9,
                  color=FAINT, xycoords=axes.get_xaxis_transform())  # fmt: skip


def draw_memory(axes: Axes, comparison: Comparison) -> None:
    """Bytes of keys and values along the stream."""
    labels = []
    for name, pen in pens(comparison, "dense", "window", "sinks", "sinks-int8"):
        score = comparison.arms[name].score
        axes.plot(score.read, score.cache_bytes, color=pen.colour, lw=pen.width, solid_capstyle="round")
        if name != "window" or "sinks" not in comparison.arms:  # as many keys, as many bytes: one line over the other
            held = float(score.cache_bytes[-1])
            labels.append(Label(float(score.read[-1]), held, f"{size(held)}  {pen.name}", pen.colour))
    style(axes, "Cache along the stream", "keys and values held")
    along_stream(axes, comparison.tokens)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    name_points(axes, labels)


def draw_time(axes: Axes, comparison: Comparison) -> None:
    """Milliseconds to read one token at the end of the stream, one bar an arm."""
    bars = pens(comparison, "recompute", "dense", "sinks-int8", "sinks", "window")
    for height, (name, pen) in enumerate(bars):
        latency = comparison.arms[name].score.latency
        axes.barh(height, latency, color=pen.colour, height=0.62)
        beside(axes, (latency, height), (4, 0), f"{latency:,.0f}", va="center")
    axes.set_yticks(range(len(bars)), [pen.name for _, pen in bars])
    style(axes, "Time a token", "milliseconds, cache full")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(False, axis="y")


def draw_sweep(axes: Axes, comparison: Comparison) -> None:
    """Perplexity after the first eviction against the number of sinks, at equal capacity."""
    values = [overall(comparison, f"sweep-{kept}") for kept in SWEEP]
    colours = [PENS["sinks" if kept else "window"].colour for kept in SWEEP]
    axes.bar(range(len(SWEEP)), values, color=colours, width=0.62)
    for x, value in enumerate(values):
        beside(axes, (x, value), (0, 3), decimal(value, 1), ha="center")
    if "dense" in comparison.arms and not np.isnan(dense := overall(comparison, "dense")):
        axes.axhline(dense, color=INK, lw=1.3, ls=(0, (4, 2)))
        beside(axes, (len(SWEEP) - 0.5, dense), (4, 0), "dense", va="center")
    axes.set_xticks(range(len(SWEEP)), [str(kept) for kept in SWEEP])
    axes.set_xlim(-0.6, len(SWEEP) - 0.5)
    style(axes, "How many sinks?", f"perplexity, {comparison.settings.capacity:,} keys in all")
    axes.margins(y=0.14)
    if max(values) > 5 * min(values):  # linear bars would hide all differences but one
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(values) / 2)
        log_ticks(axes, most=5)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))


# What the panels share


def pens(comparison: Comparison, *names: str) -> list[tuple[str, Pen]]:
    """The measured arms among `names`, with how they are drawn."""
    return [(name, PENS[name]) for name in names if name in comparison.arms]


def overall(comparison: Comparison, name: str) -> float:
    """An arm's perplexity after the first eviction."""
    return comparison.perplexity(name, comparison.after_eviction)


def style(axes: Axes, title: str, detail: str) -> None:
    """Title and detail above the left edge, no box, faint lines across."""
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axes.annotate(title, (0, 1), (0, 22), fontsize=12.5, fontweight="bold", color=INK, **above)
    axes.annotate(detail, (0, 1), (0, 8), fontsize=9.5, color=FAINT, **above)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=INK)
    axes.grid(True, axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def beside(axes: Axes, point: Point, offset: Point, text: str, **align: Any) -> None:
    """A number or a word beside a bar, `offset` points from `point` in data units."""
    look: dict[str, Any] = {"fontsize": 9.5, "color": INK, "annotation_clip": False}
    axes.annotate(text, point, offset, textcoords="offset points", **look, **align)


def along_stream(axes: Axes, tokens: int) -> None:
    """An axis of stream positions from the first token to the last."""
    axes.set_xlim(0, tokens)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("tokens read", fontsize=9.5, color=FAINT, loc="right", labelpad=2)


def log_ticks(axes: Axes, most: int) -> None:
    """Round numbers along a logarithmic axis, as many as there can be up to `most`."""
    low, high = axes.get_ylim()
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)))
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = [tick for decade in decades for step in steps if low <= (tick := decade * step) <= high]
        if len(ticks) <= most:
            break
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def name_points(axes: Axes, labels: list[Label]) -> None:
    """Write every label right of its point: inside for a line that stopped, else beside the axes, none over another."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = [(label, *to_axes.transform((label.x, label.y))) for label in labels]
    outside = [(label, height) for label, x, height in placed if x > 0.9]
    heights = apart([height for _, height in outside], LABEL_GAP)
    for (label, _), height in zip(outside, heights, strict=True):
        write(axes, label, (1, height))
    for label, x, height in placed:
        if x <= 0.9:
            axes.plot(label.x, label.y, "o", color=label.colour, ms=5)
            write(axes, label, (x, height))


def write(axes: Axes, label: Label, place: Point) -> None:
    """A label beside `place`, in shares of the axes."""
    axes.annotate(label.text, place, (7, 0), xycoords="axes fraction", textcoords="offset points", color=label.colour,
                  fontsize=11, fontweight="bold", va="center", zorder=9)  # fmt: skip


def apart(heights: list[float], gap: float) -> list[float]:
    """`heights`, in the same order, moved as little as needed to stand at least `gap` from each other."""
    order = np.argsort(heights)
    placed = np.array(heights)[order]
    for _ in range(100):
        short = gap - np.diff(placed)
        if (short <= 1e-6).all():
            break
        for lower in np.flatnonzero(short > 1e-6):
            push = max(gap - (placed[lower + 1] - placed[lower]), 0) / 2
            placed[lower], placed[lower + 1] = placed[lower] - push, placed[lower + 1] + push
    found = np.empty_like(placed)
    found[order] = placed
    return found.tolist()
