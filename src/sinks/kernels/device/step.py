"""One token of every row, in one kernel: turn, write the ring, attend, statistics.

Everything that changes from token to token lives on the device: the position of each row, and with it slot, count and
phases. So one CUDA graph serves every position. The slots are split among programs; the one that holds the new token's
slot for its own reads it from registers, so nobody waits for the write, and the last to arrive puts the parts together.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.device.forward import Statistics
from sinks.kernels.device.language import LOG2E, Value, constexpr, jit, need_triton, on, tl
from sinks.kernels.device.turn import partners, tables
from sinks.kernels.scoring import Scoring

HEAD_DIMS = (64, 96, 128, 256)
PROGRAMS = 264
"""Programs that fill a Hopper GPU: two for each of 132 multiprocessors."""


@jit
def _load_turned(heads: Value, rows: Value, dims: Value, table: Value, partner: Value, real: Value) -> Value:
    """Heads at `rows` [rows], turned by the cosine and sine [1, dims] of `table`, in float32."""
    cos, sin = table
    own = tl.load(heads + rows[:, None] + dims[None, :], mask=real, other=0.0).to(tl.float32)
    other = tl.load(heads + rows[:, None] + partner[None, :], mask=real, other=0.0).to(tl.float32)
    return own * cos + other * sin


@jit
def _write_new(
    new: Value, ring: Value, source: Value, place: Value, dims: Value, table: Value, partner: Value, inside: Value
) -> Value:
    """Turn the new key, write it and its value into their slot; both as [16, dims], a matrix unit's least, one real."""
    column = tl.arange(0, 16)
    only = (column == 0)[:, None] & inside
    key = _load_turned(new[1], source[0] + column * 0, dims, table, partner, only).to(ring[0].dtype.element_ty)
    value = tl.load(new[2] + source[1] + column[:, None] * 0 + dims[None, :], mask=only, other=0.0).to(ring[1].dtype.element_ty)
    places = place + column[:, None] * 0 + dims[None, :]
    tl.store(ring[0] + places, key, mask=only)
    tl.store(ring[1] + places, value, mask=only)
    return key, value


@jit
def _product(query: Value, keys: Value) -> Value:
    return tl.dot(query, tl.trans(keys), input_precision="ieee")


@jit
def _take(state: Value, scores: Value, values: Value, first: Value, scale: Value, STATISTICS: constexpr) -> Value:
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
    weights = weights.to(values.dtype)
    gathered = tl.dot(weights, values, gathered * shrink[:, None], input_precision="ieee")
    return gathered, total, now, weighed, mass


