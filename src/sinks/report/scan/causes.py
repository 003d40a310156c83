"""Causes and consequences: edits with their controls, meaning, repetition, and how many sinks a stream needs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sinks.analysis.causes.interventions import Effect, HeadEffects, Interventions
from sinks.analysis.measures.repetition import Repetition
from sinks.analysis.measures.semantics import Reading, Semantics
from sinks.analysis.survey import Survey
from sinks.reading.advice import Advice
from sinks.report.scan import charts
from sinks.report.scan.charts import SERIES, Axis, Bar, Line, figures, named, series
from sinks.report.scan.markup import MOST_CELLS, Chart, Key, Section, escape, table
from sinks.report.scan.words import amount, dependence, percent, share
from sinks.report.words import plural

# Interventions


def cause_section(survey: Survey) -> Section | None:
    """What edits of the running model do, each beside its control."""
    found = survey.interventions
    if found is None:
        return None
    pictures = [forest_chart(found), rates_chart(found)] if found.effects else []
    pictures += [head_chart(found.heads), layer_chart(found.heads)] if found.heads else []
    more = (
        f"<h3>Every edit</h3><p class=note>{found.texts} texts of {found.tokens} tokens; perplexity without an edit: "
        f"{amount(found.base, 2)}, sink rate {percent(found.sink_rate)} (next key {percent(found.next_rate)}). Edited: "
        f"{escape(found.spot)}, dimensions {', '.join(map(str, found.spot.dims))}. A control stands under its edit.</p>"
        f"{effect_table(found)}"
    )
    return Section("causes", "What is cause and what is not", found.verdict, tuple(pictures), more)


def ordered(found: Interventions) -> list[tuple[Effect, bool]]:
    """Edits by group, each followed by its controls (True)."""
    names = {one.name for one in found.effects}
    edits = [one for one in found.effects if one.control_of not in names]
    groups = list(dict.fromkeys(one.group for one in edits))
    rows: list[tuple[Effect, bool]] = []
    for one in sorted(edits, key=lambda edit: groups.index(edit.group)):
        rows.append((one, False))
        rows += [(control, True) for control in found.effects if control.control_of == one.name]
    return rows


def forest_chart(found: Interventions) -> Chart:
    """Loss ratios with intervals, on a logarithmic axis."""
    rows = ordered(found)
    groups = list(dict.fromkeys(one.group for one, _ in rows))
    bars = [
        Bar(one.name, one.ratio.value, one.ratio.low, one.ratio.high, f"x {amount(one.ratio)}",
            SERIES[groups.index(one.group) % len(SERIES)], control)
        for one, control in rows
    ]  # fmt: skip
    worst = max(found.effects, key=lambda one: np.nan_to_num(one.ratio.value))
    controls = [one for one in found.effects if one.control_of == worst.name]
    caption = f"Worst: “{worst.name}”, perplexity times {figures(worst.ratio.value)}"
    caption += f"; its control: {figures(controls[0].ratio.value)}." if controls else "."
    caption += " Open points are controls of the edit above them." if controls else ""
    caption += " An arrow lies beyond the edge." if worst.ratio.value > charts.FAR else ""
    legend = tuple(Key(group, SERIES[index % len(SERIES)]) for index, group in enumerate(groups))
    drawing = charts.forest("forest", bars, Axis("perplexity with the edit over perplexity without"), 1)
    return Chart(drawing, "What each edit does to perplexity", caption, legend, wide=True)


def rates_chart(found: Interventions) -> Chart:
    """Where the sink is while an edit is on."""
    rows = ordered(found)
    groups = list(dict.fromkeys(one.group for one, _ in rows))
    bars = [
        Bar(one.name, one.sink_rate, np.nan, np.nan,
            f"sink {percent(one.sink_rate)}, next key {percent(one.next_rate)}",
            SERIES[groups.index(one.group) % len(SERIES)], control, one.next_rate)
        for one, control in rows
    ]  # fmt: skip
    moved = max(found.effects, key=lambda one: np.nan_to_num(one.next_rate))
    caption = f"Full: at the sink ({percent(found.sink_rate)} without an edit); open: at the key after it, highest "
    caption += f"with “{moved.name}”, {percent(moved.next_rate)}."
    drawing = charts.pairs("edited-rates", bars, Axis("share of heads", percent=True))
    return Chart(drawing, "Where the sink is meanwhile", caption)


def effect_table(found: Interventions) -> str:
    """All numbers of all edits."""
    head = ("edit", "ratio", "loss difference", "KL", "agreement", "sink rate", "next key", "perplexity", "group")
    rows = [
        [("control: " if control else "") + one.name, amount(one.ratio), amount(one.loss), amount(one.kl),
         share(one.agreement), percent(one.sink_rate), percent(one.next_rate), amount(one.perplexity, 2), one.group]
        for one, control in ordered(found)
    ]  # fmt: skip
    return table(head, rows)


def head_chart(of: HeadEffects) -> Chart:
    """What taking the sink from one head does."""
    values = of.removed.T
    known = np.abs(np.concatenate([values[~np.isnan(values)], np.zeros(1)]))
    most = float(known.max()) or 1.0
    levels = charts.steps(values, -most, most, charts.STEPS + 1)
    tips = charts.by_cell_or_column(values, unit="+.4f")
    drawing = charts.heat("head-effects", levels, "d", tips, wide=True, height=250)
    if np.isnan(values).all():
        caption = "No head was tried."
    else:
        head, layer = np.unravel_index(int(np.nanargmax(np.abs(values))), values.shape)
        beside = of.control[layer, head]
        caption = (
            f"Largest: layer {layer}, head {head}, {values[head, layer]:+.4f} nats a token (control {beside:+.4f}). "
        )
        caption += f"The sink matters in {int(of.matter.sum())} of {int((~np.isnan(values)).sum())} heads tried."
    rows = [
        [str(layer), *(head_text(of, layer, head) for head in range(len(values)))]
        for layer in range(values.shape[1])
    ] if values.size <= MOST_CELLS else []  # fmt: skip
    numbers = table(("layer: effect (interval); control", *(f"head {head}" for head in range(len(values)))), rows)
    ramp = ("d", f"{-most:+.4f} (better)", f"{most:+.4f} nats (worse)")
    return Chart(drawing, "Loss when the sink is taken from one head", caption, ramp=ramp, wide=True,
                 numbers=numbers if rows else "")  # fmt: skip


def head_text(of: HeadEffects, layer: int, head: int) -> str:
    """One head's effect, its interval, and its control."""
    removed, low, high, control = (part[layer, head] for part in (of.removed, of.low, of.high, of.control))
    return "not tried" if np.isnan(removed) else f"{removed:+.4f} ({low:+.4f} to {high:+.4f}); {control:+.4f}"


