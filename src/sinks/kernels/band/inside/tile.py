"""Before the window of a tile is walked: what its sinks will need is found, and left in shared memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sinks.kernels.band.inside.build import Build, tools
from sinks.kernels.band.inside.parked import Parked
from sinks.kernels.device.language import LOG2E


@dataclass(frozen=True, eq=False)
class Tile:
    """What one thread knows of its tile of queries before the window is walked; numbers and tensors are CuTe's.

    Of a product of a warp, [16 queries, 8 columns], thread 4 i + j holds columns 2 j and 2 j + 1 of queries i and
    i + 8, and so it does in the tile of the result.

    `tensors` are scores [heads, tokens, sinks], values [tokens, kv_heads, head_dim], keys in pairs if scores are to
    be found, and sink logits [heads] if there are any; `queries` are those of the tile, in shared memory.
    """

    build: Build
    kernel: Any
    tensors: tuple[Any, ...]
    queries: Any
    tiled_mma: Any
    thread: Any
    seqlen: Any
    block: Any
    head: Any
    scale: Any
    window: Any
    pipeline: Any

    @staticmethod
    def of(kernel: Any, given: Mapping[str, Any], work: Any) -> Tile:
        """The one tile of this program."""
        block, head, row, _ = work.tile_idx
        return Tile(
            kernel.build, kernel, tuple(given["aux_data"].tensors), given["sQ"], given["tiled_mma_pv"], given["tidx"],
            given["SeqlenInfoCls"](row), block, head, given["softmax_scale_log2"],
            given["block_info"].window_size_left + 1, given["pipeline_q"],
        )  # fmt: skip

    @property
    def kv_head(self) -> Any:
        """The key head of all queries of the tile."""
        return self.head if self.kernel.pack_gqa else self.head // self.build.group

    def rows(self) -> list[tuple[Any, Any]]:
        """Token and head of each query of this thread; the heads of a group alternate."""
        kernel, group, cute = self.kernel, self.build.group, tools().cute
        here = cute.make_identity_tensor((kernel.tile_m, kernel.tile_hdimv))
        here = tools().layouts.reshape_acc_to_mn(self.tiled_mma.get_slice(self.thread).partition_C(here))[None, 0]
        rows = [self.block * kernel.tile_m + here[number][0] for number in range(cute.size(here))]
        return [
            (row // group, self.head * group + row % group) if kernel.pack_gqa else (row, self.head) for row in rows
        ]

    def columns(self) -> list[Any]:
        """The sinks that this thread weighs."""
        return [self.thread % 4 * 2 + offset for offset in self.build.offsets]

    def first(self, column: Any) -> Any:
        """The place of a sink among all tokens; past the last sink, or the row's end, that of the last one."""
        cutlass = tools().cutlass
        return self.seqlen.offset_k + cutlass.min(column, cutlass.min(self.seqlen.seqlen_k, self.build.sinks) - 1)

    def given_scores(self) -> list[list[Any]]:
        """Scores [queries, columns] that were found before; where there are none, others."""
        cutlass, found = tools().cutlass, []
        for token, head in self.rows():
            place = self.seqlen.offset_q + cutlass.min(token, self.seqlen.seqlen_q - 1)
            columns = [cutlass.min(column, self.build.sinks - 1) for column in self.columns()]
            found.append([self.tensors[0][head, place, column] for column in columns])
        return found

    def keys(self, tile: int) -> Any:
        """Keys of 8 sinks, as a matrix instruction takes them: [4, 1, steps of 16 dims]."""
        cute, cutlass, steps = tools().cute, tools().cutlass, self.build.head_dim // 16
        made = cute.make_rmem_tensor(cute.make_layout((2, steps)), cutlass.Int32)
        row = self.first(tile * 8 + self.thread % 32 // 4)
        for step in range(steps):
            for half in range(2):
                made[half, step] = self.tensors[2][row, self.kv_head, step * 8 + half * 4 + self.thread % 4]
        halves = cute.recast_ptr(made.iterator, dtype=self.kernel.dtype)
        return cute.make_tensor(halves, cute.make_layout((4, 1, steps), stride=(1, 0, 4)))

    def find_scores(self) -> list[list[Any]]:
        """Scores [queries, columns], of queries that are in shared memory."""
        cute, cutlass, kernel = tools().cute, tools().cutlass, self.kernel
        operation = tools().warp.MmaF16BF16Op(kernel.dtype, cutlass.Float32, (16, 8, 16))
        tiled, atom = cute.make_tiled_mma(operation, (kernel.tile_m // 16, 1, 1)), cute.make_mma_atom(operation)
        load = cute.make_copy_atom(tools().warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4), kernel.dtype)
        copy = cute.make_tiled_copy_A(load, tiled).get_slice(self.thread)
        queries = cute.make_rmem_tensor(tiled.partition_shape_A((kernel.tile_m, kernel.tile_hdim)), kernel.dtype)
        keys = [self.keys(tile) for tile in self.build.met]
        self.pipeline.consumer_wait_w_index_phase(0, cutlass.Int32(0))
        cute.copy(load, copy.partition_S(self.queries), copy.retile(queries))
        found = []
        for key in keys:
            # Two sums, of even and of odd steps: an instruction waits for the one that it adds to.
            sums = [cute.make_rmem_tensor(cute.make_layout((4, 1, 1)), cutlass.Float32) for _ in range(2)]
            for part in sums:
                part.fill(0.0)
            for step in range(self.build.head_dim // 16):
                part = sums[step % 2]
                cute.gemm(atom, part, queries[None, None, step], key[None, None, step], part)
            found.append([sums[0][at] + sums[1][at] for at in range(4)])
        found += [[cutlass.Float32(0.0)] * 4] * (len(self.columns()) // 2 - len(found))
        return [[found[at // 2][at % 2 + 2 * number] for at in range(len(self.columns()))] for number in range(2)]

    def park(self, parked: Parked) -> None:
        """Leave in shared memory what `merge` needs; nothing is waited for before everything is asked for."""
        cutlass, language, build, rows = tools().cutlass, tools().language, self.build, self.rows()
        values = self.values()
        logits = [self.tensors[-1][head] * LOG2E for _, head in rows] if build.logits else []
        notes = [self.note(*row) for row in rows] if build.meets else []
        scores = self.find_scores() if build.meets else self.given_scores()
        # A sink that the window covers is met there, at the same distance.
        apart = [
            [(token - self.window >= column) & (column < build.sinks) for column in self.columns()] for token, _ in rows
        ]
        for number, (row, seen) in enumerate(zip(scores, apart, strict=True)):
            exponents = [
                cutlass.Float32(language.select_(here, score * self.scale, cutlass.Float32(-math.inf)))
                for score, here in zip(row, seen, strict=True)
            ]
            for at, exponent in enumerate(exponents + logits[number : number + 1]):
                parked.exponents[number, at, self.thread] = exponent
        for slot, pair in values:
            put = partial(parked.values.__setitem__, (self.thread % 32, slot), pair)
            if build.registers % (self.kernel.tile_m // 16) == 0:
                put()
            else:
                language.if_generate(slot < build.registers, put)
        for note, row in zip(notes, scores, strict=False):  # none where they were given
            note(row)

    def note(self, token: Any, head: Any) -> Callable[[list[Any]], None]:
        """Where a query's scores are written if they are found here, because the backward pass wants them."""
        cute, language, columns, sinks = tools().cute, tools().language, self.columns(), self.build.sinks
        place = (head, self.seqlen.offset_q + token, columns[0])
        start = self.tensors[0].iterator + cute.crd2idx(place, self.tensors[0].layout)
        there = cute.make_tensor(start, cute.make_layout(len(self.build.chunks) * self.build.depth))
        real = [(token < self.seqlen.seqlen_q) & (column < sinks) for column in columns]

        def write(scores: list[Any]) -> None:
            for score, here, offset in zip(scores, real, self.build.offsets, strict=True):
                language.if_generate(here, partial(there.__setitem__, offset, score))

        return write

    def values(self) -> list[tuple[Any, Any]]:
        """All warps want the same registers of values; those that this one loads, and their numbers."""
        cute, cutlass, build, found = tools().cute, tools().cutlass, self.build, []
        warps, lane = self.kernel.tile_m // 16, self.thread % 32
        pairs, tiles = build.each // 2, build.head_dim // 8
        for start in range(0, build.registers, warps):
            slot = start + self.thread // 32
            tile, chunk = slot // pairs % tiles, slot // (pairs * tiles)
            sink = chunk * build.depth + slot % pairs * 8 + lane % 4 * 2
            pair = cute.make_rmem_tensor(cute.make_layout(2), self.kernel.dtype)
            for one in range(2):
                pair[one] = self.tensors[1][self.first(sink + one), self.kv_head, tile * 8 + lane // 4]
            packed = cute.make_tensor(cute.recast_ptr(pair.iterator, dtype=cutlass.Int32), cute.make_layout(1))
            found.append((slot, packed[0]))
        return found
