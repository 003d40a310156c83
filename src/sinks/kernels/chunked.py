"""Exact attention with sinks and window in blocks of queries: O(block x (sinks + window + block)) memory.

RoPE sees only differences: R(a) R(b) = R(a + b). A recent key stands at its true distance t - j, and a sink at
p(t) - j with p(t) = min(t, sinks + window - 1). So every key is turned once, by its own stream position, and the
*query* is turned twice: by t for the recent keys and by p(t) for the sinks. One softmax over both equals
StreamingLLM's re-positioning of the whole cache, and no stored key is ever touched again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sinks.kernels.phase import rotate, table_dtype
from sinks.kernels.scoring import Scoring, cache_distance, visible
from sinks.kernels.written import grouped, scores_of, weights_of

BLOCK = 256


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads queries head_dim"],
    value: Float[Tensor, "batch kv_heads queries value_dim"],
    positions: Int[Tensor, "batch queries"],
    *,
    sinks: int,
    window: int,
    scoring: Scoring,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """What `reference.attend` returns, for a whole sequence in O(queries x (sinks + window)) time; differentiable."""
    recent_query = sink_query = query
    if scoring.rotary is not None:
        dtype, capacity = table_dtype(query.dtype), sinks + window
        turn = scoring.rotary.tables(positions, dtype)
        in_cache = scoring.rotary.tables(positions.clamp(max=capacity - 1), dtype)
        key, recent_query = rotate(key, *turn, scoring.rotary), rotate(query, *turn, scoring.rotary)
        sink_query = rotate(query, *in_cache, scoring.rotary)
    columns, sink_positions = _find_sinks(positions, sinks)
    sink_key, sink_value = _take(key, columns), _take(value, columns)
    recent_positions = positions.masked_fill(positions < sinks, -1)
    blocks = []
    for begin in range(0, positions.shape[1], BLOCK):
        end = min(begin + BLOCK, positions.shape[1])
        block, band = slice(begin, end), slice(_window_begin(positions, begin, end, window), end)
        bias = block_bias(
            positions[:, block],
            torch.cat((sink_positions, recent_positions[:, band]), dim=1),
            sinks=sinks, window=window, slopes=scoring.slopes, dtype=table_dtype(query.dtype),
        )  # fmt: skip
        keys = torch.cat((sink_key, key[:, :, band]), dim=2)
        values = torch.cat((sink_value, value[:, :, band]), dim=2)
        out = attend_block(
            recent_query[:, :, block], sink_query[:, :, block], keys, values,
            sinks=columns.shape[1], bias=bias, scoring=scoring,
        )  # fmt: skip
        blocks.append(out.where((positions[:, block] >= 0)[:, None, :, None], 0))
    return torch.cat(blocks, dim=2)


def _find_sinks(positions: Int[Tensor, "batch queries"], sinks: int) -> tuple[Tensor, Tensor]:
    """The column of each row's first tokens, and their positions (-1 where a row has fewer)."""
    wanted = torch.arange(min(sinks, positions.shape[1]), device=positions.device)
    found = positions.unsqueeze(1) == wanted.unsqueeze(1)
    return found.int().argmax(dim=2), wanted.where(found.any(dim=2), -1)


def _take(heads: Tensor, columns: Int[Tensor, "batch columns"]) -> Tensor:
    index = columns[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3])
    return heads.gather(2, index)


def _window_begin(positions: Int[Tensor, "batch queries"], begin: int, end: int, window: int) -> int:
    """The first column that any row's window reaches from the queries of this block."""
    block = positions[:, begin:end]
    earliest = block.where(block >= 0, torch.iinfo(block.dtype).max).amin(dim=1, keepdim=True)
    reached = (positions >= 0) & (positions > earliest - window)
    return min(begin, int(reached.int().argmax(dim=1).where(reached.any(dim=1), begin).min()))


