"""Where attention goes: sink rates by condition, threshold and length; entropy; what kind each head is of."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sinks.analysis.findings import WEAK, gaps
from sinks.analysis.inputs import MOVED_TO
from sinks.analysis.measures.entropy import KINDS, Entropy, Heads, Profile
from sinks.analysis.measures.sink_rate import SinkRate, SinkRates
from sinks.analysis.survey import Survey
from sinks.report.scan import charts
from sinks.report.scan.charts import DASHES, Axis, Bar, Line, figures, keys_of, line_of, series
from sinks.report.scan.markup import MOST_CELLS, Chart, Key, Section, table
from sinks.report.scan.words import BOUND, percent, place_of, primary, share, stretches

SHARE = Axis("share of heads", percent=True)
MASS = Axis("share of attention", percent=True)


# Sinks


def sink_section(survey: Survey) -> Section | None:
    """Everything about the sink rate."""
    rates, one = survey.sink_rates, primary(survey)
    if rates is None or one is None:
        return None
    found = [conditions_chart(rates), map_chart(one, "sink-map", wide=True)]
    others = [other for other in rates.conditions if other is not one and other.condition.tokens == "natural"]
    found += [map_chart(other, f"sink-map-{index}") for index, other in enumerate(others)]
    found += [mass_chart(rates), masses_chart(rates), threshold_chart(rates)]
    found += [length_chart(rates)] if rates.lengths else []
    found += [keys_chart(rates)]
    lead = rates.verdict or f"The sink is bound to {BOUND.get(rates.bound_to, rates.bound_to)}."
    return Section("sinks", "Which heads have a sink", lead, tuple(found))


def conditions_chart(rates: SinkRates) -> Chart:
    """The rate by what the model was shown."""
    rows = [
        Bar(one.condition.name, one.rate.value, one.rate.low, one.rate.high, percent(one.rate.value),
            TOKENS.get(one.condition.tokens, "blue"))
        for one in rates.conditions
    ]  # fmt: skip
    natural = [one for one in rates.conditions if one.condition.tokens == "natural"] or list(rates.conditions)
    told = [f"{percent(one.rate.value)} {BOS[one.condition.bos]}" for one in natural]
    caption = f"Heads with a sink on natural text: {', '.join(told)}."
    if not natural[0].is_natural:
        caption = f"Heads with a sink: {share(natural[0].rate)} with “{natural[0].condition.name}”."
    others = [one for one in rates.conditions if one not in natural]
    if others:
        most = max(others, key=lambda one: np.nan_to_num(one.rate.value))
        caption += f" Otherwise most with “{most.condition.name}”: {percent(most.rate.value)}."
    head = ("condition", "sink at", "rate", "aggregated", "anywhere", "first token", "first four", "all sinks",
            "argmax",
            "uniform floor", "sinks", "epsilon", "tokens", "texts")  # fmt: skip
    numbers = table(head, [condition_row(one) for one in rates.conditions])
    drawing = charts.bars("conditions", rows, SHARE)
    return Chart(drawing, "Sink rate by condition", caption, numbers=numbers)


TOKENS = {"natural": "blue", "random": "red", "repeated": "green"}
BOS = {"none": "without BOS", "first": "with BOS", "moved": f"at a BOS moved to {MOVED_TO}",
       "framed": "between class token and separator"}  # fmt: skip
BOS_DASHES = {"none": DASHES[0], "first": DASHES[1], "moved": DASHES[2]}
"""A condition's colour says what its tokens are, and its dashes where BOS stands."""


def condition_keys(rates: SinkRates) -> list[Key]:
    """How each condition's line is drawn."""
    found = [one.condition for one in rates.conditions]
    return [Key(one.name, TOKENS.get(one.tokens, "blue"), BOS_DASHES.get(one.bos, ())) for one in found]


def condition_row(one: SinkRate) -> list[str]:
    """A condition's numbers."""
    return [
        one.condition.name, str(one.sink), share(one.rate), percent(one.aggregated), share(one.anywhere),
        share(one.first_mass), share(one.first_four_mass), share(one.sink_mass), share(one.argmax), figures(one.floor),
        ", ".join(map(str, one.sinks)) or "none", f"{one.epsilon:g}", str(one.tokens), str(one.texts),
    ]  # fmt: skip


