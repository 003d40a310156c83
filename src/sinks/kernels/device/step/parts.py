"""The parts of a row that programs leave behind, folded into one; and the result written.

A part is (accumulated values, sum, largest score, sum of weight times score, counted mass). Scores are products that
are not scaled yet: `scale` takes them to powers of two.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def leave(
    state: Value, partials: Value, number: Value, notes: Value, GROUP: constexpr, PADDED: constexpr,
    MEMBERS: constexpr, STATISTICS: constexpr,
) -> None:  # fmt: skip
    """Write part `number`: its values, and behind all values, at `notes`, its four figures."""
    member, dims = tl.arange(0, MEMBERS), tl.arange(0, PADDED)
    base = partials + (number * MEMBERS + member).to(tl.int64) * PADDED
    tl.store(base[:, None] + dims[None, :], state[0], mask=(member < GROUP)[:, None])
    for figure in tl.static_range(4 if STATISTICS else 2):
        tl.store(partials + notes + (number * 4 + figure) * MEMBERS + member, state[1 + figure], mask=member < GROUP)


@jit
def fold(
    partials: Value, first: Value, notes: Value, scale: Value, GROUP: constexpr, PADDED: constexpr,
    MEMBERS: constexpr, SPLITS: constexpr, STATISTICS: constexpr,
) -> Value:  # fmt: skip
    """SPLITS parts from `first` on as one.

    Every thread walks the parts for its own numbers: unrolled, so that all loads are under way at once, and without a
    word between threads.
    """
    member, dims = tl.arange(0, MEMBERS), tl.arange(0, PADDED)
    mine, noted = member < GROUP, partials + notes + first * (4 * MEMBERS) + member
    place = partials + ((first * MEMBERS + member).to(tl.int64) * PADDED)[:, None] + dims[None, :]
    zeros = tl.zeros([MEMBERS], tl.float32)
    gathered, total, weighed, mass = tl.zeros([MEMBERS, PADDED], tl.float32), zeros, zeros, zeros
    largest = zeros - float("inf")
    for number in tl.static_range(SPLITS):
        top = tl.load(noted + (4 * number + 1) * MEMBERS, mask=mine, other=float("-inf"), cache_modifier=".cg")
        largest = tl.maximum(largest, top)
    level = tl.where(largest == float("-inf"), 0.0, largest) * scale
    for number in tl.static_range(SPLITS):
        note = noted + 4 * number * MEMBERS
        values = tl.load(place + number * MEMBERS * PADDED, mask=mine[:, None], other=0.0, cache_modifier=".cg")
        top = tl.load(note + MEMBERS, mask=mine, other=float("-inf"), cache_modifier=".cg")
        share = tl.exp2(top * scale - level)
        gathered += values * share[:, None]
        total += tl.load(note, mask=mine, other=0.0, cache_modifier=".cg") * share
        if STATISTICS:
            weighed += tl.load(note + 2 * MEMBERS, mask=mine, other=0.0, cache_modifier=".cg") * share
            mass += tl.load(note + 3 * MEMBERS, mask=mine, other=0.0, cache_modifier=".cg") * share
    return gathered, total, largest, weighed, mass


@jit
def write(
    state: Value, out: Value, figures: Value, logits: Value, where: Value, scale: Value, HEADS: constexpr,
    GROUP: constexpr, DIM: constexpr, PADDED: constexpr, MEMBERS: constexpr, LOGITS: constexpr,
    STATISTICS: constexpr,
) -> None:  # fmt: skip
    """Take the sink logit in, and write the result of the query heads of one row and key head, and its statistics."""
    gathered, total, largest, weighed, mass = state
    row, kv_head, now = where
    member, dims = tl.arange(0, MEMBERS), tl.arange(0, PADDED)
    head, mine = kv_head * GROUP + member, member < GROUP
    alive = mine & (now >= 0)  # a row that takes no part gives zeros
    total, largest = tl.where(alive, total, 1.0), tl.where(alive, largest, 0.0)
    peak = largest
    if LOGITS:
        logit = tl.load(logits + head, mask=mine, other=0.0).to(tl.float32) * 1.4426950408889634 / scale
        top = tl.maximum(largest, logit)
        shrink, weight = tl.exp2((largest - top) * scale), tl.exp2((logit - top) * scale)
        total, mass = total * shrink + weight, mass * shrink
        weighed = weighed * shrink + weight * tl.maximum(logit, -1.0e30)
        gathered, largest = gathered * shrink[:, None], top
    place = ((row * HEADS + head) * DIM)[:, None] + dims[None, :]
    result = tl.where(alive[:, None], gathered / total[:, None], 0.0)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mine[:, None] & (dims < DIM)[None, :])
    if STATISTICS:
        noted, step = figures + row * HEADS + head, tl.num_programs(2) * HEADS
        log_sum = largest * scale + tl.log2(total)
        entropy = tl.maximum(log_sum - weighed / total * scale, 0.0) * 0.6931471805599453
        tl.store(noted, tl.where(alive, log_sum * 0.6931471805599453, 0.0), mask=mine)
        tl.store(noted + step, tl.where(alive, mass / total, 0.0), mask=mine)
        tl.store(noted + 2 * step, tl.where(alive, entropy, 0.0), mask=mine)
        tl.store(noted + 3 * step, tl.where(alive, tl.exp2(peak * scale - log_sum), 0.0), mask=mine)
