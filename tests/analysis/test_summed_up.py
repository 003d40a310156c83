"""Collectors that live from summaries against the whole matrix in float64, and when `observe` makes summaries at all.

Without a GPU the kernels run under Triton's interpreter. Every pass, the whole matrix's too, meets the same rounded
queries and keys, so that what is left is the kernels' float32.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sinks.analysis.measures import massive, sink_rate
from sinks.analysis.measures.entropy import ends_of
from sinks.analysis.measures.importance import Importance, Prefixes
from sinks.analysis.measures.rows import Bins, Masses
from sinks.analysis.measures.sink_rate import collect
from sinks.analysis.probe import probe, read
from sinks.errors import InvalidInput
from sinks.kernels.device.forward import Shape
from sinks.kernels.lens import Lens
from sinks.kernels.scoring import Scoring
from sinks.kernels.summary import columns, distances, forward
from sinks.kernels.summary.summary import Summary
from sinks.models import observe
from sinks.models.families import base_of
from sinks.models.observe import how_observed
from tests.analysis.explicit import explicit
from tests.families.tiny import build, tokens
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

WITHIN = 2e-5
"""Float32 sums of 64 products of size one, once in a score and once in a log-sum-exp; entropies multiply by scores."""
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16  # the interpreter has no bfloat16


@pytest.fixture
def summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summaries on the CPU too, interpreted: tiles are small then, so that a short text has many."""
    if not HAS_GPU:
        monkeypatch.setattr(observe, "SUMMARISED_ON", ("cpu",))
        monkeypatch.setattr(forward, "SHAPES", {64: Shape(32, 16, 4, 1)})
        monkeypatch.setattr(columns, "SHAPES", {64: Shape(16, 32, 4, 1)})
        monkeypatch.setattr(distances, "SHAPES", {64: Shape(16, 32, 4, 1)})


def model_of(name: str = "llama", layers: int = 2) -> PreTrainedModel:
    few: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}  # interpreted, every head takes its time
    model = build(name, layers=layers, dtype=DTYPE, head_dim=64, **few)
    return cast(Any, model).to(DEVICE)


def texts(length: int, batch: int = 2) -> Tensor:
    return tokens(length, batch=batch).to(DEVICE)


def no_blocks(sight: Any) -> None:
    raise AssertionError("seen block by block")


def importance(model: PreTrainedModel, ids: Tensor, sink: int, kept: int | None) -> Importance:
    found = Importance(ids.shape[1], sink, kept)
    with probe(model, see=no_blocks, sum_up=found.sum_up):
        read(model, ids)
        found.close()
    return found


LENGTHS = [(5, None), (37, None), (37, 20), (37, 16), (37, 4)] + [(1000, None), (1000, 16)] * HAS_GPU


@needs_triton
@pytest.mark.parametrize(("length", "kept"), LENGTHS)
def test_importance_from_summaries_equals_the_whole_matrix(summed_up: None, length: int, kept: int | None) -> None:
    model, ids = model_of(), texts(length)
    weights = explicit(model, ids).stacked
    found = importance(model, ids, 3, kept)
    few = kept or length
    seen = torch.arange(length, 0, -1)
    alpha = (weights.sum(dim=-2) / seen).permute(1, 0, 2, 3)[..., :few].numpy()
    assert found.alpha.shape == alpha.shape and np.abs(found.alpha - alpha).max() < WITHIN
    floor = (1 / torch.arange(1, length + 1).double()).flip(0).cumsum(0).flip(0) / seen
    assert np.abs(found.floor - floor[:few].numpy()).max() < 1e-12 and (found.seen == seen[:few].numpy()).all()
    later = weights[..., 4:, 3].mean(dim=-1).permute(1, 0, 2).numpy()
    assert np.abs(found.sink_mass - later).max() < WITHIN
    four = weights[..., 4:, :4].sum(dim=-1).mean(dim=-1).permute(1, 0, 2).numpy()
    assert np.abs(found.four_mass - four).max() < WITHIN


@needs_triton
@pytest.mark.parametrize("sink", [(0,), (0, 1, 2, 3), (2, 9), tuple(range(16))])
def test_entropies_from_summaries_equal_those_of_the_whole_matrix(summed_up: None, sink: tuple[int, ...]) -> None:
    model, ids = model_of(), texts(37)
    weights = explicit(model, ids).stacked
    found = Bins(2, ends_of(37), torch.tensor(sink))
    with probe(model, see=no_blocks, sum_up=found.sum_up):
        read(model, ids)
        read(model, ids[:1])  # batches add up
    profile = found.profile("dense")
    rest = weights.clone()
    rest[..., list(sink)] = 0
    left = rest.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(weights).sum(dim=-1)
    outcomes = torch.arange(1, 38).double()
    wanted = {
        "entropy": entropy,
        "normalised": (entropy / outcomes.log()).where(outcomes > 1, torch.nan),
        "without_sink": torch.special.entr(rest / left).sum(dim=-1),
        "sink_mass": weights[..., list(sink)].sum(dim=-1),
    }
    for name, values in wanted.items():
        values = torch.cat((values, values[:, :1]), dim=1)
        begin = 0
        for index, end in enumerate(profile.ends.tolist()):
            expected = values[..., begin:end].movedim(1, -1).flatten(2).nanmean(dim=-1).numpy()
            np.testing.assert_allclose(getattr(profile, name)[..., index], expected, atol=WITHIN * 5, err_msg=name)
            begin = end


