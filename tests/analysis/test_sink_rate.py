"""Sink rates against the whole matrix in float64, and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from sinks import SinkCache, attach
from sinks.analysis.inputs import MOVED_TO, Condition
from sinks.analysis.measures import sink_rate
from sinks.analysis.measures.importance import Importance
from sinks.analysis.measures.sink_rate import SinkRate, binding, by_length, collect, measure
from sinks.analysis.probe import probe
from sinks.models.families import base_of
from sinks.reading.estimate import Estimate
from tests.analysis.explicit import explicit
from tests.families.tiny import build, tokens
from tests.reading.tiny import tiny_tokenizer

EXACT = 1e-9


def expected_alpha(weights: torch.Tensor, visible: torch.Tensor) -> np.ndarray:
    """Mean over the queries that see each key: `[texts, layers, heads, keys]`."""
    seen = visible.sum(dim=-2)[:, None, None, :].clamp(min=1)
    return (weights.sum(dim=-2) / seen).permute(1, 0, 2, 3).numpy()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3", "deepseek_v3"])
def test_importance_equals_the_whole_matrix(name: str):
    model, ids = build(name, layers=3), tokens(23, batch=5)
    whole = explicit(model, ids)
    found = collect(model, ids, sink=3)
    visible = torch.stack(whole.visible).double()
    assert np.abs(found.alpha - expected_alpha(whole.stacked, visible)).max() < EXACT
    floor = (visible / visible.sum(dim=-1, keepdim=True)).sum(dim=-2) / visible.sum(dim=-2)
    assert np.abs(found.floor - floor.numpy()).max() < EXACT
    later = whole.stacked[..., 4:, 3].mean(dim=-1).permute(1, 0, 2).numpy()
    assert np.abs(found.sink_mass - later).max() < EXACT
    four = whole.stacked[..., 4:, :4].sum(dim=-1).mean(dim=-1).permute(1, 0, 2).numpy()
    assert np.abs(found.four_mass - four).max() < EXACT


@pytest.mark.parametrize("sinks", [0, 4])
def test_importance_in_a_stream_equals_the_whole_matrix(sinks: int):
    """A key that has left the window is seen by fewer queries, and its importance is the mean over those."""
    model, ids = attach(build("llama", layers=2)), tokens(40, batch=2)
    whole = explicit(model, ids, sinks=sinks, window=12, chunks=[17, 1, 22])
    found = Importance(40, sink=0)
    cache = SinkCache.for_model(model, sinks=sinks, window=12)
    with torch.no_grad(), probe(model, see=found.see):
        for part in ids.split([17, 1, 22], dim=1):
            base_of(model)(part, past_key_values=cache)
    found.close()
    assert np.abs(found.alpha - expected_alpha(whole.stacked, torch.stack(whole.visible))).max() < EXACT


def test_a_family_with_attention_of_its_own_is_collected_too():
    model, ids = attach(build("bloom", layers=2)), tokens(20, batch=2)
    found = collect(model, ids, sink=0)
    assert np.abs(found.received.sum(axis=-1) - 20).max() < EXACT
    assert np.abs(found.seen - np.arange(20, 0, -1)).max() == 0


def test_every_number_of_a_condition_equals_the_whole_matrix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sink_rate, "BATCH_TOKENS", 60)  # two texts, then one
    model, ids = build("llama", layers=2), tokens(24, batch=3)
    alpha = expected_alpha(explicit(model, ids).stacked, torch.ones(2, 24, 24).tril())
    condition = Condition("natural", "none")
    found = sink_rate.sink_rate(collect(model, ids, 0), condition, epsilon=0.1)
    passes = alpha > 0.1
    assert found.rate.value == pytest.approx(passes[..., 0].mean(), abs=1e-12)
    assert found.rate_at == pytest.approx(passes.mean(axis=(0, 1, 2))[:16], abs=1e-12)
    assert found.heads == pytest.approx(passes[..., 0].mean(axis=0), abs=1e-12)
    assert found.aggregated == pytest.approx((alpha.mean(axis=0)[..., 0] > 0.1).mean())
    assert found.curve[0.2].value == pytest.approx((alpha[..., 0] > 0.2).mean())
    assert found.anywhere.value == pytest.approx(passes[..., :12].any(axis=-1).mean())
    assert found.sinks == tuple(np.flatnonzero(passes.mean(axis=(0, 1, 2))[:12] > 0.25))
    assert found.floor == pytest.approx(sum(1 / count for count in range(1, 25)) / 24), "H_T / T"


def test_one_repeated_token_is_a_perfect_zero():
    """All hidden states are equal, so without positions attention is uniform: alpha_k = (H_T - H_k) / (T - k) exactly.

    Gu et al., section 3.3. (RoPE still tells distances apart.)
    """
    model = build("smollm3_nope", layers=1)
    found = collect(model, torch.full((2, 64), 5), sink=0)
    harmonic = np.cumsum(1 / np.arange(1, 65))
    expected = (harmonic[-1] - np.append(0, harmonic[:-1])) / (64 - np.arange(64))
    assert np.abs(found.alpha - expected).max() < EXACT
    assert np.abs(found.alpha - found.floor[:, None]).max() < EXACT
    assert sink_rate.sink_rate(found, Condition("repeated", "none")).rate.value == 0


def test_each_prefix_is_what_it_would_be_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sink_rate, "LENGTHS", (8, 20, 33, 64))
    model, ids = build("llama", layers=2), tokens(33, batch=3)
    found = by_length(model, ids, Condition("natural", "none"), epsilon=0.15)
    assert list(found.rate) == [8, 20, 33]
    for length in found.rate:
        alone = collect(model, ids[:, :length], 0)
        assert found.rate[length].value == pytest.approx((alone.alpha[..., 0] > 0.15).mean())
        assert found.mass[length].value == pytest.approx(alone.sink_mass.mean(), abs=EXACT)


def test_measure_dresses_and_moves():
    model, tokenizer = build("llama", layers=2, vocab_size=300), tiny_tokenizer(bos=True)
    natural = tokens(32, batch=4)
    told: list[tuple[str, int]] = []
    done: list[int] = []

    def stage(name: str, work: int):
        told.append((name, work))
        return done.append

    found = measure(model, tokenizer, natural, longer=tokens(64, batch=2), epsilon=0.1, stage=stage)
    names = [one.condition.name for one in found.conditions]
    assert names[:3] == ["natural", "natural + BOS", f"natural, BOS at {MOVED_TO}"]
    assert [one.sink for one in found.conditions] == [0, 0, MOVED_TO, 0, 0, 0, 0]
    moved = natural.clone()
    moved[:, MOVED_TO] = 256
    expected = (collect(model, moved, MOVED_TO).alpha[..., MOVED_TO] > 0.1).mean()
    assert found.conditions[2].rate.value == pytest.approx(expected)
    assert [length.condition.bos for length in found.lengths] == ["none", "first"]
    assert sum(done) == sum(work for _, work in told)
    without = measure(model, tiny_tokenizer(), natural)
    assert [one.condition.bos for one in without.conditions] == ["none"] * 3


@pytest.mark.parametrize(
    ("none", "moved", "bound"),
    [(0.7, 0.0, "position"), (0.0, 0.7, "token"), (0.6, 0.5, "both"), (0.02, 0.03, "none")],
)
def test_what_binds_a_sink(none: float, moved: float, bound: str):
    def rate(value: float) -> SinkRate:
        found = object.__new__(SinkRate)
        object.__setattr__(found, "rate", Estimate(value, value - 0.01, value + 0.01, 9))
        return found

    found, told = binding({"none": rate(none), "first": rate(0.5), "moved": rate(moved)})
    assert found == bound
    assert f"{100 * none:.0f} % of heads without BOS, 50 % with it" in told


def test_an_encoder_of_pictures_is_measured_over_all_its_queries():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    pictures = torch.randn(3, 3, 8, 8)
    whole = explicit(model, pictures, causal=False)
    condition = Condition("pictures", "none")
    found = sink_rate.measure_encoder(model, {condition: {"pixel_values": pictures}}, epsilon=0.2).conditions[0]
    assert found.tokens == 5 and found.texts == 3
    assert found.importance == pytest.approx(whole.stacked.mean(dim=-2).mean(dim=1).numpy(), abs=1e-6)
    assert found.floor == pytest.approx(1 / 5)
    assert found.anywhere.value == pytest.approx((whole.stacked.mean(dim=-2) > 0.2).any(dim=-1).double().mean().item())
