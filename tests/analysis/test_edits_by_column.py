"""Edits by column, and of ids: the residual stream, the embeddings, and what is read."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sinks.analysis.causes.edits import inserted, moved, null_embeddings, replaced, set_residual, without
from sinks.cache.cache import SinkCache
from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.lens import Lens
from sinks.models.attach import attach
from sinks.models.observe import observe
from tests.analysis.explicit import explicit
from tests.analysis.test_edits import EXACT, KEY, LARGE_EDITS, T, logits_of
from tests.families.tiny import build, tokens


@pytest.mark.parametrize("how", ["set", "add"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_set_residual_sets_these_numbers_and_no_others(depth, how):
    model, ids = build("llama", layers=3), tokens(T, batch=2)
    positions, dims, values = [0, KEY], [1, 5, 7], torch.arange(6.0, dtype=torch.float64).view(2, 3)
    before = explicit(model, ids).hidden
    with set_residual(model, depth, positions, dims, values, how=how):
        after = explicit(model, ids).hidden
        with observe(model, Lens()):
            edited = logits_of(model, ids)
    expected = before[depth].clone()
    for row, position in enumerate(positions):
        for column, dim in enumerate(dims):
            old = expected[:, position, dim] if how == "add" else 0
            expected[:, position, dim] = old + values[row, column]
    assert all(torch.equal(after[index], before[index]) for index in range(depth))
    assert torch.equal(after[depth], expected)
    assert all((after[index] - before[index]).abs().max() > 1e-4 for index in range(depth + 1, len(before)))
    if depth == 0:
        with observe(model, Lens()):
            assert torch.equal(edited, model(inputs_embeds=expected).logits)
    if depth == 3:
        assert (edited - model.lm_head(model.model.norm(expected))).abs().max() < EXACT


def test_null_embeddings_are_zero_vectors():
    model, ids = build("llama", layers=2), tokens(T, batch=2)
    embedded = model.get_input_embeddings()(ids)
    embedded[:, [0, KEY]] = 0
    found = logits_of(model, ids, partial(null_embeddings, positions=[0, KEY]))
    assert torch.equal(found, model(inputs_embeds=embedded).logits)


@pytest.mark.parametrize("edit", [LARGE_EDITS["residual"], LARGE_EDITS["null"]], ids=["residual", "null"])
def test_edits_by_column_refuse_streams_and_pads(edit):
    model, ids = attach(build("llama", layers=2)), tokens(T, batch=2)
    whole = logits_of(model, ids, edit)
    padding = torch.ones_like(ids)
    assert torch.equal(logits_of(model, ids, edit, attention_mask=padding), whole)
    padding[0, 0] = 0
    with pytest.raises(UnsupportedOption, match="padded"):
        logits_of(model, ids, edit, attention_mask=padding)
    cache = SinkCache.for_model(model, sinks=4, window=18)
    first = logits_of(model, ids[:, :12], edit, past_key_values=cache, use_cache=True)
    assert (first - whole[:, :12]).abs().max() < 1e-5
    with pytest.raises(UnsupportedOption, match="whole text"):
        logits_of(model, ids[:, 12:], edit, past_key_values=cache, use_cache=True)


def test_places_that_are_not_there_are_refused():
    model, ids = build("llama", layers=2), tokens(T)
    with pytest.raises(InvalidInput, match="depths 0 to 2"), set_residual(model, 3, [0], [0], 0.0):
        pass
    for edit, said in (
        (partial(set_residual, depth=1, positions=[T], dims=[0], values=0.0), f"positions 0 to {T - 1}"),
        (partial(set_residual, depth=1, positions=[0], dims=[-1], values=0.0), "dim -1"),
        (partial(null_embeddings, positions=[T]), f"positions 0 to {T - 1}"),
    ):
        with pytest.raises(InvalidInput, match=said):
            logits_of(model, ids, edit)


# What is read


def test_edits_of_ids():
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert without(ids, 0).tolist() == [[2, 3, 4, 5], [7, 8, 9, 10]]
    assert without(ids, 2).tolist() == [[1, 2, 4, 5], [6, 7, 9, 10]]
    assert moved(ids, 0, 3).tolist() == [[2, 3, 4, 1, 5], [7, 8, 9, 6, 10]]
    assert moved(ids, 3, 1).tolist() == [[1, 4, 2, 3, 5], [6, 9, 7, 8, 10]]
    assert replaced(ids, range(2), 0).tolist() == [[0, 0, 3, 4, 5], [0, 0, 8, 9, 10]]
    assert replaced(ids, [0, 4], torch.tensor([[11, 12], [13, 14]])).tolist() == [[11, 2, 3, 4, 12], [13, 7, 8, 9, 14]]
    assert inserted(ids, 0, torch.tensor([[0] * 3])).tolist() == [[0] * 3 + row for row in ids.tolist()]
    assert inserted(ids, 1, torch.tensor([[11], [12]])).tolist() == [[1, 11, 2, 3, 4, 5], [6, 12, 7, 8, 9, 10]]
    assert ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
