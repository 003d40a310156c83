"""Each row against a session of its own, in whatever company, and every way for a request to begin and to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sinks.errors import CacheError, EngineClosed, EngineError, InvalidInput, QueueFull, RequestFailed, SnapshotError
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.request import BUFFER
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.stream.opened import IDS, SINKS, WARM, WINDOW, opened, tiny_loaded

PROMPTS = [IDS[:1], IDS[5:8], IDS[10:22], IDS[20:33], IDS[:60], "a text, not ids", IDS[3:6] * 9, [7]]
"""Shorter than the sinks, than the window, as long as both, longer."""

RARE = 4
"""A token that nobody writes here unless it is made to."""


def engine(slots: int = 8, **options: object) -> Engine:
    """Of the tiny model in float64, with so small a window that everything is let go soon."""
    return Engine(tiny_loaded(), slots, SINKS, WINDOW, **{"chunk": 5, "queue": 20, **options})  # type: ignore[arg-type]


def alone(prompt: object, count: int, **options: object) -> str:
    """What a session of its own says."""
    session = opened()
    session.feed(prompt)  # type: ignore[arg-type]
    return "".join(session.generate(count, **options))  # type: ignore[arg-type]


def spans(session: Session) -> list[tuple[int, list[int]]]:
    return [(span.start, list(span.ids)) for span in session.visible.spans]


@contextmanager
def failing_on(token: int, error: BaseException) -> Iterator[None]:
    """Inside, a pass that has this token in it fails half-way, in the second layer."""
    model = tiny_loaded().model
    seen: list[torch.Tensor] = []

    def note(_: object, args: tuple[torch.Tensor]) -> None:
        seen[:] = args

    def fail(*_: object) -> None:
        if bool((seen[0] == token).any()):
            raise error

    handles = [
        model.get_input_embeddings().register_forward_pre_hook(note),
        model.model.layers[1].mlp.register_forward_pre_hook(fail),  # type: ignore[union-attr]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=1.0, seed=5, repetition_penalty=1.2)])
def test_every_row_says_what_it_says_alone(slots, sampling):
    together = engine(slots)
    requests = [
        together.submit(prompt, max_tokens=10 + 3 * n, sampling=sampling) for n, prompt in enumerate(PROMPTS)
    ]
    together.run()
    for n, (request, prompt) in enumerate(zip(requests, PROMPTS, strict=True)):
        assert request.text() == alone(prompt, 10 + 3 * n, sampling=sampling)
        assert (request.finish, request.tokens) == ("length", 10 + 3 * n)
    assert together.held == together.running == together.nbytes == 0


def test_a_row_joins_at_any_step_and_changes_nobody():
    together = engine()
    first = together.submit(PROMPTS[4], max_tokens=40)
    requests = []
    for prompt in PROMPTS:
        for _ in range(3):
            together.step()
        requests.append(together.submit(prompt, max_tokens=9))
    assert first.text() == alone(PROMPTS[4], 40)
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert request.text() == alone(prompt, 9)


def test_a_row_joins_as_another_leaves():
    together = engine(slots=2)
    requests = [together.submit(prompt, max_tokens=n) for n, prompt in enumerate(PROMPTS)]
    assert together.held == 0
    while together.step():
        assert together.held <= 2
    assert [request.text() for request in requests] == [alone(prompt, n) for n, prompt in enumerate(PROMPTS)]


def test_requests_of_one_stream_go_on_where_the_last_one_ended():
    together, session = engine(), opened()
    stream = together.join()
    requests = [stream.submit(IDS[:20], max_tokens=6), stream.submit("more", max_tokens=7), stream.submit(max_tokens=4)]
    other = together.submit(IDS, max_tokens=30)
    expected = []
    for given, count in ((IDS[:20], 6), ("more", 7), (None, 4)):
        if given is not None:
            session.feed(given)
        expected.append("".join(session.generate(count)))
    assert [request.text() for request in requests] == expected
    assert (stream.seen, stream.evicted, stream.spans) == (session.seen, session.evicted, spans(session))
    assert other.text() == alone(IDS, 30)
    assert together.held == 1
    stream.leave()
    assert together.held == 0
    with pytest.raises(EngineError, match="has left"):
        stream.submit("again")


def test_a_long_prompt_delays_nobody_by_more_than_one_chunk():
    """Between two tokens of a writer no more is read than one chunk, counted in tokens that meet the model."""
    together = engine(chunk=40)
    writers = [together.submit(IDS[:4], max_tokens=30) for _ in range(2)]
    while min(request.tokens for request in writers) < 2:
        together.step()
    fed: list[int] = []
    hook = tiny_loaded().model.model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    long = together.submit(IDS * 5, max_tokens=1)
    while not long.tokens:
        before = [request.tokens for request in writers]
        fed.clear()
        together.step()
        assert [request.tokens for request in writers] == [count + 1 for count in before]
        assert sum(fed) <= 40 + 3
    hook.remove()


def test_the_queue_is_bounded():
    together = engine(slots=1, queue=2)
    together.submit(IDS[:3])
    together.step()
    waiting = [together.submit(IDS[:3], max_tokens=1) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        together.submit(IDS[:3])
    waiting[0].cancel()
    together.submit(IDS[:3], max_tokens=1)


@pytest.mark.parametrize("steps", [0, 1, 3, 15])
def test_cancelling_takes_effect_within_a_step(steps):
    """While it waits, reads and writes."""
    together = engine(slots=1)
    request = together.submit(IDS[:40], sampling=WARM)
    after = together.submit(IDS[:3], max_tokens=2)
    for _ in range(steps):
        together.step()
    request.cancel()
    request.cancel()
    written = request.tokens
    assert request.finish == "cancelled"
    together.step()
    assert together.held == 1 and together.running == 1 and together.waiting == 0
    assert request.tokens == written
    assert after.text() == alone(IDS[:3], 2)
    said = request.text()
    assert said == alone(IDS[:40], written, sampling=WARM)[: len(said)]


def test_a_cancelled_answer_stays_in_its_stream():
    together = engine()
    stream, session = together.join(), opened()
    request = stream.submit(IDS[:20])
    while request.tokens < 5:
        together.step()
    request.cancel()
    session.feed(IDS[:20])
    said = "".join(session.generate(5))
    assert request.text() == said
    assert stream.submit("so", max_tokens=8).text() == (session.feed("so"), "".join(session.generate(8)))[1]


def test_stop_strings_end_tokens_and_nothing_at_all():
    plain = alone(IDS[:20], 30)
    together = engine()
    stopped = together.submit(IDS[:20], max_tokens=30, stop=plain[6:8])
    none = together.submit(IDS[:20], max_tokens=0)
    assert (none.text(), none.finish, none.tokens) == ("", "length", 0)
    at = plain.index(plain[6:8])
    assert (stopped.text(), stopped.finish) == (plain[:at], "stop")
    stream = together.join()
    assert stream.submit(IDS[:20], max_tokens=0).text() == "" and stream.seen == 20
    ending = tiny_loaded()
    kept, ending.model.generation_config.eos_token_id = ending.model.generation_config.eos_token_id, IDS[7]  # type: ignore[union-attr]
    try:
        biased = engine().submit(IDS[:20], sampling=Sampling(logit_bias={IDS[7]: 1e6}))
        assert (biased.text(), biased.finish, biased.tokens) == ("", "end", 1)
    finally:
        ending.model.generation_config.eos_token_id = kept  # type: ignore[union-attr]


def test_empty_prompts():
    """A text that is empty begins with the BOS token where there is one, and is refused where there is none."""
    together = engine()
    for nothing in ("", [], None):
        request = together.submit(nothing, max_tokens=3)
        with pytest.raises(InvalidInput, match="nothing was fed"):
            request.text()
        assert request.finish == "failed"
    assert together.held == 0
    begun = Engine(tiny_loaded(bos=True), 2, SINKS, WINDOW)
    session = Session(tiny_loaded(bos=True), SINKS, WINDOW)
    assert begun.submit("", max_tokens=9).text() == "".join(session.generate(9))
    stream = begun.join()
    stream.submit("no", max_tokens=3).cancel()
    request = stream.submit("yes", max_tokens=3)
    assert request.text() == (lambda fed: (fed.feed("yes"), "".join(fed.generate(3)))[1])(
        Session(tiny_loaded(bos=True), SINKS, WINDOW)
    )


def test_wishes_that_make_no_sense_are_refused_at_once():
    together = engine()
    for wish in ({"max_tokens": -1}, {"stop": ""}, {"stop": ("x" * 2000,)}):
        with pytest.raises(InvalidInput):
            together.submit("x", **wish)
    with pytest.raises(InvalidInput, match="token ids"):
        together.submit([1, 999])
    with pytest.raises(InvalidInput):
        engine(slots=0)
    with pytest.raises(InvalidInput):
        Engine(tiny_loaded(), 2, sinks=-1)
    assert together.waiting == together.held == 0


# Parking


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


# Failure


def test_a_step_that_fails_under_one_row_fails_that_row_alone():
    expected = [alone(prompt, 12) for prompt in PROMPTS]
    together = engine()
    requests = [together.submit(prompt, max_tokens=12) for prompt in PROMPTS]
    victim = together.join()
    failing = victim.submit(IDS[:20], sampling=Sampling(logit_bias={RARE: 1e6}), max_tokens=12)
    with failing_on(RARE, RuntimeError("no")), pytest.raises(RequestFailed, match="RuntimeError: no") as failure:
        failing.text()
    assert isinstance(failure.value.__cause__, RuntimeError)
    assert [request.text() for request in requests] == expected
    # Nothing was lost in its stream either: the token that could not be read is read now.
    session = opened()
    session.feed([*IDS[:20], RARE])
    assert victim.submit(max_tokens=5).text() == "".join(session.generate(5))


def test_a_stream_that_fails_while_it_reads_is_gone_and_the_others_are_not():
    together = engine()
    other = together.submit(PROMPTS[3], max_tokens=12)
    stream = together.join()
    request, behind = stream.submit([*IDS[:12], RARE, *IDS[:12]]), stream.submit("more")
    with failing_on(RARE, RuntimeError("no")), pytest.raises(RequestFailed, match="no"):
        request.text()
    assert behind.finish == "cancelled"
    with pytest.raises(CacheError, match="broken off"):
        stream.submit("again")
    assert other.text() == alone(PROMPTS[3], 12)
    assert together.held == 0


def test_logits_of_one_row_that_are_not_finite_fail_that_row_alone():
    model = tiny_loaded().model
    expected = alone(PROMPTS[3], 12)
    together = engine()
    bad, good = together.submit(IDS[:9], max_tokens=12), together.submit(PROMPTS[3], max_tokens=12)

    def spoil(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(0, torch.tensor([0]), torch.nan) if len(output) == 2 else output

    handle = model.lm_head.register_forward_hook(spoil)  # type: ignore[union-attr]
    together.run()
    handle.remove()
    assert good.text() == expected
    with pytest.raises(Exception, match="not finite"):
        bad.text()


def test_ctrl_c_in_a_step_loses_nothing():
    expected = alone(IDS[:20], 3, sampling=Sampling(logit_bias={RARE: 1e6}))
    together = engine()
    request = together.submit(IDS[:20], max_tokens=3, sampling=Sampling(logit_bias={RARE: 1e6}))
    with failing_on(RARE, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        together.run()
    assert request.text() == expected and request.tokens == 3


def test_a_writer_whose_pieces_nobody_reads_pauses():
    together = engine(slots=2)
    forgotten = together.submit(IDS[:9], sampling=Sampling(logit_bias={65: 1e6}))
    assert together.submit(IDS[:9], max_tokens=BUFFER + 50).text() == alone(IDS[:9], BUFFER + 50)
    together.run()
    assert forgotten.full and forgotten.tokens == BUFFER
    assert len(forgotten.take()) == BUFFER and forgotten.take() == []
    assert together.step() and forgotten.take()


def test_a_request_that_can_never_move_says_so():
    together = engine(slots=1)
    stream = together.join()
    stream.submit(IDS[:3], max_tokens=1).text()
    with pytest.raises(EngineError, match="nothing moves: 1 slots"):
        together.submit(IDS[:3]).text()


def test_steady_rows_do_not_depend_on_their_company_to_the_last_bit():
    """float32: every product has as many rows, so a row's bits are the same whoever else is there."""
    loaded = tiny_loaded(dtype=torch.float32)

    def logits(company: int) -> list[torch.Tensor]:
        together = Engine(loaded, 8, SINKS, WINDOW, steady=True, chunk=5)
        stream, found = together.join(), []
        request = stream.submit(IDS[:20], max_tokens=20)
        while not request.tokens:  # so that it is the first row
            together.step()
        for n in range(company):
            together.submit(IDS[n : 9 + 5 * n], max_tokens=3 + 2 * n)
        handle = loaded.model.lm_head.register_forward_hook(lambda _, __, out: found.append(out[0, -1].clone()))
        request.text()
        handle.remove()
        return found

    for company in (1, 4, 7):
        assert all(torch.equal(a, b) for a, b in zip(logits(company), logits(0), strict=True))


