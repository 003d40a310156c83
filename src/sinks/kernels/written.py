"""Attention with its scores written out, block by block: what a soft cap, a single query or a lens asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinks.kernels.lens import ADDED, Arrival, Lens, Look, Room, Sight, View
from sinks.kernels.phase import table_dtype
from sinks.kernels.scoring import Scoring

QUERIES = {"cpu": (16, 128), "cuda": (128, 1 << 20)}
"""Least and most queries of a block."""

ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Scores written out at a time. They then stay in a CPU's cache; on a GPU each block costs a few dozen launches."""


def scores_of(
    recent_query: Tensor,
    sink_query: Tensor,
    keys: Tensor,
    sinks: int,
    bias: Tensor | None,
    scoring: Scoring,
    room: Room | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """Scores of one block: scaled, capped, biased. The first `sinks` keys are met by `sink_query`.

    A bias that is shorter than the keys belongs to the last ones.
    """
    batch, heads, queries, _ = recent_query.shape
    transposed = keys.transpose(-1, -2)
    asking = grouped(recent_query * scoring.scale, keys)
    into = None if room is None else room.of("scores", (*asking.shape[:-1], keys.shape[2]), asking)
    scores = torch.matmul(asking, transposed, out=into)
    if sinks and sink_query is not recent_query:
        scores[..., :sinks] = grouped(sink_query * scoring.scale, keys) @ transposed[..., :sinks]
    scores = scores.view(batch, heads, queries, -1)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if bias is None or bias.shape[-1] == keys.shape[2]:
        return scores if bias is None else scores + bias
    scores[..., keys.shape[2] - bias.shape[-1] :] += bias
    return scores


def weights_of(
    scores: Float[Tensor, "batch heads queries keys"],
    sink_logits: Float[Tensor, " heads"] | None,
    room: Room | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The softmax over keys, and the share `[batch, heads, queries]` that the sink logits took of it (None: none)."""
    if sink_logits is None:
        into = None if room is None else room.of("weights", scores.shape, scores)
        return torch.softmax(scores, dim=-1, out=into), None
    logits = sink_logits.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat((scores, logits), dim=-1), dim=-1)
    return weights[..., :-1], weights[..., -1]


def grouped(heads: Tensor, keys: Tensor) -> Tensor:
    """[batch, heads, queries, n] -> [batch, kv_heads, heads of the group x queries, n]."""
    return heads.reshape(heads.shape[0], keys.shape[1], -1, heads.shape[-1])


def attend_through(
    recent_query: Float[Tensor, "batch heads queries head_dim"],
    sink_query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    values: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    sinks: int,
    bias: Float[Tensor, "#batch some_heads queries keys"] | None,
    scoring: Scoring,
    look: Look,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """What `chunked.attend_block` returns, seen and bent by lenses; a few heads at a time, at least in float32.

    With room in `look`, which knows no gradient, the next heads' scores and weights are written over these.
    """
    wide, lenses = table_dtype(recent_query.dtype), look.lenses
    keys, values, bias, view = _with_added(keys.to(wide), values.to(wide), bias, look)
    visible, opened = _sight_of(bias, keys)
    if bias is not None and scoring.slopes is None:
        bias = bias[..., opened:]  # zeros before
    parts = []
    for heads in head_ranges(recent_query, keys):
        few = view.of(heads)
        kv = slice(few.kv_heads.start, few.kv_heads.stop)
        part = slice(heads.start, heads.stop)
        query = recent_query[:, part].to(wide)
        turned = query if sink_query is recent_query else sink_query[:, part].to(wide)
        some = scoring.of_heads(heads)
        scores = scores_of(query, turned, keys[:, kv], sinks, _of_heads(bias, part), some, look.room)
        made, bent, hidden = _bend(scores, some, look, few)
        shared = visible if visible.shape[1] == 1 else visible[:, part]
        reach = (0, (made[0] > -torch.inf).sum(dim=-1)) if hidden else (opened, shared)
        sight = Sight(few, *made, bent, *reach, query, keys[:, kv], values[:, kv])
        for lens in lenses:
            if lens.see is not None:
                lens.see(sight)
        out = grouped(sight.weights, values[:, kv]) @ values[:, kv]
        parts.append(out.view(*query.shape[:3], -1))
    return torch.cat(parts, dim=1).to(recent_query.dtype)


def _bend(
    scores: Tensor, scoring: Scoring, look: Look, view: View
) -> tuple[tuple[Tensor, Tensor, Tensor | None], bool, bool]:
    """(scores, weights, share of the sink logits); whether the weights are no longer the scores' softmax; whether the
    scores are no longer the model's.
    """
    bent = hidden = False
    for lens in look.lenses:
        if lens.bend_scores is not None:
            scores, hidden = lens.bend_scores(view, scores), True
    weights, logit_mass = weights_of(scores, scoring.sink_logits, look.room)
    for lens in look.lenses:
        if lens.bend_weights is not None:
            weights, bent = lens.bend_weights(view, weights), True
    return (scores, weights, logit_mass), bent, hidden


def _sight_of(bias: Tensor | None, keys: Tensor) -> tuple[Int[Tensor, "some_batch some_heads some_queries"], int]:
    """How many keys each query sees, and the first column that is hidden from any."""
    count = keys.shape[2]
    if bias is None:
        return torch.full((1, 1, 1), count, device=keys.device), count
    seen = bias > -torch.inf
    everyone = seen.flatten(0, 2).all(dim=0)
    return seen.sum(dim=-1), count if bool(everyone.all()) else int(everyone.int().argmin())


def _with_added(
    keys: Tensor, values: Tensor, bias: Tensor | None, look: Look
) -> tuple[Tensor, Tensor, Tensor | None, View]:
    """The keys and values that lenses add, behind the others, in sight of every query."""
    view = look.view
    for lens in look.lenses:
        added = None if lens.add is None else lens.add(view.layer)
        if added is None:
            continue
        new_keys, new_values = (part.to(keys).expand(len(keys), -1, -1, -1) for part in added)
        keys, values = torch.cat((keys, new_keys), dim=2), torch.cat((values, new_values), dim=2)
        count = new_keys.shape[2]
        bias = None if bias is None else torch.nn.functional.pad(bias, (0, count))
        positions = torch.nn.functional.pad(view.keys, (0, count), value=ADDED)
        view = View(view.layer, view.heads, view.group, view.queries, positions)
    return keys, values, bias, view


def head_ranges(query: Tensor, keys: Tensor) -> Iterator[range]:
    """Query heads in runs whose scores fit `ELEMENTS`: whole groups that share a key head, or one head at a time."""
    heads, group = query.shape[1], query.shape[1] // keys.shape[1]
    each = query.shape[0] * query.shape[2] * keys.shape[2]
    size = max(_fit(query) // each // group * group, 1)
    for start in range(0, heads, size):
        yield range(start, min(start + size, heads))


def _fit(query: Tensor) -> int:
    return ELEMENTS.get(query.device.type, ELEMENTS["cuda"])


def _rows(query: Tensor, keys: Tensor) -> int:
    """Queries of a block: as many as fit, of one head on a CPU, of all heads on a GPU."""
    least, most = QUERIES.get(query.device.type, QUERIES["cuda"])
    at_once = 1 if query.device.type == "cpu" else len(query) * query.shape[1]
    return min(max(_fit(query) // (at_once * keys.shape[2]), least), most)


def _of_heads(bias: Tensor | None, part: slice) -> Tensor | None:
    return bias if bias is None or bias.shape[1] == 1 else bias[:, part]


def attend_arrival(
    arrival: Arrival,
    sink_query: Float[Tensor, "batch heads columns head_dim"],
    held: tuple[Tensor, Tensor, Tensor],
    *,
    sinks: int,
    bias: Float[Tensor, "#batch some_heads columns keys"] | None,
    scoring: Scoring,
    lenses: Sequence[Lens],
) -> Float[Tensor, "batch heads columns value_dim"]:
    """Attention of new tokens over the keys, values and key positions `held`, which include their own, under lenses."""
    keys, values, positions = held
    heads, kv_heads = arrival.query.shape[1], keys.shape[1]
    view = View(arrival.layer, range(heads), heads // kv_heads, arrival.positions, positions)
    for lens in lenses:
        if lens.arrive is not None:
            lens.arrive(arrival)
    return attend_through(
        arrival.query, sink_query, keys, values, sinks=sinks, bias=bias, scoring=scoring, look=Look(view, lenses)
    )


@dataclass(frozen=True, eq=False)
class Meeting:
    """Who stands where in one call of a layer's attention, and who sees whom.

    `visible(begin, end)` is `[batch | 1, heads | 1, end - begin, keys]` for a run of queries.
    """

    queries: Int[Tensor, "batch queries"]
    keys: Int[Tensor, "batch keys"]
    visible: Callable[[int, int], Bool[Tensor, "some_batch some_heads some_queries keys"]]


def attend_dense(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    layer: int,
    meeting: Meeting,
    scoring: Scoring,
    lenses: Sequence[Lens],
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention of turned heads under any mask, seen and bent by `lenses`, in O(block x keys) memory."""
    heads, kv_heads, queries = query.shape[1], key.shape[1], query.shape[2]
    new = slice(key.shape[2] - queries, None)
    for lens in lenses:
        if lens.arrive is not None:
            lens.arrive(Arrival(layer, meeting.queries, query, key[:, :, new], value[:, :, new]))
    rows = _rows(query, key)
    room = None if torch.is_grad_enabled() else Room()
    # Results written in place, and causal blocks longest first: each block then fits the room that the last one left in
    # the heap. Shortest first, every block asks for new room: 573 MB instead of 340 at 8,192 tokens over 30 layers.
    whole = query.new_empty(*query.shape[:3], value.shape[-1])
    for begin in reversed(range(0, queries, rows)):
        end = min(begin + rows, queries)
        seen = meeting.visible(begin, end)
        some = seen.any(dim=2).flatten(0, 1).any(dim=0).nonzero()
        reach = slice(int(some[0]), int(some[-1]) + 1) if len(some) else slice(0, 1)
        seen = seen[..., reach]
        # A row that sees nothing is a pad's: zeros instead of NaN, and nobody reads it.
        hidden = ~(seen | ~seen.any(dim=-1, keepdim=True))
        bias = torch.zeros_like(hidden, dtype=table_dtype(query.dtype)).masked_fill_(hidden, -torch.inf)
        here = (meeting.queries[:, begin:end], meeting.keys[:, reach])
        look = Look(View(layer, range(heads), heads // kv_heads, *here), lenses, room)
        part = query[:, :, begin:end]
        whole[:, :, begin:end] = attend_through(
            part, part, key[:, :, reach], value[:, :, reach], sinks=0, bias=bias, scoring=scoring, look=look
        )  # fmt: skip
    return whole
