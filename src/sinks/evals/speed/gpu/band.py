"""Attention over whole texts: ours against FlexAttention and a plain window, and what statistics cost.

Useful TFLOP/s count visible pairs only: 4 d H pairs forward, 3.5 times that forward and backward. Heads are turned
already, but for `turning too`, which is the whole of `attend` from unturned heads. `FlexAttention` has sinks and window
as one mask and is the bar; flash-attn-4's plain window has no sinks and is the ceiling; dense SDPA sees every key, as a
model without a window does, and is credited with the visible pairs alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as dense

from sinks.evals.speed.gpu.absent import reason
from sinks.evals.speed.gpu.clock import in_turn
from sinks.kernels import Rotary, Scoring, attend, attend_measured
from sinks.kernels.band import flash

SINKS, HEADS, KV_HEADS = 4, 32, 8

Call = Callable[[], object]
Way = Callable[[], Tensor]
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Text:
    """So many tokens of heads so wide, through so long a window."""

    tokens: int
    window: int
    head_dim: int

    @property
    def operations(self) -> float:
        """Useful floating-point operations of a forward pass."""
        pairs = self.tokens * (SINKS + self.window) - self.window * self.window / 2
        return 4 * self.head_dim * HEADS * pairs


@dataclass(frozen=True)
class Attended:
    """Milliseconds of one way: forward, and forward and backward."""

    text: Text
    way: str
    forward: float
    both: float

    @property
    def rates(self) -> tuple[float, float]:
        """Useful TFLOP/s: forward, and forward and backward."""
        return self.text.operations / self.forward / 1e9, 3.5 * self.text.operations / self.both / 1e9


@dataclass(frozen=True)
class Statistics:
    """Milliseconds of the forward pass without statistics and with them."""

    text: Text
    without: float
    along: float


def heads_of(text: Text) -> list[Tensor]:
    """Query, key, value and a gradient, `[tokens, heads, head_dim]` as projections leave them; random."""
    made = torch.Generator("cuda").manual_seed(text.tokens)
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": made}
    return [torch.randn(text.tokens, h, text.head_dim, **like) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def scorings(text: Text) -> tuple[Scoring, Scoring]:
    """Of heads that are turned already, and of heads that are not."""
    scale, pairs = text.head_dim**-0.5, text.head_dim // 2
    rotary = Rotary(1.0 / 10000 ** (torch.arange(pairs, device="cuda").double() / pairs))
    return Scoring(scale), Scoring(scale, rotary)


def ways(text: Text, heads: list[Tensor], absent: list[str]) -> dict[str, Way]:
    """Every way to the same result, and those that see other keys, as calls; `absent` is told who cannot come."""
    query, key, value = heads
    sizes: dict[str, Any] = {"sinks": SINKS, "window": text.window}
    turned, unturned = scorings(text)

    def batch() -> Batch:
        return query[None].transpose(1, 2), key[None].transpose(1, 2), value[None].transpose(1, 2)

    found = {
        "FlexAttention": flex_way(batch, text),
        "dense SDPA": lambda: dense(*batch(), is_causal=True, scale=turned.scale, enable_gqa=True),
        "sinks, triton": lambda: attend(*batch(), **sizes, scoring=turned, impl="triton"),
        "sinks, triton, turning too": lambda: attend(*batch(), **sizes, scoring=unturned, impl="triton"),
    }
    if not flash.has_flash():
        absent.append("flash-attn-4, ours through it and its plain window: not installed (pip install sinks[flash])")
        return found
    plain = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    options = {"softmax_scale": turned.scale, "causal": True, "window_size": (text.window - 1, 0)}
    return found | {
        "sinks, flash": lambda: attend(*batch(), **sizes, scoring=turned, impl="flash"),
        "sinks, flash, turning too": lambda: attend(*batch(), **sizes, scoring=unturned, impl="flash"),
        "flash-attn-4, plain window": lambda: plain(query[None], key[None], value[None], **options)[0],
    }


def flex_way(batch: Callable[[], Batch], text: Text) -> Way:
    """FlexAttention, compiled, with sinks and window as one mask."""
    calls = importlib.import_module("torch.nn.attention.flex_attention")
    window = text.window

    @no_type_check  # FlexAttention counts its parameters
    def seen(row: Tensor, head: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return (one >= other) & ((one - other < window) | (other < SINKS))

    mask = calls.create_block_mask(seen, None, None, text.tokens, text.tokens, device="cuda")
    walk = torch.compile(calls.flex_attention, dynamic=False)
    return lambda: walk(*batch(), block_mask=mask, scale=text.head_dim**-0.5, enable_gqa=True)


def attended(text: Text, rounds: int, absent: list[str]) -> list[Attended]:
    """Forward, and forward and backward, of every way that works here; `absent` is told the others."""
    *heads, given = heads_of(text)
    found = ways(text, heads, absent)

    def both(way: Way) -> Call:
        return lambda: torch.autograd.grad(out := way(), heads, in_order_of(out, given))

    with torch.no_grad():
        able = {name: way for name, way in found.items() if _works(name, way, text, absent)}
        ahead = in_turn(able, rounds)
    for part in heads:
        part.requires_grad_()
    back = {name: both(way) for name, way in able.items()}
    whole = in_turn(
        {name: call for name, call in back.items() if _works(f"{name}, backward", call, text, absent)}, rounds
    )
    return [Attended(text, name, ahead[name], time) for name, time in whole.items()]


def _works(what: str, call: Call, text: Text, absent: list[str]) -> bool:
    try:
        call()
    except Exception as error:
        absent.append(f"{what}, {text.tokens:,} tokens, d {text.head_dim}: {reason(error)}")
        return False
    return True


def in_order_of(out: Tensor, given: Tensor) -> Tensor:
    """The gradient in the order of axes of a result: tokens before heads, or the other way round, as PyTorch has it."""
    return given.view(out.shape) if out.shape[-2] == HEADS else given[None].transpose(1, 2)


def statistics_cost(text: Text, rounds: int) -> Statistics:
    """Our forward pass with and without statistics, in turn."""
    heads = [part[None].transpose(1, 2) for part in heads_of(text)[:3]]
    scoring, _ = scorings(text)
    given: dict[str, Any] = {"sinks": SINKS, "window": text.window, "scoring": scoring}
    with torch.no_grad():
        calls: dict[str, Callable[[], object]] = {
            "without": lambda: attend(*heads, **given, impl="triton"),
            "along": lambda: attend_measured(*heads, **given, first_keys=SINKS),
        }
        found = in_turn(calls, rounds)
    return Statistics(text, found["without"], found["along"])
