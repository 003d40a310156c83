"""The residual stream: massive activations, drained values, how a change spreads, and the shape of the whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sinks.analysis.findings import DRAINED
from sinks.analysis.measures.massive import Massive, Peak
from sinks.analysis.measures.mixing import Geometry, Mixing, Spread
from sinks.analysis.survey import Survey
from sinks.report.scan import charts
from sinks.report.scan.charts import Axis, Line, across, figures, named, series
from sinks.report.scan.markup import Chart, Key, Section, table
from sinks.report.scan.words import amount, outstanding, percent, stretches

DEPTH = Axis("depth")

PLACES = 5
"""How many places of massive activations are shown of each kind of input; the others are folded away."""


# Massive activations


def massive_section(survey: Survey) -> Section | None:
    """Massive activations and the drains that go with them."""
    if not survey.massive:
        return None
    found = [life_chart(name, one, index) for index, (name, one) in enumerate(survey.massive.items())]
    found += [ratio_chart(survey.massive, "value_ratio", "values"), ratio_chart(survey.massive, "key_ratio", "keys"),
              norm_chart(survey.massive), kurtosis_chart(survey.massive), outlier_chart(survey.massive)]  # fmt: skip
    lead = " ".join(told(name, one) for name, one in survey.massive.items())
    return Section("massive", "Massive activations and drained values", lead, tuple(found), peaks_html(survey.massive))


def peaks_html(massive: Mapping[str, Massive]) -> str:
    """The largest numbers: every place once, at the depth where it stands out most; all of them folded away."""
    head = ("input", "depth", "position", "dimension", "token", "texts", "value", "over median", "variation")
    rows: list[list[str]] = []
    best: list[list[str]] = []
    for name, one in massive.items():
        seen: set[tuple[int, int]] = set()
        for peak in sorted(one.peaks, key=lambda peak: -peak.ratio):
            row = peak_row(name, peak, one.fixed)
            if (peak.position, peak.dim) not in seen and len(seen) < PLACES:
                best.append(row)
            seen.add((peak.position, peak.dim))
        rows += [peak_row(name, peak, one.fixed) for peak in one.peaks]
    if not rows:
        return ""
    rest = f"<details><summary>All depths</summary>{table(head, rows)}</details>" if len(rows) > len(best) else ""
    return f"<h3>The largest numbers</h3>{table(head, best)}{rest}"


def peak_row(name: str, peak: Peak, fixed: bool) -> list[str]:
    """A massive activation's numbers."""
    variation = "fixed by BOS" if fixed and peak.variation == 0 else percent(peak.variation)
    token = f"“{peak.token}”" if peak.token else ""
    return [
        name, str(peak.depth), str(peak.position), str(peak.dim), token, percent(peak.share, 0),
        figures(peak.value, 1), f"{peak.ratio:,.0f} x", variation,
    ]  # fmt: skip


def told(name: str, one: Massive) -> str:
    """One kind of input in a sentence."""
    ratio = outstanding(one)
    at = int(np.argmax(ratio))
    born = f", born at depth {' and '.join(str(start) for start, _ in one.lives)}" if one.lives else ""
    return f"{sentence(name)}: up to {ratio[at]:,.0f} times the median, at depth {at}{born}."


