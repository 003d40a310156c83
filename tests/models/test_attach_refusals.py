"""What cannot be done is refused, with a reason: models, caches that do not belong, options, sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from sinks.cache.cache import SinkCache
from sinks.errors import (
    BrokenCache,
    CacheError,
    CapacityError,
    InvalidInput,
    NotAttached,
    UnsupportedModel,
    UnsupportedOption,
)
from sinks.models.attach import attach
from sinks.models.families import FAMILIES, REFUSED, describe
from tests.families.cases import BOTH_ROUTES, TRAINED
from tests.families.feeding import feed, generate, pair
from tests.families.tiny import build, tokens

ROOT = Path(__file__).parents[2]
GENERATE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


# --- models that cannot
# -----------------------------------------------------------------------------------------------


LEARNED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "gpt_neo": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]},
}


@pytest.mark.parametrize("family", LEARNED)
def test_learned_positions_are_refused_with_the_reason(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=71, bos_token_id=None, eos_token_id=None, **LEARNED[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model(input_ids=tokens(5)).logits
    with pytest.raises(UnsupportedModel, match=r"(?i)learned.*position|position.*learned") as caught:
        attach(model)
    assert family in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(model(input_ids=tokens(5)).logits, before)
    assert family in REFUSED


class StrangeConfig(LlamaConfig):
    model_type = "strange_family"


class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig


def test_unknown_and_recurrent_families_are_refused() -> None:
    config = StrangeConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=71
    )
    with pytest.raises(UnsupportedModel, match="strange_family"):
        attach(StrangeForCausalLM(config))
    recurrent = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=71, state_size=4))
    with pytest.raises(UnsupportedModel, match="mamba"):
        attach(recurrent)


def test_the_table_of_families_says_something_about_each() -> None:
    for name in ("llama", "gpt_neox", "bloom", "deepseek_v3", "gpt_oss"):
        assert name in FAMILIES
        assert name not in REFUSED
    for name in ("gpt2", "opt", "gpt_neo"):
        assert name in REFUSED
        assert name not in FAMILIES
    assert callable(describe)


# --- a cache where it does not belong
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH_ROUTES)
def test_a_model_that_is_not_attached(name: str) -> None:
    plain, model = pair(name)
    cache = SinkCache.for_model(model, sinks=2, window=9)
    with pytest.raises(NotAttached, match="attach"):
        plain(input_ids=tokens(5), past_key_values=cache)
    with pytest.raises(NotAttached, match="attach"):
        plain(input_ids=tokens(5), past_key_values=SinkCache.for_model(plain, sinks=2, window=9))
    feed(model, SinkCache.for_model(model, sinks=2, window=9), tokens(30), [30])


def test_a_cache_of_another_model() -> None:
    _, one = pair("llama", layers=2)
    _, deeper = pair("llama", layers=3)
    _, family = pair("qwen3", layers=2)
    _, twin = pair("llama", layers=2, seed=1)
    for other in (deeper, family, twin):
        cache = SinkCache.for_model(one, sinks=2, window=9)
        with pytest.raises(CacheError):
            other(input_ids=tokens(5), past_key_values=cache)
        filled = SinkCache.for_model(one, sinks=2, window=9)
        feed(one, filled, tokens(30), [30])
        with pytest.raises(CacheError):
            other(input_ids=tokens(5), past_key_values=filled)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_batch_size_may_not_change(name: str) -> None:
    _, model = pair(name)
    cache = SinkCache.for_model(model, sinks=2, window=9)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), tokens(20, batch=2), [19, 1])
    feed(model, cache, tokens(20, batch=2)[:, :19], [19])
    for batch in (1, 3):
        with pytest.raises((CacheError, InvalidInput)):
            model(input_ids=tokens(1, batch=batch), past_key_values=cache)
    try:  # refused before anything was written, or else broken: never quietly wrong
        last = model(input_ids=tokens(20, batch=2)[:, 19:], past_key_values=cache).logits
    except BrokenCache:
        return
    torch.testing.assert_close(last, expected[:, 19:], rtol=0, atol=1e-9)


# --- options that cannot be honoured
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH_ROUTES)
def test_attention_weights_are_refused(name: str) -> None:
    _, model = pair(name)
    with pytest.raises(UnsupportedOption, match="attention"):
        model(
            input_ids=tokens(5), past_key_values=SinkCache.for_model(model, sinks=2, window=9), output_attentions=True
        )


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bloom"])
def test_masks_with_four_dimensions_are_refused(name: str) -> None:
    _, model = pair(name)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    with pytest.raises(UnsupportedOption):
        model(input_ids=tokens(5), attention_mask=mask, past_key_values=SinkCache.for_model(model, sinks=2, window=9))


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1], [0, 1, 2, 4, 5], [0, 0, 0, 0, 0], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj"])
def test_positions_that_do_not_follow_each_other_are_refused(name: str, positions: list[int]) -> None:
    _, model = pair(name)
    cache = SinkCache.for_model(model, sinks=2, window=9)
    with pytest.raises(UnsupportedOption, match="position"):
        model(input_ids=tokens(5), position_ids=torch.tensor([positions]), past_key_values=cache)


def test_positions_that_follow_each_other_change_nothing() -> None:
    _, model = pair("llama")
    ids = tokens(30)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [20, 10])
    cache = SinkCache.for_model(model, sinks=2, window=9)
    pieces = [
        model(input_ids=ids[:, a:b], position_ids=torch.arange(a, b)[None], past_key_values=cache).logits
        for a, b in ((0, 20), (20, 30))
    ]
    assert torch.equal(torch.cat(pieces, dim=1), expected)


def test_rollback_is_refused() -> None:
    _, model = pair("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with pytest.raises(UnsupportedOption):
        generate(
            model,
            input_ids=ids,
            prompt_lookup_num_tokens=3,
            past_key_values=SinkCache.for_model(model, sinks=2, window=9),
            **GENERATE,
        )
    with pytest.raises(UnsupportedOption):
        generate(
            model,
            input_ids=ids,
            assistant_model=build("llama", layers=1),
            past_key_values=SinkCache.for_model(model, sinks=2, window=9),
            **GENERATE,
        )
    cache = SinkCache.for_model(model, sinks=2, window=9)
    feed(model, cache, ids, [14])
    with pytest.raises(UnsupportedOption):
        cache.crop(-1)


def test_holes_in_the_padding_are_right_or_refused() -> None:
    """Right padding, or a pad between tokens: refused, or each row gets what its real tokens alone get."""
    _, model = pair("llama")
    ids = tokens(26, batch=2)
    for mask_row in ([1] * 24 + [0] * 2, [1] * 3 + [0] + [1] * 22, [0, 1, 0] + [1] * 23):
        mask = torch.tensor([mask_row, [1] * 26])
        cache = SinkCache.for_model(model, sinks=2, window=9)
        try:
            logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        except (UnsupportedOption, InvalidInput):
            continue
        real = mask[0].bool()
        alone = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids[:1, real], [int(real.sum())])
        torch.testing.assert_close(logits[0, real], alone[0], rtol=0, atol=1e-9)


# --- sizes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "deepseek_v3", "gemma3_text", "phi3_longrope_long"])
def test_capacity_beyond_the_trained_length(name: str) -> None:
    _, model = pair(name)
    with pytest.raises(CapacityError, match=rf"(?s){TRAINED + 1}.*{TRAINED}|{TRAINED}.*{TRAINED + 1}"):
        SinkCache.for_model(model, sinks=4, window=TRAINED - 3)
    assert SinkCache.for_model(model, sinks=4, window=TRAINED - 4).capacity == TRAINED


@pytest.mark.parametrize(
    "sizes",
    [
        {"sinks": -1, "window": 8},
        {"sinks": 4, "window": 0},
        {"sinks": 4, "window": -8},
        {"sinks": 0, "window": 0},
        {"sinks": 4, "window": 8, "start": -1},
    ],
)
def test_sizes_that_make_no_sense(sizes: dict[str, Any]) -> None:
    _, model = pair("llama")
    with pytest.raises(InvalidInput) as caught:
        SinkCache.for_model(model, **sizes)
    assert "\n" not in str(caught.value)


def test_sizes_that_are_no_integers() -> None:
    """In a process of its own, without the type checker of the test run, which would answer in place of the library."""
    program = """
from sinks.cache.cache import SinkCache
from sinks.errors import InvalidInput
from sinks.models.attach import attach
from tests.families.tiny import build

model = attach(build("llama"))
sizes = {"sinks": 4, "window": 8, "start": 0}
for name in sizes:
    for value in (8.5, 8.0, "8", None, [8]):
        try:
            SinkCache.for_model(model, **{**sizes, name: value})
        except InvalidInput as error:
            assert name in str(error), f"{name}={value!r}: {error}"
        else:
            raise SystemExit(f"{name}={value!r} was accepted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
