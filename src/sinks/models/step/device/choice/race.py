"""The wide kernels of a draw: every chunk of a vocabulary is a program's.

What `Sampling` of sinks.stream keeps is always the upper end of one order (`order.py`; of equals the later one, as a
stable ascending sort has it, by which transformers cuts top-p). So nobody sorts: all tokens race, by logit over
temperature plus their own noise; the winner is what the kept ones alone would have drawn, if it is one of them, which
two sums tell: how many tokens are above it, and what they weigh. Where it is none, nothing below it is one either, and
those above race again. A small top-k is found otherwise: see `search.py`.

A row's parameters lie at its seat, so that rows come and go under one captured graph: `reals` `[seats, 8]` hold
temperature (0: the likeliest), top-p, min-p, repetition and presence penalty, `wholes` `[seats, 8]` top-k (0: all),
lookback, how many tokens are biased, seed. `parts` `[2, 5, rows, PLACES]` take, of two races and by chunk, what all
tokens weigh, the best key, its token, what stands above the winner, and how many have a larger logit.
"""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.models.step.device.choice.noise import noise_between
from sinks.models.step.device.choice.order import best_of, is_above, is_finite, largest, packed_best
from sinks.models.step.device.choice.penalties import is_changed
from sinks.models.step.device.products import ahead, begin


@jit
def logits_of(logits: Value, row: Value, chunk: Value, vocab: Value, CHUNK: constexpr) -> Value:
    """The tokens of a chunk and a row's logits of them."""
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    return n, tl.load(logits + row.to(tl.int64) * vocab + n, mask=n < vocab, other=float("-inf"))


