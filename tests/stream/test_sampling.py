"""Sampling against the processors of transformers itself, on the same logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.models.step.device.choice.draws import BIASES, HISTORY, Drawing
from sinks.stream.sampling import GREEDY, Choices, Sampler, Sampling, drawn, filtered

VOCABULARY = 40


def sampler(sampling: Sampling, seed: int = 0) -> Sampler:
    return Sampler(sampling, torch.Generator().manual_seed(seed))


def theirs(sampling: Sampling, scores: Tensor, history: list[int]) -> Tensor:
    """What transformers makes of the logits; the presence penalty, which it lacks, written out in its place."""
    seen = history[len(history) - min(len(history), sampling.history) :]
    before, after = LogitsProcessorList(), LogitsProcessorList()
    if sampling.logit_bias:
        before.append(SequenceBiasLogitsProcessor({(t,): float(v) for t, v in sampling.logit_bias.items()}))
    if sampling.repetition_penalty != 1 and seen:
        before.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    scores = before(torch.tensor([seen], dtype=torch.int64), scores[None])
    for token in set(seen):
        scores[0, token] -= sampling.presence_penalty
    if not sampling.greedy:
        if sampling.temperature != 1:
            after.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            after.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            after.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            after.append(MinPLogitsWarper(sampling.min_p))
    return after(torch.tensor([seen]), scores)[0]


SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 17, 400]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.4, -2.0]),
    history=st.sampled_from([0, 1, 5, 64]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-math.inf, -1.5, 3.0]), max_size=4),
)


@settings(max_examples=300)
@given(sampling=SETTINGS, seed=st.integers(0, 99), history=st.lists(st.integers(0, VOCABULARY - 1), max_size=12))
def test_logits_are_those_of_transformers(sampling: Sampling, seed: int, history: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(VOCABULARY, generator=generator)).round(decimals=1)  # rounded, so that some are ties
    untouched = logits.clone()
    ours = sampler(sampling).penalised(logits, history)
    if not sampling.greedy:
        ours = filtered(sampling, ours)
    expected = theirs(sampling, logits.clone(), history)
    assert torch.equal(ours, expected)
    assert torch.equal(logits, untouched)
    if sampling.greedy:
        assert sampler(sampling).choose(logits, history) == int(expected.argmax())
    else:
        torch.manual_seed(seed)
        drawing = int(torch.multinomial(expected.softmax(-1), 1))
        assert sampler(sampling, seed).choose(logits, history) == drawing


def test_the_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-30]).log()
    drawing = sampler(Sampling(temperature=1.0))
    counts = torch.bincount(torch.tensor([drawing.choose(logits) for _ in range(4000)]), minlength=4) / 4000
    seeds, places = torch.full((4000,), 3), torch.arange(4000)
    on_a_gpu = torch.bincount(drawn(logits.expand(4000, 4), seeds, places), minlength=4) / 4000
    # Five standard deviations of a share at 4,000 draws are 0.04.
    for each in (counts, on_a_gpu):
        torch.testing.assert_close(each, logits.exp(), rtol=0, atol=0.04)
        assert each[3] == 0


@settings(max_examples=100)
@given(asked=st.lists(st.tuples(SETTINGS, st.integers(0, 99)), min_size=1, max_size=6))
def test_rows_together_choose_what_each_chooses_alone(asked: list[tuple[Sampling, int]]) -> None:
    logits = 3 * torch.randn(len(asked), VOCABULARY, generator=torch.Generator().manual_seed(1))
    rows = [
        (sampler(sampling, seed), own, [3, seed % 7], 2) for (sampling, seed), own in zip(asked, logits, strict=True)
    ]
    found = Choices(rows)
    for number, (one, own, history, _) in enumerate(rows):
        try:
            told: object = found.of(number)
        except UnsupportedOption as error:
            told = str(error)
        try:
            alone: object = one.choose(own, history)
        except UnsupportedOption as error:
            alone = str(error)
        assert told == alone


def test_rows_that_leave_no_choice_fail_alone() -> None:
    rows = [torch.tensor([1.0, math.nan]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])]
    biased = sampler(Sampling(logit_bias={7: 1.0}))
    found = Choices([(sampler(GREEDY), rows[0], [], 0), (biased, rows[1], [], 0), (sampler(GREEDY), rows[2], [], 0)])
    with pytest.raises(UnsupportedOption, match="no token is left"):
        found.of(0)
    with pytest.raises(InvalidInput, match="names token 7"):
        found.of(1)
    assert found.of(2) == 1


def test_a_token_without_probability_is_never_drawn() -> None:
    scores = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(500, 5)
    assert set(drawn(scores, torch.arange(500), torch.zeros(500, dtype=torch.int64)).tolist()) == {1, 3}


def test_what_a_graph_takes_is_what_its_tables_hold() -> None:
    window, vocabulary = 100, 1000
    for fits in (Sampling(), Sampling(0.7, top_k=5, presence_penalty=1.0, history=100, logit_bias={999: 1.0})):
        assert sampler(fits).fits_graph(window, vocabulary)
    for beyond in (
        Sampling(repetition_penalty=1.1, history=101),
        Sampling(logit_bias={1000: 1.0}),
        Sampling(logit_bias=dict.fromkeys(range(BIASES + 1), 1.0)),
    ):
        assert not sampler(beyond).fits_graph(window, vocabulary)
    assert not sampler(Sampling(repetition_penalty=1.1, history=HISTORY + 1)).fits_graph(10**6, vocabulary)
    own = Sampling(0.7, 5, 0.9, 0.1, 1.2, 0.3, 64, 11, {3: 1.0})
    told = sampler(own, 11).drawing
    assert told == Drawing(0.7, 5, 0.9, 0.1, 1.2, 0.3, 64, 11, {3: 1.0})
    assert sampler(Sampling(top_k=5, top_p=0.9), 4).drawing == Drawing(seed=4), "greedy: filters do nothing"


def test_greedy_takes_the_first_of_equals_and_keeps_double_precision() -> None:
    assert sampler(GREEDY).choose(torch.tensor([0.0, 2.0, 2.0])) == 1
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert sampler(GREEDY).choose(close) == 1
    assert sampler(GREEDY).choose(torch.tensor([1.0, 3.0], dtype=torch.bfloat16)) == 1


def test_a_seed_begins_anew_and_none_goes_on() -> None:
    logits = torch.zeros(1000)
    generator = torch.Generator().manual_seed(5)
    free, seeded = (Sampler(Sampling(temperature=1.0, seed=seed), generator) for seed in (None, 9))
    seeded.begin()
    first = [seeded.choose(logits) for _ in range(4)]
    free.begin()
    others = [free.choose(logits) for _ in range(4)]
    seeded.begin()
    assert [seeded.choose(logits) for _ in range(4)] == first != others


def test_the_history_is_bounded() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert sampler(Sampling(repetition_penalty=10.0, history=2)).choose(logits, [0, 1, 2]) == 0
    assert sampler(Sampling(repetition_penalty=10.0, history=3)).choose(logits, [0, 0, 1]) == 2
    assert Sampling(history=50).lookback == 0 and Sampling(history=50, presence_penalty=1.0).lookback == 50


def test_tokens_beyond_the_output_head_are_no_history() -> None:
    assert sampler(Sampling(repetition_penalty=10.0)).choose(torch.tensor([3.0, 2.0]), [7, 0]) == 1


@pytest.mark.parametrize("logits", [[math.nan, 1.0, 0.0], [1.0, math.inf, 0.0], [-math.inf] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_leave_no_choice_are_refused(logits: list[float], temperature: float) -> None:
    with pytest.raises(UnsupportedOption, match="no token is left"):
        sampler(Sampling(temperature=temperature)).choose(torch.tensor(logits))
    forbidden = Sampling(temperature=temperature, logit_bias=dict.fromkeys(range(3), -math.inf))
    with pytest.raises(UnsupportedOption, match="no token is left"):
        sampler(forbidden).choose(torch.tensor([1.0, 2.0, 3.0]))


def test_a_bias_for_a_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="names token 3, and this model has 3"):
        sampler(Sampling(logit_bias={3: 1.0})).choose(torch.zeros(3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"history": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": {-1: 1.0}},
    ],
)
def test_settings_that_make_no_sense_are_named(wrong: dict) -> None:
    with pytest.raises(InvalidInput, match=f"^{next(iter(wrong))}="):
        Sampling(**wrong)