@jit
def _step(
    new: Value, ring: Value, out: Value, figures: Value, partials: Value, arrivals: Value, positions: Value,
    seats: Value, steps: Value, logits: Value, shape: Value, sizes: Value, strides: Value, rotary: Value,
    HEADS: constexpr, GROUP: constexpr, DIM: constexpr, PADDED: constexpr, MEMBERS: constexpr, SLOTS: constexpr,
    SPLITS: constexpr, INTERLEAVED: constexpr, LOGITS: constexpr, STATISTICS: constexpr, SEATED: constexpr,
) -> None:  # fmt: skip
    """`new`: query, key, value; `ring`: keys, values; `sizes`: slots a split, slots in all, first keys, start.

    `strides`: of a row and of a head, for the query, the key and the value in turn.
    """
    part, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    KV_HEADS = HEADS // GROUP
    sinks, window, scale = shape
    now = tl.load(positions + row)
    dims, member = tl.arange(0, PADDED), tl.arange(0, MEMBERS)
    partner = partners(dims, rotary, INTERLEAVED)
    inside, mine = (dims < DIM)[None, :], (member < GROUP)[:, None]
    seat = tl.load(seats + row).to(tl.int64) if SEATED else row.to(tl.int64)
    token = tl.full([1], 0, tl.int64) + now
    here = tables(token + sizes[3], dims, steps, rotary, INTERLEAVED)
    in_cache = tables(tl.minimum(token, sinks + window - 1) + sizes[3], dims, steps, rotary, INTERLEAVED)
    heads = row * strides[0] + (kv_head * GROUP + member) * strides[1]
    query = _load_turned(new[0], heads, dims, here, partner, mine & inside).to(ring[0].dtype.element_ty)
    sink_query = _load_turned(new[0], heads, dims, in_cache, partner, mine & inside).to(ring[0].dtype.element_ty)
    slot = tl.where(now < sinks, now, sinks + (now - sinks) % window)
    count = tl.minimum(now + 1, sizes[1]).to(tl.int32)
    zeros = tl.zeros([MEMBERS], tl.float32)
    state = (tl.zeros([MEMBERS, PADDED], tl.float32), zeros, zeros - float("inf"), zeros, zeros)
    held = (seat * KV_HEADS + kv_head) * sizes[1] * DIM
    low = part * sizes[0]
    for start in range(low, tl.minimum(low + sizes[0], count), SLOTS):
        column = start + tl.arange(0, SLOTS)
        seen = (column < count) & (column < low + sizes[0]) & (column != slot) & (now >= 0)
        places, real = held + column.to(tl.int64)[:, None] * DIM + dims[None, :], seen[:, None] & inside
        keys = tl.load(ring[0] + places, mask=real, other=0.0)
        scores = _product(query, keys)
        if start < sinks:
            scores = tl.where((column < sinks)[None, :], _product(sink_query, keys), scores)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        values = tl.load(ring[1] + places, mask=real, other=0.0)
        state = _take(state, scores, values, column < sizes[2], scale, STATISTICS)
    if (part == 0) & (now >= 0):
        source = (row * strides[2] + kv_head * strides[3], row * strides[4] + kv_head * strides[5])
        key, value = _write_new(new, ring, source, held + slot * DIM, dims, here, partner, inside)
        column = tl.arange(0, 16)
        scores = tl.where((column == 0)[None, :], _product(query, key), float("-inf"))
        state = _take(state, scores, value, (column * 0 + now) < sizes[2], scale, STATISTICS)
    where = (row, kv_head, part, now)
    _finish(
        state, out, figures, partials, arrivals, logits, where, scale, HEADS, GROUP, DIM, PADDED, MEMBERS, SPLITS,
        LOGITS, STATISTICS,
    )  # fmt: skip


