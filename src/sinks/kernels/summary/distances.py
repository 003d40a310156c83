"""How far dense causal attention looks, in Triton: passes of their own, for who asks, with the final log-sum-exp."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.forward import Shape
from sinks.kernels.device.language import LOG2E, Value, constexpr, jit, tl, triton
from sinks.kernels.device.tiles import place_of
from sinks.kernels.summary.summary import FIRST

SHAPES = {64: Shape(64, 64, 4, 3), 128: Shape(64, 64, 4, 3)}


@jit
def _distances(
    queries: Value, keys: Value, log_sums: Value, sums: Value, sizes: Value, scale: Value, HEADS: constexpr,
    GROUP: constexpr, DIM: constexpr, QUERIES: constexpr, KEYS: constexpr, WEIGHED: constexpr,
) -> None:  # fmt: skip
    """Sum weights over the keys from `begins` on at distances from `least` to below `most`; WEIGHED: times these."""
    length, tokens, begins, least, most = sizes
    head, begin = tl.program_id(1), tl.program_id(2) * length
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # the longest first
    token = first + tl.arange(0, QUERIES)
    real = token < length
    query = tl.load(queries + place_of(begin, token, head, HEADS, DIM), mask=real[:, None], other=0.0)
    noted = head.to(tl.int64) * tokens + begin + token
    log_sum = tl.load(log_sums + noted, mask=real, other=float("inf")) * 1.4426950408889634
    total = tl.zeros([QUERIES], tl.float32)
    for start in tl.range(tl.maximum(first - most + 1, begins), tl.minimum(first + QUERIES - least, length), KEYS):
        column = start + tl.arange(0, KEYS)
        places = place_of(begin, column, head // GROUP, HEADS // GROUP, DIM)
        some = tl.load(keys + places, mask=(column < length)[:, None], other=0.0)
        distance = token[:, None] - column[None, :]
        weights = tl.exp2(tl.dot(query, tl.trans(some)) * scale - log_sum[:, None])
        weights = tl.where((distance >= least) & (distance < most), weights, 0.0)
        if WEIGHED:
            weights = weights * distance.to(tl.float32)
        total += tl.sum(weights, 1)
    tl.store(sums + noted, total, mask=real)


def _launch(
    heads_met: tuple[Tensor, Tensor, Tensor], batch: int, scale: float, reach: tuple[int, int, int], weighed: bool
) -> Float[Tensor, "heads tokens"]:
    query, key, log_sum_exp = heads_met
    tokens, heads, head_dim = query.shape
    cut, length = SHAPES[head_dim], tokens // batch
    sums = torch.empty_like(log_sum_exp)
    _distances[(triton.cdiv(length, cut.queries), heads, batch)](
        query, key, log_sum_exp, sums, (length, tokens, *reach), scale * LOG2E,
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
