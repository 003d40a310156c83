"""Triton, where it is installed: it comes with PyTorch's builds for GPUs and is no dependency of `sinks`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from sinks.errors import UnsupportedOption


def _load(name: str) -> Any:
    return importlib.import_module(name) if importlib.util.find_spec("triton") else None


triton: Any = _load("triton")
tl: Any = _load("triton.language")

if TYPE_CHECKING:
    Value: TypeAlias = Any
    constexpr: TypeAlias = Any
else:  # Triton reads the annotations of a kernel too, and wants words of its own
    Value = Any if tl is None else tl.tensor
    constexpr = Any if tl is None else tl.constexpr

LOG2E = 1.4426950408889634
"""Kernels count in powers of two: `log2(e)` is folded into the scale of the scores."""


def jit(kernel: Callable[..., Any], *, varying: Sequence[str] = ()) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton and nobody will launch it.

    `varying` names whole numbers that change from call to call: none is worth a compilation of its own.
    """
    # The checker of shapes wraps every function under test, and Triton reads the source of the one inside.
    return kernel if triton is None else triton.jit(inspect.unwrap(kernel), do_not_specialize=list(varying))


SHARED_BYTES = 200 * 1024
"""Shared memory of one program that the largest tiles of all kernels ask for; server GPUs since Hopper have 227 KB."""


@cache  # asking the driver takes as long as a short text's attention
def why_no_triton(device: torch.device) -> str | None:
    """What keeps the kernels of this room from running on `device`; None: nothing."""
    if triton is None:
        return "Triton is not installed (install the package `triton`)"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"Triton kernels do not run on {device.type}"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "the Triton kernels need a Hopper GPU or a newer one"
    index = torch.cuda.current_device() if device.index is None else device.index
    there = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if there < SHARED_BYTES:
        return f"a program of this GPU has {there} bytes of shared memory and the kernels need {SHARED_BYTES}"
    return None


def need_triton(device: torch.device, instead: str = "choose impl='flex' or 'chunked'") -> None:
    """Raise UnsupportedOption, naming what to do `instead`, unless the kernels of this room run on `device`."""
    if reason := why_no_triton(device):
        raise UnsupportedOption(f"{reason}: {instead}")


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on the GPU that holds the tensors: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def describe(heads: torch.Tensor, rows: int) -> Any:
    """A tensor descriptor of `heads` [tokens, heads, head_dim] that reads `rows` tokens of one head at a time."""
    tokens, count, head_dim = heads.shape
    made = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    return made(heads, [tokens, count * head_dim], [count * head_dim, 1], [rows, head_dim])
