"""The operator over heads that are not turned yet, and its gradient: `flash` and `triton` differ in who walks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.band import flash
from sinks.kernels.device import backward
from sinks.kernels.device.forward import Band, forward
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.sink_part import Finished, settle, sink_gradients
from sinks.kernels.device.turn import turn, turn_back
from sinks.kernels.phase import Rotary

Walker = Literal["flash", "triton"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is the same forward and backward: the rows, who sees whom, how heads are turned, who walks the window."""

    rows: Rows
    band: Band
    rotary: Rotary | None
    walker: Walker

    @property
    def capacity(self) -> int:
        """Keys of a full cache."""
        return self.band.sinks + self.band.window


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, plan: Plan) -> Tensor:
        rows, band = plan.rows, plan.band
        # Where nothing is turned, queries need no kernel of their own to meet the sinks: the window's does it too.
        meets_inside = plan.walker == "flash" and plan.rotary is None and flash.merges_inside(query.device, band)
        turned = turn(query, key, rows, plan.rotary, replace(band, sinks=0) if meets_inside else band)
        scores = turned.scores
        if plan.walker == "flash":
            out, log_sums, scores = flash.whole_forward(turned.query, turned.key, value, scores, logits, rows, band)
        else:
            out, figures = forward(turned.query, turned.key, value, scores, logits, rows, band)
            log_sums = figures[0]
        ctx.save_for_backward(turned.sinks, query, turned.query, turned.key, value, scores, logits, out, log_sums)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        rows, band, rotary = plan.rows, plan.band, plan.rotary
        sinks, *saved = ctx.saved_tensors
        done, gradient = Finished(*saved), given[0].contiguous()
        part = sink_gradients(done, gradient, rows, band)
        if plan.walker == "flash":
            query, key, value = flash.window_gradients(done, gradient, rows, band)
        else:
            query, key, value = backward.window_gradients(done, gradient, part.delta, rows, band)
        settle(done, part, key, value, rows, band, rotary)
        query = turn_back(query, (done.key, sinks), part.slopes, rows, rotary, plan.capacity)
        key = turn_back(key, (key, None), None, rows, rotary, plan.capacity)
        logits = None if part.logits is None or done.logits is None else part.logits.to(done.logits.dtype)
        return query, key, value, logits, None


def attend_packed(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads queries head_dim"],
    value: Float[Tensor, "tokens kv_heads head_dim"],
    logits: Float[Tensor, " heads"] | None,
    plan: Plan,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention over sinks and window, packed as `value` is; differentiable in the first four."""
    query, key = (heads if heads.stride(3) == 1 else heads.contiguous() for heads in (query, key))
    return _Attend.apply(query, key, value, logits, plan)
