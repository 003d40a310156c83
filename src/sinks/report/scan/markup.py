"""HTML and SVG as text: escaping, tables, and drawings whose colours, identifiers and hover texts are the page's own.

matplotlib draws in fixed colours (`PAINTS`); in the page each is a CSS variable, so that dark mode is a matter of CSS.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

import matplotlib
import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PAINTS = {
    "ink": "#1a1a1a", "faint": "#666666", "grid": "#e4e4e4", "paper": "#fefefe", "blue": "#0072b2", "red": "#d55e00",
    "green": "#009e73", "pink": "#cc79a7", "sky": "#56b4e9", "amber": "#e69f00",
}  # fmt: skip
"""Name of the CSS variable, and the colour that is drawn: Okabe and Ito's, which every kind of eye tells apart."""

MOST_CELLS = 1500
"""Up to so many cells each one tells its value on hover; above, each column does."""

SHORT = 40
"""Cells of a table with fewer signs are not broken into lines."""

DECIMALS = re.compile(r"-?\d+\.\d{2,}")
FONT = re.compile(r"font(?:-family)?:[^;\"]*;?\s*")
REFERENCE = re.compile(r"(url\(#|^#)([\w-]+)")


@dataclass(frozen=True)
class Hit:
    """Words for whoever points at a rectangle, or (`round`) near a point, of `axes`; in data units."""

    axes: Axes
    left: float | int
    top: float | int
    right: float | int
    bottom: float | int
    tip: str
    round: bool = False


@dataclass(frozen=True, eq=False)
class Cells:
    """A grid of colours that fills `axes`: `levels` are steps of the CSS variables `--{ramp}0`, ...; -1 stays empty.

    `tips` are the words of each cell, or of each column where there are too many cells.
    """

    axes: Axes
    levels: Int[np.ndarray, "rows columns"]
    ramp: str
    tips: Sequence[Sequence[str]] | Sequence[str]


@dataclass(eq=False)
class Drawing:
    """A figure with what will be laid over it. `name` is unique in its page."""

    name: str
    figure: Figure
    hits: list[Hit] = field(default_factory=list)
    cells: list[Cells] = field(default_factory=list)


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a name, the CSS variable of its colour, and how its line is dashed."""

    name: str
    paint: str
    dashes: tuple[float | int, ...] = ()


@dataclass(frozen=True)
class Chart:
    """One picture of a page: what it is, what to see in it, and its numbers as a table (HTML).

    `ramp`: which colours, and the words at their two ends.
    """

    drawing: Drawing
    title: str
    caption: str
    keys: tuple[Key, ...] = ()
    ramp: tuple[str, str, str] | None = None
    numbers: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """One part of a page: what it says first, its charts, and whatever else it holds (HTML)."""

    name: str
    title: str
    lead: str
    charts: tuple[Chart, ...] = ()
    more: str = ""


# HTML


def escape(text: object) -> str:
    """Text for HTML, with line breaks and other invisible signs spelled out."""
    visible = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(text))
    return html.escape(visible)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in a box of its own that scrolls; the first cell of a row is its name."""
    lines = []
    for first, *cells in rows:
        found = "".join(f"<td{' class=n' if len(str(cell)) < SHORT else ''}>{escape(cell)}</td>" for cell in cells)
        lines.append(
            f"<tr><th scope=row{' class=n' if len(str(first)) < SHORT else ''}>{escape(first)}</th>{found}</tr>"
        )
    columns = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    body = f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(head[0])}"><table>{body}</table></div>'


def figure(chart: Chart) -> str:
    """A chart with its title, what to see, its legend, and its numbers folded away: always four parts, which the page
    lines up across charts."""
    parts = [f"<figcaption><h3>{escape(chart.title)}</h3><p>{escape(chart.caption)}</p></figcaption>"]
    parts.append(f'<div class="legend">{legend(chart)}</div>')
    label = escape(f"{chart.title}. {chart.caption}")
    parts.append(f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(chart.title)}">')
    parts.append(f"{svg(chart.drawing, label)}</div>")
    parts.append(f"<details><summary>Numbers</summary>{chart.numbers}</details>" if chart.numbers else "<div></div>")
    wide = " wide" if chart.wide else ""
    return f'<figure id="{chart.drawing.name}" class="chart{wide}">{"".join(parts)}</figure>'


def legend(chart: Chart) -> str:
    """Whose each line is, or what the colours of a map stand for."""
    keys = f'<ul class="keys">{"".join(map(swatch, chart.keys))}</ul>' if chart.keys else ""
    if not chart.ramp:
        return keys
    ramp, low, high = chart.ramp
    colours = ",".join(f"var(--{ramp}{step})" for step in range(20))
    bar = f'<i style="background:linear-gradient(90deg,{colours})"></i>'
    return f'{keys}<p class="ramp"><span>{escape(low)}</span>{bar}<span>{escape(high)}</span></p>'


def swatch(key: Key) -> str:
    """A line of a legend."""
    dashes = f' stroke-dasharray="{" ".join(f"{2 * dash:g}" for dash in key.dashes)}"' if key.dashes else ""
    line = f'<path d="M0 5h22" stroke="{variable(key.paint)}" stroke-width="3"{dashes}/>'
    return f'<li><svg width="22" height="10" aria-hidden="true">{line}</svg>{escape(key.name)}</li>'


