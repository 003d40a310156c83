"""Massive activations against the residual stream, keys and values written out whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from sinks.analysis.measures import massive
from sinks.analysis.measures.massive import lives, measure, medians
from sinks.analysis.probe import Residual
from sinks.errors import InvalidInput, UnsupportedModel, UnsupportedOption
from sinks.models.attach import attach
from tests.analysis.explicit import Explicit, explicit
from tests.families.tiny import build, tokens
from tests.oracle.restream import decoder_layers
from tests.reading.tiny import tiny_tokenizer


def check(found: massive.Massive, whole: Explicit, sink: int) -> None:
    """Every statistic of `found`, a second time and one text at a time."""
    hidden = [depth.numpy() for depth in whole.hidden]
    texts, length, width = hidden[0].shape
    others = [position for position in range(length) if position != sink]
    for depth, states in enumerate(hidden):
        norms = np.sqrt((states**2).sum(-1))
        assert found.first_norm[depth] == pytest.approx(norms[:, sink].mean() / norms[:, others].mean(), rel=1e-9)
        flags, outlying, kurtosis = [], [], np.zeros((texts, length))
        for text in range(texts):
            size = np.abs(states[text])
            assert found.largest[text, depth] == pytest.approx(size.max(), rel=1e-12)
            assert found.median[text, depth] == pytest.approx(np.median(size), rel=1e-12)
            there = size[found.position[text, depth], found.dim[text, depth]]
            assert there == pytest.approx(size.max(), rel=1e-12)
            flags.append(size.max() > 100 and size.max() >= 1000 * np.median(size))
            outlying.append((norms[text] > norms[text].mean() + 3 * norms[text].std()).mean())
            for position, state in enumerate(states[text]):
                kurtosis[text, position] = ((state - state.mean()) ** 4).mean() / state.var() ** 2
        most = width - 2 + 1 / (width - 1)
        assert found.flagged[depth] == np.mean(flags)
        assert found.outliers[depth] == pytest.approx(np.mean(outlying), abs=1e-12)
        assert found.kurtosis_first[depth] == pytest.approx(kurtosis[:, sink].mean() / most, rel=1e-9)
        assert found.kurtosis_rest[depth] == pytest.approx(kurtosis[:, others].mean() / most, rel=1e-9)
    for ratio, layers in ((found.value_ratio, whole.value), (found.key_ratio, whole.key)):
        norms = np.stack([layer.norm(dim=-1).numpy() for layer in layers])  # layers texts kv_heads tokens
        expected = norms[..., sink].mean(axis=1) / norms[..., others].mean(axis=(1, 3))
        np.testing.assert_allclose(ratio, expected, rtol=1e-9)


@contextmanager
def planted(model: PreTrainedModel, numbers: dict[int, float], position: int = 0, dim: int = 5) -> Iterator[None]:
    """Block b puts out `numbers[b]` at one place of the residual stream."""

    def plant(value: float) -> Any:
        def replace(_: Any, __: Any, output: Any) -> Any:
            hidden = (output if isinstance(output, Tensor) else output[0]).clone()
            hidden[:, position, dim] = value
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        return replace

    blocks = decoder_layers(model, model.config.num_hidden_layers)
    handles = [blocks[block].register_forward_hook(plant(value)) for block, value in numbers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("sink", [0, 3])
def test_every_statistic_is_that_of_the_whole_stream(name: str, sink: int) -> None:
    model, ids = build(name, layers=2), tokens(17, batch=5)
    check(measure(model, ids, sink=sink, batch=2), explicit(model, ids), sink)


def test_the_flag_and_an_outlier_are_found_where_they_are() -> None:
    model, ids = build("llama", layers=3), tokens(16, batch=3)
    with planted(model, {1: 1e5}, position=4):
        found = measure(model, ids)
        check(found, explicit(model, ids), 0)
    assert found.flagged.tolist() == [0, 0, 1, 1]  # the next block hands it on
    assert found.outliers[2] == 1 / 16
    assert (found.position[:, 2] == 4).all() and (found.dim[:, 2] == 5).all()


def test_a_small_life_before_a_large_one_is_seen() -> None:
    model, ids = build("llama", layers=7), tokens(16, batch=3)
    with planted(model, {1: 600.0, 2: 600.0, 3: 0.0, 4: 0.0, 5: 3e4, 6: 3e4}):
        found = measure(model, ids)
    assert found.lives == ((2, 4), (6, 8))


def test_many_medians_on_tokens_that_are_all_as_long_are_no_life() -> None:
    model, ids = build("llama", layers=2), tokens(4, batch=3)
    with planted(model, {1: 600.0}, 0), planted(model, {1: 600.0}, 1), planted(model, {1: 600.0}, 2):
        assert measure(model, ids).lives == ()
    with planted(model, {1: 600.0}):
        assert measure(model, ids).lives == ((2, 3),)


def test_lives_are_runs() -> None:
    assert lives(np.array([True, True, False, True])) == ((0, 2), (3, 4))
    assert lives(np.zeros(3, bool)) == ()


def test_peaks_are_what_texts_agree_on() -> None:
    model, ids = build("llama", layers=2), tokens(16, batch=4)
    with planted(model, {1: -700.0}, 2, 5), planted(model, {1: 900.0}, 9, 7):
        hidden = explicit(model, ids).hidden[2].numpy()
        found = measure(model, ids, batch=3, tokenizer=tiny_tokenizer())
    high, low = (peak for peak in found.peaks if peak.depth == 2 and abs(peak.value) > 500)
    assert (high.position, high.dim, high.value, high.share, high.variation) == (9, 7, 900.0, 1.0, 0.0)
    assert (low.position, low.dim, low.value) == (2, 5, -700.0)
    ratios = [700 / np.median(np.abs(text)) for text in hidden]
    assert low.ratio == pytest.approx(np.median(ratios), rel=1e-12)
    assert low.token == ""  # the texts do not agree on one
    assert {peak.depth for peak in found.peaks} == {0, 1, 2}
    assert all(sum(peak.depth == depth for peak in found.peaks) <= massive.LARGEST for depth in range(3))


def test_a_peak_names_the_token_and_varies_over_the_texts_that_have_it() -> None:
    model, ids = build("llama", layers=1), tokens(16, batch=4)
    ids[:3, 0] = 65 - 33  # the letter A in the tokenizer of bytes
    embedding = model.get_input_embeddings().weight
    embedding[ids[0, 0], 3] = 400.0
    found = measure(model, ids, tokenizer=tiny_tokenizer())
    peak = next(peak for peak in found.peaks if peak.depth == 1)
    state = explicit(model, ids).hidden[1][:3, 0, 3].numpy()
    assert (peak.position, peak.dim, peak.token, peak.share) == (0, 3, "A", 0.75)
    assert peak.value == pytest.approx(state.mean(), rel=1e-12)
    ids[:3, 1:] = tokens(15, batch=3, seed=5)
    moved = measure(model, ids, sink=1)
    assert not moved.fixed


def test_variation_is_the_coefficient_over_texts() -> None:
    model, ids = build("llama", layers=2), tokens(16, batch=6)
    embedding = model.get_input_embeddings().weight
    embedding[:, 3] += 40
    embedding[ids[:, 7], 3] += torch.arange(1.0, 7.0).double() * 10 + 40
    found = measure(model, ids)
    states = explicit(model, ids).hidden[0][:, :, 3].numpy()
    peaks = [peak for peak in found.peaks if peak.depth == 0 and peak.share == 1]
    assert peaks
    for peak in peaks:
        assert peak.dim == 3
        value = states[:, peak.position]
        assert peak.value == pytest.approx(value.mean(), rel=1e-12)
        assert peak.variation == pytest.approx(value.std() / value.mean(), rel=1e-12)


def test_fixed_is_a_state_that_no_text_changes() -> None:
    model, ids = build("llama", layers=2), tokens(9, batch=5)
    assert not measure(model, ids).fixed
    ids[:, 0] = 7
    assert measure(model, ids, batch=2).fixed
    assert not measure(model, ids, sink=1).fixed


@pytest.mark.parametrize("numbers", [7, 8, 1, 2])
def test_medians_are_exact(numbers: int) -> None:
    magnitude = torch.rand(5, numbers)
    np.testing.assert_array_equal(medians(magnitude), np.median(magnitude.double().numpy(), axis=1))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_models_that_are_not_causal(kind: str) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"vocab_size": 71} if kind == "bert" else {"image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model(kind, **size, **options)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=torch.float64, attn_implementation="eager").eval().requires_grad_(False)
    pixels = torch.randn(3, 3, 16, 16).double()
    inputs = {"input_ids": tokens(17, batch=3)} if kind == "bert" else {"pixel_values": pixels}
    expected = model(**inputs, output_hidden_states=True).hidden_states
    work: list[int] = []
    found = measure(model, inputs, batch=2, stage=lambda name, total: [work.append(-total), work.append][1])
    assert (found.texts, found.tokens) == (3, 17)
    assert sum(work) == 0 and len(work) == 3
    for depth in range(2):  # the last of transformers' own is after a norm
        np.testing.assert_allclose(found.largest[:, depth], expected[depth].abs().amax(dim=(1, 2)), rtol=1e-6)
    assert found.value_ratio.shape == (2, 4) and not found.fixed
    if kind == "bert":
        check(found, explicit(model, inputs["input_ids"], causal=False), 0)


def test_a_model_that_attends_by_itself_is_read_through_a_cache() -> None:
    model, ids = build("bloom", layers=2), tokens(17, batch=3)
    streamed = attach(copy.deepcopy(model))
    found = measure(streamed, ids)
    hidden = model(ids, output_hidden_states=True).hidden_states
    for depth in range(2):
        np.testing.assert_allclose(found.largest[:, depth], hidden[depth].abs().amax(dim=(1, 2)), rtol=1e-6)
    assert not np.isnan(found.value_ratio).any()
    with pytest.raises(UnsupportedModel, match="attach"):
        measure(model, ids)


def test_half_precision_is_measured_in_single() -> None:
    ids = tokens(17, batch=3)
    half, whole = (measure(build("llama", layers=2, dtype=dtype), ids) for dtype in (torch.bfloat16, torch.float64))
    np.testing.assert_allclose(half.largest, whole.largest, rtol=0.05)
    np.testing.assert_allclose(half.kurtosis_rest, whole.kurtosis_rest, rtol=0.05)


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        (tokens(9), {"sink": 9}, "sink=9"),
        (tokens(9), {"sink": -1}, "sink=-1"),
        (tokens(1), {}, "another"),
        (tokens(9), {"batch": 0}, "batch=0"),
        (tokens(9)[:0], {}, "at least one"),
        ({"input_ids": tokens(9), "attention_mask": torch.tensor([[0] + [1] * 8])}, {}, "pads"),
        ({"input_ids": tokens(9), "attention_mask": torch.ones(2, 9)}, {}, "as many"),
    ],
)
def test_what_cannot_be_measured_is_refused(ids: Any, options: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        measure(build("llama", layers=1), ids, **options)


def test_states_that_are_not_finite_are_refused() -> None:
    model = build("llama", layers=2)
    with planted(model, {0: float("inf")}), pytest.raises(UnsupportedOption, match="depth 1"):
        measure(model, tokens(9))


def test_nothing_of_a_text_is_kept_but_its_numbers():
    """A view of one token would keep the whole residual stream of every depth alive."""
    states, hidden = massive.States(0), torch.randn(2, 50, 16)
    states.residual(Residual(0, hidden))
    kept = [part for parts in states._ends.values() for part in parts]
    assert kept and all(part.untyped_storage().nbytes() == part.numel() * 4 for part in kept)
