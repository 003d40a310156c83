"""What each token's state comes to, and the median of all its numbers, in Triton: one pass over them for the former.

Written in PyTorch the same takes some thirty passes over a residual stream, or a hundred launches for a short one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.errors import UnsupportedOption
from sinks.kernels.device.language import Value, constexpr, jit, need_triton, on, tl, triton

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""Integers as wide as a number: without their signs, both are in the same order."""
DEVICES = ("cuda",)
"""Kinds of devices on which states may be summed up here."""
MOST_WIDTH = 16384
ELEMENTS, RUN = 2048, 16
"""Numbers of a tile, and tiles that one program counts in."""
DIGIT = 3
"""Bits of the median that one pass over the numbers finds: seven counts, which fit two integers."""


def takes(hidden: Tensor) -> bool:
    """Whether states of this kind, on this machine, can be summed up by these kernels."""
    if hidden.device.type not in DEVICES or hidden.dtype not in BITS or hidden.shape[-1] > MOST_WIDTH:
        return False
    try:
        need_triton(hidden.device)
    except UnsupportedOption:
        return False
    return True


@jit
def _tokens(
    hidden: Value, figures: Value, tokens: Value, width: Value, most: Value, WIDTH: constexpr, ROWS: constexpr
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real = (row < tokens)[:, None] & (column < width)[None, :]
    numbers = tl.load(hidden + row.to(tl.int64)[:, None] * width + column[None, :], mask=real, other=0.0).to(tl.float32)
    # What is no number must not be overlooked by a maximum.
    largest = tl.max(tl.where(numbers == numbers, tl.abs(numbers), float("inf")), 1)
    apart = tl.where(real, numbers - (tl.sum(numbers, 1) / width)[:, None], 0.0)
    squares = apart * apart
    variance = tl.maximum(tl.sum(squares, 1) / width, 1.1754943508222875e-38)
    squares = squares / variance[:, None]
    kept = row < tokens
    tl.store(figures + row, largest, mask=kept)
    tl.store(figures + tokens + row, tl.sqrt(tl.sum(numbers * numbers, 1)), mask=kept)
    tl.store(figures + 2 * tokens + row, tl.sum(squares * squares, 1) / width / most, mask=kept)


def token_figures(hidden: Float[Tensor, "texts tokens width"]) -> Float[Tensor, "3 texts tokens"]:
    """Of each token its largest magnitude, its norm, its kurtosis over the width as a share of the most there is.

    What is no number counts as infinite.
    """
    hidden = hidden.contiguous()
    texts, tokens, width = hidden.shape
    figures = torch.empty(3, texts, tokens, dtype=torch.float32, device=hidden.device)
    wide = triton.next_power_of_2(width)
    rows = max(ELEMENTS // wide, 1)
    with on(hidden.device):
        _tokens[(triton.cdiv(texts * tokens, rows),)](
            hidden, figures, texts * tokens, width, width - 2 + 1 / (width - 1), WIDTH=wide, ROWS=rows, num_warps=8
        )
    return figures


@jit
def _digits(counts: Value, text: Value, half: Value, PASSES: constexpr, LEFT: constexpr, DIGIT: constexpr) -> Value:
    """The median's bits as far as `PASSES` passes have found them: the largest number that at most half lie below."""
    found = tl.zeros([], tl.int32)
    digit = tl.arange(0, 1 << DIGIT)
    for step in tl.static_range(PASSES):
        below = tl.load(counts + ((text * LEFT + step) << DIGIT) + digit)
        reached = tl.sum(((below <= half) & (digit > 0)).to(tl.int32), 0)
        found += reached << ((LEFT - 1 - step) * DIGIT)
    return found


@jit
def _piece(bits: Value, size: Value, step: Value, MASK: constexpr, ELEMENTS: constexpr, RUN: constexpr) -> Value:
    """One of the tiles that a program goes through of its text, without signs; past the end, the largest number."""
    at = (tl.program_id(0).to(tl.int64) * RUN + step) * ELEMENTS + tl.arange(0, ELEMENTS)
    text = bits + tl.program_id(1).to(tl.int64) * size
    return tl.load(text + at, mask=at < size, other=MASK).to(tl.int32) & MASK


@jit
def _count(
    bits: Value, counts: Value, size: Value, half: Value, PASSES: constexpr, LEFT: constexpr, DIGIT: constexpr,
    MASK: constexpr, ELEMENTS: constexpr, RUN: constexpr,
) -> None:  # fmt: skip
    """Count the numbers below each next digit that the median may have."""
    text = tl.program_id(1)
    found = _digits(counts, text, half, PASSES, LEFT, DIGIT)
    low = tl.zeros([ELEMENTS], tl.int32)  # four counts of eight bits each, three in the other
    high = tl.zeros([ELEMENTS], tl.int32)
    for step in range(RUN):
        numbers = _piece(bits, size, step, MASK, ELEMENTS, RUN)
        for tried in tl.static_range(1, 1 << DIGIT):
            pivot = tl.minimum(found.to(tl.int64) + (tried << ((LEFT - 1 - PASSES) * DIGIT)), MASK).to(tl.int32)
            one = tl.where(numbers < pivot, 1 << (8 * ((tried - 1) % 4)), 0)
            if tried < 5:
                low += one
            else:
                high += one
    into = counts + ((text * LEFT + PASSES) << DIGIT)
    for tried in tl.static_range(1, 1 << DIGIT):
        held = low if tried < 5 else high
        tl.atomic_add(into + tried, tl.sum((held >> (8 * ((tried - 1) % 4))) & 255, 0).to(tl.int64))


@jit
def _settle(
    bits: Value, counts: Value, settled: Value, size: Value, half: Value, LEFT: constexpr, DIGIT: constexpr,
    MASK: constexpr, ELEMENTS: constexpr, RUN: constexpr,
) -> None:  # fmt: skip
    """Write the upper middle number, how many lie below it, and the largest of these."""
    text = tl.program_id(1)
    upper = _digits(counts, text, half, LEFT, LEFT, DIGIT)
    below = tl.zeros([ELEMENTS], tl.int32)
    largest = tl.zeros([ELEMENTS], tl.int32)
    for step in range(RUN):
        numbers = _piece(bits, size, step, MASK, ELEMENTS, RUN)
        below += (numbers < upper).to(tl.int32)
        largest = tl.maximum(largest, tl.where(numbers < upper, numbers, 0))
    into = settled + text * 3
    tl.atomic_max(into, upper.to(tl.int64))
    tl.atomic_add(into + 1, tl.sum(below, 0).to(tl.int64))
    tl.atomic_max(into + 2, tl.max(largest, 0).to(tl.int64))


def medians(hidden: Float[Tensor, "texts ..."]) -> Float[Tensor, " texts"]:
    """The exact median of each text's magnitudes, in float64, the mean of the middle two if their number is even.

    The upper one is found `DIGIT` bits at a time, from the highest on, by counting what lies below each of the
    possible numbers: sums of integers, which come out the same in any order.
    """
    numbers = hidden.flatten(1).contiguous()
    bits = numbers.view(BITS[numbers.dtype])
    texts, size = bits.shape
    width = 8 * bits.element_size()
    passes, half = -(-(width - 1) // DIGIT), size // 2
    counts = torch.zeros(texts, passes, 1 << DIGIT, dtype=torch.int64, device=bits.device)
    settled = torch.zeros(texts, 3, dtype=torch.int64, device=bits.device)
    grid = (triton.cdiv(size, ELEMENTS * RUN), texts)
    cut = {"LEFT": passes, "DIGIT": DIGIT, "MASK": (1 << (width - 1)) - 1, "ELEMENTS": ELEMENTS, "RUN": RUN}
    with on(bits.device):
        for step in range(passes):
            _count[grid](bits, counts, size, half, PASSES=step, **cut, num_warps=8)
        _settle[grid](bits, counts, settled, size, half, **cut, num_warps=8)
    upper, below, lower = settled.unbind(dim=1)
    lower = upper if size % 2 else lower.where(below >= half, upper)
    return (_number(upper, numbers.dtype) + _number(lower, numbers.dtype)) / 2


def _number(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(BITS[dtype]).view(dtype).double()
