"""What the kernel of a step reads from a ring and writes into it, in full precision or as int8.

A full ring is (keys, values), `[seats, kv_heads, capacity, head_dim]`. An int8 one (CODED) is (sink keys, key codes,
key scales, sink values, value codes, value scales): sinks in full, the window as codes times a scale of token and head.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def widen(words: Value, KIND: constexpr) -> Value:
    """Codes [slots, dims] as numbers, from words [slots, dims / 4] of four.

    Each byte, its sign bit flipped, becomes the end of a float32 of 2^23 and more, so that one subtraction is the whole
    conversion: Triton's own takes 8-bit numbers apart and together again around every loop.
    """
    flipped = words ^ -2139062144  # 0x80 in every byte
    first = _byte(flipped, 0).to(KIND)
    second = _byte(flipped, 8).to(KIND)
    third = _byte(flipped, 16).to(KIND)
    fourth = _byte(flipped, 24).to(KIND)
    joined = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(joined, [words.shape[0], 4 * words.shape[1]])


@jit
def _byte(words: Value, SHIFT: constexpr) -> Value:
    return (((words >> SHIFT) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@jit
def _read(
    ring: Value, pair: Value, column: Value, early: Value, late: Value, dims: Value, SINKS: constexpr,
    WINDOW: constexpr, DIM: constexpr, CODED: constexpr, WHICH: constexpr,
) -> Value:  # fmt: skip
    inside = (dims < DIM)[None, :]
    if CODED:
        place = pair * WINDOW + column - SINKS
        words = tl.arange(0, dims.shape[0] // 4)
        codes = ring[3 * WHICH + 1].to(tl.pointer_type(tl.int32)) + place[:, None] * (DIM // 4) + words[None, :]
        heads = tl.load(codes, mask=late[:, None] & (words < DIM // 4)[None, :], other=0)
        scales, front = tl.load(ring[3 * WHICH + 2] + place, mask=late, other=1.0), heads
        if early is not None:
            sinks = ring[3 * WHICH] + (pair * SINKS + column)[:, None] * DIM + dims[None, :]
            front = tl.load(sinks, mask=early[:, None] & inside, other=0.0)
    else:
        seen = late if early is None else late | early
        slots = ring[WHICH] + (pair * (SINKS + WINDOW) + column)[:, None] * DIM + dims[None, :]
        heads, scales, front = tl.load(slots, mask=seen[:, None] & inside, other=0.0), column, column
    return heads, scales, front


@jit
def read(
    ring: Value, pair: Value, column: Value, early: Value, late: Value, dims: Value, SINKS: constexpr,
    WINDOW: constexpr, DIM: constexpr, CODED: constexpr,
) -> Value:  # fmt: skip
    """The slots at `column` of one seat and head: keys [slots, dims], their scales, and sinks apart; values alike.

    Codes come as words of four (`widen`).

    Of sinks where `early` says so (None: no slot is a sink's), of the window where `late` does; zeros elsewhere.
    """
    values, value_scales, value_front = _read(
        ring, pair, column, early, late, dims, SINKS, WINDOW, DIM, CODED, 1
    )  # fmt: skip
    keys, key_scales, key_front = _read(ring, pair, column, early, late, dims, SINKS, WINDOW, DIM, CODED, 0)
    return keys, key_scales, key_front, values, value_scales, value_front


@jit
def _put(
    ring: Value, pair: Value, slot: Value, new: Value, dims: Value, mine: Value, SINKS: constexpr, WINDOW: constexpr,
    DIM: constexpr, CODED: constexpr, WHICH: constexpr,
) -> Value:  # fmt: skip
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


@jit
def put(
    ring: Value, pair: Value, slot: Value, key: Value, value: Value, dims: Value, mine: Value, SINKS: constexpr,
    WINDOW: constexpr, DIM: constexpr, CODED: constexpr,
) -> Value:  # fmt: skip
    """Write the new key and value [dims] into their slot if that is `mine` to do.

    Returns the key as the ring keeps it, its scale, and the value and its scale.
    """
    key, key_scale = _put(ring, pair, slot, key, dims, mine, SINKS, WINDOW, DIM, CODED, 0)
    value, value_scale = _put(ring, pair, slot, value, dims, mine, SINKS, WINDOW, DIM, CODED, 1)
    return key, key_scale, value, value_scale
