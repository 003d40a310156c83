"""Interventions: every number equals one computed here from whole logits in float64, edit by edit."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from sinks.analysis.causes.edits import bias_scores, null_embeddings, scale_attention, set_residual
from sinks.analysis.causes.interventions import EPSILON, HeadEffects, Settings, _compared, _read, head_effects, measure
from sinks.analysis.causes.trials import Bench, Spot, known, others
from sinks.errors import InvalidInput, TextTooShort, UnsupportedOption
from sinks.kernels.lens import Lens
from sinks.models.observe import observe
from tests.analysis.explicit import explicit
from tests.families.cases import VOCABULARY
from tests.families.tiny import build, tokens

T = 32
TEXTS = 6
EXACT = 1e-9
BREAK = 5


@pytest.fixture(scope="module")
def model():
    return build("llama", layers=3, max_position_embeddings=64)


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{index}": index for index in range(VOCABULARY)} | {"\n": BREAK}
    del words[f"w{BREAK}"]
    inner = Tokenizer(models.WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w0", unk_token="w1")


@pytest.fixture(scope="module")
def ids():
    return tokens(T, batch=TEXTS)


@pytest.fixture(scope="module")
def without_bos(model, tokenizer, ids):
    return measure(model, tokenizer, ids, Settings(heads=False, batch=2))


def log_probabilities(model, ids: Tensor, edit=None) -> Tensor:
    with torch.no_grad(), observe(model, Lens()), edit(model) if edit else nullcontext():
        return model(ids).logits.log_softmax(dim=-1)


def effect(found, name: str):
    (one,) = [effect for effect in found.effects if effect.name == name]
    return one


def check(one, before: Tensor, after: Tensor, targets: Tensor) -> None:
    """`before`, `after`: `[texts, predictions, vocab]` of predictions that are counted."""
    nll_before, nll = (-each.gather(2, targets[..., None])[..., 0] for each in (before, after))
    assert one.loss.value == pytest.approx(float((nll - nll_before).mean()), abs=EXACT)
    assert np.log(one.ratio.value) == pytest.approx(one.loss.value, abs=EXACT)
    assert np.log(one.perplexity.value) == pytest.approx(float(nll.mean()), abs=EXACT)
    divergence = (before.exp() * (before - after)).sum(dim=-1)
    assert one.kl.value == pytest.approx(float(divergence.mean()), abs=EXACT)
    same = (before.argmax(dim=-1) == after.argmax(dim=-1)).double()
    assert one.agreement.value == pytest.approx(float(same.mean()), abs=EXACT)
    by_text = (nll - nll_before).mean(dim=1)
    assert by_text.min() - EXACT <= one.loss.low <= one.loss.high <= by_text.max() + EXACT


def rates(weights: list[Tensor], keys: tuple[int, int]) -> list[float]:
    found = []
    for key in keys:
        passed = [layer[:, :, key:, key].mean(dim=-1) > EPSILON for layer in weights]
        found.append(float(torch.stack(passed).double().mean()))
    return found


def edits_of_the_model(found) -> dict[str, tuple[object, list[int]]]:
    spot = found.spot
    at = partial(set_residual, depth=spot.depth, positions=[0], dims=spot.dims)
    zeroed = next(effect.name for effect in found.effects)
    return {
        zeroed: (partial(at, values=0.0), [0]),
        "attention on key 0 removed, the rest renormalised": (partial(scale_attention, factor=0.0, keys=[0]), [0]),
        "attention on key 0 removed, the rest as it is": (
            partial(scale_attention, factor=0.0, keys=[0], renormalise=False),
            [0],
        ),
        "bias -2 on the scores of key 0": (partial(bias_scores, bias=-2.0, keys=[0]), [0]),
        "token 0 embedded as zeros": (partial(null_embeddings, positions=[0]), [0]),
    }


def test_effects_of_edits_equal_whole_logits(model, ids, without_bos):
    tested = ids[TEXTS // 2 :]
    before = log_probabilities(model, tested)
    for name, (edit, spared) in edits_of_the_model(without_bos).items():
        one = effect(without_bos, name)
        counted = [column for column in range(T - 1) if column not in spared]
        after = log_probabilities(model, tested, edit)
        check(one, before[:, counted], after[:, counted], tested[:, 1:][:, counted])
        assert one.kl.value > 1e-6


def test_sink_rates_are_those_of_the_edited_attention(model, ids, without_bos):
    tested = ids[TEXTS // 2 :]
    base = explicit(model, tested).weights
    assert [without_bos.sink_rate, without_bos.next_rate] == pytest.approx(rates(base, (0, 1)), abs=EXACT)
    assert without_bos.sink_rate > 0
    with bias_scores(model, -2.0, [0]):
        weights = explicit(model, tested).weights
    for layer in weights:  # the bias, by hand
        layer[..., 0] *= np.exp(-2.0)
        layer /= layer.sum(dim=-1, keepdim=True)
    one = effect(without_bos, "bias -2 on the scores of key 0")
    assert [one.sink_rate, one.next_rate] == pytest.approx(rates(weights, (0, 1)), abs=EXACT)
    one = effect(without_bos, "token 0 moved to 10")
    again = torch.cat((tested[:, 1:11], tested[:, :1], tested[:, 11:]), dim=1)
    expected = rates(explicit(model, again).weights, (0, 10))
    assert [one.sink_rate, one.next_rate] == pytest.approx(expected, abs=EXACT)


def test_importance_is_over_the_queries_from_the_key_on(model, tokenizer, ids):
    means = known(model, ids, 0, 4)
    late = replace(Bench(model, tokenizer, ids, means, means.spot(0), 0, None).base(), watch=(T - 2, T - 1))
    with torch.no_grad():
        found = _read(model, late, torch.arange(TEXTS))[1]
    expected = rates(explicit(model, ids).weights, late.watch)
    assert [found["sink"].mean(), found["next"].mean()] == pytest.approx(expected, abs=EXACT)
    assert max(expected) > 0  # which they would not be, shared among all queries


def test_effects_of_other_texts_compare_the_same_predictions(model, tokenizer, ids, without_bos):
    tested = ids[TEXTS // 2 :]
    before = log_probabilities(model, tested)
    # Dropped: token j is at j - 1, and predicts the same from the second token on.
    after = log_probabilities(model, tested[:, 1:])
    check(effect(without_bos, "token 0 dropped"), before[:, 1:-1], after[:, :-1], tested[:, 2:])
    # Moved to 10: 1..10 stand one earlier, and token 10 is no longer before 11.
    again = torch.cat((tested[:, 1:11], tested[:, :1], tested[:, 11:]), dim=1)
    after = log_probabilities(model, again)
    pairs = [(j, j - 1) for j in range(1, 10)] + [(j, j) for j in range(11, T - 1)]
    earlier, columns = (list(side) for side in zip(*pairs, strict=True))
    targets = tested[:, [column + 1 for column in earlier]]
    check(effect(without_bos, "token 0 moved to 10"), before[:, earlier], after[:, columns], targets)
    # Replaced: neither from nor to a new token.
    again = tested.clone()
    again[:, T // 2 : T // 2 + 4] = BREAK
    after = log_probabilities(model, again)
    counted = [j for j in range(T - 1) if not {j, j + 1} & set(range(T // 2, T // 2 + 4))]
    one = effect(without_bos, "4 middle tokens replaced by line breaks")
    check(one, before[:, counted], after[:, counted], tested[:, 1:][:, counted])


def test_with_bos(model, tokenizer, ids):
    bos = 0
    found = measure(model, tokenizer, ids, Settings(bos=bos, heads=False))
    tested = torch.cat((torch.full((TEXTS // 2, 1), bos), ids[TEXTS // 2 :, :-1]), dim=1)
    before = log_probabilities(model, tested)
    often = torch.cat((torch.full((TEXTS // 2, 3), bos), tested), dim=1)
    after = log_probabilities(model, often)
    # The BOS that has a place in both is the first; the last one, three places later, is new.
    check(effect(found, "BOS said 4 times"), before[:, 1:-1], after[:, 4:-1], tested[:, 2:])
    (mean,) = [effect for effect in found.effects if "no change by construction" in effect.name]
    assert mean.kl.value < 1e-12
    assert found.base.value == pytest.approx(float((-before[:, :-1].gather(2, tested[:, 1:, None])).mean().exp()))
    assert "BOS dropped" in found.verdict


def test_every_edit_has_its_control(without_bos):
    names = [effect.name for effect in without_bos.effects]
    assert len(names) == len(set(names))
    controls = [effect.control_of for effect in without_bos.effects if effect.control_of]
    assert set(controls) <= {effect.name for effect in without_bos.effects if not effect.control_of}
    groups = {"massive activation", "sink attention", "sink logits", "added keys", "first tokens"}
    assert {effect.group for effect in without_bos.effects} == groups
    for name in edits_of_the_model(without_bos):
        assert name in controls


def test_a_model_with_sink_logits_is_tried_without_them(tokenizer, ids):
    model = build("gpt_oss", layers=2, max_position_embeddings=64)
    found = measure(model, tokenizer, ids, Settings(heads=False))
    less, none = (effect(found, f"learned sink logits {how}").kl.value for how in ("less 2", "taken away"))
    assert none > less > 1e-6


def test_the_massive_activation_is_found_where_it_is_born(model, tokenizer, ids):
    with set_residual(model, 2, [0], [3, 9], torch.tensor([4000.0, -3000.0]), how="add"):
        found = measure(model, tokenizer, ids, Settings(heads=False))
        means = known(model, ids[:3], 0, batch=2)
        states = explicit(model, ids[:3]).hidden
    assert found.spot == Spot(2, 0, (3, 9))
    zeroed = found.effects[0]
    assert zeroed.name == "dims 3, 9 of token 0 after block 1 set to 0"
    assert all(zeroed.kl.value > effect.kl.value for effect in found.effects if effect.control_of == zeroed.name)
    for depth, state in enumerate(states):
        assert (means.start[depth] - state[:, 0].mean(dim=0)).abs().max() < EXACT
        assert (means.size[depth] - state[:, 0].abs().mean(dim=0)).abs().max() < EXACT
        assert (means.rest[depth] - state[:, 1:].mean(dim=(0, 1))).abs().max() < EXACT


def test_means_are_over_the_other_half_of_the_texts(model, tokenizer, ids):
    found = measure(model, tokenizer, ids, Settings(heads=False))
    swapped = measure(model, tokenizer, ids.roll(TEXTS // 2, dims=0), replace(Settings(heads=False), spot=found.spot))
    assert swapped.base != found.base
    one = effect(found, "the same set to their mean over other texts")
    state = explicit(model, ids[: TEXTS // 2]).hidden[found.spot.depth][:, 0, list(found.spot.dims)].mean(dim=0)
    tested = ids[TEXTS // 2 :]
    edit = partial(set_residual, depth=found.spot.depth, positions=[0], dims=found.spot.dims, values=state)
    before, after = log_probabilities(model, tested), log_probabilities(model, tested, edit)
    check(one, before[:, 1:-1], after[:, 1:-1], tested[:, 2:])


def test_heads_one_by_one_equal_the_edit_of_one_head(model, ids):
    few = ids[:2]
    found = head_effects(model, few, seed=4)
    layers, heads = found.removed.shape
    keys = others(0, T, 2 * layers * heads, torch.Generator().manual_seed(4)).view(2, layers, heads)
    assert int(keys.min()) >= 2 and int(keys.max()) < 2 + T // 8 and len(keys.unique()) > 1
    before = log_probabilities(model, few)[:, :-1].gather(2, few[:, 1:, None])[..., 0]
    for layer in range(layers):
        for head in range(heads):
            removed, ordinary = [], []
            for text in range(2):
                for key, losses in ((0, removed), (int(keys[text, layer, head]), ordinary)):
                    edit = partial(scale_attention, factor=0.0, keys=[key], layers=[layer], heads=[head])
                    after = log_probabilities(model, few[text : text + 1], edit)[0, :-1]
                    change = before[text] - after.gather(1, few[text, 1:, None])[:, 0]
                    losses.append(float(np.delete(change.numpy(), key).mean()))
            assert found.removed[layer, head] == pytest.approx(np.mean(removed), abs=EXACT)
            assert found.control[layer, head] == pytest.approx(np.mean(ordinary), abs=EXACT)
            assert found.low[layer, head] == pytest.approx(min(removed), abs=EXACT)  # of two texts, the ends
            assert found.high[layer, head] == pytest.approx(max(removed), abs=EXACT)
    assert np.abs(found.removed).min() > 1e-6


def test_rows_are_split_where_logits_are_large(model, ids, monkeypatch):
    whole = head_effects(model, ids[:1])
    monkeypatch.setattr("sinks.analysis.causes.interventions.ELEMENTS", 3 * T * VOCABULARY)
    split = head_effects(model, ids[:1])
    assert np.abs(whole.removed - split.removed).max() < EXACT
    assert np.abs(whole.control - split.control).max() < EXACT


def test_a_head_matters_if_it_does_more_than_any_control():
    low, control = np.array([[0.03, 0.05, np.nan]]), np.array([[0.01, -0.04, np.nan]])
    found = HeadEffects(4, 64, low + 1, control, low, low + 2)
    assert found.matter.tolist() == [[False, True, False]]


def test_progress_and_heads_in_the_verdict(model, tokenizer, ids):
    work: dict[str, list[int]] = {}

    def stage(name: str, total: int):
        work[name] = [total, 0]

        def listen(done: int) -> None:
            work[name][1] += done

        return listen

    found = measure(model, tokenizer, ids, Settings(head_texts=2, head_tokens=24), stage)
    assert found.heads is not None and (found.heads.texts, found.heads.tokens) == (2, 24)
    assert set(work) == {"interventions", "heads"}
    assert all(total == done for total, done in work.values())
    matter = int(found.heads.matter.sum())
    said = f"the sink of {matter} of {found.heads.matter.size} heads" if matter else "no single head's sink matters"
    assert said in found.verdict


def test_what_cannot_be_measured_is_refused(model, tokenizer, ids):
    config = BertConfig(vocab_size=71, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(UnsupportedOption, match="causal"):
        measure(BertForMaskedLM(config).eval(), tokenizer, ids)
    with pytest.raises(TextTooShort, match="32 tokens"):
        measure(model, tokenizer, ids[:, :31])
    with pytest.raises(TextTooShort, match="4 texts"):
        measure(model, tokenizer, ids[:3])
    with pytest.raises(InvalidInput, match="first quarter"):
        measure(model, tokenizer, ids, Settings(sink=8))


def test_shared_predictions_leave_out_what_was_edited(model, tokenizer, ids):
    means = known(model, ids, 0, 4)
    bench = Bench(model, tokenizer, ids, means, means.spot(0), 0, None)
    base = bench.base()
    columns, earlier = base.shared()
    assert columns.tolist() == earlier.tolist() == list(range(T - 1))
    spared = replace(base, spared=(0, 7)).shared()[0].tolist()
    assert spared == [column for column in range(T - 1) if column not in (0, 7)]
    logits = torch.randn(TEXTS, T, VOCABULARY, dtype=torch.float64)
    same = _compared(base, ids, logits, logits.log_softmax(dim=-1))
    assert same["kl"].tolist() == same["loss"].tolist() == [0.0] * TEXTS and (same["agreement"] == 1).all()
