"""Decoding with sinks against a sliding window that is computed afresh for every token, in turn in one run.

    python benchmarks/recompute.py --json benchmarks/results/recompute.json

Both see as many keys. Re-computation (StreamingLLM's baseline, arXiv 2309.17453, Figure 10) reads the last
sinks + window tokens anew for each token and takes the logits of the last one only. Each turn is one such pass, then
`--singles` steps of a session that has read the same text; medians of both are compared. A turn is as long as a pass,
so a machine that is busy for longer slows both.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinks.assets.texts import read_text
from sinks.cache.cache import SinkCache
from sinks.evals.contenders import Recompute
from sinks.models.attach import attach
from sinks.models.load import load
from sinks.reading.perplexity import surprise
from sinks.reading.provenance import machine, now, versions
from sinks.reading.tokens import stream_ids

CHUNK = 256


def main() -> None:
    """Measure each window, write the JSON, print what it says."""
    parser = argparse.ArgumentParser(description="Sinks against a window with re-computation, milliseconds a token.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--windows", type=int, nargs="+", default=[252, 1020])
    parser.add_argument("--turns", type=int, default=10, help="passes of re-computation, for each window")
    parser.add_argument("--singles", type=int, default=10, help="tokens that a session decodes in a turn")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    text, loaded = read_text(), load(device=given.device)
    model = attach(loaded.model)
    needed = given.sinks + max(given.windows) + (given.turns + 1) * given.singles + 1
    ids = torch.tensor(stream_ids(loaded.tokenizer, text.text[: 16 * needed])[0][:needed], device=model.device)
    result = {
        "created": now(),
        "machine": machine(model.device),
        "versions": versions(),
        "model": asdict(loaded.source),
        "text": {"name": text.name, "sha256": text.sha256},
        "rows": [measure(model, ids, window, given) for window in given.windows],
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["rows"], indent=2))


@torch.inference_mode()
def measure(model: PreTrainedModel, ids: Tensor, window: int, given: argparse.Namespace) -> dict[str, Any]:
    """Both ways with `window` recent tokens; the first turn warms up and is not counted."""
    keys = given.sinks + window
    cache = SinkCache.for_model(model, sinks=given.sinks, window=window)
    for part in ids[:keys].split(CHUNK):
        model(input_ids=part[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    afresh, streamed = Recompute(keys, samples=given.turns, seed=0), list[float]()
    passes: list[float] = []
    for turn in range(given.turns + 1):
        t = keys + turn * given.singles
        began = time.perf_counter()
        afresh.predict(model, ids, t)
        passes.append(1e3 * (time.perf_counter() - began))
        for step in range(given.singles):
            began = time.perf_counter()
            logits = model(input_ids=ids[None, t + step, None], past_key_values=cache, use_cache=True).logits[0]
            surprise(logits, ids[t + step + 1, None]).cpu()  # as `predict` does, so that both end on the host
            streamed.append(1e3 * (time.perf_counter() - began))
    ours, theirs = float(np.median(streamed[given.singles :])), float(np.median(passes[1:]))
    return {
        "sinks": given.sinks,
        "window": window,
        "keys": keys,
        "turns": given.turns,
        "sinks_ms_per_token": ours,
        "recompute_ms_per_token": theirs,
        "speedup": theirs / ours,
        "sinks_ms_quartiles": np.percentile(streamed[given.singles :], (25, 75)).tolist(),
        "recompute_ms_quartiles": np.percentile(passes[1:], (25, 75)).tolist(),
    }


if __name__ == "__main__":
    main()
