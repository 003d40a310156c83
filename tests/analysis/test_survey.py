"""The whole survey on tiny models: everything is there, or says why not."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from sinks.analysis import survey
from sinks.analysis.inputs import Condition
from sinks.analysis.survey import PARTS, Survey, SurveySettings, measure, measure_encoder
from sinks.errors import InvalidInput, TextTooShort
from sinks.reading.advice import AdviceSettings
from tests.families.tiny import build
from tests.reading.tiny import tiny_model, tiny_tokenizer

TEXT = " ".join(f"line {index} of {index * 7 % 13} that says {chr(97 + index % 26)}" for index in range(400))
SMALL = SurveySettings(
    texts=4,
    tokens=32,
    long_texts=2,
    long_tokens=64,
    deep_texts=4,
    deep_tokens=96,
    edited_texts=4,
    heads=False,
    stream_tokens=800,
    passages=6,
    questions=4,
    advice=AdviceSettings(24, (0, 1, 4), (16, 24, 32), 300, 32),
)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, list[int]]]:
    return []


@pytest.fixture(scope="module")
def found(told: list[tuple[str, int, list[int]]]) -> Survey:
    def stage(name: str, work: int):
        told.append((name, work, []))
        return told[-1][2].append

    model = tiny_model(dtype=torch.float32)
    return measure(model, tiny_tokenizer(bos=True), {"lines": TEXT}, SMALL, about={"created": "now"}, stage=stage)


def test_every_part_is_there_or_says_why_not(found: Survey):
    missing = {part for part in PARTS if not getattr(found, part)}
    assert missing == set(found.left_out) == {"repetition"}, "single bytes are no words to answer with"
    assert set(found.seconds) == set(PARTS)
    assert found.about["created"] == "now" and found.about["bos"] == 256 and found.about["texts"] == ["lines"]
    assert found.about["settings"]["advice"]["counts"] == (0, 1, 4)
    assert list(found.massive) == ["without BOS", "with BOS"]


def test_every_stage_does_the_work_it_announced(told: list[tuple[str, int, list[int]]], found: Survey):
    assert len(told) >= 10
    assert [(name, work) for name, work, done in told if sum(done) != work] == []


def test_the_same_seed_gives_the_same_survey(found: Survey):
    only = replace(SMALL, parts=("sink_rates", "massive"))
    again = measure(tiny_model(dtype=torch.float32), tiny_tokenizer(bos=True), [TEXT], only)
    assert again.sink_rates is not None and found.sink_rates is not None
    for one, other in zip(again.sink_rates.conditions, found.sink_rates.conditions, strict=True):
        assert one.rate == other.rate and np.array_equal(one.importance, other.importance)
    assert again.left_out["advice"] == "not asked for" and again.advice is None


def test_a_model_that_cannot_stream_is_surveyed_without_its_streams():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=256, n_embd=16, n_layer=2, n_head=2)).eval()
    only = replace(SMALL, parts=("sink_rates", "massive", "entropy", "mixing", "advice"))
    found = measure(model, tiny_tokenizer(), [TEXT], only)
    assert found.sink_rates is not None and found.mixing is not None and found.entropy is not None
    assert [profile.name for profile in found.entropy.profiles] == ["dense attention"]
    assert "learned vectors" in found.left_out["advice"]


def test_a_family_with_attention_of_its_own_is_surveyed():
    only = replace(SMALL, parts=("sink_rates", "massive", "entropy"))
    model = build("bloom", layers=2, vocab_size=300, dtype=torch.float32)
    found = measure(model, tiny_tokenizer(), [TEXT], only)
    assert found.sink_rates is not None and found.entropy is not None and not set(found.left_out) & set(only.parts)


def test_an_encoder_is_surveyed():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<c>", "sep_token": "<e>"})
    model = BertModel(config).eval()
    inputs = survey.encoder_texts(model, tokenizer, [TEXT], SMALL)
    found = measure_encoder(model, inputs, SMALL, tokenizer=tokenizer)
    assert found.sink_rates is not None
    model.config.max_position_embeddings = 20
    assert survey.encoder_texts(model, tokenizer, [TEXT], SMALL)[Condition("natural", "none")].shape == (4, 20)
    assert [one.condition for one in found.sink_rates.conditions] == [
        Condition("natural", "framed"),
        Condition("natural", "none"),
    ]
    assert list(found.massive) == ["natural, framed", "natural"]
    assert set(found.left_out) == set(PARTS) - {"sink_rates", "massive"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ("sinks",)}, "no part is called 'sinks'"),
        ({"parts": ()}, "no part was asked for"),
        ({"texts": 1}, "texts must be at least 2, got 1"),
        ({"tokens": 8}, "tokens must be at least 32"),
        ({"epsilon": 1.0}, "above 0 and below 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, object], message: str):
    with pytest.raises(InvalidInput, match=message):
        SurveySettings(**wrong)


def test_too_little_text():
    with pytest.raises(TextTooShort, match="windows of 32 tokens"):
        measure(tiny_model(), tiny_tokenizer(), ["short"], SMALL)
    with pytest.raises(InvalidInput, match="no text was given"):
        measure(tiny_model(), tiny_tokenizer(), [], SMALL)


def test_quick_is_never_more():
    quick, full = SurveySettings().quick(), SurveySettings()
    numbers = [one.name for one in fields(SurveySettings) if isinstance(getattr(full, one.name), int)]
    assert all(getattr(quick, name) <= getattr(full, name) for name in numbers)
    assert SMALL.quick().texts == SMALL.texts
