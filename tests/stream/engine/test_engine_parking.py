"""What is parked, saved, resumed, joined and forked, against a session that did the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinks.errors import EngineError, InvalidInput, QueueFull, SnapshotError
from sinks.stream.engine.engine import Engine
from sinks.stream.session import Session
from tests.stream.engine.rows import alone, engine, spans
from tests.stream.opened import IDS, SINKS, WARM, WINDOW, opened, tiny_loaded
from tests.stream.templates import chat_loaded, ending


def test_a_session_takes_up_what_an_engine_parked_and_the_other_way_round(tmp_path: Path):
    together, session = engine(slots=2), opened()
    session.feed(IDS[:30])
    expected = "".join(session.generate(25, sampling=WARM))
    stream = together.join()
    one = stream.submit(IDS[:30], max_tokens=5, sampling=WARM).text()
    stream.park(tmp_path / "parked")
    assert together.held == 0 and stream.row is None and together.nbytes == 0
    again = opened()
    again.load(tmp_path / "parked")
    two = "".join(again.generate(8, sampling=WARM))
    again.save(tmp_path / "saved")
    resumed = engine(slots=1).resume(tmp_path / "saved")
    three = resumed.submit(max_tokens=6, sampling=WARM).text()
    joined = engine(slots=1).join(again)
    assert joined.submit(max_tokens=6, sampling=WARM).text() == three
    four = "".join(stream.submit(max_tokens=20, sampling=WARM))
    assert one + two + three == expected[: len(one + two + three)]
    assert one + four == expected


def test_a_stream_that_is_busy_is_not_parked_but_saved(tmp_path: Path):
    together = engine()
    stream = together.join()
    request = stream.submit(IDS[:30], max_tokens=20)
    while request.tokens < 7:
        together.step()
    with pytest.raises(EngineError, match="is running"):
        stream.park(tmp_path / "no")
    stream.save(tmp_path / "moment")
    session = opened()
    session.load(tmp_path / "moment")
    assert request.text() == alone(IDS[:30], 20) == alone(IDS[:30], 7) + "".join(session.generate(13))


def test_a_session_and_an_engine_know_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    session = opened()
    session.feed(IDS[:30])
    session.save("~/one")
    stream = engine(slots=1).resume("~/one")
    text = stream.submit(max_tokens=6).text()
    stream.park("~/two")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    again = opened()
    again.load(tmp_path / "two")
    assert again.seen == 36 and text == alone(IDS[:30], 6)


def test_a_stream_that_cannot_be_parked_stays(tmp_path: Path):
    together = engine()
    stream = together.join()
    stream.submit(IDS[:30], max_tokens=5).text()
    with pytest.raises(SnapshotError):
        stream.park(tmp_path / "no" / "folder")
    assert together.held == 1
    session = opened()
    session.feed(IDS[:30])
    list(session.generate(5))
    assert stream.submit(max_tokens=3).text() == "".join(session.generate(3))
    with pytest.raises(EngineError, match="holds no slot"):
        together.join().park(tmp_path / "empty")


def test_what_cannot_be_resumed_fails_its_request_and_frees_its_slot(tmp_path: Path):
    together = engine(slots=1)
    with pytest.raises(SnapshotError, match="cannot be read"):
        together.resume(tmp_path / "nothing").submit("x").text()
    assert together.held == 0
    other = opened(window=WINDOW + 1)
    other.feed("x")
    other.save(tmp_path / "larger")
    with pytest.raises(InvalidInput, match="window=10"):
        together.resume(tmp_path / "larger").submit("x").text()
    with pytest.raises(InvalidInput, match="window=10"):
        together.join(other)
    with pytest.raises(InvalidInput, match="another model"):
        together.join(Session(tiny_loaded(bos=True), SINKS, WINDOW))
    assert together.held == 0


def test_an_empty_stream_that_was_saved_begins_with_its_bos(tmp_path: Path):
    loaded = tiny_loaded(bos=True)
    Session(loaded, SINKS, WINDOW).save(tmp_path / "empty")
    session = Session(loaded, SINKS, WINDOW)
    session.feed("begin")
    resumed = Engine(loaded, 1, SINKS, WINDOW).resume(tmp_path / "empty")
    assert resumed.submit("begin", max_tokens=6).text() == "".join(session.generate(6))
    assert resumed.spans == spans(session)


def test_a_fork_of_a_running_row_goes_its_own_way():
    together = engine(slots=2)
    stream = together.join()
    request = stream.submit(IDS[:30], max_tokens=20, sampling=WARM)
    while request.tokens < 7:
        together.step()
    twin = stream.fork()
    assert twin.spans == stream.spans
    with pytest.raises(QueueFull, match="2 slots are taken"):
        stream.fork()
    other = twin.submit("elsewhere", max_tokens=9, sampling=WARM)
    assert request.text() == alone(IDS[:30], 20, sampling=WARM)
    session = opened()
    session.feed(IDS[:30])
    list(zip(range(7), session.generate(7, sampling=WARM), strict=False))
    while session.seen < 37:
        list(session.generate(37 - session.seen, sampling=WARM))
    session.feed("elsewhere")
    assert other.text() == "".join(session.generate(9, sampling=WARM))


def test_an_int8_engine_is_int8_sessions(tmp_path: Path):
    together = Engine(tiny_loaded(), 2, SINKS, WINDOW, cache="int8")
    session = opened(cache="int8")
    session.feed(IDS[:30])
    expected = "".join(session.generate(20, sampling=WARM))
    streams = [together.join() for _ in range(2)]
    requests = [stream.submit(IDS[:30], max_tokens=20, sampling=WARM) for stream in streams]
    assert [request.text() for request in requests] == [expected, expected]
    streams[0].park(tmp_path / "parked")
    full, other = opened(), opened()
    other.load(tmp_path / "parked")
    assert "".join(other.generate(5, sampling=WARM)) == "".join(session.generate(5, sampling=WARM))
    with pytest.raises(InvalidInput, match="cache=int8.* slots of this engine .*cache=full"):
        engine().join(other)
    assert full.nbytes == 0 and other.nbytes < opened_bytes() / 2


def opened_bytes() -> int:
    """Bytes of a session that was opened as usual."""
    session = opened()
    session.feed(IDS[:30])
    return session.nbytes


def test_a_dialogue_that_passed_through_an_engine_goes_on(tmp_path: Path):
    loaded = chat_loaded("chatml")
    session = Session(loaded, SINKS, WINDOW)
    list(session.say("one", max_tokens=4))
    session.save(tmp_path / "moment")
    together = Engine(loaded, 2, SINKS, WINDOW)
    for stream in (together.resume(tmp_path / "moment"), together.join(session)):
        request = stream.submit(max_tokens=2, sampling=ending(next(iter(together._ground.ends))))
        request.text()
        assert request.finish == "end"
        stream.park(tmp_path / "parked")
        again = Session(loaded, SINKS, WINDOW)
        again.load(tmp_path / "parked")
        assert not again.answering, "the end is noted as the template's, whichever the model chose"
        again.say("two")
        assert again.seen > session.seen + 2
