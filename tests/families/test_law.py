"""The law that every supported family obeys, on tiny random models.

One layer: streaming equals a fresh stock forward over the tokens that are kept, at positions 0, 1, 2, ... Many
layers: token by token, in chunks of any size and all at once, streaming equals `Restream`, the slow oracle made of
stock dense forwards.

Tolerances. Models and oracles are float64, numbers are of order 1 and pass through a few hundred operations, so
whatever computes in float64 agrees to about 1e-14; 1e-9 leaves five digits and is far below every float32 effect
(1e-7). Stock models themselves are not that exact, because transformers computes rotary angles and eager softmaxes in
float32. How much that is worth in logits is not guessed but measured on the same tokens: `stock - exact`, where
`exact` is the same stock code run in float64 throughout.

Families whose own code rounds queries and keys to float32 before any attention function sees them (`Tiny.rounds`)
cannot be better than that: they may be off by twice the stock error (query and key both carry one), plus one float32
rounding of the logits. Even they must not depend on how the stream is cut: ways are compared with each other at 1e-9.
"""

from __future__ import annotations

import copy
from functools import cache as memoize

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.errors import CapacityError
from sinks.models.attach import attach
from sinks.models.families import describe
from tests.families.cases import CASES, OWN, TRAINED
from tests.families.feeding import feed, feed_masked, left_padded, odd_chunks, one_by_one
from tests.families.tiny import build, exactly, tokens
from tests.oracle.restream import frozen_at, restream
from tests.oracle.streaming_llm import visible

SINKS = 3
EXACT = 1e-9
FLOAT32 = 2.0**-24

NAMES = [name for name in CASES if name != "mistral_window"]  # every layer keeps its own window: see below
WINDOWS = {name: 7 + index % 7 for index, name in enumerate(NAMES)}  # 7..13, every value met by some eight cases


def ways(length: int) -> dict[str, list[int]]:
    return {
        "token by token": one_by_one(length),
        "odd chunks": odd_chunks(length, seed=1),
        "other chunks": odd_chunks(length, seed=2),
        "all at once": [length],
    }


def slack(name: str, model: PreTrainedModel, ids: Tensor, capacity: int) -> float:
    """How far a stream of case `name` may be from the exact answer (see the module's docstring)."""
    if not CASES[name].rounds:
        return EXACT
    exact = frozen_at(model, capacity)
    short = ids[:, :capacity]
    stock_logits = model(input_ids=short).logits
    with exactly():
        error = (stock_logits - exact(input_ids=short).logits).abs().max().item()
    return 2 * error + FLOAT32 * stock_logits.abs().max().item()


def assert_close(got: Tensor, expected: Tensor, atol: float, what: str) -> None:
    worst = (got - expected).abs().flatten(1).max(dim=1).values if got.ndim > 1 else (got - expected).abs()
    assert worst.max() <= atol, f"{what}: off by {worst.max():.2e} > {atol:.1e}, worst at index {int(worst.argmax())}"


@memoize
def stock(name: str, layers: int) -> PreTrainedModel:
    return build(name, layers=layers)


def attached(name: str, layers: int) -> PreTrainedModel:
    return attach(copy.deepcopy(stock(name, layers)))


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].own is None])
def test_one_layer_equals_fresh_forward_over_what_is_kept(name: str) -> None:
    window = WINDOWS[name]
    capacity = SINKS + window
    length = 3 * capacity + 5
    ids = tokens(length)
    plain = stock(name, 1)
    exact = frozen_at(plain, capacity)
    checked = sorted({capacity - 1, capacity, capacity + 1, 2 * capacity, 3 * capacity - 1, length - 1})
    rows = torch.stack([ids[0, visible(t + 1, SINKS, window)] for t in checked])
    with exactly():
        fresh = exact(input_ids=rows).logits[:, -1]
    fresh_stock = plain(input_ids=rows).logits[:, -1]
    atol = slack(name, plain, ids, capacity)
    model = attached(name, 1)
    for way, sizes in ways(length).items():
        cache = SinkCache.for_model(model, sinks=SINKS, window=window)
        logits = feed(model, cache, ids, sizes)[0, checked]
        assert_close(logits, fresh, atol, f"{name}, {way}")
        # ... and the stock model itself, within the error that it has
        stock_error = (fresh_stock - fresh).abs().max().item()
        assert_close(logits, fresh_stock, atol + stock_error, f"{name}, {way}, stock")


