"""A chunk behind a ring: the band of the whole stream, for the new tokens alone, in one call whatever their number.

Forward only. See `packed` for why this is exact; the kernels are those of `attend`, told where the queries begin.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sinks.errors import UnsupportedOption
from sinks.kernels.band import flash
from sinks.kernels.band.attend import refuse
from sinks.kernels.band.operator import Walker
from sinks.kernels.band.packed import Packed
from sinks.kernels.device.forward import forward
from sinks.kernels.device.language import on
from sinks.kernels.device.sink_part import merge_sinks
from sinks.kernels.scoring import Scoring

LEAST = 2
"""New tokens from which the kernels are asked: a single one is a step."""


def choose_arriving(query: Tensor, value: Tensor, *, sinks: int, scoring: Scoring) -> Walker | None:
    """How a chunk of equal rows without pads attends behind its ring: by whom the window is walked, on a GPU.

    None: block by block, in PyTorch. So it is on other devices, in float32, and with what `attend.refuse` names.
    """
    if query.device.type != "cuda" or query.shape[2] < LEAST:
        return None
    walkers: tuple[Walker, ...] = ("flash", "triton")
    for walker in walkers:
        try:
            refuse(query, value, sinks, scoring, walker)
        except UnsupportedOption:
            continue
        return walker
    return None


def attend_arriving(
    packed: Packed, scoring: Scoring, walker: Walker
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attention of the new tokens of packed rows over sinks and window."""
    standing = packed.standing
    rows, band = standing.rows, standing.band(scoring.scale)
    heads, logits = (packed.key, packed.value), scoring.sink_logits
    with on(packed.query.device):
        if walker == "flash":
            out, log_sums = flash.last_forward(packed.query, *heads, rows, band)
            merge_sinks(packed.sink_query, *heads, logits, (out, log_sums), rows, band)
        else:
            out, _ = forward(packed.query, packed.sink_query, *heads, logits, rows, band)
    return rows.unpack(out)[:, :, standing.kept :]
