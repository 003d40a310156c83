"""The kernel of a step.

Everything that changes from token to token lives on the device: the position of each row, and with it slot, count and
phases. So one CUDA graph serves every position. The slots are split among programs; the first one has the new token in
registers and writes it, so nobody waits for that, and the last to arrive puts the parts together.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.kernels.device.step.angles import angle, fetch, pairs_of
from sinks.kernels.device.step.parts import fold, leave, write
from sinks.kernels.device.step.ring import put, read


@jit
def _norm(
    own: Value, other: Value, weight: Value, epsilon: Value, partner: Value, dims: Value, DIM: constexpr,
    NORMED: constexpr, AXIS: constexpr,
) -> Value:  # fmt: skip
    """Own and partner's numbers normed, in float32. NORMED: 0 not at all, 1 as Qwen 3, 2 as Gemma 3."""
    kind = own.dtype
    own, other = own.to(tl.float32), other.to(tl.float32)
    if NORMED > 0:
        mine = tl.load(weight + dims, mask=dims < DIM, other=0.0).to(tl.float32)
        theirs = tl.load(weight + partner, mask=dims < DIM, other=0.0).to(tl.float32)
        size = tl.rsqrt(tl.sum(own * own, AXIS, keep_dims=AXIS == 1) / DIM + epsilon)
        if NORMED == 1:  # rounded before the weight and after it
            own = ((own * size).to(kind).to(tl.float32) * mine).to(kind).to(tl.float32)
            other = ((other * size).to(kind).to(tl.float32) * theirs).to(kind).to(tl.float32)
        else:
            own = (own * size * (1.0 + mine)).to(kind).to(tl.float32)
            other = (other * size * (1.0 + theirs)).to(kind).to(tl.float32)
    return own, other