def map_chart(one: SinkRate, name: str, wide: bool = False) -> Chart:
    """Importance of the sink key, layer by head."""
    layers, heads = one.heads.shape
    known = one.sink < one.importance.shape[2]
    values = (one.importance[:, :, one.sink] if known else np.full((layers, heads), np.nan)).T
    tall = 250 if wide else charts.HEIGHT
    tips = charts.by_cell_or_column(values)
    most = full_scale(values)
    drawing = charts.heat(name, charts.steps(values, 0, most), "q", tips, wide=wide, height=tall)
    head, layer = np.unravel_index(np.nanargmax(values), values.shape) if known and values.size else (0, 0)
    caption = f"Strongest: layer {layer}, head {head}, with {values[head, layer]:.2f}. {bare_layers(one)}"
    by_layer = zip(range(layers), one.heads.mean(axis=1).tolist(), values.mean(axis=0).tolist(), strict=True)
    rows = [[str(at), percent(rate), f"{mean:.3f}"] for at, rate, mean in by_layer]
    numbers = table(("layer", "heads with a sink", "mean importance"), rows)
    subject = f"Importance of {place_of(one)} by layer and head: {one.condition.name}"
    ends = ("0", "1 (all attention)" if most == 1 else f"{most:g} of all attention")
    return Chart(drawing, subject, caption, ramp=("q", *ends), numbers=numbers, wide=wide)


def full_scale(values: Float[np.ndarray, "heads layers"]) -> float:
    """Where the colours end: at 1, so that models can be compared, unless nothing could be told apart then."""
    most = float(np.nanmax(values, initial=0))
    return 1.0 if most > 0.3 or most <= 0 else float(np.ceil(most * 20) / 20)


def bare_layers(one: SinkRate) -> str:
    """Which layers have no sink, and whether these are a gap between layers that have."""
    by_layer = one.heads.mean(axis=1)
    bare = np.flatnonzero(by_layer < WEAK)
    if not len(bare):
        return "Every layer has heads with a sink."
    if len(bare) == len(by_layer):
        return "No layer has a sink."
    gap = [layer for first, last in gaps(by_layer) for layer in range(first, last + 1)]
    also = f"; {stretches(gap)} lie between layers that have them" if gap and len(gap) < len(bare) else ""
    if gap and not also:
        return f"A gap: layers {stretches(gap)} have no sink, and those around them do."
    return f"Layers without a sink: {stretches(bare.tolist())}{also}."


def mass_chart(rates: SinkRates) -> Chart:
    """Attention on the first token through depth."""
    lines = [
        Line(key, np.arange(len(one.mass_by_layer)), one.mass_by_layer)
        for key, one in zip(condition_keys(rates), rates.conditions, strict=True)
    ]
    one = max(rates.conditions, key=lambda each: float(np.nanmax(each.mass_by_layer, initial=0)))
    at = int(np.nanargmax(one.mass_by_layer))
    caption = f"Most with “{one.condition.name}”: {percent(one.mass_by_layer[at])} of all attention in layer {at}."
    return Chart(charts.curves("mass", Axis("layer"), MASS, lines), "Attention on the first token through depth",
                 caption, tuple(line.key for line in lines), numbers=series(lines, "layer", percent))  # fmt: skip


def masses_chart(rates: SinkRates) -> Chart:
    """Attention on the first token, and on the first four."""
    rows = [
        Bar(one.condition.name, one.first_mass.value, one.first_mass.low, one.first_mass.high,
            f"{percent(one.first_mass.value)}, {percent(one.first_four_mass.value)}",
            TOKENS.get(one.condition.tokens, "blue"), behind=one.first_four_mass.value)
        for one in rates.conditions
    ]  # fmt: skip
    gains = np.nan_to_num([one.first_four_mass.value - one.first_mass.value for one in rates.conditions])
    at = int(np.argmax(gains))
    name = rates.conditions[at].condition.name
    caption = f"Full: the sink's token; pale: the first four, at most {100 * gains[at]:.1f} points more (“{name}”)."
    head = ("condition", "first token", "first four")
    numbers = [[one.condition.name, share(one.first_mass), share(one.first_four_mass)] for one in rates.conditions]
    return Chart(
        charts.bars("masses", rows, MASS), "Attention on the first tokens", caption, numbers=table(head, numbers)
    )


