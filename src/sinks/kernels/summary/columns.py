"""What each key of dense causal attention received, in Triton: a second pass over Q K^T with the final log-sum-exp.

A program owns a tile of keys and walks the queries that see it, so that nothing is added from two sides: no atomics,
and the same sums every time.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.forward import Shape
from sinks.kernels.device.language import LOG2E, Value, constexpr, describe, jit, tl, triton

# Measured on an H200: at 131,072 tokens with d 64, 32,768 with d 128.
SHAPES = {64: Shape(128, 64, 4, 3), 128: Shape(64, 128, 4, 3)}


@jit
def _walk(
    total: Value, tensors: Value, where: Value, bounds: Value, scale: Value, QUERIES: constexpr, HIDDEN: constexpr
) -> Value:
    """Add the weights of the queries from bounds[0] up to bounds[1]; HIDDEN: not each of them sees every key."""
    keys, queries, log_sums = tensors
    begin, offset, column, length = where
    for start in tl.range(bounds[0], bounds[1], QUERIES):
        token = start + tl.arange(0, QUERIES)
        query = queries.load([begin + start, offset])
        # Past the end of a row nobody asks: exp2(-inf) = 0.
        log_sum = tl.load(log_sums + token, mask=token < length, other=float("inf")) * 1.4426950408889634
        weights = tl.exp2(tl.dot(keys, tl.trans(query)) * scale - log_sum[None, :])
        if HIDDEN:
            weights = tl.where(column[:, None] <= token[None, :], weights, 0.0)
        total += tl.sum(weights, 1)
    return total


@jit
def _columns(
    queries: Value, key_heads: Value, log_sums: Value, sums: Value, sizes: Value, scale: Value, HEADS: constexpr,
    GROUP: constexpr, DIM: constexpr, QUERIES: constexpr, KEYS: constexpr,
) -> None:  # fmt: skip
    length, tokens, kept = sizes
    head, row = tl.program_id(1), tl.program_id(2)
    begin = row * length
    first = tl.program_id(0) * KEYS  # the longest first
    column = first + tl.arange(0, KEYS)
    noted = head.to(tl.int64) * tokens + begin
    tensors = (key_heads.load([begin + first, head // GROUP * DIM]), queries, log_sums + noted)
    where = (begin, head * DIM, column, length)
    low = first // QUERIES * QUERIES
    whole = tl.minimum((first + KEYS + QUERIES - 2) // QUERIES * QUERIES, length)
    total = _walk(tl.zeros([KEYS], tl.float32), tensors, where, (low, whole), scale, QUERIES, True)
    total = _walk(total, tensors, where, (whole, length), scale, QUERIES, False)
    place = (head * tl.num_programs(2) + row).to(tl.int64) * kept + column
    tl.store(sums + place, total, mask=column < kept)


def columns(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    log_sum_exp: Float[Tensor, "heads tokens"],
    sizes: tuple[int, int],
    scale: float,
) -> Float[Tensor, "heads batch kept"]:
    """Weight on each of the first keys of each row, summed over its queries; `log_sum_exp` is what `forward` gave.

    `sizes` are the rows of the batch, and how many keys are wanted of each.
    """
    tokens, heads, head_dim = query.shape
    batch, kept = sizes
    cut, length = SHAPES[head_dim], tokens // batch
    sums = log_sum_exp.new_empty(heads, batch, kept)
    _columns[(triton.cdiv(kept, cut.keys), heads, batch)](
        describe(query, cut.queries), describe(key, cut.keys), log_sum_exp, sums, (length, tokens, kept), scale * LOG2E,
        HEADS=heads, GROUP=heads // key.shape[1], DIM=head_dim, QUERIES=cut.queries, KEYS=cut.keys,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return sums
