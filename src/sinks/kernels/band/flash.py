"""The window through flash-attn-4 (an optional package; Hopper and newer), and the sinks with it.

Its plain window is the fastest there is, and knows no sinks. They are merged by log-sum-exp: inside its kernel where
`inside` can, elsewhere in a pass over the result of our own. Backward needs no merge: given the result and the
log-sum-exp of the *whole* softmax, its formulas give the window's share of the gradient, because a weight is
exp(score - log-sum-exp) whichever columns are asked for.

Queries whose window still covers a sink stand at their true distance from it under both angles, so it is left in the
window there and left out of the sinks' columns: no key is counted twice, and none is masked.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.errors import UnsupportedOption
from sinks.kernels.band.inside import launch
from sinks.kernels.device.forward import Band
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.sink_part import Finished, merge_sinks


@cache
def need_flash(device: torch.device) -> None:
    """Raise UnsupportedOption unless flash-attn-4 runs on `device`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        raise UnsupportedOption(
            f"flash-attn-4 needs a Hopper GPU or a newer one, and this is {device}: choose impl='triton' or 'chunked'"
        )
    if not has_flash():
        raise UnsupportedOption(
            "flash-attn-4 is not installed, or cannot be imported: pip install flash-attn-4, or choose impl='triton'"
        )


@cache
def has_flash() -> bool:
    """Whether the package is there and whole; an older flash-attn has no `cute`, and one for another torch fails."""
    try:
        return importlib.util.find_spec("flash_attn") is not None and bool(_interface())
    except (ImportError, OSError, RuntimeError):
        return False


def merges_inside(device: torch.device, band: Band) -> bool:
    """Whether sinks are merged inside flash-attn-4's own kernel (`launch.why_not_inside` tells what is in the way)."""
    return band.sinks > 0 and launch.why_not_inside(device) is None


def whole_forward(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    value: Float[Tensor, "tokens kv_heads head_dim"],
    scores: Float[Tensor, "heads tokens sinks"] | None,
    logits: Float[Tensor, " heads"] | None,
    rows: Rows,
    band: Band,
) -> tuple[
    Float[Tensor, "tokens heads head_dim"], Float[Tensor, "heads tokens"], Float[Tensor, "heads tokens sinks"] | None
]:
    """Window, sinks and sink logits: result, log-sum-exp, scores of the sinks.

    `scores` are `Turned.scores`; None where there are no sinks, or where nothing is turned and `merges_inside`.
    """
    if merges_inside(query.device, band):
        return launch.whole_forward((query, key, value), scores, logits, rows, band)
    out, log_sums = window_forward(query, key, value, rows, band)
    merge_sinks(scores, value, logits, (out, log_sums), rows, band)
    return out, log_sums, scores


def window_forward(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    value: Float[Tensor, "tokens kv_heads head_dim"],
    rows: Rows,
    band: Band,
) -> tuple[Float[Tensor, "tokens heads head_dim"], Float[Tensor, "heads tokens"]]:
    """The plain window: result and log-sum-exp."""
    calls = _interface()
    heads, where = _cut((query, key, value), rows)
    out, log_sums, *_ = calls._flash_attn_fwd(
        *heads, softmax_scale=band.scale, window_size_left=band.window - 1, window_size_right=0, return_lse=True,
        **where,
    )  # fmt: skip
    return out.view(query.shape), log_sums.view(query.shape[1], query.shape[0])


def last_forward(
    query: Float[Tensor, "batch queries heads head_dim"],
    key: Float[Tensor, "batch keys kv_heads head_dim"],
    value: Float[Tensor, "batch keys kv_heads head_dim"],
    window: int,
    scale: float,
) -> tuple[Float[Tensor, "batch queries heads head_dim"], Float[Tensor, "batch heads queries"]]:
    """The plain window of queries that stand at the last keys: result and log-sum-exp."""
    out, log_sums, *_ = _interface()._flash_attn_fwd(
        query, key, value, softmax_scale=scale, window_size_left=window - 1, window_size_right=0, return_lse=True
    )
    return out, log_sums


def window_gradients(
    done: Finished, given: Float[Tensor, "tokens heads head_dim"], rows: Rows, band: Band
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value through the keys of the window, sinks inside it included."""
    calls = _interface()
    heads, where = _cut((done.query, done.key, done.value, done.out, given), rows)
    log_sums = done.log_sums if rows.batch > 1 else done.log_sums.unsqueeze(0)
    query, key, value = calls._flash_attn_bwd(
        *heads, log_sums, softmax_scale=band.scale, causal=False,
        window_size_left=band.window - 1, window_size_right=0, **where,
    )  # fmt: skip
    return query.view_as(done.query), key.view_as(done.key), value.view_as(done.value)


@cache
def _interface() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # between flash-attn-4 and what it stands on
        return importlib.import_module("flash_attn.cute.interface")


def _cut(heads: tuple[Tensor, ...], rows: Rows) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """One row is a batch of one; several are told apart by where they begin."""
    if rows.batch == 1:
        return tuple(part.unsqueeze(0) for part in heads), {}
    begins = {"cu_seqlens_q": rows.begins, "cu_seqlens_k": rows.begins}
    return heads, begins | {"max_seqlen_q": rows.longest, "max_seqlen_k": rows.longest}
