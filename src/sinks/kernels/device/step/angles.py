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
def pairs_of(dims: Value, FIRST: constexpr, PAIRS: constexpr, INTERLEAVED: constexpr) -> Value:
    """Of each dimension: its pair, whether it is the second of it, whether it is turned at all, and its partner."""
    offset = dims - FIRST
    inside = (offset >= 0) & (offset < 2 * PAIRS)
    if INTERLEAVED:
        pair, second, partner = offset // 2, offset % 2 == 1, FIRST + (offset ^ 1)
    else:
        second = offset >= PAIRS
        pair = tl.where(second, offset - PAIRS, offset)
        partner = tl.where(second, dims - PAIRS, dims + PAIRS)
    return pair, second, inside, tl.where(inside, partner, dims)


@jit
def fetch(turning: Value, row: Value, which: Value, turn: Value, PAIRS: constexpr, TABLES: constexpr) -> Value:
    """What an angle is made of, read before the position is known: a row's own of the tables, or the steps.

    `which`: 0 by the position, 1 by that in the cache.
    """
    pair, _, inside, _ = turn
    if TABLES:
        place = turning + (row * 4 + which * 2) * PAIRS + pair
        fetched = (tl.load(place, mask=inside, other=1.0), tl.load(place + PAIRS, mask=inside, other=0.0))
    else:
        fetched = (tl.load(turning + pair, mask=inside, other=0),)
    return fetched


@jit
def angle(fetched: Value, turn: Value, position: Value, TABLES: constexpr) -> Value:
    """Cosine, and sine with the sign of its dimension, [dims]: own times the one, partner times the other."""
    if TABLES:
        cos, sin = fetched
    else:
        cos, sin = sine_cosine(fetched[0] * position)
    return cos, tl.where(turn[1], sin, -sin)


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
