"""Turn heads by their phases and pack them in one pass, and turn gradients back; queries meet the sinks on the way.

Phases are 64-bit integers that wrap (`kernels.phase`); the upper 32 bits, read as signed, are the angle. A query has
two: its position for recent keys, and its position in the cache for sinks. The second one is never written down: only
its products with the few sinks are, and the slopes of those are what its gradient is made of.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.forward import Band
from sinks.kernels.device.language import Value, constexpr, jit, tl, triton
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.tiles import (
    angles,
    circle,
    extent,
    load_firsts,
    load_firsts_at,
    load_pairs,
    load_sink,
    outside,
    pairs_of,
)
from sinks.kernels.phase import Rotary

TOKENS, SLICE, STAGES = 16, 8, 3
"""Tokens of one program, heads at most that it turns by one sine and cosine, and heads on their way at a time."""

MET = 64
"""Tokens of a program that has only scores to find."""

BY_HAND = 8
"""Sinks up to which products are sums over a warp, and not matrix instructions, which want 16 and more registers."""

WARPS = 4
"""Warps of such a program."""


@jit
def tables(token: Value, dims: Value, steps: Value, rotary: Value, INTERLEAVED: constexpr) -> Value:
    """Cosine, and sine with the sign of its dimension, [tokens, dims]: own times the one, partner times the other."""
    first, pairs = rotary
    inside = (dims >= first) & (dims < first + 2 * pairs)
    offset = dims - first
    if INTERLEAVED:
        pair, second = offset // 2, offset % 2 == 1
    else:
        pair, second = offset % tl.maximum(pairs, 1), offset >= pairs
    step = tl.load(steps + pair, mask=inside, other=0)
    phase = ((token.to(tl.int64)[:, None] * step[None, :]) >> 32).to(tl.int32)
    cos, sin = circle(phase)
    return cos, tl.where(second[None, :], sin, -sin)


@jit
def partners(dims: Value, rotary: Value, INTERLEAVED: constexpr) -> Value:
    """The dimension that each one is turned with; itself outside the rotary ones."""
    first, pairs = rotary
    offset = dims - first
    if INTERLEAVED:
        partner = first + (offset ^ 1)
    else:
        partner = tl.where(offset < pairs, dims + pairs, dims - pairs)
    return tl.where((offset >= 0) & (offset < 2 * pairs), partner, dims)


@jit
def _stand(
    heads: Value, begins: Value, source: Value, strides: Value, sizes: Value, TOKENS: constexpr, FULL: constexpr,
    PACKED: constexpr,
) -> Value:  # fmt: skip
    """A program's tokens, which are real, where they stand in the batch and packed, and where their row's sinks do."""
    columns, _, _, sinks, start = sizes
    row = tl.program_id(1)
    begin, length = extent(begins, row, columns, PACKED)
    token = (tl.program_id(0) + start) * TOKENS + tl.arange(0, TOKENS)
    real = token < length
    away = heads + outside(begin, token, real, source, strides, columns, PACKED)
    # The sinks stand at the beginning of a row, or, turned for a full cache, in a tensor of their own.
    firsts = (row * sinks, sinks) if FULL else (begin, length)
    return token, real, away, (begin + token).to(tl.int64), firsts


@jit
def _circles(token: Value, capacity: Value, steps: Value, rotary: Value, DIM: constexpr, OTHER: constexpr) -> Value:
    """Cosine and sine of each pair by the position, and, if there is an OTHER angle, by the position in the cache."""
    here = angles(token, steps, rotary, DIM)
    return here, angles(tl.minimum(token, capacity - 1), steps, rotary, DIM) if OTHER else here


@jit
def _turn(
    heads: Value, turned: Value, first_keys: Value, scores: Value, begins: Value, source: Value, steps: Value,
    strides: Value, sizes: Value, rotary: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, SLICE: constexpr,
    STAGES: constexpr, TOKENS: constexpr, TILE: constexpr, FEW: constexpr, FULL: constexpr, INTERLEAVED: constexpr,
    WHOLE: constexpr, PACKED: constexpr,
) -> None:  # fmt: skip
    """heads[source] -> `turned` by the position; `scores`: of queries, turned as in the cache, and turned sinks.

    FULL: the cache is full for all of these tokens, and `first_keys` are turned instead of the queries.
    """
    _, capacity, tokens, sinks, _ = sizes
    token, real, away, place, firsts = _stand(heads, begins, source, strides, sizes, TOKENS, FULL, PACKED)
    one, other = pairs_of(rotary, DIM, INTERLEAVED, WHOLE)
    here, there = _circles(token, capacity, steps, rotary, DIM, TILE > 0 and not FULL)
    for member in tl.range(0, SLICE, num_stages=STAGES):
        head = tl.program_id(2) * SLICE + member
        kv_head = head // GROUP
        low, high = load_pairs(away + head * strides[1], one, other, real)
        a, b = low.to(tl.float32), high.to(tl.float32)
        into = (turned + place * (HEADS * DIM) + head * DIM)[:, None]
        tl.store(into + one[None, :], (a * here[0] - b * here[1]).to(low.dtype), mask=real[:, None])
        tl.store(into + other[None, :], (b * here[0] + a * here[1]).to(low.dtype), mask=real[:, None])
        if TILE > 0 and not FULL:
            low = (a * there[0] - b * there[1]).to(low.dtype)
            high = (b * there[0] + a * there[1]).to(low.dtype)
        if FEW:
            for column in tl.static_range(FEW):
                a, b = load_sink(first_keys, firsts, kv_head, column, one, other, HEADS // GROUP, DIM)
                product = tl.sum(low.to(tl.float32) * a + high.to(tl.float32) * b, 1)
                tl.store(scores + (place + head * tokens) * FEW + column, product, mask=real)
        elif TILE > 0:
            column = tl.arange(0, TILE)
            low_keys = load_firsts_at(first_keys, firsts[0], kv_head, firsts[1], one, HEADS // GROUP, DIM, TILE)
            high_keys = load_firsts_at(first_keys, firsts[0], kv_head, firsts[1], other, HEADS // GROUP, DIM, TILE)
            noted = ((place + head * tokens) * sinks)[:, None] + column[None, :]
            products = tl.dot(high, tl.trans(high_keys), tl.dot(low, tl.trans(low_keys)))
            tl.store(scores + noted, products, mask=real[:, None] & (column < sinks)[None, :])


@jit
def _meet(
    heads: Value, first_keys: Value, scores: Value, begins: Value, source: Value, strides: Value, sizes: Value,
    HEADS: constexpr, GROUP: constexpr, DIM: constexpr, TOKENS: constexpr, TILE: constexpr, SINKS: constexpr,
    STAGES: constexpr, PACKED: constexpr,
) -> None:  # fmt: skip
    """Where nothing is turned: heads[source] and sinks -> `scores`; the query heads of one key head a program."""
    columns, tokens = sizes
    begin, length = extent(begins, tl.program_id(1), columns, PACKED)
    token, kv_head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(2)
    real, dims, column = token < length, tl.arange(0, DIM), tl.arange(0, TILE)
    away = heads + outside(begin, token, real, source, strides, columns, PACKED)
    keys = load_firsts(first_keys, begin, kv_head, length, HEADS // GROUP, DIM, TILE)
    for member in tl.range(0, GROUP, num_stages=STAGES):
        head = (kv_head * GROUP + member).to(tl.int64)
        query = tl.load((away + head * strides[1])[:, None] + dims[None, :], mask=real[:, None], other=0.0)
        into = ((head * tokens + begin + token) * SINKS)[:, None] + column[None, :]
        products = tl.dot(query, tl.trans(keys))
        tl.store(scores + into, products, mask=real[:, None] & (column < SINKS)[None, :])


@jit
def _turn_back(
    heads: Value, given: Value, first_keys: Value, slopes: Value, begins: Value, source: Value, steps: Value,
    strides: Value, sizes: Value, rotary: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, SLICE: constexpr,
    STAGES: constexpr, TOKENS: constexpr, TILE: constexpr, FEW: constexpr, FULL: constexpr, INTERLEAVED: constexpr,
    WHOLE: constexpr, PACKED: constexpr,
) -> None:  # fmt: skip
    """Gradients of turned heads, and `slopes` of their scores against turned sinks -> those of heads[source]."""
    _, capacity, tokens, sinks, _ = sizes
    token, real, away, place, firsts = _stand(heads, begins, source, strides, sizes, TOKENS, FULL, PACKED)
    one, other = pairs_of(rotary, DIM, INTERLEAVED, WHOLE)
    here, there = _circles(token, capacity, steps, rotary, DIM, TILE > 0 and not FULL)
    for member in tl.range(0, SLICE, num_stages=STAGES):
        head = tl.program_id(2) * SLICE + member
        kv_head, noted = head // GROUP, (place + head * tokens) * sinks
        low, high = load_pairs(given + place * (HEADS * DIM) + head * DIM, one, other, real)
        low, high = low.to(tl.float32), high.to(tl.float32)
        # The inverse of a turn is its transpose.
        low, high = low * here[0] + high * here[1], high * here[0] - low * here[1]
        if TILE > 0:
            a, b = tl.zeros_like(low), tl.zeros_like(high)
            if FEW:
                for column in tl.static_range(FEW):
                    x, y = load_sink(first_keys, firsts, kv_head, column, one, other, HEADS // GROUP, DIM)
                    share = tl.load(slopes + noted + column, mask=real, other=0.0)
                    a, b = a + share[:, None] * x, b + share[:, None] * y
            else:
                column = tl.arange(0, TILE)
                low_keys = load_firsts_at(first_keys, firsts[0], kv_head, firsts[1], one, HEADS // GROUP, DIM, TILE)
                high_keys = load_firsts_at(first_keys, firsts[0], kv_head, firsts[1], other, HEADS // GROUP, DIM, TILE)
                wanted = real[:, None] & (column < sinks)[None, :]
                share = tl.load(slopes + noted[:, None] + column[None, :], mask=wanted, other=0.0).to(low_keys.dtype)
                a, b = tl.dot(share, low_keys), tl.dot(share, high_keys)
            if not FULL:
                a, b = a * there[0] + b * there[1], b * there[0] - a * there[1]
            low, high = low + a, high + b
        into = (away + head * strides[1])[:, None]
        tl.store(into + one[None, :], low.to(heads.dtype.element_ty), mask=real[:, None])
        tl.store(into + other[None, :], high.to(heads.dtype.element_ty), mask=real[:, None])


@jit
def _turn_sinks(
    keys: Value, made: Value, begins: Value, steps: Value, shape: Value, rotary: Value, KV: constexpr, DIM: constexpr,
    TILE: constexpr, INTERLEAVED: constexpr, WHOLE: constexpr,
) -> None:  # fmt: skip
    """Turned sinks of each row, turned back by the one angle that a full cache gives all of its queries."""
    kv_head, row = tl.program_id(0), tl.program_id(1)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    column = tl.arange(0, TILE)
    sinks, capacity = shape
    one, other = pairs_of(rotary, DIM, INTERLEAVED, WHOLE)
    low = load_firsts_at(keys, begin, kv_head, length, one, KV, DIM, TILE)
    high = load_firsts_at(keys, begin, kv_head, length, other, KV, DIM, TILE)
    cos, sin = angles(tl.full([1], capacity - 1, tl.int32), steps, rotary, DIM)
    a, b = low.to(tl.float32), high.to(tl.float32)
    here = made + (((row * sinks + column) * KV + kv_head) * DIM)[:, None]
    real = (column < sinks)[:, None]
    tl.store(here + one[None, :], (a * cos + b * sin).to(low.dtype), mask=real)
    tl.store(here + other[None, :], (b * cos - a * sin).to(low.dtype), mask=real)


@dataclass(frozen=True, eq=False)
class Turned:
    """Packed heads as a kernel that walks the window wants them, and what the queries make of the sinks.

    `sinks` are the first keys of each row, turned back by the angle of a query that sees a full cache (None: nothing is
    turned). `scores` are products of each query, turned by its position in the cache, with its row's sinks: neither
    scaled nor hidden, float32 (None: no sinks, or not asked for). A sink that a row is too short for gives 0.
    """

    query: Float[Tensor, "tokens heads head_dim"]
    key: Float[Tensor, "tokens kv_heads head_dim"]
    sinks: Float[Tensor, "rows_sinks kv_heads head_dim"] | None
    scores: Float[Tensor, "heads tokens sinks"] | None


def turn(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads queries head_dim"],
    rows: Rows,
    rotary: Rotary | None,
    band: Band,
    *,
    asked: bool = True,
) -> Turned:
    """Pack query and key, turned by their positions; the last axis of both has stride 1.

    Unless `asked` for, there are no scores where nothing is turned: a packed query meets the sinks as it is.
    """
    packed, packed_query = (_make(heads, rows, rotary) for heads in (key, query))
    if rotary is None:
        return Turned(packed_query, packed, None, meet(query, packed, rows, band) if asked else None)
    sinks, scores, sizes = None, None, (band.sinks, band.sinks + band.window)
    if band.sinks:
        scores = _empty_scores(query, rows, band)
    _launch(_turn, (key, packed), (packed, packed), rows, rotary, (0, 0))
    if band.sinks:
        sinks = _sinks_of(packed, rows, rotary, band)
    beside = (packed, packed_query if scores is None else scores)
    _launch(_turn, (query, packed_query), beside, rows, rotary, sizes, sinks)
    return Turned(packed_query, packed, sinks, scores)


def _empty_scores(query: Tensor, rows: Rows, band: Band) -> Tensor:
    return torch.empty(query.shape[1], rows.tokens, band.sinks, dtype=torch.float32, device=query.device)


def _make(heads: Tensor, rows: Rows, rotary: Rotary | None) -> Tensor:
    return rows.pack(heads) if rotary is None else heads.new_empty(rows.tokens, heads.shape[1], heads.shape[3])


def meet(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    rows: Rows,
    band: Band,
) -> Float[Tensor, "heads tokens sinks"] | None:
    """`Turned.scores` where nothing is turned."""
    if not band.sinks:
        return None
    scores, (_, heads, _, head_dim), group = (
        _empty_scores(query, rows, band),
        query.shape,
        query.shape[1] // key.shape[1],
    )
    _meet[(triton.cdiv(rows.longest, MET), rows.batch, key.shape[1])](
        query, key, scores, rows.begins, rows.begins if rows.source is None else rows.source,
        tuple(query.stride()[:3]), (rows.columns, rows.tokens), HEADS=heads, GROUP=group, DIM=head_dim, TOKENS=MET,
        TILE=band.tile, SINKS=band.sinks, STAGES=STAGES, PACKED=rows.source is not None, num_warps=WARPS,
    )  # fmt: skip
    return scores


def _sinks_of(key: Tensor, rows: Rows, rotary: Rotary, band: Band) -> Tensor:
    made, (steps, pairs) = key.new_empty(rows.batch * band.sinks, *key.shape[1:]), numbers(rotary, rows)
    _turn_sinks[(key.shape[1], rows.batch)](
        key, made, rows.begins, steps, (band.sinks, band.sinks + band.window), pairs,
        KV=key.shape[1], DIM=key.shape[2], TILE=band.tile, num_warps=4, **spell(rotary, key.shape[2]),
    )  # fmt: skip
    return made


def turn_back(
    given: Float[Tensor, "tokens heads head_dim"],
    first_keys: tuple[Float[Tensor, "tokens kv_heads head_dim"], Float[Tensor, "rows_sinks kv_heads head_dim"] | None],
    slopes: Float[Tensor, "heads tokens sinks"] | None,
    rows: Rows,
    rotary: Rotary | None,
    capacity: int,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """The gradient of heads from that of their turned ones and, for queries, of their scores against the sinks.

    `first_keys` are `Turned.key` and `Turned.sinks`.
    """
    if rotary is None and slopes is None:
        return rows.unpack(given)
    make = given.new_empty if rows.source is None else given.new_zeros
    heads = make(rows.batch, rows.columns, *given.shape[1:]).transpose(1, 2)
    sizes = (0 if slopes is None else slopes.shape[2], capacity)
    beside = (first_keys[0], given if slopes is None else slopes)
    _launch(_turn_back, (heads, given), beside, rows, rotary, sizes, first_keys[1])
    return heads


def spell(rotary: Rotary | None, head_dim: int) -> dict[str, bool]:
    """What a kernel that turns must know when it is compiled."""
    return {
        "INTERLEAVED": rotary is not None and rotary.interleaved,
        "WHOLE": rotary is None or (rotary.first == 0 and rotary.width == head_dim),
    }


def numbers(rotary: Rotary | None, rows: Rows) -> tuple[Tensor, tuple[int, int]]:
    """Its steps, and its first dimension and pairs; anything at all where nothing is turned."""
    if rotary is None:
        return rows.begins, (0, 0)
    return rotary.steps.to(rows.begins.device), (rotary.first, rotary.width // 2)


def _launch(
    kernel: Any, pair: tuple[Tensor, Tensor], beside: tuple[Tensor, Tensor], rows: Rows, rotary: Rotary | None,
    sizes: tuple[int, int], full: Tensor | None = None,
) -> None:  # fmt: skip
    """`pair`: heads in the batch and packed; `beside`: first keys and scores. `full`: first keys for a full cache."""
    heads, (sinks, capacity), blocks = pair[0], sizes, triton.cdiv(rows.longest, TOKENS)
    source, (steps, numbered) = rows.begins if rows.source is None else rows.source, numbers(rotary, rows)
    cut = next(size for size in range(SLICE, 0, -1) if heads.shape[1] % size == 0)
    filled = blocks if full is None else min(triton.cdiv(capacity - 1, TOKENS), blocks)
    for start, stop, keys in ((0, filled, beside[0]), (filled, blocks, full)):
        if start == stop or keys is None:
            continue
        kernel[(stop - start, rows.batch, heads.shape[1] // cut)](
            *pair, keys, beside[1], rows.begins, source, steps, tuple(heads.stride()[:3]),
            (rows.columns, capacity, rows.tokens, sinks, start), numbered,
            HEADS=heads.shape[1], GROUP=heads.shape[1] // beside[0].shape[1], DIM=heads.shape[3], SLICE=cut,
            STAGES=STAGES, TOKENS=TOKENS, TILE=Band(sinks, 1, 1.0).tile, FEW=sinks if sinks <= BY_HAND else 0,
            FULL=start > 0, PACKED=rows.source is not None, num_warps=WARPS, **spell(rotary, heads.shape[3]),
        )  # fmt: skip
