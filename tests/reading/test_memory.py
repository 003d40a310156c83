"""What is held, and peaks."""

import time

import pytest
import torch
from transformers import DynamicCache

from sinks.cache.cache import SinkCache
from sinks.reading.memory import HighWaterMeter, Meter, SampledMeter, bytes_held, meter_for, watch
from tests.reading.tiny import stream, tiny_model

MIB = 1 << 20
METERS = [pytest.param(SampledMeter, id="sampled")] + [pytest.param(HighWaterMeter, id="high-water")] * (
    HighWaterMeter.available()
)


@pytest.mark.parametrize("make", METERS)
def test_a_peak_that_is_over_before_the_end_is_found(make: type[HighWaterMeter] | type[SampledMeter]):
    meter = make()
    with watch(meter) as peak:
        kept = torch.ones(64 * MIB, dtype=torch.uint8)
        time.sleep(0.05)  # a sampler needs a moment to see it
        del kept
    assert 60 * MIB < peak.bytes < 90 * MIB


@pytest.mark.parametrize("make", METERS)
def test_an_earlier_peak_does_not_count(make: type[HighWaterMeter] | type[SampledMeter]):
    meter = make()
    torch.ones(256 * MIB, dtype=torch.uint8)
    with watch(meter) as peak:
        torch.ones(16 * MIB, dtype=torch.uint8)
    assert peak.bytes < 40 * MIB


@pytest.mark.parametrize("make", METERS)
def test_a_failure_inside_is_passed_on_and_ends_the_watching(make: type[HighWaterMeter] | type[SampledMeter]):
    meter = make()
    with pytest.raises(KeyboardInterrupt), watch(meter) as peak:
        raise KeyboardInterrupt
    assert peak.bytes >= 0


def test_the_meter_of_a_cpu():
    meter = meter_for(torch.device("cpu"))
    assert isinstance(meter, Meter)
    assert isinstance(meter, HighWaterMeter) == HighWaterMeter.available()


@pytest.mark.gpu
def test_the_meter_of_a_gpu():
    device = torch.device("cuda")
    with watch(meter_for(device)) as peak:
        torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    assert 64 * MIB <= peak.bytes < 66 * MIB


@torch.inference_mode()
def test_bytes_held_grow_with_a_dense_cache_and_not_with_sinks():
    model, ids = tiny_model(), stream()[None]
    per_token = 2 * 2 * 2 * 8 * 8  # keys and values, layers, heads, head_dim, bytes
    dense, sinks = DynamicCache(config=model.config), SinkCache.for_model(model, sinks=2, window=14)
    held = []
    for start in (0, 30, 60):
        for cache in (dense, sinks):
            model(input_ids=ids[:, start : start + 30], past_key_values=cache)
        held.append((bytes_held(dense), bytes_held(sinks)))
    assert [first for first, _ in held] == [30 * per_token, 60 * per_token, 90 * per_token]
    assert {second for _, second in held} == {16 * per_token}
