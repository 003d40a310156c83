"""What `attach` promises besides arithmetic: nothing changes without a `SinkCache`, and nothing is silently ignored."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from sinks.cache.cache import SinkCache
from sinks.errors import (
    BrokenCache,
    CacheError,
    CapacityError,
    InvalidInput,
    NotAttached,
    SinksError,
    UnsupportedModel,
    UnsupportedOption,
)
from sinks.models.attach import attach, detach
from sinks.models.families import FAMILIES, REFUSED, describe
from tests.families.feeding import feed, left_padded
from tests.families.tiny import CASES, TRAINED, build, tokens
from tests.oracle.restream import decoder_layers

ROOT = Path(__file__).parents[2]
BOTH_ROUTES = ["llama", "gemma3_text", "gpt_oss", "falcon", "falcon_alibi", "gptj", "bloom", "mpt", "deepseek_v3"]
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def pair(name: str, layers: int = 2, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock model and an attached copy."""
    plain = build(name, layers=layers, **options)
    return plain, attach(copy.deepcopy(plain))


def decode(model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
    pieces = [model(input_ids=chunk, past_key_values=cache).logits for chunk in ids.split([7, 1, 1, 4], dim=1)]
    return torch.cat(pieces, dim=1)


# --- without a SinkCache nothing changes
# ------------------------------------------------------------------------------


def uses(name: str) -> dict[str, Callable[[PreTrainedModel], Tensor]]:
    ids = tokens(13, batch=2)
    padded, mask = left_padded([tokens(4)[0].tolist(), tokens(13)[0].tolist()], pad=3)
    return {
        "dense": lambda model: model(input_ids=ids).logits,
        "padded": lambda model: model(input_ids=padded, attention_mask=mask).logits,
        "no cache": lambda model: model(input_ids=ids, use_cache=False).logits,
        "dynamic": lambda model: decode(model, DynamicCache(config=model.config), ids),
        "generate": lambda model: model.generate(padded, attention_mask=mask, **GENERATE),
    }


def assert_same(plain: PreTrainedModel, other: PreTrainedModel, name: str) -> None:
    for use, run in uses(name).items():
        expected, got = run(plain), run(other)
        assert torch.equal(expected.nan_to_num(), got.nan_to_num()), f"{name}: {use} changed"


@pytest.mark.parametrize("name", sorted(CASES))
def test_attached_without_a_sink_cache_is_bit_identical(name: str) -> None:
    plain, model = pair(name)
    assert_same(plain, model, name)
    # ... also after it has streamed
    window = 3 if name == "mistral_window" else 9
    feed(model, SinkCache.for_model(model, sinks=2, window=window), tokens(30), [20, 10])
    assert_same(plain, model, name)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "cohere2", "falcon", "deepseek_v3"])
def test_bit_identical_with_the_default_attention_too(name: str) -> None:
    plain = build(name, layers=2, dtype=torch.float32, attention="sdpa")
    assert_same(plain, attach(copy.deepcopy(plain)), name)


def test_bit_identical_with_a_static_cache() -> None:
    plain, model = pair("llama", dtype=torch.float32, attention="sdpa")
    ids = tokens(13)

    def run(which: PreTrainedModel) -> Tensor:
        return decode(which, StaticCache(config=which.config, max_cache_len=20), ids)

    assert torch.equal(run(plain), run(model))


