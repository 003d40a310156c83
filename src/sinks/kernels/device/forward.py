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
from sinks.kernels.device.tiles import extent, hide, load_firsts, place_of, take_in, take_in_logit


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
    """How a kernel is cut: queries and keys of a tile, warps of a program, tiles loaded ahead.

    `registers` of a thread at most; None: as many as the compiler likes.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# Measured on an H200 at 16k and 65k tokens, one and two heads at once, with 4 or 8 warps and 2 to 4 stages.
SHAPES = {64: Shape(64, 64, 4, 2), 128: Shape(64, 64, 4, 2)}
MEMBERS = {64: 1, 128: 2}
"""Query heads of one key head that a program takes at once, where a group can be cut so.

More than 16 sinks would not fit beside two heads in the registers, nor two programs in the shared memory.
"""


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
def walk(
    states: Value, tensors: Value, where: Value, bounds: Value, shape: Value, KEYS: constexpr, EDGES: constexpr,
    STATISTICS: constexpr,
) -> Value:  # fmt: skip
    """Take in the keys of `bounds`, which are `spans`; unless EDGES, every query sees all of them.

    `states` and `tensors[0]` are of one query head or of several that share their keys: those are loaded once, and one
    head's products run while another's weights are made. One loop: across the seams of three nothing would be on its
    way.
    """
    queries, key_heads, value_heads = tensors
    begin, offset, token = where
    low, whole, partly, high = bounds
    for start in tl.range(low, high, KEYS):
        keys = key_heads.load([begin + start, offset])
        scores = ()
        for member in tl.static_range(len(queries)):
            scores = scores + (tl.dot(queries[member], tl.trans(keys)),)
        if EDGES:
            if (start < whole) | (start >= partly):
                scores = _hide_far(scores, token, start, shape[1], KEYS)
        values = value_heads.load([begin + start, offset])
        folded = ()
        for member in tl.static_range(len(queries)):
            folded = folded + (take_in(states[member], scores[member], values, shape[2], STATISTICS),)
        states = folded
    return states


@jit
def _hide_far(scores: Value, token: Value, start: Value, window: Value, KEYS: constexpr) -> Value:
    """Scores of the keys from `start` on where they are in the window of a query."""
    distance = token[:, None] - (start + tl.arange(0, KEYS))[None, :]
    # A distance below zero is a very large one without a sign.
    seen = distance.to(tl.uint32, bitcast=True) < tl.cast(window, tl.uint32)
    shown = ()
    for member in tl.static_range(len(scores)):
        shown = shown + (hide(scores[member], seen),)
    return shown


@jit
def spans(first: Value, length: Value, window: Value, QUERIES: constexpr, KEYS: constexpr) -> Value:
    """Bounds of a query tile's window: partly hidden up to the second, whole up to the third, partly to the last."""
    last = first + QUERIES - 1
    low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    high = (tl.minimum(last + 1, length) + KEYS - 1) // KEYS * KEYS
    whole = (tl.maximum(last - window + 1, 0) + KEYS - 1) // KEYS * KEYS
    whole = tl.minimum(tl.maximum(whole, low), high)
    return low, whole, tl.maximum((first + 1) // KEYS * KEYS, whole), high


@jit
def _meet(
    query: Value, firsts: Value, where: Value, noted: Value, sinks: Value, HEADS: constexpr, GROUP: constexpr,
    DIM: constexpr, TILE: constexpr, ASK: constexpr,
) -> Value:  # fmt: skip
    """Scores of a tile of queries against their row's sinks, hidden where there is none."""
    begin, length, kv_head, token = where
    column = tl.arange(0, TILE)
    seen = (token < length)[:, None] & (column < sinks)[None, :] & (column[None, :] <= token[:, None])
    if ASK:
        keys = load_firsts(firsts[0], begin, kv_head, length, HEADS // GROUP, DIM, TILE)
        scores = tl.dot(query, tl.trans(keys))
    else:
        scores = tl.load(firsts[2] + (noted * sinks)[:, None] + column[None, :], mask=seen, other=0.0)
    return hide(scores, seen)


@jit
def _forward(
    queries: Value, key_heads: Value, value_heads: Value, firsts: Value, out: Value, figures: Value, logits: Value,
    begins: Value, shape: Value, sizes: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, MEMBERS: constexpr,
    QUERIES: constexpr, KEYS: constexpr, TILE: constexpr, ASK: constexpr, LOGITS: constexpr, STATISTICS: constexpr,
    PACKED: constexpr,
) -> None:  # fmt: skip
    """`firsts`: heads of keys and values, whose first tokens are the sinks, and scores against them unless ASK."""
    foremost, row = tl.program_id(1) * MEMBERS, tl.program_id(2)
    begin, length = extent(begins, row, sizes[1], PACKED)
    first = tl.program_id(0) * QUERIES
    if first < length:
        kv_head, token = foremost // GROUP, first + tl.arange(0, QUERIES)
        noted, where = foremost.to(tl.int64) * sizes[0] + begin + token, (begin, length, kv_head, token)
        zeros, asking, states = tl.zeros([QUERIES], tl.float32), (), ()
        for member in tl.static_range(MEMBERS):
            asking = asking + (queries.load([begin + first, (foremost + member) * DIM]),)
        if TILE > 0:
            column = tl.arange(0, TILE)
            values = load_firsts(firsts[1], begin, kv_head, length, HEADS // GROUP, DIM, TILE)
        for member in tl.static_range(MEMBERS):
            state = (tl.zeros([QUERIES, DIM], tl.float32), zeros, zeros - float("inf"), zeros)
            if TILE > 0:
                there = noted + member * sizes[0]
                scores = _meet(asking[member], firsts, where, there, shape[0], HEADS, GROUP, DIM, TILE, ASK)
                # One that the window still covers is met there, at the same distance.
                scores = hide(scores, column[None, :] <= (token - shape[1])[:, None])
                state = take_in(state, scores, values, shape[2], STATISTICS)
            states = states + (state,)
        heads, bounds = (asking, key_heads, value_heads), spans(first, length, shape[1], QUERIES, KEYS)
        states = walk(states, heads, (begin, kv_head * DIM, token), bounds, shape, KEYS, True, STATISTICS)
        for member in tl.static_range(MEMBERS):
            state, mass, there = states[member], zeros, noted + member * sizes[0]
            if STATISTICS and TILE > 0:
                scores = _meet(asking[member], firsts, where, there, shape[0], HEADS, GROUP, DIM, TILE, ASK)
                counted = hide(scores, (column < sizes[2])[None, :])
                mass = tl.sum(tl.exp2((counted - state[2][:, None]) * shape[2]), 1)
            peak = state[2] * shape[2]
            if LOGITS:
                state = take_in_logit(state, tl.load(logits + foremost + member), shape[2], STATISTICS)
            place, real = place_of(begin, token, foremost + member, HEADS, DIM), token < length
            tl.store(out + place, (state[0] / state[1][:, None]).to(out.dtype.element_ty), mask=real[:, None])
            _note(figures, there, real, sizes[0], state, (mass, peak, shape[2]), HEADS, STATISTICS)


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

    Without `scores` the queries are asked themselves: where nothing is turned they stand at every distance alike. With
    `first_keys`, also their mass, entropy and maximum.
    """
    tokens, heads, head_dim = query.shape
    cut, group = SHAPES[head_dim], heads // key.shape[1]
    members = MEMBERS[head_dim] if band.tile <= 16 and group % MEMBERS[head_dim] == 0 else 1
    out, wanted = torch.empty_like(query), 1 if first_keys is None else 4
    figures = torch.empty(wanted, heads, tokens, dtype=torch.float32, device=query.device)
    _forward[(triton.cdiv(rows.longest, cut.queries), heads // members, rows.batch)](
        describe(query, cut.queries), describe(key, cut.keys), describe(value, cut.keys),
        (key, value, figures if scores is None else scores), out, figures, figures if logits is None else logits,
        rows.begins, (band.sinks, band.window, band.scale * LOG2E), (tokens, rows.columns, first_keys or 0),
        HEADS=heads, GROUP=group, DIM=head_dim, MEMBERS=members, QUERIES=cut.queries, KEYS=cut.keys,
        TILE=band.tile, ASK=scores is None, LOGITS=logits is not None, STATISTICS=first_keys is not None,
        PACKED=rows.source is not None,
        num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
    )  # fmt: skip
    return out, figures
