"""The pages: one model as one HTML file that opens offline, many models as an atlas, one model as a card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from sinks.analysis.inputs import Bos
from sinks.analysis.survey import Survey
from sinks.reading.estimate import Estimate
from sinks.report.scan import attention, causes, charts, residual
from sinks.report.scan.markup import PAINTS, Chart, Section, escape, figure, svg, table
from sinks.report.scan.residual import sentence
from sinks.report.scan.saved import from_plain, model_name
from sinks.report.scan.words import (
    BOUND,
    DEFINITIONS,
    Signature,
    dependence,
    headline,
    loudest,
    outstanding,
    percent,
    primary,
    share,
    signatures,
    title,
)  # fmt: skip

DARK = {
    "ink": "#ecebe8", "faint": "#a3a2a0", "grid": "#35343a", "paper": "#17161b", "blue": "#5cb3ee", "red": "#f58a42",
    "green": "#35c79b", "pink": "#e3a1c5", "sky": "#9fd4f5", "amber": "#f0b93d",
}  # fmt: skip
"""The colours of `PAINTS` on a dark ground."""

TOGGLE = '<button id="theme" type="button" hidden>Dark</button>'
"""Without a script the page follows the system, and there is nothing to press."""

KIND_PAINTS = ("blue", "green", "pink", "amber", "ink", "grid")
"""The colours of the kinds of heads, in the order of `KINDS`; mixed heads stand back."""

SECTIONS = (
    attention.sink_section, residual.massive_section, attention.entropy_section, residual.mixing_section,
    causes.cause_section, causes.meaning_section, causes.repetition_section, causes.advice_section,
)  # fmt: skip


# One model


def page(survey: Survey) -> str:
    """Everything about one model, as one HTML file without anything to load."""
    made = [section for make in SECTIONS if (section := make(survey))]
    made = [*findings_section(survey), *made, *left_out_section(survey), settings_section(survey), terms_section()]
    links = "".join(f'<a href="#{one.name}">{one.name.replace("-", " ").capitalize()}</a>' for one in made)
    body = (
        f'<a class="skip" href="#content">Skip to the content</a>{header(survey)}<nav aria-label="Sections">'
        f"<div>{links}{TOGGLE}</div></nav>"
        f'<main id="content">{"".join(section_html(one) for one in made)}</main>'
    )
    return document(title(survey), body)


def header(survey: Survey) -> str:
    """What one should know who reads nothing else."""
    verdict, what = dependence(survey)
    needy = " needy" if survey.advice and survey.advice.dependent else ""
    origin = [named_part(survey.about.get("sources")), day(survey.about.get("created"))]
    subtitle = " · ".join(escape(part) for part in ("sinks scan", *origin) if part)
    cards = "".join(signature_html(one, f"signature-{index}") for index, one in enumerate(signatures(survey)))
    return (
        f'<header><p class="eyebrow">{subtitle}</p><h1>{escape(model_name(survey))}</h1>'
        f'<p class="headline">{escape(headline(survey))}</p>'
        f'<div class="verdict{needy}"><p><strong>{escape(verdict)}</strong></p><p>{escape(what)}</p></div>'
        f'<div class="signatures">{cards}</div></header>'
    )


def signature_html(one: Signature, name: str) -> str:
    """A signature: name, number, course through depth, sentence."""
    course, quiet = "", " quiet" if one.course is None else ""
    if one.course is not None:
        label = escape(f"{one.name} by {one.place}")
        drawing = charts.spark(name, one.course, one.axis, one.place)
        course = (
            f'{svg(drawing, label)}<p class="ends"><span>{one.place} 0</span><span>{len(one.course) - 1}</span></p>'
        )
    return (
        f'<section class="signature"><h2>{escape(one.name)}</h2><p class="value{quiet}">{escape(one.value)}</p>'
        f"<p>{escape(one.text)}</p>{course}</section>"
    )


def section_html(one: Section) -> str:
    """A section of the page."""
    lead = f'<p class="lead">{escape(sentence(one.lead))}</p>' if one.lead else ""
    pictures = f'<div class="charts">{"".join(map(figure, one.charts))}</div>' if one.charts else ""
    return f'<section id="{one.name}"><h2>{escape(one.title)}</h2>{lead}{pictures}{one.more}</section>'


def findings_section(survey: Survey) -> Iterator[Section]:
    """What the survey found by itself, each with its rule."""
    if survey.findings:
        cards = "".join(
            f"<article><h3>{escape(one.title)}</h3><p>{escape(one.text)}</p>"
            f'<p class="rule">Rule: {escape(one.rule)}</p></article>'
            for one in survey.findings
        )
        yield Section("findings", "What stands out", "", more=f'<div class="findings">{cards}</div>')


def left_out_section(survey: Survey) -> Iterator[Section]:
    """What is missing, and why."""
    if survey.left_out:
        rows = [[name.replace("_", " "), reason] for name, reason in survey.left_out.items()]
        yield Section("left-out", "Left out", "", more=table(("part", "reason"), rows))


def settings_section(survey: Survey) -> Section:
    """Where the numbers come from, and how to have them again."""
    command = survey.about.get("command")
    again = f"<h3>Once more</h3><pre tabindex=0><code>{escape(command)}</code></pre>" if command else ""
    rows = [[name, value] for name, value in flat(survey.about) if name != "command"]
    more = again + (table(("setting", "value"), rows) if rows else "")
    if survey.seconds:
        times = [[name, f"{seconds:,.1f} s"] for name, seconds in survey.seconds.items()]
        more += f"<h3>Time</h3>{table(('stage', 'time'), times)}"
    return Section("settings", "Settings and machine", "", more=more)


def terms_section() -> Section:
    """Every measure in a line."""
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in DEFINITIONS.items())
    return Section("terms", "What the words mean", "", more=f'<dl class="terms">{terms}</dl>')


def flat(about: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as names and values."""
    for name, value in about.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}: ")
        elif value is not None and value != "":
            yield f"{prefix}{name}", told(value)


