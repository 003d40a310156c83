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
    ring: Value, pair: Value, column: Value, early: Value, late: Value, dims: Value, SINKS: constexpr,
    WINDOW: constexpr, DIM: constexpr, CODED: constexpr, WHICH: constexpr,
) -> Value:  # fmt: skip
    inside = (dims < DIM)[None, :]
    if CODED:
        place = pair * WINDOW + column - SINKS
        codes = ring[3 * WHICH + 1] + place[:, None] * DIM + dims[None, :]
        heads = tl.load(codes, mask=late[:, None] & inside, other=0).to(ring[0].dtype.element_ty)
        scales = tl.load(ring[3 * WHICH + 2] + place, mask=late, other=1.0)
        if early is not None:
            front = ring[3 * WHICH] + (pair * SINKS + column)[:, None] * DIM + dims[None, :]
            heads = tl.where(early[:, None], tl.load(front, mask=early[:, None] & inside, other=0.0), heads)
    else:
        seen = late if early is None else late | early
        slots = ring[WHICH] + (pair * (SINKS + WINDOW) + column)[:, None] * DIM + dims[None, :]
        heads, scales = tl.load(slots, mask=seen[:, None] & inside, other=0.0), column
    return heads, scales


@jit
def read(
    ring: Value, pair: Value, column: Value, early: Value, late: Value, dims: Value, SINKS: constexpr,
    WINDOW: constexpr, DIM: constexpr, CODED: constexpr,
) -> Value:  # fmt: skip
    """The slots at `column` of one seat and head: keys [slots, dims] and their scales, values and theirs.

    Of sinks where `early` says so (None: no slot is a sink's), of the window where `late` does; zeros elsewhere.
    """
    values, value_scales = _read(ring, pair, column, early, late, dims, SINKS, WINDOW, DIM, CODED, 1)
    keys, key_scales = _read(ring, pair, column, early, late, dims, SINKS, WINDOW, DIM, CODED, 0)
    return keys, key_scales, values, value_scales


@jit
def put(
    ring: Value, pair: Value, slot: Value, new: Value, dims: Value, mine: Value, SINKS: constexpr, WINDOW: constexpr,
    DIM: constexpr, CODED: constexpr, WHICH: constexpr,
) -> Value:  # fmt: skip
    """Write the new key or value [dims] into its slot if it is `mine` to do; as the ring keeps it, and its scale."""
    inside = (dims < DIM) & mine
    kept = new.to(ring[0].dtype.element_ty)
    scale = 1.0
    if CODED:
        early = slot < SINKS
        tl.store(ring[3 * WHICH] + (pair * SINKS + slot) * DIM + dims, kept, mask=inside & early)
        wide = kept.to(tl.float32)
        # What is not finite leaves a scale that is not either: times zero it is NaN.
        scale = tl.div_rn(tl.max(tl.abs(wide), 0), 127.0) + tl.sum(wide * 0.0, 0)
        codes = tl.div_rn(wide, tl.where(scale > 0, scale, 1.0) + wide * 0.0)
        codes = (codes + 12582912.0) - 12582912.0  # to the nearest whole number, ties to the even one
        place, late = pair * WINDOW + slot - SINKS, slot >= SINKS
        tl.store(ring[3 * WHICH + 1] + place * DIM + dims, codes.to(tl.int8), mask=inside & late)
        tl.store(ring[3 * WHICH + 2] + place, scale, mask=mine & late)
        kept, scale = tl.where(early, kept, codes.to(kept.dtype)), tl.where(early, 1.0, scale)
    else:
        tl.store(ring[WHICH] + (pair * (SINKS + WINDOW) + slot) * DIM + dims, kept, mask=inside)
    return kept, scale
