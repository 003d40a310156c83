"""Measures memory: what a cache holds, and the peak of a piece of work above what was there before it.

On CUDA the allocator keeps the peak. On Linux the kernel does (`VmHWM`), and writing 5 to `/proc/self/clear_refs`
resets it (proc(5)), so that no spike is missed. Elsewhere a thread samples the resident size. A result names its
method.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sinks.cache.cache import SinkCache

SAMPLE_SECONDS = 0.005


def bytes_held(cache: Cache) -> int:
    """Bytes of the tensors that `cache` keeps between two forward passes: its keys and values."""
    if isinstance(cache, SinkCache):
        return cache.nbytes
    return sum(held.nbytes for layer in cache.layers for held in vars(layer).values() if isinstance(held, Tensor))


@dataclass
class Peak:
    """`bytes`: most memory held during the watched work, above what was held when it began; set when it ends."""

    bytes: int = 0


@runtime_checkable
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
        self.base = 0

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.base = torch.cuda.memory_allocated(self.device)

    def stop(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.base


class HighWaterMeter:
    """The kernel's high-water mark of this process's resident memory (Linux)."""

    method = "VmHWM of Linux, reset for each arm"
    reset = Path("/proc/self/clear_refs")
    status = Path("/proc/self/status")

    def __init__(self) -> None:
        self.base = 0

    @classmethod
    def available(cls) -> bool:
        """Whether this system keeps the mark and lets a process reset its own."""
        return sys.platform == "linux" and os.access(cls.reset, os.W_OK)

    def start(self) -> None:
        self.reset.write_text("5")
        self.base = self.high_water()

    def stop(self) -> int:
        return self.high_water() - self.base

    def high_water(self) -> int:
        """The mark, in bytes."""
        line = next(line for line in self.status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


class SampledMeter:
    """Resident size of this process, sampled every 5 ms by a thread; a shorter spike can be missed."""

    method = "resident size, sampled every 5 ms"

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.base = self.most = 0
        self.done = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        self.base = self.most = self.process.memory_info().rss
        self.done.clear()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def stop(self) -> int:
        self.done.set()
        if self.thread:
            self.thread.join()
        return max(self.most, self.process.memory_info().rss) - self.base

    def sample(self) -> None:
        """What the thread does."""
        while not self.done.wait(SAMPLE_SECONDS):
            self.most = max(self.most, self.process.memory_info().rss)


def meter_for(device: torch.device) -> Meter:
    """The most exact meter that this device and system offer."""
    if device.type == "cuda":
        return CudaMeter(device)
    return HighWaterMeter() if HighWaterMeter.available() else SampledMeter()


@contextmanager
def watch(meter: Meter) -> Iterator[Peak]:
    """Measure the peak of the work inside; what earlier work freed goes back to the system first.

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
    """Collect garbage and return free lists to the system: they would hide growth."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return what is free in the heap to the system, where the C library can (glibc); elsewhere nothing happens."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
