"""What it costs to look: a forward pass with every statistic on, against the same pass without any.

    python benchmarks/scan.py --json benchmarks/results/scan.json

Both read the same tokens in one pass of the built-in model without its output head; plain passes use PyTorch's fused
attention. They are timed in turn, and the ratio is of their medians. Memory is the peak above the loaded model, on one
longer pass of random tokens. `--random-weights` takes the shape alone, so that nothing is loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sinks.analysis.measures.entropy import Bins, ends_of
from sinks.analysis.measures.massive import HeadNorms, States
from sinks.analysis.measures.sink_rate import Importance, Prefixes
from sinks.analysis.probe import probe, read
from sinks.assets.texts import read_text
from sinks.models.load import load
from sinks.reading.memory import meter_for, watch
from sinks.reading.provenance import machine, now, versions
from sinks.reading.tokens import stream_ids

SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=131072,
)
"""SmolLM2-135M's."""


def watched(model: PreTrainedModel, tokens: int, stack: ExitStack) -> list[Any]:
    """Every collector of a survey, in one pass: importance, prefixes, entropy, residual stream, keys and values."""
    layers, sink = int(model.config.num_hidden_layers), torch.tensor([0])
    rates, prefixes, bins = Importance(tokens), Prefixes(tokens), Bins(layers, ends_of(tokens), sink)
    states, norms = States(0), HeadNorms(0)
    for see in (rates.see, prefixes.see, bins.see):
        stack.enter_context(probe(model, see=see))
    stack.enter_context(probe(model, arrive=norms.arrive, residual=states.residual))
    return [rates, prefixes, bins, states, norms]


def seconds(model: PreTrainedModel, ids: Tensor, statistics_on: bool) -> float:
    """Wall clock of one pass."""
    with ExitStack() as stack:
        if statistics_on:
            watched(model, ids.shape[1], stack)
        synchronise(ids)
        began = time.perf_counter()
        read(model, ids)
        synchronise(ids)
        return time.perf_counter() - began


def synchronise(ids: Tensor) -> None:
    """Wait for the GPU, if there is one."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize()


def speed(model: PreTrainedModel, ids: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of both kinds of pass, in turn."""
    seconds(model, ids[:, :256], True)  # warm up
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for on in (False, True):
            found[on].append(seconds(model, ids, on))
    plain, scan = (statistics.median(found[on]) for on in (False, True))
    return {
        "tokens": ids.shape[1],
        "plain_seconds": found[False],
        "scan_seconds": found[True],
        "ratio": scan / plain,
    }


def memory(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Peak memory of a pass with every statistic, above the loaded model."""
    meter = meter_for(ids.device)
    with watch(meter) as peak:
        spent = seconds(model, ids, True)
    return {"tokens": ids.shape[1], "peak_bytes": peak.bytes, "seconds": spent, "method": meter.method}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the timed pass")
    parser.add_argument("--long", type=int, default=32768, help="tokens of the pass whose memory is measured; 0: none")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--random-weights", action="store_true", help="SmolLM2's shape, nothing loaded")
    parser.add_argument("--json", type=Path, help="write the results here")
    flags = parser.parse_args()
    dtype, generator = getattr(torch, flags.dtype), torch.Generator().manual_seed(0)
    random = torch.randint(49152, (1, max(flags.tokens, flags.long)), generator=generator).to(flags.device)
    if flags.random_weights:
        model, name = AutoModelForCausalLM.from_config(SHAPE, dtype=dtype).to(flags.device).eval(), "random weights"
        ids = random[:, : flags.tokens]
    else:
        loaded = load(dtype=dtype, device=flags.device)
        model, name = loaded.model, loaded.source.name
        ids = torch.tensor(stream_ids(loaded.tokenizer, read_text().text)[0][: flags.tokens], device=flags.device)[None]
    results = {
        "created": now(),
        "model": {"name": name, "dtype": flags.dtype, "device": flags.device},
        "machine": machine(model.device),
        "versions": versions(),
        "speed": speed(model, ids, flags.repeats),
        "memory": memory(model, random[:, : flags.long]) if flags.long else None,
    }
    print(json.dumps({key: results[key] for key in ("speed", "memory")}, indent=1))
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