@needs_triton
@pytest.mark.parametrize("sink", [(0,), (2, 9)])
def test_where_heads_look_from_summaries_equals_the_whole_matrix(summed_up: None, sink: tuple[int, ...]) -> None:
    model, ids = model_of(), texts(37)
    weights = explicit(model, ids).stacked
    found = Masses(torch.tensor(sink), 7, ((1, 2), (0, 16), (20, 21)))
    with probe(model, see=no_blocks, sum_up=found.sum_up):
        read(model, ids)
    rest = weights.clone()
    rest[..., list(sink)] = 0
    away = torch.arange(37)[:, None] - torch.arange(37)
    wanted = [
        weights[..., list(sink)].sum(dim=-1),
        torch.special.entr(weights).sum(dim=-1) / torch.arange(1, 38).log(),
        (rest * away).sum(dim=-1) / rest.sum(dim=-1),
        *((rest * within).sum(dim=-1) for within in (away == 1, away < 16, away == 20)),
    ]
    for got, values in zip(found.means(2), wanted, strict=True):
        expected = values[..., 7:].mean(dim=(1, 3)).numpy()
        assert np.abs(got - expected).max() < WITHIN * (1 + expected.max())


@needs_triton
def test_prefixes_from_summaries_equal_the_whole_matrix(summed_up: None) -> None:
    model, ids = model_of(), texts(37)
    found = Prefixes((16, 30, 37))
    with probe(model, see=no_blocks, sum_up=found.sum_up):
        read(model, ids)
        found.close()
    on_first = explicit(model, ids).stacked[..., 0].movedim(1, 0).flatten(1, 2).cumsum(dim=-1)
    expected = on_first[..., [0, 15, 29, 36]].numpy()
    assert np.abs(found.sums / expected - 1).max() < WITHIN