def layer_chart(of: HeadEffects) -> Chart:
    """The same, layer by layer."""
    lines = [
        Line(key, np.arange(len(values)), charts.across(np.mean, values))
        for key, values in ((Key("sink taken", "red"), of.removed), (Key("control", "blue", (4, 2)), of.control))
    ]
    worst = np.nan_to_num(lines[0].y)
    at = int(np.argmax(worst))
    caption = f"Mean over heads. Worst in layer {at}: {worst[at]:+.4f} nats ({of.texts} texts of {of.tokens} tokens)."
    drawing = charts.curves("layer-effects", Axis("layer"), Axis("nats a token"), lines)
    return Chart(
        drawing, "The same by layer", caption, tuple(line.key for line in lines), numbers=series(lines, "layer")
    )


# Meaning and repetition


def meaning_section(survey: Survey) -> Section | None:
    """Whether a sink tells what text it stands before."""
    semantics = survey.semantics
    if semantics is None:
        return None
    head = ("source", "carrier", "prefix", "where", "classes", "probe", "gain over the token",
            "shuffled labels", "nearest other", "chance", "attention it gets",
            "over uniform", "variation")  # fmt: skip
    rows = [
        [one.source, one.carrier, one.prefix, one.where, str(one.classes), share(one.accuracy), share(one.gain),
         share(one.shuffled), share(one.retrieval), percent(one.chance), share(one.attention), f"{one.lift:.1f} x",
         figures(one.variation)]
        for one in semantics.readings
    ]  # fmt: skip
    found = (probe_chart(semantics),) if semantics.readings else ()
    lead = semantics.verdict + FROZEN[semantics.frozen]
    return Section("meaning", "Does a sink mean anything?", lead, found, table(head, rows) if rows else "")


FROZEN = {
    True: " In a stream its keys and values stay, bit for bit, what they were at the start.",
    False: " In a stream its keys and values do not stay what they were at the start.",
    None: "",
}
"""What is said of the sinks of a stream."""


def probe_chart(semantics: Semantics) -> Chart:
    """Accuracy of the best carrier of every source, beside chance."""
    best: dict[tuple[str, str, str, int], Reading] = {}
    for one in semantics.readings:
        place = (one.source, one.prefix, one.where, one.classes)
        if place not in best or np.nan_to_num(one.accuracy.value) > np.nan_to_num(best[place].accuracy.value):
            best[place] = one
    shown = list(best.values())
    rows = [
        Bar(f"{one.source}, {one.prefix}, {one.where} ({one.carrier})", one.accuracy.value, one.accuracy.low,
            one.accuracy.high, percent(one.accuracy.value), "blue" if one.source == "sink" else "pink")
        for one in shown
    ]  # fmt: skip
    top = max(shown, key=lambda one: np.nan_to_num(one.accuracy.value))
    caption = (
        f"Best: {top.source} ({top.carrier}), right {percent(top.accuracy.value)} of the time, where chance is "
        f"{percent(top.chance)}. Each source with the carrier that tells most."
    )
    drawing = charts.bars("probes", rows, Axis("accuracy", percent=True), left=300, wide=True)
    for chance in sorted({one.chance for one in shown}):
        drawing.figure.axes[0].axvline(chance, color=charts.PAINTS["ink"], lw=1)
    legend = (Key("sink", "blue"), Key("other", "pink"), Key("chance", "ink"))
    return Chart(drawing, "What a linear probe reads", caption, legend, wide=True)


