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
    MEMBERS: constexpr, KEPT: constexpr, STATISTICS: constexpr,
) -> None:  # fmt: skip
    """Write part `number`: KEPT rows of values, and behind all values, at `notes`, its four figures."""
    member, dims = tl.arange(0, MEMBERS), tl.arange(0, PADDED)
    base = partials + (number * KEPT + member).to(tl.int64) * PADDED
    tl.store(base[:, None] + dims[None, :], state[0], mask=(member < GROUP)[:, None])
    for figure in tl.static_range(4 if STATISTICS else 2):
        tl.store(partials + notes + (number * 4 + figure) * KEPT + member, state[1 + figure], mask=member < GROUP)


@jit
def fold(
    partials: Value, first: Value, notes: Value, scale: Value, GROUP: constexpr, PADDED: constexpr, KEPT: constexpr,
    SPLITS: constexpr, CHUNK: constexpr, STATISTICS: constexpr,
) -> Value:  # fmt: skip
    """SPLITS parts from `first` on as one, CHUNK of them loaded at once."""
    member, dims = tl.arange(0, KEPT), tl.arange(0, PADDED)
    zeros = tl.zeros([KEPT], tl.float32)
    gathered, total, weighed, mass = tl.zeros([KEPT, PADDED], tl.float32), zeros, zeros, zeros
    largest = zeros - float("inf")
    for begin in tl.static_range(0, SPLITS, CHUNK):
        number = begin + tl.arange(0, CHUNK)
        real = (number < SPLITS)[:, None] & (member < GROUP)[None, :]
        place = partials + ((first + number)[:, None] * KEPT + member[None, :]).to(tl.int64)[:, :, None] * PADDED
        values = tl.load(place + dims[None, None, :], mask=real[:, :, None], other=0.0, cache_modifier=".cg")
        noted = partials + notes + (first + number)[:, None] * (4 * KEPT) + member[None, :]
        totals = tl.load(noted, mask=real, other=0.0, cache_modifier=".cg")
        tops = tl.load(noted + KEPT, mask=real, other=float("-inf"), cache_modifier=".cg")
        top = tl.maximum(largest, tl.max(tops, 0))
        level = tl.where(top == float("-inf"), 0.0, top) * scale
        kept, added = tl.exp2(largest * scale - level), tl.exp2(tops * scale - level[None, :])
        gathered = gathered * kept[:, None] + tl.sum(values * added[:, :, None], 0)
        total = total * kept + tl.sum(totals * added, 0)
        if STATISTICS:
            weigheds = tl.load(noted + 2 * KEPT, mask=real, other=0.0, cache_modifier=".cg")
            masses = tl.load(noted + 3 * KEPT, mask=real, other=0.0, cache_modifier=".cg")
            weighed = weighed * kept + tl.sum(weigheds * added, 0)
            mass = mass * kept + tl.sum(masses * added, 0)
        largest = top
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
    alive = now >= 0  # a row that takes no part gives zeros
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
    result = tl.where(alive, gathered / total[:, None], 0.0)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mine[:, None] & (dims < DIM)[None, :])
    if STATISTICS:
        noted, step = figures + row * HEADS + head, tl.num_programs(2) * HEADS
        log_sum = largest * scale + tl.log2(total)
        entropy = tl.maximum(log_sum - weighed / total * scale, 0.0) * 0.6931471805599453
        tl.store(noted, tl.where(alive, log_sum * 0.6931471805599453, 0.0), mask=mine)
        tl.store(noted + step, tl.where(alive, mass / total, 0.0), mask=mine)
        tl.store(noted + 2 * step, tl.where(alive, entropy, 0.0), mask=mine)
        tl.store(noted + 3 * step, tl.where(alive, tl.exp2(peak * scale - log_sum), 0.0), mask=mine)
