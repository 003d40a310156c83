"""A full stream whose counter is moved on: the same logits for the same next tokens, however far.

Moved on by n means that every token of the window was number j and is now number j + n: its key is turned by n
positions more and lies n slots further on. The sinks stay, keys and positions alike: in a full cache their distance is
constant.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinks.cache.cache import SinkCache
from sinks.kernels.phase import rotate
from sinks.models.attach import attach
from sinks.models.step.hasten import hasten
from tests.families.tiny import build, tokens

FAR = 10_000_000
SINKS, WINDOW = 3, 17
READ, ALL = 50, 110


def moved_on(cache: SinkCache, by: int, dtype: torch.dtype) -> SinkCache:
    """A copy of a full stream of one row, moved on in float64, with keys and values of this type."""
    held = {name: part.clone() for name, part in cache.dump().items()}
    for layer, (ring, rotary) in enumerate(zip(cache.rings, cache.rotaries, strict=True)):
        sinks, window = ring.plan.sinks, ring.plan.window
        for name in ("keys", "values"):
            own = held[f"{name}.{layer}"].double()
            recent = own[:, :, sinks:]
            if name == "keys" and rotary is not None:
                recent = rotate(recent, *rotary.tables(torch.full((1, window), by), torch.float64), rotary)
            held[f"{name}.{layer}"] = torch.cat((own[:, :, :sinks], recent.roll(by % window, 2)), 2).to(dtype)
    for name in ("seen", "columns"):
        held[f"cache.{name}"] += by
    made = cache.twin()
    made.adopt(held)
    return made


def continued(model: Any, cache: SinkCache, ids: Tensor, at_once: int = 1) -> Tensor:
    """Logits `[tokens, vocab]` of the next tokens, in so many a pass."""
    with torch.inference_mode():
        found = [
            model(input_ids=part.to(model.device), past_key_values=cache, use_cache=True).logits[0]
            for part in ids.split(at_once, dim=1)
        ]
    return torch.cat(found)


def filled(model: Any, ids: Tensor, rows: int = 1) -> SinkCache:
    """A stream that has read these ids in one pass; in each of so many rows."""
    cache = SinkCache.for_model(model, sinks=SINKS, window=WINDOW)
    with torch.inference_mode():
        model(input_ids=ids.to(model.device).expand(rows, -1), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("at_once", [1, 7, 90])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi", "gpt_neox"])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_a_full_stream_moved_on_by_ten_million_goes_on_the_same(
    name: str, dtype: torch.dtype, share: float, at_once: int
) -> None:
    """Through the window and beyond it, in single tokens and in chunks."""
    model, ids = attach(build(name, layers=2, dtype=dtype)), tokens(ALL)
    cache = filled(model, ids[:, :READ])
    stays, moves = moved_on(cache, 0, dtype), moved_on(cache, FAR, dtype)
    assert moves.seen == [FAR + READ] and moves.visible()[-1] == FAR + READ - 1
    expected, found = (continued(model, each, ids[:, READ:], at_once) for each in (stays, moves))
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_so_does_a_captured_stream(name: str) -> None:
    """float32: 1e-4 of the scale. bfloat16: no further apart than the same stream in batches of two sizes."""
    wide = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    exact = hasten(attach(build(name, layers=2, dtype=torch.float32, **wide).cuda()))
    ids = tokens(ALL)
    cache = filled(exact, ids[:, :READ])
    on_host = cache.twin()
    on_host.adopt({each: part.cpu() for each, part in cache.dump().items()})

    def both(model: Any, dtype: torch.dtype) -> list[Tensor]:
        found = []
        for by in (0, FAR):
            given = SinkCache.for_model(model, sinks=SINKS, window=WINDOW)
            given.adopt({each: part.cuda() for each, part in moved_on(on_host, by, dtype).dump().items()})
            found.append(continued(model, given, ids[:, READ:]))
        return found

    stays, moves = both(exact, torch.float32)
    assert exact.forward.device is not None
    torch.testing.assert_close(moves, stays, rtol=0, atol=1e-4 * float(stays.abs().max()))
    half = hasten(attach(build(name, layers=2, dtype=torch.bfloat16, **wide).cuda()))
    one, other = both(half, torch.bfloat16)
    apart = float((one - other).float().norm() / one.float().norm())
    rows = [filled(half, ids[:, :READ], count) for count in (1, 8)]
    single, among = (
        torch.stack(
            [
                half(input_ids=ids[:, at : at + 1].cuda().expand(count, -1), past_key_values=each).logits[0, -1].float()
                for at in range(READ, ALL)
            ]
        )
        for each, count in zip(rows, (1, 8), strict=True)
    )
    allowed = float((single - among).norm() / single.norm())
    print(f"{name}: moved on {apart:.3e}, batches of 1 and 8 {allowed:.3e}")
    assert apart <= allowed
