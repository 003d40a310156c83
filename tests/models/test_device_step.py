"""A decode step as one graph of kernels against the model's own modules over a `SinkCache`."""

import pytest
import torch

from sinks.cache.cache import SinkCache
from sinks.models.attach import attach
from sinks.models.families import describe
from sinks.models.step.device.step import DeviceModel
from sinks.models.step.slots import Seats
from tests.families.tiny import build, tokens
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

pytestmark = needs_triton

WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
STEPS = 40 if HAS_GPU else 11
SINKS, WINDOW = 2, 6


def seats_of(model, count: int, *, start: int = 0) -> Seats:
    """Empty rings for `count` streams."""
    cache = SinkCache.for_model(model, sinks=SINKS, window=WINDOW, start=start)
    plans, base = [ring.plan for ring in cache.rings], model.base_model
    heads, dim = base.config.num_key_value_heads, base.layers[0].self_attn.head_dim
    rotaries = describe(model).rotaries(SINKS + WINDOW)
    made = {kind: rotary for kind, rotary in rotaries.items()}
    kinds = [layer.rotary for layer in describe(model).layers]
    return Seats(
        rings=[
            tuple(torch.zeros(count, heads, p.capacity, dim, dtype=model.dtype, device=DEVICE) for _ in range(2))
            for p in plans
        ],
        sizes=[(plan.sinks, plan.window) for plan in plans],
        rotaries=[None if kind is None else made[kind] for kind in kinds],
        start=start,
    )


def plain(model, ids, *, start: int = 0):
    """Logits behind every token, by the model's own modules."""
    cache, made = SinkCache.for_model(model, sinks=SINKS, window=WINDOW, start=start), []
    with torch.inference_mode():
        for at in range(ids.shape[1]):
            given = ids[:, at : at + 1].to(DEVICE)
            made.append(model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(made, dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_models_own(name: str):
    """float32, filling and long past eviction; two streams in seats 2 and 0, one of them at a time now and then."""
    model = attach(build(name, layers=2, dtype=torch.float32, **WIDE).to(DEVICE))
    ids = tokens(STEPS, batch=2)
    expected = plain(model, ids)
    step = DeviceModel(model).step(seats := seats_of(model, 3))
    scale = expected.abs().max()
    for at in range(STEPS):
        if at % 4 == 3:
            both = [step([int(ids[row, at])], [2 - 2 * row], [at]).clone() for row in (1, 0)]
            made = torch.cat(both[::-1])
        else:
            made = step(ids[:, at].tolist(), [2, 0], [at, at])
        torch.testing.assert_close(made, expected[:, at], rtol=0, atol=float(3e-6 * scale))
    assert seats.rings[0][0][1].abs().max() == 0, "nobody sits there"
