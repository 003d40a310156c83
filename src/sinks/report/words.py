"""Says in words what the numbers of a comparison say, and nothing that they do not."""

from __future__ import annotations

import math

from sinks.evals.arms import SWEEP
from sinks.evals.compare import Comparison, Ratio
from sinks.evals.contenders import Dense, Recompute

CLOSE = 1.03
"""Perplexities within this factor are called equal: a few per cent is what another stretch of text would change."""

WORTH_SAYING = 0.01
"""Share of repeated tokens from which on they are worth a sentence."""

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def reading(comparison: Comparison) -> str:
    """The result as one paragraph. A sentence appears only if its arms were measured on shared targets."""
    sentences = (
        window_sentence(comparison),
        dense_sentence(comparison),
        sweep_sentence(comparison),
        newlines_sentence(comparison),
        int8_sentence(comparison),
        recompute_sentence(comparison),
        forgotten_sentence(comparison),
    )
    return " ".join(sentence for sentence in sentences if sentence)


def headline(comparison: Comparison) -> str:
    """A title that claims what was measured: that the sinks hold the line, if they do."""
    without, dense = comparison.ratio("window", "sinks"), comparison.ratio("sinks", "dense")
    if without and without.value >= 1.3 and (dense is None or dense.value <= 1.3):
        kept = comparison.settings.sinks
        return f"{plural(kept, 'kept token').capitalize()} {'holds' if kept == 1 else 'hold'} the line"
    within = f"{comparison.settings.capacity:,} keys" if bounded(comparison) else "dense attention"
    return f"Reading {comparison.tokens:,} tokens with {within}"


def bounded(comparison: Comparison) -> bool:
    """Whether any arm holds so many keys and no more: words about them have a place only then."""
    return any(not isinstance(arm.contender, Dense) for arm in comparison.arms.values())


def window_sentence(comparison: Comparison) -> str | None:
    """What the plain window loses against sinks."""
    ratio = comparison.ratio("window", "sinks")
    if ratio is None:
        return None
    settings = comparison.settings
    kept = f"{plural(settings.sinks, 'sink')} and {settings.window:,} recent tokens"
    values = f"{shared(comparison, 'window', 'sinks')} against {shared(comparison, 'sinks', 'window')}"
    if ratio.value > CLOSE:
        return (
            f"After the first eviction a plain window of {settings.capacity:,} keys has {ratio.value:.2f} times the "
            f"perplexity of {kept} ({values})."
        )
    verdict = "does as well as" if ratio.value >= 1 / CLOSE else "does better than"
    return f"On this text a plain window of {settings.capacity:,} keys {verdict} {kept} ({values})."


def dense_sentence(comparison: Comparison) -> str | None:
    """How far the sinks stay from dense attention, and what dense attention cost."""
    ratio = comparison.ratio("sinks", "dense")
    if ratio is None:
        return None
    dense, sinks = comparison.arms["dense"], comparison.arms["sinks"]
    stop = dense.contender.stops_at(comparison.tokens)
    where = f"; it stops at {stop:,} tokens, its trained length" if stop else ""
    return (
        f"Dense attention reaches {shared(comparison, 'dense', 'sinks')} on the same tokens with a cache that grows to "
        f"{size(dense.cache_bytes)}{where}; sinks stay at {size(sinks.cache_bytes)}, and are {relative(ratio.value)}."
        f"{repeats_sentence(comparison, ratio)}"
    )


def repeats_sentence(comparison: Comparison, ratio: Ratio) -> str:
    """How much of dense attention's lead is copying what a window has let go; nothing where the text hardly repeats."""
    repeated = int((comparison.repeats & comparison.after_eviction)[ratio.first : ratio.last + 1].sum())
    elsewhere = comparison.ratio("sinks", "dense", comparison.after_eviction & ~comparison.repeats)
    if elsewhere is None or repeated < WORTH_SAYING * ratio.targets:
        return ""
    return (
        f" Of these tokens {100 * repeated / ratio.targets:.0f} % repeat, word for word, a passage that has left the "
        f"window, which only dense attention can copy; on the others sinks are {relative(elsewhere.value)}."
    )


def sweep_sentence(comparison: Comparison) -> str | None:
    """How many sinks this model needs: the fewest that come close to the most."""
    most = f"sweep-{max(SWEEP)}"
    ratios = {kept: comparison.ratio(f"sweep-{kept}", most) for kept in SWEEP}
    if not all(ratios.values()):
        return None
    enough = min(kept for kept, ratio in ratios.items() if ratio and ratio.value <= CLOSE)
    if enough == 0:
        return "Within so many keys the model needs no sink on this text."
    if enough == max(SWEEP):
        return f"Even {count(max(SWEEP))} sinks are better than fewer."
    return f"{plural(enough, 'sink').capitalize()} {'is' if enough == 1 else 'are'} enough for this model on this text."


