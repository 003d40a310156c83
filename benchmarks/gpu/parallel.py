"""A model shared between the GPUs of one host, against the same model whole on each: speed, memory, logits.

    torchrun --nproc-per-node 2 benchmarks/gpu/parallel.py --json benchmarks/results/parallel-h200.json

Random weights, the same on every GPU. `graph` is one step of the model's own modules over an open ring in one CUDA
graph, `session` the passes that a `Session` makes. Errors are of logits, relative, against the whole model in float32
with plain attention; the text is shorter than the window, so that both are the same attention.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.cache.plan import Plan
from sinks.evals.speed.gpu.clock import Burst, bursts, copy_rate, machine
from sinks.evals.speed.gpu.ring import ModuleSteps
from sinks.evals.speed.gpu.shapes import SHAPES, ring_bytes, weight_bytes
from sinks.models.attach import attach
from sinks.models.parallel.line import line
from sinks.models.parallel.share import share

PLAN = Plan(4, 1_020)
ROWS = (1, 64)
CHUNK, CHUNKS = 2_048, 8
READ = 512
"""Tokens whose logits are compared: fewer than the window."""


def main() -> None:
    """Measure the whole model, share it, measure again; process 0 prints, and writes what every process found."""
    parser = argparse.ArgumentParser(description="Tensor parallelism on one host.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="Llama-3-8B")
    given = parser.parse_args()
    with line("cuda") as mesh, torch.no_grad():
        about = {"machine": machine(), "processes": mesh.size(), "shape": given.shape}
        print(about, f"{copy_rate():.3f} TB/s", flush=True)
        model = SHAPES[given.shape].build()
        ids = torch.randint(model.config.vocab_size, (1, READ), device="cuda")
        exact = copy.deepcopy(model).float()(input_ids=ids, use_cache=False).logits.double()
        attach(model)
        whole = measure("whole", model, ids, exact)
        share(model, mesh)
        found = {"whole": whole, "shared": measure("shared", model, ids, exact)}
        told: list[Any] = [None] * mesh.size()
        dist.all_gather_object(told, found)
        if mesh.get_local_rank() == 0:
            given.json.write_text(json.dumps({**about, "processes_found": told}, indent=2) + "\n")


def measure(what: str, model: PreTrainedModel, ids: Tensor, exact: Tensor) -> dict[str, Any]:
    """Everything of one model, on this process's GPU; what fails says why, and the rest is measured."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() - exact.nbytes
    parts: dict[str, Callable[[], Any]] = {
        "weights_GB": lambda: round(held / 1e9, 3),
        "logits": lambda: compared(model, ids, exact),
        "prefill_tokens_per_second": lambda: round(prefill(model)),
    }
    for rows in ROWS:
        parts[f"session_{rows}"] = lambda rows=rows: rated(session_step(model, rows), rows)
        parts[f"graph_{rows}"] = lambda rows=rows: rated(graph_step(model, rows), rows)
        parts[f"bytes_{rows}"] = lambda rows=rows: weight_bytes(model) + ring_bytes(model, PLAN, rows)
    parts["peak_GB"] = lambda: round(torch.cuda.max_memory_allocated() / 1e9, 2)
    found: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # the same in every process, or torchrun ends them all
            found[name] = f"{type(error).__name__}: {error}"
        print(dist.get_rank(), what, name, found[name], flush=True)
    return found


def compared(model: PreTrainedModel, ids: Tensor, exact: Tensor) -> dict[str, float]:
    """How far the logits are from the exact ones, and their sum, which is the same in every process."""
    logits = read(model, ids, SinkCache.for_model(model, sinks=PLAN.sinks, window=PLAN.window)).double()
    return {
        "relative_error": float((logits - exact).norm() / exact.norm()),
        "same_greedy_token": float((logits.argmax(-1) == exact.argmax(-1)).double().mean()),
        "sum": float(logits.sum()),
    }


def rated(milliseconds: float, rows: int) -> dict[str, float]:
    """Time of a step, and tokens a second."""
    return {"ms": round(milliseconds, 3), "tokens_per_second": round(1e3 * rows / milliseconds, 1)}


def read(model: PreTrainedModel, ids: Tensor, cache: SinkCache) -> Tensor:
    """Logits behind every token."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def graph_step(model: PreTrainedModel, rows: int) -> float:
    """Milliseconds of a step in a CUDA graph."""
    steps = ModuleSteps(model, PLAN, rows, position=5_000)
    times = bursts({"graph": Burst(steps.run, 20)}, 7)["graph"]
    return sorted(times)[len(times) // 2]


def session_step(model: PreTrainedModel, rows: int) -> float:
    """Milliseconds of a step as `Session` and `Engine` make it, greedy choice included."""
    cache = SinkCache.for_model(model, sinks=PLAN.sinks, window=PLAN.window)
    ids = torch.randint(model.config.vocab_size, (rows, 256), device=model.device)
    held = [read(model, ids, cache)[:, -1:].argmax(-1)]

    def write(steps: int) -> None:
        for _ in range(steps):
            held[0] = read(model, held[0], cache)[:, -1:].argmax(-1)
            held[0].tolist()

    times = bursts({"session": Burst(write, 4)}, 3)["session"]
    return sorted(times)[len(times) // 2]


def prefill(model: PreTrainedModel) -> float:
    """Tokens a second of a long text read in chunks, without the output head."""
    cache = SinkCache.for_model(model, sinks=PLAN.sinks, window=PLAN.window)
    ids = torch.randint(model.config.vocab_size, (1, CHUNK), device=model.device)

    def feed(chunks: int) -> None:
        for _ in range(chunks):
            model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)

    return 1e3 * CHUNK / bursts({"prefill": Burst(feed, CHUNKS)}, 1)["prefill"][0]


if __name__ == "__main__":
    main()
