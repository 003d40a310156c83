"""The window's gradient in Triton: one kernel cut by keys, one by queries, so that every sum has one owner."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.forward import Band, Shape, spans
from sinks.kernels.device.language import LOG2E, Value, constexpr, describe, jit, tl, triton
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.sink_part import Finished
from sinks.kernels.device.tiles import place_of

KEY_SHAPES = {64: Shape(128, 64, 4, 2), 128: Shape(64, 64, 4, 2)}
QUERY_SHAPES = {64: Shape(64, 64, 4, 2), 128: Shape(64, 64, 4, 2)}


@jit
def _collect(
    sums: Value, tile: Value, tensors: Value, where: Value, bounds: Value, shape: Value, QUERIES: constexpr,
    HIDDEN: constexpr,
) -> Value:  # fmt: skip
    """Add what the queries from bounds[0] up to bounds[1] owe to a tile of keys and values."""
    key_sum, value_sum = sums
    keys, values = tile
    queries, gradients, log_sums, deltas = tensors
    begin, offset, noted, column, length = where
    sinks, window, scale = shape
    for start in tl.range(bounds[0], bounds[1], QUERIES):
        token = start + tl.arange(0, QUERIES)
        query = queries.load([begin + start, offset])
        # Past the end of a row stand the tokens of the next: with an infinite sum they weigh nothing.
        log_sum = tl.load(log_sums + noted + token, mask=token < length, other=float("inf")) * 1.4426950408889634
        scores = tl.dot(keys, tl.trans(query)) * scale - log_sum[None, :]
        if HIDDEN:
            distance = token[None, :] - column[:, None]
            seen = (distance >= 0) & (distance < window) & (column >= sinks)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores)
        gradient = gradients.load([begin + start, offset])
        value_sum = tl.dot(weights.to(gradient.dtype), gradient, value_sum)
        delta = tl.load(deltas + noted + token, mask=token < length, other=0.0)
        slopes = weights * (tl.dot(values, tl.trans(gradient)) - delta[None, :])
        key_sum = tl.dot(slopes.to(query.dtype), query, key_sum)
    return key_sum, value_sum


@jit
def _key_gradient(
    queries: Value, key_heads: Value, value_heads: Value, gradients: Value, figures: Value, sums: Value, begins: Value,
    shape: Value, tokens: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, QUERIES: constexpr,
    KEYS: constexpr,
) -> None:  # fmt: skip
    kv_head, row = tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    first = tl.program_id(0) * KEYS
    if first < length:
        column = first + tl.arange(0, KEYS)
        tile = (key_heads.load([begin + first, kv_head * DIM]), value_heads.load([begin + first, kv_head * DIM]))
        last, window = first + KEYS - 1, shape[1]
        low = first // QUERIES * QUERIES
        high = (tl.minimum(last + window, length) + QUERIES - 1) // QUERIES * QUERIES
        whole = tl.where(first >= shape[0], (last + QUERIES - 1) // QUERIES * QUERIES, high)
        whole = tl.minimum(whole, high)
        partly = tl.maximum((first + window) // QUERIES * QUERIES, whole)
        partly = tl.minimum(partly, high)
        state = (tl.zeros([KEYS, DIM], tl.float32), tl.zeros([KEYS, DIM], tl.float32))
        for member in range(GROUP):
            head = kv_head * GROUP + member
            where = (begin, head * DIM, head.to(tl.int64) * tokens + begin, column, length)
            heads = (queries, gradients, figures[0], figures[1])
            state = _collect(state, tile, heads, where, (low, whole), shape, QUERIES, True)
            state = _collect(state, tile, heads, where, (whole, partly), shape, QUERIES, False)
            state = _collect(state, tile, heads, where, (partly, high), shape, QUERIES, True)
        key_sum, value_sum = state
        place, real = place_of(begin, column, kv_head, HEADS // GROUP, DIM), (column < length)[:, None]
        key_sum = key_sum * (shape[2] * 0.6931471805599453)
        tl.store(sums[0] + place, key_sum.to(sums[0].dtype.element_ty), mask=real)
        tl.store(sums[1] + place, value_sum.to(sums[1].dtype.element_ty), mask=real)


@jit
def _return(
    query_sum: Value, tile: Value, tensors: Value, where: Value, bounds: Value, shape: Value, KEYS: constexpr,
    HIDDEN: constexpr,
) -> Value:  # fmt: skip
    """Add what a tile of queries owes to the keys from bounds[0] up to bounds[1]."""
    query, gradient, log_sum, delta = tile
    key_heads, value_heads = tensors
    begin, offset, token = where
    sinks, window, scale = shape
    for start in tl.range(bounds[0], bounds[1], KEYS):
        keys = key_heads.load([begin + start, offset])
        scores = tl.dot(query, tl.trans(keys)) * scale - log_sum[:, None]
        if HIDDEN:
            column = start + tl.arange(0, KEYS)
            distance = token[:, None] - column[None, :]
            seen = (distance >= 0) & (distance < window) & (column >= sinks)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores)
        values = value_heads.load([begin + start, offset])
        slopes = weights * (tl.dot(gradient, tl.trans(values)) - delta[:, None])
        query_sum = tl.dot(slopes.to(keys.dtype), keys, query_sum)
    return query_sum


@jit
def _query_gradient(
    queries: Value, key_heads: Value, value_heads: Value, gradients: Value, figures: Value, sums: Value, begins: Value,
    shape: Value, tokens: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, QUERIES: constexpr,
    KEYS: constexpr,
) -> None:  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    first = tl.program_id(0) * QUERIES
    if first < length:
        token = first + tl.arange(0, QUERIES)
        noted, real = head.to(tl.int64) * tokens + begin + token, token < length
        log_sum = tl.load(figures[0] + noted, mask=real, other=float("inf")) * 1.4426950408889634
        delta = tl.load(figures[1] + noted, mask=real, other=0.0)
        tile = (queries.load([begin + first, head * DIM]), gradients.load([begin + first, head * DIM]), log_sum, delta)
        low, whole, partly, high = spans(first, length, shape[1], QUERIES, KEYS)
        where, heads = (begin, head // GROUP * DIM, token), (key_heads, value_heads)
        query_sum = tl.zeros([QUERIES, DIM], tl.float32)
        query_sum = _return(query_sum, tile, heads, where, (low, whole), shape, KEYS, True)
        query_sum = _return(query_sum, tile, heads, where, (whole, partly), shape, KEYS, False)
        query_sum = _return(query_sum, tile, heads, where, (partly, high), shape, KEYS, True)
        query_sum = query_sum * (shape[2] * 0.6931471805599453)
        place = place_of(begin, token, head, HEADS, DIM)
        tl.store(sums + place, query_sum.to(sums.dtype.element_ty), mask=real[:, None])


def window_gradients(
    done: Finished,
    given: Float[Tensor, "tokens heads head_dim"],
    delta: Float[Tensor, "heads tokens"],
    rows: Rows,
    band: Band,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value through the keys of the window, sinks inside it included."""
    tokens, heads, head_dim = done.query.shape
    kv_heads, query = done.key.shape[1], torch.empty_like(done.query)
    sums = (torch.empty_like(done.key), torch.empty_like(done.value))
    shape, figures = (0, band.window, band.scale * LOG2E), (done.log_sums, delta)
    for kernel, cut, blocks, into in (
        (_key_gradient, KEY_SHAPES[head_dim], (KEY_SHAPES[head_dim].keys, kv_heads), sums),
        (_query_gradient, QUERY_SHAPES[head_dim], (QUERY_SHAPES[head_dim].queries, heads), query),
    ):
        kernel[(triton.cdiv(rows.longest, blocks[0]), blocks[1], rows.batch)](
            describe(done.query, cut.queries), describe(done.key, cut.keys), describe(done.value, cut.keys),
            describe(given, cut.queries), figures, into, rows.begins, shape, tokens,
            HEADS=heads, GROUP=heads // kv_heads, DIM=head_dim, QUERIES=cut.queries, KEYS=cut.keys,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return query, *sums
