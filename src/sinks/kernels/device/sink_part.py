"""The few sink columns by themselves: merged into a finished window by log-sum-exp, and their share of the gradient.

Every query sees every sink, so a kernel cut by keys would leave one program with all of the work. Here programs are
cut by queries; each sums what it owes to the sinks' keys and values, and those sums are added in a fixed order.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.forward import Band
from sinks.kernels.device.language import LOG2E, Value, constexpr, jit, tl, triton
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.tiles import angles, load_firsts, load_pairs, outside, pairs_of, place_of, sink_tile
from sinks.kernels.device.turn import numbers, spell
from sinks.kernels.phase import Rotary

MERGED = 32
"""Queries of one program that merges."""

QUERIES, WARPS, STAGES, REGISTERS = 32, 4, 2, 128
"""Queries of a tile of the gradient, warps that share it, tiles loaded ahead, registers of a thread.

Bound by memory: with half the registers that the compiler would take, twice the programs load at a time.
"""

STRIPE = 16
"""Tiles that one program of the gradient goes through before it writes its sums."""

CHUNK = 32
"""Sums that are added at a time."""


@jit
def _merge(
    scores: Value, value_heads: Value, out: Value, log_sums: Value, logits: Value, begins: Value, shape: Value,
    tokens: Value, behind: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, QUERIES: constexpr,
    SINKS: constexpr, LOGITS: constexpr,
) -> None:  # fmt: skip
    # The heads that the window's kernel wrote last are still in the cache: they come first.
    head, row = behind - 1 - tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    first = tl.program_id(0) * QUERIES
    changed = first + QUERIES - 1 >= shape[0]  # before that the window covers every sink
    if LOGITS:
        changed = True
    if (first < length) & changed:
        token, dims = first + tl.arange(0, QUERIES), tl.arange(0, DIM)
        place, real = place_of(begin, token, head, HEADS, DIM), token < length
        gathered = tl.load(out + place, mask=real[:, None], other=0.0).to(tl.float32)
        noted = head.to(tl.int64) * tokens + begin + token
        own = tl.load(log_sums + noted, mask=real, other=0.0) * 1.4426950408889634
        level = own
        if LOGITS:
            logit = tl.load(logits + head).to(tl.float32) * 1.4426950408889634
            level = tl.maximum(level, logit)
        for column in tl.range(0, SINKS, loop_unroll_factor=4):
            level = tl.maximum(level, _score(scores, noted, token, real, column, shape, SINKS))
        total = tl.exp2(own - level)
        gathered *= total[:, None]
        if LOGITS:
            total += tl.exp2(logit - level)
        for column in tl.range(0, SINKS, loop_unroll_factor=4):
            weight = tl.exp2(_score(scores, noted, token, real, column, shape, SINKS) - level)
            at = (begin + column).to(tl.int64) * (HEADS // GROUP * DIM) + head // GROUP * DIM
            value = tl.load(value_heads + at + dims, mask=(dims < DIM) & (column < length), other=0.0)
            total += weight
            gathered += weight[:, None] * value.to(tl.float32)[None, :]
        tl.store(out + place, (gathered / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
        tl.store(log_sums + noted, (level + tl.log2(total)) * 0.6931471805599453, mask=real)


@jit
def _score(
    scores: Value, noted: Value, token: Value, real: Value, column: Value, shape: Value, SINKS: constexpr
) -> Value:
    """Scores of one sink in powers of two; -inf where the window covers it."""
    seen = real & (token - shape[0] >= column)
    return tl.load(scores + noted * SINKS + column, mask=seen, other=float("-inf")) * shape[1]


def merge_sinks(
    scores: Float[Tensor, "heads tokens sinks"] | None,
    value: Float[Tensor, "tokens kv_heads head_dim"],
    logits: Float[Tensor, " heads"] | None,
    window: tuple[Float[Tensor, "tokens heads head_dim"], Float[Tensor, "heads tokens"]],
    rows: Rows,
    band: Band,
) -> None:
    """Take sinks and sink logits into `window`, the result and log-sum-exp of the window alone, in place."""
    if not band.sinks and logits is None:
        return
    out, log_sums = window
    tokens, heads, head_dim = out.shape
    _merge[(triton.cdiv(rows.longest, MERGED), heads, rows.batch)](
        log_sums if scores is None else scores, value, out, log_sums, log_sums if logits is None else logits,
        rows.begins, (band.window, band.scale * LOG2E), tokens, heads,
        HEADS=heads, GROUP=heads // value.shape[1], DIM=head_dim, QUERIES=MERGED, SINKS=band.sinks,
        LOGITS=logits is not None, num_warps=4,
    )  # fmt: skip


@jit
def _sink_gradient(
    queries: Value, scores: Value, value_heads: Value, out: Value, given: Value, figures: Value, logits: Value,
    sums: Value, begins: Value, source: Value, strides: Value, shape: Value, sizes: Value, HEADS: constexpr,
    GROUP: constexpr, DIM: constexpr, QUERIES: constexpr, STRIPE: constexpr, TILE: constexpr, LOGITS: constexpr,
    PACKED: constexpr,
) -> None:  # fmt: skip
    """`figures`: log-sum-exp, and delta and slopes of scores, written here; `sums`: of keys, values and logits.

    Keys' sums are of queries that are not turned and see a full cache, which are all but a few: `_settle` does the
    rest.
    """
    head, row = tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    slot = (row * HEADS + head).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    logit_sum = tl.zeros([QUERIES], tl.float32)
    dims = tl.arange(0, DIM)
    if TILE > 0:
        column = tl.arange(0, TILE)
        values = load_firsts(value_heads, begin, head // GROUP, length, HEADS // GROUP, DIM, TILE)
        key_sum = tl.zeros([DIM, TILE], tl.float32)  # the long side first: only that one suits a matrix instruction
        value_sum = tl.zeros([DIM, TILE], tl.float32)
    for step in range(STRIPE):
        token = (tl.program_id(0) * STRIPE + step) * QUERIES + tl.arange(0, QUERIES)
        place, real = place_of(begin, token, head, HEADS, DIM), token < length
        noted = head.to(tl.int64) * sizes[0] + begin + token
        gradient = tl.load(given + place, mask=real[:, None], other=0.0)
        result = tl.load(out + place, mask=real[:, None], other=0.0)
        if TILE > 0:
            away = queries + outside(begin, token, real, source, strides, sizes[1], PACKED) + head * strides[1]
            query = tl.load(away[:, None] + dims[None, :], mask=real[:, None], other=0.0)
            found = sink_tile(scores, noted, token, real, shape, TILE)
        log_sum = tl.load(figures[0] + noted, mask=real, other=float("inf")) * 1.4426950408889634
        delta = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
        tl.store(figures[1] + noted, delta, mask=real)
        if LOGITS:
            logit_sum -= tl.exp2(tl.load(logits + head).to(tl.float32) * 1.4426950408889634 - log_sum) * delta
        if TILE > 0:
            weights = tl.exp2(found * shape[2] - log_sum[:, None])
            value_sum = tl.dot(tl.trans(gradient), weights.to(gradient.dtype), value_sum)
            slopes = weights * (tl.dot(gradient, tl.trans(values)) - delta[:, None]) * shape[2] * 0.6931471805599453
            into = figures[2] + (noted * shape[0])[:, None] + column[None, :]
            tl.store(into, slopes, mask=real[:, None] & (column < shape[0])[None, :])
            slopes = tl.where((token >= shape[0] + shape[1] - 1)[:, None], slopes, 0.0)
            key_sum = tl.dot(tl.trans(query), slopes.to(query.dtype), key_sum)
    if LOGITS:
        tl.store(sums[2] + slot, tl.sum(logit_sum, 0))
    if TILE > 0:
        places, wanted = (slot * TILE + column)[None, :] * DIM + dims[:, None], (column < shape[0])[None, :]
        tl.store(sums[0] + places, key_sum, mask=wanted)
        tl.store(sums[1] + places, value_sum, mask=wanted)


@dataclass(frozen=True, eq=False)
class Finished:
    """A forward pass as its gradient needs it: heads, what became of them, the result and its log-sum-exp.

    `raw` is the query as it was given, not turned; `query` and `key` are turned.
    """

    raw: Float[Tensor, "batch heads queries head_dim"]
    query: Float[Tensor, "tokens heads head_dim"]
    key: Float[Tensor, "tokens kv_heads head_dim"]
    value: Float[Tensor, "tokens kv_heads head_dim"]
    scores: Float[Tensor, "heads tokens sinks"] | None
    logits: Float[Tensor, " heads"] | None
    out: Float[Tensor, "tokens heads head_dim"]
    log_sums: Float[Tensor, "heads tokens"]


@dataclass(frozen=True, eq=False)
class SinkGradients:
    """What the sinks' columns owe: `sums` holds the part of each stripe of queries, to keys and to values.

    `slopes` is the gradient of `Turned.scores`. `delta` is the sum of result times gradient for each head and token,
    which the window's gradient needs too.
    """

    delta: Float[Tensor, "heads tokens"]
    slopes: Float[Tensor, "heads tokens sinks"] | None
    sums: Float[Tensor, "2 batch heads stripes tile head_dim"]
    logits: Float[Tensor, " heads"] | None


def sink_gradients(
    done: Finished, given: Float[Tensor, "tokens heads head_dim"], rows: Rows, band: Band
) -> SinkGradients:
    """The gradient through the sinks' columns, without those that the window covers as well."""
    tokens, heads, head_dim = done.out.shape
    stripes = triton.cdiv(rows.longest, QUERIES * STRIPE)
    delta = torch.empty_like(done.log_sums)
    slopes = None if done.scores is None else torch.empty_like(done.scores)
    sums = delta.new_empty(2, rows.batch, heads, stripes, band.tile, head_dim)
    logit_sums = delta.new_empty(rows.batch, heads, stripes)
    _sink_gradient[(stripes, heads, rows.batch)](
        done.raw, delta if done.scores is None else done.scores, done.value, done.out, given,
        (done.log_sums, delta, delta if slopes is None else slopes), delta if done.logits is None else done.logits,
        (sums[0], sums[1], logit_sums), rows.begins, rows.begins if rows.source is None else rows.source,
        tuple(done.raw.stride()[:3]), (band.sinks, band.window, band.scale * LOG2E), (tokens, rows.columns),
        HEADS=heads, GROUP=heads // done.key.shape[1], DIM=head_dim, QUERIES=QUERIES, STRIPE=STRIPE, TILE=band.tile,
        LOGITS=done.logits is not None, PACKED=rows.source is not None, num_warps=WARPS, num_stages=STAGES,
        maxnreg=REGISTERS if band.tile <= 16 else None,  # a larger tile would spill
    )  # fmt: skip
    return SinkGradients(delta, slopes, sums, None if done.logits is None else logit_sums.sum(dim=(0, 2)))


