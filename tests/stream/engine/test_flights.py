"""Steps launched on tokens that the host has not read: every end, at every moment, against a session alone.

On a CPU the captured step's kernels run one by one under Triton's interpreter, over the same pool and by the same loop.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinks.errors import UnsupportedOption
from sinks.models.attach import attach
from sinks.models.load import Loaded, Source
from sinks.models.step.device.step import DeviceModel, DeviceStep
from sinks.models.step.hasten import hasten
from sinks.stream.engine import request as request_module
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.flight import Flights
from sinks.stream.engine.request import Request
from sinks.stream.engine.rows import row as room
from sinks.stream.sampling import GREEDY, Sampling
from sinks.stream.session import Session
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton
from tests.reading.tiny import tiny_tokenizer

pytestmark = needs_triton

SINKS, WINDOW = 2, 14
IDS = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPTS = [IDS[:1], IDS[1:6], IDS[2:22], IDS[3:43]]
"""Shorter than the sinks, than the window, longer."""

DRAWN = Sampling(0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, history=9, seed=5)
FREE = Sampling(1.1, top_p=0.95)


def small() -> LlamaForCausalLM:
    """A random Llama of one layer and heads of 64, float32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=64, max_position_embeddings=2048, initializer_range=0.3,
        )
    )  # fmt: skip
    settings = model.generation_config
    assert settings is not None
    settings.eos_token_id, settings.pad_token_id = None, 0
    return model.eval().to(DEVICE)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    """A model whose streams live in a pool and decode by a captured step, here too where there is no GPU."""
    model = hasten(attach(small()))
    model.forward.device = DeviceModel(model)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "takes_seats", lambda _: True)
        yield Loaded(model, tiny_tokenizer(), Source("small", "folder", "none", "", ""))


@pytest.fixture(scope="module")
def plain() -> Loaded:
    return Loaded(attach(small()), tiny_tokenizer(), Source("small", "folder", "none", "", ""))


def engine(loaded: Loaded, slots: int = 4, **options: object) -> Engine:
    return Engine(loaded, slots, SINKS, WINDOW, **{"chunk": 100, **options})  # type: ignore[arg-type]


def alone(plain: Loaded, prompt: list[int], count: int) -> str:
    """What a session of its own says, greedily, by ordinary passes."""
    session = Session(plain, SINKS, WINDOW)
    session.feed(prompt)
    return "".join(session.generate(count))


def by_itself(loaded: Loaded, prompt: list[int], count: int, sampling: Sampling) -> str:
    """What a stream says in an engine that nobody shares."""
    with engine(loaded, 1) as own:
        return own.submit(prompt, max_tokens=count, sampling=sampling).text()


def after(request: Request, tokens: int) -> None:
    """Step until so many tokens were handed out."""
    while request.tokens < tokens:
        request._engine.step()


def test_the_host_reads_one_step_behind(loaded: Loaded, plain: Loaded) -> None:
    """And says what sessions say, however rows join and leave."""
    with engine(loaded, 3) as together:
        requests = [together.submit(prompt, max_tokens=6 + 3 * n) for n, prompt in enumerate(PROMPTS)]
        under_way = []
        while together.step():
            under_way.append(len(together._steps.flights))
        assert max(under_way) == 1 and under_way.count(1) > len(under_way) / 2 and not under_way[-1]
        for n, (request, prompt) in enumerate(zip(requests, PROMPTS, strict=True)):
            assert (request.text(), request.tokens) == (alone(plain, prompt, 6 + 3 * n), 6 + 3 * n)


def test_a_row_reads_its_own_token_where_another_stream_stood(loaded: Loaded, plain: Loaded) -> None:
    """A graph of one row was last at the seat and position to which this row comes after steps of two."""
    first, long, short = IDS[:5], IDS[5:10], IDS[10:15]
    with engine(loaded, 2) as together:
        together.submit(first, max_tokens=3).text()
        requests = [together.submit(long, max_tokens=9), together.submit(short, max_tokens=3)]
        together.run()
        assert [each.text() for each in requests] == [alone(plain, long, 9), alone(plain, short, 3)]


