"""After the window of a tile is walked: its sinks are taken in, from shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

from sinks.kernels.band.inside.build import Build, tools
from sinks.kernels.device.language import LOG2E


@dataclass(frozen=True, eq=False)
class Parked:
    """In shared memory while the window is walked, which needs all registers, those of addresses too.

    `exponents` [2 queries, columns and a sink logit, threads] are scores in powers of two, -inf where the window
    covers the sink; `values` [threads of a warp, registers] the sinks' values as matrix instructions take them.
    """

    build: Build
    dtype: Any
    exponents: Any
    values: Any

    @staticmethod
    def room(kernel: Any) -> Parked:
        """Shared memory of its own."""
        cute, cutlass, build = tools().cute, tools().cutlass, kernel.build
        claim = tools().memory.SmemAllocator().allocate_tensor
        count, threads = len(build.chunks) * build.each + build.logits, kernel.num_mma_threads
        exponents = claim(
            cutlass.Float32, cute.make_layout((2, count, threads), stride=(count * threads, threads, 1)), 16
        )
        return Parked(build, kernel.dtype, exponents, claim(cutlass.Int32, cute.make_layout((32, build.registers)), 16))

    def merge(self, result: Any, log_sums: Any, thread: Any) -> None:
        """Take the sinks into the window's normalised result and its log-sum-exp, both of this thread's registers."""
        by_row, weights = tools().layouts.reshape_acc_to_mn(result), []
        for number in range(2):
            window, shares, log_sums[number] = self.weigh(log_sums[number], number, thread)
            by_row[number, None].store(by_row[number, None].load() * window)
            weights.append(shares)
        for chunk in self.build.chunks:
            self.add(result, weights, chunk, thread % 32)

    def weigh(self, log_sum: Any, number: int, thread: Any) -> tuple[Any, list[Any], Any]:
        """One query's share of the window, those of its sinks, and log-sum-exp of the whole."""
        cute, build, own = tools().cute, self.build, log_sum * LOG2E
        seen = [self.exponents[number, at, thread] for at in range(len(build.chunks) * build.each)]
        level = cute.arch.warp_reduction_max(reduce(cute.arch.fmax, seen), threads_in_group=4)
        level = cute.arch.fmax(level, own)
        logit = self.exponents[number, len(seen), thread] if build.logits else None
        if logit is not None:
            level = cute.arch.fmax(level, logit)
        power = partial(cute.math.exp2, fastmath=True)
        window, weights = power(own - level), [power(score - level) for score in seen]
        total = cute.arch.warp_reduction_sum(reduce(add, weights), threads_in_group=4) + window
        if logit is not None:
            total += power(logit - level)
        part = cute.arch.rcp_approx(total)
        whole = (level + cute.math.log2(total, fastmath=True)) * math.log(2)
        return window * part, [weight * part for weight in weights], whole

    def add(self, result: Any, weights: list[list[Any]], chunk: int, lane: Any) -> None:
        """result [queries, dims] += weights [queries, sinks of a chunk] times values."""
        cute, cutlass, depth, each = tools().cute, tools().cutlass, self.build.depth, self.build.each
        operation = tools().warp.MmaF16BF16Op(self.dtype, cutlass.Float32, (16, 8, depth))
        left = cute.make_rmem_tensor(cute.make_layout((depth // 2, 1, 1)), self.dtype)
        for number, row in enumerate(weights):  # two columns of a query, of the query 8 below, then columns 8 further
            for at, weight in enumerate(row[chunk * each : (chunk + 1) * each]):
                left[at // 2 * 4 + number * 2 + at % 2] = self.dtype(weight)
        tiles = self.build.head_dim // 8
        count = tiles * each // 2
        packed = cute.make_rmem_tensor(cute.make_layout(count), cutlass.Int32)
        for slot in range(count):
            packed[slot] = self.values[lane, chunk * count + slot]
        right = cute.recast_ptr(packed.iterator, dtype=self.dtype)
        right = cute.make_tensor(right, cute.make_layout((each, tiles, 1)))
        whole = cute.make_tensor(result.iterator, cute.make_layout((4, 1, tiles), stride=(1, 0, 4)))
        cute.gemm(cute.make_mma_atom(operation), whole, left, right, whole)
