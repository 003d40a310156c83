"""The short kernels of a step: token in, norms that no product can carry, token out."""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.models.step.device.products import ahead, begin


@jit
def embed(
    ids: Value, seats: Value, positions: Value, newest: Value, table: Value, out: Value, sizes: Value,
    WIDTH: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """The embedding of each row's token, in float32. `sizes`: width, factor, tokens known; another id gives NaN.

    For an id of -1 the token is what was chosen last at the row's seat; where there is none, the row rests.
    """
    begin(PDL)
    ahead(PDL)
    row = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < sizes[0]
    given, position = tl.load(ids + row), tl.load(positions + row)
    token = tl.where((given == -1) & (position >= 0), tl.load(newest + tl.load(seats + row)), given)
    if tl.program_id(1) == 0:  # the others find the same, before or after
        tl.store(ids + row, tl.where(token < 0, 0, token))
        tl.store(positions + row, tl.where((given == -1) & (token < 0), -1, position))
    known = inside & (token >= 0) & (token < sizes[2])
    own = tl.load(table + token * sizes[0] + column, mask=known, other=float("nan")).to(tl.float32)
    tl.store(out + row * sizes[0] + column, own * sizes[1], mask=inside)


@jit
def join(
    parts: Value, after: Value, states: Value, before: Value, normed: Value, sizes: Value, PARTS: constexpr,
    AFTER: constexpr, WIDTH: constexpr, OFFSET: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    """states += RMSNorm(sum of `parts`) (AFTER; else the sum itself), float32; `normed` = RMSNorm(states).

    `sizes`: width, epsilon of either norm, numbers of a part.
    """
    begin(PDL)
    ahead(PDL)
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    inside, places = column < sizes[0], row * sizes[0] + column
    own = tl.load(states + places, mask=inside, other=0.0)
    gain = tl.load(before + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if PARTS > 0:
        total = tl.zeros([WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(parts + part * sizes[3] + places, mask=inside, other=0.0)
        if AFTER:
            weight = tl.load(after + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
            total *= tl.rsqrt(tl.sum(total * total, 0) / sizes[0] + sizes[1]) * weight
        own += total
        tl.store(states + places, own, mask=inside)
    made = own * tl.rsqrt(tl.sum(own * own, 0) / sizes[0] + sizes[2]) * gain
    tl.store(normed + places, made.to(normed.dtype.element_ty), mask=inside)