@jit
def _attend(
    state: Value, query: Value, tile: Value, seen: Value, first: Value, scale: Value, STATISTICS: constexpr,
    CODED: constexpr,
) -> Value:  # fmt: skip
    """Fold a tile of slots in, those that are `seen`; `first` marks the ones whose mass is counted."""
    gathered, total, largest, weighed, mass = state
    keys, key_scales, values, value_scales = tile
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if CODED:
        scores = scores * key_scales[None, :]
    scores = tl.where(seen[None, :], scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    level = tl.where(now == float("-inf"), 0.0, now) * scale
    shrink = tl.exp2(largest * scale - level)
    weights = tl.exp2(scores * scale - level[:, None])
    if STATISTICS:
        weighed = weighed * shrink + tl.sum(weights * tl.maximum(scores, -1.0e30), 1)
        mass = mass * shrink + tl.sum(tl.where(first[None, :], weights, 0.0), 1)
    total = total * shrink + tl.sum(weights, 1)
    if CODED:
        weights = weights * value_scales[None, :]
    gathered = tl.dot(weights.to(values.dtype), values, gathered * shrink[:, None], input_precision="ieee")
    return gathered, total, now, weighed, mass


@jit
def _walk(
    state: Value, query: Value, ring: Value, pair: Value, bounds: Value, slot: Value, dims: Value, scale: Value,
    SINKS: constexpr, WINDOW: constexpr, FIRST: constexpr, DIM: constexpr, SLOTS: constexpr, EARLY: constexpr,
    STATISTICS: constexpr, CODED: constexpr,
) -> Value:  # fmt: skip
    """Fold in the slots from bounds[0] up to bounds[1], but for the new token's: sinks (EARLY) or the window's."""
    for begin in tl.range(bounds[0], bounds[1], SLOTS, num_stages=1 if EARLY else None):
        column = begin + tl.arange(0, SLOTS)
        seen = (column < bounds[1]) & (column != slot)
        if EARLY:
            tile = read(ring, pair, column, seen, seen & False, dims, SINKS, WINDOW, DIM, CODED)
        else:
            tile = read(ring, pair, column, None, seen, dims, SINKS, WINDOW, DIM, CODED)
        state = _attend(state, query, tile, seen, column < FIRST, scale, STATISTICS, CODED)
    return state


@jit
def _fetch_new(
    new: Value, row: Value, kv_head: Value, strides: Value, partner: Value, GROUP: constexpr, DIM: constexpr,
    PADDED: constexpr, MEMBERS: constexpr,
) -> Value:  # fmt: skip
    """The new token as it came: query [members, dims] and key [dims], own and partner's numbers, and the value."""
    dims, member = tl.arange(0, PADDED), tl.arange(0, MEMBERS)
    inside = dims < DIM
    mine = (member < GROUP)[:, None] & inside[None, :]
    query = new[0] + (row * strides[0] + (kv_head * GROUP + member) * strides[1])[:, None]
    key = new[1] + row * strides[2] + kv_head * strides[3]
    value = new[2] + row * strides[4] + kv_head * strides[5] + dims
    return (
        tl.load(query + dims[None, :], mask=mine, other=0.0), tl.load(query + partner[None, :], mask=mine, other=0.0),
        tl.load(key + dims, mask=inside, other=0.0), tl.load(key + partner, mask=inside, other=0.0),
        tl.load(value, mask=inside, other=0.0),
    )  # fmt: skip


@jit
def _known(values: Value, now: Value) -> Value:
    """`values` of a row that takes part, zeros otherwise.

    Nothing can be done with them before the position is known: else Triton would move them between threads as soon as
    they are asked for, and wait for each in turn.
    """
    known = ()
    for index in tl.static_range(len(values)):
        known = known + (tl.where(now >= 0, values[index], 0),)
    return known


@jit
def _begin(query: Value, fresh: Value, now: Value, writes: Value, FIRST: constexpr) -> Value:
    """The new token alone where this program `writes` it; nothing otherwise."""
    key, key_scale, value, value_scale = fresh
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * key_scale
    total = score * 0.0 + tl.where(writes, 1.0, 0.0)
    gathered = query.to(tl.float32) * 0.0 + tl.where(writes, value.to(tl.float32) * value_scale, 0.0)[None, :]
    mass = tl.where(now < FIRST, total, 0.0)
    return gathered, total, tl.where(writes, score, float("-inf")), tl.where(writes, score, 0.0), mass


@jit
def _with_new(tile: Value, fresh: Value, here: Value, seen: Value, CODED: constexpr) -> Value:
    """A tile that was read before the position was known: the new token is `here`, and zeros are where none is seen.

    What nobody sees would weigh nothing, but may be no number at all.
    """
    keys = tl.where(here[:, None], fresh[0][None, :], tl.where(seen[:, None], tile[0], 0.0))
    values = tl.where(here[:, None], fresh[2][None, :], tl.where(seen[:, None], tile[2], 0.0))
    key_scales, value_scales = tile[1], tile[3]
    if CODED:
        key_scales = tl.where(here, fresh[1], key_scales)
        value_scales = tl.where(here, fresh[3], tl.where(seen, value_scales, 0.0))
    return keys, key_scales, values, value_scales


@jit
def step_kernel(
    new: Value, ring: Value, out: Value, figures: Value, partials: Value, arrivals: Value, positions: Value,
    seats: Value, turning: Value, logits: Value, norms: Value, scale: Value, start: Value, strides: Value,
    HEADS: constexpr, GROUP: constexpr, DIM: constexpr, PADDED: constexpr, MEMBERS: constexpr, SINKS: constexpr,
    WINDOW: constexpr, FIRST: constexpr, APART: constexpr, SPAN: constexpr, SLOTS: constexpr, SPLITS: constexpr,
    TURNED: constexpr, PAIRS: constexpr, INTERLEAVED: constexpr, SEATED: constexpr,
    TABLES: constexpr, NORMED: constexpr, LOGITS: constexpr, STATISTICS: constexpr, CODED: constexpr,
    AHEAD: constexpr, OVERLAP: constexpr,
) -> None:  # fmt: skip
    """`new`: query, key, value; `strides`: of rows and heads of the three. `turning`: steps, or tables.

    `norms`: weights for query and key, epsilon. SPLITS programs share the slots: the first has the sinks if they are
    APART, each other one SPAN slots of the window. Mass is counted on FIRST keys; 2 PAIRS dimensions are turned from
    TURNED on. AHEAD: a program has one tile, which is read before the position is known. OVERLAP: launched while the
    kernel before may still run.
    """
    part, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seat = tl.maximum(tl.load(seats + row), 0).to(tl.int64) if SEATED else row.to(tl.int64)
    pair, dims = seat * (HEADS // GROUP) + kv_head, tl.arange(0, PADDED)
    on_sinks = (part < 1) if APART else (part < 0)
    low = tl.where(on_sinks, 0, SINKS + (part - APART) * SPAN)
    if AHEAD:
        column = low + tl.arange(0, SLOTS)
        late = (column < SINKS + WINDOW) & (on_sinks == 0)
        early = (column < SINKS) & on_sinks if APART else None
        tile = read(ring, pair, column, early, late, dims, SINKS, WINDOW, DIM, CODED)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    now = tl.load(positions + row).to(tl.int64)
    turn = pairs_of(dims, TURNED, PAIRS, INTERLEAVED)
    fetched = _fetch_new(new, row, kv_head, strides, turn[3], GROUP, DIM, PADDED, MEMBERS)
    turning_here = fetch(turning, row, on_sinks.to(tl.int32), turn, PAIRS, TABLES)
    own, other, key, key_other, value = _known(fetched, now)
    own, other = _norm(own, other, norms[0], norms[2], turn[3], dims, DIM, NORMED, 1)
    key, key_other = _norm(key, key_other, norms[1], norms[2], turn[3], dims, DIM, NORMED, 0)
    in_cache = tl.minimum(now, SINKS + WINDOW - 1) + start
    cos, sin = angle(_known(turning_here, now), turn, tl.where(on_sinks, in_cache, now + start), TABLES)
    query = (own * cos[None, :] + other * sin[None, :]).to(ring[0].dtype.element_ty)
    slot = tl.where(now < SINKS, now, SINKS + (now - SINKS) % WINDOW)
    writes = (part == APART) & (now >= 0)
    key, key_scale = put(ring, pair, slot, key * cos + key_other * sin, dims, writes, SINKS, WINDOW, DIM, CODED, 0)
    value, value_scale = put(ring, pair, slot, value, dims, writes, SINKS, WINDOW, DIM, CODED, 1)
    fresh = (key, key_scale, value, value_scale)
    count, slot = tl.minimum(now + 1, SINKS + WINDOW).to(tl.int32), slot.to(tl.int32)
    if AHEAD:
        zeros = tl.zeros([MEMBERS], tl.float32)
        state = (tl.zeros([MEMBERS, PADDED], tl.float32), zeros, zeros - float("inf"), zeros, zeros)
        seen = (late | early if APART else late) & (column < count)
        tile = _with_new(tile, fresh, column == slot, seen, CODED)
        state = _attend(state, query, tile, seen, column < FIRST, scale, STATISTICS, CODED)
    else:
        state = _begin(query, fresh, now, writes, FIRST)
        if SINKS > 0:
            sink_query = query
            if APART == 0:
                fetched = fetch(turning, row, 1, turn, PAIRS, TABLES)
                cos, sin = angle(fetched, turn, in_cache, TABLES)
                sink_query = (own * cos + other * sin).to(ring[0].dtype.element_ty)
            bounds = (0, tl.minimum(count, tl.where(on_sinks | (APART == 0), SINKS, 0)))
            state = _walk(
                state, sink_query, ring, pair, bounds, slot, dims, scale, SINKS, WINDOW, FIRST, DIM,
                SLOTS if SINKS > 16 else 16, True, STATISTICS, CODED,
            )  # fmt: skip
        bounds = (low, tl.minimum(count, tl.where(on_sinks, 0, tl.minimum(low + SPAN, SINKS + WINDOW))))
        state = _walk(
            state, query, ring, pair, bounds, slot, dims, scale, SINKS, WINDOW, FIRST, DIM, SLOTS, False, STATISTICS,
            CODED,
        )  # fmt: skip
    where = (row, kv_head, now)
    if SPLITS == 1:
        write(state, out, figures, logits, where, scale, HEADS, GROUP, DIM, PADDED, MEMBERS, LOGITS, STATISTICS)
    else:
        place = row * (HEADS // GROUP) + kv_head
        notes = tl.num_programs(2) * (HEADS // GROUP * SPLITS * MEMBERS * PADDED)
        leave(state, partials, place * SPLITS + part, notes, GROUP, PADDED, MEMBERS, STATISTICS)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + place, 1, sem="acq_rel") == SPLITS - 1:
            whole = fold(partials, place * SPLITS, notes, scale, GROUP, PADDED, MEMBERS, SPLITS, STATISTICS)
            write(whole, out, figures, logits, where, scale, HEADS, GROUP, DIM, PADDED, MEMBERS, LOGITS, STATISTICS)
            tl.store(arrivals + place, 0)