@pytest.mark.parametrize("name", NAMES)
def test_three_layers_in_any_chunks_equal_the_oracle(name: str) -> None:
    window = WINDOWS[name]
    capacity = SINKS + window
    length = 3 * capacity + 5
    ids = tokens(length, seed=1)
    plain = stock(name, 3)
    expected = restream(plain, ids[0].tolist(), SINKS, window)
    atol = slack(name, plain, ids, capacity)
    model = attached(name, 3)
    got = {}
    for way, sizes in ways(length).items():
        cache = SinkCache.for_model(model, sinks=SINKS, window=window)
        got[way] = feed(model, cache, ids, sizes)[0]
        assert_close(got[way], expected, atol, f"{name}, {way}")
        assert cache.seen == [length]
        assert cache.get_seq_length() == length
        assert cache.visible() == visible(length, SINKS, window)
    for way, logits in got.items():
        assert_close(logits, got["token by token"], EXACT, f"{name}, {way} against token by token")


@pytest.mark.parametrize("name", NAMES)
def test_before_eviction_it_is_dense_attention(name: str) -> None:
    window = WINDOWS[name]
    capacity = SINKS + window
    ids = tokens(capacity, batch=2, seed=2)
    plain = stock(name, 2)
    exact = frozen_at(plain, capacity)
    with exactly():
        dense = exact(input_ids=ids).logits
    atol = slack(name, plain, ids, capacity)
    model = attached(name, 2)
    for way, sizes in ways(capacity).items():
        cache = SinkCache.for_model(model, sinks=SINKS, window=window)
        assert_close(feed(model, cache, ids, sizes), dense, atol, f"{name}, {way}")


@pytest.mark.parametrize("name", NAMES)
def test_each_row_of_a_ragged_batch_gets_what_it_gets_alone(name: str) -> None:
    window = WINDOWS[name]
    lengths = [5, 2 * (SINKS + window) + 3, SINKS + window - 1]
    rows = [tokens(length, seed=10 + length)[0].tolist() for length in lengths]
    ids, mask = left_padded(rows)
    model = attached(name, 2)
    alone = [
        feed(model, SinkCache.for_model(model, sinks=SINKS, window=window), torch.tensor([r]), [len(r)]) for r in rows
    ]
    for way, sizes in ways(ids.shape[1]).items():
        cache = SinkCache.for_model(model, sinks=SINKS, window=window)
        together = feed_masked(model, cache, ids, mask, sizes)
        assert cache.seen == lengths
        for row, length in enumerate(lengths):
            assert_close(together[row, -length:], alone[row][0], EXACT, f"{name}, {way}, row {row}")
            assert cache.visible(row) == visible(length, SINKS, window)


@pytest.mark.parametrize("name", NAMES)
def test_sinks_are_not_ignored(name: str) -> None:
    """The option changes the logits after eviction and not before."""
    capacity = SINKS + 8
    length = 2 * capacity
    ids = tokens(length, seed=3)
    model = attached(name, 2)
    with_sinks = feed(model, SinkCache.for_model(model, sinks=SINKS, window=8), ids, [length])[0]
    without = feed(model, SinkCache.for_model(model, sinks=0, window=capacity), ids, [length])[0]
    difference = (with_sinks - without).abs().amax(dim=-1)
    atol = 2 * slack(name, stock(name, 2), ids, capacity)
    assert difference[:capacity].max() <= atol
    assert difference[capacity:].min() > 1e-3


@pytest.mark.parametrize("own", [1, 2, 6, 7, 8, 9, 10, 11])
@pytest.mark.parametrize("name", ["qwen2_window", "gemma3_text_window", "cohere2_window", "gpt_oss_window"])
def test_own_window_around_the_capacity(name: str, own: int) -> None:
    """Below sinks + window = 10 a layer keeps its own last tokens and no sinks; from 10 on it follows the rule."""
    window, length = 7, 34
    ids = tokens(length, seed=4)
    plain = build(name, layers=2, sliding_window=own)
    expected = restream(plain, ids[0].tolist(), SINKS, window)
    atol = slack(name, plain, ids, SINKS + window)
    model = attach(copy.deepcopy(plain))
    for way, sizes in ways(length).items():
        cache = SinkCache.for_model(model, sinks=SINKS, window=window)
        assert_close(feed(model, cache, ids, sizes)[0], expected, atol, f"{name}, own window {own}, {way}")


