"""The int8 ring: its error bound from arithmetic, and one stream by a second route, over numbers decoded elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinks.cache.cache import SinkCache
from sinks.cache.fingerprint import fingerprint
from sinks.cache.rings.quantized import encode
from sinks.cache.snapshot import read_snapshot, write_snapshot
from sinks.errors import CacheError, InvalidInput
from sinks.kernels.lens import Lens, Sight
from sinks.models.attach import attach
from sinks.models.observe import observe
from tests.families.cases import HEAD_DIM, HEADS, KV_HEADS
from tests.families.feeding import feed, feed_masked, left_padded, odd_chunks, one_by_one
from tests.families.tiny import build, tokens

SINKS, WINDOW, LENGTH = 3, 9, 40
CLOSE = {"rtol": 0, "atol": 1e-9}
ONE = attach(build("llama", layers=1))
TWO = attach(build("llama", layers=2))


def int8_cache(model: Any = TWO, sinks: int = SINKS, window: int = WINDOW) -> SinkCache:
    return SinkCache.for_model(model, sinks=sinks, window=window, cache="int8")


# The code


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_number_is_at_most_half_a_scale_away(dtype: torch.dtype) -> None:
    """|x / scale - code| <= 1/2, and scale = largest / 127; float32 rounds scale and quotient by 2^-24 each."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 3, 50, 16, generator=generator, dtype=torch.float64)
    heads[..., 5] *= 60  # a massive dimension, as real keys have
    heads[0, 0, :10] *= torch.logspace(-4, 2, 10, dtype=torch.float64)[:, None]
    heads = heads.to(dtype)
    codes, scales = encode(heads)
    exact = heads.double()
    largest = exact.abs().amax(dim=-1, keepdim=True)
    away = (codes.double() * scales.double() - exact).abs()
    assert (scales.double() - largest / 127).abs().le(2**-23 * largest / 127).all()
    assert (away <= largest / 254 * (1 + 127 * 2**-21)).all()
    assert codes.abs().amax(dim=-1).eq(127).all(), "the whole range is used"
    assert away.max() > 0.4 * (largest / 127).min()


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    heads = torch.zeros(1, 1, 4, 8)
    heads[0, 0, 1, 3], heads[0, 0, 2, 3], heads[0, 0, 3, 3] = torch.nan, torch.inf, 1e-38
    codes, scales = encode(heads)
    decoded = codes * scales
    assert decoded[0, 0, 0].eq(0).all()
    assert not decoded[0, 0, 1:3].isfinite().all(dim=-1).any()
    assert decoded[0, 0, 3].isfinite().all()


# The stream, by a second route


def rounded(row: np.ndarray) -> np.ndarray:
    """One token of one head, through int8 and back, in float64 but for the scale, which is kept in float32."""
    scale = float(np.float32(np.abs(row).max() / 127))
    return np.clip(np.rint(row / scale), -127, 127) * scale


def turned(row: np.ndarray, position: int, inv_freq: np.ndarray) -> np.ndarray:
    """RoPE in complex numbers."""
    half = len(row) // 2
    spun = (row[:half] + 1j * row[half:]) * np.exp(1j * position * inv_freq)
    return np.concatenate((spun.real, spun.imag))


def by_hand(query: Tensor, key: Tensor, value: Tensor, inv_freq: np.ndarray, scale: float) -> np.ndarray:
    """Plain softmax attention of each query over what it sees: sinks as they are, recent keys and values rounded."""
    length = query.shape[1]
    out = np.empty(query.shape)
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        for t in range(length):
            place = min(t, SINKS + WINDOW - 1)
            seen = [j for j in range(t + 1) if j < SINKS or t - j < WINDOW]
            scores, values = [], []
            for j in seen:
                kept = turned(key[kv, j].numpy(), j, inv_freq)
                asking = turned(query[head, t].numpy(), place if j < SINKS else t, inv_freq)
                scores.append(scale * asking @ (kept if j < SINKS else rounded(kept)))
                values.append(value[kv, j].numpy() if j < SINKS else rounded(value[kv, j].numpy()))
            weights = np.exp(np.array(scores) - max(scores))
            out[head, t] = weights @ np.array(values) / weights.sum()
    return out


@pytest.mark.parametrize("sizes", [one_by_one(LENGTH), odd_chunks(LENGTH), [LENGTH], [2, 2, 20, 1, 1, 14]])
def test_attention_is_the_reference_over_decoded_keys_and_values(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    heads = [torch.randn(n, LENGTH, HEAD_DIM, generator=generator, dtype=torch.float64) for n in shapes]
    rotary: Any = ONE.model.rotary_emb
    expected = by_hand(*heads, rotary.inv_freq.double().numpy(), HEAD_DIM**-0.5)
    cache, parts, begin = int8_cache(ONE), [], 0
    for size in sizes:
        here = [each[None, :, begin : begin + size] for each in heads]
        cache.open_pass(ONE.base_model, (1, size), None, None)
        parts.append(cache.attend(0, *here, scale=HEAD_DIM**-0.5, softcap=None, sink_logits=None))
        cache.close_pass(True)
        begin += size
    np.testing.assert_allclose(torch.cat(parts, dim=2)[0].numpy(), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "bloom", "phi3", "cohere"])
