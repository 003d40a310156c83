"""The kernel of a step.

Everything that changes from token to token lives on the device: the position of each row, and with it slot, count and
phases. So one CUDA graph serves every position. The slots are split among programs; the first one has the new token in
registers and writes it, so nobody waits for that, and the last to arrive puts the parts together.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.kernels.device.step.angles import angles, fetch, pairs_of
from sinks.kernels.device.step.parts import fold, leave, write
from sinks.kernels.device.step.ring import put, read


@jit
def _norm(
    head: Value, weight: Value, epsilon: Value, partner: Value, dims: Value, DIM: constexpr, NORMED: constexpr
) -> Value:
    """`head` is own and partner's numbers; both normed, in float32. NORMED: 0 not, 1 as Qwen 3, 2 as Gemma 3."""
    own, other = head
    kind = own.dtype
    own, other = own.to(tl.float32), other.to(tl.float32)
    if NORMED > 0:
        mine = tl.load(weight + dims, mask=dims < DIM, other=0.0).to(tl.float32)[None, :]
        theirs = tl.load(weight + partner, mask=dims < DIM, other=0.0).to(tl.float32)[None, :]
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
    state: Value, queries: Value, tile: Value, column: Value, seen: Value, scale: Value, SINKS: constexpr,
    FIRST: constexpr, STATISTICS: constexpr, CODED: constexpr, MATRIX: constexpr,
) -> Value:  # fmt: skip
    """Fold a tile of slots in: sinks meet the query of the position in the cache, the others that of the position."""
    keys, key_scales, values, value_scales = tile
    scores = _product(queries[0], keys, MATRIX)
    if tl.min(column, 0) < SINKS:
        scores = tl.where((column < SINKS)[None, :], _product(queries[1], keys, MATRIX), scores)
    if CODED:
        scores = scores * key_scales[None, :]
    scores = tl.where(seen[None, :], scores, float("-inf"))
    return _take(state, scores, values, value_scales, column < FIRST, scale, STATISTICS, CODED, MATRIX)


@jit
def _fetch_new(
    new: Value, row: Value, kv_head: Value, strides: Value, partner: Value, GROUP: constexpr, DIM: constexpr,
    PADDED: constexpr, MEMBERS: constexpr,
) -> Value:  # fmt: skip
    """The new token as it came: query and key, own and partner's, and the value; before anything is computed."""
    dims, member, one = tl.arange(0, PADDED), tl.arange(0, MEMBERS), tl.arange(0, 1)
    inside = (dims < DIM)[None, :]
    mine = (member < GROUP)[:, None] & inside
    query = new[0] + (row * strides[0] + (kv_head * GROUP + member) * strides[1])[:, None]
    key = new[1] + (row * strides[2] + kv_head * strides[3] + one)[:, None]
    value = new[2] + (row * strides[4] + kv_head * strides[5] + one)[:, None] + dims[None, :]
    return (
        tl.load(query + dims[None, :], mask=mine, other=0.0), tl.load(query + partner[None, :], mask=mine, other=0.0),
        tl.load(key + dims[None, :], mask=inside, other=0.0), tl.load(key + partner[None, :], mask=inside, other=0.0),
        tl.load(value, mask=inside, other=0.0),
    )  # fmt: skip


@jit
def _begin(query: Value, key: Value, value: Value, now: Value, writes: Value, FIRST: constexpr) -> Value:
    """The new token alone where this program `writes` it; nothing otherwise."""
    score = tl.sum(query.to(tl.float32) * key, 1)
    total = score * 0.0 + tl.where(writes, 1.0, 0.0)
    gathered = query.to(tl.float32) * 0.0 + tl.where(writes, value, 0.0)
    mass = tl.where(now < FIRST, total, 0.0)
    return gathered, total, tl.where(writes, score, float("-inf")), tl.where(writes, score, 0.0), mass


