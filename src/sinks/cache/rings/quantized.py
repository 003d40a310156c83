"""The ring in a quarter of the memory: recent keys and values as int8, sinks in full precision.

Each token of each head has a scale of its own, the largest magnitude among its numbers over 127, and its numbers are
rounded to whole multiples of it: at most half a scale away, 0.4 % of the largest. Nothing is ever rounded twice, since
a ring never moves a key. Sinks stay as they came: they are few, and most of the attention is on them.

What a query sees is the decoded ring, its own token and the tokens of its own chunk included: so a stream gives the
same logits however it is cut into chunks. Keys are rounded as they are stored, turned by their position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from sinks.cache.arrival import Block
from sinks.cache.plan import Plan
from sinks.cache.rings.ring import Ring
from sinks.errors import CacheError, InvalidInput
from sinks.kernels.band.packed import Packed
from sinks.kernels.band.rounded import Coded, round_arrived
from sinks.kernels.phase import table_dtype

LARGEST = 127
"""Codes go from -127 to 127: symmetric, so that zero is zero."""


def encode(
    heads: Float[Tensor, "batch kv_heads columns dim"],
) -> tuple[Int8[Tensor, "batch kv_heads columns dim"], Float32[Tensor, "batch kv_heads columns 1"]]:
    """(codes, scales): each number as `code * scale`, at most half a scale away from it.

    A token with a number that is not finite has such a scale, so that it cannot pass for a sound one.
    """
    wide = heads.to(table_dtype(heads.dtype))
    peaks = wide.abs().amax(dim=-1, keepdim=True)
    scales = (peaks / torch.full_like(peaks, LARGEST)).float()  # by a number, a GPU multiplies with its inverse
    codes = (wide / scales.where(scales > 0, 1)).round_().clamp_(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots of one layer's keys, or of its values: `sinks` in full, the window as `codes` times `scales`."""

    sinks: Float[Tensor, "batch kv_heads sinks dim"]
    codes: Int8[Tensor, "batch kv_heads window dim"]
    scales: Float32[Tensor, "batch kv_heads window 1"]

    @classmethod
    def empty(cls, like: Float[Tensor, "batch kv_heads columns dim"], plan: Plan) -> Slots:
        """All slots of a plan, zero, for heads of this shape and type."""
        batch, kv_heads, _, dim = like.shape
        return cls(
            like.new_zeros(batch, kv_heads, plan.sinks, dim),
            like.new_zeros(batch, kv_heads, plan.window, dim, dtype=torch.int8),
            like.new_zeros(batch, kv_heads, plan.window, 1, dtype=torch.float32),
        )

    def read(self, filled: int) -> Float[Tensor, "batch kv_heads filled dim"]:
        """The first `filled` slots as numbers, at least float32: the caller's own, to use and let go."""
        dtype, sinks = table_dtype(self.sinks.dtype), min(filled, self.sinks.shape[2])
        recent = slice(filled - sinks)
        out = self.codes.new_empty(*self.codes.shape[:2], filled, self.codes.shape[3], dtype=dtype)
        out[:, :, :sinks] = self.sinks[:, :, :sinks]
        # Widen, then multiply: PyTorch does the two faster apart than as one product of mixed types.
        out[:, :, sinks:].copy_(self.codes[:, :, recent]).mul_(self.scales[:, :, recent].to(dtype))
        return out

    def write(self, new: Float[Tensor, "batch kv_heads columns dim"], block: Block) -> None:
        """Put the new heads of a block into their slots."""
        rows, slots, columns = block.writes
        sinks = self.sinks.shape[2]
        if rows is None or columns is None:
            first = min(max(0, sinks - block.seen[0]), block.width)
            self.sinks.index_copy_(2, slots[:first], new[:, :, :first])
            for held, coded in zip((self.codes, self.scales), encode(new[:, :, first:]), strict=True):
                held.index_copy_(2, slots[first:] - sinks, coded)
            return
        early = slots < sinks
        self.sinks[rows[early], :, slots[early]] = new[rows[early], :, columns[early]]
        rows, slots, columns = rows[~early], slots[~early] - sinks, columns[~early]
        for held, coded in zip((self.codes, self.scales), encode(new), strict=True):
            held[rows, :, slots] = coded[rows, :, columns]

    def as_kept(
        self, new: Float[Tensor, "batch kv_heads columns dim"], block: Block
    ) -> Float[Tensor, "batch kv_heads columns dim"]:
        """The new heads of a block as `read` would give them once they are written."""
        codes, scales = encode(new)
        dtype = table_dtype(new.dtype)
        is_sink = (block.positions < self.sinks.shape[2])[:, None, :, None]
        return new.to(dtype).where(is_sink, codes * scales.to(dtype))


