"""Caches that sit in a pool against caches of their own, to the last bit; and a step over their seats."""

from __future__ import annotations

import gc

import pytest
import torch

from sinks.cache.cache import KINDS, SinkCache
from sinks.cache.group import Group
from sinks.cache.pool import Pool, away
from sinks.cache.snapshot import read_snapshot, write_snapshot
from sinks.errors import CacheError, InvalidInput, UnsupportedOption
from sinks.models.attach import attach
from tests.cache.standin import standing_in
from tests.families.tiny import build, tokens

FAMILIES = ["llama", "gemma2", "gpt_oss", "bloom", "deepseek_v3", "gemma3_text"]
SIZES = {"sinks": 3, "window": 9}


def fed(model, cache, sizes, seed=0):
    """Logits of chunks of these sizes."""
    ids, found, at = tokens(sum(sizes), seed=seed), [], 0
    for size in sizes:
        found.append(model(input_ids=ids[:, at : at + size], past_key_values=cache, use_cache=True).logits)
        at += size
    return torch.cat(found, dim=1)


def same(one: SinkCache, other: SinkCache) -> None:
    """Equal to the last bit."""
    mine, theirs = one.dump(), other.dump()
    assert mine.keys() == theirs.keys() and one.seen == other.seen
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_seat_is_a_cache_of_its_own_to_the_last_bit(family, kind):
    """Chunks, steps, a fork, a reset and a second stream in the same seat, which finds nothing of the first."""
    model = attach(build(family, layers=2))
    pool, alone = Pool(model, 2, **SIZES, cache=kind), SinkCache.for_model(model, **SIZES, cache=kind)
    neighbour, cache = pool.take(), pool.take()
    fed(model, neighbour, [30], seed=9)
    places = [part.data_ptr() for layer in pool._parts for part in layer.values()]
    for sizes in ([5, 1, 1, 20, 1], [2, 1]):
        assert torch.equal(fed(model, cache, sizes), fed(model, alone, sizes))
        same(cache, alone)
        assert cache.nbytes == alone.nbytes == pool.nbytes // 2
        cache.reset()
        alone.reset()
    assert [part.data_ptr() for layer in pool._parts for part in layer.values()] == places
    untouched = SinkCache.for_model(model, **SIZES, cache=kind)
    fed(model, untouched, [30], seed=9)
    same(neighbour, untouched)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_forks_snapshots_and_what_is_put_away_are_the_same_moment(kind, tmp_path):
    model = attach(build("llama", layers=2))
    pool, alone = Pool(model, 1, **SIZES, cache=kind), SinkCache.for_model(model, **SIZES, cache=kind)
    cache = pool.take()
    for each in (cache, alone):
        fed(model, each, [17])
    twin = cache.fork()
    assert twin.seat is None
    write_snapshot(tmp_path / "seated", cache, "print", {})
    write_snapshot(tmp_path / "alone", alone, "print", {})
    assert (tmp_path / "seated").stat().st_size == (tmp_path / "alone").stat().st_size
    hosted = away(cache)
    assert pool.free == 1 and cache.seen == [] and cache.seat is None
    stranger = pool.take()
    fed(model, stranger, [30], seed=5)
    stranger.leave()
    for again in (pool.put(hosted), twin, read_snapshot(tmp_path / "seated", model, "print")[0]):
        other = alone.fork()
        same(again, other)
        assert torch.equal(fed(model, again, [4, 1], seed=2), fed(model, other, [4, 1], seed=2))
        again.leave()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 5])
