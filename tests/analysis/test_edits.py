"""Edits: what they do equals arithmetic written out in the test, and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from sinks.analysis.causes.edits import (
    add_keys,
    add_sink_logits,
    bias_scores,
    null_embeddings,
    scale_attention,
    scaled,
    set_residual,
    shift_sink_logits,
    sink_logits_of,
    without,
)
from sinks.analysis.probe import probe
from sinks.cache.cache import SinkCache
from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.lens import Lens, Sight
from sinks.models.attach import attach
from sinks.models.observe import blocks_of, observe
from tests.analysis.explicit import explicit
from tests.families.tiny import build, tokens

T = 20
KEY = 3
EXACT = 1e-9
Edit = Callable[..., object]


@torch.no_grad()
def logits_of(model, ids, edit=None, **inputs):
    with edit(model) if edit else nullcontext():
        return model(ids, **inputs).logits


@torch.no_grad()
def seen(model, ids, edit: Edit, *, sinks=None, window=None, chunks=None) -> list[Tensor]:
    """The weights that the layers used under an edit, `[layers][texts, heads, T, T]`, added keys left out."""
    heads, length = model.config.num_attention_heads, ids.shape[1]
    found = [torch.zeros(len(ids), heads, length, length, dtype=torch.float64) for _ in blocks_of(model)]

    def see(sight: Sight) -> None:
        there = sight.view.keys[0] >= 0
        rows, columns = sight.view.queries[0], sight.view.keys[0][there]
        for number, head in enumerate(sight.view.heads):
            block = sight.weights[:, number][..., there]
            found[sight.view.layer][:, head, rows[:, None], columns] = block.double()

    with edit(model), probe(model, see=see):
        if window is None:
            model(ids)
        else:
            cache = SinkCache.for_model(model, sinks=sinks, window=window)
            for part in ids.split(chunks, dim=1):
                model(input_ids=part, past_key_values=cache, use_cache=True)
    return found


def masked(length: int, key: int, number: float = -torch.inf) -> Tensor:
    """A causal mask `[1, 1, T, T]` with a number in one column, but for the query that sees no other key."""
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    mask[max(key, 1) :, key] += number
    return mask[None, None]


SMALL_EDITS = {
    "scaled by 1": partial(scale_attention, factor=1.0, keys=[0, KEY]),
    "scaled by 1, not renormalised": partial(scale_attention, factor=1.0, keys=[0, KEY], renormalise=False),
    "no keys removed": partial(scale_attention, factor=0.0, keys=[]),
    "keys that are not there removed": partial(scale_attention, factor=0.0, keys=[99]),
    "removed in no layer": partial(scale_attention, factor=0.0, keys=[0], layers=[]),
    "removed in no head": partial(scale_attention, factor=0.0, keys=[0], heads=[]),
    "bias 0": partial(bias_scores, bias=0.0, keys=[0]),
    "no dims": partial(set_residual, depth=1, positions=[0], dims=[], values=0.0),
    "no positions": partial(set_residual, depth=0, positions=[], dims=[1], values=0.0),
    "nothing added": partial(set_residual, depth=2, positions=[0, 1], dims=[1, 5], values=0.0, how="add"),
    "nothing nulled": partial(null_embeddings, positions=[]),
    "no keys added": partial(add_keys, keys={}, values={}),
    "a sink logit of nothing": partial(add_sink_logits, logits=-1e4),
}


@pytest.mark.parametrize("edit", SMALL_EDITS.values(), ids=SMALL_EDITS.keys())
def test_an_edit_of_nothing_changes_nothing(edit):
    model, ids = build("llama", layers=2), tokens(T, batch=2)
    with observe(model, Lens()):
        assert (logits_of(model, ids, edit) - logits_of(model, ids)).abs().max() < 1e-12


LARGE_EDITS = {
    "removed": partial(scale_attention, factor=0.0, keys=[0]),
    "halved": partial(scale_attention, factor=0.5, keys=[KEY], renormalise=False),
    "biased": partial(bias_scores, bias=-2.0, keys=[0]),
    "residual": partial(set_residual, depth=1, positions=[0], dims=[1, 2], values=5.0),
    "null": partial(null_embeddings, positions=[0]),
    "sink logits": partial(add_sink_logits, logits=1.0),
    "learned sink logits": partial(shift_sink_logits, shift=-3.0),
}


@pytest.mark.parametrize("edit", LARGE_EDITS.values(), ids=LARGE_EDITS.keys())
def test_an_edit_is_undone_at_the_end_and_after_an_error(edit):
    model, ids = build("gpt_oss", layers=2), tokens(T, batch=2)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    before = logits_of(model, ids)
    assert (logits_of(model, ids, edit) - before).abs().max() > 1e-4
    assert torch.equal(logits_of(model, ids), before)
    with pytest.raises(RuntimeError, match="on purpose"), edit(model):
        raise RuntimeError("on purpose")
    with pytest.raises(IndexError), edit(model):
        model(torch.full_like(ids, 10**6))  # fails inside the pass
    assert torch.equal(logits_of(model, ids), before)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_edits_stack_in_any_order():
    model, ids = build("llama", layers=2), tokens(T, batch=2)
    both = []
    names = ("removed", "residual", "biased")
    for order in (names, names[::-1]):
        with ExitStack() as stack:
            for name in order:
                stack.enter_context(LARGE_EDITS[name](model))
            both.append(logits_of(model, ids))
    assert (both[0] - both[1]).abs().max() < 1e-12
    assert all((logits_of(model, ids, LARGE_EDITS[name]) - both[0]).abs().max() > 1e-4 for name in names[:2])


# Attention


@pytest.mark.parametrize("key", [0, KEY])
@pytest.mark.parametrize("edit", [partial(scale_attention, factor=0.0), partial(bias_scores, bias=-1e4)])
def test_removing_a_key_is_masking_its_column(key, edit):
    model, ids = build("llama", layers=3, attention="sdpa"), tokens(T, batch=2)  # sdpa softmaxes in float64
    expected = logits_of(model, ids, attention_mask=masked(T, key))
    found = logits_of(model, ids, partial(edit, keys=[key]))
    assert (found - expected).abs().max() < EXACT
    assert (found - logits_of(model, ids)).abs().max() > 1e-3


def test_removing_the_first_key_is_dropping_the_first_token():
    """With RoPE alone, the others do not know that it was there."""
    model, ids = build("llama", layers=3), tokens(T, batch=2)
    removed = logits_of(model, ids, partial(scale_attention, factor=0.0, keys=[0]))[:, 1:]
    with observe(model, Lens()):
        dropped = logits_of(model, without(ids, 0))
    # transformers computes angles in float32, and here they are those of other positions.
    assert (removed - dropped).abs().max() < 1e-5


def test_scaling_without_renormalising_is_scaling_the_value():
    model, ids = build("llama", layers=3, attention="sdpa"), tokens(T, batch=2)
    found = logits_of(model, ids, partial(scale_attention, factor=0.3, keys=[KEY], renormalise=False))

    def louder(module, args, output):
        output = output.clone()
        output[:, KEY] *= 0.3
        return output

    handles = [block.self_attn.v_proj.register_forward_hook(louder) for block in blocks_of(model)]
    expected = logits_of(model, ids)
    for handle in handles:
        handle.remove()
    assert (found - expected).abs().max() < EXACT


def test_scaling_and_renormalising_is_a_bias_that_depends_on_the_query():
    """p -> c p with the rest at 1 - c p is the softmax of scores to which log c (1 - p) / (1 - c p) was added."""
    model, ids, factor = build("llama", layers=1, attention="sdpa"), tokens(T, batch=2), 0.4
    share = explicit(model, ids).weights[0][..., KEY]
    mask = masked(T, KEY, 0.0).repeat(2, model.config.num_attention_heads, 1, 1)
    mask[..., KEY] += (factor * (1 - share) / (1 - factor * share)).log()
    expected = logits_of(model, ids, attention_mask=mask)
    found = logits_of(model, ids, partial(scale_attention, factor=factor, keys=[KEY]))
    assert (found - expected).abs().max() < EXACT


def test_a_bias_is_a_number_in_the_mask():
    model, ids = build("llama", layers=3, attention="sdpa"), tokens(T, batch=2)
    expected = logits_of(model, ids, attention_mask=masked(T, 0, -2.0))
    assert (logits_of(model, ids, partial(bias_scores, bias=-2.0, keys=[0])) - expected).abs().max() < EXACT


def test_renormalising_beside_a_sink_of_almost_everything_keeps_its_digits():
    rest = torch.tensor([3e-7, 1e-7, 6e-7], dtype=torch.float64)
    weights = torch.cat((1 - rest.sum()[None], rest)).float().view(1, 1, 1, 4)
    where = torch.tensor([True, False, False, False]).view(1, 1, 1, 4)
    found = scaled(weights, where, 0.0, renormalise=True)[0, 0, 0].double()
    assert found[0] == 0
    assert ((found[1:] - rest / rest.sum()).abs() / (rest / rest.sum())).max() < 1e-6


def edited_by_hand(weights: Tensor, keys: list[int], factor: float, renormalise: bool) -> Tensor:
    """The arithmetic of `scale_attention`, one query after another."""
    out = weights.clone()
    for text, head, query in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape[:3])).tolist():
        row = weights[text, head, query]
        rest = sum(float(weight) for key, weight in enumerate(row) if key not in keys)
        share = sum(float(weight) for key, weight in enumerate(row) if key in keys)
        if renormalise and rest == 0:
            continue
        for key in range(len(row)):
            if key in keys:
                out[text, head, query, key] = factor * row[key]
            elif renormalise:
                out[text, head, query, key] = row[key] / rest * (rest + (1 - factor) * share)
    return out


MODES = {
    "dense": {},
    "window": {"sinks": 0, "window": 7},
    "sinks": {"sinks": 4, "window": 5},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_scaled_weights_equal_arithmetic_in_every_mode(mode, renormalise, name):
    model, ids, keys = attach(build(name, layers=2)), tokens(T, batch=2), [0, 9]
    edit = partial(scale_attention, factor=0.25, keys=keys, renormalise=renormalise)
    chunks = {"chunks": [6, 1, 9, 4]} if mode else {}
    found = seen(model, ids, edit, **mode, **chunks)
    with edit(model):
        unbent = explicit(model, ids, **mode, **chunks).weights  # of the queries and keys that came of the edit
    for layer, weights in enumerate(unbent):
        by_hand = edited_by_hand(weights, keys, 0.25, renormalise)
        assert (found[layer] - by_hand).abs().max() < EXACT
        assert (by_hand - weights).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_bias_reaches_streams_too(mode):
    model, ids = attach(build("llama", layers=2)), tokens(T, batch=2)
    edit = partial(bias_scores, bias=-1.5, keys=[0, 9])
    chunks = {"chunks": [6, 1, 9, 4]} if mode else {}
    found = seen(model, ids, edit, **mode, **chunks)
    with edit(model):
        unbent = explicit(model, ids, **mode, **chunks).weights
    for layer, weights in enumerate(unbent):
        weights = weights.clone()
        weights[..., [0, 9]] *= torch.tensor(-1.5, dtype=torch.float64).exp()
        assert (found[layer] - weights / weights.sum(dim=-1, keepdim=True)).abs().max() < EXACT


def test_some_layers_and_some_heads():
    model, ids = build("llama", layers=2), tokens(T)
    edit = partial(scale_attention, factor=0.0, keys=[0], layers=[1], heads=[0, 3])
    found = seen(model, ids, edit)
    with edit(model):
        unbent = explicit(model, ids).weights
    assert (found[0] - unbent[0]).abs().max() < EXACT
    for head in range(model.config.num_attention_heads):
        row = edited_by_hand(unbent[1], [0], 0.0, True) if head in (0, 3) else unbent[1]
        assert (found[1][:, head] - row[:, head]).abs().max() < EXACT


def test_a_bias_that_is_not_finite_is_refused():
    with pytest.raises(InvalidInput, match="-1e4"), bias_scores(build("llama"), -torch.inf, [0]):
        pass


# Added keys and sink logits


def zeros(model) -> dict[int, Tensor]:
    config = model.config
    shape = (config.num_key_value_heads, 1, config.hidden_size // config.num_attention_heads)
    return {layer: torch.zeros(shape) for layer in range(config.num_hidden_layers)}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_zero_key_with_a_zero_value_is_the_softmax_off_by_one(mode):
    model, ids = attach(build("llama", layers=2)), tokens(T, batch=2)
    edit = partial(add_keys, keys=zeros(model), values=zeros(model))
    chunks = {"chunks": [6, 1, 9, 4]} if mode else {}
    found = seen(model, ids, edit, **mode, **chunks)
    scores: dict[int, list[Tensor]] = {}
    with probe(model, see=lambda sight: scores.setdefault(sight.view.layer, []).append(sight.scores)):
        again = seen(model, ids, edit, **mode, **chunks)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    with edit(model):
        unbent = explicit(model, ids, **mode, **chunks).weights
    for layer, weights in enumerate(unbent):
        # softmax1 = softmax x (1 - 1 / (1 + sum e^s)), and the sum is among the scores that the layer was given.
        total = torch.cat([part[..., :-1].logsumexp(dim=-1) for part in scores[layer]], dim=2).exp()
        assert (found[layer] - weights * (total / (1 + total))[..., None]).abs().max() < EXACT


def with_logits(model, logits) -> None:
    for own, new in zip(sink_logits_of(model), logits, strict=True):
        own.data.copy_(new)


def test_added_sink_logits_are_those_that_gpt_oss_learns():
    model, ids = build("gpt_oss", layers=2), tokens(T, batch=2)
    logits = torch.randn(2, model.config.num_attention_heads, dtype=torch.float64)
    with_logits(model, logits)
    with observe(model, Lens()):
        expected = logits_of(model, ids)
    with_logits(model, torch.full_like(logits, -1e4))  # none
    with observe(model, Lens()):
        assert (logits_of(model, ids) - expected).abs().max() > 1e-3
    found = logits_of(model, ids, partial(add_sink_logits, logits=logits))
    assert (found - expected).abs().max() < EXACT
    with_logits(model, torch.zeros_like(logits))
    with observe(model, Lens()):
        expected = logits_of(model, ids)
    with_logits(model, torch.full_like(logits, -1e4))
    for edit in (partial(add_sink_logits, logits=0.0), partial(add_sink_logits, logits=0 * logits[0])):
        assert (logits_of(model, ids, edit) - expected).abs().max() < EXACT


def test_learned_sink_logits_shift():
    model, ids = build("gpt_oss", layers=2), tokens(T, batch=2)
    by = torch.randn(model.config.num_attention_heads, dtype=torch.float64)
    found = logits_of(model, ids, partial(shift_sink_logits, shift=by))
    with_logits(model, [own + by for own in sink_logits_of(model)])
    assert torch.equal(found, logits_of(model, ids))


def test_what_cannot_be_edited_is_refused():
    model, ids = build("llama", layers=2), tokens(T)
    with pytest.raises(UnsupportedOption, match="add_sink_logits"), shift_sink_logits(model, 1.0):
        pass
    with pytest.raises(InvalidInput, match="give both"), add_keys(model, zeros(model), {}):
        pass
    with pytest.raises(UnsupportedOption, match="beside other"):
        with add_keys(model, zeros(model), zeros(model)), add_sink_logits(model, 0.0):
            model(ids)