@needs_triton
def test_a_layer_with_a_window_of_its_own_is_seen_in_blocks_and_the_others_are_summed_up(summed_up: None) -> None:
    model, ids = model_of("qwen2_window", layers=3), texts(30)
    whole, found, blocks, sums = explicit(model, ids), Importance(30), set[int](), set[int]()
    with (
        probe(model, see=found.see, sum_up=found.sum_up),
        probe(model, see=lambda sight: blocks.add(sight.view.layer), sum_up=lambda summary: sums.add(summary.layer)),
    ):
        read(model, ids)
        found.close()
    kinds = model.config.layer_types
    assert blocks == {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    assert sums == {0, 1, 2} - blocks and sums and blocks
    seen = torch.stack(whole.visible).sum(dim=-2)[:, None, None]
    alpha = (whole.stacked.sum(dim=-2) / seen).permute(1, 0, 2, 3).numpy()
    assert np.abs(found.alpha - alpha).max() < WITHIN


@needs_triton
def test_a_text_that_begins_with_a_summary_and_goes_on_in_blocks(summed_up: None) -> None:
    """Chunks with a cache of transformers: only the first is all there is to see."""
    model, ids = model_of(layers=1), texts(37)
    found, cache = Importance(37, sink=1), DynamicCache(config=model.config)
    with torch.no_grad(), probe(model, see=found.see, sum_up=found.sum_up):
        for part in ids.split([9, 28], dim=1):
            base_of(model)(part, past_key_values=cache, use_cache=True)
        found.close()
    whole = explicit(model, ids).stacked
    alpha = (whole.sum(dim=-2) / torch.arange(37, 0, -1)).permute(1, 0, 2, 3).numpy()
    assert np.abs(found.alpha - alpha).max() < WITHIN
    assert np.abs(found.sink_mass - whole[..., 2:, 1].mean(dim=-1).permute(1, 0, 2).numpy()).max() < WITHIN


@needs_triton
def test_both_ways_give_the_same_figures(summed_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, so that each way meets exactly the same heads."""
    length = 3000 if HAS_GPU else 37
    model, ids = model_of(layers=1), texts(length)
    figures = []
    for kinds in (observe.SUMMARISED_ON, ()):
        monkeypatch.setattr(observe, "SUMMARISED_ON", kinds)
        rates, prefixes = Importance(length, 3), Prefixes((16, length))
        bins, masses = (Bins(1, ends_of(length), torch.tensor([0])), Masses(torch.tensor([0]), 9, ((1, 2), (0, 16))))
        collectors, blocks = (rates, prefixes, bins, masses), list[Any]()
        with ExitStack() as stack:
            for collector in collectors:
                stack.enter_context(probe(model, see=collector.see, sum_up=collector.sum_up))
            stack.enter_context(probe(model, see=blocks.append, sum_up=nothing))
            read(model, ids)
        assert bool(blocks) == (not kinds)
        rates.close()
        prefixes.close()
        profile = bins.profile("dense")
        figures.append([
            rates.alpha, rates.floor, rates.sink_mass, rates.four_mass, prefixes.sums / length, masses.means(1),
            profile.entropy, profile.normalised, profile.without_sink, profile.sink_mass,
        ])  # fmt: skip
    for found, expected in zip(*figures, strict=True):
        np.testing.assert_allclose(found, expected, rtol=WITHIN * 5, atol=WITHIN)


@needs_triton
def test_the_result_is_that_of_the_block_way(summed_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads alone are watched, so each way sees exactly the same: what differs are roundings of one layer's result."""
    model, ids = model_of(layers=1), texts(37)
    found = massive.measure(model, ids)
    monkeypatch.setattr(observe, "SUMMARISED_ON", ())
    expected = massive.measure(model, ids)
    np.testing.assert_allclose(found.value_ratio, expected.value_ratio, rtol=1e-6)
    np.testing.assert_allclose(found.largest, expected.largest, rtol=8 * torch.finfo(DTYPE).eps)
    np.testing.assert_allclose(found.median, expected.median, rtol=8 * torch.finfo(DTYPE).eps)


def heads(length: int = 6, head_dim: int = 64, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [torch.zeros(1, 2, length, head_dim, dtype=dtype, device=DEVICE) for _ in range(3)]


def nothing(_: Any) -> None:
    pass


PLAIN = Scoring(0.125)
TAKES = [Lens(see=nothing, sum_up=nothing), Lens(arrive=nothing)]


@needs_triton
def test_how_a_pass_is_observed_and_why(summed_up: None) -> None:
    way = how_observed(TAKES, *heads(), scoring=PLAIN, causal=True)
    assert way.summarised and "summaries" in way.because


@needs_triton
@pytest.mark.parametrize(("change", "says"), [
    ({"lenses": [*TAKES, Lens(see=nothing)]}, "takes no summaries"),
    ({"lenses": [*TAKES, Lens(bend_weights=lambda view, weights: weights)]}, "bends"),
    ({"lenses": [*TAKES, Lens(add=lambda layer: None)]}, "adds"),
    ({"causal": False}, "not dense and causal"),
    ({"heads": heads(7)[:1] + heads(9)[1:]}, "a past"),
    ({"heads": heads(head_dim=32)}, "64 or 128 dimensions"),
    ({"heads": heads(dtype=torch.float32)}, "bfloat16 or float16"),
    ({"heads": [heads()[0].requires_grad_(), *heads()[1:]]}, "gradients"),
    ({"scoring": Scoring(0.1, softcap=5.0)}, "softcap"),
    ({"scoring": Scoring(0.1, sink_logits=torch.zeros(2))}, "sink logits"),
])  # fmt: skip
def test_why_a_pass_is_observed_in_blocks(summed_up: None, change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"lenses": TAKES, "heads": heads(), "scoring": PLAIN, "causal": True} | change
    way = how_observed(given["lenses"], *given["heads"], scoring=given["scoring"], causal=given["causal"])
    assert not way.summarised and says in way.because


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_on_a_cpu_a_pass_is_observed_in_blocks() -> None:
    way = how_observed(TAKES, *heads(), scoring=PLAIN, causal=True)
    assert not way.summarised and "cpu" in way.because


@needs_triton
def test_pads_are_seen_in_blocks(summed_up: None) -> None:
    model, ids, seen = model_of(layers=1), texts(8), list[Summary]()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad(), probe(model, see=nothing, sum_up=seen.append):
        model(ids, attention_mask=mask)
        assert not seen
        model(ids)
        assert len(seen) == 1


def test_what_cannot_be_had_from_a_summary_is_not_promised() -> None:
    assert Importance(40, sink=16).sum_up is None and Importance(40, sink=15).sum_up is not None
    assert Bins(1, ends_of(40), torch.tensor([0, 16])).sum_up is None
    assert Bins(1, ends_of(40), torch.tensor([0]), (1, 40)).sum_up is None, "a stream"
    with pytest.raises(InvalidInput, match="sink=16"):
        Importance(40, sink=16, kept=16)
    with pytest.raises(InvalidInput, match="give see as well"), probe(model_of(layers=1), sum_up=nothing):
        pass


def test_long_texts_keep_their_first_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama", layers=2), tokens(40, batch=2)
    whole = collect(model, ids, sink=3)
    monkeypatch.setattr(sink_rate, "LONG", 39)
    found = collect(model, ids, sink=3)
    assert found.alpha.shape[-1] == 16 and whole.alpha.shape[-1] == 40
    assert collect(model, ids, sink=3, kept=20).alpha.shape[-1] == 20
    for name in ("alpha", "floor", "received"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name)[..., :16])
    assert (found.sink_mass == whole.sink_mass).all() and (found.four_mass == whole.four_mass).all()
