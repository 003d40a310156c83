"""A `SinkCache` in ordinary transformers code, used well and badly: nothing is quietly wrong."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from sinks.cache.cache import SinkCache
from sinks.errors import (
    BrokenCache,
    InvalidInput,
    SinksError,
    UnsupportedOption,
)
from sinks.models.attach import attach
from tests.families.cases import BOTH_ROUTES
from tests.families.feeding import feed, feed_masked, left_padded, odd_chunks, pair
from tests.families.tiny import build, tokens
from tests.oracle.restream import decoder_layers, restream
from tests.oracle.streaming_llm import stream

# --- a forward that fails half-way
# ------------------------------------------------------------------------------------


class Failure(Exception):
    pass


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon", "gptj", "bloom", "mpt", "deepseek_v3"])
@pytest.mark.parametrize("fed", [0, 5, 20])
def test_a_forward_that_fails_breaks_the_cache_until_reset(
    name: str, fed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair(name, layers=2)
    ids = tokens(30)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30])
    cache = SinkCache.for_model(model, sinks=2, window=9)
    if fed:
        feed(model, cache, ids[:, :fed], [fed])
    last = decoder_layers(model, 2)[1]
    inner = next(child for child_name, child in last.named_children() if child_name in ("mlp", "ffn"))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(inner, "forward", fail)
        with pytest.raises(Failure):
            model(input_ids=ids[:, fed : fed + 3], past_key_values=cache)
    for _ in range(2):
        with pytest.raises(BrokenCache, match="reset"):
            model(input_ids=ids[:, fed : fed + 3], past_key_values=cache)
    # other caches, and the model without a cache, are not concerned
    other = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30])
    assert torch.equal(other, expected)
    model(input_ids=ids[:, :9])
    cache.reset()
    torch.testing.assert_close(feed(model, cache, ids, [13, 17]), expected, rtol=0, atol=1e-9)


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    _, model = pair("llama")
    ids = tokens(30)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30])
    cache = SinkCache.for_model(model, sinks=2, window=9)
    feed(model, cache, ids[:, :20], [20])
    with pytest.raises(UnsupportedOption):
        model(input_ids=ids[:, 20:], past_key_values=cache, output_attentions=True)
    try:
        rest = model(input_ids=ids[:, 20:], past_key_values=cache).logits
    except BrokenCache:
        cache.reset()
        rest = feed(model, cache, ids, [30])[:, 20:]
    torch.testing.assert_close(rest, expected[:, 20:], rtol=0, atol=1e-9)


# --- ordinary uses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "mixtral", "gpt_neox", "deepseek_v3", "falcon", "qwen2_window"]
)
def test_a_model_that_was_loaded_with_sdpa(name: str) -> None:
    """What most users have; every other test attaches to eager models."""
    plain, model = pair(name, attention="sdpa")
    ids = tokens(40)
    expected = restream(plain, ids[0].tolist(), 2, 9)
    got = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [13, 1, 1, 25])[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", BOTH_ROUTES)
def test_memory_is_flat(name: str) -> None:
    """Once full, neither the bytes that are reported nor the storages that are held grow, whatever is fed."""
    _, model = pair(name)
    cache = SinkCache.for_model(model, sinks=2, window=9)
    reported, held = set(), set()
    for length in (50, 1, 7, 100, 1, 300):
        feed(model, cache, tokens(length), [length])
        tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        reported.add(cache.nbytes)
        held.add(sum(storages.values()))
    assert len(reported) == len(held) == 1
    assert reported <= held


@pytest.mark.parametrize("name", ["llama", "bloom", "gptj", "deepseek_v3"])
def test_the_mask_may_be_left_out_after_a_padded_prompt(name: str) -> None:
    """No mask means that nothing new is padding; what was padding before stays so. A mask of the new columns only is
    the same."""
    _, model = pair(name)
    ids = tokens(40)[0]
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids[None], [40])[0]
    padded, mask = left_padded([ids[:10].tolist(), ids[:20].tolist()])
    for options in ({}, {"attention_mask": torch.ones(2, 5, dtype=torch.long)}):
        cache = SinkCache.for_model(model, sinks=2, window=9)
        feed_masked(model, cache, padded, mask, [12, 8])
        new = torch.stack((ids[10:15], ids[20:25]))
        logits = model(input_ids=new, past_key_values=cache, **options).logits
        torch.testing.assert_close(logits, torch.stack((expected[10:15], expected[20:25])), rtol=0, atol=1e-9)
        assert cache.seen == [15, 25]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    _, model = pair("llama")
    ids, mask = left_padded([tokens(10)[0].tolist(), tokens(30)[0].tolist()])
    caches = [SinkCache.for_model(model, sinks=2, window=9) for _ in range(2)]
    expected = feed_masked(model, caches[0], ids, mask, [30])
    got = feed_masked(model, caches[1], ids, mask.to(dtype), [30])
    assert torch.equal(got[mask.bool()], expected[mask.bool()])


def test_a_cache_keeps_no_graph() -> None:
    """With gradients on, a cache that held on to the graph would hold on to every token ever fed."""
    _, model = pair("llama")
    ids = tokens(30)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30])
    model.requires_grad_(True)
    cache = SinkCache.for_model(model, sinks=2, window=9)
    got = feed(model, cache, ids, [10, 10, 10])
    assert got.requires_grad
    torch.testing.assert_close(got.detach(), expected, rtol=0, atol=1e-9)
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    assert tensors
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_cache_can_be_copied(name: str) -> None:
    _, model = pair(name)
    ids = tokens(40)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [40])
    cache = SinkCache.for_model(model, sinks=2, window=9)
    feed(model, cache, ids[:, :20], [20])
    fork = copy.deepcopy(cache)
    feed(model, cache, tokens(33, seed=5), [33])
    torch.testing.assert_close(feed(model, fork, ids[:, 20:], [7, 13]), expected[:, 20:], rtol=0, atol=1e-9)


def test_rows_can_be_selected_and_repeated() -> None:
    _, model = pair("llama")
    rows, mask = left_padded([tokens(9)[0].tolist(), tokens(20, seed=1)[0].tolist()])
    more = tokens(10, seed=2)
    lone = feed(model, SinkCache.for_model(model, sinks=2, window=9), torch.cat((tokens(9), more), 1), [19])[0, 9:]
    cache = SinkCache.for_model(model, sinks=2, window=9)
    feed_masked(model, cache, rows, mask, [20])
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    assert cache.seen == [9, 9, 9]
    for row in feed(model, cache, more.repeat(3, 1), [4, 6]):
        torch.testing.assert_close(row, lone, rtol=0, atol=1e-9)


def test_the_inner_model_and_other_outputs() -> None:
    plain, model = pair("llama")
    ids = tokens(30)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30])
    inner = model.model(input_ids=ids, past_key_values=SinkCache.for_model(model, sinks=2, window=9))
    torch.testing.assert_close(plain.lm_head(inner.last_hidden_state), expected, rtol=0, atol=1e-9)
    output = model(
        input_ids=ids, past_key_values=SinkCache.for_model(model, sinks=2, window=9), output_hidden_states=True
    )
    assert len(output.hidden_states) == 3
    as_tuple = model(input_ids=ids, past_key_values=SinkCache.for_model(model, sinks=2, window=9), return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


def test_threads_share_one_model() -> None:
    plain, model = pair("llama")
    dense = plain(input_ids=tokens(12)).logits
    wrong: list[str] = []

    def work(seed: int) -> None:
        ids = tokens(40, seed=seed)
        expected = stream(plain, ids[0].tolist(), 2, 9)
        for _ in range(3):
            got = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, odd_chunks(40, seed=seed))[0]
            if (got - expected).abs().max() > 1e-9:
                wrong.append(f"stream {seed}")
            if not torch.equal(model(input_ids=tokens(12)).logits, dense):
                wrong.append(f"dense {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- uses that would be quietly wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_changing_the_attention_implementation_afterwards(name: str) -> None:
    """`set_attn_implementation` takes the library's function out of the model: an error, not other logits."""
    _, model = pair(name)
    ids = tokens(30)
    model.set_attn_implementation("eager")
    with pytest.raises(SinksError):
        feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30])


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_mask_that_takes_back_what_was_fed(name: str) -> None:
    """Column 2 was fed as a token and is padding now: refused, for its key cannot be taken out of later keys."""
    _, model = pair(name)
    cache = SinkCache.for_model(model, sinks=2, window=9)
    feed_masked(model, cache, tokens(5), torch.ones(1, 5, dtype=torch.long), [5])
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[0, 2] = 0
    with pytest.raises((UnsupportedOption, InvalidInput)):
        model(input_ids=tokens(5), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("columns", [29, 31])
def test_a_mask_of_another_length(columns: int) -> None:
    _, model = pair("llama")
    cache = SinkCache.for_model(model, sinks=2, window=9)
    feed(model, cache, tokens(20), [20])
    with pytest.raises((UnsupportedOption, InvalidInput)):
        model(input_ids=tokens(10), attention_mask=torch.ones(1, columns, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_attention_dropout_is_applied_or_refused(name: str) -> None:
    model = attach(build(name, layers=2, attention_dropout=0.5)).train()
    ids = tokens(30)
    try:
        first, second = (feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30]) for _ in range(2))
    except UnsupportedOption:
        return
    assert not torch.equal(first, second), "in training mode two passes must differ"


def test_an_attached_model_is_let_go_with_its_last_user():
    model = attach(build("llama", layers=1))
    with torch.no_grad():
        model(tokens(5), past_key_values=SinkCache.for_model(model, sinks=1, window=3))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
