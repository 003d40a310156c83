"""-log softmax at one token a row, in one reading of the logits: on a GPU, PyTorch's way writes them out five times."""

# pyright: reportPossiblyUnboundVariable=false
# Branches on constants of the compilation: what one of them binds, only it uses.

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from sinks.errors import UnsupportedOption
from sinks.kernels.device.language import Value, constexpr, jit, need_triton, on, tl

WORDS = 2048
"""Logits of a row that one program looks at together."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_read_once(logits: Tensor) -> bool:
    """Whether `surprise_read_once` takes these logits: it needs a GPU that runs Triton, and float32 or narrower."""
    if logits.device.type != "cuda" or logits.dtype not in DTYPES or not logits.is_contiguous():
        return False
    try:
        need_triton(logits.device)
    except UnsupportedOption:
        return False
    return True


@jit
def _surprise(logits: Value, targets: Value, found: Value, words: Value, WORDS: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * words
    column = tl.arange(0, WORDS)
    # Each lane keeps a softmax of its own; they meet at the end, so that nothing waits for a sum across the row.
    largest = tl.zeros([WORDS], tl.float32) - float("inf")
    total = tl.zeros([WORDS], tl.float32)
    for begin in range(0, words, WORDS):
        here = tl.load(logits + begin + column, mask=begin + column < words, other=float("-inf")).to(tl.float32)
        now = tl.maximum(largest, here)
        level = tl.where(now == float("-inf"), 0.0, now)  # minus infinity minus itself would be NaN
        total = total * tl.exp(largest - level) + tl.exp(here - level)
        largest = now
    peak = tl.max(largest, 0)
    level = tl.where(peak == float("-inf"), 0.0, peak)
    log_sum = level + tl.log(tl.sum(total * tl.exp(largest - level), 0))
    wanted = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    tl.store(found + row, log_sum - wanted)


def surprise_read_once(
    logits: Float[Tensor, "queries vocab"], targets: Int[Tensor, " queries"]
) -> Float32[Tensor, " queries"]:
    """-log softmax(logits) at `targets`, nats; see `can_read_once`. What is not finite in a row shows."""
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with on(logits.device):
        _surprise[(len(logits),)](logits, targets.contiguous(), found, logits.shape[1], WORDS=WORDS, num_warps=8)
    return found
