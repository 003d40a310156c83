"""A chunk and the keys that a ring kept, laid out as one row for the band kernels, in one pass over both.

A row holds the sinks, the window in order of position, then the new tokens: of the whole stream before the chunk, what
the chunk may see. So sinks and window of this row are those of the stream, however many tokens came before: distances
within it are true, but for those to the sinks, which only matter where the window still covers them, and there no token
is missing. Kept keys are turned already; new heads are turned here, by their positions in the stream and in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.kernels.device.forward import Band
from sinks.kernels.device.language import Value, constexpr, jit, on, tl, triton
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.turn import partners, tables
from sinks.kernels.phase import Rotary

TOKENS = 16
"""Tokens of one program, which turns all of their heads by one sine and cosine."""


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a chunk stands: `seen` tokens of each row came before it, and token 0 has the phase of position `start`.

    `rows` are the packed rows, of the kept tokens and the new ones; the kept ones ask nothing.
    """

    sinks: int
    window: int
    seen: int
    start: int
    rows: Rows

    @classmethod
    def of(cls, band: tuple[int, int], seen: int, start: int, shape: tuple[int, int], device: torch.device) -> Standing:
        """The standing of a chunk of `shape` (batch, tokens) under a `band` of (sinks, window)."""
        kept, (batch, count) = min(seen, sum(band)), shape
        return cls(*band, seen, start, Rows.whole(batch, kept + count, device, skipped=kept))

    @property
    def kept(self) -> int:
        """Tokens of each row that the ring holds."""
        return self.rows.skipped

    @property
    def count(self) -> int:
        """New tokens of each row."""
        return self.rows.columns - self.rows.skipped

    @property
    def filled(self) -> bool:
        """Whether the cache is full before the chunk ends, so that some query stands at two positions."""
        return self.sinks > 0 and self.seen + self.count > self.sinks + self.window

    def band(self, scale: float) -> Band:
        """What the kernels ask of the packed row."""
        return Band(self.sinks, self.window, scale)


@dataclass(frozen=True, eq=False)
class Packed:
    """Turned heads of packed rows. Queries are zero at the kept tokens; the two are one tensor where none differs."""

    query: Float[Tensor, "tokens heads head_dim"]
    sink_query: Float[Tensor, "tokens heads head_dim"]
    key: Float[Tensor, "tokens kv_heads head_dim"]
    value: Float[Tensor, "tokens kv_heads head_dim"]
    standing: Standing

    @property
    def arrived(self) -> tuple[Tensor, Tensor]:
        """The new keys, turned, and values, `[batch, kv_heads, new tokens, head_dim]`: views."""
        key, value = (self.standing.rows.unpack(part)[:, :, self.standing.kept :] for part in (self.key, self.value))
        return key, value


