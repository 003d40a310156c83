"""What two processes find that share models between them; a file of its own, since each imports it anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.cache.fingerprint import fingerprint
from sinks.errors import SinksError
from sinks.models.attach import attach
from sinks.models.load import load
from sinks.models.observe import observe
from sinks.models.parallel.line import line
from sinks.models.parallel.share import share, share_of
from sinks.models.step.hasten import hasten, steps_of
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.families.tiny import build, tokens
from tests.reading.tiny import stream

PROCESSES = 2
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CASES = {
    f"{name}, {'tied' if tied else 'untied'}, {str(dtype).removeprefix('torch.')}": (name, tied, dtype)
    for name in FAMILIES
    for tied in (False, True)
    for dtype in (torch.float64, torch.float32)
}
LEARNING = ("qwen2, tied, float64", "qwen3, untied, float64")
"""Cases whose gradients are compared: biases, head norms, a table that is the head."""

SIZES = (7, 1, 1, 30, 22, *[1] * 12)
"""Chunks and steps: filling, filled, and a chunk longer than the window."""

WARM = Sampling(temperature=1.3, top_p=0.95, seed=5)


def made(case: str) -> PreTrainedModel:
    """A random model; 61 tokens, an odd vocabulary, so that no two processes get equal parts of it."""
    name, tied, dtype = CASES[case]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 61}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return attach(build(name, layers=2, dtype=dtype, tie_word_embeddings=tied, **sizes, **heads))


def streamed(model: PreTrainedModel) -> tuple[Tensor, SinkCache]:
    """Logits of a stream of two rows, and the cache it ends in."""
    cache, logits, at = SinkCache.for_model(model, sinks=3, window=9), [], 0
    ids = tokens(sum(SIZES), batch=2) % 61
    with torch.inference_mode():
        for size in SIZES:
            columns = ids[:, at : at + size]
            logits.append(model(input_ids=columns, past_key_values=cache, use_cache=True).logits)
            at += size
    return torch.cat(logits, dim=1), cache


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of a loss of its own attention over a short text, whole, by parameter; tied ones once."""
    model.requires_grad_(True)
    ids = tokens(11, batch=2) % 61
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: _whole(each.grad) for name, each in model.named_parameters()}


def written(folder: Path, **options: Any) -> str:
    """What a session writes, its fork, and both after that, with random numbers."""
    session = Session.open(folder, sinks=3, window=9, **options)
    session.feed(stream(50))
    twin = session.fork()
    first = "".join(session.generate(12, sampling=WARM))
    return "|".join([first, *twin.generate(12, sampling=WARM), "", *session.generate(5)])


def refusals(mesh: DeviceMesh, folder: Path) -> dict[str, str]:
    """What is said of everything that cannot be, by what was tried."""
    small = {"hidden_size": 60, "head_dim": 20, "num_attention_heads": 3, "num_key_value_heads": 3}
    shared = share(attach(build("llama")), mesh)
    ways: dict[str, Callable[[], object]] = {
        "heads": lambda: share(build("llama", **small), mesh),
        "width": lambda: share(build("llama", intermediate_size=33), mesh),
        "family": lambda: share(build("gemma2"), mesh),
        "twice": lambda: share(shared, mesh),
        "hastened": lambda: share(hasten(attach(build("llama"))), mesh),
        "quantised": lambda: share(load(folder, quant="int8").model, mesh),
        "quant": lambda: load(folder, quant="int8", parallel=mesh),
        "device": lambda: load(folder, device="cpu:0", parallel=mesh),
        "snapshot": lambda: fingerprint(shared),
        "hasten": lambda: hasten(shared),
        "observation": lambda: observe(shared, None).__enter__(),  # type: ignore[arg-type]
    }
    said = {"steps": steps_of(shared)}
    for name, way in ways.items():
        try:
            way()
            said[name] = "nothing"
        except SinksError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def find(rank: int, folder: Path, port: int) -> None:
    """One process: everything that the tests ask for, into a file of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    found: dict[str, Any] = {"logits": {}, "bytes": {}}
    with line("cpu") as mesh:
        for case in CASES:
            model = share(made(case), mesh)
            held = share_of(model)
            assert held is not None and (held.rank, held.of) == (rank, PROCESSES)
            found["logits"][case], cache = streamed(model)
            found["bytes"][case] = cache.nbytes
        found["gradients"] = {name: gradients(share(made(name), mesh)) for name in LEARNING}
        held = [_local(each) for each in model.parameters()]
        found["parameters"] = sum(each.numel() for each in held)
        found["held"] = sum(each.untyped_storage().nbytes() // each.element_size() for each in held)
        found["written"] = written(folder / "model", dtype="float64", parallel=mesh)
        found["note"] = load(folder / "model", parallel=mesh).source.note
        found["refusals"] = refusals(mesh, folder / "model")
    torch.save(found, folder / f"{rank}.pt")


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def run(folder: Path, port: int) -> list[dict[str, Any]]:
    """Let the processes find it; what each found, by rank."""
    multiprocessing.spawn(find, args=(folder, port), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]
