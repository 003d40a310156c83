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
def _arrive(
    new: Value, turning: Value, norms: Value, where: Value, sizes: Value, strides: Value, rotary: Value,
    GROUP: constexpr, DIM: constexpr, PADDED: constexpr, MEMBERS: constexpr, INTERLEAVED: constexpr,
    TABLES: constexpr, NORMED: constexpr,
) -> Value:  # fmt: skip
    """The query by the position and by that in the cache [members, dims], the key and the value [1, dims]."""
    row, kv_head, now = where
    capacity, start = sizes
    dims, member, one = tl.arange(0, PADDED), tl.arange(0, MEMBERS), tl.arange(0, 1)
    mine, inside, partner = (member < GROUP)[:, None], (dims < DIM)[None, :], partners(dims, rotary, INTERLEAVED)
    heads = row * strides[0] + (kv_head * GROUP + member) * strides[1]
    own, other = _load(new[0], heads, dims, partner, mine & inside, (norms[0], norms[2]), DIM, NORMED)
    key_row, value_row = row * strides[2] + kv_head * strides[3] + one, row * strides[4] + kv_head * strides[5] + one
    key, key_other = _load(new[1], key_row, dims, partner, inside, (norms[1], norms[2]), DIM, NORMED)
    value = tl.load(new[2] + value_row[:, None] + dims[None, :], mask=inside, other=0.0)
    cos, sin = angles(turning, (row, now + start), dims, rotary, 0, INTERLEAVED, TABLES)
    in_cache = tl.minimum(now, capacity - 1) + start
    sink_cos, sink_sin = angles(turning, (row, in_cache), dims, rotary, 1, INTERLEAVED, TABLES)
    return own * cos + other * sin, own * sink_cos + other * sink_sin, key * cos + key_other * sin, value


@jit
def _begin(query: Value, key: Value, value: Value, now: Value, first: Value, writes: Value) -> Value:
    """The new token alone where this program `writes` it; nothing otherwise."""
    score = tl.sum(query.to(tl.float32) * key, 1)
    total = score * 0.0 + tl.where(writes, 1.0, 0.0)
    gathered = query.to(tl.float32) * 0.0 + tl.where(writes, value, 0.0)
    mass = tl.where(now < first, total, 0.0)
    return gathered, total, tl.where(writes, score, float("-inf")), tl.where(writes, score, 0.0), mass


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
    pair, low, held = seat * (HEADS // GROUP) + kv_head, part * span, (sinks, window)
    dims = tl.arange(0, PADDED)
    if AHEAD:
        column = low + tl.arange(0, SLOTS)
        tile = read(ring, pair, column, column < sinks + window, dims, held, DIM, CODED)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    now = tl.load(positions + row).to(tl.int64)
    slot, writes = tl.where(now < sinks, now, sinks + (now - sinks) % window), (part == 0) & (now >= 0)
    count = tl.minimum(now + 1, sinks + window).to(tl.int32)
    query, sink_query, key, value = _arrive(
        new, turning, norms, (row, kv_head, now), (sinks + window, start), strides, rotary, GROUP, DIM, PADDED,
        MEMBERS, INTERLEAVED, TABLES, NORMED,
    )  # fmt: skip
    kind = ring[0].dtype.element_ty
    queries = (query.to(kind), sink_query.to(kind))
    key = put(ring, pair, slot, key, dims, held, writes, DIM, CODED, 0)
    value = put(ring, pair, slot, value, dims, held, writes, DIM, CODED, 1)
    state = _begin(queries[0], key, value, now, first, writes)
    if AHEAD:
        seen = (column < count) & (column != slot)
        # What nobody sees weighs nothing, but may be no number at all.
        tile = (tile[0], tile[1], tl.where(seen[:, None], tile[2], 0.0), tl.where(seen, tile[3], 0))
        state = _attend(state, queries, tile, column, seen, shape, first, STATISTICS, CODED, MATRIX)
    else:
        for begin in tl.range(low, tl.minimum(low + span, count), SLOTS):
            column = begin + tl.arange(0, SLOTS)
            seen = (column < count) & (column != slot)
            tile = read(ring, pair, column, seen, dims, held, DIM, CODED)
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
