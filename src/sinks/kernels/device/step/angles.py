"""Cosine and sine of a phase that is an integer: exact to float32 without the slow paths of large arguments."""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def sine_cosine(phase: Value) -> Value:
    """Cosine and sine of int64 phases, 2^64 to a turn.

    The nearest quarter of a turn is taken off in integers, and polynomials (Cephes, single precision) do the rest: an
    error of 2^-23 at any phase.
    """
    quarter = (phase + 0x2000000000000000) >> 62
    rest = ((phase - (quarter << 62)) >> 32).to(tl.int32).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    square = rest * rest
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - 0.5 * square + 1.0
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@jit
def pairs_of(dims: Value, rotary: Value, INTERLEAVED: constexpr) -> Value:
    """The pair of each dimension, whether it is the second of it, and whether it is turned at all."""
    first, pairs = rotary
    offset = dims - first
    if INTERLEAVED:
        pair, second = offset // 2, offset % 2 == 1
    else:
        pair, second = offset % tl.maximum(pairs, 1), offset >= pairs
    return pair, second, (offset >= 0) & (offset < 2 * pairs)


@jit
def angles(
    turning: Value, where: Value, dims: Value, rotary: Value, WHICH: constexpr, INTERLEAVED: constexpr,
    TABLES: constexpr,
) -> Value:  # fmt: skip
    """Cosine, and sine with the sign of its dimension, [1, dims]: own times the one, partner times the other.

    `turning` holds steps, for the position where[1]; or the tables of all rows (TABLES), of which this is row where[0].
    WHICH: 0 by the position, 1 by that in the cache.
    """
    pair, second, inside = pairs_of(dims, rotary, INTERLEAVED)
    if TABLES:
        place = turning + (where[0] * 4 + 2 * WHICH) * rotary[1] + pair
        cos, sin = tl.load(place, mask=inside, other=1.0), tl.load(place + rotary[1], mask=inside, other=0.0)
    else:
        cos, sin = sine_cosine(tl.load(turning + pair, mask=inside, other=0) * where[1])
    return cos[None, :], tl.where(second, sin, -sin)[None, :]


@jit
def write_tables(
    tables: Value, positions: Value, steps: Value, pairs: Value, capacity: Value, start: Value, PAIRS: constexpr
) -> None:
    """Cosine and sine of every row's position, and of its position in the cache: [batch, 4, pairs]."""
    row, pair = tl.program_id(0), tl.arange(0, PAIRS)
    now, real = tl.load(positions + row).to(tl.int64), pair < pairs
    step, into = tl.load(steps + pair, mask=real, other=0), tables + row * 4 * pairs + pair
    for which in tl.static_range(2):
        cos, sin = sine_cosine(step * ((tl.minimum(now, capacity - 1) if which else now) + start))
        tl.store(into + 2 * which * pairs, cos, mask=real)
        tl.store(into + (2 * which + 1) * pairs, sin, mask=real)
