"""The kernels of attention over a whole text on a GPU, one by one: what of a pass is sinks, turning, window.

    python benchmarks/gpu/band.py --json benchmarks/results/band-h200.json

`sinks bench gpu` times whole passes against their peers. Here heads are turned, two angles, and `window` is
flash-attn-4's plain one; `window and sinks` the same with the sinks merged inside its kernel where they can be,
`window, then merge` with a pass of their own, `window and sinks, triton` our own kernel. Milliseconds of the device,
medians in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sinks.evals.speed.gpu.band import HEADS, KV_HEADS, SINKS, Text, heads_of, scorings
from sinks.evals.speed.gpu.clock import in_turn, machine, need_gpu
from sinks.kernels.band import flash
from sinks.kernels.device import backward
from sinks.kernels.device.forward import Band, forward
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.sink_part import Finished, merge_sinks, settle, sink_gradients
from sinks.kernels.device.turn import turn, turn_back

TEXTS = (Text(16_384, 1_020, 128), Text(65_536, 4_092, 128), Text(16_384, 1_020, 64))


def main() -> None:
    """Time every text and print a table."""
    parser = argparse.ArgumentParser(description="The kernels of attention, one by one.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    need_gpu("this benchmark")
    rows = []
    for text in TEXTS:
        found = in_turn(parts_of(text), given.rounds)
        rows.append({
            "tokens": text.tokens, "window": text.window, "head_dim": text.head_dim, "heads": [HEADS, KV_HEADS],
            "ms": {name: round(taken, 4) for name, taken in found.items()},
        })  # fmt: skip
        print(rows[-1], flush=True)
    given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


def parts_of(text: Text) -> dict[str, Callable[[], Any]]:
    """Each step of a forward and a backward pass, as a call."""
    query, key, value, given = heads_of(text)
    raw, raw_key = (heads[None].transpose(1, 2) for heads in (query, key))
    rows, rotary, capacity = Rows.whole(1, text.tokens, given.device), scorings(text)[1].rotary, SINKS + text.window
    band = Band(SINKS, text.window, text.head_dim**-0.5)
    turned = turn(raw, raw_key, rows, rotary, band)
    heads = (turned.query, turned.key, value)
    out, figures = forward(*heads, turned.scores, None, rows, band)
    done = Finished(raw, *heads, turned.scores, None, out, figures[0])
    part = sink_gradients(done, given, rows, band)
    back = backward.window_gradients(done, given, part.delta, rows, band)
    steps: dict[str, Callable[[], Any]] = {
        "turn": lambda: turn(raw, raw_key, rows, rotary, band),
        "turn, no sinks": lambda: turn(raw, raw_key, rows, rotary, Band(0, text.window, band.scale)),
        "window and sinks, triton": lambda: forward(*heads, turned.scores, None, rows, band),
        "sink gradient": lambda: sink_gradients(done, given, rows, band),
        "window gradient, triton": lambda: backward.window_gradients(done, given, part.delta, rows, band),
        "settle": lambda: settle(done, part, back[1], back[2], rows, band, rotary),
        "turn query back": lambda: turn_back(
            back[0], (turned.key, turned.sinks), part.slopes, rows, rotary, capacity
        ),
        "turn key back": lambda: turn_back(back[1], (back[1], None), None, rows, rotary, capacity),
    }  # fmt: skip
    if not flash.has_flash():
        return steps

    def merged() -> None:
        window = flash.window_forward(*heads, rows, band)
        merge_sinks(turned.scores, value, None, window, rows, band)

    return steps | {
        "window": lambda: flash.window_forward(*heads, rows, band),
        "window, then merge": merged,
        "window and sinks": lambda: flash.whole_forward(*heads, turned.scores, None, rows, band),
        "window gradient": lambda: flash.window_gradients(done, given, rows, band),
    }


if __name__ == "__main__":
    main()