def told(value: object) -> str:
    """A setting in words; of a mapping among others, its values."""
    if isinstance(value, Mapping):
        return " · ".join(f"{name} {told(inner)}" for name, inner in value.items() if inner not in ("", None))
    return ", ".join(map(told, value)) if isinstance(value, list | tuple) else str(value)


def named_part(part: object) -> str:
    """The name of a text that may be told as a mapping, or the names of several, of which three are enough."""
    if isinstance(part, list | tuple):
        names = [named_part(one) for one in part]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return str(part.get("name", "")) if isinstance(part, Mapping) else str(part or "")


def day(moment: object) -> str:
    """The day of an ISO moment."""
    return str(moment or "").partition("T")[0]


# Many models


def atlas(surveys: Sequence[Survey | Mapping[str, Any]], links: Sequence[str] | None = None) -> str:
    """One page for many models, from surveys or their saved JSON; each row leads to `links`, or else `page_name`."""
    found = [one if isinstance(one, Survey) else from_plain(one) for one in surveys]
    targets = list(links) if links is not None else [page_name(one) for one in found]
    pairs = list(zip(found, targets, strict=True))
    needy = [one for one in found if one.advice and one.advice.dependent]
    judged = [one for one in found if one.advice]
    lead = f"{len(needy)} of {len(judged)} models that were tried as streams depend on their sinks." if judged else ""
    rows = "".join(atlas_row(one, link) for one, link in pairs)
    columns = "".join(f"<th scope=col>{name}</th>" for name in ATLAS)
    cards = "".join(atlas_card(one, link, index) for index, (one, link) in enumerate(pairs))
    body = (
        f'<header><p class="eyebrow">sinks scan</p><h1>An atlas of attention sinks</h1>'
        f'<p class="headline">{escape(f"{len(found)} models, three signatures each.")} {escape(lead)}</p></header>'
        f'<nav aria-label="Sections"><div><a href="#table">Table</a><a href="#models">Models</a>{TOGGLE}</div></nav>'
        f'<main><section id="table"><h2>Side by side</h2>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Models"><table class="atlas">'
        f"<thead><tr>{columns}</tr>"
        f'</thead><tbody>{rows}</tbody></table></div></section><section id="models"><h2>Model by model</h2>'
        f'<p class="lead">Above: importance of the sink key, layer by head. Below: massive activations and value norms '
        f'through depth.</p><div class="models">{cards}</div></section></main>'
    )
    return document("An atlas of attention sinks", body)


ATLAS = ("model", "no BOS", "BOS first", "BOS moved", "first token", "bound to", "massive", "at depth", "value drain",
         "sink-dependent", "keep")  # fmt: skip


def atlas_row(survey: Survey, link: str) -> str:
    """One model's row; shares carry a bar."""
    rates = [rate_of(survey, bos) for bos in ("none", "first", "moved")]
    one, (_, loud), advice = primary(survey), loudest(survey), survey.advice
    cells = [meter(rate) for rate in rates] + [meter(one.first_mass if one else None)]
    bound = survey.sink_rates.bound_to if survey.sink_rates else ""
    cells += [f'<td title="{escape(BOUND.get(bound, bound))}">{escape(bound)}</td>']
    ratio = outstanding(loud) if loud else np.zeros(0)
    drain = signatures(survey)[2].value
    words = [f"{ratio.max():,.0f} ×", str(int(ratio.argmax()))] if ratio.size else ["", ""]
    words += [drain if drain != "not measured" else ""]
    words += [f"{'yes' if advice.dependent else 'no'}, {advice.ratio:.2f} ×", str(advice.sinks)] if advice else ["", ""]
    cells += [f"<td class=n>{word}</td>" for word in words]
    return f'<tr><th scope=row><a href="{escape(link)}">{escape(model_name(survey))}</a></th>{"".join(cells)}</tr>'


