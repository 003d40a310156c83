"""What fails, fails alone; and what a row owes to its company, to the last bit."""

from __future__ import annotations

import pytest
import torch

from sinks.errors import CacheError, EngineClosed, EngineError, InvalidInput, RequestFailed
from sinks.stream.answer import Answer
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.request import BUFFER, Request
from sinks.stream.engine.steps import Steps
from sinks.stream.sampling import Sampling
from tests.stream.engine.rows import PROMPTS, RARE, alone, engine, failing_on
from tests.stream.opened import IDS, SINKS, WINDOW, opened, tiny_loaded

PARTS = ("model.layers.1.mlp", "lm_head")
"""A step fails within the layers, or when they are through."""


@pytest.mark.parametrize("part", PARTS)
def test_a_step_that_fails_under_one_row_fails_that_row_alone(part: str):
    expected = [alone(prompt, 12) for prompt in PROMPTS]
    together = engine()
    requests = [together.submit(prompt, max_tokens=12) for prompt in PROMPTS]
    victim = together.join()
    failing = victim.submit(IDS[:20], sampling=Sampling(logit_bias={RARE: 1e6}), max_tokens=12)
    with failing_on(RARE, RuntimeError("no"), part), pytest.raises(RequestFailed, match="RuntimeError: no") as failure:
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


@pytest.mark.parametrize("part", PARTS)
def test_ctrl_c_in_a_step_loses_nothing(part: str):
    expected = alone(IDS[:20], 3, sampling=Sampling(logit_bias={RARE: 1e6}))
    together = engine()
    request = together.submit(IDS[:20], max_tokens=3, sampling=Sampling(logit_bias={RARE: 1e6}))
    with failing_on(RARE, KeyboardInterrupt(), part), pytest.raises(KeyboardInterrupt):
        together.run()
    assert request.text() == expected and request.tokens == 3


@pytest.mark.parametrize("where", ["prepare", "read", "choose"])
def test_ctrl_c_between_planning_and_doing_loses_nothing(where, monkeypatch):
    together = engine()
    requests = [together.submit(IDS[n : 12 + n], max_tokens=3) for n in range(3)]
    owner, name = {"prepare": (Request, "prepare"), "read": (Steps, "_read"), "choose": (Steps, "_choose")}[where]
    original, calls = getattr(owner, name), []

    def broken_off(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, broken_off)
    with pytest.raises(KeyboardInterrupt):
        together.run()
    assert [request.text() for request in requests] == [alone(IDS[n : 12 + n], 3) for n in range(3)]


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
    with pytest.raises(EngineError, match="nothing moves: .*that stay: 1; requests that wait: 1;"):
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


def test_a_caller_whose_news_raise_stops_nobody(caplog: pytest.LogCaptureFixture):
    together, expected = engine(), [alone(prompt, 8) for prompt in PROMPTS[:2]]
    calls: list[None] = []

    def raising() -> None:
        calls.append(None)
        raise RuntimeError("the loop is closed")

    requests = [
        together.submit(PROMPTS[0], max_tokens=8, on_news=raising),
        together.submit(PROMPTS[1], max_tokens=8),
    ]
    together.run()
    assert [request.text() for request in requests] == expected
    assert len(calls) == 1 and "not called again" in caplog.text


def test_a_stream_of_another_engine_is_refused():
    stream = engine().join()
    with pytest.raises(InvalidInput, match="another engine"):
        engine().submit(PROMPTS[0], stream=stream)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sampling": {"temperature": 1}}, "sampling="),
        ({"sampling": None}, "sampling=None"),
        ({"stop": None}, "stop=None"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"on_news": 3}, "on_news=3"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_and_harms_nobody(wrong: dict, told: str):
    together = engine()
    other = together.submit(PROMPTS[0], max_tokens=5)
    with pytest.raises(InvalidInput, match=told):
        together.submit(PROMPTS[1], **wrong)
    assert other.text() == alone(PROMPTS[0], 5) and (together.waiting, together.held) == (0, 0)


def test_an_answer_that_cannot_begin_fails_alone(monkeypatch: pytest.MonkeyPatch):
    together, begin = engine(), Answer.begin
    requests = [together.submit(prompt, max_tokens=5) for prompt in PROMPTS[:2]]
    monkeypatch.setattr(Answer, "begin", lambda answer: begin(answer) if answer.left == 5 else 1 // 0)
    failing = together.submit(PROMPTS[2], max_tokens=4)
    with pytest.raises(RequestFailed, match="ZeroDivisionError"):
        failing.text()
    assert [request.text() for request in requests] == [alone(prompt, 5) for prompt in PROMPTS[:2]]
    assert together.held == 0


@pytest.mark.usefixtures("unchecked")
def test_what_an_engine_is_made_of_is_checked():
    loaded = tiny_loaded()
    for slots in (0, -1):
        with pytest.raises(InvalidInput, match=f"slots={slots} is too small: give 1 or more"):
            Engine(loaded, slots)
    with pytest.raises(InvalidInput, match="str: give a model's name"):
        Engine("x")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="int: join"):
        engine().join(5)  # type: ignore[arg-type]
