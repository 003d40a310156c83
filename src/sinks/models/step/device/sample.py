"""The kernels that choose a token by its probability, inside a captured step: penalties, and a draw in two passes.

What `Sampling` of sinks.stream keeps is always the upper end of one order: by logit, and of equals the later token is
the larger (so does a stable ascending sort, by which transformers cuts top-p). So nobody sorts: all tokens race, by
logit over temperature plus their own noise; the winner is what the kept ones alone would have drawn, if it is one of
them, which two sums tell: how many tokens are above it, and what they weigh. Where it is none, nothing below it is
one either, and those above race again.

A row's parameters lie at its seat, so that rows come and go under one captured graph: `reals` `[seats, 8]` hold
temperature (0: the likeliest), top-p, min-p, repetition and presence penalty, `wholes` `[seats, 8]` top-k (0: all),
lookback, how many tokens are biased, seed. Greedy rows pass through at once.
"""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.models.step.device.noise import noise_between
from sinks.models.step.device.products import ahead, begin


@jit
def _ordered(x: Value) -> Value:
    """Integers that order as these numbers do; its own inverse on the bits."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _number(ordered: Value) -> Value:
    ordered = ordered.to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@jit
def _is_finite(x: Value) -> Value:
    return (x > float("-inf")) & (x < float("inf"))


@jit
def _is_greater(x: Value, token: Value, least: Value, than: Value) -> Value:
    """Whether (x, token) comes above (least, than) in the order of this module."""
    return (x > least) | ((x == least) & (token > than))


@jit
def penalise(
    logits: Value, ids: Value, rows: Value, positions: Value, reals: Value, wholes: Value, recent: Value,
    biased: Value, bias: Value, kept: Value, vocab: Value, HISTORY: constexpr, BIASES: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """Add biases, then weaken what stands among the newest tokens, in place; what was there goes to `kept`.

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
        n = tl.arange(0, HISTORY)
        back = (position + HISTORY - n) % HISTORY
        token = tl.load(recent + seat * HISTORY + n, mask=(back < lookback) & (back <= position), other=-1)
        known = (token >= 0) & (token < vocab)
        score = tl.load(own + token, mask=known, other=0.0)
        tl.store(before + n, score, mask=known)
        penalty, presence = tl.load(reals + seat * 8 + 3), tl.load(reals + seat * 8 + 4)
        tl.debug_barrier()  # a token that stands twice was read twice, and is now written twice, the same
        tl.store(own + token, tl.where(score < 0, score * penalty, score / penalty) - presence, mask=known)


@jit
def _restore(
    logits: Value, row: Value, seat: Value, position: Value, wholes: Value, recent: Value, biased: Value, kept: Value,
    vocab: Value, HISTORY: constexpr, BIASES: constexpr,
) -> None:  # fmt: skip
    """Undo `penalise`: whoever reads the logits wants the model's own."""
    own, before = logits + row.to(tl.int64) * vocab, kept + row * (HISTORY + BIASES)
    count, lookback = tl.load(wholes + seat * 8 + 2), tl.load(wholes + seat * 8 + 1)
    if (position >= 0) & (lookback > 0):
        n = tl.arange(0, HISTORY)
        back = (position + HISTORY - n) % HISTORY
        token = tl.load(recent + seat * HISTORY + n, mask=(back < lookback) & (back <= position), other=-1)
        known = (token >= 0) & (token < vocab)
        tl.store(own + token, tl.load(before + n, mask=known, other=0.0), mask=known)
        tl.debug_barrier()
    if (position >= 0) & (count > 0):
        n = tl.arange(0, BIASES)
        token = tl.load(biased + seat * BIASES + n, mask=n < count, other=0)
        tl.store(own + token, tl.load(before + HISTORY + n, mask=n < count, other=0.0), mask=n < count)


