"""The order in which tokens are kept: by logit, and of equals the later token is the larger."""

from __future__ import annotations

from sinks.kernels.device.language import Value, constexpr, jit, tl


@jit
def ordered(x: Value) -> Value:
    """Integers that order as these numbers do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def number_of(order: Value) -> Value:
    """The number that `ordered` made this of."""
    order = order.to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@jit
def is_finite(x: Value) -> Value:
    """Whether this is a number, and not an infinite one."""
    return (x > float("-inf")) & (x < float("inf"))


@jit
def is_above(x: Value, token: Value, floor: Value, than: Value) -> Value:
    """Whether (x, token) comes above (floor, than)."""
    return (x > floor) | ((x == floor) & (token > than))


@jit
def kth_of(x: Value, k: Value) -> Value:
    """The k-th largest of these numbers, bit by bit; minus infinity if there are fewer."""
    order = ordered(x).to(tl.int64)
    low, high = tl.full([], -0x7F800001, tl.int64), tl.full([], 0x7F800001, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        if tl.sum((order >= middle).to(tl.int32), 0) >= k:
            low = middle
        else:
            high = middle
    return number_of(low)


@jit
def best_of(key: Value, token: Value) -> Value:
    """The largest key, and the first token that has it."""
    best = tl.max(key, 0)
    return best, tl.min(tl.where(key == best, token, 2147483647), 0)


@jit
def packed_best(x: Value, token: Value) -> Value:
    """The largest number and where it first stands, in one integer that orders as they do."""
    most, first = best_of(x, token)
    return (ordered(most).to(tl.int64) << 32) | (0xFFFFFFFF - first.to(tl.int64))


@jit
def unpacked(packed: Value) -> Value:
    """Number and token of `packed_best`."""
    return number_of(packed >> 32), (0xFFFFFFFF - (packed & 0xFFFFFFFF)).to(tl.int32)


@jit
def largest(packed: Value, row: Value, PLACES: constexpr) -> Value:
    """The best logit of a row, of the best in each of its chunks."""
    number, _ = unpacked(tl.max(tl.load(packed + row * PLACES + tl.arange(0, PLACES)), 0))
    return number
