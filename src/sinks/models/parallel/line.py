"""The processes of one host that share a model, in a line: what `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sinks.errors import InvalidInput, UnsupportedOption

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


@contextmanager
def line(device: str = "cuda") -> Iterator[DeviceMesh]:
    """The processes that `torchrun --nproc-per-node N` started, as a mesh for `share`; it is dissolved at the end.

    With `device="cuda"` process i takes GPU i and they talk through NCCL; with "cpu" through gloo.

    Raises InvalidInput outside of torchrun, for another device, or for more processes than GPUs; UnsupportedOption
    where this build of PyTorch cannot do it.
    """
    backend = BACKENDS.get(device)
    if backend is None:
        raise InvalidInput(f"device={device!r}: processes share a model on {' or '.join(BACKENDS)}")
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise InvalidInput("this process has no neighbours: start it with torchrun --nproc-per-node N")
    if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
        raise InvalidInput("these processes are on several hosts, and a model is shared on one: start with --nnodes 1")
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise UnsupportedOption(f"this build of PyTorch has no {backend}: install one that has, or use another device")
    here = _device(device, int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, device_id=here if device == "cuda" else None)
    try:
        yield init_device_mesh(device, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def _device(kind: str, number: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise InvalidInput(f"process {number} has no GPU of its own, of {torch.cuda.device_count()}: start fewer")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
