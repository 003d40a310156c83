"""Shares and log-odds of attention against the whole matrix, slopes against data whose slope is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sinks.analysis.measures import repetition
from sinks.analysis.measures.repetition import (
    NAMES,
    OPENING,
    TEMPLATES,
    Answers,
    Question,
    ask,
    measure,
    questions,
    slopes,
)
from sinks.analysis.probe import probe
from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.lens import Arrival, Lens, View
from sinks.models.observe import observe
from tests.analysis.explicit import explicit
from tests.families.tiny import build
from tests.reading.tiny import tiny_tokenizer

EXACT = 1e-9
BOS = 1
DOSES = np.array([1, 2, 5])


def words() -> PreTrainedTokenizerFast:
    """One token a word, full stop or line break."""
    text = OPENING + " ".join([*TEMPLATES, *NAMES, *sum(TEMPLATES.values(), []), ". \n"])
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    found = dict.fromkeys(word for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {"<unk>": 0, "<s>": BOS} | {word: index + 2 for index, word in enumerate(found)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def model_of(name: str = "llama", layers: int = 2, **options: int) -> PreTrainedModel:
    return build(name, layers=layers, vocab_size=120, **options)


def asked(kind: int = 0, texts: int = 6, bos: int | None = BOS) -> list[Question]:
    return [pair[kind] for pair in questions(words(), int(DOSES[-1]), texts, bos)]


def context(question: Question, dose: int) -> Tensor:
    return torch.tensor([question.head + sum(question.span[:dose], []) + question.tail])


def test_questions_state_the_fact_and_repeat_another_sentence():
    tokenizer = words()
    said = []
    for repeated, different in questions(tokenizer, 32, 12, BOS, seed=3):
        cue = tokenizer.decode(repeated.tail[-repeated.cue :])
        right, wrong = (tokenizer.decode([token]) for token in (repeated.right, repeated.wrong))
        text = tokenizer.decode(repeated.head + sum(repeated.span, []) + repeated.tail)
        assert right != wrong and repeated.head[0] == BOS
        assert text.count(f"{cue} {right} .") == 1 and text.count(f" {wrong} .") == 32
        assert text.endswith(cue) and text.count(cue) == 2
        assert all(each == repeated.span[0] for each in repeated.span)
        assert len(different.span) == 32 == len({tuple(each) for each in different.span})
        assert different.span[0] == repeated.span[0]
        assert {len(each) for each in different.span} == {len(repeated.span[0])}
        others = tokenizer.decode(sum(different.span[1:], []))
        assert f" {right} " not in others and f" {wrong} " not in others and cue not in others
        assert (different.head, different.tail) == (repeated.head, repeated.tail)
        said.append((cue, text, f"{cue} {right} ." in tokenizer.decode(repeated.head)))
    assert sum(first for *_, first in said) == 6
    assert len({text for _, text, _ in said}) == 12
    assert len({cue.split(" ")[1] for cue, *_ in said}) == len(TEMPLATES)
    assert questions(tokenizer, 2, 3, None)[0][0].head == asked(bos=None)[0].head
    assert BOS not in questions(tokenizer, 2, 3, None)[0][0].head


@pytest.mark.parametrize("name, layers", [("llama", 2), ("qwen3", 2), ("gpt_oss", 2), ("gemma2", 2)])
@pytest.mark.parametrize("kind", [0, 1])
def test_attention_equals_the_whole_matrix(name: str, layers: int, kind: int):
    model, all_asked = model_of(name, layers), asked(kind)
    with observe(model, Lens()):  # or the contexts are read through eager attention, whose softmax is in float32
        found = ask(model, all_asked, DOSES)["kept"]
    for text, question in enumerate(all_asked):
        odds, begin, length = [], len(question.head), len(question.span[0])
        for place, dose in enumerate(DOSES):
            ids = context(question, dose)
            whole = explicit(model, ids)
            end = begin + length * int(dose)
            rows = whole.stacked[:, 0, :, -question.cue :]
            inside = rows[..., begin:end].sum(dim=-1)
            assert found.share[text, place] == pytest.approx(float(inside.mean()), abs=EXACT)
            reach = torch.stack(whole.visible)[:, -1, begin].nonzero()[:, 0]
            odds.append(torch.log(inside / (1 - inside))[reach].mean(dim=(0, 1, 2)))
            with torch.no_grad():
                with observe(model, Lens()):
                    logits = model(ids).logits[0, -1]
                plain = model(ids).logits[0, -1]
            answer = float(logits[question.wrong] - logits[question.right])
            assert found.answer[text, place] == pytest.approx(answer, abs=EXACT)
            answer = float(plain[question.wrong] - plain[question.right])
            assert found.answer[text, place] == pytest.approx(answer, abs=1e-5)
        if len(reach) == layers:  # and where not, the layer counts at no dose: see the next test
            assert found.odds[text] == pytest.approx(torch.stack(odds).numpy(), abs=EXACT)


def test_a_layer_that_does_not_reach_over_the_span_counts_at_no_dose():
    model, all_asked = model_of("gemma2", 2), asked()
    with observe(model, Lens()):
        found = ask(model, all_asked, DOSES)["kept"]
    whole = explicit(model, context(all_asked[0], 5))
    reach = [bool(each[-1, len(all_asked[0].head)]) for each in whole.visible]
    assert sum(reach) == 1
    for text, question in enumerate(all_asked):
        begin = len(question.head)
        for place, dose in enumerate(DOSES):
            rows = explicit(model, context(question, dose)).weights[reach.index(True)][0, :, -question.cue :]
            inside = rows[..., begin : begin + len(question.span[0]) * int(dose)].sum(dim=-1)
            assert found.odds[text, place] == pytest.approx(float(torch.log(inside / (1 - inside)).mean()), abs=EXACT)


def test_a_masked_sink_equals_the_whole_matrix_without_it():
    model, question = model_of(), asked()[0]
    with observe(model, Lens()):
        found = ask(model, [question], DOSES)["masked"]
    for place, dose in enumerate(DOSES):
        met: list[Arrival] = []
        ids = context(question, dose)
        asking = ids.shape[1] - len(question.tail)

        def hide(view: View, scores: Tensor, asking: int = asking) -> Tensor:
            bent = scores.clone()
            bent[:, :, asking:, 0] = -torch.inf
            return bent

        with torch.no_grad(), observe(model, Lens(bend_scores=hide)), probe(model, arrive=met.append):
            logits = model(ids).logits[0, -1]
        inside = []
        for arrival in met:
            key = arrival.key.repeat_interleave(2, dim=1)
            scores = arrival.query @ key.mT / 8**0.5
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            seen[asking:, 0] = False
            weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)[0, :, -question.cue :]
            begin = len(question.head)
            inside.append(weights[..., begin : begin + len(question.span[0]) * int(dose)].sum(dim=-1))
        share = torch.stack(inside)
        assert found.share[0, place] == pytest.approx(float(share.mean()), abs=EXACT)
        assert found.odds[0, place] == pytest.approx(float(torch.log(share / (1 - share)).mean()), abs=EXACT)
        answer = float(logits[question.wrong] - logits[question.right])
        assert found.answer[0, place] == pytest.approx(answer, abs=EXACT)


@pytest.mark.parametrize("kind", ["repeated", "different"])
def test_equal_keys_have_slope_one(kind: str):
    model = model_of(layers=1)
    for parameter in model.model.layers[0].self_attn.q_proj.parameters():
        parameter.data.zero_()
    found = measure(model, words(), bos=BOS, repeats=(1, 2, 4, 8), texts=6)
    for dose in found.doses:
        assert dose.attention_slope.value == pytest.approx(1, abs=EXACT)
        assert dose.attention_slope.high - dose.attention_slope.low < EXACT


def test_slopes_are_least_squares_against_the_log():
    doses = np.array([1, 2, 4, 8])
    assert slopes(2 + np.outer([0.5, -3], np.log(doses)), doses) == pytest.approx([0.5, -3])
    noisy = np.random.default_rng(0).normal(size=(5, 4))
    wanted = [np.polyfit(np.log(doses), row, 1)[0] for row in noisy]
    assert slopes(noisy, doses) == pytest.approx(wanted, abs=EXACT)


def test_doses_of_a_whole_model():
    told: list[int] = []
    done: list[int] = []

    def stage(name: str, work: int):
        told.append(work)
        return done.append

    model = model_of()
    found = measure(model, words(), bos=BOS, repeats=(4, 1, 2), texts=6, seed=2, stage=stage)
    assert sum(done) == sum(told) > 0
    by_name = {(each.kind, each.sink): each for each in found.doses}
    assert len(by_name) == 4
    pairs = questions(words(), 4, 6, BOS, seed=2)
    for index, kind in enumerate(("repeated", "different")):
        wanted = ask(model, [pair[index] for pair in pairs], np.array([1, 2, 4]))["kept"]
        dose = by_name[kind, "kept"]
        assert dose.repeats.tolist() == [1, 2, 4]
        assert dose.attention == pytest.approx(wanted.share.mean(axis=0))
        assert dose.log_odds == pytest.approx(wanted.answer.mean(axis=0))
        assert dose.attention_slope.value == pytest.approx(slopes(wanted.odds, dose.repeats).mean())
        assert dose.answer_slope.value == pytest.approx(slopes(wanted.answer, dose.repeats).mean())
        assert dose.answer_slope.texts == 6
    for sink in ("kept", "masked"):  # one copy is one sentence, repeated or not
        repeated, different = (by_name[kind, sink].attention[0] for kind in ("repeated", "different"))
        assert repeated == pytest.approx(different, abs=EXACT)
    kept, masked = (by_name["repeated", sink].attention for sink in ("kept", "masked"))
    assert np.abs(kept - masked).max() > 1e-4


@pytest.mark.parametrize(
    "attention, answer, words_wanted",
    [
        (0.3, 0.0, ["discounts repeats", "slower", "does not follow"]),
        (1.0, 0.4, ["pure softmax", "slower", "moves towards"]),
        (1.6, -0.4, ["amplifies repeats", "faster", "moves away"]),
    ],
)
def test_the_verdict_is_by_intervals(attention: float, answer: float, words_wanted: list[str]):
    doses = np.array([1, 2, 4, 8])
    jitter = np.linspace(-0.05, 0.05, 9)[:, None]

    def line(slope: float) -> np.ndarray:
        return (slope + jitter) * np.log(doses)

    repeated = Answers(np.full((9, 4), 0.2), line(attention), line(answer) - 1)
    different = Answers(np.full((9, 4), 0.2), line(1.3), line(0.0) - 1)
    answers = {
        (kind, sink): each
        for sink in ("kept", "masked")
        for kind, each in (("repeated", repeated), ("different", different))
    }
    found = {key: repetition._dose(*key, doses, each, 0) for key, each in answers.items()}
    verdict = repetition._verdict(found, answers, doses, 0)
    for word in words_wanted:
        assert word in verdict
    assert "right in 100 and" in verdict


def test_what_cannot_be_asked_is_refused():
    model = model_of()
    with pytest.raises(UnsupportedOption, match="single token|one token each"):
        measure(model, tiny_tokenizer(), bos=None, repeats=(1, 2))
    with pytest.raises(InvalidInput, match="two different counts"):
        measure(model, words(), bos=None, repeats=(4, 4))
    with pytest.raises(InvalidInput, match="and 2 texts"):
        measure(model, words(), bos=None, texts=1)
    with pytest.raises(UnsupportedOption, match="too few for 400"):
        measure(model, words(), bos=None, repeats=(1, 400))
