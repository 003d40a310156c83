"""A chunk behind a ring: sinks and window of the whole stream, for the new tokens alone, in one call however many.

Forward only. `packed` says why this is exact. The window is walked by the kernel of this file or by flash-attn-4, whose
last query stands at its last key; the sinks are met by their own query, in tiles, so that there may be any number.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.errors import UnsupportedOption
from sinks.kernels.band import flash
from sinks.kernels.band.attend import DTYPES
from sinks.kernels.band.operator import Walker
from sinks.kernels.band.packed import Packed, width_of
from sinks.kernels.device.forward import Shape, spans, walk
from sinks.kernels.device.language import LOG2E, Value, constexpr, describe, jit, need_triton, on, tl, triton
from sinks.kernels.device.tiles import hide, take_in, take_in_logit
from sinks.kernels.scoring import Scoring

LEAST = 2
"""New tokens from which the kernels are asked: a single one is a step."""

FLASH_LEAST, FLASH_WINDOW, FLASH_WIDTH = 4096, 2048, 128
"""New tokens and window from which flash-attn-4 is asked: its calls cost a processor a fifth of a millisecond."""

SHAPES: Mapping[int, Shape] = MappingProxyType({
    64: Shape(64, 64, 4, 2), 128: Shape(64, 64, 4, 2), 256: Shape(64, 64, 4, 2),
})  # fmt: skip
"""How each width is cut: measured on an H200 at 8,192 tokens behind 4 + 1,020."""


MEMBERS: Mapping[int, int] = MappingProxyType({64: 1, 128: 2, 256: 1})
"""Query heads of one key head that a program takes at once, where a group can be cut so."""


def choose_arriving(query: Tensor, value: Tensor, *, window: int, scoring: Scoring) -> Walker | None:
    """By whom a chunk of even rows without pads is attended behind its ring; None: block by block, in PyTorch.

    The kernels take bfloat16 and float16, heads of up to 256, any number of sinks, sink logits; no soft cap and no
    ALiBi. They run where `need_triton` says. flash-attn-4 walks heads of 65 to 128 in long chunks through long windows,
    where it is the faster one (chunk-h200.json: at 8,192 tokens 1.02 ms against 1.11 with a window of 4,092, but 0.51
    against 0.46 with 1,020).
    """
    if query.device.type != "cuda" or query.shape[2] < LEAST or query.dtype not in DTYPES:
        return None
    width = width_of(query.shape[3])
    if width is None or value.shape[3] != query.shape[3]:
        return None
    if scoring.scale <= 0 or scoring.slopes is not None or scoring.softcap is not None:
        return None
    try:
        need_triton(query.device)
    except UnsupportedOption:
        return None
    is_long = query.shape[2] >= FLASH_LEAST and window >= FLASH_WINDOW
    return "flash" if width == FLASH_WIDTH and is_long and flash.has_flash() else "triton"


@jit
def _walk_all(
    queries: Value, key_heads: Value, value_heads: Value, where: Value, sizes: Value, shape: Value, DIM: constexpr,
    MEMBERS: constexpr, QUERIES: constexpr, KEYS: constexpr,
) -> Value:  # fmt: skip
    """The window of a tile of queries, of which `where` says row, first head, key head and first one."""
    row, foremost, kv_head, first = where
    kept, count = sizes
    zeros, asking, states = tl.zeros([QUERIES], tl.float32), (), ()
    for member in tl.static_range(MEMBERS):
        asking = asking + (queries.load([row * count + first, (foremost + member) * DIM]),)
        states = states + ((tl.zeros([QUERIES, DIM], tl.float32), zeros, zeros - float("inf"), zeros),)
    here = (row * (kept + count), kv_head * DIM, kept + first + tl.arange(0, QUERIES))
    bounds = spans(kept + first, kept + count, shape[1], QUERIES, KEYS)
    return walk(states, (asking, key_heads, value_heads), here, bounds, shape, KEYS, True, False)


@jit
def _walked(out: Value, log_sums: Value, real: Value, scale: Value, QUERIES: constexpr) -> Value:
    """The state of a window that another kernel has walked."""
    largest = tl.load(log_sums, mask=real, other=0.0) * 1.4426950408889634 / scale
    gathered = tl.load(out, mask=real[:, None], other=0.0).to(tl.float32)
    return gathered, tl.full([QUERIES], 1.0, tl.float32), largest, largest


@jit
def _meet(
    state: Value, asking: Value, sink_heads: Value, where: Value, shape: Value, token: Value, COUNT: constexpr,
    DIM: constexpr, TILE: constexpr,
) -> Value:  # fmt: skip
    """Take in the sinks of a row of `where`: its first place, its keys and the key head."""
    begin, keys, kv_head = where
    dims = tl.arange(0, DIM)
    for start in range(0, shape[0], TILE):
        column = start + tl.arange(0, TILE)
        there = ((begin + column).to(tl.int64) * (COUNT * DIM) + kv_head * DIM)[:, None] + dims[None, :]
        full = (column < keys)[:, None]
        scores = tl.dot(asking, tl.trans(tl.load(sink_heads[0] + there, mask=full, other=0.0)))
        # One that the window still covers was met there, at the same distance.
        seen = (column < shape[0])[None, :] & (column[None, :] <= (token - shape[1])[:, None])
        values = tl.load(sink_heads[1] + there, mask=full, other=0.0)
        state = take_in(state, hide(scores, seen), values, shape[2], False)
    return state


@partial(jit, varying=("kept", "count"))
def _arrive(
    queries: Value, sink_queries: Value, key_heads: Value, value_heads: Value, sink_heads: Value, out: Value,
    log_sums: Value, logits: Value, shape: Value, kept: Value, count: Value, HEADS: constexpr, GROUP: constexpr,
    DIM: constexpr, MEMBERS: constexpr, QUERIES: constexpr, KEYS: constexpr, TILE: constexpr, LOGITS: constexpr,
    WALK: constexpr,
) -> None:  # fmt: skip
    """Window, sinks and sink logit of new tokens; unless WALK, `out` and `log_sums` are those of the window already."""
    foremost, row = tl.program_id(1) * MEMBERS, tl.program_id(2)
    first, kv_head = tl.program_id(0) * QUERIES, foremost // GROUP
    asks, dims = first + tl.arange(0, QUERIES), tl.arange(0, DIM)
    real, sizes = asks < count, (kept, count)
    if WALK:
        where = (row, foremost, kv_head, first)
        states = _walk_all(queries, key_heads, value_heads, where, sizes, shape, DIM, MEMBERS, QUERIES, KEYS)
    for member in tl.static_range(MEMBERS):
        head = foremost + member
        place = ((row * count + asks).to(tl.int64) * (HEADS * DIM) + head * DIM)[:, None] + dims[None, :]
        if WALK:
            state = states[member]
        else:
            noted = log_sums + (row * HEADS + head).to(tl.int64) * count + asks
            state = _walked(out + place, noted, real, shape[2], QUERIES)
        if TILE > 0:
            asking = tl.load(sink_queries + place, mask=real[:, None], other=0.0)
            there = (row * (kept + count), kept + count, kv_head)
            state = _meet(state, asking, sink_heads, there, shape, kept + asks, HEADS // GROUP, DIM, TILE)
        if LOGITS:
            state = take_in_logit(state, tl.load(logits + head), shape[2], False)
        tl.store(out + place, (state[0] / state[1][:, None]).to(out.dtype.element_ty), mask=real[:, None])


def attend_arriving(packed: Packed, scoring: Scoring, walker: Walker) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attention of the new tokens over sinks and window."""
    standing, query, key, value = packed.standing, packed.query, packed.key, packed.value
    (batch, count, heads, width), kv_heads, logits = query.shape, key.shape[2], scoring.sink_logits
    cut, group = SHAPES[width], heads // kv_heads
    members = 1 if walker == "flash" or group % MEMBERS[width] else MEMBERS[width]
    with on(query.device):
        if walker == "flash":
            out, log_sums = flash.last_forward(query, key, value, standing.window, scoring.scale)
        else:
            out, log_sums = torch.empty_like(query), query
        if walker == "triton" or standing.sinks or logits is not None:
            _arrive[(triton.cdiv(count, cut.queries), heads // members, batch)](
                describe(query.flatten(0, 1), cut.queries), packed.sink_query,
                *(describe(part.flatten(0, 1), cut.keys) for part in (key, value)), (key, value), out, log_sums,
                query if logits is None else logits, (standing.sinks, standing.window, scoring.scale * LOG2E),
                standing.kept, count, HEADS=heads, GROUP=group, DIM=width, MEMBERS=members, QUERIES=cut.queries,
                KEYS=cut.keys, TILE=min(64, max(16, triton.next_power_of_2(standing.sinks))) if standing.sinks else 0,
                LOGITS=logits is not None, WALK=walker == "triton", num_warps=cut.warps,
                num_stages=cut.stages, maxnreg=cut.registers,
            )  # fmt: skip
    return out[..., : packed.head_dim].transpose(1, 2)
