"""The specification: StreamingLLM's rule (arXiv 2309.17453, section 3.2), word for word.

One query at a time: collect the keys it may see, give each its position *inside the cache*, turn query and keys by
those positions, take one softmax. Nothing here knows about rings, phases or a second angle, so that every fast path
can be judged by it. Quadratic and slow; any dtype up to float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.kernels.phase import Rotary
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
    """Attention of every query over the sinks and the window that it sees; a pad (position -1) gives zeros.

    `query` and `key` arrive unturned. `positions` count the real tokens of each row from 0.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for row, column in (positions >= 0).nonzero().tolist():
        now = int(positions[row, column])
        seen = [
            (int(then), index)
            for index, then in enumerate(positions[row])
            if 0 <= then <= now and (then < sinks or now - then < window)
        ]
        stream = torch.tensor([then for then, _ in seen])
        columns = torch.tensor([index for _, index in seen])
        here = min(now, sinks + window - 1)
        stands = torch.where(stream < sinks, stream, here - (now - stream))
        out[row, :, column] = _attend_one(
            query[row, :, column], key[row][:, columns], value[row][:, columns], stands, here, scoring
        )
    return out


def _attend_one(
    query: Float[Tensor, "heads head_dim"],
    keys: Float[Tensor, "heads keys head_dim"],
    values: Float[Tensor, "heads keys value_dim"],
    stands: Int[Tensor, " keys"],
    here: int,
    scoring: Scoring,
) -> Float[Tensor, "heads value_dim"]:
    if scoring.rotary is not None:
        query = _turn(query.unsqueeze(1), torch.tensor([here]), scoring.rotary).squeeze(1)
        keys = _turn(keys, stands, scoring.rotary)
    scores = torch.einsum("hd,hkd->hk", query, keys) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.slopes is not None:
        scores = scores - scoring.slopes.to(scores)[:, None] * (here - stands)
    if scoring.sink_logits is not None:
        scores = torch.cat((scores, scoring.sink_logits.to(scores)[:, None]), dim=-1)
    weights = torch.softmax(scores, dim=-1)[:, : keys.shape[1]]
    return torch.einsum("hk,hkd->hd", weights, values)


def _turn(
    heads: Float[Tensor, "heads keys head_dim"], positions: Int[Tensor, " keys"], rotary: Rotary
) -> Float[Tensor, "heads keys head_dim"]:
    angles = positions.double()[:, None] * rotary.inv_freq.double()
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    pairs = rotary.inv_freq.numel()
    offsets = torch.arange(pairs)
    a = rotary.first + (2 * offsets if rotary.interleaved else offsets)
    b = a + (1 if rotary.interleaved else pairs)
    turned = heads.clone()
    turned[..., a] = heads[..., a] * cos - heads[..., b] * sin
    turned[..., b] = heads[..., b] * cos + heads[..., a] * sin
    return turned