def threshold_chart(rates: SinkRates) -> Chart:
    """The rate against epsilon."""
    lines = [
        line_of(key, one.curve) for key, one in zip(condition_keys(rates), rates.conditions, strict=True) if one.curve
    ]
    one = max(rates.conditions, key=lambda each: np.nan_to_num(each.rate.value))
    ends = sorted(one.curve)
    caption = (
        f"With “{one.condition.name}” the rate falls from {percent(one.curve[ends[0]].value)} above {ends[0]:g} to "
        f"{percent(one.curve[ends[-1]].value)} above {ends[-1]:g}: a rate means nothing without its epsilon."
    ) if ends else "No thresholds were measured."  # fmt: skip
    return Chart(charts.curves("thresholds", Axis("epsilon"), SHARE, lines), "Sink rate against its threshold", caption,
                 tuple(line.key for line in lines), numbers=series(lines, "epsilon", percent))  # fmt: skip


def keys_chart(rates: SinkRates) -> Chart:
    """The rate at each of the first keys."""
    names = [one.condition.name for one in rates.conditions]
    most = max(len(one.rate_at) for one in rates.conditions)
    values = np.array([[*one.rate_at, *[np.nan] * (most - len(one.rate_at))] for one in rates.conditions])
    tips = [[f"{name}, key {key}: {percent(rate)}" for name, rate in zip(names, values[:, key].tolist(), strict=True)]
            for key in range(most)]  # fmt: skip
    drawing = charts.heat("first-keys", charts.steps(values, 0, 1), "q", tips, ("key", ""), left=128)
    drawing.figure.axes[0].set_yticks(range(len(names)), names, parse_math=False)
    row, key = np.unravel_index(int(np.nanargmax(values)), values.shape)
    second = np.sort(np.nan_to_num(values[row]))[::-1]
    caption = f"Highest: key {key} with “{names[row]}”, {percent(values[row, key])}"
    caption += f"; no other key has more than {percent(second[1])} there." if most > 1 else "."
    found = [[str(key), *(percent(rate) for rate in values[:, key].tolist())] for key in range(most)]
    return Chart(drawing, "Sink rate at each of the first keys", caption, ramp=("q", "0", "all heads"),
                 numbers=table(("key", *names), found))  # fmt: skip


def length_chart(rates: SinkRates) -> Chart:
    """Rate and mass against the length of the text."""
    lines = []
    for index, one in enumerate(rates.lengths):
        dashes = DASHES[index % len(DASHES)]
        lines.append(line_of(Key(f"{one.condition.name}: rate", "blue", dashes), one.rate))
        lines.append(line_of(Key(f"{one.condition.name}: attention", "red", dashes), one.mass))
    first, last = lines[0], rates.lengths[0]
    caption = (
        f"With “{last.condition.name}” the rate goes from {percent(first.y[0])} at {first.x[0]:g} tokens to "
        f"{percent(first.y[-1])} at {first.x[-1]:g}: compare models at one length."
    )
    return Chart(charts.curves("lengths", Axis("tokens", log=True), Axis("share", percent=True), lines),
                 "Sink rate against the length of the text", caption, tuple(line.key for line in lines),
                 numbers=series(lines, "tokens", percent))  # fmt: skip


# Entropy and heads


def entropy_section(survey: Survey) -> Section | None:
    """Entropy curves, the kinds of heads, and the folklore."""
    entropy = survey.entropy
    if entropy is None:
        return None
    found = (*(position_chart(entropy, measure) for measure in POSITIONS), depth_chart(entropy), kinds_chart(entropy))
    rows = [
        [one.claim, "holds" if one.holds else "does not hold", figures(one.measured),
         "" if np.isnan(one.low) else f"{figures(one.low)} to {figures(one.high)}", one.rule]
        for one in entropy.folklore
    ]  # fmt: skip
    kept = [one.claim for one in entropy.folklore if one.holds]
    lead = f"Of {len(rows)} sayings about entropy along a stream, {len(kept)} hold here." if rows else ""
    more = f"<h3>Folklore</h3>{table(('claim', 'verdict', 'measured', 'interval', 'rule'), rows)}" if rows else ""
    return Section("entropy", "How attention spreads", lead, found, more)


POSITIONS = {
    "normalised": "Normalised entropy along the text",
    "without_sink": "Entropy without the sink, in nats, along the text",
    "sink_mass": "Attention on the sinks along the text",
}
"""What is drawn by position, and under which title."""


