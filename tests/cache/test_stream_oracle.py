"""Three layers of Llama against `StreamingLLM`, the step-by-step re-implementation in `tests/oracle/`.

Both sides compute in float64 from the same weights, with numbers of order 1: 1e-9 leaves room for 1e5 roundings and
for nothing else. Lower precisions are judged by the house rule: the error against float64 is at most twice (the error
that the literal re-implementation makes in that same precision, plus one rounding of the largest logit).
"""

from __future__ import annotations

import copy
from functools import cache as memoize

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.models.attach import attach
from tests.families.cases import HEAD_DIM, KV_HEADS
from tests.families.feeding import feed, odd_chunks, one_by_one
from tests.families.tiny import build, tokens
from tests.oracle.streaming_llm import stream, visible

LAYERS = 3
SIZES = [(0, 1), (0, 7), (1, 1), (4, 1), (1, 9), (4, 8), (3, 13), (12, 2)]


@memoize
def stock(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return build("llama", layers=LAYERS, dtype=dtype)


@memoize
def model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return attach(copy.deepcopy(stock(dtype)))


@memoize
def oracle(length: int, sinks: int, window: int, seed: int = 0) -> Tensor:
    return stream(stock(), tokens(length, seed=seed)[0].tolist(), sinks, window)


def streamed(
    sinks: int, window: int, ids: Tensor, sizes: list[int], start: int = 0, dtype: torch.dtype = torch.float64
):
    cache = SinkCache.for_model(model(dtype), sinks=sinks, window=window, start=start)
    return feed(model(dtype), cache, ids, sizes)[0], cache


@pytest.mark.parametrize(("sinks", "window"), SIZES)
def test_equals_the_oracle_at_every_length(sinks: int, window: int) -> None:
    capacity = sinks + window
    longest = 4 * capacity + 1
    expected = oracle(longest, sinks, window)
    ways = [[length] for length in (1, capacity - 1, capacity, capacity + 1, 4 * capacity, longest) if length]
    ways += [one_by_one(longest), odd_chunks(longest), [capacity, 1, *odd_chunks(3 * capacity)]]
    for sizes in ways:
        length = sum(sizes)
        got, cache = streamed(sinks, window, tokens(longest)[:, :length], sizes)
        torch.testing.assert_close(got, expected[:length], rtol=0, atol=1e-9)
        assert cache.seen == [length]
        assert cache.visible() == visible(length, sinks, window)
        assert cache.capacity == capacity


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), shape=st.sampled_from(SIZES))
def test_any_chunk_sizes(sizes: list[int], shape: tuple[int, int]) -> None:
    sinks, window = shape
    length = min(sum(sizes), 60)
    sizes = [size for size in _clipped(sizes, length) if size]
    got, cache = streamed(sinks, window, tokens(60)[:, :length], sizes)
    torch.testing.assert_close(got, oracle(60, sinks, window)[:length], rtol=0, atol=1e-9)
    assert cache.visible() == visible(length, sinks, window)


def _clipped(sizes: list[int], total: int) -> list[int]:
    clipped = []
    for size in sizes:
        clipped.append(min(size, total - sum(clipped)))
    return clipped


@pytest.mark.parametrize("start", [1, 2**16, 2**24 + 1, 2**31 - 100, 2**31 - 1, 2**32 - 7, 2**33, 2**40])
def test_phases_do_not_drift(start: int) -> None:
    """The stream crosses 2^31 and 2^32 on the way; the logits are those of a stream that starts at 0."""
    ids = tokens(48)
    expected = oracle(48, 4, 8)
    for sizes in ([48], odd_chunks(48), one_by_one(48)):
        got, cache = streamed(4, 8, ids, sizes, start=start)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        assert cache.seen == [48]


@pytest.mark.parametrize("start", [2**31 - 100, 2**33])
def test_phases_do_not_drift_in_float32(start: int) -> None:
    ids = tokens(200)
    at_zero, _ = streamed(4, 8, ids, odd_chunks(200), dtype=torch.float32)
    far, _ = streamed(4, 8, ids, odd_chunks(200), start=start, dtype=torch.float32)
    assert (far - at_zero).abs().max() <= 1e-4 * at_zero.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", ["one", "odd", "all"])
def test_lower_precision_costs_what_it_must(dtype: torch.dtype, chunks: str) -> None:
    length, sinks, window = 60, 4, 8
    ids = tokens(length)
    low = stock(dtype)
    exact = stream(low, ids[0].tolist(), sinks, window)  # float64 arithmetic on the rounded weights
    literal = stream(low, ids[0].tolist(), sinks, window, dtype)
    sizes = {"one": one_by_one(length), "odd": odd_chunks(length), "all": [length]}[chunks]
    got, _ = streamed(sinks, window, ids, sizes, dtype=dtype)
    assert got.dtype is dtype
    band = torch.finfo(dtype).eps * exact.abs().max()
    allowed = 2 * ((literal - exact).abs().max() + band)
    assert (got - exact).abs().max() <= allowed
    # and on average too, where no single unlucky logit decides
    assert (got - exact).pow(2).mean().sqrt() <= 2 * (literal - exact).pow(2).mean().sqrt()