def test_any_chunks_give_the_same_stream(name: str) -> None:
    model = attach(build(name, layers=2))
    ids = tokens(LENGTH)
    expected = feed(model, int8_cache(model), ids, one_by_one(LENGTH))
    atol = 1e-9 if name == "llama" else 1e-4  # others round in float32 on the way, which can tip a code over
    for sizes in ([LENGTH], odd_chunks(LENGTH), [SINKS + WINDOW, 1, 1, LENGTH - SINKS - WINDOW - 2]):
        got = feed(model, int8_cache(model), ids, sizes)
        assert (got - expected).abs().max() < atol, sizes
    full = feed(model, SinkCache.for_model(model, sinks=SINKS, window=WINDOW), ids, [LENGTH])
    assert 1e-6 < (full - expected).abs().max() < 0.5, "rounded, and not by much"


@pytest.mark.parametrize(("sinks", "window"), [(0, 7), (4, 1), (0, 1), (12, 2)])
def test_odd_sizes(sinks: int, window: int) -> None:
    ids = tokens(LENGTH)
    expected = feed(TWO, int8_cache(TWO, sinks, window), ids, one_by_one(LENGTH))
    torch.testing.assert_close(feed(TWO, int8_cache(TWO, sinks, window), ids, odd_chunks(LENGTH)), expected, **CLOSE)


def test_sinks_are_not_rounded() -> None:
    """As long as there is nothing but sinks, the stream is that of full precision, to the last bit."""
    ids = tokens(6)
    full, coded = SinkCache.for_model(TWO, sinks=6, window=4), int8_cache(TWO, 6, 4)
    assert torch.equal(feed(TWO, coded, ids, [4, 1, 1]), feed(TWO, full, ids, [4, 1, 1]))


def test_each_row_of_a_ragged_batch_is_what_it_is_alone() -> None:
    rows = [tokens(length, seed=length)[0].tolist() for length in (31, 12, 2)]
    ids, mask = left_padded(rows)
    both = feed_masked(TWO, int8_cache(), ids, mask, [16, 1, 1, 13])
    for row, alone in enumerate(rows):
        expected = feed(TWO, int8_cache(), torch.tensor([alone]), [len(alone)])[0]
        torch.testing.assert_close(both[row, 31 - len(alone) :], expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_data_types(dtype: torch.dtype) -> None:
    """The rounding of the model's own data type, and of a code that it tips over, is all that chunks may differ by."""
    model = attach(build("llama", layers=2, dtype=dtype))
    ids = tokens(LENGTH)
    singly = feed(model, int8_cache(model), ids, one_by_one(LENGTH))
    once = feed(model, int8_cache(model), ids, [LENGTH])
    full = feed(model, SinkCache.for_model(model, sinks=SINKS, window=WINDOW), ids, [LENGTH])
    assert once.dtype == dtype
    assert (once - singly).abs().max() <= 16 * torch.finfo(dtype).eps * full.abs().max() + 0.05
    assert (once - full).abs().max() < 0.5


# What it holds


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.27), (torch.bfloat16, 0.54)])
def test_memory_is_counted_to_the_byte(dtype: torch.dtype, share: float) -> None:
    model = attach(build("llama", layers=2, dtype=dtype, head_dim=64, max_position_embeddings=256))
    full, coded = (SinkCache.for_model(model, sinks=4, window=252, cache=kind) for kind in ("full", "int8"))
    for cache in (full, coded):
        assert cache.nbytes == 0
        for part in tokens(600, 2).split([1, 299, 300], dim=1):
            model(part, past_key_values=cache)
    each = 2 * 2 * KV_HEADS * 2  # rows, layers, heads, keys and values
    assert full.nbytes == each * 256 * 64 * dtype.itemsize
    assert coded.nbytes == each * (4 * 64 * dtype.itemsize + 252 * (64 + 4))
    assert coded.nbytes < (share + 0.02) * full.nbytes
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in coded.dump().values()}
    held = sum(each.nbytes() for name, each in storages.items())
    assert coded.nbytes <= held <= coded.nbytes + 100, "what is held is no view of something larger"


# What may be done with it


def fed(length: int = 25, rows: int = 1, model: Any = TWO) -> SinkCache:
    cache = int8_cache(model)
    model(tokens(length, rows), past_key_values=cache)
    return cache


def go_on(cache: SinkCache, rows: int = 1) -> Tensor:
    return feed(TWO, cache, tokens(20, rows, seed=9), [4, 1, 1, 14])