def position_chart(entropy: Entropy, measure: str) -> Chart:
    """One measure of every way of reading, by position, over all heads."""
    names = [profile.name for profile in entropy.profiles]
    lines = [
        Line(key, profile.ends, over_heads(profile, measure))
        for key, profile in zip(keys_of(names), entropy.profiles, strict=True)
    ]
    finals = {line.key.name: line.y[np.isfinite(line.y)][-1] for line in lines if np.isfinite(line.y).any()}
    caption = f"At the end of the text: {', '.join(f'{name} {figures(end)}' for name, end in finals.items())}."
    axis = Axis({"normalised": "share of the most possible", "without_sink": "nats"}.get(measure, "share of attention"))
    drawing = charts.curves(f"entropy-{measure}".replace("_", "-"), Axis("position"), axis, lines)
    return Chart(drawing, POSITIONS[measure], caption, tuple(line.key for line in lines),
                 numbers=series(lines, "position"))  # fmt: skip


def over_heads(profile: Profile, measure: str) -> Float[np.ndarray, " bins"]:
    """The mean over layers and heads that have the measure."""
    values = getattr(profile, measure)
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis=(0, 1)) / np.where(
        known.any(axis=(0, 1)), known.sum(axis=(0, 1)), np.nan
    )


def depth_chart(entropy: Entropy) -> Chart:
    """Normalised entropy through depth."""
    names = [profile.name for profile in entropy.profiles]
    lines = []
    for key, profile in zip(keys_of(names), entropy.profiles, strict=True):
        known = ~np.isnan(profile.normalised)
        mean = np.where(known, profile.normalised, 0).sum(axis=(1, 2)) / np.maximum(known.sum(axis=(1, 2)), 1)
        lines.append(Line(key, np.arange(len(mean)), mean))
    first = lines[0]
    low, high = int(np.argmin(first.y)), int(np.argmax(first.y))
    caption = (
        f"{first.key.name}: sharpest in layer {low} ({first.y[low]:.2f}), widest in layer {high} ({first.y[high]:.2f})."
    )
    drawing = charts.curves("entropy-depth", Axis("layer"), Axis("share of the most possible"), lines)
    caption = caption[:1].upper() + caption[1:]
    return Chart(drawing, "Normalised entropy through depth", caption, tuple(line.key for line in lines),
                 numbers=series(lines, "layer"))  # fmt: skip


def kinds_chart(entropy: Entropy) -> Chart:
    """What kind every head is of."""
    of = entropy.heads
    counts = np.bincount(of.kind.ravel(), minlength=len(KINDS))
    listed = ", ".join(f"{count} {KINDS[kind]}" for kind, count in enumerate(counts.tolist()) if count)
    layers, heads = of.kind.shape
    if of.kind.size <= MOST_CELLS:
        tips = [[head_text(of, layer, head) for head in range(heads)] for layer in range(layers)]
    else:
        tips = [f"layer {layer}: {counted(of.kind[layer])}" for layer in range(layers)]
    drawing = charts.heat("kinds", of.kind.T, "k", tips, wide=True, height=250)
    legend = tuple(Key(name, f"k{kind}") for kind, name in enumerate(KINDS))
    rows = [[str(layer), *(str(count) for count in np.bincount(of.kind[layer], minlength=len(KINDS)).tolist())]
            for layer in range(layers)]  # fmt: skip
    return Chart(drawing, "What each head does", f"Of {of.kind.size:,} heads: {listed}.", legend,
                 numbers=table(("layer", *KINDS), rows), wide=True)  # fmt: skip


def head_text(of: Heads, layer: int, head: int) -> str:
    """A head's kind, and the measures that it follows from."""
    sink, previous, local, induction, entropy, distance = (
        float(part[layer, head])
        for part in (of.sink_mass, of.previous_mass, of.local_mass, of.induction_mass, of.normalised_entropy,
                     of.mean_distance)
    )  # fmt: skip
    return (
        f"layer {layer}, head {head}: {KINDS[of.kind[layer, head]]} (sink {percent(sink)}, "
        f"previous {percent(previous)}, local {percent(local)}, induction {percent(induction)}, "
        f"entropy {entropy:.2f}, distance {distance:.1f})"
    )


def counted(kinds: np.ndarray) -> str:
    """How many heads of each kind."""
    counts = np.bincount(kinds, minlength=len(KINDS)).tolist()
    return ", ".join(f"{count} {KINDS[kind]}" for kind, count in enumerate(counts) if count)
