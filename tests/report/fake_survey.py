"""A survey that nobody measured: SmolLM2's signature by hand, at once, for tests of pages, tables and files."""

import math
from typing import Any

import numpy as np

from sinks.analysis.causes.interventions import Effect, HeadEffects, Interventions
from sinks.analysis.causes.trials import Spot
from sinks.analysis.findings import Finding
from sinks.analysis.inputs import Bos, Condition, Tokens
from sinks.analysis.measures.entropy import KINDS, Entropy, Folklore, Heads, Profile
from sinks.analysis.measures.massive import Massive, Peak
from sinks.analysis.measures.mixing import Geometry, Mixing, Spread
from sinks.analysis.measures.repetition import Dose, Repetition
from sinks.analysis.measures.semantics import Reading, Semantics
from sinks.analysis.measures.sink_rate import Lengths, SinkRate, SinkRates
from sinks.analysis.survey import Survey
from sinks.reading.advice import Advice
from sinks.reading.estimate import Estimate

BY_LAYER = (0, 0, 16, 75, 74, 74, 80, 84, 67, 58, 0, 0, 84, 97, 100, 91, 73, 98, 98, 78, 90, 93, 100, 100, 100, 100,
            100, 87, 86, 75)  # fmt: skip
"""SmolLM2's sink rate by layer, per cent: the gap at layers 10 and 11."""

PLACES: tuple[tuple[Tokens, Bos, int, float], ...] = (
    ("natural", "none", 0, 0.736), ("natural", "first", 0, 0.695), ("natural", "moved", 10, 0.0001),
    ("random", "none", 0, 0.787), ("random", "first", 0, 0.676), ("repeated", "none", 0, 0.0),
    ("repeated", "first", 0, 0.492),
)  # fmt: skip


def fake_survey(*, layers: int = 30, heads: int = 9, seed: int = 0, **replaced: Any) -> Survey:
    """A whole survey of a model with `layers` x `heads`; `replaced` are fields of `Survey` to put in place."""
    noise = np.random.default_rng(seed)
    parts: dict[str, Any] = {
        "about": fake_about(),
        "sink_rates": fake_rates(layers, heads, noise),
        "massive": {"without BOS": fake_massive(layers, noise), "with BOS": fake_massive(layers, noise, fixed=True)},
        "entropy": fake_entropy(layers, heads, noise),
        "mixing": fake_mixing(layers, noise),
        "semantics": fake_semantics(),
        "repetition": fake_repetition(),
        "interventions": fake_interventions(layers, heads, noise),
        "advice": fake_advice(),
        "findings": fake_findings(),
        "left_out": {"registers": "this is no vision model"},
        "seconds": {"sink rates": 12.5, "massive activations": 3.25, "interventions": 61.75},
    }
    return Survey(**(parts | replaced))


def bare_survey(name: str = "dinov2-small", **replaced: Any) -> Survey:
    """What a vision or BERT-like model leaves: attention alone, everything else left out with a reason."""
    reason = "this kind of model writes no text"
    absent = ("mixing", "semantics", "repetition", "interventions", "advice")
    rates = fake_rates(12, 6, np.random.default_rng(1), PLACES[:1])
    parts: dict[str, Any] = {
        "about": {"model": {"name": name}}, "sink_rates": rates, "massive": {}, "entropy": None, "findings": (),
        "left_out": dict.fromkeys(("entropy", "massive", *absent), reason), "seconds": {},
    } | dict.fromkeys(absent)  # fmt: skip
    return Survey(**(parts | replaced))


def fake_about(name: str = "smollm2-135m-instruct") -> dict[str, Any]:
    """Where the numbers would come from."""
    return {
        "model": {"name": name, "note": "Q4_1 widened to float32", "layers": 30, "heads": 9, "source": "built in"},
        "sources": [{"name": "python-reference", "licence": "PSF-2.0"}, {"name": "licences"}],
        "settings": {"texts": 100, "tokens": 64, "epsilon": 0.3, "seed": 0},
        "command": f"sinks scan {name} --texts 100",
        "machine": {"cpu": "an imagined processor", "threads": 2, "accelerator": None},
        "versions": {"python": "3.11.9", "sinks": "0.1.0", "torch": "2.13.0"},
        "created": "2026-11-22T18:00:00+00:00",
    }


