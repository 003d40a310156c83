"""A chunk and the keys that a ring kept, laid out for the band kernels in one pass over both.

The keys of a row are the sinks, the window in order of position, then the new ones: of the whole stream, what the chunk
may see. So sinks and window of this row are those of the stream, however many tokens came before: distances in it are
true, but for those to the sinks, which only matter where the window still covers a sink, and there no token is missing.
Kept keys are turned already; new heads are turned here, by their positions in the stream and in the cache. Heads of an
odd size are filled up with zeros, which change no product.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.kernels.device.language import Value, constexpr, jit, on, tl, triton
from sinks.kernels.device.turn import partners, tables
from sinks.kernels.phase import Rotary

TOKENS = 16
"""Tokens of one program, which turns all of their heads by one sine and cosine."""

WIDTHS = (64, 128, 256)
"""What heads are filled up to."""


@dataclass(frozen=True)
class Standing:
    """Where a chunk of `count` tokens a row stands: `seen` tokens of each row came before it.

    Of those, the first `sinks` and the last `window` were kept. Token 0 of the stream has the phase of `start`.
    """

    sinks: int
    window: int
    seen: int
    count: int
    start: int

    @property
    def capacity(self) -> int:
        """Keys of a full ring."""
        return self.sinks + self.window

    @property
    def kept(self) -> int:
        """Tokens of each row that the ring holds."""
        return min(self.seen, self.capacity)

    @property
    def keys(self) -> int:
        """Kept and new tokens of each row."""
        return self.kept + self.count

    @property
    def parts(self) -> bool:
        """Whether the ring is full before the chunk ends, so that some query stands at two positions."""
        return self.sinks > 0 and self.seen + self.count > self.capacity


@dataclass(frozen=True, eq=False)
class Packed:
    """Turned heads, filled up to a width of `WIDTHS`: queries of the new tokens, keys and values of all.

    `sink_query` is turned for the sinks, and the same tensor as `query` where none differs.
    """

    query: Float[Tensor, "batch new heads width"]
    sink_query: Float[Tensor, "batch new heads width"]
    key: Float[Tensor, "batch keys kv_heads width"]
    value: Float[Tensor, "batch keys kv_heads width"]
    standing: Standing
    head_dim: int

    @property
    def arrived(self) -> tuple[Tensor, Tensor]:
        """The new keys, turned, and values, `[batch, kv_heads, new, head_dim]`: views."""
        new = slice(self.standing.kept, None)
        key, value = (part[:, new, :, : self.head_dim].transpose(1, 2) for part in (self.key, self.value))
        return key, value


@jit
def _fetch(
    heads: Value, held: Value, strides: Value, held_strides: Value, places: Value, dims: Value, partner: Value,
    masks: Value, table: Value, TURN: constexpr,
) -> Value:  # fmt: skip
    """One head's tokens: new ones, turned by `table` if TURN, and kept ones as they are."""
    token, slot = places
    arrived, stays = masks
    source = heads + token[:, None] * strides
    made = tl.load(source + dims[None, :], mask=arrived, other=0.0).to(tl.float32)
    if TURN:
        other = tl.load(source + partner[None, :], mask=arrived, other=0.0).to(tl.float32)
        made = made * table[0] + other * table[1]
    kept = tl.load(held + slot[:, None] * held_strides + dims[None, :], mask=stays, other=0.0).to(tl.float32)
    return tl.where(stays, kept, made)


