"""Several caches of one row in one pass, against each of them alone."""

import pytest
import torch

from sinks.cache.cache import SinkCache
from sinks.cache.group import Group
from sinks.errors import InvalidInput
from sinks.models.attach import attach
from tests.families.tiny import build, tokens

LENGTHS = (1, 4, 11, 12, 13, 40)
"""Before, at and behind sinks + window = 12."""
FAMILIES = ["llama", "gemma2", "gpt_oss", "bloom", "falcon", "gptj", "mpt", "phi"]


def caches_for(model, lengths=LENGTHS):
    """One cache a row, fed so many tokens."""
    caches = [SinkCache.for_model(model, sinks=3, window=9) for _ in lengths]
    for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        model(input_ids=tokens(length, seed=row), past_key_values=cache)
    return caches


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_each_row_is_what_it_is_alone(family):
    """float64: a product with the weights for six rows may sum in another order than for one, and no more."""
    model = attach(build(family, layers=2))
    together, alone = caches_for(model), caches_for(model)
    for step in range(3):
        fed = tokens(1, batch=len(LENGTHS), seed=50 + step)
        told = model(input_ids=fed, past_key_values=Group(together), use_cache=True).logits
        for row, cache in enumerate(alone):
            expected = model(input_ids=fed[row : row + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(told[row : row + 1], expected, rtol=0, atol=1e-9)
            assert together[row].seen == cache.seen


@torch.inference_mode()
def test_idle_rows_change_nobody():
    model = attach(build("llama", layers=2))
    fed = tokens(1, batch=6)
    expected = model(input_ids=fed, past_key_values=Group(caches_for(model)), use_cache=True).logits
    wide = torch.cat((fed, fed[:2]))
    told = model(input_ids=wide, past_key_values=Group(caches_for(model), idle=2), use_cache=True).logits
    torch.testing.assert_close(told[:6], expected, rtol=0, atol=1e-9)


@torch.inference_mode()
def test_a_pass_that_breaks_off_leaves_every_row_as_it_was():
    """The first layer has written its slot when the second one fails: feeding the same token again mends it."""
    model = attach(build("llama", layers=2))
    broken, whole = caches_for(model), caches_for(model)
    fed = tokens(1, batch=len(LENGTHS), seed=9)

    def fail(*_):
        raise RuntimeError("no")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        model(input_ids=fed, past_key_values=Group(broken), use_cache=True)
    handle.remove()
    assert [cache.seen for cache in broken] == [cache.seen for cache in whole]
    for _ in range(2):
        told = model(input_ids=fed, past_key_values=Group(broken), use_cache=True).logits
        expected = model(input_ids=fed, past_key_values=Group(whole), use_cache=True).logits
        assert torch.equal(told, expected)


@torch.inference_mode()
def test_a_row_that_cannot_be_opened_leaves_the_others_as_they_were():
    model = attach(build("llama", layers=2))
    caches, other = caches_for(model), attach(build("llama", layers=1))
    with pytest.raises(Exception, match="another model"):
        model(input_ids=tokens(1, batch=2), past_key_values=Group([caches[0], *caches_for(other, [1])]))
    told = model(input_ids=tokens(1), past_key_values=Group(caches[:1])).logits
    assert torch.equal(told, model(input_ids=tokens(1), past_key_values=Group(caches_for(model)[:1])).logits)


@torch.inference_mode()
def test_what_is_no_group_is_refused():
    model = attach(build("llama", layers=2))
    caches = caches_for(model)
    two = SinkCache.for_model(model, sinks=3, window=9)
    model(input_ids=tokens(3, batch=2), past_key_values=two)
    later = SinkCache.for_model(model, sinks=3, window=9, start=5)
    for wrong in ([], [two], [caches[0], caches[0]], [caches[0], later]):
        with pytest.raises(InvalidInput):
            Group(wrong)
    for shape in ((2, 1), (1, 2)):
        with pytest.raises(InvalidInput, match="one token a row"):
            model(input_ids=tokens(shape[1], batch=shape[0]), past_key_values=Group(caches[:1]))
    model(input_ids=tokens(1), past_key_values=caches[0])
    with pytest.raises(Exception, match="one token a row"):
        caches[0].step_of(0, torch.device("cpu"))
