"""Engines whose slots are seats of a pool, as on a GPU, with a stand-in for the captured step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sinks.errors import EngineError, QueueFull
from sinks.models.step.slots import Seating
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.rows import row as room
from sinks.stream.sampling import Sampling
from tests.cache.standin import standing_in
from tests.stream.engine.rows import PROMPTS, RARE, alone, engine, failing_on, spans
from tests.stream.opened import IDS, SINKS, WARM, WINDOW, opened, tiny_loaded


@pytest.fixture(autouse=True)
def seats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "takes_seats", lambda model: True)


@pytest.fixture
def captured() -> Iterator[list[Seating]]:
    with standing_in(tiny_loaded().model) as taken:
        yield taken


def plain_alone(prompt: object, count: int, **options: object) -> str:
    """What a session of its own says, without the stand-in."""
    model = tiny_loaded().model
    forward = model.__dict__.pop("forward", None)
    try:
        return alone(prompt, count, **options)
    finally:
        if forward is not None:
            model.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=1.0, seed=5, repetition_penalty=1.2)])
def test_every_row_says_what_it_says_alone(slots, sampling, captured):
    together = engine(slots)
    requests = [together.submit(prompt, max_tokens=10 + n, sampling=sampling) for n, prompt in enumerate(PROMPTS)]
    together.run()
    for n, (request, prompt) in enumerate(zip(requests, PROMPTS, strict=True)):
        assert request.text() == plain_alone(prompt, 10 + n, sampling=sampling)
    assert len({id(seating.seats) for seating in captured}) == 1
    assert together._ground.pool.free == slots


def test_more_streams_than_seats_take_turns_through_the_host(captured):
    """Six streams that stay, two seats, in any order: each goes on where it was, whoever sat in its seat meanwhile."""
    together = engine(2)
    streams, sessions = [together.join() for _ in range(6)], [opened() for _ in range(6)]
    for turn, order in enumerate([range(6), (5, 0, 3), (3, 3, 1, 2, 4), range(6)]):
        requests, expected = [], []
        for n in order:
            given, count = IDS[n + turn : n + turn + 7 + 3 * n], 4 + n
            requests.append(streams[n].submit(given, max_tokens=count, sampling=WARM))
            sessions[n].feed(given)
            expected.append("".join(sessions[n].generate(count, sampling=WARM)))
        together.run()
        assert [request.text() for request in requests] == expected
        assert together.held == 2 and together.waiting == 0
    for stream, session in zip(streams, sessions, strict=True):
        assert (stream.seen, stream.evicted, stream.spans) == (session.seen, session.evicted, spans(session))
    assert sum(stream.row is not None for stream in streams) == 2
    pool = together._ground.pool
    assert pool.free == 0 and together.nbytes == pool.nbytes
    for stream in streams:
        stream.leave()
    assert pool.free == 2 and together.held == 0


def test_who_rested_longest_is_put_away_and_nobody_who_works():
    together = engine(2)
    first, second, third = (together.join() for _ in range(3))
    for stream in (first, second):
        stream.submit(IDS[:9], max_tokens=2).text()
    first.submit(max_tokens=1).text()
    working = second.submit(max_tokens=30)
    together.step()
    third.submit(IDS[:3], max_tokens=1).text()
    assert (first.row, third.row is None, working.finish) == (None, False, None)
    other = third.submit(max_tokens=40)
    waits = first.submit(max_tokens=1)
    for _ in range(5):
        together.step()
    assert waits.tokens == 0 and together.waiting == 1, "both seats work"
    together.run()
    assert waits.tokens == 1 and other.tokens == 40 and working.tokens == 30


def test_what_was_put_away_is_saved_forked_joined_and_parked_in_a_file(tmp_path: Path, captured):
    together, session = engine(1), opened()
    session.feed(IDS[:30])
    expected = "".join(session.generate(25, sampling=WARM))
    stream = together.join()
    said = stream.submit(IDS[:30], max_tokens=5, sampling=WARM).text()
    stream.park()
    assert together.held == 0 and stream.row is None and stream.seen == 35
    assert together._ground.pool.free == 1
    stream.save(tmp_path / "saved")
    twin = stream.fork()
    assert twin.row is not None and stream.row is None
    again = opened()
    again.load(tmp_path / "saved")
    rest = expected[len(said) :]
    assert "".join(again.generate(20, sampling=WARM)) == rest
    resumed = together.resume(tmp_path / "saved")
    for each in (twin, stream, resumed):
        assert each.submit(max_tokens=20, sampling=WARM).text() == rest
    stream.park(tmp_path / "parked")
    assert stream.row is None and stream.seen == 0
    assert twin.seen == resumed.seen == 55


def test_a_full_engine_puts_away_for_who_joins_unless_all_work():
    together, session = engine(1), opened()
    session.feed(IDS[:20])
    stream = together.join(session)
    twin = stream.fork()
    assert stream.row is None and twin.row is not None
    working = twin.submit(max_tokens=9)
    together.step()
    for more in (lambda: together.join(session), stream.fork):
        with pytest.raises(QueueFull, match="1 slots are taken"):
            more()
    with pytest.raises(EngineError, match="is running"):
        twin.park()
    assert working.text() == "".join(session.generate(9))
    assert together._ground.pool.free == 0 and together.held == 1


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_step_that_fails_loses_no_seat_and_no_token(error):
    together = engine(3)
    requests = [together.submit(prompt, max_tokens=12) for prompt in PROMPTS[:2]]
    failing = together.submit(IDS[:20], sampling=Sampling(logit_bias={RARE: 1e6}), max_tokens=12)
    with failing_on(RARE, error), pytest.raises(Exception if isinstance(error, Exception) else KeyboardInterrupt):
        together.run()
        failing.text()
    if not isinstance(error, Exception):
        assert failing.text() == alone(IDS[:20], 12, sampling=Sampling(logit_bias={RARE: 1e6}))
    assert [request.text() for request in requests] == [alone(prompt, 12) for prompt in PROMPTS[:2]]
    assert together._ground.pool.free == 3


def test_a_stream_cancelled_or_dismissed_in_a_step_gives_its_seat_back_after_it():
    together, free = engine(2), []
    stream = together.join()
    request = stream.submit(IDS[:9], max_tokens=50)
    other = together.submit(IDS[:9], max_tokens=50)
    for _ in range(4):
        together.step()

    def interrupt(*_: object) -> None:
        if not free:
            other.cancel()
            free.append(together._ground.pool.free)

    handle = tiny_loaded().model.model.layers[0].register_forward_pre_hook(interrupt)
    together.step()
    handle.remove()
    assert free == [0], "the seat is not free under the running step"
    assert request.text() == alone(IDS[:9], 50)
    stream.leave()
    assert together._ground.pool.free == 2


def test_closing_gives_every_seat_back():
    with engine(3) as together:
        for n in range(3):
            together.submit(IDS[: 9 + n])
        together.step()
        pool = together._ground.pool
        assert pool.free == 0
    assert pool.free == 3 and together.nbytes == 0


def test_a_put_away_that_fails_ends_that_stream_alone(monkeypatch: pytest.MonkeyPatch):
    together = engine(1)
    stream = together.join()
    stream.submit(IDS[:9], max_tokens=2).text()

    def full(cache: object) -> None:
        raise MemoryError("the host is full")

    monkeypatch.setattr(room, "away", full)
    other = together.submit(IDS[:9], max_tokens=5)
    assert other.text() == alone(IDS[:9], 5)
    with pytest.raises(EngineError, match="put away .*the host is full"):
        stream.submit("again")
    assert together._ground.pool.free == 1


@pytest.mark.parametrize("steady", [False, True])
@torch.inference_mode()
def test_an_engine_with_seats_is_an_engine_without_to_the_last_bit(steady, monkeypatch: pytest.MonkeyPatch):
    found = []
    for pooled in (True, False):
        monkeypatch.setattr(room, "takes_seats", lambda model, pooled=pooled: pooled)
        together = Engine(tiny_loaded(), 3, SINKS, WINDOW, chunk=5, steady=steady)
        kept = list[torch.Tensor]()
        handle = tiny_loaded().model.lm_head.register_forward_hook(
            lambda _, __, out, kept=kept: kept.append(out.clone())
        )
        requests = [together.submit(prompt, max_tokens=9) for prompt in PROMPTS[:4]]
        together.run()
        handle.remove()
        found.append((kept, [request.text() for request in requests]))
    (seated, said), (plain, same) = found
    assert said == same and len(seated) == len(plain)
    assert all(torch.equal(one, other) for one, other in zip(seated, plain, strict=True))