@jit
def _settle(
    sums: Value, queries: Value, slopes: Value, key: Value, value: Value, begins: Value, source: Value, steps: Value,
    strides: Value, shape: Value, sizes: Value, rotary: Value, KV: constexpr, GROUP: constexpr, DIM: constexpr,
    TILE: constexpr, CHUNK: constexpr, TURNED: constexpr, INTERLEAVED: constexpr, WHOLE: constexpr, PACKED: constexpr,
) -> None:  # fmt: skip
    column, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    if column < length:
        count, tokens, columns = sizes
        dims = tl.arange(0, DIM)
        one, other = pairs_of(rotary, DIM, INTERLEAVED, WHOLE)
        low, high = tl.zeros([CHUNK, DIM // 2], tl.float32), tl.zeros([CHUNK, DIM // 2], tl.float32)
        due = tl.zeros([CHUNK, DIM], tl.float32)
        for start in range(0, count, CHUNK):
            part = start + tl.arange(0, CHUNK)
            places = (((row * KV + kv_head).to(tl.int64) * count + part) * TILE + column) * DIM
            a, b = load_pairs(sums[0] + places, one, other, part < count)
            low, high = low + a, high + b
            due += tl.load(sums[1] + places[:, None] + dims[None, :], mask=(part < count)[:, None], other=0.0)
        low, high = tl.sum(low, 0)[None, :], tl.sum(high, 0)[None, :]
        # The queries between a sink's leaving the window and a full cache, each by an angle of its own.
        steady = shape[0] + shape[1] - 1
        token = shape[1] + tl.arange(0, TILE)
        real = (token < length) & (token < steady)
        away = queries + outside(begin, token, real, source, strides, columns, PACKED)
        if TURNED:
            cos, sin = angles(tl.full([1], steady, tl.int32), steps, rotary, DIM)
            low, high = low * cos - high * sin, high * cos + low * sin
            cos, sin = angles(token, steps, rotary, DIM)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            a, b = load_pairs(away + head * strides[1], one, other, real)
            a, b = a.to(tl.float32), b.to(tl.float32)
            if TURNED:
                a, b = a * cos - b * sin, b * cos + a * sin
            noted = (head.to(tl.int64) * tokens + begin + token) * shape[0] + column
            slope = tl.load(slopes + noted, mask=real, other=0.0)[:, None]
            low, high = low + tl.sum(slope * a, 0)[None, :], high + tl.sum(slope * b, 0)[None, :]
        place = (begin + column).to(tl.int64) * (KV * DIM) + kv_head * DIM
        _add(key + place + one[None, :], low)
        _add(key + place + other[None, :], high)
        _add(value + place + dims[None, :], tl.sum(due, 0)[None, :])


@jit
def _add(places: Value, made: Value) -> None:
    there = tl.load(places)
    tl.store(places, (there.to(tl.float32) + made).to(there.dtype))


def settle(
    done: Finished,
    part: SinkGradients,
    key: Float[Tensor, "tokens kv_heads head_dim"],
    value: Float[Tensor, "tokens kv_heads head_dim"],
    rows: Rows,
    band: Band,
    rotary: Rotary | None,
) -> None:
    """Add what the sinks' columns owe to the gradients of turned keys and of values, in place."""
    if part.slopes is None:
        return
    _, batch, heads, stripes, tile, head_dim = part.sums.shape
    kv_heads, (steps, pairs) = key.shape[1], numbers(rotary, rows)
    _settle[(band.sinks, kv_heads, batch)](
        (part.sums[0], part.sums[1]), done.raw, part.slopes, key, value, rows.begins,
        rows.begins if rows.source is None else rows.source, steps, tuple(done.raw.stride()[:3]),
        (band.sinks, band.window), (heads // kv_heads * stripes, key.shape[0], rows.columns), pairs,
        KV=kv_heads, GROUP=heads // kv_heads, DIM=head_dim, TILE=tile, CHUNK=CHUNK, PACKED=rows.source is not None,
        TURNED=rotary is not None,
        num_warps=4, **spell(rotary, head_dim),
    )  # fmt: skip