def newlines_sentence(comparison: Comparison) -> str | None:
    """Whether it matters which tokens are kept; only a model that needs sinks can tell."""
    ratio, needed = comparison.ratio("newlines", "sinks"), comparison.ratio("window", "sinks")
    if ratio is None or needed is None or needed.value <= CLOSE:
        return None
    verdict = "it is the place that makes a sink, not the token" if ratio.value <= CLOSE else "the token matters too"
    breaks = plural(comparison.settings.sinks, "line break")
    return f"With {breaks} in place of the sinks perplexity is {ratio.value:.2f} times theirs: {verdict}."


def int8_sentence(comparison: Comparison) -> str | None:
    """What 8 bits a number save, and what they cost."""
    ratio = comparison.ratio("sinks-int8", "sinks")
    if ratio is None:
        return None
    share = comparison.arms["sinks-int8"].cache_bytes / comparison.arms["sinks"].cache_bytes
    return (
        f"With recent keys and values in 8 bits the cache takes {share:.0%} of its bytes, and perplexity is "
        f"{ratio.value:.3f} times that of full precision (standard error {ratio.error:.3f})."
    )


def recompute_sentence(comparison: Comparison) -> str | None:
    """What re-computation gains and costs, with the uncertainty of so few samples."""
    ratio = comparison.ratio("recompute", "sinks")
    if ratio is None:
        return None
    cost = comparison.arms["recompute"].score.latency / comparison.arms["sinks"].score.latency
    return (
        f"Computing the window afresh for every token gives {ratio.value:.2f} ± {2 * ratio.error:.2f} times the sinks' "
        f"perplexity at {ratio.targets} sampled positions, and takes {cost:.0f} times as long a token."
    )


def forgotten_sentence(comparison: Comparison) -> str | None:
    """What none of this is: a longer window."""
    if not bounded(comparison):
        return None
    return (
        f"What leaves the {comparison.settings.capacity:,} keys is forgotten: the stream has no end, but the window "
        "is no longer than before."
    )


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table must know, one line each."""
    settings, lines = comparison.settings, []
    dense, recompute = comparison.arms.get("dense"), comparison.arms.get("recompute")
    if dense and (stop := dense.contender.stops_at(comparison.tokens)):
        lines.append(
            f"dense stops at {stop:,} tokens, the length that the model was trained on, and is compared only up to "
            "there; --beyond-trained-length lets it read on"
        )
    if recompute and isinstance(recompute.contender, Recompute):
        same = ", ".join(
            f"{name} {decimal(comparison.perplexity(name, comparison.sampled))}"
            for name in ("dense", "window", "sinks")
            if name in comparison.arms
        )
        lines.append(
            f"* over {recompute.score.singles} sampled tokens (seed {settings.seed})"
            + (f", on which the others have {same}" if same else "")
        )
    against = "; vs sinks: ratio of the latter on tokens that both scored" if "sinks" in comparison.arms else ""
    lines += [
        f"perplexity: over {comparison.tokens - settings.first_target:,} tokens, all but the first {settings.sinks}; "
        f"after the first eviction, {int(comparison.after_eviction.sum()):,}{against}",
        f"ms a token: median of the last {settings.singles}, read one by one; peak memory: above the loaded model "
        f"({comparison.memory_method})",
    ]
    return lines


def shared(comparison: Comparison, arm: str, other: str) -> str:
    """Perplexity of `arm` on the targets after the first eviction that `other` scored too."""
    both = comparison.arms[other].score.scored & comparison.after_eviction
    return decimal(comparison.perplexity(arm, both))


def relative(ratio: float) -> str:
    """`21 % above it`, or its opposite."""
    percent = round(100 * (ratio - 1))
    return "level with it" if percent == 0 else f"{abs(percent)} % {'above' if percent > 0 else 'below'} it"


def decimal(value: float, digits: int = 2) -> str:
    """A perplexity: `12.88`, `5,158`; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:,.{digits if value < 1000 else 0}f}"


def plural(number: int, noun: str) -> str:
    """A count and what it counts: `one sink`, `four sinks`."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def count(number: int) -> str:
    """A small number as a word."""
    return COUNTS[number] if number < len(COUNTS) else f"{number:,}"


def size(count_of_bytes: int | float) -> str:
    """Bytes for people, in powers of ten: `11.8 MB`."""
    for exponent, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        value = count_of_bytes / 1000**exponent
        if value >= 0.9995:
            return f"{value:.{0 if value >= 99.95 else 1}f} {unit}"
    return f"{count_of_bytes:.0f} B"
