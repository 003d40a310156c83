"""Time on a GPU: calls in turn, bursts of steps, and the two rates that everything is held to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sinks.errors import InvalidInput
from sinks.reading.provenance import version_of

WARM_UP = 3
"""Calls of each contender before any is timed: the first ones compile."""

AHEAD = 2_000_000
"""Clock ticks, about a millisecond, that the device waits before a call is timed, so that the host gets ahead of it."""

BURST = 150.0
"""Milliseconds that a burst of steps may take: the slow would else have most of the time."""

COPIED = 1 << 31
"""Bytes of the copy whose rate is the ceiling of decoding: many times the cache of any GPU."""


def need_gpu(what: str) -> None:
    """Raises InvalidInput, naming the way without one, where there is no CUDA GPU."""
    if not torch.cuda.is_available():
        raise InvalidInput(f"{what} needs a CUDA GPU, and PyTorch finds none here: take `sinks bench cpu` instead")


def machine() -> dict[str, str]:
    """The GPU by name, and the versions that its numbers depend on."""
    names = ("sinks", "torch", "transformers", "triton", "flash-attn-4")
    return {"gpu": torch.cuda.get_device_name()} | {name: version_of(name) for name in names}


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call between events on the device, taken in turn: a hot GPU slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + WARM_UP):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD)
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


@dataclass(frozen=True)
class Burst:
    """`run(n)` makes n steps. A burst has as many as fit `BURST`, but no fewer than `least` and no more than `most`."""

    run: Callable[[int], Any]
    most: int
    least: int = 2

    def length(self, milliseconds: float) -> int:
        """Steps of a burst where one takes so long."""
        return min(max(int(BURST / milliseconds), self.least), self.most)


def bursts(
    writers: Mapping[str, Burst], rounds: int, lost: dict[str, Exception] | None = None
) -> dict[str, list[float]]:
    """Milliseconds a step of each writer, one number a round, in turn; from the first launch until the device is done.

    Who fails is told to `lost` and takes no part any more; without it, the error is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in writers}
    lengths = dict.fromkeys(writers, 0)

    def turn(name: str) -> None:
        if not lengths[name]:
            writers[name].run(2)
            lengths[name] = writers[name].length(_burst(writers[name].run, 2))
        else:
            times[name].append(_burst(writers[name].run, lengths[name]))

    for _ in range(rounds + 1):
        for name in [*times]:
            try:
                turn(name)
            except Exception as error:
                if lost is None:
                    raise
                lost[name] = error
                del times[name]
    return times


def _burst(run: Callable[[int], Any], steps: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run(steps)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / steps


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`call` as a CUDA graph, after it has run aside as often as it takes to be compiled and to claim its memory."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread asks the device meanwhile
        call()
    return graph


def copy_rate(rounds: int = 20) -> float:
    """TB/s of a large copy inside the device, bytes read and written both counted."""
    source = torch.randint(256, (COPIED,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / in_turn({"copy": lambda: target.copy_(source)}, rounds)["copy"] / 1e9


def product_rate(rounds: int = 20) -> float:
    """TFLOP/s of a large bfloat16 product of random numbers: zeros would be faster."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / in_turn({"product": lambda: one @ other}, rounds)["product"] / 1e9
