"""What `attach` promises before any arithmetic: without a `SinkCache` nothing changes, and `detach` undoes it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from sinks.cache.cache import SinkCache
from sinks.errors import (
    NotAttached,
)
from sinks.models.attach import attach, detach
from tests.families.cases import BOTH_ROUTES, CASES
from tests.families.feeding import feed, generate, left_padded, pair
from tests.families.tiny import build, tokens

GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


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
        "generate": lambda model: generate(model, input_ids=padded, attention_mask=mask, **GENERATE),
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
