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
from sinks.kernels.device.tiles import load_firsts, place_of, sink_tile, take_in, take_in_logit

QUERIES = 64
"""Queries of a tile: one warp group, and enough programs for a whole GPU."""

STRIPE = 8
"""Tiles that one program of the gradient goes through before it writes its sums."""


@jit
def _merge(
    sink_queries: Value, key_heads: Value, value_heads: Value, out: Value, log_sums: Value, logits: Value,
    begins: Value, shape: Value, tokens: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, QUERIES: constexpr,
    TILE: constexpr, LOGITS: constexpr,
) -> None:  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    first = tl.program_id(0) * QUERIES
    changed = first + QUERIES - 1 >= shape[1]  # before that the window covers every sink
    if LOGITS:
        changed = True
    if (first < length) & changed:
        token = first + tl.arange(0, QUERIES)
        place, real = place_of(begin, token, head, HEADS, DIM), token < length
        noted = log_sums + head.to(tl.int64) * tokens + begin + token
        largest = tl.load(noted, mask=real, other=0.0) * 1.4426950408889634 / shape[2]
        gathered = tl.load(out + place, mask=real[:, None], other=0.0).to(tl.float32)
        state = (gathered, tl.full([QUERIES], 1.0, tl.float32), largest, largest)
        if TILE > 0:
            turned = tl.load(sink_queries + place, mask=real[:, None], other=0.0)
            keys = load_firsts(key_heads, begin, head // GROUP, length, HEADS // GROUP, DIM, TILE)
            values = load_firsts(value_heads, begin, head // GROUP, length, HEADS // GROUP, DIM, TILE)
            scores = sink_tile(turned, keys, token, tl.arange(0, TILE), shape, True)
            state = take_in(state, scores, values, shape[2], True, False)
        if LOGITS:
            state = take_in_logit(state, tl.load(logits + head), shape[2], False)
        merged, total, largest, _ = state
        tl.store(out + place, (merged / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
        tl.store(noted, (largest * shape[2] + tl.log2(total)) * 0.6931471805599453, mask=real)


def merge_sinks(
    sink_query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
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
    _merge[(triton.cdiv(rows.longest, QUERIES), heads, rows.batch)](
        sink_query, key, value, out, log_sums, log_sums if logits is None else logits, rows.begins,
        (band.sinks, band.window, band.scale * LOG2E), tokens,
        HEADS=heads, GROUP=heads // key.shape[1], DIM=head_dim, QUERIES=QUERIES, TILE=band.tile,
        LOGITS=logits is not None, num_warps=4, num_stages=2,
    )  # fmt: skip


@jit
def _sink_gradient(
    sink_queries: Value, key_heads: Value, value_heads: Value, out: Value, given: Value, figures: Value, logits: Value,
    sums: Value, begins: Value, shape: Value, tokens: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr,
    QUERIES: constexpr, STRIPE: constexpr, TILE: constexpr, LOGITS: constexpr, AFTER: constexpr,
) -> None:  # fmt: skip
    """`figures`: log-sum-exp, and delta, written here; `sums`: gradients of sink queries, keys, values and logits."""
    head, row = tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    slot = (row * HEADS + head).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    logit_sum = tl.zeros([QUERIES], tl.float32)
    if TILE > 0:
        column, dims = tl.arange(0, TILE), tl.arange(0, DIM)
        keys = load_firsts(key_heads, begin, head // GROUP, length, HEADS // GROUP, DIM, TILE)
        values = load_firsts(value_heads, begin, head // GROUP, length, HEADS // GROUP, DIM, TILE)
        key_sum = tl.zeros([TILE, DIM], tl.float32)
        value_sum = tl.zeros([TILE, DIM], tl.float32)
    for step in range(STRIPE):
        token = (tl.program_id(0) * STRIPE + step) * QUERIES + tl.arange(0, QUERIES)
        place, real = place_of(begin, token, head, HEADS, DIM), token < length
        noted = head.to(tl.int64) * tokens + begin + token
        log_sum = tl.load(figures[0] + noted, mask=real, other=float("inf")) * 1.4426950408889634
        gradient = tl.load(given + place, mask=real[:, None], other=0.0)
        result = tl.load(out + place, mask=real[:, None], other=0.0)
        delta = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
        tl.store(figures[1] + noted, delta, mask=real)
        if LOGITS:
            logit_sum -= tl.exp2(tl.load(logits + head).to(tl.float32) * 1.4426950408889634 - log_sum) * delta
        if TILE > 0:
            turned = tl.load(sink_queries + place, mask=real[:, None], other=0.0)
            scores = sink_tile(turned, keys, token, column, shape, AFTER)
            weights = tl.exp2(scores * shape[2] - log_sum[:, None])
            value_sum = tl.dot(tl.trans(weights).to(gradient.dtype), gradient, value_sum)
            slopes = weights * (tl.dot(gradient, tl.trans(values)) - delta[:, None]) * shape[2] * 0.6931471805599453
            slopes = slopes.to(keys.dtype)
            key_sum = tl.dot(tl.trans(slopes), turned, key_sum)
            query_sum = tl.dot(slopes, keys)
            tl.store(sums[0] + place, query_sum.to(sums[0].dtype.element_ty), mask=real[:, None])
    if LOGITS:
        tl.store(sums[3] + slot, tl.sum(logit_sum, 0))
    if TILE > 0:
        places = (slot * TILE + column)[:, None] * DIM + dims[None, :]
        tl.store(sums[1] + places, key_sum)
        tl.store(sums[2] + places, value_sum)


@dataclass(frozen=True, eq=False)
class SinkGradients:
    """What the sinks' columns owe: `key` and `value` are [batch, sinks, kv_heads, head_dim] in float32.

    `delta` is the sum of result times gradient for each head and token, which the window's gradient needs too.
    """

    delta: Float[Tensor, "heads tokens"]
    query: Float[Tensor, "tokens heads head_dim"] | None
    key: Float[Tensor, "batch sinks kv_heads head_dim"] | None
    value: Float[Tensor, "batch sinks kv_heads head_dim"] | None
    logits: Float[Tensor, " heads"] | None


@dataclass(frozen=True, eq=False)
class Finished:
    """A forward pass as its gradient needs it: turned heads, sink logits, the result and its log-sum-exp."""

    query: Float[Tensor, "tokens heads head_dim"]
    sink_query: Float[Tensor, "tokens heads head_dim"]
    key: Float[Tensor, "tokens kv_heads head_dim"]
    value: Float[Tensor, "tokens kv_heads head_dim"]
    logits: Float[Tensor, " heads"] | None
    out: Float[Tensor, "tokens heads head_dim"]
    log_sums: Float[Tensor, "heads tokens"]


def sink_gradients(
    done: Finished, given: Float[Tensor, "tokens heads head_dim"], rows: Rows, band: Band, *, after: bool
) -> SinkGradients:
    """The gradient through the sinks' columns; `after`: without those that the window covers as well."""
    tokens, heads, head_dim = done.out.shape
    stripes, kv_heads = triton.cdiv(rows.longest, QUERIES * STRIPE), done.key.shape[1]
    delta = torch.empty_like(done.log_sums)
    query = torch.empty_like(done.query) if band.tile else None
    made = delta.new_empty(2, rows.batch, heads, stripes, band.tile, head_dim)
    logit_sums = delta.new_empty(rows.batch, heads, stripes)
    _sink_gradient[(stripes, heads, rows.batch)](
        done.sink_query, done.key, done.value, done.out, given, (done.log_sums, delta),
        delta if done.logits is None else done.logits,
        (delta if query is None else query, made[0], made[1], logit_sums), rows.begins,
        (band.sinks, band.window, band.scale * LOG2E), tokens,
        HEADS=heads, GROUP=heads // kv_heads, DIM=head_dim, QUERIES=QUERIES, STRIPE=STRIPE, TILE=band.tile,
        LOGITS=done.logits is not None, AFTER=after, num_warps=4, num_stages=2,
    )  # fmt: skip
    logits = None if done.logits is None else logit_sums.sum(dim=(0, 2))
    if query is None:
        return SinkGradients(delta, None, None, None, logits)
    sums = made[..., : band.sinks, :].unflatten(2, (kv_heads, -1)).sum(dim=(3, 4)).transpose(2, 3)
    return SinkGradients(delta, query, sums[0], sums[1], logits)
