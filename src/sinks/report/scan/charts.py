"""The kinds of chart that a page is made of, in one look: drawn by matplotlib, hovered over in the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sinks.reading.estimate import Estimate
from sinks.report.scan.markup import MOST_CELLS, PAINTS, Cells, Drawing, Hit, Key, table
from sinks.report.words import decimal

WIDTH, HEIGHT, WIDE = 400, 250, 840
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 22, 42
"""Margins of a chart, in the page's pixels; those of all charts of layers are alike, so that layers line up."""

STEPS = 20
"""How many colours a ramp has."""

RAMPS = {
    "q": ("#edf5f1", "#9fd8c0", "#3fa3ab", "#3a639f", "#38305c", "#160f1c"),
    "q-dark": ("#201c2c", "#3a2f5e", "#3a639f", "#3497a9", "#60ceac", "#e4f7ea"),
    "d": ("#0b4f8a", "#7fb4da", "#f1f1ee", "#f0a878", "#a83c00"),
    "d-dark": ("#7cc4ff", "#2b6ca3", "#24222b", "#b4561f", "#ffb585"),
}
"""Ends and middles of the ramps: q from nothing to much, d from below to above; each for light and for dark."""

UNKNOWN = "not measured"

FAR = 4
"""How far from no effect a forest shows an effect's true place."""

Number = float | int

SERIES = ("blue", "red", "green", "pink", "amber", "ink", "sky")
"""The order in which colours are given out."""

DASHES: tuple[tuple[float | int, ...], ...] = ((), (4, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5))
"""Lines differ in more than colour."""


Part = TypeVar("Part")


@dataclass(frozen=True, eq=False)
class Line:
    """A curve: where, how high, and (if known) between which ends."""

    key: Key
    x: Num[np.ndarray, " points"]
    y: Num[np.ndarray, " points"]
    low: Float[np.ndarray, " points"] | None = None
    high: Float[np.ndarray, " points"] | None = None


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its name, whether it is logarithmic, and whether it counts per cent."""

    name: str
    log: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with its interval, and words for it. `joined` stands close under the one before, as the control of an
    edit does; `behind` is a larger value that contains it."""

    name: str
    value: float
    low: float
    high: float
    label: str
    paint: str = "blue"
    joined: bool = False
    behind: float = float("nan")


def blank(name: str, height: Number = HEIGHT, wide: bool = False, left: Number = LEFT) -> tuple[Drawing, Axes]:
    """An empty drawing of the page's width with one pair of axes."""
    width = WIDE if wide else WIDTH
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    share = (left / width, BOTTOM / height, (width - left - RIGHT) / width, (height - TOP - BOTTOM) / height)
    axes = figure.add_axes(share)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PAINTS["faint"])
    axes.tick_params(length=0, labelsize=12, labelcolor=PAINTS["ink"], pad=5)
    axes.grid(True, axis="y", color=PAINTS["grid"], lw=0.8)
    axes.set_axisbelow(True)
    return Drawing(name, figure), axes


def curves(
    name: str, x: Axis, y: Axis, lines: Sequence[Line], *, wide: bool = False, height: Number = HEIGHT
) -> Drawing:
    """Lines with their intervals; every point tells its value."""
    drawing, axes = blank(name, height, wide)
    for line in lines:
        paint = PAINTS[line.key.paint]
        drawn = axes.plot(line.x, line.y, color=paint, lw=2, solid_capstyle="round")[0]
        if line.key.dashes:
            drawn.set_dashes(line.key.dashes)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=paint, alpha=0.16, lw=0)
        for index, (across, up) in enumerate(zip(line.x.tolist(), line.y.tolist(), strict=True)):
            if not np.isfinite(up):
                continue
            ends = ""
            if line.low is not None and line.high is not None and np.isfinite(line.low[index]):
                ends = f" ({value_text(line.low[index], y)} to {value_text(line.high[index], y)})"
            tip = f"{line.key.name}, {x.name} {across:,g}: {value_text(up, y)}{ends}"
            drawing.hits.append(Hit(axes, across, up, across, up, tip, round=True))
    finish(axes, x, y, lines)
    return drawing