@jit
def _pack(
    heads: Value, held: Value, packed: Value, steps: Value, strides: Value, where: Value, phases: Value, rotary: Value,
    HEADS: constexpr, GROUP: constexpr, DIM: constexpr, TOKENS: constexpr, ANGLES: constexpr, INTERLEAVED: constexpr,
) -> None:  # fmt: skip
    """New `heads` and `held` keys and values into `packed`: query, sink query, key, value."""
    row = tl.program_id(1).to(tl.int64)
    kept, count, sinks, window, ahead = where
    place, dims = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, DIM)
    inside, arrived, stays = (place < kept + count)[:, None], (place >= kept)[:, None], (place < kept)[:, None]
    arrived = arrived & inside
    token, position = place - kept, phases[0] + (place - kept).to(tl.int64)
    slot = tl.where(place < sinks, place, sinks + (tl.maximum(place - sinks, 0) + ahead) % window)
    to = row * (kept + count) + place
    partner = partners(dims, rotary, INTERLEAVED)
    cos, sin = tables(position, dims, steps, rotary, INTERLEAVED)
    sink_cos, sink_sin = cos, sin
    if ANGLES == 2:
        sink_cos, sink_sin = tables(tl.minimum(position, phases[1]), dims, steps, rotary, INTERLEAVED)
    for head in range(HEADS):
        source = heads[0] + row * strides[0][0] + head * strides[0][1] + (token.to(tl.int64) * strides[0][2])[:, None]
        here = (to * (HEADS * DIM) + head * DIM)[:, None] + dims[None, :]
        own = tl.load(source + dims[None, :], mask=arrived, other=0.0).to(tl.float32)
        other = tl.load(source + partner[None, :], mask=arrived, other=0.0).to(tl.float32)
        tl.store(packed[0] + here, own * cos + other * sin, mask=inside)
        if ANGLES == 2:
            tl.store(packed[1] + here, own * sink_cos + other * sink_sin, mask=inside)
    for head in range(HEADS // GROUP):
        here = (to * (HEADS // GROUP * DIM) + head * DIM)[:, None] + dims[None, :]
        source = heads[1] + row * strides[1][0] + head * strides[1][1] + (token.to(tl.int64) * strides[1][2])[:, None]
        own = tl.load(source + dims[None, :], mask=arrived, other=0.0).to(tl.float32)
        other = tl.load(source + partner[None, :], mask=arrived, other=0.0).to(tl.float32)
        before = held[0] + row * strides[3][0] + head * strides[3][1] + (slot.to(tl.int64) * strides[3][2])[:, None]
        kept_key = tl.load(before + dims[None, :], mask=stays, other=0.0).to(tl.float32)
        tl.store(packed[2] + here, tl.where(stays, kept_key, own * cos + other * sin), mask=inside)
        source = heads[2] + row * strides[2][0] + head * strides[2][1] + (token.to(tl.int64) * strides[2][2])[:, None]
        value = tl.load(source + dims[None, :], mask=arrived, other=0.0).to(tl.float32)
        before = held[1] + row * strides[4][0] + head * strides[4][1] + (slot.to(tl.int64) * strides[4][2])[:, None]
        kept_value = tl.load(before + dims[None, :], mask=stays, other=0.0).to(tl.float32)
        tl.store(packed[3] + here, tl.where(stays, kept_value, value), mask=inside)


def pack(
    heads: tuple[Tensor, Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    standing: Standing,
    rotary: Rotary | None,
    steps: Int[Tensor, " pairs"] | None,
) -> Packed:
    """Query, key and value `[batch, heads, new tokens, head_dim]` of a chunk, behind what was kept of its stream.

    `held` are keys and values `[batch, kv_heads, slots, head_dim]`, keys turned, in the order of `cache.plan.Plan`'s
    slots and of any type. `steps` are those of `rotary` on the device; both are None where nothing is turned.
    """
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in heads)
    held = tuple(part if part.stride(3) == 1 else part.contiguous() for part in held)  # type: ignore[assignment]
    rows, (_, count, _, dim), kv_heads = standing.rows, query.shape, key.shape[1]
    angles = 2 if standing.filled and rotary is not None else 1
    queries = [query.new_empty(rows.tokens, count, dim) for _ in range(angles)]
    others = [key.new_empty(rows.tokens, kv_heads, dim) for _ in range(2)]
    position = standing.start + standing.seen
    where = (standing.kept, standing.count, standing.sinks, standing.window,
             (standing.seen - standing.kept) % standing.window)  # fmt: skip
    steps = torch.zeros(1, dtype=torch.int64, device=query.device) if steps is None else steps
    turns = (0, 0, False) if rotary is None else (rotary.first, rotary.width // 2, rotary.interleaved)
    with on(query.device):
        _pack[(triton.cdiv(rows.columns, TOKENS), rows.batch)](
            (query, key, value), held, (queries[0], queries[-1], *others), steps,
            tuple(tuple(part.stride()[:3]) for part in (query, key, value, *held)), where,
            (position, standing.start + standing.sinks + standing.window - 1), turns[:2],
            HEADS=count, GROUP=count // kv_heads, DIM=dim, TOKENS=TOKENS, ANGLES=angles, INTERLEAVED=turns[2],
            num_warps=4,
        )  # fmt: skip
    return Packed(queries[0], queries[-1], *others, standing)