@jit
def measure(
    logits: Value, rows: Value, positions: Value, reals: Value, wholes: Value, measured: Value, tops: Value,
    vocab: Value, KNOWN: constexpr, CHUNK: constexpr, GROUPS: constexpr, PLACES: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """The best of every chunk of a row, packed as in `_best` of products.py, and of every group in it.

    KNOWN: the best of a row is known already, where nothing was changed and nothing is drawn.
    """
    begin(PDL)
    ahead(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    seat = tl.load(rows + row)
    is_drawn = tl.load(reals + seat * 8) > 0
    changed = (tl.load(wholes + seat * 8 + 1) > 0) | (tl.load(wholes + seat * 8 + 2) > 0)
    if (tl.load(positions + row) >= 0) & (is_drawn | changed | (not KNOWN)):
        n = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row.to(tl.int64) * vocab + n, mask=n < vocab, other=float("-inf"))
        x = tl.where(x != x, float("inf"), x)  # what is no number must not be overlooked
        most = tl.max(x, 0)
        first = tl.min(tl.where(x == most, n, 2147483647), 0)
        packed = (_ordered(most).to(tl.int64) << 32) | (0xFFFFFFFF - first.to(tl.int64))
        tl.store(measured + row * PLACES + chunk, packed)
        if tl.load(wholes + seat * 8) > 0:
            groups = row * PLACES * GROUPS + chunk * GROUPS + tl.arange(0, GROUPS)
            tl.store(tops + groups, tl.max(tl.reshape(x, (GROUPS, CHUNK // GROUPS)), 1))


@jit
def _most(measured: Value, row: Value, PLACES: constexpr) -> Value:
    return _number(tl.max(tl.load(measured + row * PLACES + tl.arange(0, PLACES)), 0) >> 32)


@jit
def race(
    logits: Value, rows: Value, positions: Value, reals: Value, wholes: Value, measured: Value, parts: Value,
    keys: Value, vocab: Value, CHUNK: constexpr, PLACES: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """Every token's key: its logit over temperature, below the best, and its noise; minus infinity below min-p.

    `parts` `[5, rows, PLACES]` take, by chunk, what all tokens weigh, the best key, and its token.
    """
    begin(PDL)
    ahead(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    seat, position = tl.load(rows + row), tl.load(positions + row)
    temperature, most = tl.load(reals + seat * 8), _most(measured, row, PLACES)
    if (position >= 0) & (temperature > 0) & _is_finite(most):
        n = chunk * CHUNK + tl.arange(0, CHUNK)
        own = row.to(tl.int64) * vocab
        x = tl.load(logits + own + n, mask=n < vocab, other=float("-inf"))
        below = (x - most) / temperature
        weight = tl.exp(below)
        key = below + noise_between(tl.load(wholes + seat * 8 + 3), position + 1, chunk * CHUNK, CHUNK)
        key = tl.where((weight >= tl.load(reals + seat * 8 + 2)) & (x > float("-inf")), key, float("-inf"))
        tl.store(keys + own + n, key, mask=n < vocab)
        best = tl.max(key, 0)
        token = tl.minimum(tl.min(tl.where(key == best, n, 2147483647), 0), vocab - 1)
        place, part = parts + row * PLACES + chunk, tl.num_programs(0) * PLACES
        tl.store(place, tl.sum(weight, 0))
        tl.store(place + part, best)
        tl.store(place + 2 * part, token.to(tl.float32))


@jit
def _winner(parts: Value, row: Value, chunks: Value, PLACES: constexpr) -> Value:
    """The token that won the race over all tokens."""
    n, part = tl.arange(0, PLACES), tl.num_programs(0) * PLACES
    key = tl.load(parts + part + row * PLACES + n, mask=n < chunks, other=float("-inf"))
    token = tl.load(parts + 2 * part + row * PLACES + n, mask=n < chunks, other=0.0)
    return tl.min(tl.where(key == tl.max(key, 0), token, 16777216.0), 0).to(tl.int32)


@jit
def verify(
    logits: Value, rows: Value, positions: Value, reals: Value, wholes: Value, measured: Value, parts: Value,
    vocab: Value, CHUNK: constexpr, PLACES: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """What stands above the winner: its weight in order, and the number of larger logits, by chunk."""
    begin(PDL)
    ahead(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    seat = tl.load(rows + row)
    temperature, most = tl.load(reals + seat * 8), _most(measured, row, PLACES)
    filtered = (tl.load(reals + seat * 8 + 1) < 1) | (tl.load(wholes + seat * 8) > 0)
    if (tl.load(positions + row) >= 0) & (temperature > 0) & filtered & _is_finite(most):
        token = tl.minimum(_winner(parts, row, tl.num_programs(1), PLACES), vocab - 1)
        own = logits + row.to(tl.int64) * vocab
        least = tl.load(own + token)
        n = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(own + n, mask=n < vocab, other=float("-inf"))
        weight = tl.exp((x - most) / temperature)
        place, part = parts + row * PLACES + chunk, tl.num_programs(0) * PLACES
        tl.store(place + 3 * part, tl.sum(tl.where(_is_greater(x, n, least, token), weight, 0.0), 0))
        tl.store(place + 4 * part, tl.sum((x > least).to(tl.float32), 0))


@jit
def _part(parts: Value, which: Value, row: Value, chunks: Value, PLACES: constexpr) -> Value:
    n = tl.arange(0, PLACES)
    place = parts + (which * tl.num_programs(0) + row) * PLACES + n
    return tl.sum(tl.load(place, mask=n < chunks, other=0.0), 0)


@jit
def _loaded(
    own: Value, found: Value, few: Value, count: Value, start: Value, BLOCK: constexpr, FEW: constexpr
) -> Value:
    """Logits and their tokens from place `start` of a row, or, with `few`, of those that were found in it."""
    n = start + tl.arange(0, BLOCK)
    x = tl.load(own + n, mask=(n < count) & (few == 0), other=float("-inf"))
    picked = (n < count) & (few != 0)
    x = tl.maximum(x, tl.load(found + n, mask=picked, other=float("-inf")))
    return x, tl.where(few != 0, tl.load(found + FEW + n, mask=picked, other=0.0).to(tl.int32), n)


@jit
def _kth(
    own: Value, found: Value, few: Value, count: Value, k: Value, least: Value, BLOCK: constexpr, FEW: constexpr
) -> Value:
    """The k-th largest logit, which is `least` or more: bit by bit."""
    low, high = _ordered(least).to(tl.int64), tl.full([], 0x7F800001, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        there = tl.full([], 0, tl.int64)
        for start in range(0, count, BLOCK):
            x, _ = _loaded(own, found, few, count, start, BLOCK, FEW)
            there += tl.sum((_ordered(x).to(tl.int64) >= middle).to(tl.int32), 0)
        if there >= k:
            low = middle
        else:
            high = middle
    return _number(low)


@jit
def _picked(own: Value, found: Value, least: Value, count: Value, BLOCK: constexpr, FEW: constexpr) -> Value:
    """Write the logits of `least` or more, and their tokens, to `found`; how many there are, FEW of them written."""
    total = tl.full([], 0, tl.int32)
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        x = tl.load(own + n, mask=n < count, other=float("-inf"))
        keep = (x >= least) & (n < count)
        place = total + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(found + place, x, mask=keep & (place < FEW))
        tl.store(found + FEW + place, n.to(tl.float32), mask=keep & (place < FEW))
        total += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()
    return total


@jit
def search(
    own: Value, keys: Value, found: Value, tops: Value, most: Value, temperature: Value, top_p: Value, k: Value,
    whole: Value, floor: Value, than: Value, vocab: Value, groups: Value, BLOCK: constexpr, FEW: constexpr,
) -> Value:  # fmt: skip
    """The winner among the kept tokens of one row. With top-k those are found first, and their weight is the whole.

    Where k is no larger than the number of `groups`, the k-th best group has a logit that k others reach: so many are
    few, and are looked at alone. Without top-k, (`floor`, `than`) lost the race already, and all below it.
    """
    few, count, least = tl.full([], 0, tl.int32), vocab, tl.full([], float("-inf"), tl.float32)
    if k > 0:
        bound = tl.full([], float("-inf"), tl.float32)
        if k <= groups:
            bound = _kth(tops, found, few, groups, k, bound, BLOCK, FEW)
            there = _picked(own, found, bound, vocab, BLOCK, FEW)
            few = (there <= FEW).to(tl.int32)
            count = tl.where(few != 0, there, vocab)
        least = _kth(own, found, few, count, k, bound, BLOCK, FEW)
        floor, than = tl.full([], float("-inf"), tl.float32), tl.full([], -1, tl.int32)
        whole = tl.full([], 0.0, tl.float32)
        for start in range(0, count, BLOCK):
            x, _ = _loaded(own, found, few, count, start, BLOCK, FEW)
            whole += tl.sum(tl.where(x >= least, tl.exp((x - most) / temperature), 0.0), 0)
    going = tl.full([], 1, tl.int32)
    while going != 0:
        best, token = tl.full([], float("-inf"), tl.float32), tl.full([], 2147483647, tl.int32)
        for start in range(0, count, BLOCK):
            x, n = _loaded(own, found, few, count, start, BLOCK, FEW)
            real = (x >= least) & _is_greater(x, n, floor, than)
            key = tl.load(keys + n, mask=real, other=float("-inf"))
            here = tl.max(key, 0)
            first = tl.min(tl.where(key == here, n, 2147483647), 0)
            token = tl.where((here > best) | ((here == best) & (first < token)), first, token)
            best = tl.maximum(best, here)
        than = tl.minimum(token, vocab - 1)
        floor = tl.load(own + than)
        above = tl.full([], 0.0, tl.float32)
        for start in range(0, count, BLOCK):
            x, n = _loaded(own, found, few, count, start, BLOCK, FEW)
            above += tl.sum(tl.where(_is_greater(x, n, floor, than), tl.exp((x - most) / temperature), 0.0), 0)
        going = ((top_p < 1) & (above >= top_p * whole) & (best > float("-inf"))).to(tl.int32)
    return than


@jit
def _drawn(
    own: Value, row: Value, seat: Value, most: Value, reals: Value, wholes: Value, parts: Value, keys: Value,
    found: Value, tops: Value, vocab: Value, CHUNK: constexpr, GROUPS: constexpr, PLACES: constexpr, BLOCK: constexpr,
    FEW: constexpr,
) -> Value:  # fmt: skip
    """The token of a row that samples: the winner of the race over all tokens, if it is among those that are kept."""
    chunks, k = (vocab + CHUNK - 1) // CHUNK, tl.load(wholes + seat * 8)
    temperature, top_p = tl.load(reals + seat * 8), tl.load(reals + seat * 8 + 1)
    token = tl.minimum(_winner(parts, row, chunks, PLACES), vocab - 1)
    if (top_p < 1) | (k > 0):
        score = tl.load(own + token)
        whole, above = _part(parts, 0, row, chunks, PLACES), _part(parts, 3, row, chunks, PLACES)
        # Of the weight of the k best only this is known: they weigh no less than the winner and all above it.
        least = tl.where(k > 0, above + tl.exp((score - most) / temperature), whole)
        larger = _part(parts, 4, row, chunks, PLACES)
        if ((k > 0) & (larger >= k)) | ((top_p < 1) & (above >= top_p * least)):
            row_found = found + row * 2 * FEW
            token = search(
                own, keys + row.to(tl.int64) * vocab, row_found, tops + row * PLACES * GROUPS, most, temperature, top_p,
                k, whole, score, token, vocab, chunks * GROUPS, BLOCK, FEW,
            )  # fmt: skip
    return token


@jit
def choose(
    best: Value, logits: Value, ids: Value, rows: Value, positions: Value, reals: Value, wholes: Value, recent: Value,
    biased: Value, kept: Value, measured: Value, parts: Value, keys: Value, found: Value, tops: Value, newest: Value,
    told: Value, vocab: Value, KNOWN: constexpr, HISTORY: constexpr, BIASES: constexpr, CHUNK: constexpr,
    GROUPS: constexpr, PLACES: constexpr, BLOCK: constexpr, FEW: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """The next token of each row, kept at its seat and fed back, one position on; `best` is emptied.

    `told` `[2, rows]` are the tokens, and whether there was one: a row whose best logit is not finite rests from then
    on, with -1 at its seat.
    """
    begin(PDL)
    ahead(PDL)
    row, n = tl.program_id(0), tl.arange(0, PLACES)
    seat, position = tl.load(rows + row), tl.load(positions + row)
    temperature = tl.load(reals + seat * 8)
    changed = (tl.load(wholes + seat * 8 + 1) > 0) | (tl.load(wholes + seat * 8 + 2) > 0)
    packed = tl.full([], -9223372036854775808, tl.int64)
    if KNOWN:
        packed = tl.max(tl.load(best + row * PLACES + n), 0)
        tl.store(best + row * PLACES + n, tl.full([PLACES], -9223372036854775808, tl.int64))
    if (position >= 0) & (changed | (temperature > 0) | (not KNOWN)):
        packed = tl.max(tl.load(measured + row * PLACES + n), 0)
    most = _number(packed >> 32)
    finite = _is_finite(most)
    token = (0xFFFFFFFF - (packed & 0xFFFFFFFF)).to(tl.int32)
    if (position >= 0) & (temperature > 0) & finite:
        token = _drawn(
            logits + row.to(tl.int64) * vocab, row, seat, most, reals, wholes, parts, keys, found, tops, vocab, CHUNK,
            GROUPS, PLACES, BLOCK, FEW,
        )  # fmt: skip
    tl.debug_barrier()  # what was penalised has been read
    _restore(logits, row, seat, position, wholes, recent, biased, kept, vocab, HISTORY, BIASES)
    chosen = tl.where(finite, token, 0).to(tl.int64)
    tl.store(told + row, chosen)
    tl.store(told + tl.num_programs(0) + row, finite.to(tl.int64))
    tl.store(newest + seat, tl.where(finite, chosen, -1), mask=position >= 0)
    tl.store(ids + row, chosen)
    tl.store(positions + row, tl.where((position < 0) | (not finite), -1, position + 1))
