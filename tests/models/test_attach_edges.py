"""The edges of streaming: each of these was once a change to the code that no other test noticed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.errors import BrokenCache, CacheError, CapacityError, InvalidInput, UnsupportedModel, UnsupportedOption
from sinks.models.alibi import geometric_slopes, mpt_slopes
from sinks.models.attach import attach, detach
from tests.families.cases import TRAINED
from tests.families.feeding import feed, feed_masked, left_padded, pair
from tests.families.tiny import build, tokens
from tests.oracle.restream import restream


def fresh(model: PreTrainedModel) -> SinkCache:
    return SinkCache.for_model(model, sinks=2, window=9)


def test_positions_may_not_jump_between_calls() -> None:
    _, model = pair("llama")
    cache = fresh(model)
    model(input_ids=tokens(5), position_ids=torch.arange(5)[None], past_key_values=cache)
    with pytest.raises(UnsupportedOption, match="position"):
        model(input_ids=tokens(5), position_ids=torch.arange(15, 20)[None], past_key_values=cache)


def test_an_offset_outlives_a_chunk_of_pads() -> None:
    _, model = pair("llama")
    cache = fresh(model)
    at = torch.arange(5).expand(2, -1)
    model(input_ids=tokens(5, batch=2), position_ids=at, past_key_values=cache)
    pads = torch.tensor([[0] * 5, [1] * 5])
    model(input_ids=tokens(5, batch=2), attention_mask=pads, position_ids=at + 5, past_key_values=cache)
    with pytest.raises(UnsupportedOption, match="row 0"):
        model(input_ids=tokens(5, batch=2), position_ids=torch.stack((at[0] + 95, at[1] + 10)), past_key_values=cache)


def test_reset_forgets_the_offset() -> None:
    _, model = pair("llama")
    cache = fresh(model)
    model(input_ids=tokens(5), position_ids=torch.arange(5)[None], past_key_values=cache)
    cache.reset()
    model(input_ids=tokens(5), position_ids=torch.arange(100, 105)[None], past_key_values=cache)
    assert cache.seen == [5]


def test_offsets_move_with_their_rows() -> None:
    _, model = pair("llama")
    cache = fresh(model)
    at = torch.stack((torch.arange(5), torch.arange(100, 105)))
    model(input_ids=tokens(5, batch=2), position_ids=at, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    model(input_ids=tokens(5, batch=2), position_ids=at.flip(0) + 5, past_key_values=cache)


def test_a_gradient_through_a_stream_is_refused() -> None:
    model = attach(build("llama", layers=1)).requires_grad_(True)
    with pytest.raises(UnsupportedOption, match="not differentiable"):
        model(input_ids=tokens(9), labels=tokens(9), past_key_values=fresh(model)).loss.backward()


def test_a_cache_serves_one_pass_at_a_time() -> None:
    _, model = pair("llama")
    cache = fresh(model)
    cache.open_pass(model.model, (1, 3), None, None)
    with pytest.raises(BrokenCache):
        cache.open_pass(model.model, (1, 3), None, None)
    cache.close_pass(complete=True)
    with pytest.raises(BrokenCache):
        cache.open_pass(model.model, (1, 3), None, None)


def test_a_mask_with_four_dimensions_is_called_that() -> None:
    _, model = pair("llama")
    with pytest.raises(UnsupportedOption, match="2-D"):
        model(input_ids=tokens(1), attention_mask=torch.zeros(1, 1, 1, 1), past_key_values=fresh(model))


def test_attention_weights_asked_for_by_the_configuration() -> None:
    _, model = pair("bloom")
    model.config.output_attentions = True
    with pytest.raises(UnsupportedOption, match="output_attentions"):
        model(input_ids=tokens(5), past_key_values=fresh(model))


@pytest.mark.parametrize("option", [{"is_causal": False}, {"cu_seq_lens_q": torch.tensor([0, 5])}, {"frobnicate": 1}])
def test_options_that_nobody_honours(option) -> None:
    _, model = pair("llama")
    with pytest.raises(UnsupportedOption, match=next(iter(option))):
        model(input_ids=tokens(5), past_key_values=fresh(model), **option)


def test_detach_leaves_a_choice_made_since() -> None:
    _, model = pair("llama", attention="sdpa")
    model.set_attn_implementation("eager")
    assert detach(model).config._attn_implementation == "eager"


def test_ids_and_embeddings_at_once() -> None:
    _, model = pair("llama")
    with pytest.raises(InvalidInput, match="either"):
        model.model(input_ids=tokens(5), inputs_embeds=torch.zeros(1, 5, 32).double(), past_key_values=fresh(model))


def test_what_a_cache_says_of_itself() -> None:
    _, model = pair("llama")
    cache = fresh(model)
    assert cache.get_max_length() == -1 and cache.evicted == []
    ids, mask = left_padded([tokens(5)[0].tolist(), tokens(20)[0].tolist()])
    feed_masked(model, cache, ids, mask, [20])
    assert cache.evicted == [0, 9]
    for row in (-1, 2):
        with pytest.raises(InvalidInput, match="rows 0 to 1"):
            cache.visible(row)


def test_dynamic_ntk_reaches_factor_times_the_trained_length() -> None:
    model = attach(build("llama_dynamic"))
    assert SinkCache.for_model(model, sinks=4, window=2 * TRAINED - 4).capacity == 2 * TRAINED
    with pytest.raises(CapacityError):
        SinkCache.for_model(model, sinks=4, window=2 * TRAINED - 3)


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12, 71, 112])
def test_slopes_are_those_of_transformers(heads) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1]
    mpt = build_mpt_alibi_tensor(heads, 4)
    torch.testing.assert_close(geometric_slopes(heads), bloom.double(), rtol=1e-6, atol=0)
    step = (mpt.flatten(0, -2)[:, -1] - mpt.flatten(0, -2)[:, -2]).double()
    torch.testing.assert_close(mpt_slopes(heads), step, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bloom", {"hidden_size": 48, "n_head": 6}),
        ("mpt", {"d_model": 48, "n_heads": 6}),
        ("mpt", {"attn_config": {"clip_qkv": 0.5}}),
        ("mpt", {"attn_config": {"softmax_scale": 0.2}}),
        ("gptj", {"rotary_dim": 8}),
    ],
)
def test_options_of_the_second_route(name, options) -> None:
    plain, model = pair(name, **options)
    ids = tokens(30)
    got = feed(model, SinkCache.for_model(model, sinks=3, window=7), ids, [11, 1, 18])[0]
    torch.testing.assert_close(got, restream(plain, ids[0].tolist(), 3, 7), rtol=0, atol=1e-9)


def test_frequencies_of_a_model_cast_to_bfloat16_are_those_before() -> None:
    from sinks.models.families import describe

    wide = build("llama")  # a description does not keep its model alive
    exact = describe(wide).rotaries(20)["all"].inv_freq
    cast = build("llama", dtype=torch.float32).to(torch.bfloat16)
    assert cast.model.rotary_emb.inv_freq.dtype is torch.bfloat16
    torch.testing.assert_close(describe(cast).rotaries(20)["all"].inv_freq, exact, rtol=2**-23, atol=0)
    buffered = build("llama", dtype=torch.float32)
    buffered.model.rotary_emb.inv_freq.mul_(1.5)  # the model's own buffer is taken, not a fresh formula
    torch.testing.assert_close(describe(buffered).rotaries(20)["all"].inv_freq, 1.5 * exact, rtol=2**-23, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_padded_generation_with_a_static_cache_is_stock(name: str) -> None:
    """Its masks are made before the pass begins; they used to be lost, and the logits were off by 4."""
    plain, model = pair(name)
    ids, mask = left_padded([tokens(5)[0].tolist(), tokens(20)[0].tolist()])
    options = {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 8, "do_sample": False}
    told = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    stock, ours = (m.generate(input_ids=ids, attention_mask=mask, **options, **told) for m in (plain, model))
    # Stock gives NaN where a row is nothing but pads so far, and so must we: lost pads would give numbers.
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # 5.17 has only the old name
def test_training_with_checkpoints_is_stock() -> None:
    plain, model = build("llama", layers=2), attach(build("llama", layers=2))
    for m in (plain, model):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m.train().requires_grad_(True)
        m(input_ids=tokens(9), labels=tokens(9), use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_copy_of_an_attached_model_is_refused(name: str) -> None:
    model = attach(build(name))
    with pytest.raises(CacheError, match="copy"):
        attach(copy.deepcopy(model))
    attach(copy.deepcopy(detach(model)))


def test_an_attach_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), tokens(9)
    before = model(ids).logits
    with monkeypatch.context() as patched:
        patched.setattr("sinks.models.attach.rotary_modules", lambda base: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attach(model)
    assert torch.equal(model(ids).logits, before)
    assert attach(model)(ids, past_key_values=fresh(model)).logits.shape == before.shape


@pytest.mark.parametrize("mask", [
    torch.zeros(2, 9).masked_fill(torch.arange(9) < 3, -1e9), torch.ones(1, 9), torch.ones(3, 9), torch.ones(2, 8),
])  # fmt: skip
def test_a_mask_of_another_shape_or_kind_is_refused(mask: torch.Tensor) -> None:
    _, model = pair("llama")
    cache = fresh(model)
    with pytest.raises(InvalidInput, match="attention_mask"):
        model(tokens(9, batch=2), attention_mask=mask, past_key_values=cache)
    model(tokens(9, batch=2), past_key_values=cache)  # and nothing was broken by it


def test_position_ids_of_another_shape_are_refused() -> None:
    _, model = pair("llama")
    with pytest.raises(InvalidInput, match="position_ids"):
        model(tokens(9), position_ids=torch.arange(8)[None], past_key_values=fresh(model))


def test_arguments_may_be_given_in_order() -> None:
    _, model = pair("llama")
    by_name = model.model(input_ids=tokens(30), past_key_values=fresh(model)).last_hidden_state
    in_order = model.model(tokens(30), torch.ones(1, 30), None, fresh(model)).last_hidden_state
    assert torch.equal(by_name, in_order)


@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj", "mpt"])
def test_a_tuple_for_an_output_is_refused(name: str) -> None:
    _, model = pair(name)
    cache = fresh(model)
    with pytest.raises(UnsupportedOption, match="return_dict"):
        model(tokens(9), past_key_values=cache, return_dict=False)
    assert cache.seen == []


def test_alibi_has_no_trained_length() -> None:
    _, model = pair("mpt")
    assert SinkCache.for_model(model, sinks=4, window=10 * TRAINED).capacity > TRAINED


def test_layers_of_another_kind_are_refused() -> None:
    model = build("qwen2")
    model.config.layer_types = ["chunked_attention"]
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        SinkCache.for_model(model)


def test_falcon_slopes_are_rounded_as_the_model_rounds_them() -> None:
    options: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6}
    plain, model = pair("falcon_alibi", **options)
    ids = tokens(30)
    got = feed(model, SinkCache.for_model(model, sinks=3, window=7), ids, [11, 1, 18])[0]
    # The model also rounds slope x position to bfloat16, and the stream does not: 2^-9 of at most 10 positions.
    torch.testing.assert_close(got, restream(plain, ids[0].tolist(), 3, 7), rtol=0, atol=0.1)
