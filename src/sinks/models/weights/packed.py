"""Linear layers whose weights are int8 or int4, with the kernels PyTorch ships for CPUs; on a GPU, widened on the way.

Weight only: activations stay floating point. Both kernels are written for bfloat16 activations (with float32 ones they
fall back to loops thirty times slower), so an input is rounded to bfloat16 on the way in, sums are float32, and a
result is rounded to bfloat16 on the way out: relative errors of 2^-9 each, whatever the weights.
On a GPU, many rows are multiplied by the widened weight, in their own element type; a decode step reads the packed one
with kernels of its own (models/step/device).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sinks.errors import UnsupportedOption

GROUP = 32
"""Neighbouring weights of a row that share a scale and a centre in int4: the blocks of GGUF's Q4_1."""

BLOCK = 64
"""Rows that the int4 kernel lays out together; rows are filled up to `TILE`."""

TILE = 16

_KERNELS = torch.ops.aten


class PackedLinear(nn.Module, ABC):
    """`x @ weight.T + bias` for a weight `[out_features, in_features]` held in fewer bits.

    What is held are parameters, so that a fingerprint of the model covers them; they take no gradient.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else _held(bias)

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """`[rows, in_features]` -> `[rows, out_features]` of the same element type, without the bias."""

    @abstractmethod
    def weight_widened(self) -> Float[Tensor, "out_features in_features"]:
        """The weight that the kernel multiplies by, in float32."""

    @classmethod
    @abstractmethod
    def of(
        cls, weight: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None
    ) -> PackedLinear:
        """Round a weight."""

    @classmethod
    @abstractmethod
    def beside(cls, parts: Sequence[Any]) -> PackedLinear | None:
        """One layer with the outputs of `parts`, of its own kind, side by side; None where the layout forbids it.

        The parts' weights become views of the new one's.
        """

    def forward(self, given: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """The product, in the element type of what is given."""
        rows = given.reshape(-1, self.in_features)
        made = self.product(rows)
        if self.bias is not None:
            made = made + self.bias
        return made.view(*given.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(PackedLinear):
    """A row of int8 values times one scale: an error of at most half a step, the row's largest weight / 127."""

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__(values.shape[1], values.shape[0], bias)
        self.values, self.scales = _held(values), _held(scales)

    @classmethod
    def of(
        cls, weight: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None
    ) -> Int8Linear:
        wide = weight.detach().float()
        scales = _rounded_up(wide.abs().amax(dim=1) / 127)
        values = (wide / scales.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
        return cls(values, scales, bias)

    @classmethod
    def beside(cls, parts: Sequence[Any]) -> Int8Linear | None:
        return _rows_beside(cls, parts, ("values", "scales"))

    def product(self, rows: Tensor) -> Tensor:
        if rows.is_cuda:
            return F.linear(rows, self.weight_widened().to(rows.dtype))
        return _KERNELS._weight_int8pack_mm(rows.to(torch.bfloat16), self.values, self.scales).to(rows.dtype)

    def weight_widened(self) -> Float[Tensor, "out_features in_features"]:
        return self.values.float() * self.scales.float().unsqueeze(1)


class Int4Linear(PackedLinear):
    """Groups of `GROUP` weights as `(q - 8) scale + centre`, q from 0 to 15, scale and centre bfloat16.

    A weight that came from Q4_1 lies on such a grid already, and is off by the rounding of scale and centre alone,
    1/33 of a step at most. Any other weight is off by half a step, 1/30 of its group's range, and that.
    """

    def __init__(self, packed: Tensor, scales: Tensor, out_features: int, bias: Tensor | None) -> None:
        super().__init__(2 * packed.shape[1], out_features, bias)
        self.packed, self.scales = _held(packed), _held(scales)

    @classmethod
    def of(
        cls, weight: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None
    ) -> Int4Linear:
        rows = len(weight)
        wide = F.pad(weight.detach().float(), (0, 0, 0, -rows % TILE))
        q, scales = grid(wide)
        packed = _KERNELS._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        return cls(packed, scales, rows, bias)

    @classmethod
    def beside(cls, parts: Sequence[Any]) -> Int4Linear | None:
        if any(part.out_features % BLOCK for part in parts):
            return None
        packed, scales = torch.cat([part.packed for part in parts]), torch.cat([part.scales for part in parts], dim=1)
        made = cls(packed, scales, sum(part.out_features for part in parts), _biases(parts))
        begin = 0
        for part in parts:
            part.packed = _held(made.packed[begin : begin + part.out_features])
            begin += part.out_features
        return made

    def product(self, rows: Tensor) -> Tensor:
        if rows.device.type != "cpu":
            raise UnsupportedOption(
                f"these int4 weights are packed for a CPU, and the input is on {rows.device}: load the model there, "
                "load(..., quant='int4', device='cuda')"
            )
        made = _KERNELS._weight_int4pack_mm_for_cpu(rows.to(torch.bfloat16), self.packed, GROUP, self.scales)
        return (made if made.shape[1] == self.out_features else made[:, : self.out_features]).to(rows.dtype)

    def weight_widened(self) -> Float[Tensor, "out_features in_features"]:
        # The layout of the packed bytes belongs to the kernel, so it is asked: a unit vector picks one column, exactly.
        units = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self.product(units).T.float()


class Int4Rows(PackedLinear):
    """The grid of `Int4Linear` in rows of plain bytes, as the kernels of a GPU read it.

    A byte holds two weights of a group, `GROUP / 2` apart: `packed` [out_features, in_features / 2], the earlier one in
    the low bits. `scales` [out_features, groups, 2] are (scale, centre).
    """

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__(2 * packed.shape[1], packed.shape[0], bias)
        self.packed, self.scales = _held(packed), _held(scales)

    @classmethod
    def of(
        cls, weight: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None
    ) -> Int4Rows:
        q, scales = grid(weight.detach().float())
        low, high = q.unflatten(1, (-1, GROUP)).split(GROUP // 2, dim=2)
        return cls((low | high << 4).flatten(1), scales.transpose(0, 1).contiguous(), bias)

    @classmethod
    def beside(cls, parts: Sequence[Any]) -> Int4Rows | None:
        return _rows_beside(cls, parts, ("packed", "scales"))

    def product(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight_widened().to(rows.dtype))

    def weight_widened(self) -> Float[Tensor, "out_features in_features"]:
        halves = self.packed.unflatten(1, (-1, GROUP // 2))
        q = torch.cat((halves & 15, halves >> 4), dim=2).float()
        scale, centre = self.scales.float().unsqueeze(2).unbind(3)
        return ((q - 8) * scale + centre).flatten(1)


def grid(
    weight: Float[Tensor, "out_features in_features"],
) -> tuple[UInt8[Tensor, "out_features in_features"], Float[Tensor, "groups out_features 2"]]:
    """The nearest points of each group's grid, 0 to 15, and its (scale, centre), bfloat16, as the kernel takes them."""
    groups = weight.unflatten(1, (-1, GROUP))
    least, most = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((most - least) / 15).bfloat16()
    scale = scale.where(scale > 0, 1)
    centre = (least + 8 * (most - least) / 15).bfloat16()
    q = (groups - centre.float().unsqueeze(2)) / scale.float().unsqueeze(2) + 8
    return q.round().clamp(0, 15).byte().flatten(1), torch.stack((scale, centre), dim=2).transpose(0, 1).contiguous()


def _rounded_up(scales: Tensor) -> Tensor:
    """bfloat16 and never smaller, so that nothing is cut off; 1 where a row is all zeros."""
    near = scales.bfloat16()
    up = torch.where(near.float() < scales, near * (1 + 2**-7), near)
    return up.where(up > 0, 1).to(torch.bfloat16)


def _held(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _rows_beside(kind: Callable[..., Any], parts: Sequence[Any], names: tuple[str, str]) -> Any:
    """A layer of `kind` from tensors whose rows are outputs; the parts' own become views of the new ones."""
    made = kind(*(torch.cat([getattr(part, name) for part in parts]) for name in names), _biases(parts))
    begin = 0
    for part in parts:
        for name in names:
            setattr(part, name, _held(getattr(made, name)[begin : begin + part.out_features]))
        begin += part.out_features
    return made


def _biases(parts: Sequence[PackedLinear]) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    (held, *_) = (part.bias for part in parts if part.bias is not None)
    given = [held.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    return torch.cat(given)