def test_own_windows_in_every_layer_leave_no_room_for_sinks() -> None:
    """Then `sinks=` could only be ignored, so it is refused; from the capacity on the same model streams."""
    model = attached("mistral_window", 2)
    with pytest.raises(CapacityError, match="own sliding window"):
        SinkCache.for_model(model, sinks=SINKS, window=OWN)
    plain = stock("mistral_window", 2)
    ids = tokens(30, seed=8)
    cache = SinkCache.for_model(model, sinks=SINKS, window=OWN - SINKS)
    got = feed(model, cache, ids, odd_chunks(30))[0]
    assert_close(got, restream(plain, ids[0].tolist(), SINKS, OWN - SINKS), EXACT, "mistral, capacity 5, own window 5")


def test_longrope_frequencies_are_those_of_the_capacity() -> None:
    """Original length 8: capacity 8 takes the short factors for ever, capacity 9 the long ones from the first token."""
    ids = tokens(40, seed=5)
    plain = stock("phi3_longrope_long", 2)
    model = attached("phi3_longrope_long", 2)
    short, long = (describe(model).rotaries(capacity)["all"].inv_freq for capacity in (8, 9))
    assert not torch.equal(short, long)
    for window in (5, 6):
        expected = restream(plain, ids[0].tolist(), SINKS, window)
        got = feed(model, SinkCache.for_model(model, sinks=SINKS, window=window), ids, odd_chunks(40))
        assert_close(got[0], expected, EXACT, f"window {window}")
    # one and the same attached model serves both, interleaved
    caches = {window: SinkCache.for_model(model, sinks=SINKS, window=window) for window in (5, 6)}
    pieces: dict[int, list[Tensor]] = {5: [], 6: []}
    for chunk in ids.split(7, dim=1):
        for window, cache in caches.items():
            pieces[window].append(model(input_ids=chunk, past_key_values=cache).logits[0])
    for window, logits in pieces.items():
        assert_close(torch.cat(logits), restream(plain, ids[0].tolist(), SINKS, window), EXACT, f"interleaved {window}")


def test_dynamic_ntk_beyond_the_trained_length_is_frozen_or_refused() -> None:
    """Never anything between: either the capacity is refused, or every token has the frequencies of that capacity."""
    window = TRAINED + 5
    capacity = SINKS + window
    plain = stock("llama_dynamic", 1)
    model = attached("llama_dynamic", 1)
    ids = tokens(2 * capacity, seed=6)
    try:
        cache = SinkCache.for_model(model, sinks=SINKS, window=window)
        logits = feed(model, cache, ids, odd_chunks(ids.shape[1]))[0]
    except CapacityError:
        return
    for t in (capacity - 1, capacity, ids.shape[1] - 1):
        reference = copy.deepcopy(plain)  # fresh: the stock module remembers the longest length that it met
        fresh = reference(input_ids=ids[:, visible(t + 1, SINKS, window)]).logits[0, -1]
        assert_close(logits[t], fresh, 1e-5, f"t = {t}")


def test_the_table_names_every_family_that_is_tested_here() -> None:
    from sinks.models.families import FAMILIES, REFUSED

    for name, case in CASES.items():
        assert case.model_type in FAMILIES, f"{name}: {case.model_type} is tested but not in the table"
        assert case.model_type not in REFUSED
    assert OWN < min(WINDOWS.values())


@pytest.mark.parametrize("name", ["gpt_neox", "glm4", "gptj", "bloom", "deepseek_v3", "gemma3_text"])
def test_a_stream_may_start_anywhere(name: str) -> None:
    """Positions far beyond float32's integers give the same logits: phases, not angles, are what grows."""
    window = WINDOWS[name]
    length = 2 * (SINKS + window) + 5
    ids = tokens(length, seed=7)
    model = attached(name, 2)
    atol = slack(name, stock(name, 2), ids, SINKS + window)
    reference = feed(model, SinkCache.for_model(model, sinks=SINKS, window=window), ids, [length])[0]
    for start in (2**31 - 20, 2**33):
        for sizes in (one_by_one(length), odd_chunks(length)):
            cache = SinkCache.for_model(model, sinks=SINKS, window=window, start=start)
            got = feed(model, cache, ids, sizes)[0]
            assert_close(got, reference, max(atol, EXACT), f"{name}, start {start}")
