"""What the kernels of this room share: the scores of a tile, the running softmax that takes it in, pairs to be turned.

A softmax under way is (accumulated values, sum, largest score, sum of weight times score), all but the first one
number a query. Scores are products that are not scaled yet; `scale`, above zero, takes them to powers of two in the one
instruction that also subtracts the largest. Tiles may come in any order. A key that a query does not see scores -2^100
(`hide`): what a query that has seen nothing else gathers from it weighs exactly 0 beside the first real score, so
nothing has to be guarded against infinities. A power of two, because its product with the scale must be exact: an
instruction that multiplies and subtracts in one would find a difference of 1e22 between a rounded product and itself.

Phases are 64-bit integers that wrap (`kernels.phase`); the upper 32 bits, read as signed, are the angle.
"""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def extent(begins: Value, row: Value, columns: Value, PACKED: constexpr) -> Value:
    """Where a row begins among the tokens, and its length; rows without pads are all alike, and nothing is loaded."""
    if PACKED:
        begin = tl.load(begins + row)
        length = tl.load(begins + row + 1) - begin
    else:
        begin, length = row * columns, columns
    return begin, length


@jit
def hide(scores: Value, seen: Value) -> Value:
    """`scores` where a key is `seen`, and what counts as none elsewhere."""
    return tl.where(seen, scores, -1.2676506002282294e30)


