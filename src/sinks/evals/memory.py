"""Measures memory: what a cache holds, and the peak of a piece of work above what was there before it.

On CUDA the allocator keeps the peak. On Linux the kernel does (`VmHWM`), and writing 5 to `/proc/self/clear_refs` resets it (proc(5)), so
no sample can miss a spike. Elsewhere a thread samples the resident size. The method is part of every result.
"""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch
from transformers.cache_utils import Cache

from sinks.cache.cache import SinkCache

SAMPLE_SECONDS = 0.005


def bytes_held(cache: Cache) -> int:
    """Bytes of all tensors that `cache` keeps between two forward passes."""
    if isinstance(cache, SinkCache):
        return cache.nbytes
    return sum(held.nbytes for layer in cache.layers for held in (layer.keys, layer.values) if held is not None)


@dataclass
class Peak:
    """Filled in when the watched work ends.

    Attributes:
        bytes: most memory held during the work, above what was held when it began.
    """

    bytes: int = 0


class Meter(Protocol):
    """One way to find a peak: `start` forgets the past, `stop` returns the peak since, in bytes above the start."""

    method: str

    def start(self) -> None: ...
    def stop(self) -> int: ...


class CudaMeter:
    """The allocator's own peak on one CUDA device."""

    method = "torch.cuda.max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.base = torch.cuda.memory_allocated(self.device)

    def stop(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.base


class HighWaterMeter:
    """The kernel's high-water mark of resident memory (Linux)."""

    method = "VmHWM of /proc/self/status, reset for each arm"
    reset = Path("/proc/self/clear_refs")
    status = Path("/proc/self/status")

    @classmethod
    def available(cls) -> bool:
        return sys.platform == "linux" and os.access(cls.reset, os.W_OK)

    def start(self) -> None:
        self.reset.write_text("5")
        self.base = self.high_water()

    def stop(self) -> int:
        return self.high_water() - self.base

    def high_water(self) -> int:
        line = next(line for line in self.status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


class SampledMeter:
    """Resident size sampled every 5 ms by a thread; a shorter spike can be missed."""

    method = "resident size sampled every 5 ms"

    def start(self) -> None:
        self.process = psutil.Process()
        self.base = self.most = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def sample(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            self.most = max(self.most, self.process.memory_info().rss)

    def stop(self) -> int:
        self.done.set()
        self.thread.join()
        return max(self.most, self.process.memory_info().rss) - self.base


def meter_for(device: torch.device) -> Meter:
    """The most exact meter that this device and system offer."""
    if device.type == "cuda":
        return CudaMeter(device)
    return HighWaterMeter() if HighWaterMeter.available() else SampledMeter()


@contextmanager
def watch(meter: Meter) -> Iterator[Peak]:
    """Measures the peak of the work inside; memory that earlier work freed goes back to the system first.

    Load the model and run it once before: weights mapped from a file become resident only when they are first used.
    """
    release_freed_memory()
    peak = Peak()
    meter.start()
    try:
        yield peak
    finally:
        peak.bytes = meter.stop()


def release_freed_memory() -> None:
    """Collects garbage and, where the C library can (glibc), hands its free lists back, so that they hide no later growth."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