def test_stock_attention_weights_and_gradients_stay_available() -> None:
    plain, model = pair("llama")
    ids = tokens(9)
    expected = plain(input_ids=ids, output_attentions=True).attentions
    got = model(input_ids=ids, output_attentions=True).attentions
    assert len(got) == len(expected) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    gradients = []
    for which in (plain, model):
        which.requires_grad_(True)
        which(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in which.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_model_of_transformers_is_given_back_and_its_forward_is_not_wrapped() -> None:
    plain = build("llama", layers=2)
    forward = type(plain).forward
    model = attach(plain)
    assert model is plain
    assert type(model).forward is forward
    assert "forward" not in vars(model), "generate() reads the signature of forward"


# --- detach, attach twice, import
# -------------------------------------------------------------------------------------


def traces(model: PreTrainedModel) -> dict[str, Any]:
    """Everything by which an attached model could differ from a stock one."""
    modules = dict(model.named_modules())
    return {
        "pre hooks": {name: len(m._forward_pre_hooks) for name, m in modules.items()},
        "hooks": {name: len(m._forward_hooks) for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "buffers": sorted(name for name, _ in model.named_buffers()),
        "classes": {name: type(m) for name, m in modules.items()},
        "attention": model.config._attn_implementation,
        "layers": [m.config._attn_implementation for m in modules.values() if hasattr(m, "config")],
        "state": sorted(model.state_dict()),
    }


@pytest.mark.parametrize("name", BOTH_ROUTES)
def test_detach_restores(name: str) -> None:
    plain = build(name, layers=2)
    model = copy.deepcopy(plain)
    before = traces(model)
    attach(model)
    cache = SinkCache.for_model(model, sinks=2, window=9)
    feed(model, cache, tokens(20), [15, 5])
    detach(model)
    after = traces(model)
    for key, value in before.items():
        assert after[key] == value, key
    assert_same(plain, model, name)
    with pytest.raises(NotAttached):
        model(input_ids=tokens(1), past_key_values=cache)


@pytest.mark.parametrize("name", BOTH_ROUTES)
def test_attach_twice_is_harmless(name: str) -> None:
    plain, model = pair(name)
    once = traces(model)
    ids = tokens(30)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [20, 10])
    assert attach(model) is model
    twice = traces(model)
    assert twice["pre hooks"] == once["pre hooks"]
    assert twice["hooks"] == once["hooks"]
    got = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [20, 10])
    assert torch.equal(got, expected)
    detach(model)
    assert traces(model)["attention"] == plain.config._attn_implementation
    assert_same(plain, model, name)


def test_detach_of_a_stock_model_is_harmless_or_says_so() -> None:
    plain = build("llama")
    before = traces(plain)
    try:
        detach(plain)
    except NotAttached:
        pass
    assert traces(plain) == before


def test_attach_again_after_detach() -> None:
    _, model = pair("llama")
    ids = tokens(30)
    expected = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30])
    attach(detach(model) or model)
    got = feed(model, SinkCache.for_model(model, sinks=2, window=9), ids, [30])
    assert torch.equal(got, expected)


def test_importing_changes_nothing_in_transformers() -> None:
    program = """
import transformers, transformers.cache_utils as caches
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.models.llama import modeling_llama
from transformers import DynamicCache, LlamaForCausalLM

def look():
    return (
        dict(attention.items()), dict(masks.items()), vars(caches).copy(), vars(modeling_llama).copy(),
        dict(vars(DynamicCache)), dict(vars(LlamaForCausalLM)), dict(caches.DYNAMIC_LAYER_TYPE_MAPPING),
    )

before = look()
import sinks, sinks.cache.cache, sinks.models.attach, sinks.models.families, sinks.kernels
after = look()
for old, new in zip(before, after, strict=True):
    assert old.keys() == new.keys(), old.keys() ^ new.keys()
    assert all(old[key] is new[key] for key in old), [key for key in old if old[key] is not new[key]]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# --- models that cannot
# -----------------------------------------------------------------------------------------------


def learned_position_models() -> list[PreTrainedModel]:
    small: dict[str, Any] = {"vocab_size": 71, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return [
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=24, **small)),
        OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=24,
                word_embed_proj_dim=32,
                **{**small, "pad_token_id": 1},
            )
        ),
        GPTNeoForCausalLM(
            GPTNeoConfig(
                hidden_size=32,
                num_layers=1,
                num_heads=4,
                attention_types=[[["global"], 1]],
                max_position_embeddings=24,
                **small,
            )
        ),
    ]


@pytest.mark.parametrize("index", range(3), ids=["gpt2", "opt", "gpt_neo"])
def test_learned_positions_are_refused_with_the_reason(index: int) -> None:
    model = learned_position_models()[index].eval()
    before = model(input_ids=tokens(5)).logits
    with pytest.raises(UnsupportedModel, match=r"(?i)learned.*position|position.*learned") as caught:
        attach(model)
    assert model.config.model_type in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(model(input_ids=tokens(5)).logits, before)
    assert model.config.model_type in REFUSED


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
        model.generate(
            ids, prompt_lookup_num_tokens=3, past_key_values=SinkCache.for_model(model, sinks=2, window=9), **GENERATE
        )
    with pytest.raises(UnsupportedOption):
        model.generate(
            ids,
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


def test_every_error_is_one_of_ours_and_one_line() -> None:
    for error in (
        BrokenCache,
        CacheError,
        CapacityError,
        InvalidInput,
        NotAttached,
        UnsupportedModel,
        UnsupportedOption,
    ):
        assert issubclass(error, SinksError)