@jit
def take_in(state: Value, scores: Value, values: Value, scale: Value, STATISTICS: constexpr) -> Value:
    """Fold a tile of `scores` [queries, keys] and its `values` [keys, dims] in."""
    gathered, total, largest, weighed = state
    now = tl.maximum(largest, tl.max(scores, 1))
    level = now * scale
    shrink = tl.exp2(largest * scale - level)
    weights = tl.exp2(scores * scale - level[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if STATISTICS:
        weighed = weighed * shrink + tl.sum(weights * scores, 1)
    gathered = tl.dot(weights.to(values.dtype), values, gathered * shrink[:, None])
    return gathered, total, now, weighed


@jit
def take_in_logit(state: Value, logit: Value, scale: Value, STATISTICS: constexpr) -> Value:
    """Fold the sink `logit` (natural) in: a weight without a value, and one more outcome of the entropy."""
    gathered, total, largest, weighed = state
    score = logit.to(tl.float32) * 1.4426950408889634 / scale
    now = tl.maximum(largest, score)
    shrink = tl.exp2((largest - now) * scale)
    weight = tl.exp2((score - now) * scale)
    if STATISTICS:
        weighed = weighed * shrink + weight * tl.maximum(score, -1.0e30)
    return gathered * shrink[:, None], total * shrink + weight, now, weighed


@jit
def sink_tile(scores: Value, noted: Value, token: Value, real: Value, shape: Value, TILE: constexpr) -> Value:
    """Load products of queries at positions `token` with the sinks; -inf where a sink is none of this tile's.

    What the window still covers is left out: there sink and query stand at their true distance anyway.
    """
    sinks, window, _ = shape
    column = tl.arange(0, TILE)
    last = tl.where(real, token - window, -1)
    seen = (column < sinks)[None, :] & (column[None, :] <= last[:, None])
    return tl.load(scores + (noted * sinks)[:, None] + column[None, :], mask=seen, other=float("-inf"))


@jit
def load_firsts(
    heads: Value, begin: Value, head: Value, length: Value, COUNT: constexpr, DIM: constexpr, TILE: constexpr,
) -> Value:  # fmt: skip
    """The first TILE tokens [TILE, DIM] of one head of `heads` [tokens, COUNT, DIM], zeros past the row's end."""
    return load_firsts_at(heads, begin, head, length, tl.arange(0, DIM), COUNT, DIM, TILE)


@jit
def load_firsts_at(
    heads: Value, begin: Value, head: Value, length: Value, dims: Value, COUNT: constexpr, DIM: constexpr,
    TILE: constexpr,
) -> Value:  # fmt: skip
    """`load_firsts` of some dimensions only."""
    column = tl.arange(0, TILE)
    places = (begin + column).to(tl.int64) * (COUNT * DIM) + head * DIM
    return tl.load(heads + places[:, None] + dims[None, :], mask=(column < length)[:, None], other=0.0)


@jit
def place_of(begin: Value, token: Value, head: Value, COUNT: constexpr, DIM: constexpr) -> Value:
    """Offsets [tokens, DIM] of one head's tokens in [tokens, COUNT, DIM]."""
    places = (begin + token).to(tl.int64) * (COUNT * DIM) + head * DIM
    return places[:, None] + tl.arange(0, DIM)[None, :]


@jit
def circle(phase: Value) -> Value:
    """Cosine and sine of a signed 32-bit fraction of a turn, to 1e-7: quarters are integers, so nothing is reduced.

    `tl.cos` carries a path for huge angles that is never taken and costs registers all the same.
    """
    quarter = (phase + 0x20000000) >> 30
    angle = (phase - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32; at most an eighth
    square = angle * angle
    sin = 1.0 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    cos = 1.0 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    sin, odd = sin * angle, (quarter & 1) != 0
    sign = 1.0 - (quarter & 2).to(tl.float32)
    return tl.where(odd, -sin, cos) * sign, tl.where(odd, cos, sin) * sign


@jit
def pairs_of(rotary: Value, DIM: constexpr, INTERLEAVED: constexpr, WHOLE: constexpr) -> Value:
    """Dimensions two by two, as they are turned together; then, by an angle of 0, those that are not turned.

    WHOLE, that all are turned, is known when compiling: then a warp reads its dimensions in one piece.
    """
    pair = tl.arange(0, DIM // 2)
    if WHOLE:
        if INTERLEAVED:
            one, other = 2 * pair, 2 * pair + 1
        else:
            one, other = pair, pair + DIM // 2
    else:
        first, pairs = rotary
        rest = 2 * (pair - pairs)
        one = rest + tl.where(rest >= first, 2 * pairs, 0)
        other = rest + 1 + tl.where(rest + 1 >= first, 2 * pairs, 0)
        if INTERLEAVED:
            one = tl.where(pair < pairs, first + 2 * pair, one)
            other = tl.where(pair < pairs, first + 2 * pair + 1, other)
        else:
            one = tl.where(pair < pairs, first + pair, one)
            other = tl.where(pair < pairs, first + pairs + pair, other)
    return one, other


@jit
def angles(token: Value, steps: Value, rotary: Value, DIM: constexpr) -> Value:
    """Cosine and sine of each pair of `pairs_of`, [tokens, DIM / 2]."""
    pair = tl.arange(0, DIM // 2)
    step = tl.load(steps + pair, mask=pair < rotary[1], other=0)
    return circle(((token.to(tl.int64)[:, None] * step[None, :]) >> 32).to(tl.int32))


@jit
def load_pairs(places: Value, one: Value, other: Value, real: Value) -> Value:
    """Heads at `places` [tokens], each in two halves; zeros where they are not `real`."""
    low = tl.load(places[:, None] + one[None, :], mask=real[:, None], other=0.0)
    return low, tl.load(places[:, None] + other[None, :], mask=real[:, None], other=0.0)


@jit
def load_sink(
    heads: Value, row: Value, head: Value, column: Value, one: Value, other: Value, COUNT: constexpr, DIM: constexpr
) -> Value:
    """One of a row's first tokens, as two halves [1, DIM / 2] in float32; zeros past its end."""
    begin, length = row
    places = heads + (begin + column).to(tl.int64) * (COUNT * DIM) + head * DIM
    low = tl.load(places + one, mask=(one >= 0) & (column < length), other=0.0)
    high = tl.load(places + other, mask=(one >= 0) & (column < length), other=0.0)
    return low.to(tl.float32)[None, :], high.to(tl.float32)[None, :]


@jit
def outside(
    begin: Value, token: Value, real: Value, source: Value, strides: Value, columns: Value, PACKED: constexpr
) -> Value:
    """Offsets of a row's tokens in a batch with pads, [batch, heads, queries, dims] of any strides but the last."""
    if PACKED:
        where = tl.load(source + begin + token, mask=real, other=0)
    else:
        where = (begin + token).to(tl.int64)
    return where // columns * strides[0] + where % columns * strides[2]
