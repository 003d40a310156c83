"""Products of a few rows with a weight: what bounds a decode step, so that each weight is read once, at the bus's speed.

RMSNorm stands in front (its factor is one number a row, multiplied in at the end), an activation, a bias or the
residual behind. A program holds `COLS` outputs over the whole depth, so sums have one order, whatever else runs. Where
kernels are chained by programmatic launches, the first weights are on their way before the kernel ahead has finished.
"""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def ahead(PDL: constexpr) -> None:
    """Wait for the kernels ahead; those behind may begin to fetch what depends on none of them."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def bent(value: Value, GELU: constexpr) -> Value:
    """SiLU, or GELU in its form with tanh."""
    if GELU:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        return value * tl.sigmoid(2.0 * inner)  # (1 + tanh z) / 2 = sigmoid(2 z)
    return value * tl.sigmoid(value)


@jit
def _weights(weight: Value, n: Value, k: Value, depth: Value, inside: Value) -> Value:
    places = n.to(tl.int64)[:, None] * depth + k[None, :]
    return tl.load(weight + places, mask=inside, other=0.0, eviction_policy="evict_first")


@jit
def _given(x: Value, gain: Value, k: Value, depth: Value, NORM: constexpr, OFFSET: constexpr) -> Value:
    """One row's inputs at `k` as they are, and times the norm's weight."""
    own = tl.load(x + k, mask=k < depth, other=0.0).to(tl.float32)
    if NORM:
        return own, own * (tl.load(gain + k, mask=k < depth, other=0.0).to(tl.float32) + OFFSET)
    return own, own


@jit
def _end(
    made: Value, extra: Value, bias: Value, out: Value, row: Value, n: Value, sizes: Value, GATED: constexpr,
    GELU: constexpr, RESIDUAL: constexpr, BIAS: constexpr,
) -> Value:  # fmt: skip
    """`made` at places (row, n), shapes that broadcast: activation or bias or residual, and into `out`."""
    count = sizes[1]
    inside = (n < count) & (row < sizes[2])
    if BIAS:
        made += tl.load(bias + n, mask=n < count, other=0.0).to(tl.float32)
        if GATED:
            extra += tl.load(bias + count + n, mask=n < count, other=0.0).to(tl.float32)
    if GATED:
        made = bent(made, GELU) * extra
    if RESIDUAL:
        made += tl.load(out + row * count + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * count + n, made.to(out.dtype.element_ty), mask=inside)
    return tl.where(inside, made, float("-inf"))


@jit
def _best(made: Value, row: Value, n: Value, best: Value, number: Value, sizes: Value) -> None:
    """The largest of each row [rows, cols] among this program's outputs, and the first place where it stands."""
    most = tl.max(made, 1)
    first = tl.min(tl.where(made == most[:, None], n, 2147483647), 1)
    place = row * sizes[3] + number
    tl.store(best[0] + place, most, mask=row < sizes[2])
    tl.store(best[1] + place, first, mask=row < sizes[2])