def fit(parts: Sequence[Tensor], rows: int, plan: Plan) -> bool:
    """Whether sinks, codes and scales, of any shapes and types, are the `Slots` of so many rows of a plan."""
    sinks, codes, scales = parts
    if sinks.ndim != 4 or (codes.dtype, scales.dtype) != (torch.int8, torch.float32):
        return False
    _, kv_heads, _, dim = sinks.shape
    sizes = (plan.sinks, dim), (plan.window, dim), (plan.window, 1)
    return [tuple(part.shape) for part in parts] == [(rows, kv_heads, *size) for size in sizes]


class QuantizedRing(Ring):
    """A `Ring` whose window is int8. One layer at a time is decoded to attend, and let go again."""

    names = ("sink_keys", "key_codes", "key_scales", "sink_values", "value_codes", "value_scales")

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.slots: tuple[Slots, Slots] | None = None

    @property
    def kept(self) -> tuple[Slots, Slots]:
        """Keys and values."""
        if self.slots is None:
            raise CacheError("this layer has not been fed yet")
        return self.slots

    @property
    def held(self) -> NoReturn:
        """Refused: whoever wrote into decoded numbers would write nothing."""
        raise CacheError("an int8 ring holds no keys and values as numbers: take `parts`, or `decoded`, a copy")

    @property
    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values, `[batch, kv_heads, capacity, head_dim]` each, as queries see them: the caller's own."""
        return self._read(self.plan.capacity)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Sinks, codes and scales, of keys and of values."""
        tensors = [part for slots in self.kept for part in (slots.sinks, slots.codes, slots.scales)]
        return dict(zip(self.names, tensors, strict=True))

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        super().reset()
        self.slots = None

    def _claim(self, key: Tensor, value: Tensor) -> None:
        self.slots = Slots.empty(key, self.plan), Slots.empty(value, self.plan)

    def _hold(self, parts: Mapping[str, Tensor]) -> None:
        tensors = [parts[name] for name in self.names]
        self.slots = Slots(*tensors[:3]), Slots(*tensors[3:])

    def _check(self, parts: Mapping[str, Tensor], rows: int) -> None:
        tensors = [parts[name] for name in self.names]
        if not (fit(tensors[:3], rows, self.plan) and fit(tensors[3:], rows, self.plan)):
            shapes = {name: list(parts[name].shape) for name in self.names}
            raise InvalidInput(f"slots of shapes {shapes} do not fit an int8 ring of {self.plan.capacity}")

    def _read(self, filled: int) -> tuple[Tensor, Tensor]:
        keys, values = self.kept
        return keys.read(filled), values.read(filled)

    def _as_kept(self, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        keys, values = self.kept
        return keys.as_kept(key, block), values.as_kept(value, block)

    def _keep(self, packed: Packed, block: Block) -> None:
        round_arrived(packed, [Coded(slots.sinks, slots.codes, slots.scales) for slots in self.kept])

    def _write(self, key: Tensor, value: Tensor, block: Block) -> None:
        for slots, new in zip(self.kept, (key, value), strict=True):
            slots.write(new, block)
