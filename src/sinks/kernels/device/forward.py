"""Sinks and window in one pass, in Triton: the forward kernel and its launch."""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.language import LOG2E, Value, constexpr, describe, jit, tl, triton
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.tiles import load_firsts, place_of, sink_tile, take_in, take_in_logit


@dataclass(frozen=True)
class Band:
    """Who sees whom and how scores are scaled: `sinks` first keys, `window` last ones, the query's own included."""

    sinks: int
    window: int
    scale: float

    @property
    def tile(self) -> int:
        """Sinks of one tile: what a matrix instruction takes at least, 0 where there are none."""
        return next(size for size in (0, 16, 32, 64) if size >= self.sinks)


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut: queries and keys of a tile, warps of a program, tiles loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


# Measured on an H200 at 16k and 65k tokens, with 4 or 8 warps and 2 to 4 stages.
SHAPES = {64: Shape(64, 64, 4, 3), 128: Shape(64, 64, 4, 3)}


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the weights of each query look like, float32 [batch, heads, queries]; 0 at a pad.

    `mass` is the weight on the first keys that were asked for. `entropy` is in nats, a sink logit's share being one
    more outcome. `maximum` is the largest weight of a key. `log_sum_exp` is of the denominator, sink logit included.
    """

    mass: Float[Tensor, "*places"]
    entropy: Float[Tensor, "*places"]
    maximum: Float[Tensor, "*places"]
    log_sum_exp: Float[Tensor, "*places"]


@jit
def _walk(
    state: Value, tensors: Value, where: Value, bounds: Value, shape: Value, KEYS: constexpr,
    HIDDEN: constexpr, STATISTICS: constexpr,
) -> Value:  # fmt: skip
    """Take in the keys from bounds[0] up to bounds[1]; HIDDEN: not every query sees each of them."""
    query, key_heads, value_heads = tensors
    begin, offset, token = where
    sinks, window, scale = shape
    for start in tl.range(bounds[0], bounds[1], KEYS):
        keys = key_heads.load([begin + start, offset])
        scores = tl.dot(query, tl.trans(keys))
        if HIDDEN:
            column = start + tl.arange(0, KEYS)
            distance = token[:, None] - column[None, :]
            seen = (distance >= 0) & (distance < window) & (column >= sinks)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        values = value_heads.load([begin + start, offset])
        state = take_in(state, scores, values, scale, HIDDEN, STATISTICS)
    return state


@jit
def spans(first: Value, length: Value, shape: Value, QUERIES: constexpr, KEYS: constexpr) -> Value:
    """Bounds of a query tile's window: partly hidden up to the second, whole up to the third, partly to the last."""
    sinks, window, _ = shape
    last = first + QUERIES - 1
    low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    high = (tl.minimum(last + 1, length) + KEYS - 1) // KEYS * KEYS
    whole = (tl.maximum(last - window + 1, sinks) + KEYS - 1) // KEYS * KEYS
    whole = tl.minimum(tl.maximum(whole, low), high)
    return low, whole, tl.maximum((first + 1) // KEYS * KEYS, whole), high


@jit
def _forward(
    queries: Value, key_heads: Value, value_heads: Value, sink_scores: Value, sink_values: Value, out: Value,
    figures: Value, logits: Value, begins: Value, shape: Value, sizes: Value, HEADS: constexpr, GROUP: constexpr,
    DIM: constexpr, QUERIES: constexpr, KEYS: constexpr, TILE: constexpr, LOGITS: constexpr, STATISTICS: constexpr,
) -> None:  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    first = tl.program_id(0) * QUERIES
    if first < length:
        kv_head = head // GROUP
        token = first + tl.arange(0, QUERIES)
        zeros = tl.zeros([QUERIES], tl.float32)
        state = (tl.zeros([QUERIES, DIM], tl.float32), zeros, zeros - float("inf"), zeros)
        query = queries.load([begin + first, head * DIM])
        where = (begin, kv_head * DIM, token)
        low, whole, partly, high = spans(first, length, shape, QUERIES, KEYS)
        heads = (query, key_heads, value_heads)
        state = _walk(state, heads, where, (low, whole), shape, KEYS, True, STATISTICS)
        state = _walk(state, heads, where, (whole, partly), shape, KEYS, False, STATISTICS)
        state = _walk(state, heads, where, (partly, high), shape, KEYS, True, STATISTICS)
        place, real = place_of(begin, token, head, HEADS, DIM), token < length
        noted, mass = head.to(tl.int64) * sizes[0] + begin + token, zeros
        if TILE > 0:
            column = tl.arange(0, TILE)
            values = load_firsts(sink_values, begin, kv_head, length, HEADS // GROUP, DIM, TILE)
            scores = sink_tile(sink_scores, noted, token, real, shape, TILE, False)
            state = take_in(state, scores, values, shape[2], True, STATISTICS)
        gathered, total, largest, weighed = state
        # Past the end of a row nothing was seen and nothing is stored; it need not be NaN in between.
        state = (gathered, tl.where(real, total, 1.0), tl.where(real, largest, 0.0), weighed)
        if TILE > 0:
            if STATISTICS:
                counted = tl.where((column < sizes[1])[None, :], scores, float("-inf"))
                mass = tl.sum(tl.exp2((counted - state[2][:, None]) * shape[2]), 1)
        peak = state[2] * shape[2]
        if LOGITS:
            state = take_in_logit(state, tl.load(logits + head), shape[2], STATISTICS)
        gathered, total, largest, weighed = state
        tl.store(out + place, (gathered / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
        _note(figures, noted, real, sizes[0], state, (mass, peak, shape[2]), HEADS, STATISTICS)


@jit
def _note(
    figures: Value, place: Value, real: Value, tokens: Value, state: Value, more: Value, HEADS: constexpr,
    STATISTICS: constexpr,
) -> None:  # fmt: skip
    """Write log-sum-exp and, if asked for, mass, entropy and maximum, each [heads, tokens], one after another."""
    _, total, largest, weighed = state
    mass, peak, scale = more
    log_sum = largest * scale + tl.log2(total)
    tl.store(figures + place, log_sum * 0.6931471805599453, mask=real)
    if STATISTICS:
        step = tl.cast(tokens, tl.int64) * HEADS  # one token alone is a constant
        tl.store(figures + step + place, mass * tl.exp2(peak - log_sum), mask=real)
        entropy = tl.maximum(log_sum - weighed / total * scale, 0.0) * 0.6931471805599453
        tl.store(figures + 2 * step + place, entropy, mask=real)
        tl.store(figures + 3 * step + place, tl.exp2(peak - log_sum), mask=real)


def forward(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    value: Float[Tensor, "tokens kv_heads head_dim"],
    scores: Float[Tensor, "heads tokens sinks"] | None,
    logits: Float[Tensor, " heads"] | None,
    rows: Rows,
    band: Band,
    first_keys: int | None = None,
) -> tuple[Float[Tensor, "tokens heads head_dim"], Float[Tensor, "figures heads tokens"]]:
    """Attention of turned heads, `scores` being `Turned.scores`, and its log-sum-exp.

    With `first_keys`, also their mass, entropy and maximum.
    """
    tokens, heads, head_dim = query.shape
    cut = SHAPES[head_dim]
    out, wanted = torch.empty_like(query), 1 if first_keys is None else 4
    figures = torch.empty(wanted, heads, tokens, dtype=torch.float32, device=query.device)
    _forward[(triton.cdiv(rows.longest, cut.queries), heads, rows.batch)](
        describe(query, cut.queries), describe(key, cut.keys), describe(value, cut.keys),
        figures if scores is None else scores, value, out, figures, figures if logits is None else logits, rows.begins,
        (band.sinks, band.window, band.scale * LOG2E), (tokens, first_keys or 0),
        HEADS=heads, GROUP=heads // key.shape[1], DIM=head_dim, QUERIES=cut.queries, KEYS=cut.keys,
        TILE=band.tile, LOGITS=logits is not None, STATISTICS=first_keys is not None,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out, figures
