"""How far dense causal attention looks, in Triton: passes of their own, for who asks, with the final log-sum-exp."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.forward import Shape
from sinks.kernels.device.language import LOG2E, Value, constexpr, describe, jit, tl, triton
from sinks.kernels.summary.summary import FIRST

SHAPES = {64: Shape(64, 64, 4, 3), 128: Shape(64, 64, 4, 3)}


@jit
def _walk(
    total: Value, tensors: Value, where: Value, bounds: Value, reach: Value, KEYS: constexpr, WEIGHED: constexpr,
    HIDDEN: constexpr,
) -> Value:  # fmt: skip
    """Add the weights of the keys from bounds[0] up to bounds[1]; HIDDEN: not all of them stand at such a distance."""
    query, key_heads, log_sum = tensors
    begin, offset, token = where
    least, most, scale = reach
    for start in tl.range(bounds[0], bounds[1], KEYS):
        column = tl.arange(0, KEYS)
        keys = key_heads.load([begin + start, offset])
        weights = tl.exp2(tl.dot(query, tl.trans(keys)) * scale - log_sum[:, None])
        if HIDDEN:
            distance = (token - start)[:, None] - column[None, :]
            weights = tl.where((distance >= least) & (distance < most), weights, 0.0)
        if WEIGHED:
            weights = weights * ((token - start).to(tl.float32)[:, None] - column.to(tl.float32)[None, :])
        total += tl.sum(weights, 1)
    return total


@jit
def _distances(
    queries: Value, key_heads: Value, log_sums: Value, sums: Value, sizes: Value, scale: Value, HEADS: constexpr,
    GROUP: constexpr, DIM: constexpr, QUERIES: constexpr, KEYS: constexpr, WEIGHED: constexpr,
) -> None:  # fmt: skip
    """Sum weights over the keys from `begins` on at distances from `least` to below `most`; WEIGHED: times these."""
    length, tokens, begins, least, most = sizes
    head, begin = tl.program_id(1), tl.program_id(2) * length
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # the longest first
    token = first + tl.arange(0, QUERIES)
    real = token < length
    noted = head.to(tl.int64) * tokens + begin + token
    log_sum = tl.load(log_sums + noted, mask=real, other=float("inf")) * 1.4426950408889634
    tensors = (queries.load([begin + first, head * DIM]), key_heads, log_sum)
    where = (begin, head // GROUP * DIM, token)
    low = tl.maximum(first - most + 1, begins)
    whole = low
    if WEIGHED:  # at any distance
        whole = low + tl.maximum(first + 1 - low, 0) // KEYS * KEYS
    reach = (least, most, scale)
    total = _walk(tl.zeros([QUERIES], tl.float32), tensors, where, (low, whole), reach, KEYS, WEIGHED, False)
    high = tl.minimum(first + QUERIES - least, length)
    total = _walk(total, tensors, where, (whole, high), reach, KEYS, WEIGHED, True)
    tl.store(sums + noted, total, mask=real)


def _launch(
    heads_met: tuple[Tensor, Tensor, Tensor], batch: int, scale: float, reach: tuple[int, int, int], weighed: bool
) -> Float[Tensor, "heads tokens"]:
    query, key, log_sum_exp = heads_met
    tokens, heads, head_dim = query.shape
    cut, length = SHAPES[head_dim], tokens // batch
    sums = torch.empty_like(log_sum_exp)
    _distances[(triton.cdiv(length, cut.queries), heads, batch)](
        describe(query, cut.queries), describe(key, cut.keys), log_sum_exp, sums, (length, tokens, *reach),
        scale * LOG2E,
        HEADS=heads, GROUP=heads // key.shape[1], DIM=head_dim, QUERIES=cut.queries, KEYS=cut.keys, WEIGHED=weighed,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return sums


def rest_reach(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    log_sum_exp: Float[Tensor, "heads tokens"],
    batch: int,
    scale: float,
) -> Float[Tensor, "heads tokens"]:
    """Sum of weight times distance over the keys behind the first ones; `log_sum_exp` is what `forward` gave."""
    return _launch((query, key, log_sum_exp), batch, scale, (FIRST, 0, len(query)), True)


def mass_at(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    log_sum_exp: Float[Tensor, "heads tokens"],
    batch: int,
    scale: float,
    distances: tuple[int, int],
) -> Float[Tensor, "heads tokens"]:
    """Weight on all keys at distances from the first to below the second of `distances`."""
    return _launch((query, key, log_sum_exp), batch, scale, (0, *distances), False)