@torch.inference_mode()
def test_a_step_over_seats_is_the_step_of_each(kind, start):
    """A stand-in over the tensors of the seats: ragged rows in any order, one of them not begun, two of them idle."""
    model = attach(build("llama", layers=2))
    pool = Pool(model, 5, **SIZES, start=start, cache=kind)
    lengths = (1, 11, 12, 40)
    seated = [pool.take() for _ in range(5)][::-1]
    alone = [SinkCache.for_model(model, **SIZES, start=start, cache=kind) for _ in seated]
    for caches in (seated, alone):
        for n, length in enumerate(lengths):
            fed(model, caches[n], [length], seed=n)
    for at in range(6):
        ids = tokens(1, batch=7, seed=50 + at)
        with standing_in(model) as taken:
            told = model(input_ids=ids, past_key_values=Group(seated, idle=2), use_cache=True).logits
        (seating,) = taken
        assert seating.seats is pool.seats and list(seating.rows)[:5] == [4, 3, 2, 1, 0]
        assert list(seating.positions) == [*(length + at for length in lengths), at, -1, -1]
        for row, cache in enumerate(alone):
            expected = model(input_ids=ids[row : row + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(told[row : row + 1], expected, rtol=0, atol=1e-9 if kind == "full" else 1e-6)
            assert seated[row].seen == cache.seen


@torch.inference_mode()
def test_a_cache_of_its_own_lays_its_rows_open():
    model = attach(build("llama", layers=2))
    cache, other = (SinkCache.for_model(model, **SIZES) for _ in range(2))
    assert cache.seats is None and "read nothing" in str(cache.why_no_seats())
    ids = tokens(30, batch=2)
    for each in (cache, other):
        model(input_ids=ids[:, :20], past_key_values=each, use_cache=True)
    seats = cache.seats
    for at in range(20, 24):
        with standing_in(model) as taken:
            told = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        assert taken[0].seats is seats and (list(taken[0].rows), list(taken[0].positions)) == ([0, 1], [at, at])
        expected = model(input_ids=ids[:, at : at + 1], past_key_values=other, use_cache=True).logits
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-9)
    cache.batch_repeat_interleave(2)
    assert cache.seats is not seats and cache.seats.rings[0][0].data_ptr() == cache.rings[0].keys.data_ptr()
    cache.adopt({name: part.clone() for name, part in cache.dump().items()})
    assert cache.seats.rings[0][0].data_ptr() == cache.rings[0].keys.data_ptr()


@pytest.mark.parametrize(
    ("family", "reason"), [("bloom", "ALiBi"), ("deepseek_v3", "different widths"), ("gemma3_text", None)]
)
@torch.inference_mode()
def test_what_cannot_be_laid_open_says_why(family, reason):
    model = attach(build(family, layers=2))
    pool, cache = Pool(model, 1, **SIZES), SinkCache.for_model(model, **SIZES)
    fed(model, cache, [5])
    for said in (pool.reason, pool.take().why_no_seats(), cache.why_no_seats()):
        assert said is None if reason is None else reason in said
    assert (pool.seats is None) == (cache.seats is None) == (reason is not None)


@torch.inference_mode()
def test_no_seats_for_pads_chunks_or_caches_from_elsewhere():
    model = attach(build("llama", layers=2))
    pool, other = Pool(model, 3, **SIZES), Pool(model, 1, **SIZES)
    cache, stranger, own = pool.take(), other.take(), SinkCache.for_model(model, **SIZES)
    own.open_pass(model.model, (2, 1), torch.tensor([[True], [False]]), None)
    assert own.step_seats() is None
    assert cache.step_seats() is None, "no pass is open"
    cache.open_pass(model.model, (1, 2), None, None)
    assert cache.step_seats() is None
    for company in (stranger, SinkCache.for_model(model, **SIZES)):
        group = Group([pool.take(), company])
        group.open_pass(model.model, (2, 1), None, None)
        assert group.step_seats() is None


@torch.inference_mode()
def test_seats_are_given_back_once_and_found_when_they_are_dropped():
    model = attach(build("llama", layers=2))
    pool = Pool(model, 2, **SIZES)
    one, two = pool.take(), pool.take()
    with pytest.raises(CacheError, match="2 seats are taken"):
        pool.take()
    with pytest.raises(InvalidInput, match="a seat for one row"):
        model(input_ids=tokens(3, batch=2), past_key_values=one)
    with pytest.raises(UnsupportedOption, match="one row"):
        one.batch_repeat_interleave(2)
    one.leave()
    one.leave()
    assert pool.free == 1
    fed(model, one, [4])
    assert one.seat is None and one.nbytes == pool.nbytes // 2 and pool.free == 1
    two.close_pass(False)
    del two
    gc.collect()
    assert pool.free == 2


@torch.inference_mode()
def test_what_does_not_fit_a_seat_is_refused_and_takes_none():
    model, narrow = attach(build("llama", layers=2)), attach(build("llama", layers=2, dtype=torch.float32))
    pool = Pool(model, 1, **SIZES)
    for wrong in (SinkCache.for_model(model, sinks=3, window=8), SinkCache.for_model(model, **SIZES, start=1)):
        with pytest.raises(InvalidInput, match="make a pool of its sizes"):
            pool.put(wrong)
    single = SinkCache.for_model(narrow, **SIZES)
    fed(narrow, single, [4])
    with pytest.raises(InvalidInput, match="do not fit a seat"):
        pool.put(single)
    with pytest.raises(InvalidInput, match="size=0"):
        Pool(model, 0)
    assert pool.free == 1
