"""Products of a few rows with a weight: what bounds a decode step, so each weight is read once, at the bus's speed.

One row is multiplied lane by lane, RMSNorm in front (its factor is one number, multiplied in at the end); more rows go
through matrix units, normalised beforehand. An activation, a bias or the residual stands behind. Sums have one order,
whatever else runs. Where kernels are chained by programmatic launches, the first weights of one row's product are on
their way before the kernel ahead has finished.
"""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def begin(PDL: constexpr) -> None:
    """The kernels behind may start as soon as all programs of this one have: they wait for its end themselves."""
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def ahead(PDL: constexpr) -> None:
    """Wait for the kernels ahead."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def bent(value: Value, GELU: constexpr) -> Value:
    """SiLU, or GELU in its form with tanh."""
    if GELU:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        made = value * tl.sigmoid(2.0 * inner)  # (1 + tanh z) / 2 = sigmoid(2 z)
    else:
        made = value * tl.sigmoid(value)
    return made


@jit
def _weights(weight: Value, n: Value, k: Value, depth: Value, inside: Value) -> Value:
    places = n.to(tl.int64)[:, None] * depth + k[None, :]
    return tl.load(weight + places, mask=inside, other=0, eviction_policy="evict_first")


@jit
def _floats(tile: Value, BITS: constexpr) -> Value:
    """Bytes as float32 by way of the mantissa of 2^23: an ordinary conversion is four times slower."""
    if BITS == 8:
        made = ((tile.to(tl.int32) + 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    else:
        made = tile.to(tl.float32)
    return made


@jit
def _halves(tile: Value) -> Value:
    """The two weights less 8 of every byte, in float32."""
    low = ((tile & 15).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    high = ((tile >> 4).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return low, high


@jit
def _given(x: Value, gain: Value, k: Value, depth: Value, NORM: constexpr, OFFSET: constexpr) -> Value:
    """A row's inputs at `k`: their squares, and they times the norm's weight."""
    own = tl.load(x + k, mask=k < depth, other=0.0).to(tl.float32)
    if NORM:
        made = own * (tl.load(gain + k, mask=k < depth, other=0.0).to(tl.float32) + OFFSET)
    else:
        made = own
    return own * own, made


@jit
def _inputs_of_one(
    x: Value, gain: Value, start: Value, k: Value, depth: Value, NORM: constexpr, OFFSET: constexpr, BITS: constexpr
) -> Value:
    """Sums of squares, and what a tile's weights are multiplied by: for the early and the late of a byte's."""
    if BITS == 4:
        place = start + k // 16 * 32 + k % 16
        squares, early = _given(x, gain, place, depth, NORM, OFFSET)
        more, late = _given(x, gain, place + 16, depth, NORM, OFFSET)
        squares += more
    else:
        squares, early = _given(x, gain, start + k, depth, NORM, OFFSET)
        late = early
    return squares, (early, late)


@jit
def _grids(scales: Value, n: Value, start: Value, depth: Value, height: Value, GROUPS: constexpr) -> Value:
    """Scale and centre of the groups of int4 weights from `start` on, [n, GROUPS]."""
    group = start // 32 + tl.arange(0, GROUPS)
    places = scales + (n[:, None] * (depth // 32) + group[None, :]) * 2
    real = (n < height)[:, None] & (group * 32 < depth)[None, :]
    scale = tl.load(places, mask=real, other=0.0).to(tl.float32)
    return scale, tl.load(places + 1, mask=real, other=0.0).to(tl.float32)


@jit
def _fold(
    made: Value, tile: Value, given: Value, scales: Value, n: Value, start: Value, sizes: Value, COLS: constexpr,
    GROUPS: constexpr, BITS: constexpr,
) -> Value:  # fmt: skip
    """`made` with the tile's products added, one sum a lane; int4: one sum a group."""
    if BITS == 4:
        early, late = given
        low, high = _halves(tile)
        parts = tl.sum(tl.reshape(low * early[None, :] + high * late[None, :], (COLS, GROUPS, 16)), 2)
        whole = tl.sum(tl.reshape(early + late, (GROUPS, 16)), 1)
        scale, centre = _grids(scales, n, start, sizes[0], sizes[5], GROUPS)
        made += parts * scale + centre * whole[None, :]
    else:
        made += _floats(tile, BITS) * given[0][None, :]
    return made