def repetition_section(survey: Survey) -> Section | None:
    """What repeats do to attention and to answers."""
    repetition = survey.repetition
    if repetition is None:
        return None
    found = tuple(dose_chart(repetition, measure) for measure in ("attention", "log_odds")) if repetition.doses else ()
    rows = [[one.kind, one.sink, amount(one.attention_slope), amount(one.answer_slope)] for one in repetition.doses]
    head = ("kind", "sink", "slope of attention", "slope of the answer")
    return Section("repetition", "Repetition", repetition.verdict, found, table(head, rows) if rows else "")


def dose_chart(repetition: Repetition, measure: str) -> Chart:
    """Attention on a span, or log odds of its answer, by how often it is repeated."""
    lines = [
        Line(key, dose.repeats, getattr(dose, measure))
        for key, (_, dose) in named({f"{one.kind}, sink {one.sink}": one for one in repetition.doses})
    ]
    first, percents = lines[0], measure == "attention"
    ends = [percent(end) if percents else f"{end:+.2f}" for end in (first.y[0], first.y[-1])]
    name = first.key.name[:1].upper() + first.key.name[1:]
    caption = f"{name}: from {ends[0]} with {first.x[0]} to {ends[1]} with {first.x[-1]} repeats."
    axis = Axis("share of attention" if percents else "log odds, wrong over right", percent=percents)
    drawing = charts.curves(f"dose-{measure}".replace("_", "-"), Axis("repeats", log=True), axis, lines)
    title = "Attention on the repeated span" if percents else "How the answer leans towards it"
    return Chart(drawing, title, caption, tuple(line.key for line in lines),
                 numbers=series(lines, "repeats", percent if percents else figures))  # fmt: skip


# Advice


def advice_section(survey: Survey) -> Section | None:
    """How many sinks to keep."""
    advice = survey.advice
    if advice is None:
        return None
    verdict, what = dependence(survey)
    interval = f"ratio {advice.ratio:.2f} ({advice.low:.2f} to {advice.high:.2f}) over {advice.tokens:,} tokens"
    return Section("advice", "How many sinks to keep", f"{verdict}. {what}", tuple(advice_charts(advice)),
                   f'<p class="note">Perplexity with none kept over {advice.sinks} kept: {interval}.</p>')  # fmt: skip


def advice_charts(advice: Advice) -> Iterator[Chart]:
    """Perplexity by sinks, and by capacity."""
    yield advice_chart(advice)
    if advice.by_capacity:
        yield capacity_chart(advice)


def capacity_chart(advice: Advice) -> Chart:
    """Perplexity by how many keys are held in all, with the advised number of sinks."""
    found = sorted(advice.by_capacity.items())
    key = Key(f"{plural(advice.sinks, 'sink')} kept", "blue")
    line = Line(key, np.array([keys for keys, _ in found]), np.array([value for _, value in found]))
    lines = [line]
    if advice.dense is not None:
        lines.append(Line(Key("full attention", "ink", (4, 2)), line.x, np.full(len(found), advice.dense)))
    ends = (f"{figures(line.y[at], 2)} with {line.x[at]:,}" for at in (0, -1))
    caption = f"From {' keys to '.join(ends)}; advised: {advice.sinks + advice.window:,}."
    drawing = charts.curves("capacities", Axis("keys held", log=True), Axis("perplexity"), lines)
    keys = tuple(one.key for one in lines)
    return Chart(drawing, "Perplexity by memory", caption, keys, numbers=series(lines, "keys"))


def advice_chart(advice: Advice) -> Chart:
    """Perplexity by how many sinks are kept, at equal memory."""
    found = sorted(advice.perplexity.items())
    rows = [
        Bar(f"{kept} kept", value, np.nan, np.nan, figures(value, 2), "red" if kept == 0 else "blue")
        for kept, value in found
    ]
    if advice.dense is not None:
        rows.append(Bar("full attention", advice.dense, np.nan, np.nan, figures(advice.dense, 2), "ink"))
    values = dict(found)
    kept = f"with {advice.sinks} kept {figures(values[advice.sinks], 2)}" if advice.sinks in values else ""
    none = f"without a sink {figures(values[0], 2)}" if 0 in values else ""
    told = ", ".join(part for part in (none, kept) if part)
    caption = f"Every stream holds {advice.capacity:,} keys. Perplexity: {told}."
    numbers = table(("kept", "perplexity"), [[row.name, row.label] for row in rows])
    return Chart(
        charts.bars("advice-curve", rows, Axis("perplexity"), left=92),
        "Perplexity by kept sinks",
        caption,
        numbers=numbers,
    )
