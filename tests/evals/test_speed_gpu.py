"""What `sinks bench gpu` measures by: shapes, ceilings, an open stream; on a GPU, the whole of it in small."""

from __future__ import annotations

import pytest
import torch

from sinks.cache.cache import SinkCache
from sinks.cache.plan import Plan
from sinks.errors import InvalidInput
from sinks.evals.speed.gpu.band import Attended, Text
from sinks.evals.speed.gpu.bench import GpuBench, measure
from sinks.evals.speed.gpu.decode import Decoded, Flatness
from sinks.evals.speed.gpu.ring import OpenStream
from sinks.evals.speed.gpu.shapes import SHAPES, ceiling, ring_bytes, weight_bytes
from sinks.models.attach import attach
from tests.families.tiny import build, tokens
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

PUBLISHED = {"SmolLM2-135M": 134_515_008, "Llama-3.2-1B": 1_235_814_400, "Llama-3-8B": 8_030_261_248}
"""Parameters, as the model cards state them."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_its_model(name: str):
    assert sum(each.numel() for each in SHAPES[name].build("meta").parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("SmolLM2-135M", 1, 14_350),
        ("SmolLM2-135M", 64, 151_000),
        ("Llama-3.2-1B", 1, 1_677),
        ("Llama-3.2-1B", 64, 58_200),
        ("Llama-3-8B", 1, 277),
        ("Llama-3-8B", 64, 11_400),
    ],
)
def test_ceilings_are_those_worked_out_by_hand(name: str, rows: int, expected: float):
    """At 4.2 TB/s and 1,024 keys, from sizes alone; an untied input table is not read."""
    model = SHAPES[name].build("meta")
    read = weight_bytes(model) + ring_bytes(model, Plan(4, 1020), rows)
    assert ceiling(read, rows, 4.2) == pytest.approx(expected, rel=0.005)


def test_bytes_are_those_that_a_cache_holds():
    model = attach(build("qwen2", layers=3, dtype=torch.float32))
    cache = SinkCache.for_model(model, sinks=3, window=9)
    model(input_ids=tokens(4, batch=2), past_key_values=cache)
    model.config.head_dim = cache.rings[0].held[0].shape[-1]
    assert ring_bytes(model, Plan(3, 9), 2) == cache.nbytes
    tied = build("qwen2", tie_word_embeddings=True)
    assert weight_bytes(tied) == sum(each.nbytes for each in tied.parameters())


@needs_triton
def test_an_open_stream_gives_what_a_sink_cache_gives():
    """Past eviction, two rows; float32, so a band of sums in another order."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = attach(build("llama", layers=2, dtype=torch.float32, **sizes)).to(DEVICE)
    plan, ids = Plan(2, 5), tokens(12, batch=2).to(DEVICE)
    cache, stream = SinkCache.for_model(model, sinks=2, window=5), OpenStream(model, plan, 2, position=0)
    with torch.no_grad():
        for column in ids.split(1, dim=1):
            expected = model(input_ids=column, past_key_values=cache, use_cache=True).logits
            found = model(input_ids=column, past_key_values=stream, use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert stream.positions.tolist() == [12, 12]


def test_what_times_come_to():
    decoded = Decoded("m", 64, 1020, "sinks", (2.0, 4.0, 3.0), 64_000.0)
    assert decoded.tokens_per_second == pytest.approx(64 / 0.003)
    assert decoded.share == pytest.approx(1 / 3)
    assert Flatness("m", 1, 1020, (1.0, 2.0, 4.0), (1.1, 2.0, 4.0)).ratio == 1
    text = Text(8, 3, 16)  # 4 sinks are assumed: 8 * 7 - 9 / 2 pairs
    assert Attended(text, "w", 1.0, 7.0).rates == pytest.approx((51.5 * 4 * 16 * 32 / 1e9, 51.5 * 2 * 16 * 32 / 1e9))


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(InvalidInput, match="bench gpu needs a CUDA GPU"):
        measure(GpuBench())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of flash-attn-4 and FlexAttention, about themselves
def test_everybody_takes_part_on_a_gpu():
    text = Text(2_048, 256, 64)
    bench = GpuBench(
        models=("SmolLM2-135M",), rows=(1, 8), plans=(Plan(4, 252),), steps=4, rounds=2, texts=(text,), watched=(text,)
    )
    found = measure(bench)
    shape = [each for each in found.decoded if each.model == "SmolLM2-135M shape"]
    assert not [line for line in found.absent if line.startswith(("sinks", "its modules", "transformers"))]
    names = ("sinks", "sinks, int8", "sinks, int4", "its modules over our rings, one graph")
    writers = {*names, "transformers, one graph", "transformers generate()"}
    assert {(each.rows, each.writer) for each in shape} == {(rows, name) for rows in (1, 8) for name in writers}
    assert all(0 < each.share < 1 for each in shape)
    assert {"FlexAttention", "dense SDPA", "sinks, triton"} <= {each.way for each in found.attended}
    assert {each.rows for each in found.flat if each.model == "SmolLM2-135M shape"} == {1, 8}
    assert all(each.ratio == pytest.approx(1, rel=0.5) for each in found.flat)
    assert len(found.statistics) == 1
