"""One layer's keys and values: sinks in the first slots, the window as a ring behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sinks.cache.arrival import Block
from sinks.cache.plan import Plan
from sinks.errors import CacheError, InvalidInput, NotAttached, UnsupportedOption
from sinks.kernels.band.arriving import attend_arriving
from sinks.kernels.band.operator import Walker
from sinks.kernels.band.packed import Packed, pack
from sinks.kernels.chunked import attend_block
from sinks.kernels.lens import Arrival, Lens
from sinks.kernels.phase import rotate, table_dtype
from sinks.kernels.scoring import Scoring
from sinks.kernels.written import attend_arrival

Observed = tuple[int, Sequence[Lens]] | None
"""The number of this layer, and the lenses that look at its attention; None: nobody looks."""


class Gate:
    """Whether a pass is open; the rings of one cache share it."""

    is_open = False


class Ring(CacheLayerMixin):
    """`[batch, kv_heads, capacity, head_dim]` keys, each turned once by its stream position, and their values.

    They are memory of its own, or, where it has a `seat`, that of the seat: at one address for as long as it sits.
    """

    is_sliding = False
    names: tuple[str, ...] = ("keys", "values")
    """What the tensors of `parts` are called."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.columns_fed = 0
        self.gate = Gate()
        self.seat: Mapping[str, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Claim the memory of every slot, once and for all."""
        if self.seat is not None:
            self.sit()
            return
        with torch.inference_mode(False):  # or a later pass outside of inference mode could not write
            self._claim(key_states, value_states)
        self.is_initialized = True

    def sit(self) -> None:
        """Begin in the seat, which is cleared: what an earlier stream left there is nobody's."""
        if self.seat is None or self.is_initialized:
            return
        for part in self.seat.values():
            part.zero_()
        self._hold(self.seat)
        self.is_initialized = True

    def _claim(self, key: Tensor, value: Tensor) -> None:
        slots = (*key.shape[:2], self.plan.capacity)
        self.keys, self.values = key.new_zeros(*slots, key.shape[-1]), key.new_zeros(*slots, value.shape[-1])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys through: the attention function, not the model, reads and writes the ring."""
        if not self.gate.is_open:
            raise NotAttached("this model is not attached: call sinks.attach(model) before feeding it a SinkCache")
        return key_states, value_states

    def attend(
        self,
        query: Float[Tensor, "batch heads columns head_dim"],
        key: Float[Tensor, "batch kv_heads columns head_dim"],
        value: Float[Tensor, "batch kv_heads columns value_dim"],
        blocks: list[Block],
        scoring: Scoring,
        observed: Observed = None,
    ) -> Float[Tensor, "batch heads columns value_dim"]:
        """Attend block by block, writing each block once it has been attended to; see `Observed`."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        with torch.no_grad():
            parts = []
            for block in blocks:
                here = block.columns
                heads = query[:, :, here], key[:, :, here], value[:, :, here]
                parts.append(self._attend_block(*heads, block, scoring, observed))
            out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return _NoGradient.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out

    def attend_whole(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        block: Block,
        scoring: Scoring,
        walker: Walker,
    ) -> Float[Tensor, "batch heads columns value_dim"]:
        """`attend` for query, key and value of a block of any length without pads, in one call of the band kernels."""
        query, key, value = heads
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        with torch.no_grad():
            steps = None if scoring.rotary is None else block.steps(scoring.rotary)
            packed = pack(heads, self._read(block.filled), block.standing, scoring.rotary, steps)
            self._keep(packed, block)
            out = attend_arriving(packed, scoring, walker)
        return _NoGradient.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out

    def _attend_block(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block, scoring: Scoring, observed: Observed
    ) -> Tensor:
        return self.attend_turned(turn(query, key, block, scoring), value, block, scoring, observed)

    def attend_turned(
        self, turned: Turned, value: Tensor, block: Block, scoring: Scoring, observed: Observed = None
    ) -> Float[Tensor, "batch heads columns value_dim"]:
        """Attend one block whose heads are turned already, and write it. For the rows of a `Group`; see `attend`."""
        if not self.is_initialized:
            self.lazy_initialization(turned.key, value)
        recent_query, sink_query, key = turned.recent_query, turned.sink_query, turned.key
        bias = block.bias(scoring.slopes, table_dtype(recent_query.dtype))
        if block.is_step:
            self._write(key, value, block)
        keys, values = self._read(block.filled)
        if not block.is_step:
            seen_keys, seen_values = self._as_kept(key, value, block)
            keys, values = torch.cat((keys, seen_keys), dim=2), torch.cat((values, seen_values), dim=2)
        sinks = min(self.plan.sinks, block.filled)
        if observed is None:
            out = attend_block(recent_query, sink_query, keys, values, sinks=sinks, bias=bias, scoring=scoring)
        else:
            layer, lenses = observed
            arrival = Arrival(layer, block.positions, recent_query, key, value)
            out = attend_arrival(
                arrival, sink_query, (keys, values, block.key_positions),
                sinks=sinks, bias=bias, scoring=scoring, lenses=lenses,
            )  # fmt: skip
        if not block.is_step:
            self._write(key, value, block)
        return out

    def _read(self, filled: int) -> tuple[Tensor, Tensor]:
        """The first `filled` slots, as queries see them."""
        keys, values = self.held
        return keys[:, :, :filled], values[:, :, :filled]

    def _as_kept(self, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """New keys and values as they will be read back once they are written."""
        return key, value

    def _keep(self, packed: Packed, block: Block) -> None:
        """Write what stays of a chunk; its row then holds new keys and values as they will be read back."""
        key, value = packed.arrived
        for run in block.staying:
            self._write(key[:, :, run.columns], value[:, :, run.columns], run)

    def _write(self, key: Tensor, value: Tensor, block: Block) -> None:
        rows, slots, columns = block.writes
        for held, new in zip(self.held, (key, value), strict=True):
            if rows is None:
                held.index_copy_(2, slots, new)
            else:
                held[rows, :, slots] = new[rows, :, columns]

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values, `[batch, kv_heads, capacity, head_dim]` each."""
        if self.keys is None or self.values is None:
            raise CacheError("this layer has not been fed yet")
        return self.keys, self.values

    @property
    def parts(self) -> dict[str, Tensor]:
        """Every tensor that this layer holds, by its name in `names`: its own, not copies; rows come first."""
        return dict(zip(self.names, self.held, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.nbytes for part in self.parts.values()) if self.is_initialized else 0

    def adopt(self, parts: Mapping[str, Tensor], rows: int, columns_fed: int) -> None:
        """Take over what an equal ring held. It becomes this ring's own memory, or is copied into the seat.

        Raises InvalidInput if it differs.
        """
        self._check(parts, rows)
        if self.seat is not None:
            check_same(parts, self.seat)
        self._settle(parts)
        self.columns_fed = columns_fed
        self.is_initialized = True

    def _check(self, parts: Mapping[str, Tensor], rows: int) -> None:
        heads = parts["keys"].shape[:2]
        for held in parts.values():
            if held.ndim != 4 or held.shape[:2] != heads or len(held) != rows or held.shape[2] != self.plan.capacity:
                raise InvalidInput(
                    f"slots of shape {list(held.shape)} do not fit a ring of {self.plan.capacity} in {rows} rows"
                )

    def _settle(self, parts: Mapping[str, Tensor]) -> None:
        """Hold these tensors, or, where there is a seat, what they say."""
        if self.seat is not None:
            for name, part in self.seat.items():
                part.copy_(parts[name], non_blocking=True)  # from pinned memory; otherwise it waits
            parts = self.seat
        self._hold(parts)

    def _hold(self, parts: Mapping[str, Tensor]) -> None:
        self.keys, self.values = (parts[name] for name in self.names)

    def select_rows(self, rows: Tensor) -> None:
        """Make row i a copy of the present row `rows[i]`."""
        if self.is_initialized:
            with torch.inference_mode(False):
                chosen = {name: part.index_select(0, rows.to(part.device)) for name, part in self.parts.items()}
            self._settle(chosen)

    def reset(self) -> None:
        """Forget everything and give the memory back, if it is its own; a seat is kept."""
        self.keys = self.values = None
        self.is_initialized = False
        self.columns_fed = 0

    def get_seq_length(self) -> int:
        """Columns fed, pads included: what transformers cuts a prompt by."""
        return self.columns_fed

    def get_max_length(self) -> int:
        """A stream has no end."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over everything fed; an attached model builds none."""
        return self.columns_fed + query_length, 0


def check_same(parts: Mapping[str, Tensor], seat: Mapping[str, Tensor]) -> None:
    """Raise InvalidInput unless tensors have the shapes and types of those of a seat."""
    for name, place in seat.items():
        given = parts[name]
        if (given.shape, given.dtype) != (place.shape, place.dtype):
            raise InvalidInput(
                f"{name} of shape {list(given.shape)} in {given.dtype} do not fit a seat of {list(place.shape)} in "
                f"{place.dtype}"
            )


@dataclass(frozen=True, eq=False)
class Turned:
    """New heads turned: queries by stream position, and by cache position for the sinks (the same tensor where those
    do not differ), keys by stream position.
    """

    recent_query: Float[Tensor, "batch heads columns head_dim"]
    sink_query: Float[Tensor, "batch heads columns head_dim"]
    key: Float[Tensor, "batch kv_heads columns head_dim"]

    def row(self, row: int, full: bool) -> Turned:
        """One row of a batch; unless it is `full`, its two queries are one, as they would be were it alone."""
        here = slice(row, row + 1)
        recent = self.recent_query[here]
        return Turned(recent, self.sink_query[here] if full else recent, self.key[here])


def turn(query: Tensor, key: Tensor, block: Block, scoring: Scoring) -> Turned:
    """Turn the heads of one block, which arrive as the projections made them."""
    if scoring.rotary is None:
        return Turned(query, query, key)
    recent, in_cache = block.tables(scoring.rotary, table_dtype(query.dtype))
    recent_query = rotate(query, *recent, scoring.rotary)
    sink_query = recent_query if in_cache is None else rotate(query, *in_cache, scoring.rotary)
    return Turned(recent_query, sink_query, rotate(key, *recent, scoring.rotary))


class _NoGradient(torch.autograd.Function):
    """Lets a stream run with gradients switched on, and says so when one is asked for."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedOption(
            "a SinkCache is not differentiable: train with sinks.kernels.attend, or stream under torch.no_grad()"
        )
