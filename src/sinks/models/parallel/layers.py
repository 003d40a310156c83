"""Linear layers that hold a share of their weight, a DTensor, and compute with what is here.

DTensor's own dispatch would do the same, and takes longer on the host than the product takes on a GPU; so it cuts and
names the weights, and the two sums that tensor parallelism needs are written out (f and g of Megatron-LM, arXiv
1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


class ColumnLinear(nn.Linear):
    """A share of the outputs, from the whole input."""

    PLACES: tuple[Placement, Placement] = (Shard(0), Shard(0))
    """How weight and bias are cut."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., inputs]` to this process's `[..., outputs / processes]`."""
        if torch.is_grad_enabled():
            input = _Shown.apply(input, group_of(self.weight))
        return F.linear(input, here(self.weight), None if self.bias is None else here(self.bias))


class RowLinear(nn.Linear):
    """The whole output, summed over the processes, from a share of the input."""

    PLACES: tuple[Placement, Placement] = (Shard(1), Replicate())

    def forward(self, input: Tensor) -> Tensor:
        """This process's `[..., inputs / processes]` to `[..., outputs]`, the same bits in every process."""
        out = _Summed.apply(F.linear(input, here(self.weight)), group_of(self.weight))
        return out if self.bias is None else out + here(self.bias)


def divide(linear: nn.Linear, mesh: DeviceMesh, kind: type[ColumnLinear] | type[RowLinear]) -> None:
    """Make `linear` one of `kind`, which keeps this process's share of what is here; nothing is sent."""
    for name, place in zip(("weight", "bias"), kind.PLACES, strict=True):
        if getattr(linear, name) is not None:
            linear.register_parameter(name, cut(getattr(linear, name), mesh, place))
    linear.__class__ = kind


def cut(whole: Tensor, mesh: DeviceMesh, place: Placement) -> nn.Parameter:
    """This process's part of a parameter, on its device, in memory of its own; cut as DTensor cuts, by `chunk`.

    `distribute_tensor` would bring the whole to the device first, and keep it there behind a view.
    """
    part = whole.detach()
    if isinstance(place, Shard):
        parts, rank = part.chunk(mesh.size(), dim=place.dim), mesh.get_local_rank()
        part = parts[rank] if rank < len(parts) else part.narrow(place.dim, 0, 0)
    part = part.to(device_of(mesh), memory_format=torch.contiguous_format, copy=True)
    size, stride = whole.shape, whole.stride()
    named = DTensor.from_local(part, mesh, [place], run_check=False, shape=size, stride=stride)
    return nn.Parameter(named, whole.requires_grad)


def device_of(mesh: DeviceMesh) -> torch.device:
    """This process's device: the current one, where the type has several."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def join(norm: nn.Module, mesh: DeviceMesh) -> None:
    """Give every process the whole gradient of a norm of heads, of which each meets its own share."""

    def summed(gradient: Tensor) -> Tensor:
        whole = gradient.clone()
        dist.all_reduce(whole, group=mesh.get_group())
        return whole

    for parameter in norm.parameters():
        asked = parameter.requires_grad
        parameter.requires_grad_(True).register_hook(summed)  # one that asks for none takes no hook
        parameter.requires_grad_(asked)


def here(weight: Tensor) -> Tensor:
    """This process's part of a weight."""
    return cast(DTensor, weight).to_local()


def group_of(weight: Tensor) -> dist.ProcessGroup:
    """The processes that share a weight."""
    return cast(DTensor, weight).device_mesh.get_group()


class _Shown(torch.autograd.Function):
    """The same input for everybody: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole, None


class _Summed(torch.autograd.Function):
    """The sum of everybody's output: each one's gradient is the sum's own."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(given)
        dist.all_reduce(given, group=group)
        return given

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