@jit
def thin(
    x: Value, gain: Value, weight: Value, scales: Value, bias: Value, out: Value, best: Value, sizes: Value,
    ROWS: constexpr, COLS: constexpr, DEPTH: constexpr, NORM: constexpr, GATED: constexpr, GELU: constexpr,
    RESIDUAL: constexpr, BIAS: constexpr, SCALED: constexpr, BEST: constexpr, OFFSET: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """By multiply and add, for the fewest rows. `sizes`: depth, outputs, rows, programs, epsilon."""
    depth, count = sizes[0], sizes[1]
    number = tl.program_id(0)
    n, k, rows = number * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH), tl.arange(0, ROWS)
    real = (n < count)[:, None]
    first = _weights(weight, n, k, depth, real & (k < depth)[None, :])
    second = first
    if GATED:
        second = _weights(weight + count.to(tl.int64) * depth, n, k, depth, real & (k < depth)[None, :])
    ahead(PDL)
    made, extra = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, depth, DEPTH):
        for row in tl.static_range(ROWS):
            own, given = _given(x + row * depth, gain, start + k, depth, NORM, OFFSET)
            mine = rows == row
            if NORM:
                squares += tl.where(mine, tl.sum(own * own, 0), 0.0)
            made += tl.where(mine[:, None], tl.sum(first.to(tl.float32) * given[None, :], 1)[None, :], 0.0)
            if GATED:
                extra += tl.where(mine[:, None], tl.sum(second.to(tl.float32) * given[None, :], 1)[None, :], 0.0)
        if start + DEPTH < depth:
            behind = start + DEPTH + k
            first = _weights(weight, n, behind, depth, real & (behind < depth)[None, :])
            if GATED:
                second = _weights(weight + count.to(tl.int64) * depth, n, behind, depth, real & (behind < depth)[None, :])
    if NORM:
        factor = tl.rsqrt(squares / depth + sizes[4])[:, None]
        made, extra = made * factor, extra * factor
    if SCALED:
        made *= tl.load(scales + n, mask=n < count, other=0.0).to(tl.float32)[None, :]
        if GATED:
            extra *= tl.load(scales + count + n, mask=n < count, other=0.0).to(tl.float32)[None, :]
    made = _end(made, extra, bias, out, rows[:, None], n[None, :], sizes, GATED, GELU, RESIDUAL, BIAS)
    if BEST:
        _best(made, rows, n[None, :], best, number, sizes)


@jit
def wide(
    x: Value, gain: Value, weight: Value, scales: Value, bias: Value, out: Value, best: Value, sizes: Value,
    ROWS: constexpr, COLS: constexpr, DEPTH: constexpr, NORM: constexpr, GATED: constexpr, GELU: constexpr,
    RESIDUAL: constexpr, BIAS: constexpr, SCALED: constexpr, BEST: constexpr, OFFSET: constexpr, PDL: constexpr,
    TURNED: constexpr, STAGES: constexpr, TYPE: constexpr,
) -> None:  # fmt: skip
    """By matrix units; TURNED: the weight is their left, large operand. `sizes` as for `thin`."""
    depth, count = sizes[0], sizes[1]
    number = tl.program_id(0)
    n, k, rows = number * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH), tl.arange(0, ROWS)
    real = (n < count)[:, None]
    ahead(PDL)
    if TURNED:
        made, extra = tl.zeros([COLS, ROWS], tl.float32), tl.zeros([COLS, ROWS], tl.float32)
    else:
        made, extra = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
        here = start + k
        inside = real & (here < depth)[None, :]
        first = _weights(weight, n, here, depth, inside).to(TYPE)
        given = tl.load(x + rows[:, None] * depth + here[None, :], mask=(here < depth)[None, :], other=0.0)
        if NORM:
            given = given.to(tl.float32)
            squares += tl.sum(given * given, 1)
            given *= (tl.load(gain + here, mask=here < depth, other=0.0).to(tl.float32) + OFFSET)[None, :]
        given = given.to(TYPE)
        if TURNED:
            made = tl.dot(first, tl.trans(given), made, input_precision="ieee")
        else:
            made = tl.dot(given, tl.trans(first), made, input_precision="ieee")
        if GATED:
            second = _weights(weight + count.to(tl.int64) * depth, n, here, depth, inside).to(TYPE)
            if TURNED:
                extra = tl.dot(second, tl.trans(given), extra, input_precision="ieee")
            else:
                extra = tl.dot(given, tl.trans(second), extra, input_precision="ieee")
    if TURNED:
        made, extra = tl.trans(made), tl.trans(extra)
    if NORM:
        factor = tl.rsqrt(squares / depth + sizes[4])[:, None]
        made, extra = made * factor, extra * factor
    if SCALED:
        made *= tl.load(scales + n, mask=n < count, other=0.0).to(tl.float32)[None, :]
        if GATED:
            extra *= tl.load(scales + count + n, mask=n < count, other=0.0).to(tl.float32)[None, :]
    made = _end(made, extra, bias, out, rows[:, None], n[None, :], sizes, GATED, GELU, RESIDUAL, BIAS)
    if BEST:
        _best(made, rows, n[None, :], best, number, sizes)
