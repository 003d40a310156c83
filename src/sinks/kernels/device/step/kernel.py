"""The kernel of a step.

Everything that changes from token to token lives on the device: the position of each row, and with it slot, count and
phases. So one CUDA graph serves every position. The slots are split among programs; the first one has the new token in
registers and writes it, so nobody waits for that, and the last to arrive puts the parts together.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.kernels.device.step.angles import angles
from sinks.kernels.device.step.parts import fold, leave, write
from sinks.kernels.device.step.ring import put, read
from sinks.kernels.device.turn import partners


@jit
def _load(
    heads: Value, rows: Value, dims: Value, partner: Value, real: Value, norm: Value, DIM: constexpr,
    NORMED: constexpr,
) -> Value:  # fmt: skip
    """Heads at `rows` [rows, dims] and the same with every dimension's partner in its place, normed, in float32."""
    own = tl.load(heads + rows[:, None] + dims[None, :], mask=real, other=0.0)
    other = tl.load(heads + rows[:, None] + partner[None, :], mask=real, other=0.0)
    kind = own.dtype
    own, other = own.to(tl.float32), other.to(tl.float32)
    if NORMED > 0:
        weight, epsilon = norm
        inside = dims < DIM
        mine = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)[None, :]
        theirs = tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)[None, :]
        size = tl.rsqrt(tl.sum(own * own, 1) / DIM + epsilon)[:, None]
        if NORMED == 1:  # rounded before the weight and after it
            own = ((own * size).to(kind).to(tl.float32) * mine).to(kind).to(tl.float32)
            other = ((other * size).to(kind).to(tl.float32) * theirs).to(kind).to(tl.float32)
        else:
            own = (own * size * (1.0 + mine)).to(kind).to(tl.float32)
            other = (other * size * (1.0 + theirs)).to(kind).to(tl.float32)
    return own, other


@jit
def _product(query: Value, keys: Value, MATRIX: constexpr) -> Value:
    if MATRIX:
        return tl.dot(query, tl.trans(keys), input_precision="ieee")
    return tl.sum(query.to(tl.float32)[:, None, :] * keys.to(tl.float32)[None, :, :], 2)


@jit
def _take(
    state: Value, scores: Value, values: Value, scales: Value, first: Value, scale: Value, STATISTICS: constexpr,
    CODED: constexpr, MATRIX: constexpr,
) -> Value:  # fmt: skip
    """Fold scores [members, slots] in; `first` marks the slots whose mass is counted."""
    gathered, total, largest, weighed, mass = state
    now = tl.maximum(largest, tl.max(scores, 1))
    level = tl.where(now == float("-inf"), 0.0, now) * scale
    shrink = tl.exp2(largest * scale - level)
    weights = tl.exp2(scores * scale - level[:, None])
    if STATISTICS:
        weighed = weighed * shrink + tl.sum(weights * tl.maximum(scores, -1.0e30), 1)
        mass = mass * shrink + tl.sum(tl.where(first[None, :], weights, 0.0), 1)
    total = total * shrink + tl.sum(weights, 1)
    if CODED:
        weights = weights * scales[None, :]
    if MATRIX:
        gathered = tl.dot(weights.to(values.dtype), values, gathered * shrink[:, None], input_precision="ieee")
    else:
        added = tl.sum(weights[:, :, None] * values.to(tl.float32)[None, :, :], 1)
        gathered = gathered * shrink[:, None] + added
    return gathered, total, now, weighed, mass


@jit
def _attend(
    state: Value, queries: Value, tile: Value, column: Value, seen: Value, shape: Value, first: Value,
    STATISTICS: constexpr, CODED: constexpr, MATRIX: constexpr,
) -> Value:  # fmt: skip
    """Fold a tile of slots in: sinks meet the query of the position in the cache, the others that of the position."""
    keys, key_scales, values, value_scales = tile
    sinks, _, scale = shape
    scores = _product(queries[0], keys, MATRIX)
    if tl.min(column, 0) < sinks:
        scores = tl.where((column < sinks)[None, :], _product(queries[1], keys, MATRIX), scores)
    if CODED:
        scores = scores * key_scales[None, :]
    scores = tl.where(seen[None, :], scores, float("-inf"))
    return _take(state, scores, values, value_scales, column < first, scale, STATISTICS, CODED, MATRIX)


