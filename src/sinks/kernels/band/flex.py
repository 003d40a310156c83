"""Sinks and window through PyTorch's FlexAttention: portable, differentiable, and the bar for the other two.

One angle a call is all that it takes, so it walks the window, and the sinks that the window no longer covers are a
plain product, merged by log-sum-exp. On a GPU it is compiled at the first call; elsewhere it runs as plain PyTorch,
holds the whole matrix of scores, and has no gradient.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.errors import UnsupportedOption
from sinks.kernels.phase import rotate, table_dtype
from sinks.kernels.scoring import Scoring


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
    """What `reference.attend` returns, without soft cap and ALiBi slopes."""
    _refuse(query, key, value, scoring)
    recent_query = sink_query = query
    if scoring.rotary is not None:
        dtype = table_dtype(query.dtype)
        turn = scoring.rotary.tables(positions, dtype)
        in_cache = scoring.rotary.tables(positions.clamp(max=sinks + window - 1), dtype)
        key, recent_query = rotate(key, *turn, scoring.rotary), rotate(query, *turn, scoring.rotary)
        sink_query = rotate(query, *in_cache, scoring.rotary)
    out, log_sums = _walk_window(recent_query, key, value, positions, window, scoring.scale)
    log_sums = log_sums.to(table_dtype(query.dtype))
    parts, sums = [out], [log_sums.unsqueeze(-1)]
    if sinks:
        sums.append(_sink_scores(sink_query, key, positions, sinks, window, scoring.scale))
    if scoring.sink_logits is not None:
        sums.append(scoring.sink_logits.to(log_sums)[None, :, None, None].expand(*log_sums.shape, 1))
    # A pad sees nothing at all: its row must not become NaN, in the gradient neither.
    pad = (positions < 0)[:, None, :, None]
    weights = torch.softmax(torch.cat(sums, dim=-1).masked_fill(pad, 0.0), dim=-1).masked_fill(pad, 0.0)
    merged = parts[0].to(weights.dtype) * weights[..., :1]
    if sinks:
        merged = merged + _weigh(weights[..., 1 : 1 + sinks], value, positions, sinks)
    return merged.to(query.dtype)


def _refuse(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> None:
    for name, option in (("slopes", scoring.slopes), ("softcap", scoring.softcap)):
        if option is not None:
            raise UnsupportedOption(f"impl='flex' knows no {name}: choose impl='chunked'")
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UnsupportedOption("FlexAttention has no gradient on a CPU: choose impl='chunked'")


def _walk_window(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp of the keys at a distance below `window`, sinks among them."""
    ragged, width = bool((positions < 0).any()), torch.tensor(window, device=query.device)

    @no_type_check  # FlexAttention counts its parameters
    def seen(row: Tensor, head: Tensor, one: Tensor, other: Tensor) -> Tensor:
        distance = positions[row, one] - positions[row, other] if ragged else one - other
        near = (distance >= 0) & (distance < width)  # a tensor: no new compilation for another window
        return near & (positions[row, other] >= 0) & (positions[row, one] >= 0) if ragged else near

    calls, length = importlib.import_module("torch.nn.attention.flex_attention"), positions.shape[1]
    rows = positions.shape[0] if ragged else None
    mask = calls.create_block_mask(seen, rows, None, length, length, device=query.device)
    aux = calls.AuxRequest(lse=True)
    walk = _compiled() if query.device.type != "cpu" else calls.flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)  # on a CPU
        out, noted = walk(query, key, value, block_mask=mask, scale=scale, enable_gqa=True, return_aux=aux)
    return out, noted.lse


@cache  # fullgraph: a shape too many for the compiler is an error there, and not a slow way taken in silence
def _compiled() -> Any:
    return torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention, fullgraph=True)


def _take_sinks(heads: Tensor, positions: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
    """The first tokens [batch, kv_heads, sinks, dims] of each row, and which rows have them [batch, sinks]."""
    found = positions.unsqueeze(1) == torch.arange(sinks, device=positions.device)[None, :, None]
    places = found.int().argmax(dim=2)[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3])
    return heads.gather(2, places), found.any(dim=2)


def _sink_scores(query: Tensor, key: Tensor, positions: Tensor, sinks: int, window: int, scale: float) -> Tensor:
    """[batch, heads, queries, sinks]: -inf where the window covers the sink."""
    taken, there = _take_sinks(key, positions, sinks)
    wide, group = table_dtype(query.dtype), query.shape[1] // key.shape[1]
    scores = query.to(wide) @ taken.to(wide).repeat_interleave(group, dim=1).transpose(-1, -2) * scale
    gone = positions.unsqueeze(2) - torch.arange(sinks, device=positions.device) >= window
    return scores.masked_fill(~(gone & there.unsqueeze(1)).unsqueeze(1), -torch.inf)


def _weigh(weights: Tensor, value: Tensor, positions: Tensor, sinks: int) -> Tensor:
    taken, _ = _take_sinks(value, positions, sinks)
    return weights @ taken.to(weights.dtype).repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
