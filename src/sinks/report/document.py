"""`compare.json`: every number of a comparison, and everything needed to repeat it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sinks.evals.compare import Arm, Comparison, Ratio
from sinks.reading.perplexity import perplexity
from sinks.reading.tokens import PASSAGE

SCHEMA = 1
MOST_BINS = 256

MS = "median milliseconds to read one of the last tokens of the stream, one at a time, the cache full"
DEFINITIONS = {
    "perplexity": "exp of the mean surprise over the tokens that the arm scored; the first `sinks` count in no arm",
    "perplexity_after_eviction": "the same, over tokens predicted from a position t >= sinks + window",
    "perplexity_last_quarter": "the same, over the last quarter of the stream; null if the arm stopped before its end",
    "perplexity_at_samples": "the same, over the tokens at which re-computation was measured",
    "scored_tokens": "how many tokens `perplexity` is over",
    "stopped_at": "tokens after which the arm stopped reading; null if it read to the end",
    "measured_as": "the arm whose run this is: equal settings are measured once",
    "ms_per_token": f"{MS}; for re-computation, of a sampled token",
    "tokens_per_second": "scoring speed in chunks, before those last tokens; for re-computation, of the samples",
    "cache_bytes": "most bytes of keys and values held between two steps",
    "peak_bytes": "most memory held during the arm, above the loaded and warmed-up model",
    "seconds": "wall clock of the whole arm",
    "repeated_tokens": f"tokens that end a passage of {PASSAGE} whose last occurrence has left the window",
    "ratios": "exp of the mean difference in surprise, over tokens that both arms scored after the first eviction",
}


def document(comparison: Comparison, about: Mapping[str, Any], reading: str) -> dict[str, Any]:
    """The whole result as plain data.

    `about` says where it comes from (`model`, `text`, `machine`, `versions`, `created`), `reading` is its paragraph in
    words.
    """
    settings = comparison.settings
    return {
        "schema": SCHEMA,
        **about,
        "settings": asdict(settings) | {"tokens": comparison.tokens, "capacity": settings.capacity},
        "first_target": settings.first_target,
        "repeated_tokens": int(comparison.repeats.sum()),
        "memory_method": comparison.memory_method,
        "definitions": DEFINITIONS,
        "arms": [arm_numbers(comparison, arm) for arm in comparison.arms.values()],
        "ratios": ratios(comparison),
        "curves": curves(comparison),
        "samples": samples(comparison),
        "reading": reading,
    }


def arm_numbers(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    """One arm's entry of `arms`."""
    nll, name = comparison.nll(arm.name), arm.name
    scored = ~np.isnan(nll)
    return {
        "arm": name,
        "keeps": arm.contender.keeps,
        "settings": vars(arm.contender),
        "measured_as": arm.measured_as,
        "perplexity": number(perplexity(nll)),
        "perplexity_after_eviction": number(perplexity(nll, comparison.after_eviction)),
        "perplexity_last_quarter": number(comparison.perplexity_last_quarter(name)),
        "perplexity_at_samples": number(perplexity(nll, comparison.sampled)),
        "scored_tokens": int(scored.sum()),
        "scored_after_eviction": int((scored & comparison.after_eviction).sum()),
        "stopped_at": arm.contender.stops_at(comparison.tokens),
        "ms_per_token": number(arm.score.latency),
        "ms_samples": arm.score.singles,
        "tokens_per_second": number(arm.score.tokens_per_second),
        "cache_bytes": arm.cache_bytes,
        "peak_bytes": arm.peak_bytes,
        "seconds": number(arm.seconds),
    }


def ratios(comparison: Comparison) -> list[dict[str, Any]]:
    """Every arm against dense and against sinks, where those were measured and the pair shares targets."""
    found = []
    for against in ("dense", "sinks"):
        for name in comparison.arms:
            if name != against and (ratio := comparison.ratio(name, against)):
                elsewhere = comparison.ratio(name, against, comparison.after_eviction & ~comparison.repeats)
                found.append({"arm": name, "against": against, **ratio_numbers(ratio, elsewhere)})
    return found


def ratio_numbers(ratio: Ratio, elsewhere: Ratio | None) -> dict[str, Any]:
    """A ratio as plain data; `range` has both its ends. `elsewhere` is the same ratio without repeated passages."""
    return {
        "ratio": ratio.value,
        "standard_error": ratio.error,
        "targets": ratio.targets,
        "range": [ratio.first, ratio.last],
        "ratio_without_repeats": elsewhere.value if elsewhere else None,
    }


def curves(comparison: Comparison) -> dict[str, Any]:
    """Perplexity and cache along the stream, in bins of equal width, of every run that read the stream.

    `ends` are stream positions. A perplexity belongs to the bin before its end, bytes to the end itself; null where an
    arm had stopped, or stopped before the middle of the bin.
    """
    ends = bin_ends(comparison.tokens)
    run = {name: arm for name, arm in runs(comparison).items() if name != "recompute"}
    return {
        "bin": int(ends[0]),
        "ends": ends.tolist(),
        "perplexity": {name: along(comparison.nll(name), ends) for name in run},
        "cache_bytes": {name: held(arm, ends) for name, arm in run.items()},
    }


def samples(comparison: Comparison) -> dict[str, Any]:
    """Surprise (nats) of every run at the tokens on which re-computation was measured; null where one had stopped."""
    at = np.flatnonzero(comparison.sampled)
    nll = {name: [number(value) for value in comparison.nll(name)[at].tolist()] for name in runs(comparison)}
    return {"tokens": at.tolist(), "nll": nll if len(at) else {}}


def runs(comparison: Comparison) -> dict[str, Arm]:
    """The arms that were run, without those that repeat another one."""
    return {name: arm for name, arm in comparison.arms.items() if arm.measured_as == name}


def bin_ends(tokens: int) -> Int[np.ndarray, " bins"]:
    """Where each bin ends: 256 tokens apart, unless that makes fewer than 16 bins or more than 256.

    A last bin of less than half the width is merged into the one before.
    """
    width = max(-(-tokens // MOST_BINS), min(256, tokens // 16), 1)
    inner = np.arange(width, tokens - width // 2, width)
    return np.append(inner, tokens)


def along(nll: Float[np.ndarray, " tokens"], ends: Int[np.ndarray, " bins"]) -> list[float | None]:
    """Perplexity in each bin that ends at `ends` [bins]; None where less than half of the bin was scored."""
    parts = np.split(nll, ends[:-1])
    return [number(perplexity(part)) if np.isnan(part).mean() <= 0.5 else None for part in parts]


def held(arm: Arm, ends: Int[np.ndarray, " bins"]) -> list[int | None]:
    """Cache bytes after the step that reached each of `ends` [bins]; None after the arm stopped."""
    read, held_bytes = arm.score.read, arm.score.cache_bytes
    steps = np.searchsorted(read, ends - 1)  # the last token is a target and never read
    return [int(held_bytes[step]) if step < len(read) else None for step in steps]


def number(value: float) -> float | None:
    """`value`, or None for what was not measured: JSON has no NaN."""
    return None if math.isnan(value) else value


def to_json(content: Mapping[str, Any]) -> str:
    """Strict JSON, indented, ending in a line break."""
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