def variable(paint: str) -> str:
    """A colour of the page, with what it is where the page's style is missing."""
    return f"var(--{paint}, {PAINTS[paint]})" if paint in PAINTS else f"var(--{paint})"


# SVG


def svg(drawing: Drawing, label: str) -> str:
    """The drawing as an `<svg>` for the midst of a page. `label`, already escaped, is what it says to those who cannot
    see it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(drawing.figure).print_svg(buffer, metadata=empty)
    root = ElementTree.fromstring(buffer.getvalue())
    width, height = (round(72 * inches) for inches in drawing.figure.get_size_inches())
    for parent in root.iter():
        own(parent, drawing.name)
        for child in [child for child in parent if child.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)  # a style in the midst of a page would be everybody's
    for over in drawing.cells:
        grid, hits = cells(over, height)
        root.insert(0, grid)
        root.append(hits)
    if drawing.hits:
        group = ElementTree.SubElement(root, "g", {"class": "hits"})
        group.extend(hit(one, height) for one in drawing.hits)
    inside = "".join(ElementTree.tostring(child, encoding="unicode").strip() for child in root)
    look = f'viewBox="0 0 {width} {height}" style="--w:{width}px"'
    return f'<svg class="plot" role="img" aria-label="{label}" {look}>{inside}</svg>'


def own(element: ElementTree.Element, name: str) -> None:
    """Make an element the page's: no namespaces, identifiers that belong to `name`, colours as variables, fewer
    digits."""
    element.tag = element.tag.rpartition("}")[2]
    found = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    element.attrib.clear()
    element.tail = None
    if element.text and not element.text.strip():
        element.text = None
    for key, value in found.items():
        if (key == "id" and element.tag == "g") or value.startswith("rotate(-0"):
            continue  # groups are never referred to
        if key == "id":
            value = f"{name}-{value}"
        elif key in ("d", "x", "y", "transform", "points"):
            value = DECIMALS.sub(lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value).replace("\n", "")
        elif key == "style":
            value = painted(value)
        element.set(key, REFERENCE.sub(rf"\g<1>{name}-\g<2>", value) if key in ("href", "clip-path") else value)


def painted(style: str) -> str:
    """A style with the page's colours and the page's font."""
    size = re.search(r"(?:font: |font-size: )([\d.]+)px", style)
    style = FONT.sub("", style)
    for paint, colour in PAINTS.items():
        style = style.replace(colour, variable(paint))
    return f"font-size: {size[1]}px; {style}" if size and "font-size" not in style else style


def cells(of: Cells, height: float | int) -> tuple[ElementTree.Element, ElementTree.Element]:
    """The colours, one path a level with equal neighbours joined, and what is said on hover."""
    rows, columns = of.levels.shape
    box = of.axes.bbox  # in dots, 72 an inch
    scale = f"scale({box.width / columns:.4f} {box.height / rows:.4f})"
    place = f"translate({box.x0:.2f} {height - box.y1:.2f}) {scale}"
    grid = ElementTree.Element("g", {"transform": place, "class": "cells"})
    for level in np.unique(of.levels[of.levels >= 0]).tolist():
        style = f"fill:{variable(of.ramp + str(level))}"
        ElementTree.SubElement(grid, "path", {"style": style, "d": runs(of.levels == level)})
    hits = ElementTree.Element("g", {"transform": place, "class": "hits"})
    for x, tips in enumerate(of.tips):
        parts = [(0, rows, tips)] if isinstance(tips, str) else [(y, 1, tip) for y, tip in enumerate(tips)]
        for y, tall, tip in parts:
            box_of_cell = {"x": str(x), "y": str(y), "width": "1", "height": str(tall)}
            told(ElementTree.SubElement(hits, "rect", box_of_cell), tip)
    return grid, hits


def runs(chosen: np.ndarray) -> str:
    """The chosen cells of a grid as a path, in units of cells, neighbours in a row as one rectangle."""
    path = []
    for y, row in enumerate(chosen):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(int), [0]))))
        path += [f"M{start} {y}h{end - start}v1h{start - end}z" for start, end in edges.reshape(-1, 2).tolist()]
    return "".join(path)


def hit(of: Hit, height: float | int) -> ElementTree.Element:
    """Something invisible to point at."""
    corners = of.axes.transData.transform([(of.left, of.top), (of.right, of.bottom)])  # figures have 72 dots an inch
    (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
    y0, y1 = height - y1, height - y0
    if of.round:
        found = ElementTree.Element("circle", {"cx": f"{x0:.1f}", "cy": f"{y0:.1f}", "r": "5"})
    else:
        size = {"width": f"{x1 - x0:.1f}", "height": f"{y1 - y0:.1f}"}
        found = ElementTree.Element("rect", {"x": f"{x0:.1f}", "y": f"{y0:.1f}"} | size)
    return told(found, of.tip)


def told(element: ElementTree.Element, tip: str) -> ElementTree.Element:
    """The element with its hover text."""
    ElementTree.SubElement(element, "title").text = tip
    return element