def life_chart(name: str, one: Massive, index: int) -> Chart:
    """Largest and median magnitude through depth, with births and deaths."""
    depths = np.arange(one.largest.shape[1])
    lines = []
    for key, values in ((Key("largest", "red"), one.largest), (Key("median", "blue", (4, 2)), one.median)):
        low, middle, high = np.percentile(values, (0, 50, 100), axis=0)
        lines.append(Line(key, depths, middle, low, high))
    drawing = charts.curves(f"massive-{index}", DEPTH, Axis("magnitude", log=True), lines, wide=True, height=270)
    axes = drawing.figure.axes[0]
    for born, dies in one.lives:
        axes.axvspan(born - 0.4, dies - 0.6, color=charts.PAINTS["red"], alpha=0.07, lw=0)
        axes.annotate(f"{born} to {dies}", ((born + dies - 1) / 2, 1), (0, 6), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", fontsize=12, color=charts.PAINTS["red"], ha="center")  # fmt: skip
    ratio = outstanding(one)
    at = int(np.argmax(ratio))
    flagged = np.flatnonzero(one.flagged >= 0.5)
    passes = (
        f"the flag is passed at depths {stretches(flagged.tolist())}" if len(flagged) else "no depth passes the flag"
    )
    lives = "; ".join(f"born at {born}, gone at {dies}" for born, dies in one.lives) or "none lives, by the rule"
    caption = (
        f"At depth {at} the largest is {figures(lines[0].y[at], 1)}, {ratio[at]:,.0f} times the median; {passes} "
        f"({lives}). Shades span all {one.texts} texts."
    )
    rows = [[str(depth), figures(lines[0].y[depth], 1), figures(lines[1].y[depth]), f"{ratio[depth]:,.1f}",
             percent(float(one.flagged[depth]), 0)] for depth in depths]  # fmt: skip
    numbers = table(("depth", "largest", "median", "ratio", "texts flagged"), rows)
    return Chart(drawing, f"Massive activations through depth: {name}", caption, tuple(line.key for line in lines),
                 numbers=numbers, wide=True)  # fmt: skip


def ratio_chart(massive: Mapping[str, Massive], measure: str, what: str) -> Chart:
    """Norm of the sink's values (keys) over the others', by layer; shades span the key heads."""
    lines = []
    for key, (_, one) in named(massive):
        values = getattr(one, measure)
        lines.append(Line(key, np.arange(len(values)), *(across(pick, values) for pick in (np.mean, np.min, np.max))))
    first = lines[0]
    drained = np.flatnonzero(first.y < DRAINED)
    caption = f"{first.key.name}: below {DRAINED:g} in layers {stretches(drained.tolist())}" if len(drained) else (
        f"{first.key.name}: in no layer below {DRAINED:g}"
    )  # fmt: skip
    high = np.flatnonzero(first.y >= 0.8)
    caption += f"; {0.8:g} or more in layers {stretches(high.tolist())}." if len(high) else "."
    drawing = charts.curves(measure.replace("_", "-"), Axis("layer"), Axis("norm over the others'"), lines)
    drawing.figure.axes[0].axhline(1, color=charts.PAINTS["faint"], lw=1)
    return Chart(drawing, f"Length of the sink's {what}", sentence(caption), tuple(line.key for line in lines),
                 numbers=series(lines, "layer"))  # fmt: skip


def norm_chart(massive: Mapping[str, Massive]) -> Chart:
    """Norm of the first token over the others'."""
    lines = [Line(key, np.arange(len(one.first_norm)), one.first_norm) for key, (_, one) in named(massive)]
    first = lines[0]
    at = int(np.argmax(first.y))
    caption = f"{first.key.name}: the first token is up to {first.y[at]:,.1f} times as long as the others (depth {at})."
    drawing = charts.curves("first-norm", DEPTH, Axis("norm over the others'", log=True), lines)
    return Chart(drawing, "Length of the first token", sentence(caption), tuple(line.key for line in lines),
                 numbers=series(lines, "depth"))  # fmt: skip


def kurtosis_chart(massive: Mapping[str, Massive]) -> Chart:
    """How far the width is ruled by few dimensions, at the first token and elsewhere."""
    lines = []
    for key, (name, one) in named(massive):
        depths = np.arange(len(one.kurtosis_first))
        lines.append(Line(Key(f"{name}: first", key.paint), depths, one.kurtosis_first))
        lines.append(Line(Key(f"{name}: rest", key.paint, (2, 2)), depths, one.kurtosis_rest))
    first = lines[0]
    at = int(np.argmax(first.y))
    caption = f"{first.key.name} token: up to {percent(first.y[at])} of the most there can be (depth {at})."
    drawing = charts.curves("kurtosis", DEPTH, Axis("share of the most possible", percent=True), lines)
    return Chart(drawing, "Kurtosis over the width", sentence(caption), tuple(line.key for line in lines),
                 numbers=series(lines, "depth", percent))  # fmt: skip


def outlier_chart(massive: Mapping[str, Massive]) -> Chart:
    """Tokens of extraordinary norm."""
    lines = [Line(key, np.arange(len(one.outliers)), one.outliers) for key, (_, one) in named(massive)]
    first = lines[0]
    at = int(np.argmax(first.y))
    caption = f"{first.key.name}: up to {percent(first.y[at], 2)} of the tokens (depth {at})."
    drawing = charts.curves("outliers", DEPTH, Axis("share of tokens", percent=True), lines)
    return Chart(drawing, "Tokens whose norm stands out", sentence(caption), tuple(line.key for line in lines),
                 numbers=series(lines, "depth", percent))  # fmt: skip


def sentence(text: str) -> str:
    """With a capital in front, and the rest as it is."""
    return text[:1].upper() + text[1:]


# Mixing


def mixing_section(survey: Survey) -> Section | None:
    """How a change of one token spreads, and the shape of the residual stream."""
    mixing = survey.mixing
    if mixing is None:
        return None
    found = [spread_chart(mixing)] if mixing.spreads else []
    most = max((float(np.nanpercentile(later(one), 99)) for one in mixing.spreads), default=1.0)
    found += [spread_map(one, index, most, spread_name(one, mixing)) for index, one in enumerate(mixing.spreads)]
    found += [geometry_chart(mixing.geometry, measure, name) for measure, name in GEOMETRY.items()]
    rows = [[one.condition, str(one.changed), amount(one.middle), amount(one.late)] for one in mixing.spreads]
    head = ("condition", "token changed", "middle depth", "last depth but one")
    return Section("mixing", "How tokens blend", mixing.verdict, tuple(found), table(head, rows) if rows else "")


def spread_name(one: Spread, mixing: Mixing) -> str:
    """The condition, and the token where several were changed."""
    alone = len({other.changed for other in mixing.spreads}) == 1
    return one.condition if alone else f"{one.condition}, token {one.changed}"


def later(one: Spread) -> np.ndarray:
    """What a change does to the tokens after it."""
    return one.by_depth[:, one.changed + 1 :] if one.by_depth.shape[1] > one.changed + 1 else one.by_depth


def spread_chart(mixing: Mixing) -> Chart:
    """Mean change of later tokens, through depth."""
    conditions = list(dict.fromkeys(one.condition for one in mixing.spreads))
    tokens = sorted({one.changed for one in mixing.spreads})
    lines = []
    for one in mixing.spreads:
        paint = charts.SERIES[conditions.index(one.condition) % len(charts.SERIES)]
        dashes = charts.DASHES[tokens.index(one.changed) % len(charts.DASHES)]
        lines.append(Line(Key(spread_name(one, mixing), paint, dashes), np.arange(len(one.overall)), one.overall))
    order = sorted(mixing.spreads, key=lambda one: np.nan_to_num(one.late.value))
    ends = " and ".join(f"{one.late.value:.3f} with {spread_name(one, mixing)}" for one in (order[0], order[-1]))
    caption = f"Relative change of the tokens after it, at the last depth but one: between {ends}."
    drawing = charts.curves("spread", DEPTH, Axis("relative change"), lines)
    return Chart(drawing, "Spread of one changed token", caption, tuple(line.key for line in lines),
                 numbers=series(lines, "depth"))  # fmt: skip


def spread_map(one: Spread, index: int, most: float, name: str) -> Chart:
    """Change by depth and position."""
    values = one.by_depth
    tips = charts.by_cell_or_column(values, ("position", "depth"))
    drawing = charts.heat(f"spread-map-{index}", charts.steps(values, 0, most), "q", tips, ("position", "depth"))
    after = later(one)
    depth, offset = np.unravel_index(int(np.nanargmax(after)), after.shape)
    position = offset + (one.changed + 1 if after.shape != values.shape else 0)
    most_of = f"position {position} changes most: {np.nanmax(after):.2f} at depth {depth}"
    caption = f"Token {one.changed} is replaced. After it, {most_of}."
    return Chart(drawing, f"Where the change goes: {name}", caption, ramp=("q", "0", f"{most:.2f} or more"))


GEOMETRY = {
    "matrix_entropy": "Matrix entropy", "effective_rank": "Effective rank", "similarity": "Similarity of tokens",
    "spread": "Spread around the mean",
}  # fmt: skip
"""Measures of the residual stream's shape, and their titles."""


def geometry_chart(geometry: Geometry, measure: str, title: str) -> Chart:
    """One measure with all rows and without the sink's."""
    whole, without = getattr(geometry, measure), getattr(geometry, f"{measure}_without")
    depths = np.arange(len(whole))
    lines = [
        Line(Key("all tokens", "red"), depths, whole),
        Line(Key("without the sink", "blue", (4, 2)), depths, without),
    ]
    at = int(np.argmax(np.abs(whole - without)))
    caption = f"The sink matters most at depth {at}: {figures(whole[at])} with it, {figures(without[at])} without it."
    drawing = charts.curves(f"geometry-{measure}".replace("_", "-"), DEPTH, Axis(""), lines)
    subject = f"{title}: {geometry.condition}"
    return Chart(drawing, subject, caption, tuple(line.key for line in lines), numbers=series(lines, "depth"))