def test_sinks_matter_after_eviction_and_only_then() -> None:
    ids = tokens(40)
    four, _ = streamed(4, 8, ids, [40])
    none, _ = streamed(0, 12, ids, [40])
    torch.testing.assert_close(four[:12], none[:12], rtol=0, atol=1e-9)
    assert (four[12:] - none[12:]).abs().amax(dim=-1).min() > 1e-2


def test_window_one_without_sinks_sees_only_the_current_token() -> None:
    ids = tokens(20)
    ids[0, 15] = ids[0, 3]
    got, _ = streamed(0, 1, ids, [20])
    torch.testing.assert_close(got[15], got[3], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("sinks", "window"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_is_the_formula_and_never_more(sinks: int, window: int, dtype: torch.dtype) -> None:
    capacity = sinks + window
    full = 2 * LAYERS * KV_HEADS * capacity * HEAD_DIM * dtype.itemsize
    cache = SinkCache.for_model(model(dtype), sinks=sinks, window=window)
    assert cache.nbytes <= full
    sizes = [1, 2, capacity, 3 * capacity, 1, 1, 5]
    for chunk in tokens(sum(sizes)).split(sizes, dim=1):
        model(dtype)(input_ids=chunk, past_key_values=cache)
        assert cache.nbytes <= full
        if cache.seen[0] >= capacity:
            assert cache.nbytes == full
    # what the cache holds on to is no view of something larger (a chunk's keys, say)
    held = sum(storage_bytes(layer) for layer in cache.layers)
    assert full <= held <= full + LAYERS * 256 * (1 + capacity)


def storage_bytes(layer: object) -> int:
    """Bytes of all distinct storages that a cache layer refers to directly."""
    found = {}
    for value in vars(layer).values():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def test_memory_of_a_batch() -> None:
    cache = SinkCache.for_model(model(), sinks=2, window=6)
    model()(input_ids=tokens(30, batch=3), past_key_values=cache)
    assert cache.nbytes == 3 * 2 * LAYERS * KV_HEADS * 8 * HEAD_DIM * 8


def test_visible_of_every_moment() -> None:
    for sinks, window in SIZES:
        cache = SinkCache.for_model(model(), sinks=sinks, window=window)
        assert cache.visible() == []
        for seen, token in enumerate(tokens(2 * (sinks + window) + 3).split(1, dim=1), start=1):
            model()(input_ids=token, past_key_values=cache)
            assert cache.visible(0) == visible(seen, sinks, window)


def test_reset_forgets_everything() -> None:
    ids = tokens(50, seed=1)
    cache = SinkCache.for_model(model(), sinks=4, window=8)
    first = feed(model(), cache, ids, odd_chunks(50))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.visible() == []
    torch.testing.assert_close(feed(model(), cache, ids, [50]), first, rtol=0, atol=1e-9)
    cache.reset()  # and another batch size may follow
    both = feed(model(), cache, torch.cat((ids, ids)), [20, 30])
    torch.testing.assert_close(both, torch.cat((first, first)), rtol=0, atol=1e-9)


def test_two_streams_through_one_model_do_not_meet() -> None:
    first, second = tokens(40, seed=2), tokens(40, seed=3)
    one = SinkCache.for_model(model(), sinks=4, window=8)
    two = SinkCache.for_model(model(), sinks=1, window=5, start=777)
    pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
    for a, b in zip(first.split(3, dim=1), second.split(3, dim=1), strict=True):
        pieces[0].append(model()(input_ids=a, past_key_values=one).logits[0])
        pieces[1].append(model()(input_ids=b, past_key_values=two).logits[0])
        model()(input_ids=a)  # dense, in between
    torch.testing.assert_close(torch.cat(pieces[0]), stream(stock(), first[0].tolist(), 4, 8), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat(pieces[1]), stream(stock(), second[0].tolist(), 1, 5), rtol=0, atol=1e-9)


def test_only_the_last_logits_and_embeddings_as_input() -> None:
    ids = tokens(40)
    expected = oracle(48, 4, 8)[:40]
    cache = SinkCache.for_model(model(), sinks=4, window=8)
    embedded = model().get_input_embeddings()(ids)
    model()(inputs_embeds=embedded[:, :30], past_key_values=cache)
    last = model()(inputs_embeds=embedded[:, 30:], past_key_values=cache, logits_to_keep=1).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(last[0, 0], expected[-1], rtol=0, atol=1e-9)


def test_inference_mode_may_come_and_go() -> None:
    """A cache made in inference mode could not be written outside of it: `Inplace update to inference tensor`."""
    model = attach(build("llama", layers=2))
    ids = torch.randint(0, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = SinkCache.for_model(model, sinks=2, window=7)
    with torch.inference_mode():
        first = model(ids[:, :20], past_key_values=cache).logits
        cache.reorder_cache(torch.tensor([0]))
    rest = model(ids[:, 20:], past_key_values=cache).logits
    whole = model(ids, past_key_values=SinkCache.for_model(model, sinks=2, window=7)).logits
    assert (torch.cat((first, rest), dim=1) - whole).abs().max() < 1e-12
