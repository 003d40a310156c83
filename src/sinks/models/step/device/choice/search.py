"""What one program a row does: the few that top-k keeps, the races after the second, and the choice itself."""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.models.step.device.choice.noise import noise_at
from sinks.models.step.device.choice.order import best_of, is_above, is_finite, kth_of, number_of, ordered, unpacked
from sinks.models.step.device.choice.penalties import is_changed, restore
from sinks.models.step.device.choice.race import is_kept, keys_of, settings_of, winner
from sinks.models.step.device.products import ahead, begin


@jit
def _bound(tops: Value, groups: Value, k: Value, TOTAL: constexpr) -> Value:
    """The largest logits of all groups, and what the k-th of them is: k logits reach that."""
    n = tl.arange(0, TOTAL)
    top = tl.load(tops + n, mask=n < groups, other=float("-inf"))
    return top, n, kth_of(top, k)


@jit
def _few(
    own: Value, tops: Value, listed: Value, groups: Value, k: Value, most: Value, seed: Value, place: Value,
    temperature: Value, top_p: Value, min_p: Value, vocab: Value, FEW: constexpr, GROUP: constexpr, TOTAL: constexpr,
) -> Value:  # fmt: skip
    """The draw from the k best: all of them are in the groups whose largest logit is among the k largest of groups.

    -1 where ties make more than FEW such groups.
    """
    top, n, bound = _bound(tops, groups, k, TOTAL)
    chosen = (top >= bound) & (top > float("-inf"))
    count = tl.sum(chosen.to(tl.int32), 0)
    token = tl.full([], -1, tl.int32)
    if count <= FEW:
        tl.store(listed + tl.cumsum(chosen.to(tl.int32), 0) - 1, n, mask=chosen)
        tl.debug_barrier()
        slot = tl.arange(0, FEW)
        group = tl.load(listed + slot, mask=slot < count, other=2147483647 // GROUP)
        tokens = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (FEW * GROUP,))
        x = tl.load(own + tokens, mask=tokens < vocab, other=float("-inf"))
        below = (x - most) / temperature
        weight = tl.where(x >= kth_of(x, k), tl.exp(below), 0.0)
        whole = tl.sum(weight, 0)
        key = below + noise_at(seed, place, tokens)
        key = tl.where((weight > 0) & (weight >= min_p), key, float("-inf"))
        going = tl.full([], 1, tl.int32)
        while going != 0:
            best, token = best_of(key, tokens)
            floor = tl.max(tl.where(tokens == token, x, float("-inf")), 0)
            greater = is_above(x, tokens, floor, token)
            above = tl.sum(tl.where(greater, weight, 0.0), 0)
            key = tl.where(greater, key, float("-inf"))
            going = ((top_p < 1) & (above >= top_p * whole) & (best > float("-inf"))).to(tl.int32)
    return token


@jit
def _kth_in_all(own: Value, least: Value, k: Value, vocab: Value, BLOCK: constexpr) -> Value:
    """The k-th largest logit, which is `least` or more."""
    low, high = ordered(least).to(tl.int64), tl.full([], 0x7F800001, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        there = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab, BLOCK):
            n = start + tl.arange(0, BLOCK)
            x = tl.load(own + n, mask=n < vocab, other=float("-inf"))
            there += ((ordered(x).to(tl.int64) >= middle) & (n < vocab)).to(tl.int32)
        if tl.sum(there, 0) >= k:
            low = middle
        else:
            high = middle
    return number_of(low)


@jit
def _weight_above(
    own: Value, most: Value, temperature: Value, floor: Value, than: Value, vocab: Value, BLOCK: constexpr
) -> Value:
    """What all tokens above (floor, than) weigh."""
    above = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        n = start + tl.arange(0, BLOCK)
        x = tl.load(own + n, mask=n < vocab, other=float("-inf"))
        above += tl.where(is_above(x, n, floor, than), tl.exp((x - most) / temperature), 0.0)
    return tl.sum(above, 0)


@jit
def _race_on(
    own: Value, most: Value, seed: Value, place: Value, temperature: Value, top_p: Value, min_p: Value, whole: Value,
    floor: Value, than: Value, vocab: Value, BLOCK: constexpr,
) -> Value:  # fmt: skip
    """Races of all above (floor, than), until a winner is kept: what is above it weighs less than top-p of `whole`."""
    going = tl.full([], 1, tl.int32)
    while going != 0:
        best, token = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], 2147483647, tl.int32)
        for start in range(0, vocab, BLOCK):
            n = start + tl.arange(0, BLOCK)
            x = tl.load(own + n, mask=n < vocab, other=float("-inf"))
            key, _ = keys_of(x, most, start, seed, place, temperature, min_p, BLOCK)
            better = is_above(x, n, floor, than) & (key > best)
            best, token = tl.where(better, key, best), tl.where(better, n, token)
        key, than = best_of(best, token)
        than = tl.minimum(than, vocab - 1)
        floor = tl.load(own + than)
        above = _weight_above(own, most, temperature, floor, than, vocab, BLOCK)
        going = ((top_p < 1) & (above >= top_p * whole) & (key > float("-inf"))).to(tl.int32)
    return than


