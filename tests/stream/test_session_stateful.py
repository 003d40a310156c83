"""Any order of feeding, generating, leaving, forking, saving, loading and resetting, against a list of all tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from torch import Tensor

from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.stream.opened import SINKS, WINDOW, opened, tiny_loaded

IDS = st.lists(st.integers(0, 255), max_size=25)
SAMPLING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 30]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.sampled_from([None, None, 4]),
)
STOPS = st.sampled_from([(), ("ab",), ("€", "a")])


class Stream:
    """A session, and the plain list of its tokens; `gone` is what its listener heard."""

    def __init__(self) -> None:
        self.gone: dict[int, int] = {}
        self.session = opened(on_evict=self.hear)
        self.ids: list[int] = []

    def hear(self, start: int, ids: list[int]) -> None:
        assert not any(start + n in self.gone for n in range(len(ids)))
        self.gone.update({start + n: token for n, token in enumerate(ids)})

    def catch_up(self, before: int) -> None:
        """Note what was generated since `before` tokens, from what was visible or let go."""
        spans = {span.start + n: token for span in self.session.visible.spans for n, token in enumerate(span.ids)}
        self.ids += [(spans | self.gone)[position] for position in range(before, self.session.seen)]


class Sessions(RuleBasedStateMachine):
    """Several streams at once, forked from one another, through one model."""

    streams = Bundle("streams")

    @initialize(target=streams)
    def begin(self) -> Stream:
        self.folder = tempfile.TemporaryDirectory()
        self.files: dict[int, tuple[list[int], dict[int, int]]] = {}
        self.all = [Stream()]
        return self.all[0]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @rule(stream=streams, ids=IDS)
    def feed(self, stream: Stream, ids: list[int]) -> None:
        stream.session.feed(ids)
        stream.ids += ids

    @rule(stream=streams, text=st.text(max_size=6))
    def feed_text(self, stream: Stream, text: str) -> None:
        stream.session.feed(text)
        stream.ids += tiny_loaded().tokenizer(text).input_ids

    @rule(stream=streams, ids=IDS)
    def score(self, stream: Stream, ids: list[int]) -> None:
        told = stream.session.score(ids).nll
        expected = Session(tiny_loaded(), SINKS, WINDOW).score([*stream.ids, *ids]).nll[len(stream.ids) :]
        np.testing.assert_allclose(told, expected, rtol=0, atol=1e-9, equal_nan=True)
        stream.ids += ids

    @rule(stream=streams, count=st.integers(0, 15), sampling=SAMPLING, stop=STOPS)
    def generate(self, stream: Stream, count: int, sampling: Sampling, stop: tuple[str, ...]) -> None:
        if not stream.ids:
            return
        before = len(stream.ids)
        said = "".join(stream.session.generate(count, sampling=sampling, stop=stop))
        stream.catch_up(before)
        assert not any(each in said for each in stop)
        assert stream.session.finish in ("length", "stop")
        assert stream.session.seen - before == count or stream.session.finish == "stop"

    @rule(stream=streams, pieces=st.integers(1, 4), sampling=SAMPLING)
    def generate_and_leave(self, stream: Stream, pieces: int, sampling: Sampling) -> None:
        if not stream.ids:
            return
        before = len(stream.ids)
        for _, _ in zip(range(pieces), stream.session.generate(20, sampling=sampling), strict=False):
            pass
        stream.catch_up(before)

    @rule(target=streams, stream=streams)
    def fork(self, stream: Stream) -> Stream:
        if len(self.all) > 4:
            return multiple()  # type: ignore[return-value]
        twin = Stream()
        twin.session, twin.ids, twin.gone = stream.session.fork(twin.hear), list(stream.ids), dict(stream.gone)
        self.all.append(twin)
        return twin

    @rule(stream=streams, name=st.integers(0, 1))
    def save(self, stream: Stream, name: int) -> None:
        stream.session.save(Path(self.folder.name) / str(name))
        self.files[name] = list(stream.ids), dict(stream.gone)

    @rule(stream=streams, name=st.integers(0, 1))
    def load(self, stream: Stream, name: int) -> None:
        if name in self.files:
            stream.session.load(Path(self.folder.name) / str(name))
            stream.ids, stream.gone = (kind(held) for kind, held in zip((list, dict), self.files[name], strict=True))

    @rule(stream=streams)
    def reset(self, stream: Stream) -> None:
        stream.session.reset()
        stream.ids, stream.gone = [], {}

    @invariant()
    def everyone_sees_what_it_should(self) -> None:
        for stream in getattr(self, "all", ()):
            ids, session = stream.ids, stream.session
            first = max(SINKS, len(ids) - WINDOW)
            kept = {n: token for n, token in enumerate(ids) if n < SINKS or n >= first}
            seen = {span.start + n: token for span in session.visible.spans for n, token in enumerate(span.ids)}
            assert seen == kept and session.seen == len(ids)
            assert session.evicted == len(ids) - len(kept) == len(stream.gone)
            assert stream.gone == {n: token for n, token in enumerate(ids) if n not in kept}

    @invariant()
    def everyone_expects_what_a_fresh_reader_expects(self) -> None:
        for stream in getattr(self, "all", ()):
            told = stream.session.fork().score([7, 200, 31]).nll
            expected = Session(tiny_loaded(), SINKS, WINDOW).score([*stream.ids, 7, 200, 31]).nll[-3:]
            np.testing.assert_allclose(told, expected, rtol=0, atol=1e-9, equal_nan=True)

    @invariant()
    def nobody_shares_memory(self) -> None:
        held = [tensor for stream in getattr(self, "all", ()) for tensor in tensors(stream.session)]
        assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == len(held)


def tensors(session: Session) -> list[Tensor]:
    """The tensors that a session keeps for itself."""
    rings = [tensor for ring in session._cache.rings if ring.is_initialized for tensor in ring.held]
    return [*rings, *([] if session._logits is None else [session._logits])]


Sessions.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestSessions = pytest.mark.slow(Sessions.TestCase)
