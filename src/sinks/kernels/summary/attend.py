"""The entrance of the room: says what it cannot do, packs, attends, and hands over the summary."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sinks.errors import UnsupportedOption
from sinks.kernels.band import attend as band
from sinks.kernels.device.language import on
from sinks.kernels.device.rows import Rows
from sinks.kernels.scoring import Scoring
from sinks.kernels.summary.columns import columns
from sinks.kernels.summary.distances import mass_at, rest_reach
from sinks.kernels.summary.forward import forward
from sinks.kernels.summary.summary import FIRST, Summary


def refuse(query: Tensor, value: Tensor, scoring: Scoring) -> None:
    """Raise UnsupportedOption, naming another implementation, for what these kernels or this machine cannot do."""
    if scoring.sink_logits is not None:
        raise UnsupportedOption("a summary knows no sink logits: choose impl='chunked'")
    band.refuse(query, value, FIRST, scoring, "triton")


def attend_summarised(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads queries head_dim"],
    value: Float[Tensor, "batch kv_heads queries value_dim"],
    *,
    layer: int,
    scoring: Scoring,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Summary]:
    """Dense causal attention of heads that are turned already, without pads, and its summary; no gradient.

    Raises UnsupportedOption for what `refuse` says cannot be done.
    """
    refuse(query, value, scoring)
    batch, heads, length, _ = query.shape
    rows = Rows.whole(batch, length, query.device)
    with on(query.device):
        packed = [rows.pack(part) for part in (query, key, value)]
        out, figures, first = forward(packed[0], packed[1], packed[2], batch, scoring.scale)

    def received(kept: int) -> Tensor:
        with on(query.device):
            sums = columns(packed[0], packed[1], figures[0], (batch, kept), scoring.scale)
        return sums.transpose(0, 1)

    def mass_of(least: int, most: int) -> Tensor:
        with on(query.device):
            return in_batch(mass_at(packed[0], packed[1], figures[0], batch, scoring.scale, (least, most)))

    def reach() -> Tensor:
        with on(query.device):
            return in_batch(rest_reach(packed[0], packed[1], figures[0], batch, scoring.scale))

    def in_batch(sums: Tensor) -> Tensor:
        return sums.view(heads, batch, length).transpose(0, 1)

    parts = figures.view(-1, heads, batch, length).transpose(1, 2)
    found = Summary(
        layer=layer,
        log_sum_exp=parts[0],
        maximum=parts[1],
        first=first.view(heads, batch, length, FIRST).transpose(0, 1),
        rest=parts[2],
        rest_entropy=parts[3],
        columns=received,
        at_distance=mass_of,
        reach=reach,
    )
    return rows.unpack(out), found
