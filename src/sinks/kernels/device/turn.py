"""Turn heads by their phases and pack them in one pass: two angles for a query, one for a key.

Phases are 64-bit integers that wrap (`kernels.phase`); the upper 32 bits, read as signed, are the angle.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.language import Value, constexpr, jit, tl, triton
from sinks.kernels.device.rows import Rows
from sinks.kernels.phase import Rotary

TOKENS = 16
"""Tokens of one program, which turns all of their heads by one sine and cosine."""


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
    angle = phase.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    return tl.cos(angle), tl.where(second[None, :], tl.sin(angle), -tl.sin(angle))


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
def _turn(
    heads: Value, turned: Value, begins: Value, source: Value, steps: Value, strides: Value, sizes: Value,
    rotary: Value, HEADS: constexpr, DIM: constexpr, TOKENS: constexpr, ANGLES: constexpr, INTERLEAVED: constexpr,
    BACK: constexpr, PACKED: constexpr,
) -> None:  # fmt: skip
    """heads[source] -> turned[0] by the position, turned[1] by that in the cache; BACK: their gradients back."""
    row = tl.program_id(1)
    begin = tl.load(begins + row)
    length = tl.load(begins + row + 1) - begin
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real, dims = (token < length)[:, None], tl.arange(0, DIM)
    columns, capacity = sizes
    partner = partners(dims, rotary, INTERLEAVED)
    if PACKED:
        where = tl.load(source + begin + token, mask=token < length, other=0)
    else:
        where = (begin + token).to(tl.int64)
    outside = (where // columns * strides[0] + where % columns * strides[2])[:, None]
    inside = ((begin + token).to(tl.int64) * (HEADS * DIM))[:, None]
    cos, sin = tables(token, dims, steps, rotary, INTERLEAVED)
    sink_cos, sink_sin = cos, sin
    if ANGLES == 2:
        sink_cos, sink_sin = tables(tl.minimum(token, capacity - 1), dims, steps, rotary, INTERLEAVED)
    for head in range(HEADS):
        away, here = heads + outside + head * strides[1], inside + head * DIM
        if BACK:
            # The inverse of a turn is its transpose: the partner's sine changes sides.
            made = _mix(turned[0] + here, dims, partner, cos, -sin, real)
            if ANGLES == 2:
                made += _mix(turned[1] + here, dims, partner, sink_cos, -sink_sin, real)
            tl.store(away + dims[None, :], made.to(heads.dtype.element_ty), mask=real)
        else:
            tl.store(turned[0] + here + dims[None, :], _mix(away, dims, partner, cos, sin, real), mask=real)
            if ANGLES == 2:
                made = _mix(away, dims, partner, sink_cos, sink_sin, real)
                tl.store(turned[1] + here + dims[None, :], made, mask=real)


@jit
def _mix(places: Value, dims: Value, partner: Value, cos: Value, sin: Value, real: Value) -> Value:
    own = tl.load(places + dims[None, :], mask=real, other=0.0).to(tl.float32)
    other = tl.load(places + partner[None, :], mask=real, other=0.0).to(tl.float32)
    return own * cos + other * sin


def _launch(
    heads: Tensor, turned: tuple[Tensor, ...], rows: Rows, rotary: Rotary, capacity: int, back: bool
) -> None:
    source = rows.begins if rows.source is None else rows.source
    _turn[(triton.cdiv(rows.longest, TOKENS), rows.batch)](
        heads, (turned[0], turned[-1]), rows.begins, source, rotary.steps.to(heads.device),
        tuple(heads.stride()[:3]), (rows.columns, capacity), (rotary.first, rotary.width // 2),
        HEADS=heads.shape[1], DIM=heads.shape[3], TOKENS=TOKENS, ANGLES=len(turned), INTERLEAVED=rotary.interleaved,
        BACK=back, PACKED=rows.source is not None, num_warps=4,
    )  # fmt: skip


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, rows: Rows, rotary: Rotary, capacity: int, angles: int
    ) -> tuple[Tensor, ...]:
        heads = heads if heads.stride(3) == 1 else heads.contiguous()
        turned = tuple(heads.new_empty(rows.tokens, heads.shape[1], heads.shape[3]) for _ in range(angles))
        _launch(heads, turned, rows, rotary, capacity, back=False)
        ctx.of, ctx.shape = (rows, rotary, capacity), heads.shape
        return turned

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        rows, rotary, capacity = ctx.of
        batch, count, columns, dims = ctx.shape
        make = given[0].new_empty if rows.source is None else given[0].new_zeros
        heads = make(batch, columns, count, dims).transpose(1, 2)
        _launch(heads, tuple(part.contiguous() for part in given), rows, rotary, capacity, back=True)
        return heads, None, None, None, None


def turn_query(
    query: Float[Tensor, "batch heads queries head_dim"], rows: Rows, rotary: Rotary | None, capacity: int
) -> tuple[Float[Tensor, "tokens heads head_dim"], Float[Tensor, "tokens heads head_dim"]]:
    """The packed query for recent keys, turned by its position, and for sinks, by its position in the cache."""
    if rotary is None:
        packed = rows.pack(query)
        return packed, packed
    return _Turn.apply(query, rows, rotary, capacity, 2)


def turn_key(
    key: Float[Tensor, "batch kv_heads queries head_dim"], rows: Rows, rotary: Rotary | None
) -> Float[Tensor, "tokens kv_heads head_dim"]:
    """The packed key, turned by its position: sinks and recent keys alike."""
    return rows.pack(key) if rotary is None else _Turn.apply(key, rows, rotary, 1, 1)[0]