@jit
def _drawn(
    own: Value, row: Value, most: Value, seed: Value, place: Value, temperature: Value, top_p: Value, min_p: Value,
    k: Value, parts: Value, tops: Value, listed: Value, vocab: Value, CHUNK: constexpr, GROUP: constexpr,
    PLACES: constexpr, BLOCK: constexpr, FEW: constexpr,
) -> Value:  # fmt: skip
    """The token of a row that samples."""
    chunks = (vocab + CHUNK - 1) // CHUNK
    groups, total = chunks * (CHUNK // GROUP), tl.full([], 0, tl.int64) + tl.num_programs(0) * PLACES
    token = tl.full([], -1, tl.int32)
    filtered = (top_p < 1) | (k > 0)
    if (k > 0) & (k <= FEW):
        token = _few(
            own, tops, listed, groups, k, most, seed, place, temperature, top_p, min_p, vocab, FEW, GROUP,
            PLACES * (CHUNK // GROUP),
        )  # fmt: skip
    else:
        last = parts + tl.where(filtered, 5 * total, 0)
        token = winner(last, row, chunks, vocab, PLACES)
        weight = tl.exp((tl.load(own + token) - most) / temperature)
        if filtered:
            if not is_kept(last, row, chunks, weight, top_p, k, PLACES):
                if k > 0:
                    token = tl.full([], -1, tl.int32)
                else:
                    n = tl.arange(0, PLACES)
                    whole = tl.sum(tl.load(parts + row * PLACES + n, mask=n < chunks, other=0.0), 0)
                    token = _race_on(
                        own, most, seed, place, temperature, top_p, min_p, whole, tl.load(own + token), token, vocab,
                        BLOCK,
                    )  # fmt: skip
    if token < 0:  # top-k beyond the few
        _, _, bound = _bound(tops, groups, k, PLACES * (CHUNK // GROUP))
        least = _kth_in_all(own, bound, k, vocab, BLOCK)
        never = tl.full([], -1, tl.int32)
        token = _race_on(
            own, most, seed, place, temperature, top_p, min_p,
            _weight_above(own, most, temperature, least, never, vocab, BLOCK), least, never, vocab, BLOCK,
        )  # fmt: skip
    return token


@jit
def choose(
    best: Value, logits: Value, ids: Value, rows: Value, positions: Value, reals: Value, wholes: Value, recent: Value,
    biased: Value, kept: Value, measured: Value, parts: Value, tops: Value, listed: Value, newest: Value,
    told: Value, vocab: Value, KNOWN: constexpr, HISTORY: constexpr, BIASES: constexpr, CHUNK: constexpr,
    GROUP: constexpr, PLACES: constexpr, BLOCK: constexpr, FEW: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """The next token of each row, kept at its seat and fed back, one position on; `best` is emptied.

    `told` `[2, rows]` are the tokens, and whether there was one: a row whose best logit is not finite rests from then
    on, with -1 at its seat.
    """
    begin(PDL)
    ahead(PDL)
    row, n = tl.program_id(0), tl.arange(0, PLACES)
    seat, position = tl.load(rows + row), tl.load(positions + row)
    temperature, top_p, min_p, k = settings_of(reals, wholes, seat)
    packed = tl.full([], -9223372036854775808, tl.int64)
    if KNOWN:
        packed = tl.max(tl.load(best + row * PLACES + n), 0)
        tl.store(best + row * PLACES + n, tl.full([PLACES], -9223372036854775808, tl.int64))
    if (position >= 0) & (is_changed(wholes, seat) | (temperature > 0) | (not KNOWN)):
        packed = tl.max(tl.load(measured + row * PLACES + n), 0)
    most, token = unpacked(packed)
    finite = is_finite(most)
    if (position >= 0) & (temperature > 0) & finite:
        token = _drawn(
            logits + row.to(tl.int64) * vocab, row, most, tl.load(wholes + seat * 8 + 3), position + 1, temperature,
            top_p, min_p, k, parts, tops + row * PLACES * (CHUNK // GROUP), listed + row * FEW, vocab, CHUNK, GROUP,
            PLACES, BLOCK, FEW,
        )  # fmt: skip
    tl.debug_barrier()  # what was penalised has been read
    restore(logits, row, seat, position, wholes, recent, biased, kept, vocab, HISTORY, BIASES)
    keep(row, seat, position, token, finite, ids, positions, newest, told)


@jit
def keep(
    row: Value,
    seat: Value,
    position: Value,
    token: Value,
    finite: Value,
    ids: Value,
    positions: Value,
    newest: Value,
    told: Value,
) -> None:
    """Tell what was chosen, and move the row on."""
    chosen = tl.where(finite, token, 0).to(tl.int64)
    tl.store(told + row, chosen)
    tl.store(told + tl.num_programs(0) + row, finite.to(tl.int64))
    tl.store(newest + seat, tl.where(finite, chosen, -1), mask=position >= 0)
    tl.store(ids + row, chosen)
    tl.store(positions + row, tl.where((position < 0) | (not finite), -1, position + 1))


@jit
def choose_best(
    best: Value, ids: Value, rows: Value, positions: Value, newest: Value, told: Value, PLACES: constexpr,
    PDL: constexpr,
) -> None:  # fmt: skip
    """`choose` where every row takes the likeliest of its logits as they are."""
    begin(PDL)
    ahead(PDL)
    row, places = tl.program_id(0), best + tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    most, token = unpacked(tl.max(tl.load(places), 0))
    tl.store(places, tl.full([PLACES], -9223372036854775808, tl.int64))
    keep(row, tl.load(rows + row), tl.load(positions + row), token, is_finite(most), ids, positions, newest, told)
