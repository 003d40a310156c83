"""Biases and penalties, in place, and their undoing: whoever reads the logits wants the model's own."""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.models.step.device.products import ahead, begin


@jit
def is_changed(wholes: Value, seat: Value) -> Value:
    """Whether anything is done to the logits of this seat before one is chosen."""
    return (tl.load(wholes + seat * 8 + 1) > 0) | (tl.load(wholes + seat * 8 + 2) > 0)


@jit
def _looked_back(
    recent: Value, seat: Value, position: Value, lookback: Value, vocab: Value, HISTORY: constexpr
) -> Value:
    """The tokens of the last `lookback` positions, which of them there are, and where they lie."""
    n = tl.arange(0, HISTORY)
    back = (position + HISTORY - n) % HISTORY
    token = tl.load(recent + seat * HISTORY + n, mask=(back < lookback) & (back <= position), other=-1)
    return token, (token >= 0) & (token < vocab), n


@jit
def penalise(
    logits: Value, ids: Value, rows: Value, positions: Value, reals: Value, wholes: Value, recent: Value,
    biased: Value, bias: Value, kept: Value, vocab: Value, HISTORY: constexpr, BIASES: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """Add biases, then weaken what stands among the newest tokens; what was there goes to `kept`.

    `recent[seat, position % HISTORY]` are the newest tokens: the one that was fed is entered here.
    """
    begin(PDL)
    ahead(PDL)
    row = tl.program_id(0)
    seat, position = tl.load(rows + row), tl.load(positions + row)
    own, before = logits + row.to(tl.int64) * vocab, kept + row * (HISTORY + BIASES)
    count, lookback = tl.load(wholes + seat * 8 + 2), tl.load(wholes + seat * 8 + 1)
    if (position >= 0) & (count > 0):
        n = tl.arange(0, BIASES)
        token = tl.load(biased + seat * BIASES + n, mask=n < count, other=0)
        score = tl.load(own + token, mask=n < count, other=0.0)
        tl.store(before + HISTORY + n, score, mask=n < count)
        tl.store(own + token, score + tl.load(bias + seat * BIASES + n, mask=n < count, other=0.0), mask=n < count)
        tl.debug_barrier()
    if (position >= 0) & (lookback > 0):
        tl.store(recent + seat * HISTORY + position % HISTORY, tl.load(ids + row).to(tl.int32))
        tl.debug_barrier()
        token, known, n = _looked_back(recent, seat, position, lookback, vocab, HISTORY)
        score = tl.load(own + token, mask=known, other=0.0)
        tl.store(before + n, score, mask=known)
        penalty, presence = tl.load(reals + seat * 8 + 3), tl.load(reals + seat * 8 + 4)
        tl.debug_barrier()  # a token that stands twice was read twice, and is now written twice, the same
        tl.store(own + token, tl.where(score < 0, score * penalty, score / penalty) - presence, mask=known)


@jit
def restore(
    logits: Value, row: Value, seat: Value, position: Value, wholes: Value, recent: Value, biased: Value, kept: Value,
    vocab: Value, HISTORY: constexpr, BIASES: constexpr,
) -> None:  # fmt: skip
    """Undo `penalise`."""
    own, before = logits + row.to(tl.int64) * vocab, kept + row * (HISTORY + BIASES)
    count, lookback = tl.load(wholes + seat * 8 + 2), tl.load(wholes + seat * 8 + 1)
    if (position >= 0) & (lookback > 0):
        token, known, n = _looked_back(recent, seat, position, lookback, vocab, HISTORY)
        tl.store(own + token, tl.load(before + n, mask=known, other=0.0), mask=known)
        tl.debug_barrier()
    if (position >= 0) & (count > 0):
        n = tl.arange(0, BIASES)
        token = tl.load(biased + seat * BIASES + n, mask=n < count, other=0)
        tl.store(own + token, tl.load(before + HISTORY + n, mask=n < count, other=0.0), mask=n < count)