@jit
def _finish(
    state: Value, out: Value, figures: Value, partials: Value, arrivals: Value, logits: Value, where: Value,
    scale: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, PADDED: constexpr, MEMBERS: constexpr,
    SPLITS: constexpr, LOGITS: constexpr, STATISTICS: constexpr,
) -> None:  # fmt: skip
    """Leave one's part; the last to arrive folds all parts together, in order, and clears the count for the next."""
    row, kv_head, part, _ = where
    pair = row * (HEADS // GROUP) + kv_head
    if SPLITS == 1:
        _write(state, out, figures, logits, where, scale, HEADS, GROUP, DIM, PADDED, MEMBERS, LOGITS, STATISTICS)
    else:
        member, dims = tl.arange(0, MEMBERS), tl.arange(0, PADDED)
        wide = PADDED + 4
        base = partials + ((pair * SPLITS + part) * MEMBERS + member).to(tl.int64) * wide
        tl.store(base[:, None] + dims[None, :], state[0])
        for figure in tl.static_range(4):
            tl.store(base + PADDED + figure, state[1 + figure])
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == SPLITS - 1:
            base = partials + (pair * SPLITS * MEMBERS + member).to(tl.int64) * wide
            state = _fold(base, dims, wide * MEMBERS, scale, PADDED, MEMBERS, SPLITS)
            _write(state, out, figures, logits, where, scale, HEADS, GROUP, DIM, PADDED, MEMBERS, LOGITS, STATISTICS)
            tl.store(arrivals + pair, 0)


@jit
def _fold(
    base: Value, dims: Value, step: Value, scale: Value, PADDED: constexpr, MEMBERS: constexpr, SPLITS: constexpr
) -> Value:
    """All parts, which begin `step` apart at `base` [members], as one."""
    zeros = tl.zeros([MEMBERS], tl.float32)
    gathered, total, weighed, mass = tl.zeros([MEMBERS, PADDED], tl.float32), zeros, zeros, zeros
    largest = zeros - float("inf")
    for number in range(SPLITS):
        part = base + number * step
        theirs = tl.load(part + PADDED + 1, cache_modifier=".cg")
        top = tl.maximum(largest, theirs)
        level = tl.where(top == float("-inf"), 0.0, top) * scale
        kept, added = tl.exp2(largest * scale - level), tl.exp2(theirs * scale - level)
        values = tl.load(part[:, None] + dims[None, :], cache_modifier=".cg")
        gathered = gathered * kept[:, None] + values * added[:, None]
        total = total * kept + tl.load(part + PADDED, cache_modifier=".cg") * added
        weighed = weighed * kept + tl.load(part + PADDED + 2, cache_modifier=".cg") * added
        mass = mass * kept + tl.load(part + PADDED + 3, cache_modifier=".cg") * added
        largest = top
    return gathered, total, largest, weighed, mass


@jit
def _write(
    state: Value, out: Value, figures: Value, logits: Value, where: Value, scale: Value, HEADS: constexpr,
    GROUP: constexpr, DIM: constexpr, PADDED: constexpr, MEMBERS: constexpr, LOGITS: constexpr,
    STATISTICS: constexpr,
) -> None:  # fmt: skip
    gathered, total, largest, weighed, mass = state
    row, kv_head, _, now = where
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


@dataclass(frozen=True, eq=False)
class Step:
    """What every step of a stream has in common, claimed once: nothing is allocated for a token but its result.

    `first_keys`, at most `sinks`, asks for statistics and says how many first tokens `mass` counts; None: none.
    `splits` is among how many programs the slots of one row and key head are shared out.
    """

    sinks: int
    window: int
    scoring: Scoring
    first_keys: int | None
    splits: int
    slots: int
    start: int
    steps: Int[Tensor, " pairs"]
    partials: Float[Tensor, " numbers"]
    arrivals: Int[Tensor, " pairs_of_row_and_head"]

    @staticmethod
    def prepare(
        query: Float[Tensor, "batch heads head_dim"],
        keys: Float[Tensor, "seats kv_heads slots head_dim"],
        *,
        sinks: int,
        window: int,
        scoring: Scoring,
        first_keys: int | None = None,
        splits: int | None = None,
        start: int = 0,
    ) -> Step:
        """Check what will be asked for, and claim the memory of the parts, for as many rows as `query` has.

        Token j of a stream has the phase of position `start + j`.

        Raises UnsupportedOption, naming another way, for what the kernel cannot do; InvalidInput for wrong sizes.
        """
        _refuse(query, keys, sinks, window, scoring)
        if first_keys is not None and not 0 <= first_keys <= sinks:
            raise InvalidInput(f"first_keys={first_keys}: mass is counted on sinks, of which there are {sinks}")
        (batch, heads, head_dim), kv_heads = query.shape, keys.shape[1]
        slots = 32 if head_dim > 128 else 64
        tiles = -(-(sinks + window) // slots)
        splits = max(1, min(tiles, PROGRAMS // (batch * kv_heads))) if splits is None else splits
        splits = -(-tiles // -(-tiles // splits))
        members, padded = _members(heads // kv_heads), _power_of_two(head_dim)
        numbers = batch * kv_heads * splits * members * (padded + 4) if splits > 1 else 1
        rotary = scoring.rotary
        return Step(
            sinks, window, scoring, first_keys, splits, slots, start,
            torch.zeros(1, dtype=torch.int64, device=query.device) if rotary is None else rotary.steps.to(query.device),
            torch.empty(numbers, dtype=torch.float32, device=query.device),
            torch.zeros(batch * kv_heads, dtype=torch.int32, device=query.device),
        )  # fmt: skip


def attend_step(
    step: Step,
    query: Float[Tensor, "batch heads head_dim"],
    key: Float[Tensor, "batch kv_heads head_dim"],
    value: Float[Tensor, "batch kv_heads head_dim"],
    keys: Float[Tensor, "seats kv_heads slots head_dim"],
    values: Float[Tensor, "seats kv_heads slots head_dim"],
    positions: Int[Tensor, " batch"],
    seats: Int[Tensor, " batch"] | None = None,
    out: Float[Tensor, "batch heads head_dim"] | None = None,
) -> tuple[Float[Tensor, "batch heads head_dim"], Statistics | None]:
    """Turn the new token of every row, write it into its slot of `keys` and `values`, and attend; no gradient.

    `query` and `key` arrive unturned, all three as they lie (views of one buffer, say) so long as a head is dense; the
    ring holds keys turned by their stream positions, sinks in the first slots. `positions`, int64 on the device, count
    each row's tokens from 0; -1 leaves a row alone and gives zeros. Row i works on seat `seats[i]` of the ring, or on
    seat i; no two rows on one. The result goes into `out`, contiguous, if there is one. Nothing is read back, so the
    call can be captured in a CUDA graph that also advances `positions`.
    """
    scoring, (batch, heads, head_dim), kv_heads = step.scoring, query.shape, key.shape[1]
    new = tuple(part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    figures = step.partials.new_empty((4, batch, heads) if step.first_keys is not None else (1,))
    rotary = (0, 0) if scoring.rotary is None else (scoring.rotary.first, scoring.rotary.width // 2)
    tiles = -(-(step.sinks + step.window) // step.slots)
    with on(query.device):
        _step[(step.splits, kv_heads, batch)](
            new, (keys, values), out, figures, step.partials, step.arrivals, positions,
            positions if seats is None else seats, step.steps,
            figures if scoring.sink_logits is None else scoring.sink_logits,
            (step.sinks, step.window, scoring.scale * LOG2E),
            (-(-tiles // step.splits) * step.slots, step.sinks + step.window, step.first_keys or 0, step.start),
            tuple(stride for part in new for stride in part.stride()[:2]), rotary,
            HEADS=heads, GROUP=heads // kv_heads, DIM=head_dim, PADDED=_power_of_two(head_dim),
            MEMBERS=_members(heads // kv_heads), SLOTS=step.slots, SPLITS=step.splits,
            INTERLEAVED=scoring.rotary is not None and scoring.rotary.interleaved, SEATED=seats is not None,
            LOGITS=scoring.sink_logits is not None, STATISTICS=step.first_keys is not None, num_warps=4, num_stages=3,
        )  # fmt: skip
    if step.first_keys is None:
        return out, None
    log_sum_exp, mass, entropy, maximum = figures
    return out, Statistics(mass, entropy, maximum, log_sum_exp)


def _members(group: int) -> int:
    """Rows of a product: what a matrix instruction takes at least."""
    return max(16, _power_of_two(group))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _refuse(query: Tensor, keys: Tensor, sinks: int, window: int, scoring: Scoring) -> None:
    for name, option in (("slopes", scoring.slopes), ("softcap", scoring.softcap)):
        if option is not None:
            raise UnsupportedOption(f"the fused step knows no {name}: stream through sinks.SinkCache instead")
    if query.shape[-1] not in HEAD_DIMS:
        raise UnsupportedOption(
            f"the fused step takes heads of 64, 96, 128 or 256 dimensions, not {query.shape[-1]}: stream through "
            "sinks.SinkCache instead"
        )
    if keys.shape[2] != sinks + window or not keys.is_contiguous() or query.shape[1] % keys.shape[1]:
        raise InvalidInput(
            f"a ring of shape {list(keys.shape)} does not fit {sinks} sinks, a window of {window} and a query of shape "
            f"{list(query.shape)}: give contiguous [seats, kv_heads, sinks + window, head_dim]"
        )
    if scoring.scale <= 0:
        raise InvalidInput(f"scale={scoring.scale}: a score is scaled by a number above 0")
    need_triton(query.device)
