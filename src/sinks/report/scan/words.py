"""What a survey says in words: its headline, the verdict on sinks, the three signatures, and what each measure is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sinks.analysis.findings import DRAINED, WEAK, home_of
from sinks.analysis.measures.massive import Massive
from sinks.analysis.measures.sink_rate import SinkRate
from sinks.analysis.survey import Survey
from sinks.reading.estimate import Estimate
from sinks.report.scan.charts import Axis, across, figures
from sinks.report.scan.saved import model_name
from sinks.report.words import plural

BOUND = {
    "position": "a position: the first one, whatever stands there",
    "token": "a token: BOS, wherever it stands",
    "both": "both the first position and BOS",
    "none": "neither: no sink was found",
}

OVER_MEDIAN = Axis("over median", log=True)

DEFINITIONS = {
    "importance": "mean attention that a key receives from all queries that see it, its own included",
    "sink rate": "share of (text, layer, head) whose importance of the sink key is above epsilon: a fraction of heads, "
    "not of attention",
    "epsilon": "the threshold of the sink rate; 0.3 unless said otherwise",
    "floor": "the importance that the key would have if attention were uniform",
    "aggregated": "the sink rate with importance averaged over texts before it is thresholded",
    "anywhere": "share of heads for which some key of the first half passes epsilon",
    "mass": "mean share of attention on the first token (or first four, or all sinks) over the queries after it",
    "argmax": "share of heads whose most important key, measured over the uniform floor, is the sink",
    "massive activation": "the largest magnitude of a depth's residual stream over its median magnitude, text by text",
    "flag": "above 100, and at least 1,000 medians (Sun et al., arXiv 2402.17762)",
    "lives": "depths at which, in half of the texts, the largest is at least 100 medians and its token 4 times as "
    "long as the others",
    "norm ratio": "norm of the first token over the mean norm of the others",
    "value and key ratio": "norm of the sink's value (key) over the mean of the others'; below 1 is a drain",
    "outliers": "share of tokens whose norm is 3 standard deviations above the mean of their text",
    "kurtosis": "fourth standardised moment over the width, as a share of the most there can be",
    "entropy": "of a query's attention, in nats; normalised: over the log of how many keys it sees",
    "entropy without the sink": "of what is left when the sink keys are taken out and the rest is renormalised",
    "kind of head": "what a stated rule on sink, previous-token, local and induction mass makes of it",
    "spread": "relative change of the residual stream when one token is replaced: |h - h'| / |h|",
    "matrix entropy": "of the squared singular values of a depth, over the log of its smaller side; not centred",
    "effective rank": "exp of the entropy of the squared singular values",
    "similarity": "mean cosine between the tokens of a text",
    "accuracy, retrieval": "of a linear probe on held-out passages; of the nearest other passage by cosine",
    "slope": "change of log attention (of the answer's log odds) per log of the number of repeats; 1 is pure softmax",
    "loss difference": "nats a token, with an edit less without it, on the same tokens; its exp is the ratio",
    "KL, agreement": "from the model to the edited one, nats a token; how often the likeliest next token stays",
    "perplexity": "exp of the mean surprise, nats a token, of a stream that holds the stated number of keys",
    "interval": "95 % bootstrap over texts, 2,000 resamples; heads and layers are no independent samples",
}


@dataclass(frozen=True, eq=False)
class Signature:
    """One of the three: its name, its number, the sentence that explains it, and its course through depth."""

    name: str
    value: str
    text: str
    course: Float[np.ndarray, " points"] | None = None
    axis: Axis = Axis("")
    place: str = "layer"


# The three signatures


def signatures(survey: Survey) -> tuple[Signature, Signature, Signature]:
    """Sinks, massive activations and value drains, side by side and never one score."""
    return sinks_signature(survey), massive_signature(survey), drain_signature(survey)


def sinks_signature(survey: Survey) -> Signature:
    """How many heads have a sink, where most have one."""
    one = primary(survey)
    if one is None:
        return Signature("Attention sinks", "not measured", why_not(survey, "sink_rates", "sink rates"))
    text = (
        f"of heads put more than {one.epsilon:g} of their attention on {place_of(one)} ({one.condition.name}, "
        f"{one.tokens:,} tokens, {one.texts:,} texts; {interval(one.rate)}). The first token takes "
        f"{percent(one.first_mass.value)} of all attention."
    )
    course = one.heads.mean(axis=1)
    return Signature("Attention sinks", percent(one.rate.value), text, course, Axis("heads with a sink", percent=True))


def massive_signature(survey: Survey) -> Signature:
    """How far the largest number stands out."""
    name, one = loudest(survey)
    if one is None:
        return Signature("Massive activations", "not measured", why_not(survey, "massive", "massive activations"))
    course = outstanding(one)
    depth = int(np.argmax(course))
    largest = float(np.median(one.largest[:, depth]))
    passed = int((one.flagged >= 0.5).sum())
    text = (
        f"the median magnitude is the largest number of the residual stream at depth {depth} ({figures(largest, 1)}; "
        f"{name}). "
        f"{passed} of {len(course)} depths pass the flag of Sun et al."
    )
    return Signature("Massive activations", f"{course[depth]:,.0f} ×", text, course, OVER_MEDIAN, "depth")


def drain_signature(survey: Survey) -> Signature:
    """How short the sink's values are."""
    name, one = loudest(survey)
    if one is None or not one.value_ratio.size:
        return Signature("Value drain", "not measured", why_not(survey, "massive", "massive activations"))
    course = across(np.mean, one.value_ratio)
    if np.isnan(course).all():
        return Signature("Value drain", "not measured", "No layer has values to compare.")
    drained, low = int((course < DRAINED).sum()), int(np.nanargmin(course))
    text = (
        f"of the others' length is the sink's value (median of layers; {name}). {drained} of {len(course)} layers are "
        f"below {DRAINED:g}; the lowest is layer {low} with {course[low]:.2f}."
    )
    return Signature("Value drain", f"{np.nanmedian(course):.2f}", text, course, Axis("value norm ratio"))


