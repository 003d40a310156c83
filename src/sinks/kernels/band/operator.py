"""The operator over packed, turned heads, and its gradient: `flash` and `triton` differ in who walks the window."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.band import flash
from sinks.kernels.device import backward
from sinks.kernels.device.forward import Band, forward
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.sink_part import Finished, SinkGradients, merge_sinks, sink_gradients

Walker = Literal["flash", "triton"]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, sink_query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None,
        plan: tuple[Rows, Band, Walker],
    ) -> Tensor:  # fmt: skip
        rows, band, walker = plan
        if walker == "flash":
            out, log_sums = flash.window_forward(query, key, value, rows, band)
            merge_sinks(sink_query, key, value, logits, (out, log_sums), rows, band)
        else:
            out, figures = forward(query, sink_query, key, value, logits, rows, band)
            log_sums = figures[0]
        ctx.save_for_backward(query, sink_query, key, value, logits, out, log_sums)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        rows, band, walker = ctx.plan
        done, gradient = Finished(*ctx.saved_tensors), given[0].contiguous()
        part = sink_gradients(done, gradient, rows, band, after=walker == "flash")
        if walker == "flash":
            query, key, value = flash.window_gradients(done, gradient, rows, band)
        else:
            query, key, value = backward.window_gradients(done, gradient, part.delta, rows, band)
        _add_sinks(key, value, part, rows)
        logits = None if part.logits is None or done.logits is None else part.logits.to(done.logits.dtype)
        return query, part.query, key, value, logits, None


def _add_sinks(key: Tensor, value: Tensor, part: SinkGradients, rows: Rows) -> None:
    """Add what the sinks' columns owe; a row with fewer tokens than sinks owes zeros to its neighbours."""
    if part.key is None or part.value is None:
        return
    places = rows.firsts(part.key.shape[1]).flatten()
    key.index_add_(0, places, part.key.flatten(0, 1).to(key.dtype))
    value.index_add_(0, places, part.value.flatten(0, 1).to(value.dtype))


def attend_packed(
    query: Float[Tensor, "tokens heads head_dim"],
    sink_query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    value: Float[Tensor, "tokens kv_heads head_dim"],
    logits: Float[Tensor, " heads"] | None,
    rows: Rows,
    band: Band,
    walker: Walker,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention of turned heads over sinks and window; differentiable in all five."""
    return _Attend.apply(query, sink_query, key, value, logits, (rows, band, walker))