@jit
def _end(
    made: Value, extra: Value, bias: Value, out: Value, row: Value, n: Value, part: Value, sizes: Value,
    GATED: constexpr, GELU: constexpr, RESIDUAL: constexpr, BIAS: constexpr,
) -> Value:  # fmt: skip
    """`made` at places (row, n), shapes that broadcast: bias (in part 0), activation or residual, and into `out`."""
    count = sizes[1]
    inside = (n < count) & (row < sizes[2])
    if BIAS:
        made += tl.load(bias + n, mask=(n < count) & (part == 0), other=0.0).to(tl.float32)
        if GATED:
            extra += tl.load(bias + count + n, mask=n < count, other=0.0).to(tl.float32)
    if GATED:
        made = bent(made, GELU) * extra
    if RESIDUAL:
        made += tl.load(out + row * count + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * count + n, made.to(out.dtype.element_ty), mask=inside)
    return tl.where(inside, made, float("-inf"))


@jit
def _best(made: Value, row: Value, n: Value, best: Value, number: Value, sizes: Value, PLACES: constexpr) -> None:
    """Put the largest of each row [rows, cols] and where it first stands into one of the row's PLACES, if it is larger.

    Both in one integer that orders as they do: the bits of the number, then what is left of 2^32 behind the place. A
    maximum of integers is the same in whatever order programs arrive. What is no number counts as infinity, so that it
    is not overlooked.
    """
    made = tl.where(made != made, float("inf"), made)
    most = tl.max(made, 1)
    first = tl.min(tl.where(made == most[:, None], n, 2147483647), 1)
    bits = most.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    packed = (ordered << 32) | (0xFFFFFFFF - first.to(tl.int64))
    tl.atomic_max(best + row * PLACES + number % PLACES, packed, mask=row < sizes[2], sem="relaxed")