@jit
def step_kernel(
    new: Value, ring: Value, out: Value, figures: Value, partials: Value, arrivals: Value, positions: Value,
    seats: Value, turning: Value, logits: Value, norms: Value, scale: Value, start: Value, strides: Value,
    HEADS: constexpr, GROUP: constexpr, DIM: constexpr, PADDED: constexpr, MEMBERS: constexpr, KEPT: constexpr,
    SINKS: constexpr, WINDOW: constexpr, FIRST: constexpr, SPAN: constexpr, SLOTS: constexpr, SPLITS: constexpr,
    CHUNK: constexpr, TURNED: constexpr, PAIRS: constexpr, INTERLEAVED: constexpr, SEATED: constexpr,
    TABLES: constexpr, NORMED: constexpr, LOGITS: constexpr, STATISTICS: constexpr, CODED: constexpr,
    MATRIX: constexpr, AHEAD: constexpr, OVERLAP: constexpr,
) -> None:  # fmt: skip
    """`new`: query, key, value; `strides`: of rows and heads of the three. `turning`: steps, or tables.

    `norms`: weights for query and key, epsilon. SPAN slots a split; mass is counted on FIRST keys; PAIRS dimensions
    are turned from TURNED on. AHEAD: a split is one tile, whose slots are read before the position is known. OVERLAP:
    launched while the kernel before may still run.
    """
    part, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    seat = tl.maximum(tl.load(seats + row), 0).to(tl.int64) if SEATED else row.to(tl.int64)
    pair, low, dims = seat * (HEADS // GROUP) + kv_head, part * SPAN, tl.arange(0, PADDED)
    column = low + tl.arange(0, SLOTS)
    if AHEAD and OVERLAP:
        tile = read(ring, pair, column, column < SINKS + WINDOW, dims, SINKS, WINDOW, DIM, CODED)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    # All that waits for memory is asked for first; the slots last, for they are many.
    now = tl.load(positions + row).to(tl.int64)
    turn = pairs_of(dims, TURNED, PAIRS, INTERLEAVED)
    own, other, key, key_other, value = _fetch_new(new, row, kv_head, strides, turn[3], GROUP, DIM, PADDED, MEMBERS)
    fetched = fetch(turning, row, turn, PAIRS, TABLES)
    if AHEAD and not OVERLAP:
        tile = read(ring, pair, column, column < SINKS + WINDOW, dims, SINKS, WINDOW, DIM, CODED)
    own, other = _norm((own, other), norms[0], norms[2], turn[3], dims, DIM, NORMED)
    key, key_other = _norm((key, key_other), norms[1], norms[2], turn[3], dims, DIM, NORMED)
    in_cache = tl.minimum(now, SINKS + WINDOW - 1) + start
    cos, sin, sink_cos, sink_sin = angles(fetched, turn, now + start, in_cache, TABLES)
    kind = ring[0].dtype.element_ty
    queries = ((own * cos + other * sin).to(kind), (own * sink_cos + other * sink_sin).to(kind))
    slot, writes = tl.where(now < SINKS, now, SINKS + (now - SINKS) % WINDOW), (part == 0) & (now >= 0)
    key = put(ring, pair, slot, key * cos + key_other * sin, dims, writes, SINKS, WINDOW, DIM, CODED, 0)
    value = put(ring, pair, slot, value, dims, writes, SINKS, WINDOW, DIM, CODED, 1)
    state = _begin(queries[0], key, value, now, writes, FIRST)
    count, slot = tl.minimum(now + 1, SINKS + WINDOW).to(tl.int32), slot.to(tl.int32)
    if AHEAD:
        seen = (column < count) & (column != slot)
        # What nobody sees weighs nothing, but may be no number at all.
        tile = (tile[0], tile[1], tl.where(seen[:, None], tile[2], 0.0), tl.where(seen, tile[3], 0))
        state = _attend(state, queries, tile, column, seen, scale, SINKS, FIRST, STATISTICS, CODED, MATRIX)
    else:
        for begin in tl.range(low, tl.minimum(low + SPAN, count), SLOTS):
            column = begin + tl.arange(0, SLOTS)
            seen = (column < count) & (column != slot)
            tile = read(ring, pair, column, seen, dims, SINKS, WINDOW, DIM, CODED)
            state = _attend(state, queries, tile, column, seen, scale, SINKS, FIRST, STATISTICS, CODED, MATRIX)
    where = (row, kv_head, now)
    if SPLITS == 1:
        write(state, out, figures, logits, where, scale, HEADS, GROUP, DIM, PADDED, MEMBERS, LOGITS, STATISTICS)
    else:
        place = row * (HEADS // GROUP) + kv_head
        notes = tl.num_programs(2) * (HEADS // GROUP * SPLITS * KEPT * PADDED)
        leave(state, partials, place * SPLITS + part, notes, GROUP, PADDED, MEMBERS, KEPT, STATISTICS)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + place, 1, sem="acq_rel") == SPLITS - 1:
            whole = fold(partials, place * SPLITS, notes, scale, GROUP, PADDED, KEPT, SPLITS, CHUNK, STATISTICS)
            write(whole, out, figures, logits, where, scale, HEADS, GROUP, DIM, PADDED, KEPT, LOGITS, STATISTICS)
            tl.store(arrivals + place, 0)