def test_float32_rows_stay_within_the_rounding_of_their_sums():
    """Sums of at most 64 terms of order 1, twice a layer: a few hundred roundings of 6e-8 on logits of order 10."""
    loaded = tiny_loaded(dtype=torch.float32)
    found: dict[int, list[torch.Tensor]] = {}
    for company in (0, 7):
        together, kept = Engine(loaded, 8, SINKS, WINDOW, chunk=5), list[torch.Tensor]()
        request = together.submit(IDS[:20], max_tokens=13)
        while not request.tokens:  # so that it is the first row
            together.step()
        for n in range(company):
            together.submit(IDS[n : 9 + 5 * n], max_tokens=20)
        handle = loaded.model.lm_head.register_forward_hook(
            lambda _, __, out, kept=kept: kept.append(out[0, -1].clone())
        )
        request.text()
        handle.remove()
        found[company] = kept[:12]
    for a, b in zip(found[0], found[7], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=500 * 6e-8 * 10)


def test_closing_ends_everything():
    with engine() as together:
        request, stream = together.submit(IDS[:9]), together.join()
        stream.submit(IDS[:5], max_tokens=2).text()
    with pytest.raises(EngineClosed):
        request.text()
    for use in (lambda: together.submit("x"), together.join, lambda: stream.submit("x"), stream.fork):
        with pytest.raises(EngineClosed):
            use()
    assert together.nbytes == 0 and not together.step()
