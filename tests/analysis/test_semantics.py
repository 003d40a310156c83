"""The probe on features whose meaning is known, and what is collected against attention written out whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinks import attach, detach
from sinks.analysis.measures import semantics
from sinks.analysis.measures.semantics import (
    FOLLOWING,
    PROMPT,
    Arrangement,
    Reading,
    credit,
    measure,
    retrieval,
    shuffled_credit,
    standardised,
    variation,
)
from sinks.errors import InvalidInput, TextTooShort
from sinks.reading.estimate import Estimate
from sinks.types import ignore
from tests.analysis.explicit import explicit
from tests.families.tiny import build, tokens
from tests.reading.tiny import BOS, tiny_model, tiny_tokenizer

EXACT = 1e-9
CLASSES, EACH = 4, 25
LABELS, ORDERS = np.repeat(np.arange(CLASSES), EACH), np.tile(np.arange(EACH), CLASSES)


def noise(width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(CLASSES * EACH, width))


def test_classes_that_lie_apart_are_told_and_their_shuffled_labels_are_not():
    centres = np.random.default_rng(1).normal(size=(CLASSES, 60))
    features = 5e3 + noise() + 3 * centres[LABELS]
    assert credit(features, LABELS, ORDERS).mean() == 1
    assert retrieval(features, LABELS, ORDERS).mean() == 1
    assert abs(shuffled_credit(features, LABELS, ORDERS).mean() - 0.25) < 0.06


def test_noise_tells_nothing():
    found = [measured(noise(seed=seed), LABELS, ORDERS).mean() for seed in range(8) for measured in (credit, retrieval)]
    assert abs(np.mean(found) - 0.25) < 0.03


@pytest.mark.parametrize("rounding", [0, 1e-4])
def test_what_is_the_same_for_all_is_at_chance_exactly(rounding: float):
    features = np.full((CLASSES * EACH, 60), 25_000.0) + rounding * np.eye(CLASSES)[LABELS].repeat(15, axis=1)
    assert (credit(features, LABELS, ORDERS) == 1 / CLASSES).all()
    assert retrieval(features, LABELS, ORDERS) == pytest.approx(1 / CLASSES)
    assert variation(features) < 1e-8


def test_neighbours_are_neither_trained_on_nor_found():
    # A passage is like the one before and after it, and says nothing else: a walk that every class makes on its own.
    found = []
    for seed in range(12):
        walk = np.random.default_rng(seed).normal(size=(CLASSES, EACH // 2 + 1, 60)).repeat(2, axis=1)[:, :EACH]
        features = walk.reshape(CLASSES * EACH, 60) + 0.01 * noise()
        found.append([measured(features, LABELS, ORDERS).mean() for measured in (credit, retrieval)])
    assert np.mean(found, axis=0) == pytest.approx(0.25, abs=0.05)


def test_the_probe_is_ridge_regression_on_training_passages_alone():
    features = noise(30) + 0.3 * np.random.default_rng(3).normal(size=(CLASSES, 30))[LABELS]
    right = np.empty(len(LABELS))
    for order in range(EACH):
        train = abs(ORDERS - order) > 1
        mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
        scaled = (features - mean) / deviation / np.sqrt(30)
        targets = np.eye(CLASSES)[LABELS[train]]
        inner = scaled[train].T @ scaled[train] + semantics.RIDGE * np.eye(30)
        weights = np.linalg.inv(inner) @ scaled[train].T @ (targets - targets.mean(axis=0))
        guess = (scaled @ weights + targets.mean(axis=0)).argmax(axis=1)
        right[ORDERS == order] = (guess == LABELS)[ORDERS == order]
    found = credit(features, LABELS, ORDERS)
    assert 0.3 < found.mean() < 0.95
    assert (found == right).all()


def test_standardised_by_training_passages_only():
    features = noise(5)
    train = ORDERS > 2
    features[~train] += 100
    found = standardised(features, train)
    assert found[train].mean(axis=0) == pytest.approx(0, abs=EXACT)
    assert found[train].std(axis=0) == pytest.approx(1, abs=EXACT)
    assert (found[~train] > 50).all()


def test_variation_is_the_spread_around_the_mean():
    assert variation(np.array([[3.0, 4.0 + 1], [3.0, 4.0 - 1]])) == pytest.approx(1 / 5)
    assert variation(np.zeros((4, 3))) == 0


@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_what_is_collected_equals_the_whole_matrix(name: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(semantics, "ROWS", rows)
    model, ids = build(name, layers=4), tokens(26, batch=3)
    found = semantics._read(model, Arrangement("here", ids, {"first": [0], "some": [7, 4, 16]}), ignore)
    whole = explicit(model, ids)
    for source, places in {"first": [0], "some": [7, 4, 16]}.items():
        values, outputs = [], []
        for layer in (1, 2, 3):
            value = whole.value[layer][:, :, places]
            group = whole.weights[layer].shape[1] // value.shape[1]
            given = whole.weights[layer][:, :, -FOLLOWING:, places].mean(dim=2)
            values.append(value.flatten(1))
            outputs.append((given[..., None] * value.repeat_interleave(group, dim=1)).flatten(1))
        wanted = {
            "token": whole.hidden[0][:, places].flatten(1),
            "value": torch.cat(values, dim=1),
            "residual": torch.cat([whole.hidden[depth][:, places].flatten(1) for depth in (1, 2, 3)], dim=1),
            "output": torch.cat(outputs, dim=1),
            "attention": whole.stacked[:, :, :, -FOLLOWING:][..., places].sum(dim=-1).mean(dim=(0, 2, 3)),
        }
        assert found[source].keys() == wanted.keys()
        for carrier, each in wanted.items():
            assert np.abs(found[source][carrier] - each.numpy()).max() < EXACT, carrier


def test_a_null_embedding_is_a_token_of_zeros():
    model, ids = build("llama", layers=4), tokens(20, batch=2)
    ids[ids == 70] = 0
    null, zeroed = ids.clone(), ids.clone()
    null[:, 5:7], zeroed[:, 5:7] = -1, 70
    found = semantics._read(model, Arrangement("null", null, {"sink": [5, 6]}), ignore)["sink"]
    assert (found["token"] == 0).all()
    model.get_input_embeddings().weight.data[70] = 0
    wanted = semantics._read(model, Arrangement("zeroed", zeroed, {"sink": [5, 6]}), ignore)["sink"]
    assert np.abs(wanted["value"]).max() > 0.1
    for carrier, each in wanted.items():
        assert np.abs(found[carrier] - each).max() < EXACT


def passages(classes: int = 4, each: int = 6, length: int = PROMPT + FOLLOWING + 5) -> dict[str, list[str]]:
    """Every class has letters of its own, drawn at random."""
    generator = np.random.default_rng(4)
    alphabets = ["abcdef", "ghijkl", "mnopqr", "stuvwx", "012345"]
    return {
        f"class {index}": ["".join(generator.choice(list(alphabets[index]), length)) for _ in range(each)]
        for index in range(classes)
    }


def test_readings_of_a_whole_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(semantics, "FILLER", 300)
    told: list[int] = []
    done: list[int] = []

    def stage(name: str, work: int):
        told.append(work)
        return done.append

    found = measure(tiny_model(layers=4), tiny_tokenizer(), passages(), bos=BOS, stage=stage)
    assert sum(done) == sum(told) > 0
    by_name = {(each.prefix, each.source, each.carrier, each.where): each for each in found.readings}
    assert len(by_name) == len(found.readings) == (4 + 2 + 4) * 4 + 2
    for carrier in ("token", "value", "residual"):
        fixed = by_name["BOS", "sink", carrier, "prompt"]
        for chance in (fixed.accuracy, fixed.shuffled, fixed.retrieval):
            assert (chance.value, chance.low, chance.high) == pytest.approx((0.25, 0.25, 0.25), abs=EXACT)
        assert fixed.gain.value == pytest.approx(0, abs=EXACT)
    last = by_name["text", "last token", "token", "prompt"]
    behind = by_name["content token behind", "other token", "residual", "prompt"]
    assert last.chance == 0.25 and last.classes == 4 and last.accuracy.texts == 24
    assert behind.accuracy.value > 0.5 > behind.shuffled.value + 0.1
    assert behind.gain.value == pytest.approx(behind.accuracy.value - 0.25)
    assert found.frozen is True
    for source in ("sink", "tokens 1 to 3"):
        assert by_name["BOS", source, "value", "stream"].accuracy == by_name["BOS", source, "value", "prompt"].accuracy
    assert found.verdict.startswith("Yes: " if found.meaningful else "No: ")


def test_a_first_token_that_is_the_texts_own_tells_of_itself_alone():
    model = tiny_model(layers=4)
    detach(model)
    found = measure(model, tiny_tokenizer(), passages(), bos=None)
    assert found.frozen is None and {each.where for each in found.readings} == {"prompt"}
    assert {each.prefix for each in found.readings} == {"text", "null embedding behind", "content token behind"}
    first = {each.carrier: each for each in found.readings if each.prefix == "text" and each.source == "sink"}
    assert 0 < first["value"].attention.value < 1
    uniform = np.mean([1 / (query + 1) for query in range(PROMPT, PROMPT + FOLLOWING)])
    assert first["value"].lift == pytest.approx(first["value"].attention.value / uniform)


def test_uniform_attention_has_a_lift_of_one():
    model = build("llama", layers=4, vocab_size=300)
    for block in model.model.layers:
        for parameter in block.self_attn.q_proj.parameters():
            parameter.data.zero_()
    found = measure(model, tiny_tokenizer(), passages(), bos=BOS)
    assert {round(each.lift, 9) for each in found.readings} == {1.0}
    assert not found.meaningful and "no token that was tried is a sink" in found.verdict


def test_sinks_that_move_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(semantics, "FILLER", 300)
    model, ids = tiny_model(), torch.randint(0, 250, (3, PROMPT + FOLLOWING))
    assert semantics._frozen(model, ids, BOS) is True
    monkeypatch.setattr(semantics, "KEPT", 5)  # the fifth slot belongs to the ring of recent tokens
    made = semantics.SinkCache.for_model
    monkeypatch.setattr(semantics.SinkCache, "for_model", lambda model, sinks, window: made(model, sinks=4, window=60))
    assert semantics._frozen(model, ids, BOS) is False


def test_layers_that_keep_no_sink_have_none_to_freeze():
    model = attach(build("mistral", sliding_window=4, max_position_embeddings=99))
    assert semantics._frozen(model, tokens(PROMPT, batch=2), None) is None


def reading(prefix: str, gain: float, lift: float, source: str = "sink") -> Reading:
    sure = Estimate(float(gain), gain - 0.01, gain + 0.01, 9)
    half = Estimate(0.5, 0.4, 0.6, 9)
    return Reading(source, "value", prefix, "prompt", 4, half, sure, half, half, 0.25, half, float(lift), 0.1)


def test_the_verdict_asks_for_a_real_sink_that_tells_more_than_its_token():
    usual = [
        reading("BOS", 0, 15),
        reading("BOS", 0.02, 0.4, "tokens 1 to 3"),
        reading("content token behind", 0.7, 1, "other token"),
    ]
    meaningful, verdict = semantics._verdict([*usual, reading("BOS behind", 0.7, 1.4)], True)
    assert not meaningful and "by causality" in verdict and "no sink to this model: BOS behind 0.50" in verdict
    meaningful, verdict = semantics._verdict([*usual, reading("BOS behind", 0.7, 14)], None)
    assert meaningful and "+0.70 (+0.69 to +0.71)" in verdict and "later" not in verdict
    assert not semantics._verdict([*usual, reading("BOS behind", 0.005, 14)], None)[0]


def test_too_little_is_refused():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(InvalidInput, match="at least 2 classes"):
        measure(model, tokenizer, passages(classes=1), bos=BOS)
    with pytest.raises(InvalidInput, match="the smallest of 3"):
        measure(model, tokenizer, passages() | {"few": passages()["class 0"][:3]}, bos=BOS)
    with pytest.raises(TextTooShort, match="has 47 tokens, and 48"):
        measure(model, tokenizer, passages(length=47), bos=BOS)
