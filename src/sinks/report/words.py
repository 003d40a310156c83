"""Says in words what the numbers of a comparison say, and nothing that they do not."""

from __future__ import annotations

from sinks.evals.arms import SWEEP
from sinks.evals.compare import Comparison, Ratio
from sinks.evals.contenders import Recompute

CLOSE = 1.03
"""Perplexities within this factor are called equal: a few per cent is what another stretch of text would change."""

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def reading(comparison: Comparison) -> str:
    """The result as one paragraph. A sentence appears only if its arms were measured on shared targets."""
    sentences = (
        window_sentence(comparison),
        dense_sentence(comparison),
        sweep_sentence(comparison),
        newlines_sentence(comparison),
        recompute_sentence(comparison),
        f"What leaves the {comparison.settings.capacity:,} keys is forgotten: "
        "the stream is endless, the window is not longer.",
    )
    return " ".join(sentence for sentence in sentences if sentence)


def headline(comparison: Comparison) -> str:
    """A title that claims what was measured: that the sinks hold the line, if they do."""
    without, dense = comparison.ratio("window", "sinks"), comparison.ratio("sinks", "dense")
    if without and without.value >= 1.3 and (dense is None or dense.value <= 1.3):
        kept = comparison.settings.sinks
        return f"{count(kept).capitalize()} kept token{'' if kept == 1 else 's'} hold{'s' if kept == 1 else ''} the line"
    return f"Reading {comparison.tokens:,} tokens with {comparison.settings.capacity:,} keys"


def window_sentence(comparison: Comparison) -> str | None:
    """What the plain window loses against sinks."""
    ratio = comparison.ratio("window", "sinks")
    if ratio is None:
        return None
    settings = comparison.settings
    kept = f"{settings.sinks} {'sink' if settings.sinks == 1 else 'sinks'} + {settings.window:,} recent tokens"
    values = f"{shared(comparison, 'window', 'sinks')} against {shared(comparison, 'sinks', 'window')}"
    if ratio.value > CLOSE:
        return (
            f"After the first eviction a plain window of {settings.capacity:,} keys has {ratio.value:.2f} times the "
            f"perplexity of {kept} ({values})."
        )
    return f"On this text a plain window of {settings.capacity:,} keys does as well as {kept} or better ({values})."


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
        f"{size(dense.cache_bytes)}{where}; the sinks stay at {size(sinks.cache_bytes)} and are {relative(ratio.value)}."
    )


def sweep_sentence(comparison: Comparison) -> str | None:
    """How many sinks this model needs: the fewest that come close to the best of the sweep."""
    swept = {kept: comparison.ratio(f"sweep-{kept}", "sweep-8") for kept in SWEEP}
    values = {kept: 1.0 if kept == 8 else ratio.value for kept, ratio in swept.items() if ratio or kept == 8}
    if len(values) < len(SWEEP):
        return None
    enough = min(kept for kept, value in values.items() if value <= CLOSE * min(values.values()))
    if enough == 0:
        return "At this capacity the model needs no sink on this text."
    verb = "is" if enough == 1 else "are"
    return f"{count(enough).capitalize()} sink{'' if enough == 1 else 's'} {verb} enough for this model."


def newlines_sentence(comparison: Comparison) -> str | None:
    """Whether the sinks' content matters."""
    ratio = comparison.ratio("newlines", "sinks")
    if ratio is None:
        return None
    kept = count(comparison.settings.sinks)
    if ratio.value <= CLOSE:
        return f"With {kept} line break{'' if kept == 'one' else 's'} in their place the result is the same " + (
            f"({ratio.value:.2f} times): the place matters, not the token."
        )
    return f"With line breaks in their place perplexity is {ratio.value:.2f} times as high: here the tokens matter."


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
            f"{name} {comparison.perplexity(name, comparison.sampled):.2f}"
            for name in ("dense", "window", "sinks")
            if name in comparison.arms
        )
        lines.append(
            f"recompute is measured at {recompute.score.singles} positions (seed {settings.seed})"
            + (f"; there the others have {same}" if same else "")
        )
    lines.append(
        f"the first {settings.sinks} tokens are scored in no arm; ms a token: median of one token at a time with the "
        f"cache full; peak memory: above the loaded model ({comparison.memory_method})"
    )
    return lines


def shared(comparison: Comparison, arm: str, other: str) -> str:
    """Perplexity of `arm` on the targets after the first eviction that `other` scored too."""
    both = comparison.arms[other].score.scored & comparison.after_eviction
    return f"{comparison.perplexity(arm, both):.2f}"


def relative(ratio: float) -> str:
    """`21 % above it`, or its opposite."""
    percent = round(100 * (ratio - 1))
    return "level with it" if percent == 0 else f"{abs(percent)} % {'above' if percent > 0 else 'below'} it"


def times(ratio: Ratio | None) -> str:
    """A ratio for a table: `1.86x`."""
    return "" if ratio is None else f"{ratio.value:.2f}x"


def count(number: int) -> str:
    """A small number as a word."""
    return COUNTS[number] if number < len(COUNTS) else f"{number:,}"


def size(count_of_bytes: float) -> str:
    """Bytes for people, in powers of ten: `11.8 MB`."""
    value = float(count_of_bytes)
    for unit in ("B", "kB", "MB"):
        if abs(value) < 999.5:
            break
        value /= 1000
    else:
        unit = "GB"
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f} {unit}"