@pytest.mark.parametrize("length", [1, 7, 25])
def test_a_snapshot_goes_on_bit_for_bit_and_knows_its_kind(length: int, tmp_path: Path) -> None:
    cache, model_print = fed(length, 2), fingerprint(TWO)
    write_snapshot(tmp_path / "s", cache, model_print, {"beside.it": torch.arange(3)})
    again, extras = read_snapshot(tmp_path / "s", TWO, model_print)
    assert (again.kind, again.nbytes, list(extras)) == ("int8", cache.nbytes, ["beside.it"])
    assert torch.equal(go_on(again, 2), go_on(cache, 2))


def test_an_int8_snapshot_is_smaller(tmp_path: Path) -> None:
    model = attach(build("llama", layers=2, head_dim=64, dtype=torch.float32, max_position_embeddings=256))
    for kind in ("full", "int8"):
        cache = SinkCache.for_model(model, sinks=4, window=252, cache=kind)
        model(tokens(300), past_key_values=cache)
        write_snapshot(tmp_path / kind, cache, fingerprint(model), {})
    assert (tmp_path / "int8").stat().st_size < 0.3 * (tmp_path / "full").stat().st_size


def test_forks_and_copies_share_nothing() -> None:
    cache = fed(rows=2)
    twins = [cache.fork(), copy.deepcopy(cache)]
    assert [twin.kind for twin in twins] == ["int8", "int8"]
    storages = [{part.untyped_storage().data_ptr() for part in each.dump().values()} for each in (cache, *twins)]
    assert not storages[0] & storages[1] and not storages[0] & storages[2]
    first = go_on(cache, 2)
    assert all(torch.equal(go_on(twin, 2), first) for twin in twins)


def test_rows_are_chosen() -> None:
    cache, chosen = fed(rows=3), fed(rows=3)
    chosen.reorder_cache(torch.tensor([2, 0, 2]))
    ids = tokens(10, 3, seed=4)
    expected = TWO(ids, past_key_values=cache).logits
    got = TWO(ids[[2, 0, 2]], past_key_values=chosen).logits
    torch.testing.assert_close(got, expected[[2, 0, 2]], **CLOSE)


def test_reset_gives_the_memory_back() -> None:
    cache = fed()
    first = go_on(fed())
    cache.reset()
    assert cache.nbytes == 0
    with pytest.raises(CacheError, match="not been fed"):
        cache.rings[0].parts  # noqa: B018 (a property that raises)
    TWO(tokens(25), past_key_values=cache)
    assert torch.equal(go_on(cache), first)


def test_decoded_numbers_are_not_taken_for_the_ring_itself() -> None:
    ring = fed().rings[0]
    with pytest.raises(CacheError, match="take `parts`, or `decoded`"):
        ring.held  # noqa: B018 (a property that raises)


def test_other_kinds_are_refused(unchecked: None) -> None:
    with pytest.raises(InvalidInput, match="cache='int4' is unknown: choose one of full, int8"):
        SinkCache.for_model(TWO, cache="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("sinks", [0, SINKS])
def test_the_tensors_of_another_kind_or_size_are_refused(sinks: int) -> None:
    full, coded = (SinkCache.for_model(TWO, sinks=sinks, window=WINDOW, cache=kind) for kind in ("full", "int8"))
    for cache in (full, coded):
        TWO(tokens(25), past_key_values=cache)
    states = full.dump(), coded.dump()
    with pytest.raises(InvalidInput, match="no state of this SinkCache"):
        full.adopt(states[1])
    with pytest.raises(InvalidInput, match="no state of this SinkCache"):
        coded.adopt(states[0])
    for name, change in (
        ("key_codes.1", lambda held: held[:, :, :5]),
        ("key_codes.0", lambda held: held.int()),
        ("value_scales.0", lambda held: held[..., 0]),
        ("value_scales.0", lambda held: held.double()),
        ("sink_keys.0", lambda held: held[:, :1]),
        ("sink_values.1", lambda held: held[0]),
        ("sink_values.0", lambda held: torch.cat((held, held))),
    ):
        other = int8_cache(TWO, sinks)
        with pytest.raises(InvalidInput, match="do not fit an int8 ring of"):
            other.adopt(states[1] | {name: change(states[1][name])})
        assert other.nbytes == 0


@pytest.mark.parametrize("sizes", [[20, 1, 1, 18], one_by_one(LENGTH)])
def test_it_can_be_watched_and_stays_what_it_is(sizes: list[int]) -> None:
    ids, sights = tokens(LENGTH), []
    plain = feed(TWO, int8_cache(), ids, sizes)
    with observe(TWO, Lens(see=sights.append)):
        watched_cache = int8_cache()
        watched = feed(TWO, watched_cache, ids, sizes)
    torch.testing.assert_close(watched, plain, **CLOSE)
    last: Sight = next(sight for sight in reversed(sights) if sight.view.layer == 1)
    if sizes[-1] == 1:
        assert torch.equal(last.key, watched_cache.rings[1].decoded[0]), "what is seen is the decoded ring"
