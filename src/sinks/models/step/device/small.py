"""The short kernels of a step: token in, norms that no product can carry, token out."""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl
from sinks.models.step.device.products import ahead


@jit
def embed(ids: Value, table: Value, out: Value, sizes: Value, WIDTH: constexpr, PDL: constexpr) -> None:
    """The embedding of each row's token, in float32. `sizes`: width, factor."""
    ahead(PDL)
    row = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < sizes[0]
    token = tl.load(ids + row)
    own = tl.load(table + token * sizes[0] + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * sizes[0] + column, own * sizes[1], mask=inside)


@jit
def norm_heads(
    heads: Value, gains: Value, sizes: Value, DIM: constexpr, PADDED: constexpr, OFFSET: constexpr, PDL: constexpr
) -> None:
    """RMSNorm of every query and key head of `heads` [rows, heads, DIM], in place. `sizes`: heads, queries, epsilon."""
    ahead(PDL)
    row, head, dims = tl.program_id(0), tl.program_id(1), tl.arange(0, PADDED)
    inside = dims < DIM
    places = heads + (row * sizes[0] + head) * DIM + dims
    own = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    if head < sizes[1]:
        gain = tl.load(gains[0] + dims, mask=inside, other=0.0).to(tl.float32)
    else:
        gain = tl.load(gains[1] + dims, mask=inside, other=0.0).to(tl.float32)
    made = own * tl.rsqrt(tl.sum(own * own, 0) / DIM + sizes[2]) * (gain + OFFSET)
    tl.store(places, made.to(heads.dtype.element_ty), mask=inside)


@jit
def add_normed(
    branch: Value, gain: Value, out: Value, sizes: Value, WIDTH: constexpr, OFFSET: constexpr, PDL: constexpr
) -> None:
    """out += RMSNorm(branch), rows of float32. `sizes`: width, epsilon."""
    ahead(PDL)
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    inside, places = column < sizes[0], row * sizes[0] + column
    own = tl.load(branch + places, mask=inside, other=0.0)
    factor = tl.rsqrt(tl.sum(own * own, 0) / sizes[0] + sizes[1])
    weight = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    residual = tl.load(out + places, mask=inside, other=0.0)
    tl.store(out + places, residual + own * factor * weight, mask=inside)


@jit
def choose(
    best: Value, ids: Value, positions: Value, greedy: Value, programs: Value, WIDTH: constexpr, PDL: constexpr
) -> None:
    """The likeliest token of each row, the first of equals: kept, and fed back, one position on."""
    ahead(PDL)
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    most = tl.zeros([WIDTH], tl.float32) - float("inf")
    token = tl.zeros([WIDTH], tl.int32) + 2147483647
    for start in range(0, programs, WIDTH):
        inside = start + column < programs
        places = row * programs + start + column
        value = tl.load(best[0] + places, mask=inside, other=float("-inf"))
        place = tl.load(best[1] + places, mask=inside, other=2147483647)
        token = tl.where(value > most, place, token)  # programs, and so places, go up
        most = tl.maximum(most, value)
    found = tl.min(tl.where(most == tl.max(most, 0), token, 2147483647), 0).to(tl.int64)
    found = tl.where(found == 2147483647, 0, found)  # no number at all: the host sees it in the logits
    position = tl.load(positions + row)
    tl.store(greedy + row, found)
    tl.store(ids + row, found)
    tl.store(positions + row, tl.where(position < 0, position, position + 1))


@jit
def norm_rows(
    given: Value, gain: Value, out: Value, sizes: Value, WIDTH: constexpr, OFFSET: constexpr, PDL: constexpr
) -> None:
    """RMSNorm of rows of float32, where many rows would make every program of a product repeat it. As `add_normed`."""
    ahead(PDL)
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    inside, places = column < sizes[0], row * sizes[0] + column
    own = tl.load(given + places, mask=inside, other=0.0)
    factor = tl.rsqrt(tl.sum(own * own, 0) / sizes[0] + sizes[1])
    weight = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    tl.store(out + places, (own * factor * weight).to(out.dtype.element_ty), mask=inside)
