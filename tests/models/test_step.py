"""Lean and compiled decode steps against the general path: the same logits, and the same cache afterwards."""

import copy

import pytest
import torch

from sinks.cache.cache import SinkCache
from sinks.errors import CacheError, UnsupportedModel
from sinks.kernels.lens import Lens
from sinks.models.attach import attach
from sinks.models.observe import observe
from sinks.models.step import hasten as room
from sinks.models.step.hasten import hasten, is_hastened, unhasten
from sinks.models.weights.packed import Int8Linear
from sinks.models.weights.quantize import quantize
from tests.families.tiny import build, tokens

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LEAN = (*FAMILIES, "gemma3_text")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def stream(model, ids, sizes, *, sinks=3, window=9):
    """Logits behind every chunk of these sizes, and the cache."""
    cache, made, at = SinkCache.for_model(model, sinks=sinks, window=window), [], 0
    with torch.inference_mode():
        for size in sizes:
            made.append(model(input_ids=ids[:, at : at + size], past_key_values=cache, use_cache=True).logits[:, -1])
            at += size
    return torch.stack(made), cache


def same(model, ids, sizes, **close):
    """The general path, then the hastened one."""
    plain, before = stream(unhasten(model), ids, sizes)
    lean, after = stream(hasten(model), ids, sizes)
    torch.testing.assert_close(lean, plain, **close)
    assert after.seen == before.seen
    for one, other in zip(after.dump().values(), before.dump().values(), strict=True):
        torch.testing.assert_close(one, other, **close)
    return plain


@pytest.mark.parametrize("name", LEAN)
def test_a_lean_step_is_the_general_one(name: str):
    """float64, filling, filled and long past eviction, chunks and steps mixed, two rows."""
    model = attach(build(name, layers=3))
    same(model, tokens(60, batch=2), [1, 1, 5, *[1] * 20, 7, *[1] * 10], rtol=0, atol=1e-10)


def test_only_plain_steps_are_lean(monkeypatch: pytest.MonkeyPatch):
    model = hasten(attach(build("llama", layers=2)))
    taken: list[int] = []
    real = room.step
    monkeypatch.setattr(room, "step", lambda *given: taken.append(1) or real(*given))
    cache, one = SinkCache.for_model(model, sinks=2, window=6), tokens(1)

    def lean(**more) -> bool:
        taken.clear()
        model(**({"input_ids": one, "past_key_values": cache, "use_cache": True} | more))
        return bool(taken)

    assert not lean(), "gradients are on"
    with torch.inference_mode():
        assert lean()
        assert not lean(input_ids=tokens(2))
        assert not lean(attention_mask=torch.ones(1, 1))
        assert not lean(past_key_values=None)
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert not lean()
        handle.remove()
        assert lean()
        with observe(model, Lens(see=lambda _: None)):
            assert not lean()
        assert lean()
        assert not lean(output_hidden_states=True)


def test_what_is_not_llama_shaped_is_refused_with_the_reason():
    with pytest.raises(UnsupportedModel, match="gemma2 is not among llama"):
        hasten(build("gemma2"))
    with pytest.raises(UnsupportedModel, match="its activation is gelu"):
        hasten(build("llama", hidden_act="gelu"))


def test_hastening_is_undone_and_copies_are_refused():
    model = hasten(hasten(build("llama")))
    with pytest.raises(CacheError, match="unhasten it first"):
        copy.deepcopy(model)
    assert not is_hastened(copy.deepcopy(unhasten(model)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_compiled_step_is_the_product_of_the_same_weights(name: str, quant: str):
    """Against float32 layers of the widened weights: sums in another order, no rounding of activations."""
    model = build(name, layers=3, dtype=torch.float32, **WIDE)
    quantize(model, quant)  # type: ignore[arg-type]
    hasten(attach(model))
    if model.forward.native is None:
        pytest.skip("no C compiler here")
    wide = attach(build(name, layers=3, dtype=torch.float32, **WIDE))
    for key, module in list(model.named_modules()):
        if hasattr(module, "weight_widened"):
            wide.get_submodule(key).weight = torch.nn.Parameter(exact(module), requires_grad=False)
    ids = tokens(60)
    ours, theirs = SinkCache.for_model(model, sinks=3, window=9), stream(wide, ids, [1])[1]
    ours.adopt({held: value.clone() for held, value in theirs.dump().items()})
    with torch.inference_mode():
        for at in range(1, 60):
            one = ids[:, at : at + 1]
            made = model(input_ids=one, past_key_values=ours, use_cache=True).logits
            expected = wide(input_ids=one, past_key_values=theirs, use_cache=True).logits
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert ours.seen == theirs.seen == [60]
    for one, other in zip(ours.dump().values(), theirs.dump().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def exact(module) -> torch.Tensor:
    """The weight on its grid in float32; what the int4 kernel tells of it is rounded once more."""
    if isinstance(module, Int8Linear):
        return module.weight_widened()
    scale, centre = module.scales[:, : module.out_features].float().permute(2, 1, 0).unsqueeze(-1)
    q = ((module.weight_widened().unflatten(1, (-1, 32)) - centre) / scale).round()
    return (q * scale + centre).flatten(1)


@pytest.mark.parametrize("change", ["replace", "assign", "cast"])
def test_weights_that_were_replaced_or_moved_are_taken_up(change: str):
    """What adapters, `load_state_dict(assign=True)` and `.to` do behind a hastened model's back."""
    dtype = torch.float32 if change == "cast" else torch.float64
    model, other, ids = hasten(attach(build("llama", layers=2, dtype=dtype))), build("llama", layers=2), tokens(20)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    if change == "replace":
        model.model.layers[1].self_attn.q_proj = other.model.layers[1].self_attn.q_proj
    elif change == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        model.to(torch.bfloat16)
    lean, _ = stream(model, ids, [3, *[1] * 17])
    plain, _ = stream(unhasten(model), ids, [3, *[1] * 17])
    bound = 1e-10 if change != "cast" else 4 * 2**-8  # a few roundings to bfloat16
    torch.testing.assert_close(lean, plain, rtol=0, atol=bound * float(plain.abs().max()))
