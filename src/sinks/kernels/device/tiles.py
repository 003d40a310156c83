"""What the kernels of this room share: the scores of a tile, and the running softmax that takes it in.

A softmax under way is (accumulated values, sum, largest score, sum of weight times score), all but the first one
number a query. Scores are products that are not scaled yet; `scale`, above zero, takes them to powers of two in the one
instruction that also subtracts the largest. Tiles may come in any order.
"""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def take_in(
    state: Value, scores: Value, values: Value, scale: Value, HIDDEN: constexpr, STATISTICS: constexpr,
) -> Value:  # fmt: skip
    """Fold a tile of `scores` [queries, keys] and its `values` [keys, dims] in; -inf hides a key, if HIDDEN says so."""
    gathered, total, largest, weighed = state
    now = tl.maximum(largest, tl.max(scores, 1))
    if HIDDEN:  # a query that has seen nothing yet: -inf minus -inf would be NaN
        level = tl.where(now == float("-inf"), 0.0, now) * scale
    else:
        level = now * scale
    shrink = tl.exp2(largest * scale - level)
    weights = tl.exp2(scores * scale - level[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if STATISTICS:
        # What is hidden has weight 0, and 0 times -inf would be NaN.
        finite = tl.maximum(scores, -1.0e30) if HIDDEN else scores
        weighed = weighed * shrink + tl.sum(weights * finite, 1)
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
def sink_tile(
    scores: Value, noted: Value, token: Value, real: Value, shape: Value, TILE: constexpr, AFTER: constexpr
) -> Value:
    """Load products of queries at positions `token` with the sinks; -inf where a sink is none of this tile's.

    AFTER leaves out what the window still covers, where sink and query stand at their true distance anyway.
    """
    sinks, window, _ = shape
    column = tl.arange(0, TILE)
    last = tl.where(real, token - window if AFTER else token, -1)
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
