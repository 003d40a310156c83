"""What a probe sees on a GPU is what it sees on the CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sinks import SinkCache, attach
from sinks.analysis.measures import massive
from sinks.analysis.measures.importance import Importance
from sinks.analysis.measures.sink_rate import collect
from sinks.analysis.probe import probe
from sinks.kernels.lens import Sight
from sinks.models.families import base_of
from tests.families.tiny import build, exactly, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_importance_is_the_same_on_both(name: str):
    model, ids = build(name, layers=2), tokens(200, batch=3)
    with exactly():  # the models' own rotary tables are float32 otherwise, and differ between devices
        expected = collect(model, ids, sink=0)
        found = collect(copy.deepcopy(model).to("cuda"), ids.cuda(), sink=0)
    assert np.abs(found.alpha - expected.alpha).max() < 1e-9
    assert np.abs(found.sink_mass - expected.sink_mass).max() < 1e-9


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_stream_is_seen_the_same_on_both(sinks: int):
    ids, seen = tokens(60, batch=2), []
    for device in ("cpu", "cuda"):
        model = attach(build("llama", layers=2).to(device))
        cache, found = SinkCache.for_model(model, sinks=sinks, window=12), Importance(60)
        with torch.no_grad(), probe(model, see=found.see):
            for part in ids.to(device).split([29, 1, 30], dim=1):
                base_of(model)(part, past_key_values=cache)
        found.close()
        seen.append(found.alpha)
    assert np.abs(seen[0] - seen[1]).max() < 1e-9


def test_massive_activations_are_the_same_on_both():
    model, ids = build("llama", layers=2), tokens(50, batch=2)
    with exactly():
        on_cpu, on_gpu = massive.measure(model, ids), massive.measure(copy.deepcopy(model).to("cuda"), ids.cuda())
    assert np.abs(on_cpu.largest - on_gpu.largest).max() < 1e-9 * on_cpu.largest.max()
    assert (on_cpu.position == on_gpu.position).all() and (on_cpu.dim == on_gpu.dim).all()
    assert np.abs(on_cpu.median - on_gpu.median).max() < 1e-9


def test_half_precision_is_widened_before_the_softmax():
    """Weights of bfloat16 heads sum to one to float32's precision, not to bfloat16's."""
    model, ids = build("llama", layers=2, dtype=torch.bfloat16).to("cuda"), tokens(300, batch=2).cuda()
    worst: list[float] = []

    def see(sight: Sight) -> None:
        assert sight.weights.dtype == torch.float32
        worst.append(float((sight.weights.sum(dim=-1) - 1).abs().max()))

    with torch.no_grad(), probe(model, see=see):
        base_of(model)(ids)
    assert max(worst) < 1e-5