def block_bias(
    queries: Int[Tensor, "batch queries"],
    keys: Int[Tensor, "batch keys"],
    *,
    sinks: int,
    window: int,
    slopes: Float[Tensor, " heads"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "batch some_heads queries keys"]:
    """What is added to the scores of a block: 0 for what a query sees, -inf for the rest, ALiBi on top.

    The row of a pad is all zeros: its result is never used, and a row of -inf would turn into NaN.
    """
    seen = visible(queries, keys, sinks, window) | (queries < 0).unsqueeze(2)
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf).unsqueeze(1)
    if slopes is None:
        return bias
    distance = cache_distance(queries, keys, sinks, window).clamp(min=0).unsqueeze(1)
    return bias - slopes.to(device=bias.device, dtype=torch.float64)[None, :, None, None].mul(distance).to(dtype)


def attend_block(
    recent_query: Float[Tensor, "batch heads queries head_dim"],
    sink_query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    values: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    sinks: int,
    bias: Float[Tensor, "#batch some_heads queries keys"] | None,
    scoring: Scoring,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """One softmax over `sinks` keys scored with `sink_query` and the others scored with `recent_query`.

    All are already turned. `bias` is added to the scores (None: every query sees every key). Half precision is widened
    to float32 first: a sink's score carries most of the weight, and rounding it to 8 bits would cost 2 % of it.
    """
    same = sink_query is recent_query
    recent_query, keys, values = (part.to(table_dtype(part.dtype)) for part in (recent_query, keys, values))
    wide_sink_query = recent_query if same else sink_query.to(recent_query.dtype)
    explicit = recent_query.shape[2] == 1 or scoring.softcap is not None
    attend_wide = _attend_explicit if explicit else _attend_fused
    return attend_wide(recent_query, wide_sink_query, keys, values, sinks, bias, scoring).to(sink_query.dtype)


def _attend_explicit(
    recent_query: Tensor, sink_query: Tensor, keys: Tensor, values: Tensor,
    sinks: int, bias: Tensor | None, scoring: Scoring,
) -> Tensor:  # fmt: skip
    """The scores written out: the shortest way for one query, and the only one with a soft cap."""
    scores = scores_of(recent_query, sink_query, keys, sinks, bias, scoring)
    weights, _ = weights_of(scores, scoring.sink_logits)
    return (grouped(weights, keys) @ values).view(*recent_query.shape[:3], -1)


def _attend_fused(
    recent_query: Tensor, sink_query: Tensor, keys: Tensor, values: Tensor,
    sinks: int, bias: Tensor | None, scoring: Scoring,
) -> Tensor:  # fmt: skip
    """PyTorch's fused kernel, which takes one query: the sinks' scores ride along as extra dimensions.

    A recent key is [k, 0] and sink j is [0, unit_j]; against the query [q, z] their products are q.k and z_j, where
    z_j is the sink's score found beforehand. A sink logit is one more such column, whose value is zero.
    """
    batch, heads, queries, head_dim = recent_query.shape
    extra = sinks + (scoring.sink_logits is not None)
    width = -(-max(head_dim + extra, values.shape[-1]) // 8) * 8
    query = F.pad(recent_query, (0, width - head_dim))
    keys_wide, values_wide = F.pad(keys, (0, width - head_dim)), F.pad(values, (0, width - values.shape[-1]))
    if sinks:
        scores = grouped(sink_query, keys) @ keys[:, :, :sinks].transpose(-1, -2)
        query[..., head_dim : head_dim + sinks] = scores.view(batch, heads, queries, sinks)
        keys_wide[:, :, :sinks] = torch.eye(sinks, width, dtype=keys.dtype, device=keys.device).roll(head_dim, dims=1)
    if scoring.sink_logits is not None:
        column = head_dim + sinks
        # Against every other key this column is multiplied by zero, so minus infinity must not enter it.
        logits = (scoring.sink_logits.to(query.dtype) / scoring.scale).clamp(min=torch.finfo(query.dtype).min / 2)
        query[..., column] = logits[None, :, None]
        unit = F.one_hot(torch.tensor([column], device=keys.device), width).to(keys.dtype)
        keys_wide = torch.cat((keys_wide, unit.expand(*keys.shape[:2], 1, width)), dim=2)
        values_wide = F.pad(values_wide, (0, 0, 0, 1))
        bias = None if bias is None else F.pad(bias, (0, 1))
    out = F.scaled_dot_product_attention(
        query, keys_wide, values_wide, attn_mask=bias, scale=scoring.scale, enable_gqa=True
    )
    return out[..., : values.shape[-1]]
