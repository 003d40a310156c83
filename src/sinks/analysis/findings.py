"""What a survey found by itself: each finding is a rule applied to numbers, and says which rule it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sinks.analysis.measures.massive import Massive, lives
from sinks.analysis.measures.sink_rate import SinkRate, SinkRates

STRONG = 0.3
"""Share of a layer's heads that pass, from which on the layer has sinks."""
WEAK = 0.1
"""And under which it has none."""
DRAINED = 0.5
"""Norm of the sink's value over the others', under which the value is drained."""
CARRIED = 2.0
"""Norm of the sink's residual over the others', under which nothing massive carries the sink."""


@dataclass(frozen=True)
class Finding:
    """One thing that the survey found by itself: a headline, the sentence with its numbers, and how it was decided."""

    title: str
    text: str
    rule: str


def findings(rates: SinkRates | None, massive: Mapping[str, Massive]) -> tuple[Finding, ...]:
    """Everything that the rules find in sink rates and massive activations."""
    found: list[Finding] = []
    if rates is not None:
        found += _binding(rates)
        found += _repeated(rates)
        home = home_of(rates)
        if home is not None:
            body = massive.get("with BOS" if home.condition.bos == "first" else "without BOS")
            found += _layers(home, body)
    for name, body in massive.items():
        found += _lives(name, body)
    return tuple(found)


def home_of(rates: SinkRates) -> SinkRate | None:
    """The condition in which the model is at home: natural tokens, without BOS or with it, where its sinks are."""
    natural = [one for one in rates.conditions if one.is_natural and one.condition.bos in ("none", "first")]
    return max(natural, key=lambda one: one.rate.value, default=None)


def gaps(by_layer: Float[np.ndarray, " layers"]) -> list[tuple[int, int]]:
    """Runs of layers [first, last] without sinks between layers that have them."""
    weak, strong = by_layer < WEAK, np.flatnonzero(by_layer > STRONG)
    if not len(strong):
        return []
    inside = weak & (np.arange(len(by_layer)) > strong[0]) & (np.arange(len(by_layer)) < strong[-1])
    return [(born, dies - 1) for born, dies in lives(inside)]


def layers_text(first: int, last: int) -> str:
    """`layer 3`, or `layers 3 to 7`."""
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _binding(rates: SinkRates) -> Iterator[Finding]:
    titles = {
        "position": "The sink is bound to the first position",
        "token": "The sink is bound to the BOS token",
        "both": "Both the first position and the BOS token make a sink",
        "none": "No sink was found on natural text",
    }
    if rates.bound_to in titles:
        rule = "a sink is present where the 95 % interval of the rate lies over 10 % of heads"
        yield Finding(titles[rates.bound_to], rates.verdict + ".", rule)


def _repeated(rates: SinkRates) -> Iterator[Finding]:
    for one in rates.conditions:
        if one.condition.tokens == "repeated" and one.condition.bos == "none" and one.rate.value < 0.01:
            yield Finding(
                "One token repeated has no sink: attention disperses",
                f"Every hidden state is the same, so {100 * one.rate.value:.1f} % of heads pass; the first token holds "
                f"{100 * one.first_mass.value:.1f} % of later attention, which is about what uniform attention gives.",
                "less than 1 % of heads on texts of one repeated token, without BOS",
            )


def _layers(home: SinkRate, body: Massive | None) -> Iterator[Finding]:
    by_layer = home.heads.mean(axis=1)
    for first, last in gaps(by_layer):
        told = f"No sink heads in {layers_text(first, last)}, and later layers have them again"
        if body is not None:
            value = body.value_ratio.mean(axis=1)
            norm = body.first_norm[first : last + 1].max()
            back = int(np.flatnonzero(by_layer[last + 1 :] > STRONG)[0]) + last + 1
            together = norm < CARRIED and value[first : last + 1].min() > DRAINED
            how = "The three signatures go and come together" if together else "The sinks pause alone"
            told += (
                f". {how}: what enters {layers_text(first, last)} has the sink "
                f"token at up to {norm:.1f} times the norm of the others, and {body.first_norm[back]:.0f} times where "
                f"layer {back} has sinks again; its value has {value[first : last + 1].min():.2f} to "
                f"{value[first : last + 1].max():.2f} of the others' norm there, and {value[back]:.2f} in layer {back}"
            )
        rule = "layers with fewer than 10 % sink heads between layers with more than 30 %"
        yield Finding(f"The sinks pause in {layers_text(first, last)}", told + ".", rule)
    if body is None:
        return
    bare = [
        layer
        for layer in np.flatnonzero(by_layer > STRONG).tolist()
        if body.first_norm[layer] < CARRIED
    ]  # fmt: skip
    if bare:
        which = ", ".join(map(str, bare))
        yield Finding(
            "Sinks without a massive activation",
            f"In layer {which}, {100 * by_layer[bare].max():.0f} % of heads pass, yet the sink token enters with "
            f"{body.first_norm[bare].max():.1f} times the norm of the others: a sink needs no massive activation.",
            "more than 30 % sink heads where the residual of the sink token is under twice the others'",
        )
    drained = np.flatnonzero((body.value_ratio.mean(axis=1) < DRAINED) & (by_layer > STRONG))
    sinks = np.flatnonzero(by_layer > STRONG)
    if len(sinks):
        yield Finding(
            "Values drain where sinks are" if len(drained) > len(sinks) / 2 else "Values drain in few sink layers",
            f"In {len(drained)} of {len(sinks)} layers with sinks the sink token's value has under half the norm of "
            "the others': attending to it adds next to nothing.",
            "mean value norm of the sink token under half of the others', in layers with more than 30 % sink heads",
        )


def _lives(name: str, body: Massive) -> Iterator[Finding]:
    for number, (born, dies) in enumerate(body.lives, start=1):
        alive = body.largest[:, born:dies]
        depth = born + int(np.median(alive, axis=0).argmax())
        peak = next((one for one in body.peaks if one.depth == depth), None)
        token = f", token {peak.token!r}" if peak and peak.token else ""  # texts may not agree on one
        where = "" if peak is None else f" (position {peak.position}, dimension {peak.dim}{token})"
        end = "lives to the last block" if dies == len(body.flagged) else f"is gone after block {dies - 1}"
        again = "" if number == 1 else " again"
        entry = "in the embeddings" if born == 0 else f"in block {born - 1}"
        ratio = float(np.median(body.largest[:, depth] / body.median[:, depth]))
        yield Finding(
            f"A massive activation is born{again} {entry}, {name}",
            f"It peaks at {np.median(body.largest[:, depth]):,.0f} after block {depth - 1}, {ratio:,.0f} times the "
            f"median{where}, and {end}.",
            "see the definition of a life in the table of measures",
        )