def rate_of(survey: Survey, bos: Bos) -> Estimate | None:
    """The sink rate of natural text with BOS at a place."""
    found = survey.sink_rates.conditions if survey.sink_rates else ()
    kept = [one.rate for one in found if one.condition.tokens == "natural" and one.condition.bos == bos]
    return kept[0] if kept else None


def meter(of: Estimate | None) -> str:
    """A share as a cell with a bar."""
    if of is None or np.isnan(of.value):
        return "<td></td>"
    return (
        f'<td class="n meter" title="{escape(share(of))}"><span style="width:{100 * of.value:.1f}%"></span>'
        f"{percent(of.value)}</td>"
    )


def atlas_card(survey: Survey, link: str, index: int) -> str:
    """One model's pictures, small."""
    pictures = [svg(heads_map(survey, f"m{index}-heads"), "sink heads")] if primary(survey) else []
    for place, one in enumerate(signatures(survey)[1:]):
        if one.course is not None:
            drawing = charts.spark(f"m{index}-{place}", one.course, one.axis, one.place)
            pictures.append(
                f'<p class="ends"><span>{one.name}</span><span>{one.value}</span></p>{svg(drawing, one.name)}'
            )
    verdict, _ = dependence(survey)
    name = escape(model_name(survey))
    return f'<article><h3><a href="{escape(link)}">{name}</a></h3><p>{escape(verdict)}</p>{"".join(pictures)}</article>'


def heads_map(survey: Survey, name: str) -> charts.Drawing:
    """The primary condition's map of heads, without axes."""
    one = primary(survey)
    values = one.importance[:, :, one.sink].T if one and one.sink < one.importance.shape[2] else np.zeros((1, 1))
    drawing = charts.heat(name, charts.steps(values, 0, 1), "q", charts.by_cell_or_column(values), height=150)
    axes = drawing.figure.axes[0]
    axes.set_position((0, 0, 1, 1))
    axes.axis("off")
    for words in list(axes.texts):
        words.remove()
    return drawing


def page_name(survey: Survey) -> str:
    """The file name of a model's page."""
    return f"{slug(model_name(survey))}.html"


def slug(name: str) -> str:
    """A name that may stand in files and identifiers."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"


# In a notebook


def html_card(survey: Survey) -> str:
    """A compact card with its own style, for `_repr_html_`."""
    verdict, what = dependence(survey)
    prefix = f"card-{slug(model_name(survey)).replace('.', '-')}"
    parts = "".join(
        f"<div><small>{escape(one.name)}</small><b>{escape(one.value)}</b><p>{escape(one.text)}</p></div>"
        for one in signatures(survey)
    )
    picture = ""
    if (one := primary(survey)) and survey.sink_rates:
        chart: Chart = attention.map_chart(one, f"{prefix}-map", wide=True)
        caption = escape(chart.caption)
        picture = f"<figure>{svg(chart.drawing, caption)}<figcaption>{caption}</figcaption></figure>"
    style = f".sinks-card{{{variables(dark=False)}}}{resource('card.css')}"
    return (
        f'<div class="sinks-card"><style>{style}</style><h3>{escape(model_name(survey))}</h3>'
        f"<p class=said>{escape(headline(survey))}</p><div class=three>{parts}</div>{picture}"
        f"<p><b>{escape(verdict)}.</b> {escape(what)}</p></div>"
    )


# The frame of a page


def document(name: str, body: str) -> str:
    """A whole HTML file: style and script inside, nothing to load."""
    dark = variables(dark=True)
    style = (
        f":root{{color-scheme:light;{variables(dark=False)}}}@media screen{{:root[data-theme=dark]"
        f"{{color-scheme:dark;{dark}}}}}@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{color-scheme:dark;{dark}}}}}{resource('page.css')}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{style}</style></head>\n<body>{body}"
        f"<script>{resource('page.js')}</script></body></html>\n"
    )


def variables(dark: bool) -> str:
    """All colours as CSS variables."""
    paints = DARK if dark else PAINTS
    kinds: Iterable[str] = (f"--k{kind}:var(--{paint})" for kind, paint in enumerate(KIND_PAINTS))
    return ";".join((*(f"--{name}:{colour}" for name, colour in paints.items()), *kinds, charts.ramp_variables(dark)))


def resource(name: str) -> str:
    """A file that lies beside this one."""
    return resources.files("sinks.report.scan").joinpath(name).read_text("utf-8")