def finish(axes: Axes, x: Axis, y: Axis, lines: Sequence[Line]) -> None:
    """Scales, ticks and names of both axes."""
    curves_and_ends = [part for line in lines for part in (line.y, line.low, line.high) if part is not None]
    known = np.concatenate([part[np.isfinite(part)] for part in curves_and_ends] or [np.ones(1)])
    if y.log and (known > 0).any():
        axes.set_yscale("log")
        log_axis(axes, "y")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, y)))
        if known.size and known.min() >= 0:
            axes.set_ylim(0, max(float(known.max()) * 1.06, 1e-9))
    name_axes(axes, x, y)
    places = np.unique(np.concatenate([line.x for line in lines])) if lines else np.ones(1)
    if x.log:
        axes.set_xscale("log")
    if x.log or len(places) <= 10:
        axes.xaxis.set_major_locator(FixedLocator(places.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.01)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def name_axes(axes: Axes, x: Axis, y: Axis) -> None:
    """What the axes show: below the right end, and above the left one."""
    axes.set_xlabel(x.name, fontsize=12, color=PAINTS["faint"], loc="right", labelpad=3)
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(y.name, (0, 1), (4 - LEFT, 7), fontsize=12, color=PAINTS["faint"], **above)


def log_axis(axes: Axes, which: str) -> None:
    """Round numbers along a logarithmic axis: few, and never none."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for steps in ((1, 1.1, 1.2, 1.5, 2, 3, 4, 5, 7), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [at for decade in decades for step in steps if low <= (at := decade * step) <= high]
        if len(ticks) <= 6:
            break
    axis.set_major_locator(FixedLocator(ticks[:: max(len(ticks) // 5, 1)]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))
    axis.set_minor_locator(NullLocator())


def heat(name: str, levels: Int[np.ndarray, "rows columns"], ramp: str, tips: Sequence[Sequence[str]],
         sides: tuple[str, str] = ("layer", "head"), *, wide: bool = False, height: Number = HEIGHT,
         left: Number = LEFT) -> Drawing:  # fmt: skip
    """A map of `rows` x `columns`; `tips` are by column, then row. Where the cells are too many, a column speaks with
    its first tip."""
    drawing, axes = blank(name, height, wide, left)
    rows, columns = levels.shape
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    name_axes(axes, Axis(sides[0]), Axis(sides[1]))
    drawing.cells.append(Cells(axes, levels, ramp, tips))
    return drawing


def across(pick: Callable[..., np.ndarray], values: Float[np.ndarray, "rows columns"]) -> np.ndarray:
    """The mean, least or most of each row, of what is known; NaN where nothing is."""
    return np.array([pick(row[~np.isnan(row)]) if not np.isnan(row).all() else np.nan for row in values])


def by_cell_or_column(values: Float[np.ndarray, "rows columns"], sides: tuple[str, str] = ("layer", "head"),
                      unit: str = ".3f") -> list[list[str]] | list[str]:  # fmt: skip
    """Hover texts of a map: its cells', or where they are too many its columns'."""
    side, down = sides
    if values.size <= MOST_CELLS:
        return [
            [f"{side} {x}, {down} {y}: {value:{unit}}".replace("nan", UNKNOWN) for y, value in enumerate(column)]
            for x, column in enumerate(values.T.tolist())
        ]
    tips: list[str] = []
    for x, column in enumerate(values.T):
        if np.isnan(column).all():
            tips.append(f"{side} {x}: {UNKNOWN}")
        else:
            most, mean = int(np.nanargmax(column)), np.nanmean(column)
            tips.append(f"{side} {x}: mean {mean:{unit}}, most {column[most]:{unit}} at {down} {most}")
    return tips


def steps(values: Float[np.ndarray, "rows columns"], low: Number, high: Number, count: int = STEPS) -> np.ndarray:
    """Which of `count` colours each value has, between `low` and `high`; -1 where there is none."""
    share = np.nan_to_num((values - low) / max(high - low, 1e-30), nan=0, posinf=1, neginf=0)
    found = np.clip((share * count).astype(int), 0, count - 1)
    return np.where(np.isnan(values), -1, found)


def bars(name: str, rows: Sequence[Bar], x: Axis, *, left: Number = 128, wide: bool = False) -> Drawing:
    """Bars that lie, each with its interval, its name on the left and its words at its end."""
    drawing, axes = blank(name, TOP + BOTTOM + 28 * max(len(rows), 1), wide, left)
    known = [end for row in rows for end in (row.value, row.high, row.behind) if np.isfinite(end)]
    top = max([*known, 1e-9])
    for place, row in enumerate(rows):
        axes.barh(place, row.behind, height=0.58, color=PAINTS[row.paint], alpha=0.3)
        axes.barh(place, row.value, height=0.58, color=PAINTS[row.paint], alpha=0.85)
        if np.isfinite(row.low):
            axes.plot([row.low, row.high], [place, place], color=PAINTS["ink"], lw=1.4)
        end = max([value for value in (row.value, row.high, row.behind) if np.isfinite(value)], default=0)
        axes.annotate(row.label, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=12,
                      color=PAINTS["ink"], annotation_clip=False)  # fmt: skip
        drawing.hits.append(Hit(axes, 0, place - 0.5, top, place + 0.5, f"{row.name}: {row.label}"))
    lying(axes, range(len(rows)), [row.name for row in rows], x)
    wide_axes = axes.bbox.width
    words = min(6.8 * max((len(row.label) for row in rows), default=0) + 12, 0.6 * wide_axes)
    axes.set_xlim(0, top * wide_axes / (wide_axes - words))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, x)))
    return drawing


def rows_of_points(rows: Sequence[Bar]) -> list[float]:
    """How far down each row stands: a joined one close under the one before."""
    places: list[float] = []
    for row in rows:
        places.append((places[-1] + (0.75 if row.joined else 1.2)) if places else 0.0)
    return places


def row_name(row: Bar, most: int) -> str:
    """A row's name, a control's behind a dash; cut where it has more than `most` signs."""
    name = f"– {row.name}" if row.joined else row.name
    return name if len(name) <= most else f"{name[: most - 1].rstrip()}…"


def forest(name: str, rows: Sequence[Bar], x: Axis, neutral: Number) -> Drawing:
    """Points with their intervals on a logarithmic axis, around the line at which nothing happens.

    What lies more than `FAR` times beyond that line is an arrow at the edge, or else nothing near it could be told
    apart.
    """
    places, names = rows_of_points(rows), [row_name(row, 56) for row in rows]
    left = 14 + 6.2 * max(map(len, names), default=0)
    drawing, axes = blank(name, TOP + BOTTOM + 26 * (places[-1] + 1.3 if places else 1), wide=True, left=left)
    width = 1 - (left + 176) / WIDE
    axes.set_position((left / WIDE, axes.get_position().y0, width, axes.get_position().height))
    axes.set_xscale("log")
    values = np.array([end for row in rows for end in (row.value, row.low, row.high) if np.isfinite(end) and end > 0])
    near = np.append(values[(values < neutral * FAR) & (values > neutral / FAR)], neutral)
    room = max((near.max() / near.min()) ** 0.08, 1.02)
    low, high = near.min() / room, near.max() * room
    axes.set_xlim(low, high)
    log_axis(axes, "x")
    axes.axvline(neutral, color=PAINTS["faint"], lw=1)
    for place, row in zip(places, rows, strict=True):
        if np.isfinite(row.low) and row.low > 0:
            ends = np.clip([row.low, row.high], low, high)
            axes.plot(ends, [place, place], color=PAINTS[row.paint], lw=2, solid_capstyle="round")
        mark = ">" if row.value > high else "<" if row.value < low else "o"
        point(drawing, float(np.clip(row.value, low, high)), place, row, mark)
        words = row.label if mark == "o" else row.label.partition(" (")[0]
        axes.annotate(words, (1, place), (14, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      fontsize=12, va="center", color=PAINTS["ink"], annotation_clip=False)  # fmt: skip
    lying(axes, places, names, x)
    return drawing


def pairs(name: str, rows: Sequence[Bar], x: Axis) -> Drawing:
    """Two points a row, `value` full and `behind` open, on an axis of shares; the rows stand as those of `forest`."""
    places, names = rows_of_points(rows), [row_name(row, 34) for row in rows]
    left = 14 + 6.2 * max(map(len, names), default=0)
    drawing, axes = blank(name, TOP + BOTTOM + 26 * (places[-1] + 1.3 if places else 1), left=left)
    for place, row in zip(places, rows, strict=True):
        for value, full in ((row.behind, False), (row.value, True)):
            if np.isfinite(value):
                paint = PAINTS[row.paint]
                axes.plot(value, place, "o", color=paint, ms=7, mfc=paint if full else PAINTS["paper"], mew=1.8)
                drawing.hits.append(Hit(axes, value, place, value, place, f"{row.name}: {row.label}", round=True))
    lying(axes, places, names, x)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, x)))
    return drawing


def point(drawing: Drawing, value: Number, place: Number, row: Bar, mark: str) -> None:
    """A point of a forest: full, or open where it is a control; at the edge an arrow."""
    paint, axes = PAINTS[row.paint], drawing.figure.axes[0]
    full = PAINTS["paper"] if row.joined else paint
    axes.plot(value, place, mark, color=paint, ms=6 if row.joined else 8, mfc=full, mew=1.8, clip_on=False)
    drawing.hits.append(Hit(axes, value, place, value, place, f"{row.name}: {row.label}", round=True))


def lying(axes: Axes, places: Sequence[Number], names: Sequence[str], x: Axis) -> None:
    """Names of rows on the left, from the top down."""
    axes.set_yticks(list(places), list(names), parse_math=False)
    axes.set_ylim((places[-1] if places else 0) + 0.65, -0.65)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=PAINTS["grid"], lw=0.8)
    axes.set_xlabel(x.name, fontsize=12, color=PAINTS["faint"], loc="right", labelpad=3)


def spark(name: str, values: Num[np.ndarray, " points"], axis: Axis, place: str = "layer") -> Drawing:
    """A small curve through depth, without a scale: its form is what it says."""
    figure = Figure(figsize=(300 / 72, 64 / 72), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes((0, 0.04, 1, 0.92))
    axes.axis("off")
    x = np.arange(len(values))
    floor = float(np.nanmin(values)) if axis.log else 0.0
    axes.fill_between(x, values, floor, color=PAINTS["blue"], alpha=0.18, lw=0)
    axes.plot(x, values, color=PAINTS["blue"], lw=2, solid_joinstyle="round")
    if axis.log:
        axes.set_yscale("log")
    axes.set_xlim(-0.5, len(values) - 0.5)
    tips = [f"{place} {at}: {axis.name} {value_text(value, axis)}" for at, value in enumerate(values.tolist())]
    low, high = axes.get_ylim()
    hits = [Hit(axes, at - 0.5, low, at + 0.5, high, tip) for at, tip in enumerate(tips)]
    return Drawing(name, figure, hits)


def figures(value: Number, digits: int = 3) -> str:
    """A number with about as many figures as matter."""
    if np.isnan(value):
        return UNKNOWN
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    if abs(value) >= 10:
        return decimal(value, 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2)
    return decimal(value, digits) if abs(value) >= 0.1 or value == 0 else f"{value:.{digits}g}"


def value_text(value: Number, axis: Axis) -> str:
    """A value as its axis counts."""
    return f"{100 * value:.1f} %" if axis.percent else f"{value:,.4g}"


def tick(value: Number, axis: Axis) -> str:
    """A tick of an axis."""
    return f"{100 * value:g} %" if axis.percent else f"{value:,g}"


def keys_of(names: list[str]) -> list[Key]:
    """A colour and a dash for each name."""
    return [
        Key(name, SERIES[index % len(SERIES)], DASHES[index % len(DASHES)]) for index, name in enumerate(names)
    ]  # fmt: skip


def line_of(key: Key, values: Mapping[float, Estimate] | Mapping[int, Estimate]) -> Line:
    """Estimates by a number as a line."""
    found = sorted(values.items())
    x = np.array([at for at, _ in found])
    y, low, high = (np.array([getattr(of, end) for _, of in found]) for end in ("value", "low", "high"))
    return Line(key, x, y, low, high)


def series(lines: list[Line], place: str, text: Callable[[float], str] = figures) -> str:
    """The numbers of lines as a table: a row a place, a column a line."""
    places = sorted({at for line in lines for at in line.x.tolist()})
    found = [dict(zip(line.x.tolist(), line.y.tolist(), strict=True)) for line in lines]
    rows = [[f"{at:g}", *(text(values[at]) if at in values else "" for values in found)] for at in places]
    return table((place, *(line.key.name for line in lines)), rows)


def named(parts: Mapping[str, Part]) -> list[tuple[Key, tuple[str, Part]]]:
    """Each part with its name and the key that its line will have."""
    return list(zip(keys_of(list(parts)), parts.items(), strict=True))


def ramp_variables(dark: bool) -> str:
    """The colours of both ramps as CSS variables."""
    found = []
    for ramp, count in (("q", STEPS), ("d", STEPS + 1)):
        colours = LinearSegmentedColormap.from_list(ramp, RAMPS[f"{ramp}-dark" if dark else ramp])
        found += [f"--{ramp}{step}:{to_hex(colours(step / (count - 1)))}" for step in range(count)]
    return ";".join(found)
