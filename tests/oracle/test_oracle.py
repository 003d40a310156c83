"""The oracle is itself checked, against transformers alone: no line of the library runs here."""

import pytest
import torch

from tests.families.cases import CASES
from tests.families.tiny import build, exactly, tokens
from tests.oracle.restream import frozen_at, restream
from tests.oracle.streaming_llm import StreamingLLM, stream, visible


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_equals_dense_before_anything_is_evicted(name: str) -> None:
    model = build(name, layers=3)
    ids = tokens(24)
    logits = stream(model, ids[0].tolist(), sinks=4, window=20)
    # Stock angles are float32(position) * float32(inv_freq): relative error 2^-23, up to 23 * 2^-23 = 3e-6 rad at the
    # end, and the eager softmax is float32 (6e-8). Logits have a scale of 1 and scores of a few units, so 1e-5 holds
    # and 1e-9 does not.
    stock = model(input_ids=ids).logits[0]
    assert (logits - stock).abs().max() < 1e-5
    # The same stock code computing in float64 throughout leaves rounding only.
    exact = frozen_at(model, 24)
    with exactly():
        torch.testing.assert_close(logits, exact(input_ids=ids).logits[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 6), (1, 1), (3, 1), (3, 6)])
def test_one_layer_equals_fresh_forward_over_what_is_kept(sinks: int, window: int) -> None:
    model = build("llama", layers=1)
    exact = frozen_at(model, sinks + window)
    ids = tokens(31)[0]
    oracle = StreamingLLM(model, sinks, window)
    for seen, token in enumerate(ids.tolist(), start=1):
        logits = oracle.step(token)
        kept = visible(seen, sinks, window)
        assert oracle.positions == kept
        with exactly():
            fresh = exact(input_ids=ids[kept][None]).logits[0, -1]
        torch.testing.assert_close(logits, fresh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 6), (1, 1), (3, 1), (3, 6)])
def test_both_oracles_agree(name: str, sinks: int, window: int) -> None:
    """Written from different ends: lists of keys, and stock forwards with remembered states."""
    model, ids = build(name, layers=3), tokens(31)[0].tolist()
    expected = stream(model, ids, sinks, window)
    torch.testing.assert_close(restream(model, ids, sinks, window), expected, rtol=0, atol=1e-12)


def test_deeper_layers_remember_what_was_evicted() -> None:
    """With several layers streaming is *not* a fresh forward: a kept key was computed when more was visible."""
    model = build("llama", layers=3)
    ids = tokens(31)[0]
    logits = stream(model, ids.tolist(), sinks=3, window=6)[-1]
    fresh = model(input_ids=ids[visible(31, 3, 6)][None]).logits[0, -1]
    assert (logits - fresh).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(CASES))
def test_tiny_models_are_hard_to_satisfy(name: str) -> None:
    """Logits vary, order matters wherever the model knows positions, and no parameter was left at its initial value."""
    model = build(name, layers=1)
    ids = tokens(12)
    logits = model(input_ids=ids).logits[0]
    assert logits.dtype is torch.float64
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 4
    shuffled = ids.clone()
    shuffled[0, 8], shuffled[0, 9] = ids[0, 9], ids[0, 8]
    moved = (model(input_ids=shuffled).logits[0, -1] - logits[-1]).abs().max()
    assert (moved < 1e-5) if name == "smollm3_nope" or name == "cohere2" else (moved > 1e-3)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 71
    assert (model(input_ids=changed).logits[0, -1] - logits[-1]).abs().max() > 1e-3
    for parameter_name, parameter in model.named_parameters():
        assert parameter.unique().numel() > 1, f"{parameter_name} is constant"