def about(value: float, spread: float = 0.012, texts: int = 100) -> Estimate:
    """An estimate with a plain interval around it."""
    return Estimate(value, value * (1 - spread), value * (1 + spread), texts)


def by_layer(layers: int) -> np.ndarray:
    """The signature, stretched to any depth."""
    at = np.linspace(0, len(BY_LAYER) - 1, layers).round().astype(int)
    return np.array(BY_LAYER)[at] / 100


def fake_rates(layers: int, heads: int, noise: np.random.Generator, places: Any = PLACES) -> SinkRates:
    """All conditions: a sink bound to its position."""
    found = tuple(fake_rate(layers, heads, noise, *place) for place in places)
    grown = {16: 0.874, 32: 0.80, 64: 0.73, 128: 0.606, 256: 0.546}
    length = Lengths(Condition("natural", "none"), 0.3, {t: about(rate) for t, rate in grown.items()},
                     {t: about(0.6 * rate) for t, rate in grown.items()})  # fmt: skip
    verdict = "The sink stays at the first position whether or not BOS stands there: it is bound to the position."
    return SinkRates(found, (length,), "position", verdict)


def fake_rate(layers: int, heads: int, noise: np.random.Generator, tokens: Tokens, bos: Bos, sink: int,
              rate: float) -> SinkRate:  # fmt: skip
    """One condition whose heads pass as `rate` says."""
    strength = by_layer(layers) * rate / 0.736
    passes = np.clip(strength[:, None] + noise.normal(0, 0.06, (layers, heads)), 0, 1)
    importance = np.full((layers, heads, 12), 0.02) + noise.uniform(0, 0.02, (layers, heads, 12))
    first = 0 if bos != "moved" else 0
    importance[:, :, first] = np.clip(0.08 + 0.62 * passes + noise.normal(0, 0.05, (layers, heads)), 0, 1)
    if sink:
        passes = passes * 0
    rates = np.zeros(12)
    rates[0] = 0.736 if sink else rate
    curve = {e: about(rate * f) for e, f in ((0.1, 1.2), (0.2, 1.12), (0.3, 1.0), (0.4, 0.79), (0.5, 0.6), (0.8, 0.12))}
    return SinkRate(
        Condition(tokens, bos), 100, 64, 0.3, sink, 0.0742, importance, rates, passes, about(rate), rate * 1.04, curve,
        about(min(rate * 1.05, 1)), (0,) if rate > 0.25 else (), about(0.1 + 0.47 * rate), about(0.2 + 0.47 * rate),
        about(0.08 + 0.5 * rate), 0.06 + 0.6 * strength, about(0.2 + 0.77 * rate),
    )  # fmt: skip