def primary(survey: Survey) -> SinkRate | None:
    """The condition to show first: the one in which the model is at home, or else any."""
    rates = survey.sink_rates
    return None if rates is None else home_of(rates) or next(iter(rates.conditions), None)


def loudest(survey: Survey) -> tuple[str, Massive | None]:
    """The kind of input with the largest massive activation."""
    found = {name: one for name, one in survey.massive.items() if one.largest.size}
    name = max(found, key=lambda key: float(outstanding(found[key]).max()), default="")
    return name, found.get(name)


def outstanding(one: Massive) -> Float[np.ndarray, " depths"]:
    """Largest over median magnitude by depth; the median over texts."""
    return np.median(one.largest / np.maximum(one.median, 1e-30), axis=0)


# Headline and verdict


def headline(survey: Survey) -> str:
    """The first thing to know, in one sentence."""
    advice, one = survey.advice, primary(survey)
    if advice and advice.dependent:
        kept = "its first token" if advice.sinks == 1 else f"its first {plural(advice.sinks, 'token')}"
        cost = f"{rounded(advice.ratio)} times the perplexity"
        return f"This model leans on {kept}: a stream that lets go of it has {cost}."
    if advice:
        return "This model streams as well without sinks: letting go of its first tokens costs it next to nothing."
    if one and one.rate.value >= WEAK:
        some = f"{percent(one.rate.value, 0)} of the heads"
        return f"{some} give more than {one.epsilon:g} of their attention to {place_of(one)}."
    if one:
        return f"No sink to speak of: {percent(one.rate.value)} of the heads pass at {place_of(one)}."
    return survey.findings[0].title if survey.findings else "What was measured, and what was left out."


def dependence(survey: Survey) -> tuple[str, str]:
    """Whether the model depends on sinks, in a few words, and what to do about it."""
    advice = survey.advice
    if advice is None:
        return "Sink-dependent: not measured", why_not(survey, "advice")
    found = f"yes, {rounded(advice.ratio)} times" if advice.dependent else f"no, {advice.ratio:.2f} times"
    return f"Sink-dependent: {found}", re.sub(r"^Sink-dependent: \w+\. ", "", advice.reason)


def rounded(ratio: float) -> str:
    """One decimal, halves up as people do: 2.25 is 2.3."""
    return f"{ratio + 1e-9:.1f}"


def why_not(survey: Survey, *names: str) -> str:
    """Why a part is missing."""
    found = [survey.left_out[name] for name in names if name in survey.left_out]
    return f"Left out: {found[0]}." if found else "It was not asked for."


def title(survey: Survey) -> str:
    """The name of the page."""
    return f"{model_name(survey)}: attention sinks"


# Numbers


def percent(value: float, digits: int = 1) -> str:
    """A share: `73.6 %`."""
    return "not measured" if np.isnan(value) else f"{100 * value:.{digits}f} %"


def interval(of: Estimate) -> str:
    """The ends of an interval of shares."""
    return "one text, no interval" if np.isnan(of.low) else f"{100 * of.low:.1f} to {100 * of.high:.1f} %"


def share(of: Estimate) -> str:
    """A share with its interval: `73.6 % (72.5 to 74.6)`."""
    if np.isnan(of.low):
        return percent(of.value)
    return f"{percent(of.value)} ({100 * of.low:.1f} to {100 * of.high:.1f})"


def amount(of: Estimate, digits: int = 3) -> str:
    """A number with its interval: `1.063 (1.051 to 1.075)`."""
    if np.isnan(of.value):
        return "not measured"
    ends = "" if np.isnan(of.low) else f" ({figures(of.low, digits)} to {figures(of.high, digits)})"
    return figures(of.value, digits) + ends


def place_of(one: SinkRate) -> str:
    """The sink's place in words."""
    return "the first token" if one.sink == 0 else f"token {one.sink}"


def stretches(numbers: Iterable[int]) -> str:
    """Whole numbers in order, neighbours joined: `0, 1, 10 to 13`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else join(run) for run in found)


def join(run: Sequence[int]) -> str:
    """A run of neighbours: its two members, or its ends."""
    return f"{run[0]}, {run[1]}" if len(run) == 2 else f"{run[0]} to {run[-1]}"
