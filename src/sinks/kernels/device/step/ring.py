"""What the kernel of a step reads from a ring and writes into it, in full precision or as int8.

A full ring is (keys, values), `[seats, kv_heads, capacity, head_dim]`. An int8 one (CODED) is (sink keys, key codes, key
scales, sink values, value codes, value scales): sinks in full, the window as codes times one scale a token and head.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def _read(
    ring: Value, pair: Value, column: Value, seen: Value, dims: Value, SINKS: constexpr, WINDOW: constexpr,
    DIM: constexpr, CODED: constexpr, WHICH: constexpr,
) -> Value:  # fmt: skip
    inside = (dims < DIM)[None, :]
    if CODED:
        recent = column - SINKS
        coded, place = seen & (recent >= 0), pair * WINDOW + recent
        codes = ring[3 * WHICH + 1] + place[:, None] * DIM + dims[None, :]
        heads = tl.load(codes, mask=coded[:, None] & inside, other=0).to(ring[0].dtype.element_ty)
        scales = tl.load(ring[3 * WHICH + 2] + place, mask=coded, other=1.0)
        if tl.min(column, 0) < SINKS:
            early = seen & (recent < 0)
            front = ring[3 * WHICH] + (pair * SINKS + column)[:, None] * DIM + dims[None, :]
            heads = tl.where(early[:, None], tl.load(front, mask=early[:, None] & inside, other=0.0), heads)
    else:
        slots = ring[WHICH] + (pair * (SINKS + WINDOW) + column)[:, None] * DIM + dims[None, :]
        heads, scales = tl.load(slots, mask=seen[:, None] & inside, other=0.0), column
    return heads, scales


@jit
def read(
    ring: Value, pair: Value, column: Value, seen: Value, dims: Value, SINKS: constexpr, WINDOW: constexpr,
    DIM: constexpr, CODED: constexpr,
) -> Value:  # fmt: skip
    """The slots at `column` of one seat and head: keys [slots, dims] and their scales, values and theirs."""
    # Values first: Triton changes the layout of keys as soon as it has asked for them, and waits.
    values, value_scales = _read(ring, pair, column, seen, dims, SINKS, WINDOW, DIM, CODED, 1)
    keys, key_scales = _read(ring, pair, column, seen, dims, SINKS, WINDOW, DIM, CODED, 0)
    return keys, key_scales, values, value_scales


@jit
def put(
    ring: Value, pair: Value, slot: Value, new: Value, dims: Value, mine: Value, SINKS: constexpr, WINDOW: constexpr,
    DIM: constexpr, CODED: constexpr, WHICH: constexpr,
) -> Value:  # fmt: skip
    """Write the new key or value [1, dims] into its slot if it is `mine` to do; as the ring keeps it, in float32."""
    inside = (dims < DIM)[None, :] & mine
    new = new.to(ring[0].dtype.element_ty)
    kept = new.to(tl.float32)
    if CODED:
        early = slot < SINKS
        tl.store(ring[3 * WHICH] + (pair * SINKS + slot) * DIM + dims[None, :], new, mask=inside & early)
        # What is not finite leaves a scale that is not either: times zero it is NaN.
        scale = tl.div_rn(tl.max(tl.abs(kept), 1), tl.full([1], 127.0, tl.float32)) + tl.sum(kept * 0.0, 1)
        codes = tl.div_rn(kept, tl.where(scale > 0, scale, 1.0)[:, None] + kept * 0.0)
        codes = (codes + 12582912.0) - 12582912.0  # to the nearest whole number, ties to the even one
        place, late = pair * WINDOW + slot - SINKS, inside & (slot >= SINKS)
        tl.store(ring[3 * WHICH + 1] + place * DIM + dims[None, :], codes.to(tl.int8), mask=late)
        only = tl.arange(0, 1)
        tl.store(ring[3 * WHICH + 2] + place + only, scale, mask=(only == 0) & mine & (slot >= SINKS))
        kept = tl.where(early, kept, codes * scale[:, None])
    else:
        tl.store(ring[WHICH] + (pair * (SINKS + WINDOW) + slot) * DIM + dims[None, :], new, mask=inside)
    return kept