@jit
def step_kernel(
    new: Value, ring: Value, out: Value, figures: Value, partials: Value, arrivals: Value, positions: Value,
    seats: Value, turning: Value, logits: Value, norms: Value, shape: Value, sizes: Value, strides: Value,
    rotary: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, PADDED: constexpr, MEMBERS: constexpr,
    KEPT: constexpr, SLOTS: constexpr, SPLITS: constexpr, CHUNK: constexpr, INTERLEAVED: constexpr, SEATED: constexpr,
    TABLES: constexpr, NORMED: constexpr, LOGITS: constexpr, STATISTICS: constexpr, CODED: constexpr,
    MATRIX: constexpr, AHEAD: constexpr, OVERLAP: constexpr,
) -> None:  # fmt: skip
    """`new`: query, key, value; `sizes`: slots a split, first keys, start; `strides`: of rows and heads of the three.

    `turning`: steps, or tables. `norms`: weights for query and key, epsilon. AHEAD: a split is one tile, whose slots
    are read before anything else is known. OVERLAP: launched while the kernel before may still run.
    """
    part, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    sinks, window, scale = shape
    span, first, start = sizes
    seat = tl.maximum(tl.load(seats + row), 0).to(tl.int64) if SEATED else row.to(tl.int64)
    pair, low = seat * (HEADS // GROUP) + kv_head, part * span
    dims, member = tl.arange(0, PADDED), tl.arange(0, MEMBERS)
    held = (sinks, window)
    if AHEAD:
        column = low + tl.arange(0, SLOTS)
        there = column < sinks + window
        keys, key_scales = read(ring, pair, column, there, dims, held, DIM, CODED, 0)
        values, value_scales = read(ring, pair, column, there, dims, held, DIM, CODED, 1)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    now = tl.load(positions + row).to(tl.int64)
    mine, inside = (member < GROUP)[:, None], (dims < DIM)[None, :]
    writes = (part == 0) & (now >= 0)
    partner = partners(dims, rotary, INTERLEAVED)
    heads, one = row * strides[0] + (kv_head * GROUP + member) * strides[1], tl.arange(0, 1)
    own, other = _load(new[0], heads, dims, partner, mine & inside, (norms[0], norms[2]), DIM, NORMED)
    key_row, value_row = row * strides[2] + kv_head * strides[3] + one, row * strides[4] + kv_head * strides[5] + one
    key, key_other = _load(new[1], key_row, dims, partner, inside, (norms[1], norms[2]), DIM, NORMED)
    value = tl.load(new[2] + value_row[:, None] + dims[None, :], mask=inside, other=0.0)
    cos, sin = angles(turning, (row, now + start), dims, rotary, 0, INTERLEAVED, TABLES)
    in_cache = tl.minimum(now, sinks + window - 1) + start
    sink_cos, sink_sin = angles(turning, (row, in_cache), dims, rotary, 1, INTERLEAVED, TABLES)
    kind = ring[0].dtype.element_ty
    queries = ((own * cos + other * sin).to(kind), (own * sink_cos + other * sink_sin).to(kind))
    slot = tl.where(now < sinks, now, sinks + (now - sinks) % window)
    count = tl.minimum(now + 1, sinks + window).to(tl.int32)
    key = put(ring, pair, slot, key * cos + key_other * sin, dims, held, writes, DIM, CODED, 0)
    value = put(ring, pair, slot, value, dims, held, writes, DIM, CODED, 1)
    score = tl.where(writes, tl.sum(queries[0].to(tl.float32) * key, 1), float("-inf"))
    zeros = tl.zeros([MEMBERS], tl.float32)
    total = zeros + tl.where(writes, 1.0, 0.0)
    state = (
        tl.zeros([MEMBERS, PADDED], tl.float32) + tl.where(writes, value, 0.0), total, score,
        tl.where(writes, score, 0.0), tl.where(now < first, total, zeros),
    )  # fmt: skip
    if AHEAD:
        seen = (column < count) & (column != slot)
        # What nobody sees weighs nothing, but may be no number at all.
        values, value_scales = tl.where(seen[:, None], values, 0.0), tl.where(seen, value_scales, 0)
        tile = (keys, key_scales, values, value_scales)
        state = _attend(state, queries, tile, column, seen, shape, first, STATISTICS, CODED, MATRIX)
    else:
        for begin in tl.range(low, tl.minimum(low + span, count), SLOTS):
            column = begin + tl.arange(0, SLOTS)
            seen = (column < count) & (column != slot)
            keys, key_scales = read(ring, pair, column, seen, dims, held, DIM, CODED, 0)
            values, value_scales = read(ring, pair, column, seen, dims, held, DIM, CODED, 1)
            tile = (keys, key_scales, values, value_scales)
            state = _attend(state, queries, tile, column, seen, shape, first, STATISTICS, CODED, MATRIX)
    where = (row, kv_head, now)
    if SPLITS == 1:
        write(state, out, figures, logits, where, scale, HEADS, GROUP, DIM, PADDED, MEMBERS, LOGITS, STATISTICS)
    else:
        place = row * (HEADS // GROUP) + kv_head
        notes = tl.num_programs(2) * (HEADS // GROUP * SPLITS * KEPT * PADDED)
        leave(state, partials, place * SPLITS + part, notes, GROUP, PADDED, MEMBERS, KEPT)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + place, 1, sem="acq_rel") == SPLITS - 1:
            whole = fold(partials, place * SPLITS, notes, scale, GROUP, PADDED, KEPT, SPLITS, CHUNK)
            write(whole, out, figures, logits, where, scale, HEADS, GROUP, DIM, PADDED, KEPT, LOGITS, STATISTICS)
            tl.store(arrivals + place, 0)
