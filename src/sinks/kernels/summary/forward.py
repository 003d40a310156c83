"""Dense causal attention and its summary in one pass, in Triton: the kernel and its launch.

The keys behind the first 16 are walked first, and what the running softmax holds then is kept apart: mass and entropy
of the rest. The first 16 come last, so that their weights can be written with the final log-sum-exp.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.device.forward import Shape, walk
from sinks.kernels.device.language import LOG2E, Value, constexpr, describe, jit, tl, triton
from sinks.kernels.device.tiles import hide, load_firsts, place_of, take_in
from sinks.kernels.summary.summary import FIRST

# Measured on an H200: at 131,072 tokens with d 64, 32,768 with d 128.
SHAPES = {64: Shape(64, 128, 4, 2, 168), 128: Shape(64, 64, 4, 3)}
FIGURES = 4
"""log-sum-exp, maximum, mass of the rest, entropy of the rest."""


@jit
def _forward(
    queries: Value, key_heads: Value, value_heads: Value, first_heads: Value, results: Value, sizes: Value,
    scale: Value, HEADS: constexpr, GROUP: constexpr, DIM: constexpr, QUERIES: constexpr, KEYS: constexpr,
    FIRST: constexpr,
) -> None:  # fmt: skip
    length, tokens = sizes
    head, begin = tl.program_id(1), tl.program_id(2) * length
    kv_head = head // GROUP
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # the longest first
    token = first + tl.arange(0, QUERIES)
    zeros = tl.zeros([QUERIES], tl.float32)
    state = (tl.zeros([QUERIES, DIM], tl.float32), zeros, zeros - float("inf"), zeros)
    query = queries.load([begin + first, head * DIM])
    heads, where, shape = ((query,), key_heads, value_heads), (begin, kv_head * DIM, token), (0, length, scale)
    whole, end = FIRST + tl.maximum(first + 1 - FIRST, 0) // KEYS * KEYS, tl.minimum(first + QUERIES, length)
    states = walk((state,), heads, where, (FIRST, FIRST, whole, whole), shape, KEYS, False, True)
    state = walk(states, heads, where, (whole, end, end, end), shape, KEYS, True, True)[0]
    _, total, largest, weighed = state
    has_rest = (token >= FIRST) & (total > 0)  # past the end there is none either
    rest_sum = tl.where(has_rest, largest * scale + tl.log2(tl.where(has_rest, total, 1.0)), float("-inf"))
    rest_entropy = tl.where(has_rest, rest_sum - weighed / tl.where(has_rest, total, 1.0) * scale, 0.0)

    column = tl.arange(0, FIRST)
    keys = load_firsts(first_heads[0], begin, kv_head, length, HEADS // GROUP, DIM, FIRST)
    values = load_firsts(first_heads[1], begin, kv_head, length, HEADS // GROUP, DIM, FIRST)
    scores = tl.dot(query, tl.trans(keys))
    scores = hide(scores, column[None, :] <= token[:, None])
    gathered, total, largest, _ = take_in(state, scores, values, scale, False)
    out, figures, weights = results
    real = token < length
    log_sum = largest * scale + tl.log2(total)
    place = place_of(begin, token, head, HEADS, DIM)
    tl.store(out + place, (gathered / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
    noted = head.to(tl.int64) * tokens + begin + token
    tl.store(
        weights + noted[:, None] * FIRST + column[None, :], tl.exp2(scores * scale - log_sum[:, None]),
        mask=real[:, None],
    )  # fmt: skip
    step = tl.cast(tokens, tl.int64) * HEADS  # one token alone is a constant
    tl.store(figures + noted, log_sum * 0.6931471805599453, mask=real)
    tl.store(figures + step + noted, tl.exp2(largest * scale - log_sum), mask=real)
    tl.store(figures + 2 * step + noted, tl.exp2(rest_sum - log_sum), mask=real)
    tl.store(figures + 3 * step + noted, tl.maximum(rest_entropy, 0.0) * 0.6931471805599453, mask=real)


def forward(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    value: Float[Tensor, "tokens kv_heads head_dim"],
    batch: int,
    scale: float,
) -> tuple[
    Float[Tensor, "tokens heads head_dim"], Float[Tensor, "figures heads tokens"], Float[Tensor, "heads tokens few"]
]:
    """Causal attention of `batch` rows of one length, one after another; its `FIGURES`; weights on the first keys."""
    tokens, heads, head_dim = query.shape
    cut, length = SHAPES[head_dim], tokens // batch
    out = torch.empty_like(query)
    figures = torch.empty(FIGURES, heads, tokens, dtype=torch.float32, device=query.device)
    first = torch.empty(heads, tokens, FIRST, dtype=torch.float32, device=query.device)
    _forward[(triton.cdiv(length, cut.queries), heads, batch)](
        describe(query, cut.queries), describe(key, cut.keys), describe(value, cut.keys), (key, value),
        (out, figures, first), (length, tokens), scale * LOG2E,
        HEADS=heads, GROUP=heads // key.shape[1], DIM=head_dim, QUERIES=cut.queries, KEYS=cut.keys, FIRST=FIRST,
        num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
    )  # fmt: skip
    return out, figures, first
