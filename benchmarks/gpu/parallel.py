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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.cache.plan import Plan
from sinks.evals.speed.gpu.clock import bursts, copy_rate, machine
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
    """Measure the whole model, share it, measure again; process 0 prints."""
    parser = argparse.ArgumentParser(description="Tensor parallelism on one host.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="Llama-3-8B")
    given = parser.parse_args()
    with line("cuda") as mesh, torch.no_grad():
        found: dict[str, Any] = {"machine": machine(), "processes": mesh.size(), "shape": given.shape}
        found["copy_TB_s"] = round(copy_rate(), 3)
        model = SHAPES[given.shape].build()
        ids = torch.randint(model.config.vocab_size, (1, READ), device="cuda")
        exact = copy.deepcopy(model).float()(input_ids=ids, use_cache=False).logits.double()
        attach(model)
        found["whole"] = measure(model, ids, exact)
        share(model, mesh)
        found["shared"] = measure(model, ids, exact)
        told = [None] * mesh.size()
        dist.all_gather_object(told, found)
        if mesh.get_local_rank() == 0:
            given.json.write_text(json.dumps({**found, "processes_found": told}, indent=2) + "\n")
            print(json.dumps(told, indent=1))


def measure(model: PreTrainedModel, ids: Tensor, exact: Tensor) -> dict[str, Any]:
    """Everything of one model, on this process's GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() - exact.nbytes
    logits = read(model, ids, SinkCache.for_model(model, sinks=PLAN.sinks, window=PLAN.window)).double()
    error = float((logits - exact).norm() / exact.norm())
    same = float((logits.argmax(-1) == exact.argmax(-1)).double().mean())
    found: dict[str, Any] = {"weights_GB": round(held / 1e9, 3), "error": error, "same_greedy_token": same}
    found["checksum"] = float(logits.sum())
    for rows in ROWS:
        found[f"graph_{rows}"] = rated(graph_step(model, rows), rows)
        found[f"session_{rows}"] = rated(session_step(model, rows), rows)
    found["prefill_tokens_per_second"] = round(prefill(model))
    found["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    found["bytes_of_whole_step"] = {rows: weight_bytes(model) + ring_bytes(model, PLAN, rows) for rows in ROWS}
    return found


def rated(milliseconds: float, rows: int) -> dict[str, float]:
    """Time of a step, and tokens a second."""
    return {"ms": round(milliseconds, 3), "tokens_per_second": round(1e3 * rows / milliseconds, 1)}


def read(model: PreTrainedModel, ids: Tensor, cache: SinkCache) -> Tensor:
    """Logits behind every token."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def graph_step(model: PreTrainedModel, rows: int) -> float:
    """Milliseconds of a step in a CUDA graph."""
    steps = ModuleSteps(model, PLAN, rows, position=5_000)
    times = bursts({"graph": (steps.run, 20)}, 7)["graph"]
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

    times = bursts({"session": (write, 4)}, 3)["session"]
    return sorted(times)[len(times) // 2]


def prefill(model: PreTrainedModel) -> float:
    """Tokens a second of a long text read in chunks, without the output head."""
    cache = SinkCache.for_model(model, sinks=PLAN.sinks, window=PLAN.window)
    ids = torch.randint(model.config.vocab_size, (1, CHUNK), device=model.device)

    def feed(chunks: int) -> None:
        for _ in range(chunks):
            model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)

    return 1e3 * CHUNK / bursts({"prefill": (feed, CHUNKS)}, 1)["prefill"][0]


if __name__ == "__main__":
    main()
