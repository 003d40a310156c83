"""What it costs to look: a forward pass with every statistic on, against the same pass without any.

    python benchmarks/scan.py --json benchmarks/results/scan.json

Both read the same tokens in one pass of the built-in model without its output head; plain passes use PyTorch's fused
attention. They are timed in turn, with what it takes to bring the figures to the host, and ratios are of medians.
Memory is the peak above the loaded model, on one longer pass of random tokens. `--random-weights` takes the shape
alone, so that nothing is loaded.

    python benchmarks/scan.py --tokens 131072 --dtype bfloat16 --random-weights --device cuda --long 0

On a GPU what each key received costs a second pass over queries and keys, so there it is timed with and without, and
so are the parts. "first keys" is what a scan has on texts of more than 16,384 tokens: every statistic, but importance
for the first 16 keys only. "first half" has it for the keys that "sink anywhere" asks for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sinks.analysis.measures.entropy import NEAR, ends_of
from sinks.analysis.measures.importance import Importance, Prefixes
from sinks.analysis.measures.massive import HeadNorms, States
from sinks.analysis.measures.rows import Bins, Masses
from sinks.analysis.measures.sink_rate import FIRST, LENGTHS
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


@dataclass(frozen=True)
class Watch:
    """Which statistics are on: attention's, with importance for the `kept` keys (see `KEPT`), and the state's.

    `kinds` adds what the kinds of heads are told by, which takes two more passes. `bare` looks at attention and takes
    nothing from it, so that the price of looking stands alone.
    """

    attention: bool = True
    state: bool = True
    kept: str = "all keys"
    kinds: bool = False
    bare: bool = False


KEPT: dict[str, Callable[[int], int]] = {
    "all keys": lambda tokens: tokens,
    "first half": lambda tokens: tokens // 2,
    "first keys": lambda tokens: FIRST,
}
ALL = {"all keys": Watch()}
PARTS = {name: Watch(kept=name) for name in KEPT} | {
    "first keys, kinds of heads": Watch(kept="first keys", kinds=True),
    "bare look": Watch(attention=False, state=False, bare=True),
    "attention, first keys": Watch(state=False, kept="first keys"),
    "residual stream, keys and values": Watch(attention=False),
}


def watched(model: PreTrainedModel, tokens: int, on: Watch, stack: ExitStack) -> Callable[[], Any]:
    """Every collector of a survey that is on, in one pass; what is returned brings their figures to the host."""
    layers = int(model.config.num_hidden_layers)
    finish: list[Callable[[], Any]] = []
    if on.bare:
        stack.enter_context(probe(model, see=_ignore, sum_up=_ignore))
    if on.attention:
        rates, prefixes = (
            Importance(tokens, kept=KEPT[on.kept](tokens)),
            Prefixes([length for length in LENGTHS if length <= tokens]),
        )
        bins = Bins(layers, ends_of(tokens), torch.tensor([0]))
        masses = Masses(torch.tensor([0]), tokens // 2, ((1, 2), (0, NEAR)))
        for collector in (rates, prefixes, bins, *[masses] * on.kinds):
            stack.enter_context(probe(model, see=collector.see, sum_up=collector.sum_up))
        finish += [lambda: masses.means(layers)] * on.kinds
        finish += [rates.close, prefixes.close, lambda: bins.profile("dense")]
    if on.state:
        states, norms = States(0), HeadNorms(0)
        stack.enter_context(probe(model, arrive=norms.arrive, residual=states.residual))
        finish += [states.finished, lambda: [norms.ratio(which, layers) for which in ("key", "value")]]
    return lambda: [each() for each in finish]


def _ignore(_: Any) -> None:
    """Take nothing."""


def seconds(model: PreTrainedModel, ids: Tensor, on: Watch | None) -> float:
    """Wall clock of one pass, and of what it takes to have its figures; None: a plain pass."""
    with ExitStack() as stack:
        finish = None if on is None else watched(model, ids.shape[1], on, stack)
        synchronise(ids)
        began = time.perf_counter()
        read(model, ids)
        if finish is not None:
            finish()
        synchronise(ids)
        return time.perf_counter() - began


def synchronise(ids: Tensor) -> None:
    """Wait for the GPU, if there is one."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize()


def speed(model: PreTrainedModel, ids: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of every kind of pass, in turn, and the ratio of its median to the plain pass's."""
    ways: dict[str, Watch | None] = {"plain": None} | (PARTS if ids.device.type == "cuda" else ALL)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        seconds(model, ids[:, :256], way)  # warm up
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(seconds(model, ids, way))
    plain = statistics.median(found["plain"])
    ratios = {name: statistics.median(spent) / plain for name, spent in found.items()}
    return {"tokens": ids.shape[1], "seconds": found, "ratio": ratios}


def memory(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Peak memory of a pass with every statistic, above the loaded model."""
    meter = meter_for(ids.device)
    with watch(meter) as peak:
        spent = seconds(model, ids, Watch())
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
        with torch.device(flags.device):  # drawn there: a CPU takes longer to draw them than a GPU to read a text
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