@jit
def thin(
    x: Value, gain: Value, weight: Value, scales: Value, bias: Value, out: Value, best: Value, sizes: Value,
    COLS: constexpr, DEPTH: constexpr, NORM: constexpr, GATED: constexpr, GELU: constexpr,
    RESIDUAL: constexpr, BIAS: constexpr, BITS: constexpr, PLACES: constexpr, OFFSET: constexpr, PDL: constexpr,
    WHOLE: constexpr,
) -> None:  # fmt: skip
    """One row, by multiply and add. WHOLE: a tile has the whole depth.

    `sizes`: depth, outputs, rows, programs, epsilon, rows of the weight. `BITS` 8: `scales` one number a row of the
    weight; 4: scale and centre of every 32 weights, two of which share a byte, 16 apart.
    """
    PACK: constexpr = 2 if BITS == 4 else 1
    LANES: constexpr = DEPTH // 32 if BITS == 4 else DEPTH
    depth, count = sizes[0], sizes[1]
    stride = depth // PACK
    begin(PDL)
    number = tl.program_id(0)
    n, k = number * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH // PACK)
    real = (n < count)[:, None]
    first = _weights(weight, n, k, stride, real & (k < stride)[None, :])
    second = first
    if GATED:
        second = _weights(weight, count + n, k, stride, real & (k < stride)[None, :])
    ahead(PDL)
    made, extra = tl.zeros([COLS, LANES], tl.float32), tl.zeros([COLS, LANES], tl.float32)
    squares = tl.zeros([DEPTH // PACK], tl.float32)
    for start in range(0, depth, DEPTH):
        more, given = _inputs_of_one(x, gain, start, k, depth, NORM, OFFSET, BITS)
        squares += more
        made = _fold(made, first, given, scales, n, start, sizes, COLS, LANES, BITS)
        if GATED:
            extra = _fold(extra, second, given, scales, count + n, start, sizes, COLS, LANES, BITS)
        if not WHOLE:
            behind = (start + DEPTH) // PACK + k
            first = _weights(weight, n, behind, stride, real & (behind < stride)[None, :])
            if GATED:
                second = _weights(weight, count + n, behind, stride, real & (behind < stride)[None, :])
    made, extra = tl.sum(made, 1)[None, :], tl.sum(extra, 1)[None, :]
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / depth + sizes[4])
        made, extra = made * factor, extra * factor
    if BITS == 8:
        made = _scaled(made, scales, n, n < count)
        extra = _scaled(extra, scales, count + n, n < count) if GATED else extra
    row = tl.zeros([1], tl.int32)
    made = _end(made, extra, bias, out, row[:, None], n[None, :], 0, sizes, GATED, GELU, RESIDUAL, BIAS)
    if PLACES:
        _best(made, row, n[None, :], best, number, sizes, PLACES)


@jit
def _scaled(made: Value, scales: Value, n: Value, real: Value) -> Value:
    return made * tl.load(scales + n, mask=real, other=0.0).to(tl.float32)[None, :]


@jit
def _widened(
    weight: Value, scales: Value, n: Value, start: Value, sizes: Value, COLS: constexpr, DEPTH: constexpr,
    BITS: constexpr, TYPE: constexpr,
) -> Value:  # fmt: skip
    """Two factors for a matrix unit: the tile at `start` and nothing, or the early and the late half of int4 groups."""
    depth, height = sizes[0], sizes[5]
    real = (n < height)[:, None]
    if BITS == 4:
        GROUPS: constexpr = DEPTH // 32
        k = start // 2 + tl.arange(0, DEPTH // 2)
        low, high = _halves(_weights(weight, n, k, depth // 2, real & (k < depth // 2)[None, :]))
        scale, centre = _grids(scales, n, start, depth, height, GROUPS)
        low = tl.reshape(low, (COLS, GROUPS, 16)) * scale[:, :, None] + centre[:, :, None]
        high = tl.reshape(high, (COLS, GROUPS, 16)) * scale[:, :, None] + centre[:, :, None]
        early, late = tl.reshape(low, (COLS, DEPTH // 2)).to(TYPE), tl.reshape(high, (COLS, DEPTH // 2)).to(TYPE)
    elif BITS == 8:
        k = start + tl.arange(0, DEPTH)
        early = _floats(_weights(weight, n, k, depth, real & (k < depth)[None, :]), BITS).to(TYPE)
        late = early
    else:
        k = start + tl.arange(0, DEPTH)
        early = _weights(weight, n, k, depth, real & (k < depth)[None, :])
        late = early
    return early, late


@jit
def _inputs(x: Value, rows: Value, k: Value, depth: Value, TYPE: constexpr) -> Value:
    places = x + rows[:, None] * depth + k[None, :]
    return tl.load(places, mask=(k < depth)[None, :], other=0.0, eviction_policy="evict_last").to(TYPE)


@jit
def _times(weight: Value, given: Value, made: Value, TURNED: constexpr) -> Value:
    if TURNED:
        made = tl.dot(weight, tl.trans(given), made, input_precision="ieee")
    else:
        made = tl.dot(given, tl.trans(weight), made, input_precision="ieee")
    return made


@jit
def wide(
    x: Value, weight: Value, scales: Value, bias: Value, out: Value, best: Value, sizes: Value, ROWS: constexpr,
    COLS: constexpr, DEPTH: constexpr, GATED: constexpr, GELU: constexpr, RESIDUAL: constexpr, BIAS: constexpr,
    BITS: constexpr, PLACES: constexpr, PDL: constexpr, TURNED: constexpr, STAGES: constexpr, TYPE: constexpr,
) -> None:  # fmt: skip
    """ROWS rows of inputs that are normalised already, by matrix units. Programs: tiles of rows, of outputs, splits.

    TURNED: the weight is the left, large operand. `sizes`: as for `thin`, then the depth of a split, and the numbers of
    a part of the result.
    """
    depth, count = sizes[0], sizes[1]
    begin(PDL)
    number, part = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = number * COLS + tl.arange(0, COLS)
    low = part * sizes[6]
    ahead(PDL)
    if TURNED:
        made, extra = tl.zeros([COLS, ROWS], tl.float32), tl.zeros([COLS, ROWS], tl.float32)
    else:
        made, extra = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(low, tl.minimum(low + sizes[6], depth), DEPTH, num_stages=STAGES):
        early, late = _widened(weight, scales, n, start, sizes, COLS, DEPTH, BITS, TYPE)
        if BITS == 4:
            byte = tl.arange(0, DEPTH // 2)
            k = start + byte // 16 * 32 + byte % 16
            behind = _inputs(x, rows, k + 16, depth, TYPE)
            made = _times(late, behind, made, TURNED)
        else:
            k = start + tl.arange(0, DEPTH)
            behind = early
        given = _inputs(x, rows, k, depth, TYPE)
        made = _times(early, given, made, TURNED)
        if GATED:
            early, late = _widened(weight, scales, count + n, start, sizes, COLS, DEPTH, BITS, TYPE)
            extra = _times(early, given, extra, TURNED)
            if BITS == 4:
                extra = _times(late, behind, extra, TURNED)
    if TURNED:
        made, extra = tl.trans(made), tl.trans(extra)
    if BITS == 8:
        made = _scaled(made, scales, n, n < count)
        extra = _scaled(extra, scales, count + n, n < count) if GATED else extra
    out += part * sizes[7]
    made = _end(made, extra, bias, out, rows[:, None], n[None, :], part, sizes, GATED, GELU, RESIDUAL, BIAS)
    if PLACES:
        _best(made, rows, n[None, :], best, number, sizes, PLACES)
