"""A decode step of a whole model as one CUDA graph: from token to logits and to the next token, for rows in seats.

The next token is chosen inside the graph by what was last installed at its seat, the likeliest where nothing was. It
stays there, so that the next step can begin before the host has read it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sinks.errors import InvalidInput
from sinks.kernels import Scoring, Step, attend_step
from sinks.kernels.device.language import on
from sinks.kernels.device.step import HeadNorms
from sinks.models.step.device.choice.draws import NOBODY, PLACES, Drawing, Draws
from sinks.models.step.device.linear import Product, Tiles, chained, power, tiles_for
from sinks.models.step.device.small import embed, join
from sinks.models.step.device.weights import DeviceBlock, DeviceWeights, Norm, device_weights
from sinks.models.step.slots import Seats

LEAST_ROWS = 16
"""Rows of a buffer, however few are used: what a matrix unit reads."""

_CAPTURING = Lock()

CHOSEN = -1
"""In the place of a token: the one that was chosen last at its seat, which the host may not know yet."""

MOST_PARTS = 8
"""Parts that a product's result may come in."""


@dataclass(frozen=True)
class Chain:
    """Which kernels let those behind begin before they end: products (1: after waiting, 2: at once), attention."""

    products: int
    attention: bool


def chain_for(rows: int) -> Chain:
    """What measured fastest on an H200: many rows keep every multiprocessor busy, and who comes early is in the way."""
    return Chain(2, True) if rows == 1 else Chain(1, rows <= 16)


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
        self.branch = torch.zeros(MOST_PARTS, rows, width, device=device)
        self.normed = room(width)
        self.heads = room(queries + 2 * keys, dim)
        self.seen = room(queries, dim)
        self.inner = room(first.gate_up.outputs)
        self.logits = room(vocab, dtype=torch.float32)


class Told:
    """What the rows of one step chose, on its way to the host."""

    def __init__(self, told: Int[Tensor, "2 rows"]) -> None:
        self._landed: torch.cuda.Event | None = None
        if told.device.type == "cuda":
            self._held = torch.empty(told.shape, dtype=told.dtype, pin_memory=True).copy_(told, non_blocking=True)
            self._landed = torch.cuda.Event()
            self._landed.record(torch.cuda.current_stream(told.device))
        else:
            self._held = told.clone()

    def wait(self) -> list[int | None]:
        """The token of every row, once they are here; None where no logit was finite, so that there is none."""
        if self._landed is not None:
            self._landed.synchronize()
        tokens, real = self._held.tolist()
        return [token if sound else None for token, sound in zip(tokens, real, strict=True)]


