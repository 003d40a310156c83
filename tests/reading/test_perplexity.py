"""The scorer against one dense forward pass, at any pace."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from sinks.cache.cache import SinkCache
from sinks.errors import InvalidInput, UnsupportedOption
from sinks.reading import perplexity as module
from sinks.reading.perplexity import Score, perplexity, score, surprise
from tests.reading.tiny import dense_nll, stream, tiny_model

IDS = stream()


@pytest.mark.parametrize(("chunk", "singles"), [(1, 0), (7, 0), (7, 5), (32, 89), (89, 0), (1000, 3)])
@pytest.mark.parametrize("bounded", [False, True])
def test_any_pace_equals_one_dense_pass(chunk: int, singles: int, bounded: bool):
    model = tiny_model()
    cache = SinkCache.for_model(model, sinks=4, window=96) if bounded else DynamicCache(config=model.config)
    found = score(model, IDS, cache, chunk, singles=singles)
    assert np.isnan(found.nll[0])
    # transformers' norms and softmax stay in float32 even in a float64 model, and round otherwise in chunks.
    np.testing.assert_allclose(found.nll[1:], dense_nll(model, IDS).numpy(), rtol=0, atol=1e-5)


def test_past_the_window_any_pace_gives_the_same():
    model = tiny_model()
    slow, fast = (score(model, IDS, SinkCache.for_model(model, sinks=2, window=14), chunk) for chunk in (1, 32))
    np.testing.assert_allclose(fast.nll[1:], slow.nll[1:], rtol=0, atol=1e-5)
    assert np.abs(slow.nll[1:] - dense_nll(model, IDS).numpy()).max() > 0.1, "nothing was let go: this tests nothing"


def test_steps_say_what_was_read_and_held():
    model = tiny_model()
    heard: list[int] = []
    found = score(model, IDS, DynamicCache(config=model.config), 20, singles=10, listen=heard.append)
    assert found.read.tolist() == [20, 40, 60, 79, *range(80, 90)]
    assert heard == np.diff(found.read, prepend=0).tolist()
    per_token = 2 * 2 * 2 * 8 * 8  # keys and values, layers, heads, head_dim, bytes
    assert found.cache_bytes.tolist() == [per_token * read for read in found.read]
    assert found.singles == 10
    assert (found.milliseconds > 0).all()


def test_speed_and_latency_are_of_different_steps():
    milliseconds = np.array([100.0, 100.0, 1.0, 3.0, 2.0])
    found = Score(np.zeros(24), np.array([10, 20, 21, 22, 23]), milliseconds, np.zeros(5, int), singles=3)
    assert found.latency == 2.0
    assert found.tokens_per_second == pytest.approx(100)
    alone = Score(np.zeros(4), np.array([1, 2, 3]), np.array([1.0, 3.0, 2.0]), np.zeros(3, int), singles=3)
    assert alone.tokens_per_second == pytest.approx(500)
    assert np.isnan(Score(np.zeros(9), np.array([8]), np.array([1.0]), np.zeros(1, int), singles=0).latency)


def test_logits_live_for_one_chunk_only():
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    score(model, IDS, DynamicCache(config=model.config), 16)
    assert max(seen) == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_surprise_is_widened_slice_by_slice(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    logits = (torch.randn(50, 31) * 20).to(dtype)
    targets = torch.randint(0, 31, (50,))
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    for elements in (1, 100, 1 << 22):  # one row at a time; a few; all
        monkeypatch.setattr(module, "SLICE_ELEMENTS", {"cpu": elements})
        found = surprise(logits, targets)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # |logsumexp| < 128 here, so one rounding of it in float32 is at most 2^-18; three are made.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 * 2**-18)


def test_a_surprise_that_is_no_number_is_an_error_and_not_a_gap():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(UnsupportedOption, match="not finite in torch.float64"):
        score(model, IDS, DynamicCache(config=model.config))


@pytest.mark.parametrize(("tokens", "chunk", "singles"), [(1, 8, 0), (0, 8, 0), (9, 0, 0), (9, 8, -1), (9, 8, 9)])
def test_sizes_that_make_no_sense(tokens: int, chunk: int, singles: int):
    model = tiny_model()
    with pytest.raises(InvalidInput):
        score(model, IDS[:tokens], DynamicCache(config=model.config), chunk, singles=singles)


def test_perplexity_is_over_scored_tokens():
    nll = np.array([np.nan, 1.0, np.nan, 3.0])
    assert perplexity(nll) == pytest.approx(np.exp(2))
    assert perplexity(nll, np.array([True, True, True, False])) == pytest.approx(np.exp(1))
    assert np.isnan(perplexity(nll, np.array([True, False, True, False])))
