"""New keys and values of a chunk as an int8 ring will give them back, and those that stay written, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float, Float32, Int8
from torch import Tensor

from sinks.kernels.band.packed import Packed
from sinks.kernels.device.language import Value, constexpr, jit, on, tl, triton

TOKENS = 32
"""Tokens of one program, which takes one head of keys and of values."""


@dataclass(frozen=True, eq=False)
class Coded:
    """Where keys, or values, are kept, contiguous: `sinks` as they are, the window as `codes` times `scales`."""

    sinks: Float[Tensor, "batch kv_heads sinks head_dim"]
    codes: Int8[Tensor, "batch kv_heads window head_dim"]
    scales: Float32[Tensor, "batch kv_heads window 1"]


@partial(jit, varying=("kept", "count", "seen", "ahead"))
def _round(
    packed: Value, sink_heads: Value, codes: Value, scales: Value, band: Value, kept: Value, count: Value, seen: Value,
    ahead: Value, HEADS: constexpr, DIM: constexpr, WIDTH: constexpr, TOKENS: constexpr,
) -> None:  # fmt: skip
    """`seen` counts no further than the sinks; the first new token is for slot `ahead` of the window."""
    head, row = tl.program_id(1), tl.program_id(2)
    sinks, window = band
    token, dims = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    place = (row * (kept + count) + kept + token).to(tl.int64) * (HEADS * WIDTH) + head * WIDTH
    place, real = place[:, None] + dims[None, :], (token < count)[:, None] & (dims < DIM)[None, :]
    is_sink = seen + token < sinks
    stays = (token < count) & (token >= count - window) & (seen + token >= sinks)
    slot = ((row * HEADS + head) * window + (token + ahead) % window).to(tl.int64)
    sink = ((row * HEADS + head) * sinks + seen + token).to(tl.int64)
    for part in tl.static_range(2):
        heads = tl.load(packed[part] + place, mask=real, other=0.0).to(tl.float32)
        tl.store(sink_heads[part] + sink[:, None] * DIM + dims[None, :], heads, mask=real & is_sink[:, None])
        # What is not finite times zero is NaN, and so is then the scale: such a token cannot pass for a sound one.
        scale = tl.div_rn(tl.max(tl.abs(heads), 1) + tl.sum(heads * 0.0, 1), 127.0)
        code = tl.div_rn(heads, tl.where(scale > 0.0, scale, 1.0)[:, None])
        code = tl.minimum(tl.maximum((code + 12582912.0) - 12582912.0, -127.0), 127.0)  # to even: 1.5 times 2^23
        tl.store(codes[part] + slot[:, None] * DIM + dims[None, :], code.to(tl.int8), mask=real & stays[:, None])
        tl.store(scales[part] + slot, scale, mask=stays)
        tl.store(packed[part] + place, code * scale[:, None], mask=real & (seen + token >= sinks)[:, None])


def round_arrived(packed: Packed, kept: Sequence[Coded]) -> None:
    """Round the new keys and values of `packed` in place, but for sinks, and write what stays of them into `kept`."""
    standing, (batch, _, heads, width) = packed.standing, packed.key.shape
    with on(packed.key.device):
        _round[(triton.cdiv(standing.count, TOKENS), heads, batch)](
            (packed.key, packed.value), tuple(part.sinks for part in kept), tuple(part.codes for part in kept),
            tuple(part.scales for part in kept),
            (standing.sinks, standing.window), standing.kept, standing.count, min(standing.seen, standing.sinks),
            (standing.seen - standing.sinks) % standing.window,
            HEADS=heads, DIM=packed.head_dim, WIDTH=width, TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip
