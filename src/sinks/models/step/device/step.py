"""A decode step of a whole model as one CUDA graph: from token to logits and to the next token, for rows in seats."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sinks.errors import InvalidInput
from sinks.kernels import Scoring, Step, attend_step
from sinks.kernels.device.language import on
from sinks.models.step.device.linear import Product, tiles_for
from sinks.models.step.device.small import add_normed, choose, embed, norm_heads, norm_rows
from sinks.models.step.device.weights import DeviceBlock, DeviceWeights, Norm, device_weights
from sinks.models.step.slots import Seats

LEAST_ROWS = 16
"""Rows of a buffer, however few are used: what a matrix unit reads."""

FUSED_ROWS = 8
"""Up to so many rows, every program of a product normalises them itself."""


class DeviceModel:
    """A model's weights as a step on a GPU reads them, in the model's own memory, and the steps made of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedModel, with the reason, where `why_no_device_step` has one."""
        self.weights = device_weights(model)
        self._steps: weakref.WeakKeyDictionary[Seats, DeviceStep] = weakref.WeakKeyDictionary()

    def step(self, seats: Seats) -> DeviceStep:
        """The step on these seats; made once, and let go with them."""
        if seats not in self._steps:
            self._steps[seats] = DeviceStep(self.weights, seats)
        return self._steps[seats]


class _Buffers:
    """What kernels hand each other, for as many rows as there are seats."""

    def __init__(self, weights: DeviceWeights, rows: int, device: torch.device) -> None:
        (queries, keys), dim, first = weights.heads, weights.head_dim, weights.blocks[0]
        rows = max(LEAST_ROWS, rows)
        width, vocab = weights.embed.shape[1], weights.head.outputs

        def room(*shape: int, dtype: torch.dtype = weights.dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.states = room(width, dtype=torch.float32)
        self.branch = room(width, dtype=torch.float32) if first.after_mlp is not None else self.states
        self.normed = room(width)
        self.heads = room(queries + 2 * keys, dim)
        self.seen = room(queries, dim)
        self.inner = room(first.gate_up.outputs)
        self.logits = room(vocab, dtype=torch.float32)
        self.greedy = room(dtype=torch.int64)


class DeviceStep:
    """One token of some rows through the whole model; a graph for 1, 2, 4, ... rows, captured when first asked for.

    Under Triton's interpreter the same kernels run one by one.
    """

    def __init__(self, weights: DeviceWeights, seats: Seats, pdl: bool = False) -> None:
        self.weights = weights
        self.rings, self.sizes, self.rotaries, self.start = seats.rings, seats.sizes, seats.rotaries, seats.start
        self.seats = len(seats.rings[0][0])
        self.device = weights.embed.device
        self.buffers = _Buffers(weights, _power(self.seats), self.device)
        self.pdl = pdl and self.device.type == "cuda"
        self.captures = 0
        self._programs: dict[int, _Program] = {}
        self._pool: Any = None
        self._last: _Program | None = None

    @property
    def greedy(self) -> Tensor:
        """The likeliest next token of every row of the last step, int64 on the device."""
        return self.buffers.greedy

    @torch.inference_mode()
    def __call__(
        self, ids: Sequence[int] | Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> Float[Tensor, "rows vocab"]:
        """Feed token `ids[i]`, number `positions[i]` of its stream, to the stream in seat `rows[i]`; -1: to nobody.

        The logits are valid until the next call. Raises InvalidInput for rows that do not fit together.
        """
        count = len(rows)
        if not len(ids) == count == len(positions) or not 0 < count <= _power(self.seats):
            raise InvalidInput(
                f"{len(ids)} tokens, {count} rows and {len(positions)} positions for {self.seats} seats: give one of "
                "each a row, and no more rows than seats"
            )
        program = self._program(_power(count))
        program.place(ids, rows, positions)
        program()
        self._last = program
        return self.buffers.logits[:count]

    @torch.inference_mode()
    def run(self, steps: int) -> None:
        """That many steps more, each with the likeliest token of the one before, without asking the host."""
        if self._last is None:
            raise InvalidInput("run() goes on from a step, and there was none")
        for _ in range(steps):
            self._last()

    def _program(self, bucket: int) -> _Program:
        if bucket not in self._programs:
            program = _Program(self, bucket)
            if self.device.type == "cuda":
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                program.capture(self._pool)
                self.captures += 1
            self._programs[bucket] = program
        return self._programs[bucket]


class _Program:
    """The kernels of one number of rows, in order."""

    def __init__(self, step: DeviceStep, rows: int) -> None:
        self.step, self.rows, self.device = weakref.proxy(step), rows, step.device
        self.control = torch.zeros(3, rows, dtype=torch.int64, device=step.device)
        self.control[2] = -1
        self.graph: Any = None
        weights = step.weights
        programs = weights.head.programs(tiles_for(weights.head, rows))
        self.best = (
            torch.zeros(rows, programs, device=step.device),
            torch.zeros(rows, programs, dtype=torch.int32, device=step.device),
        )
        self.attend = self._attends(step)

    def _attends(self, step: DeviceStep) -> list[Step]:
        """One for all layers alike: they take turns."""
        made: dict[Any, Step] = {}
        query = step.buffers.heads[: self.rows, : step.weights.heads[0]]
        found = []
        for block, ring, size, rotary in zip(
            step.weights.blocks, step.rings, step.sizes, step.rotaries, strict=True
        ):
            key = (size, id(rotary), block.scale)
            if key not in made:
                made[key] = Step.prepare(
                    query, ring[0], sinks=size[0], window=size[1], scoring=Scoring(block.scale, rotary),
                    start=step.start,
                )  # fmt: skip
            found.append(made[key])
        return found

    def place(self, ids: Sequence[int] | Tensor, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Put what the host says where the kernels look."""
        rest = self.rows - len(rows)
        given = [0] * len(rows) if isinstance(ids, Tensor) else list(ids)
        host = [[*given, *[0] * rest], [*rows, *[0] * rest], [*positions, *[-1] * rest]]
        self.control.copy_(torch.tensor(host))
        if isinstance(ids, Tensor):
            self.control[0, : len(rows)].copy_(ids)

    def capture(self, pool: Any) -> None:
        """Compile on rows that rest, then record."""
        with on(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._launch()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._launch()
            self.graph = graph

    def __call__(self) -> None:
        if self.graph is None:
            self._launch()
        else:
            self.graph.replay()

    def _launch(self) -> None:
        step: Any = self.step
        weights, buffers, rows = step.weights, step.buffers, self.rows
        ids, _, positions = self.control
        width = weights.embed.shape[1]
        with on(self.device):
            embed[(rows, -(-width // 1024))](
                ids, weights.embed, buffers.states, (width, weights.factor), WIDTH=1024, PDL=False
            )
            for layer, block in enumerate(weights.blocks):
                self._block(layer, block)
            self._product(weights.head, buffers.states, buffers.logits, self.best)
            choose[(rows,)](
                self.best, ids, positions, buffers.greedy, self.best[0].shape[1], WIDTH=1024, **self._pdl(), num_warps=8
            )

    def _block(self, layer: int, block: DeviceBlock) -> None:
        step: Any = self.step
        buffers, rows, (queries, keys) = step.buffers, self.rows, step.weights.heads
        self._product(block.qkv, buffers.states, buffers.heads)
        heads = buffers.heads[:rows]
        if block.head_norms is not None:
            dim = step.weights.head_dim
            first, second = block.head_norms
            norm_heads[(rows, queries + keys)](
                heads, (first.gain, second.gain), (queries + 2 * keys, queries, first.epsilon), DIM=dim,
                PADDED=_power(dim), OFFSET=first.offset, **self._pdl(), num_warps=1,
            )  # fmt: skip
        query, key, value = heads.split((queries, keys, keys), dim=1)
        attend_step(
            self.attend[layer], query, key, value, *step.rings[layer], self.control[2], self.control[1],
            buffers.seen[:rows],
        )  # fmt: skip
        self._product(block.out, buffers.seen, buffers.branch)
        self._add(block.after_attention)
        self._product(block.gate_up, buffers.states, buffers.inner)
        self._product(block.down, buffers.inner, buffers.branch)
        self._add(block.after_mlp)

    def _product(
        self, product: Product, given: Tensor, out: Tensor, best: tuple[Tensor, Tensor] | None = None
    ) -> None:
        if product.gain is not None and self.rows > FUSED_ROWS:
            width, normed = product.depth, self.step.buffers.normed
            norm_rows[(self.rows,)](
                given, product.gain, normed, (width, product.epsilon), WIDTH=_power(width), OFFSET=product.offset,
                **self._pdl(), num_warps=8,
            )  # fmt: skip
            given, product = normed, replace(product, gain=None)
        product(given, out, self.rows, tiles_for(product, self.rows), best, self.step.pdl)

    def _add(self, norm: Norm | None) -> None:
        if norm is not None:
            buffers = self.step.buffers
            width = buffers.states.shape[1]
            add_normed[(self.rows,)](
                buffers.branch, norm.gain, buffers.states, (width, norm.epsilon), WIDTH=_power(width),
                OFFSET=norm.offset, **self._pdl(), num_warps=8,
            )  # fmt: skip

    def _pdl(self) -> dict[str, Any]:
        return {"PDL": True, "launch_pdl": True} if self.step.pdl else {"PDL": False}


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
