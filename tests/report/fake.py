"""A comparison that nobody measured: numbers of the right shape, at once, for tests of tables, words and pictures."""

import numpy as np

from sinks.evals.arms import SWEEP, Settings
from sinks.evals.compare import Arm, Comparison
from sinks.evals.contenders import Contender, Dense, Newlines, Recompute, Sinks
from sinks.reading.perplexity import Score

BYTES_PER_TOKEN = 46_080
SINGLES = 8

LEVELS = {"dense": 2.3, "window": 3.2, "newlines": 2.51, "recompute": 2.5} | {"sweep-0": 3.2, "sweep-8": 2.49}
"""Mean surprise of an arm after the first eviction, nats; 2.5 unless it stands here."""


def fake_comparison(
    levels: dict[str, float] | None = None, *, tokens: int = 2048, window: int = 252, limit: int | None = None,
    leave_out: tuple[str, ...] = (), repeats: slice = slice(0),
) -> Comparison:  # fmt: skip
    """All arms but `leave_out`, over `tokens`, each with its level of surprise; dense stops at `limit`.

    `repeats` is where the text repeats itself.
    """
    settings = Settings(4, window, singles=SINGLES, samples=16)
    capacity = settings.capacity
    contenders: dict[str, Contender] = {
        "dense": Dense(limit),
        "window": Sinks(0, capacity),
        "recompute": Recompute(capacity, settings.samples, settings.seed),
        "sinks": Sinks(4, window),
        **{f"sweep-{kept}": Sinks(kept, capacity - kept) for kept in SWEEP},
        "newlines": Newlines(4, window, 198),
    }
    arms: dict[str, Arm] = {}
    for name, contender in contenders.items():
        if name in leave_out:
            continue
        same = next((arm.name for arm in arms.values() if arm.contender == contender), name)
        level = (LEVELS | (levels or {})).get(same, 2.5)
        score = fake_score(contender, tokens, level) if same == name else arms[same].score
        arms[name] = Arm(name, contender, score, 90_000_000 + int(score.cache_bytes.max()), 40.0, same)
    repeated = np.zeros(tokens, bool)
    repeated[repeats] = True
    return Comparison(settings, tokens, repeated, arms, "imagined")


def fake_score(contender: Contender, tokens: int, level: float) -> Score:
    """Surprise around `level`, alike in all arms until the first eviction, with the noise of one common text."""
    noise = np.random.default_rng(0).normal(0, 0.3, tokens)
    noise -= noise[257:].mean()
    if isinstance(contender, Recompute):
        at = contender.positions(tokens) + 1
        nll = np.full(tokens, np.nan)
        nll[at] = level + noise[at]
        return Score(nll, at, np.full(len(at), 950.0), np.zeros(len(at), int), len(at))
    feed = contender.work(tokens)
    nll = level + noise
    nll[: 4 if isinstance(contender, Newlines) else 1] = np.nan
    nll[feed + 1 :] = np.nan
    bulk = feed - SINGLES
    read = np.array([*range(256, bulk, 256), bulk, *range(bulk + 1, feed + 1)])
    held = read if isinstance(contender, Dense) else np.full(len(read), 256)
    milliseconds = np.where(read > bulk, 34.0, 1100.0)
    return Score(nll, read, milliseconds, held * BYTES_PER_TOKEN, SINGLES)