def test_a_launch_that_is_broken_off_is_not_built_on(
    loaded: Loaded, plain: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C behind the launch and before it is noted: the GPU has chosen a token that the host does not know of."""
    with engine(loaded, 1) as own:
        request = own.submit(IDS[:5], max_tokens=12)
        after(request, 3)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(DeviceStep, "told", interrupted)
            own.step()
        own.run()
        assert request.text() == alone(plain, IDS[:5], 12)


def interrupted(step: DeviceStep) -> None:
    raise KeyboardInterrupt


def test_what_a_row_draws_does_not_depend_on_its_company(loaded: Loaded) -> None:
    prompts, samplings = [IDS[1:3], *PROMPTS[1:]], [DRAWN, FREE, GREEDY, replace(FREE, temperature=0.5, seed=9)]
    expected = [by_itself(loaded, prompt, 12, each) for prompt, each in zip(prompts, samplings, strict=True)]
    for slots in (2, 4):
        with engine(loaded, slots, steady=slots == 4) as together:
            requests = [
                together.submit(prompt, max_tokens=12, sampling=each)
                for prompt, each in zip(prompts, samplings, strict=True)
            ]
            together.run()
            assert [request.text() for request in requests] == expected


@pytest.mark.parametrize("sampling", [GREEDY, FREE, replace(DRAWN, seed=None)])
def test_answers_in_parts_parked_forked_and_saved_are_one(loaded: Loaded, tmp_path: Path, sampling: Sampling) -> None:
    whole = by_itself(loaded, IDS[:30], 16, sampling)
    with engine(loaded, 2) as together:
        stream = together.join()
        parts = [stream.submit(IDS[:30], max_tokens=4, sampling=sampling).text()]
        stream.park()
        parts.append(stream.submit(max_tokens=3, sampling=sampling).text())
        stream.park(tmp_path / "parked")
        request = stream.submit(max_tokens=9, sampling=sampling)
        after(request, 4)
        twin, copy = stream.fork(), tmp_path / "moment"
        stream.save(copy)
        parts.append(request.text())
        assert "".join(parts) == whole
        rest = "".join(parts)[len("".join(parts[:2])) :]
        for other in (twin, together.resume(copy)):
            said = other.submit(max_tokens=5, sampling=sampling).text()
            assert rest.endswith(said)
            other.leave()
        assert stream.moment is not None and stream.seen == 30 + 16


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("tokens", [0, 1, 4] if HAS_GPU else [0, 4])
def test_a_cancelled_answer_ends_there_and_its_stream_goes_on(loaded: Loaded, tokens: int, sampling: Sampling) -> None:
    with engine(loaded) as together, engine(loaded, 1) as other:
        stream, company = together.join(), together.submit(PROMPTS[3], max_tokens=25, sampling=FREE)
        request = stream.submit(IDS[:30], sampling=sampling)
        after(company, 2)
        after(request, tokens)
        request.cancel()
        assert request.finish == "cancelled"
        before = request.tokens
        together.step()
        session = other.join()
        said = session.submit(IDS[:30], max_tokens=before, sampling=sampling).text() if before else ""
        assert (request.text(), request.tokens) == (said, before)
        if not before:
            session.submit(IDS[:30], max_tokens=0).text()
        more = stream.submit(IDS[50:53], max_tokens=5, sampling=sampling)
        assert more.text() == session.submit(IDS[50:53], max_tokens=5, sampling=sampling).text()
        assert stream.spans == session.spans
        assert company.text() == by_itself(loaded, PROMPTS[3], 25, FREE)


def test_stop_strings_and_end_tokens_leave_nothing_behind_them(loaded: Loaded, plain: Loaded) -> None:
    said = alone(plain, IDS[:30], 12)
    with engine(loaded) as together:
        stream, session = together.join(), Session(plain, SINKS, WINDOW)
        stop = said[3:5]
        request = stream.submit(IDS[:30], max_tokens=12, stop=stop)
        session.feed(IDS[:30])
        assert request.text() == "".join(session.generate(12, stop=stop)) and request.finish == "stop"
        assert stream.spans == [(span.start, list(span.ids)) for span in session.visible.spans]
        session.feed(IDS[40:44])
        assert stream.submit(IDS[40:44], max_tokens=6).text() == "".join(session.generate(6))
    settings = loaded.model.generation_config
    assert settings is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "eos_token_id", IDS[7])
        with engine(loaded) as ending:
            ended = ending.join()
            biased = Sampling(logit_bias={IDS[7]: 1e6})
            request = ended.submit(IDS[:30], sampling=biased)
            assert (request.text(), request.finish, request.tokens, ended.seen) == ("", "end", 1, 31)


def test_a_row_without_a_choice_fails_alone_and_can_go_on(loaded: Loaded, plain: Loaded) -> None:
    with engine(loaded) as together:
        stream = together.join()
        good = together.submit(PROMPTS[2], max_tokens=10)
        nothing = Sampling(logit_bias=dict.fromkeys(range(257), -float("inf")))
        bad = stream.submit(IDS[:30], max_tokens=5, sampling=nothing)
        with pytest.raises(UnsupportedOption, match="no token is left"):
            bad.text()
        assert good.text() == alone(plain, PROMPTS[2], 10)
        assert stream.submit(max_tokens=6).text() == alone(plain, IDS[:30], 6)


def test_settings_beyond_the_graph_wait_for_every_token(loaded: Loaded, plain: Loaded) -> None:
    """A longer look back than the window: the choice is made outside, and the company's with it."""
    beyond = Sampling(repetition_penalty=1.3, history=WINDOW + 1)
    with engine(loaded) as together:
        request = together.submit(IDS[:30], max_tokens=8, sampling=beyond)
        company = together.submit(PROMPTS[2], max_tokens=20)
        while not request.finish:
            together.step()
            assert not len(together._steps.flights)
        session = Session(plain, SINKS, WINDOW)
        session.feed(IDS[:30])
        assert request.text() == "".join(session.generate(8, sampling=beyond))
        assert company.text() == alone(plain, PROMPTS[2], 20)


def test_a_writer_whose_pieces_nobody_reads_pauses(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "BUFFER", 7)
    with engine(loaded, 2) as together:
        forgotten = together.submit(IDS[:9], sampling=Sampling(logit_bias={65: 1e6}))
        together.run()
        assert forgotten.full and forgotten.tokens == len(forgotten.take()) == 7
        together.run()
        assert forgotten.tokens == 14


@pytest.mark.parametrize("name", ["launch", "_over"])
@pytest.mark.parametrize("first", [True, False])
def test_ctrl_c_before_or_after_launching_and_landing_loses_nothing(
    loaded: Loaded, plain: Loaded, monkeypatch: pytest.MonkeyPatch, name: str, first: bool
) -> None:
    original, calls = getattr(Flights, name), list[int]()

    def broken_off(*args: object) -> object:
        done = original(*args) if first else None
        calls.append(1)
        if len(calls) in (2, 6):
            raise KeyboardInterrupt
        return done if first else original(*args)

    with engine(loaded) as together:
        requests = [together.submit(prompt, max_tokens=7) for prompt in PROMPTS[1:]]
        monkeypatch.setattr(Flights, name, broken_off)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                together.run()
        assert [request.text() for request in requests] == [alone(plain, each, 7) for each in PROMPTS[1:]]


def test_cancelling_from_another_thread_at_any_moment(loaded: Loaded) -> None:
    """The text is that of the tokens, none comes after the end, and the stream holds what was written."""
    with engine(loaded) as together:
        together.start()
        for moment in range(6):
            stream = together.join()
            told = threading.Event()
            request = stream.submit(IDS[:30], sampling=DRAWN, on_news=told.set)
            while request.tokens < moment:
                told.wait(0.02)
            request.cancel()
            while request.finish is None:
                told.wait(0.02)
            said, tokens = request.text(), request.tokens
            session_said = by_itself(loaded, IDS[:30], tokens, DRAWN) if tokens else ""
            with together.between_steps():
                assert (said, stream.seen) == (session_said, 30 + tokens if stream.seen else 0)
            stream.leave()


def test_a_closed_engine_lets_its_graphs_go_at_once(plain: Loaded) -> None:
    """Not when garbage is collected, which may be while other graphs are recorded."""
    model = hasten(attach(small()))
    model.forward.device = steps = DeviceModel(model)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "takes_seats", lambda _: True)
        own = engine(replace(plain, model=model), 1)
        gc.disable()
        try:
            own.submit(IDS[:5], max_tokens=3).text()
            (step,) = map(weakref.ref, steps._steps.values())
            own.close()
            assert step() is None
        finally:
            gc.enable()
