"""An engine with a thread of its own: many callers at once, and nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sinks.errors import EngineClosed, QueueFull
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.request import BUFFER
from sinks.stream.sampling import Sampling
from tests.stream.engine.rows import PROMPTS, alone, engine
from tests.stream.opened import IDS, WARM

PATIENCE = 60.0
"""Seconds after which a test gives up: what it waits for takes milliseconds."""


def test_callers_in_many_threads_get_what_they_would_get_alone():
    expected = [alone(prompt, 12, sampling=WARM) for prompt in PROMPTS]
    with engine(slots=3).start() as together, ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            told = pool.map(lambda prompt: together.submit(prompt, max_tokens=12, sampling=WARM).text(), PROMPTS)
            assert list(told) == expected
        assert together.held == together.running == together.waiting == 0


def test_streams_are_saved_forked_and_parked_while_others_write(tmp_path: Path):
    with engine(slots=4).start() as together:
        endless = together.submit(IDS[:9], sampling=Sampling(logit_bias={65: 1e6}))
        stream = together.join()
        said = stream.submit(IDS[:30], max_tokens=6).text()
        twin = stream.fork()
        stream.park(tmp_path / "parked")
        futures = [each.submit(max_tokens=9) for each in (twin, stream, together.resume(tmp_path / "parked"))]
        assert {said + future.text() for future in futures} == {alone(IDS[:30], 15)}
        assert endless.finish is None
        endless.cancel()
        assert len(set(endless.text())) == 1


def test_news_are_told_and_a_writer_that_paused_goes_on():
    heard = threading.Semaphore(0)
    with engine().start() as together:
        request = together.submit(IDS[:9], sampling=Sampling(logit_bias={65: 1e6}), on_news=heard.release)
        for _ in range(BUFFER):
            assert heard.acquire(timeout=PATIENCE)
        assert not heard.acquire(timeout=0.2) and request.full
        assert len(request.take()) == BUFFER
        assert heard.acquire(timeout=PATIENCE)
        request.wait(PATIENCE)
        assert request.ready


def test_closing_wakes_whoever_waits():
    together = engine(slots=1).start()
    stream = together.join()
    stream.submit(IDS[:3], max_tokens=1).text()
    request = together.submit(IDS[:3])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(request.text)
        together.close()
        with pytest.raises(EngineClosed):
            waiting.result(PATIENCE)
    with pytest.raises(EngineClosed):
        together.start()


def test_a_fault_of_the_engine_itself_reaches_whoever_waits(monkeypatch):
    together = engine()
    monkeypatch.setattr(together._register.scheduler, "turn", lambda _: 1 // 0)
    request = together.submit(IDS[:3])
    together.start()
    with pytest.raises(EngineClosed, match="ZeroDivisionError") as failure:
        request.text()
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


def test_any_number_of_callers_meets_a_bounded_queue():
    """Whoever is refused tries again; nobody is lost and nobody is served twice."""
    with engine(slots=2, queue=1).start() as together:

        def ask(number: int) -> str:
            while True:
                try:
                    return together.submit([number], max_tokens=4).text()
                except QueueFull:
                    threading.Event().wait(0.001)

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, range(24))) == [alone([number], 4) for number in range(24)]


def test_cancelling_from_everywhere_leaves_no_slot_behind():
    with engine(slots=3, queue=100).start() as together:
        requests = [together.submit(IDS[:30], sampling=WARM) for _ in range(40)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda request: request.cancel(), requests))
        assert together.submit(IDS[:30], max_tokens=8, sampling=WARM).text() == alone(IDS[:30], 8, sampling=WARM)
        assert isinstance(together, Engine) and together.held == 0
