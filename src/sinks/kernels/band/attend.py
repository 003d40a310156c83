"""The entrance of the room: says what it cannot do, packs and turns, attends, unpacks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.band.flash import need_flash
from sinks.kernels.band.operator import Plan, Walker, attend_packed
from sinks.kernels.device.forward import Band, Statistics, forward
from sinks.kernels.device.language import need_triton, on
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.turn import turn
from sinks.kernels.scoring import Scoring

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
MOST_SINKS = 64


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads queries head_dim"],
    value: Float[Tensor, "batch kv_heads queries value_dim"],
    positions: Int[Tensor, "batch queries"] | None,
    *,
    sinks: int,
    window: int,
    scoring: Scoring,
    walker: Walker,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """What `reference.attend` returns; differentiable in query, key, value and sink logits. None: no pads.

    Raises UnsupportedOption, naming another implementation, for what these kernels or this machine cannot do.
    """
    refuse(query, value, sinks, scoring, walker)
    rows = _rows(query, positions)
    if not rows.tokens:
        return (query + key.sum() + value.sum()) * 0.0
    band = Band(sinks, window, scoring.scale)
    with on(query.device):
        plan = Plan(rows, band, scoring.rotary, walker)
        return rows.unpack(attend_packed(query, key, rows.pack(value), scoring.sink_logits, plan))


def measure(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads queries head_dim"],
    value: Float[Tensor, "batch kv_heads queries value_dim"],
    positions: Int[Tensor, "batch queries"] | None,
    *,
    sinks: int,
    window: int,
    scoring: Scoring,
    first_keys: int,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Statistics]:
    """What `attend` returns, and statistics of its weights from the same pass; no gradient.

    `first_keys`, at most `sinks`, is how many of the first tokens `Statistics.mass` counts.
    """
    if not 0 <= first_keys <= sinks:
        raise InvalidInput(f"first_keys={first_keys}: mass is counted on sinks, of which there are {sinks}")
    refuse(query, value, sinks, scoring, "triton")
    rows, band = _rows(query, positions), Band(sinks, window, scoring.scale)
    with torch.no_grad(), on(query.device):
        query, key = (heads if heads.stride(3) == 1 else heads.contiguous() for heads in (query, key))
        turned = turn(query, key, rows, scoring.rotary, band, asked=False)
        out, figures = forward(
            turned.query, turned.key, rows.pack(value), turned.scores, scoring.sink_logits, rows, band, first_keys
        )
    log_sum_exp, mass, entropy, maximum = (rows.spread(part) for part in figures)
    return rows.unpack(out), Statistics(mass, entropy, maximum, log_sum_exp)


def _rows(query: Tensor, positions: Tensor | None) -> Rows:
    return Rows.whole(query.shape[0], query.shape[2], query.device) if positions is None else Rows.of(positions)


def refuse(query: Tensor, value: Tensor, sinks: int, scoring: Scoring, walker: Walker) -> None:
    """Raise UnsupportedOption, naming another implementation, for what cannot be done here."""
    if scoring.scale <= 0:
        raise UnsupportedOption(f"impl={walker!r} knows no scale of {scoring.scale}, 0 or less: choose impl='chunked'")
    for name, option in (("slopes", scoring.slopes), ("softcap", scoring.softcap)):
        if option is not None:
            raise UnsupportedOption(f"impl={walker!r} knows no {name}: choose impl='chunked'")
    if query.shape[-1] != value.shape[-1] or query.shape[-1] not in HEAD_DIMS:
        raise UnsupportedOption(
            f"impl={walker!r} takes heads of 64 or 128 dimensions, and these have {query.shape[-1]} and, for values, "
            f"{value.shape[-1]}: choose impl='flex' or 'chunked'"
        )
    if query.dtype not in DTYPES:
        raise UnsupportedOption(f"impl={walker!r} takes bfloat16 or float16, not {query.dtype}: choose impl='chunked'")
    if sinks > MOST_SINKS:
        raise UnsupportedOption(f"impl={walker!r} takes at most {MOST_SINKS} sinks, not {sinks}: choose impl='chunked'")
    need_triton(query.device)
    if walker == "flash":
        need_flash(query.device)