def fake_massive(layers: int, noise: np.random.Generator, fixed: bool = False, texts: int = 8) -> Massive:
    """Massive activations that are born twice: small ones early, and enormous ones after the gap."""
    depths = layers + 1
    level = np.array([4.0, 5, 60, *[830] * 7, 409, 122, *[24_400] * 16, 10_300, 900, 140])
    largest = level[np.linspace(0, len(level) - 1, depths).round().astype(int)] * noise.normal(1, 0.04, (texts, depths))
    median = np.linspace(0.4, 3.0, depths) * np.ones((texts, 1))
    ratio = np.median(largest / median, axis=0)
    first = int(np.argmax(ratio))
    peaks = tuple(
        Peak(depth, 0, 507, "<|im_start|>" if fixed else "The\n", 1.0, float(largest[:, depth].mean()),
             float(ratio[depth]), 0.0 if fixed else 0.047)
        for depth in (min(3, layers), first)
    )  # fmt: skip
    value = np.interp(np.arange(layers), np.linspace(0, layers - 1, 8), [1.0, 0.2, 0.24, 1.2, 0.3, 0.15, 0.12, 0.42])
    late = max(layers * 2 // 5, 3)
    return Massive(
        texts, 64, 0, fixed, largest, median, np.zeros((texts, depths), int), np.full((texts, depths), 507),
        (ratio > 1000) * 1.0, 1 + largest.mean(axis=0) / 140, np.where(level.max() > 0, ratio / ratio.max(), 0),
        np.full(depths, 0.14), value[:, None] * np.array([0.9, 1.0, 1.1]),
        (0.2 + 0.7 * value)[:, None] * np.array([0.95, 1.0, 1.05]), peaks,
        ((2, late - 1), (late, layers)), np.full(depths, 0.016),
    )  # fmt: skip


def fake_entropy(layers: int, heads: int, noise: np.random.Generator) -> Entropy:
    """Dense attention and a stream with sinks agree; a plain window rises when it lets the first token go."""
    ends = np.arange(64, 1025, 64)
    profiles = []
    for name, jump in (("dense", 0.0), ("sinks", 0.02), ("window", 0.25)):
        after = (ends > 256) * jump
        norm = 0.46 + 0.02 * np.log(ends / 64) + after + 0.2 * (1 - by_layer(layers))[:, None, None]
        norm = norm + noise.normal(0, 0.01, (layers, heads, len(ends)))
        mass = np.clip(by_layer(layers)[:, None, None] * (0.62 - after) * np.ones((layers, heads, len(ends))), 0, 1)
        seen = np.log(np.minimum(ends, 1024 if name == "dense" else 256))
        profiles.append(Profile(name, ends, norm * seen, norm, (norm + 0.25) * seen, mass))
    kind = noise.choice(len(KINDS), (layers, heads), p=(0.0, 0.1, 0.2, 0.06, 0.04, 0.6))
    kind[noise.uniform(size=(layers, heads)) < by_layer(layers)[:, None]] = 0
    part = by_layer(layers)[:, None] * np.ones(heads)
    told = Heads(kind, 0.6 * part, 0.1 * np.ones_like(part), 0.3 - 0.2 * part, 0.02 * np.ones_like(part),
                 0.66 - 0.2 * part, 14 + 3 * part)  # fmt: skip
    folklore = (
        Folklore("spike at the start", 1.32, 1.21, 1.43, True, "first bin over the plateau above 1.1"),
        Folklore("cliff at the eviction", 1.04, 0.97, 1.12, False, "bin after over bin before below 0.9"),
    )
    return Entropy(tuple(profiles), told, folklore)


def fake_mixing(layers: int, noise: np.random.Generator) -> Mixing:
    """A change of token 20 spreads alike with and without BOS, and twice as far once the first token is gone."""
    depths, changed = layers + 1, 20
    spreads = []
    for name, factor in (("BOS kept", 1.0), ("BOS removed", 1.02), ("BOS evicted", 2.1)):
        overall = factor * np.linspace(0.002, 0.074, depths)
        decay = np.exp(-np.arange(64) / 30)
        rows = np.where(np.arange(64) < changed, 0, np.roll(decay, changed))
        grid = overall[:, None] * rows * noise.normal(2, 0.1, (depths, 64))
        grid[:, changed] = 0.9
        spreads.append(
            Spread(name, changed, grid, overall, about(0.038 * factor, 0.06, 8), about(0.073 * factor, 0.06, 8))
        )
    valley = 1 - 0.98 * (np.arange(depths) > 0.4 * depths)
    without = np.linspace(0.6, 0.33, depths)
    geometry = Geometry("BOS kept", without * valley, without, 1 + 24 * without * valley, 25 * without,
                        0.2 + 0.1 * valley,
                        0.3 * np.ones(depths), 0.9 - 0.5 * valley, 0.8 * np.ones(depths))  # fmt: skip
    return Mixing(tuple(spreads), geometry, "A change spreads as far with BOS as without it: 0.073 against 0.074.")


def fake_semantics() -> Semantics:
    """The sink knows nothing in a prompt; other tokens do."""
    rows = (
        ("sink", "value", "text", "prompt", 0.26, 0.24), ("sink", "residual", "text", "prompt", 0.27, 0.25),
        ("sink", "residual", "BOS", "stream", 0.25, 0.25), ("sink", "value", "4 x BOS", "stream", 0.31, 0.26),
        ("other token", "value", "text", "prompt", 0.83, 0.71),
        ("other token", "residual", "text", "prompt", 0.91, 0.8),
    )  # fmt: skip
    found = tuple(
        Reading(source, carrier, prefix, where, 4, about(accuracy, 0.1, 40), about(accuracy - 0.25, 0.1, 40),
                about(0.251, 0.12, 40), about(retrieval, 0.1, 40), 0.25, about(0.4, 0.05, 40), 25.5, 0.013)
        for source, carrier, prefix, where, accuracy, retrieval in rows
    )  # fmt: skip
    return Semantics(found, True, False, "No: a probe of the sink is right 27 % of the time, and chance is 25 %.")


def fake_repetition() -> Repetition:
    """Repeats take attention nearly as softmax alone would have it."""
    repeats = np.array([1, 2, 4, 8, 16])
    doses = tuple(
        Dose(kind, sink, repeats, 0.04 * repeats**slope, -2 + slope * np.log(repeats), about(slope, 0.1, 16),
             about(slope * 0.7, 0.2, 16))
        for kind, sink, slope in (("repeated", "as it is", 0.62), ("different", "as it is", 0.71),
                                  ("repeated", "masked", 0.83), ("different", "masked", 0.9))
    )  # fmt: skip
    return Repetition(doses, "Repeating a sentence moves attention by 0.62 of what softmax alone would give.")


EFFECTS: tuple[tuple[str, str, str, float, float, float, float, float], ...] = (
    ("zero the massive activations", "massive activation", "", 13.2, 12.1, 0.01, 0.435, 0.02),
    ("set them to their mean", "massive activation", "", 0.0004, 0.0002, 0.998, 0.605, 0.01),
    ("zero two random dimensions", "massive activation", "zero the massive activations",
     0.0008, 0.001, 0.995, 0.604, 0.01),
    ("hide the sink", "sink attention", "", 0.061, 0.055, 0.91, 0.0, 0.708),
    ("hide another key", "sink attention", "hide the sink", 0.002, 0.003, 0.985, 0.6, 0.01),
    ("sink values to zero", "sink attention", "", 0.012, 0.009, 0.96, 0.61, 0.01),
    ("drop BOS", "first tokens", "", -0.016, 0.021, 0.94, 0.73, 0.01),
    ("line breaks first", "first tokens", "", 0.018, 0.02, 0.95, 0.71, math.nan),
)  # fmt: skip


def fake_interventions(layers: int, heads: int, noise: np.random.Generator) -> Interventions:
    """Zeroing is a catastrophe, and everything else is mild."""
    effects = tuple(
        Effect(name, group, control, about(24 * math.exp(loss), 0.05), about(loss, 0.1), about(math.exp(loss), 0.02),
               about(kl, 0.1), about(agreement, 0.01), sink, following)
        for name, group, control, loss, kl, agreement, sink, following in EFFECTS
    )  # fmt: skip
    removed = np.abs(noise.normal(0, 0.004, (layers, heads))) * (1 + 3 * by_layer(layers)[:, None])
    told = HeadEffects(4, 64, removed, noise.normal(0, 0.001, (layers, heads)), removed - 0.001, removed + 0.001)
    verdict = "Zeroing the massive activations ruins the model; its sink rate falls from 60.5 to 43.5 % and no further."
    return Interventions(about(24.02, 0.06), 0.605, 0.012, Spot(12, 0, (507, 331)), 32, 128, effects, told, verdict)


def fake_advice() -> Advice:
    """One kept token is enough."""
    perplexity = {0: 23.84, 1: 12.94, 2: 12.91, 4: 12.88, 8: 12.87, 16: 12.90}
    reason = "Sink-dependent: yes. Keep one sink and 255 recent tokens: more help no further."
    return Advice(1, 255, 256, True, 1.85, 1.79, 1.92, 8192, perplexity, 10.13, reason,
                  {64: 16.42, 128: 14.31, 256: 12.94, 512: 12.03, 1024: 11.37})  # fmt: skip


def fake_findings() -> tuple[Finding, ...]:
    """Two findings with their rules."""
    return (
        Finding(
            "A gap at layers 10 and 11",
            "No head of layers 10 and 11 has a sink, between layers in which 58 and 84 % have one; the value drain and "
            "the massive activation switch off with it.",
            "a run of at least two layers below 5 % between layers above 50 %",
        ),
        Finding(
            "The sink is bound to its position",
            "With BOS moved to index 10 the rate there is 0.0 % and 73.6 % at the first token.",
            "rate at the moved BOS below 5 % while the rate at index 0 stays above half of what it was",
        ),
    )
