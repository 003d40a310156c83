"""Each row against a session of its own, in whatever company, and every way for a request to begin and to end."""

from __future__ import annotations

import pytest

from sinks.errors import EngineError, InvalidInput, QueueFull
from sinks.stream.engine.engine import Engine
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.stream.engine.rows import PROMPTS, alone, engine, spans
from tests.stream.opened import IDS, SINKS, WARM, WINDOW, opened, tiny_loaded


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=1.0, seed=5, repetition_penalty=1.2)])
def test_every_row_says_what_it_says_alone(slots, sampling):
    together = engine(slots)
    requests = [together.submit(prompt, max_tokens=10 + 3 * n, sampling=sampling) for n, prompt in enumerate(PROMPTS)]
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
