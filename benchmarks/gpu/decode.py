"""The whole decode step of two model shapes on one GPU, against the ceiling that the memory bus of the same run sets.

    python benchmarks/gpu/decode.py --json benchmarks/results/decode-h200.json

Random weights, 4 + 1,020 keys, all seats full. `share` is of the ceiling: weights read a step, and keys and values,
at the copy rate measured in the same run. `far` is the same step at position 10,000,000.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sinks.evals.speed.gpu.clock import copy_rate
from sinks.models.families import describe
from sinks.models.step.device.step import DeviceModel, DeviceStep
from sinks.models.step.device.weights import DeviceWeights
from sinks.models.step.slots import Seats
from sinks.models.weights.quantize import QUANTS, quantize

SINKS, WINDOW, NEAR, FAR = 4, 1_020, 2_000, 10_000_000

ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "rope_parameters": ROPE,
    },
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
}  # fmt: skip


def main() -> None:
    """Time every case and print a table."""
    parser = argparse.ArgumentParser(description="The fused decode step of whole models.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--quants", nargs="+", default=list(QUANTS), choices=QUANTS)
    parser.add_argument("--rounds", type=int, default=100)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    copies = copy_rate()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_TB_s": round(copies, 3)}
    print(machine, flush=True)
    rows = []
    for shape in given.shapes:
        for quant in given.quants:
            model = quantize(build(shape), quant)
            for count in given.rows:
                rows.append({"model": shape, "weights": quant} | measure(model, count, given.rounds, copies))
                print(rows[-1], flush=True)
    given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def build(shape: str) -> Any:
    """A Llama of this shape, random bfloat16 weights, on the GPU."""
    config = AutoConfig.for_model(
        "llama", **SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=True, hidden_act="silu"
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def seats_of(model: Any, count: int) -> Seats:
    """Rings full of random keys and values."""
    config = model.config
    shape = (count, config.num_key_value_heads, SINKS + WINDOW, config.head_dim)
    rotary = describe(model).rotaries(SINKS + WINDOW)["all"]
    layers = range(config.num_hidden_layers)
    rings = [tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in layers]
    return Seats(rings, [(SINKS, WINDOW) for _ in layers], [rotary for _ in layers], 0)


def measure(model: Any, rows: int, rounds: int, copies: float) -> dict[str, Any]:
    """Median microseconds of a step."""
    seats, began = seats_of(model, rows), time.perf_counter()
    made = DeviceModel(model)
    step = made.step(seats)
    times = {}
    for name, position in (("us", NEAR), ("us_far", FAR), ("us_again", NEAR)):
        step([1] * rows, list(range(rows)), [position] * rows)
        times[name] = replay(step, rounds)
    read = weight_bytes(made.weights) + 2 * sum(ring.nbytes for pair in seats.rings for ring in pair) // 2
    ceiling = read / copies / 1e6
    return {
        "rows": rows, **{name: round(us, 1) for name, us in times.items()},
        "tok_s": round(rows * 1e6 / times["us"]), "share": round(ceiling / times["us"], 3),
        "far_over_near": round(2 * times["us_far"] / (times["us"] + times["us_again"]), 4),
        "GB": round(read / 1e9, 3), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def weight_bytes(weights: DeviceWeights) -> int:
    """Bytes of weights that one step must read."""
    products = [weights.head]
    for block in weights.blocks:
        products += [block.qkv, block.out, block.gate_up, block.down]
    return sum(product.bytes for product in products)


def replay(step: DeviceStep, rounds: int) -> float:
    """Median microseconds of a greedy step that asks nobody."""
    times = []
    for _ in range(rounds + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step.run(4)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 250)
    return sorted(times[5:])[rounds // 2]


if __name__ == "__main__":
    main()