class DeviceStep:
    """One token of some rows through the whole model; a graph for 1, 2, 4, ... rows, captured when first asked for.

    Under Triton's interpreter the same kernels run one by one.
    """

    def __init__(
        self, weights: DeviceWeights, seats: Seats, chain: Callable[[int], Chain] = chain_for,
        tiles: Callable[[Product, int], Tiles] = tiles_for,
    ) -> None:  # fmt: skip
        self.weights, self.chain_for, self.tiles_for = weights, chain, tiles
        self.rings, self.sizes, self.rotaries, self.start = seats.rings, seats.sizes, seats.rotaries, seats.start
        self.seats = len(seats.rings[0][0])
        self.device = weights.embed.device
        self.buffers = _Buffers(weights, power(self.seats), self.device)
        self.draws = Draws(self.seats, power(self.seats), weights.head.outputs, self.device)
        self.captures = 0
        self._programs: dict[int, _Program] = {}
        self._pool: Any = None
        self._last: _Program | None = None

    @property
    def chosen(self) -> Int[Tensor, " rows"]:
        """The next token of every row of the last step, on the device; see `told`."""
        return self._chosen[0]

    @property
    def _chosen(self) -> Tensor:
        if self._last is None:
            raise InvalidInput("nothing was chosen yet: feed a token first")
        return self._last.told

    @torch.inference_mode()
    def told(self) -> Told:
        """What the rows of the last step chose, as soon as it is done; nobody waits here."""
        return Told(self._chosen)

    @torch.inference_mode()
    def install(
        self, seats: Sequence[int], drawings: Sequence[Drawing], histories: Sequence[Sequence[int]],
        positions: Sequence[int],
    ) -> None:  # fmt: skip
        """From now on these seats choose so; see `Draws.install`. A seat where nothing was installed is greedy."""
        self.draws.install(seats, drawings, histories, positions)

    @torch.inference_mode()
    def __call__(
        self, ids: Sequence[int] | Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> Float[Tensor, "rows vocab"]:
        """Feed token `ids[i]`, number `positions[i]` of its stream, to the stream in seat `rows[i]`; -1: to nobody.

        An id may be `CHOSEN`. The logits are valid until the next call. Raises InvalidInput for rows that do not fit
        together.
        """
        count = len(rows)
        if not len(ids) == count == len(positions) or not 0 < count <= power(self.seats):
            raise InvalidInput(
                f"{len(ids)} tokens, {count} rows and {len(positions)} positions for {self.seats} seats: give one of "
                "each a row, and no more rows than seats"
            )
        program = self._program(power(count))
        if program is not self._last:
            program.placed = None  # seats have moved on without it, and what stands there may be another stream's
        program.place(ids, rows, positions)
        program(self.draws.are_plain(rows))
        self._last = program
        return self.buffers.logits[:count]

    @torch.inference_mode()
    def run(self, steps: int) -> None:
        """That many steps more, each with the token that the one before chose, without asking the host."""
        if self._last is None:
            raise InvalidInput("run() goes on from a step, and there was none")
        self._last.placed = None  # the host does not follow
        for _ in range(steps):
            self._last(self._last.plain)

    @torch.inference_mode()
    def warm_up(self, rows: int) -> None:
        """Capture all that steps of so many rows may need now, not when it is first needed."""
        program = self._program(power(rows))
        program.place([0] * rows, [0] * rows, [-1] * rows)
        for plain in (True, False):
            program(plain)

    def _program(self, bucket: int) -> _Program:
        if bucket not in self._programs:
            self._programs[bucket] = _Program(self, bucket)
        return self._programs[bucket]

    def graph_pool(self) -> Any:
        """The memory that all graphs of this step share; counts one graph more."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        self.captures += 1
        return self._pool


class _Program:
    """The kernels of one number of rows, in order."""

    def __init__(self, step: DeviceStep, rows: int) -> None:
        self.step, self.rows, self.device = weakref.proxy(step), rows, step.device
        self.control = torch.zeros(3, rows, dtype=torch.int64, device=step.device)
        self.control[2] = -1
        self.chain = step.chain_for(rows) if step.device.type == "cuda" else Chain(0, False)
        self.plain = True
        self._graphs: dict[bool, Any] = {}
        self.best = torch.full((rows, PLACES), NOBODY, device=step.device)
        self.told = step.draws.told.view(-1)[: 2 * rows].view(2, rows)
        self.placed: tuple[list[int], list[int]] | None = None
        self.attend, self.tables = self._attends(step)

    def _attends(self, step: DeviceStep) -> tuple[list[tuple[Step, Tensor]], list[tuple[Step, Tensor]]]:
        """How each layer attends; layers that turn alike share cosines and sines, and take turns with one memory."""
        shared: dict[Any, tuple[Step, Tensor]] = {}
        found, query = [], step.buffers.heads[: self.rows, : step.weights.heads[0]]
        layers = zip(step.weights.blocks, step.rings, step.sizes, step.rotaries, strict=True)
        for block, ring, (sinks, window), rotary in layers:
            key = (sinks, window, id(rotary))
            if key not in shared:
                made = Step.prepare(
                    query, ring[0] if len(ring) == 2 else (ring[0], ring[1], ring[2]), sinks=sinks,
                    window=window, scoring=Scoring(block.scale, rotary), start=step.start,
                )  # fmt: skip
                made = replace(made, cut=replace(made.cut, overlap=self.chain.attention))
                shared[key] = made, made.tables(self.control[2])
            made, tables = shared[key]
            norms = None
            if block.head_norms is not None:
                first, second = block.head_norms
                norms = HeadNorms(first.gain, second.gain, first.epsilon, first.offset == 1)
            found.append((replace(made, scoring=Scoring(block.scale, rotary), norms=norms), tables))
        return found, list(shared.values())

    def place(self, ids: Sequence[int] | Tensor, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Put what the host says where the kernels look, unless it is there: the graph moves its rows on by itself."""
        rest = self.rows - len(rows)
        placed = [*rows, *[0] * rest], [*positions, *[-1] * rest]
        tokens = None if isinstance(ids, Tensor) else list(ids)
        stands = placed == self.placed and tokens == [CHOSEN] * len(rows)
        self.placed = placed[0], [at if at < 0 else at + 1 for at in placed[1]]
        if stands:
            return
        host = torch.tensor([[*([0] * len(rows) if tokens is None else tokens), *[0] * rest], *placed])
        cuda = self.device.type == "cuda"
        self.control.copy_(host.pin_memory() if cuda else host, non_blocking=cuda)
        if isinstance(ids, Tensor):
            self.control[0, : len(rows)].copy_(ids)

    def _capture(self, plain: bool, pool: Any) -> Any:
        """Compile on rows that rest, then record."""
        kept, self.control[2] = self.control.clone(), -1
        with _CAPTURING, on(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._launch(plain)
            torch.cuda.current_stream().wait_stream(side)
            gc.collect()  # a graph that is let go while another is recorded would spoil it
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads ask of the GPU meanwhile is their own affair
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._launch(plain)
        self.control.copy_(kept)
        return graph

    def __call__(self, plain: bool) -> None:
        """A step; `plain`: every row takes the likeliest token, which spares all other choices' kernels."""
        self.plain = plain
        if self.device.type != "cuda":
            self._launch(plain)
            return
        if plain not in self._graphs:
            self._graphs[plain] = self._capture(plain, self.step.graph_pool())
        self._graphs[plain].replay()

    def _launch(self, plain: bool) -> None:
        step: Any = self.step
        weights, buffers, rows = step.weights, step.buffers, self.rows
        ids, seats, positions = self.control
        width = weights.embed.shape[1]
        self.pending: tuple[int, Norm | None] = (0, None)
        with on(self.device):
            embed[(rows, -(-width // 1024))](
                ids,
                seats,
                positions,
                step.draws.newest,
                weights.embed,
                buffers.states,
                (width, weights.factor, len(weights.embed)),
                WIDTH=1024,
                PDL=False,
            )
            for made, tables in self.tables:
                made.tables(positions, tables)
            for layer, block in enumerate(weights.blocks):
                self._block(layer, block)
            self._after_norm(weights.head, buffers.logits, self.best)
            if plain:
                step.draws.launch_best(self.control, self.best, self.chain.products)
            else:
                step.draws.launch(buffers.logits, self.control, self.best, self.chain.products)

    def _block(self, layer: int, block: DeviceBlock) -> None:
        step: Any = self.step
        buffers, rows, (queries, keys) = step.buffers, self.rows, step.weights.heads
        self._after_norm(block.qkv, buffers.heads)
        heads = buffers.heads[:rows]
        query, key, value = heads.split((queries, keys, keys), dim=1)
        (attend, tables), ring = self.attend[layer], step.rings[layer]
        places = self.control[2], self.control[1], buffers.seen[:rows], tables
        if len(ring) == 2:
            attend_step(attend, query, key, value, ring[0], ring[1], *places)
        else:
            attend_step(attend, query, key, value, (ring[0], ring[1], ring[2]), (ring[3], ring[4], ring[5]), *places)
        self._branch(block.out, buffers.seen, block.after_attention)
        self._after_norm(block.gate_up, buffers.inner)
        self._branch(block.down, buffers.inner, block.after_mlp)

    def _branch(self, product: Product, given: Tensor, after: Norm | None) -> None:
        """What goes to the residual: at once, or in parts that the next norm adds up."""
        step: Any = self.step
        tiles, at_once = step.tiles_for(product, self.rows), self.rows == 1 and after is None
        if self.rows == 1:
            out = step.buffers.states if at_once else step.buffers.branch
            product.one(given, out, tiles, residual=at_once, pdl=self.chain.products)
        else:
            product.many(given, step.buffers.branch, self.rows, tiles, pdl=self.chain.products)
        if not at_once:
            self.pending = (1 if self.rows == 1 else tiles.splits, after)

    def _after_norm(self, product: Product, out: Tensor, best: Tensor | None = None) -> None:
        """The product of the normalised residual, to which what is pending has been added."""
        step: Any = self.step
        buffers, tiles, gain, pdl = step.buffers, step.tiles_for(product, self.rows), product.gain, self.chain.products
        parts, after = self.pending
        if self.rows == 1 and parts == 0:
            product.one(buffers.states, out, tiles, best=best, pdl=pdl)
            return
        join[(self.rows,)](
            buffers.branch, gain if after is None else after.gain, buffers.states, gain, buffers.normed,
            (product.depth, 0.0 if after is None else after.epsilon, product.epsilon, self.rows * product.depth),
            PARTS=parts, AFTER=after is not None, WIDTH=power(product.depth), OFFSET=product.offset, num_warps=8,
            **chained(pdl),
        )  # fmt: skip
        self.pending = (0, None)
        if self.rows == 1:
            replace(product, gain=None).one(buffers.normed, out, tiles, best=best, pdl=pdl)
        else:
            product.many(buffers.normed, out, self.rows, tiles, best=best, pdl=pdl)