@jit
def measure(
    logits: Value, rows: Value, positions: Value, reals: Value, wholes: Value, measured: Value, tops: Value,
    vocab: Value, KNOWN: constexpr, CHUNK: constexpr, GROUP: constexpr, PLACES: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """The best of every chunk of a row, packed, and the largest logit of every GROUP in it.

    KNOWN: the best of a row is known already, where nothing was changed and nothing is drawn.
    """
    begin(PDL)
    ahead(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    seat = tl.load(rows + row)
    wanted = (tl.load(reals + seat * 8) > 0) | is_changed(wholes, seat) | (not KNOWN)
    if (tl.load(positions + row) >= 0) & wanted:
        n, x = logits_of(logits, row, chunk, vocab, CHUNK)
        x = tl.where(x != x, float("inf"), x)  # what is no number must not be overlooked
        tl.store(measured + row * PLACES + chunk, packed_best(x, n))
        if tl.load(wholes + seat * 8) > 0:
            groups = (row * PLACES + chunk) * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
            tl.store(tops + groups, tl.max(tl.reshape(x, (CHUNK // GROUP, GROUP)), 1))


@jit
def settings_of(reals: Value, wholes: Value, seat: Value) -> Value:
    """Temperature, top-p, min-p and top-k of a seat."""
    own = reals + seat * 8
    return tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(wholes + seat * 8)


@jit
def races(rows: Value, positions: Value, reals: Value, wholes: Value, most: Value, FEW: constexpr) -> Value:
    """Whether all tokens of this program's row race: it samples, from more than a few."""
    seat = tl.load(rows + tl.program_id(0))
    temperature, _, _, k = settings_of(reals, wholes, seat)
    return (tl.load(positions + tl.program_id(0)) >= 0) & (temperature > 0) & is_finite(most) & ((k == 0) | (k > FEW))


@jit
def keys_of(
    x: Value, most: Value, start: Value, seed: Value, place: Value, temperature: Value, min_p: Value, COUNT: constexpr
) -> Value:
    """Keys and weights of the logits of tokens `start` to `start + COUNT - 1`: minus infinity below min-p."""
    below = (x - most) / temperature
    weight = tl.exp(below)
    key = below + noise_between(seed, place, start, COUNT)
    return tl.where((weight >= min_p) & (x > float("-inf")), key, float("-inf")), weight


@jit
def race(
    logits: Value, rows: Value, positions: Value, reals: Value, wholes: Value, measured: Value, parts: Value,
    vocab: Value, CHUNK: constexpr, PLACES: constexpr, FEW: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """The best key of every chunk, and what its tokens weigh."""
    begin(PDL)
    ahead(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    most = largest(measured, row, PLACES)
    if races(rows, positions, reals, wholes, most, FEW):
        seat, place = tl.load(rows + row), tl.load(positions + row) + 1
        temperature, _, min_p, _ = settings_of(reals, wholes, seat)
        n, x = logits_of(logits, row, chunk, vocab, CHUNK)
        seed = tl.load(wholes + seat * 8 + 3)
        key, weight = keys_of(x, most, chunk * CHUNK, seed, place, temperature, min_p, CHUNK)
        best, token = best_of(key, n)
        here, part = parts + row * PLACES + chunk, tl.num_programs(0) * PLACES
        tl.store(here, tl.sum(weight, 0))
        tl.store(here + part, best)
        tl.store(here + 2 * part, token.to(tl.float32))


@jit
def winner(parts: Value, row: Value, chunks: Value, vocab: Value, PLACES: constexpr) -> Value:
    """The token that won a race."""
    n, part = tl.arange(0, PLACES), tl.num_programs(0) * PLACES
    key = tl.load(parts + part + row * PLACES + n, mask=n < chunks, other=float("-inf"))
    token = tl.load(parts + 2 * part + row * PLACES + n, mask=n < chunks, other=0.0).to(tl.int32)
    _, first = best_of(key, token)
    return tl.minimum(first, vocab - 1)


@jit
def _part(parts: Value, which: Value, row: Value, chunks: Value, PLACES: constexpr) -> Value:
    n = tl.arange(0, PLACES)
    return tl.sum(tl.load(parts + (which * tl.num_programs(0) + row) * PLACES + n, mask=n < chunks, other=0.0), 0)


@jit
def is_kept(parts: Value, row: Value, chunks: Value, weight: Value, top_p: Value, k: Value, PLACES: constexpr) -> Value:
    """Whether the winner of a race, of this weight, is kept for sure; without top-k: whether it is kept.

    Of the weight of the k best only this is known: they weigh no less than the winner and all above it.
    """
    whole, above = _part(parts, 0, row, chunks, PLACES), _part(parts, 3, row, chunks, PLACES)
    least = tl.where(k > 0, above + weight, whole)
    return ((top_p >= 1) | (above < top_p * least)) & ((k == 0) | (_part(parts, 4, row, chunks, PLACES) < k))


@jit
def _is_cut(rows: Value, positions: Value, reals: Value, wholes: Value, most: Value, FEW: constexpr) -> Value:
    """Whether the winner of this program's row may have to go: its tokens race, and top-k or top-p keeps some only."""
    _, top_p, _, k = settings_of(reals, wholes, tl.load(rows + tl.program_id(0)))
    return races(rows, positions, reals, wholes, most, FEW) & ((top_p < 1) | (k > 0))


@jit
def _rejected(
    own: Value, parts: Value, row: Value, most: Value, temperature: Value, top_p: Value, k: Value, vocab: Value,
    CHUNK: constexpr, PLACES: constexpr,
) -> Value:  # fmt: skip
    chunks = (vocab + CHUNK - 1) // CHUNK
    weight = tl.exp((tl.load(own + winner(parts, row, chunks, vocab, PLACES)) - most) / temperature)
    return not is_kept(parts, row, chunks, weight, top_p, k, PLACES)


@jit
def verify(
    logits: Value, rows: Value, positions: Value, reals: Value, wholes: Value, measured: Value, parts: Value,
    vocab: Value, SECOND: constexpr, CHUNK: constexpr, PLACES: constexpr, FEW: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """What stands above the winner of a race, and how many logits are larger, by chunk."""
    begin(PDL)
    ahead(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    most = largest(measured, row, PLACES)
    temperature, top_p, _, k = settings_of(reals, wholes, tl.load(rows + row))
    if _is_cut(rows, positions, reals, wholes, most, FEW):
        own, part = logits + row.to(tl.int64) * vocab, tl.num_programs(0) * PLACES
        wanted = True
        if SECOND:
            wanted = (k == 0) & _rejected(own, parts, row, most, temperature, top_p, k, vocab, CHUNK, PLACES)
            parts += 5 * part
        if wanted:
            token = winner(parts, row, tl.num_programs(1), vocab, PLACES)
            floor = tl.load(own + token)
            n, x = logits_of(logits, row, chunk, vocab, CHUNK)
            weight = tl.exp((x - most) / temperature)
            here = parts + row * PLACES + chunk
            tl.store(here + 3 * part, tl.sum(tl.where(is_above(x, n, floor, token), weight, 0.0), 0))
            tl.store(here + 4 * part, tl.sum((x > floor).to(tl.float32), 0))


@jit
def race_again(
    logits: Value, rows: Value, positions: Value, reals: Value, wholes: Value, measured: Value, parts: Value,
    vocab: Value, CHUNK: constexpr, PLACES: constexpr, FEW: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """The race of all above a winner that is not kept; of others the first race counts as the second."""
    begin(PDL)
    ahead(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    most = largest(measured, row, PLACES)
    temperature, top_p, min_p, k = settings_of(reals, wholes, tl.load(rows + row))
    if _is_cut(rows, positions, reals, wholes, most, FEW):
        own, part = logits + row.to(tl.int64) * vocab, tl.num_programs(0) * PLACES
        here = parts + row * PLACES + chunk
        again = here + 5 * part
        for each in tl.static_range(5):
            tl.store(again + each * part, tl.load(here + each * part))
        if (k == 0) & _rejected(own, parts, row, most, temperature, top_p, k, vocab, CHUNK, PLACES):
            than = winner(parts, row, tl.num_programs(1), vocab, PLACES)
            n, x = logits_of(logits, row, chunk, vocab, CHUNK)
            seed, place = tl.load(wholes + tl.load(rows + row) * 8 + 3), tl.load(positions + row) + 1
            key, _ = keys_of(x, most, chunk * CHUNK, seed, place, temperature, min_p, CHUNK)
            best, token = best_of(tl.where(is_above(x, n, tl.load(own + than), than), key, float("-inf")), n)
            tl.store(again + part, best)
            tl.store(again + 2 * part, token.to(tl.float32))