@partial(jit, varying=("kept", "count", "ahead", "position", "last"))
def _pack(
    heads: Value, held: Value, packed: Value, steps: Value, strides: Value, band: Value, rotary: Value, kept: Value,
    count: Value, ahead: Value, position: Value, last: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr,
    WIDTH: constexpr, TOKENS: constexpr, ANGLES: constexpr, INTERLEAVED: constexpr,
) -> None:  # fmt: skip
    """New `heads` (query, key, value) and `held` keys and values into `packed` (query, sink query, key, value).

    The first new token has the phase of `position`; from `last` on, sinks see none beyond. The oldest key that is no
    sink is `ahead` slots into the window.
    """
    row = tl.program_id(1).to(tl.int64)
    sinks, window = band
    place, dims = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    token = (place - kept).to(tl.int64)
    real, inside = (dims < DIM)[None, :], (place < kept + count)[:, None]
    arrived, stays = inside & (place >= kept)[:, None], (place < kept)[:, None] & real
    slot = tl.where(place < sinks, place, sinks + (tl.maximum(place - sinks, 0) + ahead) % window).to(tl.int64)
    partner = partners(dims, rotary, INTERLEAVED)
    phase = position + token
    table = tables(phase, dims, steps, rotary, INTERLEAVED)
    sink_table = table
    if ANGLES == 2:
        sink_table = tables(tl.minimum(phase, last), dims, steps, rotary, INTERLEAVED)
    for head in range(HEADS):
        source = heads[0] + row * strides[0] + head * strides[1] + (token * strides[2])[:, None]
        own = tl.load(source + dims[None, :], mask=arrived & real, other=0.0).to(tl.float32)
        other = tl.load(source + partner[None, :], mask=arrived & real, other=0.0).to(tl.float32)
        here = ((row * count + token) * (HEADS * WIDTH) + head * WIDTH)[:, None] + dims[None, :]
        tl.store(packed[0] + here, own * table[0] + other * table[1], mask=arrived)
        if ANGLES == 2:
            tl.store(packed[1] + here, own * sink_table[0] + other * sink_table[1], mask=arrived)
    places, masks = (token, slot), (arrived & real, stays)
    for head in range(HEADS // GROUP):
        here = ((row * (kept + count) + place) * (HEADS // GROUP * WIDTH) + head * WIDTH)[:, None] + dims[None, :]
        key = _fetch(
            heads[1] + row * strides[3] + head * strides[4], held[0] + row * strides[9] + head * strides[10],
            strides[5], strides[11], places, dims, partner, masks, table, True,
        )  # fmt: skip
        tl.store(packed[2] + here, key, mask=inside)
        value = _fetch(
            heads[2] + row * strides[6] + head * strides[7], held[1] + row * strides[12] + head * strides[13],
            strides[8], strides[14], places, dims, partner, masks, table, False,
        )  # fmt: skip
        tl.store(packed[3] + here, value, mask=inside)


def width_of(head_dim: int) -> int | None:
    """The least of `WIDTHS` that holds such a head; None if none does."""
    return next((width for width in WIDTHS if width >= head_dim), None)


def pack(
    heads: tuple[Tensor, Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    standing: Standing,
    rotary: Rotary | None,
    steps: Int[Tensor, " pairs"] | None,
) -> Packed:
    """Query, key and value `[batch, heads, new, head_dim]` of a chunk, behind what was kept of its stream.

    `held` are keys and values `[batch, kv_heads, slots, head_dim]`, keys turned, in the order of `cache.plan.Plan`'s
    slots and of any type. `steps` are those of `rotary` on the device; both are None where nothing is turned.
    """
    tensors = [part if part.stride(3) == 1 else part.contiguous() for part in (*heads, *held)]
    query, key = tensors[:2]
    (batch, count, new, dim), kv_heads = query.shape, key.shape[1]
    width = width_of(dim)
    assert width is not None  # `arriving.refuse_chunk` saw to it
    angles = 2 if standing.parts and rotary is not None else 1
    queries = [query.new_empty(batch, new, count, width) for _ in range(angles)]
    others = [key.new_empty(batch, standing.keys, kv_heads, width) for _ in range(2)]
    ahead = (standing.seen - standing.kept) % standing.window
    turns = (0, 0, False) if rotary is None else (rotary.first, rotary.width // 2, rotary.interleaved)
    with on(query.device):
        _pack[(triton.cdiv(standing.keys, TOKENS), batch)](
            tuple(tensors[:3]), tuple(tensors[3:]), (queries[0], queries[-1], *others),
            torch.zeros(1, dtype=torch.int64, device=query.device) if steps is None else steps,
            tuple(stride for part in tensors for stride in part.stride()[:3]),
            (standing.sinks, standing.window), turns[:2], standing.kept, new, ahead,
            standing.start + standing.seen, standing.start + standing.capacity - 1,
            HEADS=count, GROUP=count // kv_heads, DIM=dim, WIDTH=width, TOKENS=TOKENS, ANGLES=angles,
            INTERLEAVED=turns[2], num_warps=4,
        )  # fmt: skip
    return Packed(queries[0], queries[-1], others[0], others[1], standing, dim)
