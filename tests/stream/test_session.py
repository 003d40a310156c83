"""One endless stream: what it sees, what it says, and that it is the same however it is fed, left, saved and forked."""

from __future__ import annotations

import gc
import math
import tracemalloc

import numpy as np
import pytest
import torch

from sinks.cache.cache import SinkCache
from sinks.errors import CacheError, InvalidInput
from sinks.models.attach import attach
from sinks.reading.perplexity import score
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.families.tiny import build
from tests.reading.tiny import BOS
from tests.stream.opened import CLOSE, IDS, SINKS, WARM, WINDOW, fresh, future, ids_of, opened, tiny_loaded

# Reading


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 1000])
def test_reading_is_the_same_in_any_portions(chunk: int) -> None:
    model = tiny_loaded().model
    expected = score(model, torch.tensor(IDS), SinkCache.for_model(model, sinks=SINKS, window=WINDOW))
    session = opened(chunk=chunk)
    told = [session.score(IDS[:1]), session.score(IDS[1:20]), session.score([]), session.score(IDS[20:])]
    nll = np.concatenate([each.nll for each in told])
    np.testing.assert_allclose(nll, expected.nll, **CLOSE, equal_nan=True)
    assert [token for each in told for token in each.ids] == IDS
    assert math.isnan(nll[0]) and not np.isnan(nll[1:]).any()


def test_feeding_and_scoring_read_alike() -> None:
    session = opened()
    session.feed(IDS[:30])
    session.score(torch.tensor(IDS[30:33]))
    session.feed(torch.tensor(IDS[33:]))
    np.testing.assert_allclose(future(session), future(fresh(IDS)), **CLOSE)


def test_a_text_gets_the_beginning_that_its_tokenizer_gives_it_once() -> None:
    session = Session(tiny_loaded(bos=True), SINKS, WINDOW)
    assert len(session.score("ab").ids) == 3 and len(session.score("ab").ids) == 2
    assert ids_of(session)[0] == BOS and ids_of(session).count(BOS) == 1
    session.reset()
    assert "".join(session.generate(3)) and ids_of(session)[0] == BOS
    assert session.seen == 4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [[257], [-1], ["a"], [True], [1.0], torch.tensor([[1, 2]]), torch.tensor([0.5])])
def test_ids_that_are_none_are_refused_and_nothing_is_read(wrong: object) -> None:
    session = opened()
    session.feed(IDS[:5])
    with pytest.raises(InvalidInput, match="from 0 to 256"):
        session.feed(wrong)  # type: ignore[arg-type]
    assert session.seen == 5


@pytest.mark.parametrize("name", ["bloom", "cohere", "deepseek_v3", "falcon_alibi", "gemma2", "gpt_oss", "gptj", "mpt"])
def test_every_kind_of_family(name: str) -> None:
    """Read without the output head, with it, and one by one while generating: all the same stream."""
    base = tiny_loaded()
    model = attach(build(name, layers=2))
    loaded = type(base)(model, base.tokenizer, base.source)
    session, ids = Session(loaded, SINKS, WINDOW, chunk=5), [token % 60 for token in IDS]
    session.feed(ids[:40])
    list(session.generate(20, sampling=Sampling(temperature=1.0)))
    told = session.score(ids[:30]).nll
    recent = [token for span in session.visible.spans for token in span.ids]
    assert session.seen == 90 and recent[3:] == ids[21:30]
    again = Session(loaded, SINKS, WINDOW)
    again.feed(ids[:40])
    written: list[int] = []
    again._history.on_evict = lambda start, gone: written.extend(gone)
    list(again.generate(20, sampling=Sampling(temperature=1.0)))
    written += list(again._history.recent)
    whole = Session(loaded, SINKS, WINDOW).score([*ids[:40], *written[-20:], *ids[:30]]).nll
    np.testing.assert_allclose(told, whole[60:], **CLOSE)


# What is seen, and what was let go


def test_visible_and_evicted() -> None:
    told: list[tuple[int, list[int]]] = []
    session = opened(on_evict=lambda start, ids: told.append((start, ids)))
    assert session.visible.spans == () and session.visible.text == "" and session.evicted == 0
    session.feed("abcdefghijkl")
    (span,) = session.visible.spans
    assert (span.start, span.stop, span.text) == (0, 12, "abcdefghijkl") and not told
    session.feed("mnopqrstuvwxyz")
    first, recent = session.visible.spans
    assert (first.start, first.stop, first.text) == (0, 3, "abc")
    assert (recent.start, recent.stop, recent.text) == (17, 26, "rstuvwxyz")
    assert session.visible.text == "abc [...] rstuvwxyz" and session.visible.tokens == 12
    assert session.evicted == 14 == sum(len(ids) for _, ids in told)
    gone = {start + n: token for start, ids in told for n, token in enumerate(ids)}
    letters = session.loaded.tokenizer("abcdefghijklmnopqrstuvwxyz").input_ids
    assert gone == {position: letters[position] for position in range(3, 17)}
    list(session.generate(2))
    assert session.evicted == 16 and told[-1][0] == 18


def test_no_sinks_and_one_recent_token() -> None:
    session = opened(sinks=0, window=1)
    session.feed(IDS)
    assert [(span.start, span.ids) for span in session.visible.spans] == [(79, (IDS[-1],))]
    np.testing.assert_allclose(future(session), future(fresh(IDS, 0, 1)), **CLOSE)


def test_who_listens_may_fail_and_the_session_goes_on() -> None:
    def fail(start: int, ids: list[int]) -> None:
        raise RuntimeError("no room")

    session = opened(on_evict=fail)
    session.feed(IDS[:12])
    for token in IDS[12:20]:
        with pytest.raises(RuntimeError, match="no room"):
            session.feed([token])
    np.testing.assert_allclose(future(session), future(fresh(IDS[:20])), **CLOSE)


# Generating


def test_greedy_is_what_transformers_generates() -> None:
    """Nothing is let go: the window holds it all."""
    model = tiny_loaded(dtype=torch.float32).model
    session = Session(tiny_loaded(dtype=torch.float32), 4, 300)
    session.feed(IDS[:20])
    text = "".join(session.generate(200))
    prompt = torch.tensor([IDS[:20]])
    with torch.inference_mode():
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, do_sample=False)
    assert ids_of(session) == theirs[0].tolist()
    decoded = session.loaded.tokenizer.decode(theirs[0, 20:], clean_up_tokenization_spaces=False)
    assert decoded.startswith(text) and len(decoded) - len(text) <= 1  # the last character may be unfinished
    assert session.finish == "length"


def test_sampling_is_what_transformers_samples() -> None:
    """The same random numbers, and penalties over the prompt and the answer."""
    loaded = tiny_loaded(dtype=torch.float32)
    session = Session(loaded, 4, 300)
    session.feed(IDS[:20])
    sampling = Sampling(1.3, top_k=60, top_p=0.9, min_p=0.01, repetition_penalty=1.2, history=300, seed=11)
    list(session.generate(100, sampling=sampling))
    prompt = torch.tensor([IDS[:20]])
    torch.manual_seed(11)
    with torch.inference_mode():
        theirs = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=True,
            temperature=1.3, top_k=60, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
        )  # fmt: skip
    assert ids_of(session) == theirs[0].tolist()


@pytest.mark.parametrize("left_at", range(8))
def test_an_answer_may_be_left_at_any_piece(left_at: int) -> None:
    whole, session = fresh(IDS[:20]), fresh(IDS[:20])
    expected = "".join(whole.generate(40))
    answer, said = session.generate(40), ""
    for _ in range(left_at):
        said += next(answer)
    del answer
    assert expected.startswith(said) and session.seen >= 20 + left_at
    assert session.finish is None or left_at == 0
    said += "".join(session.generate(60 - session.seen))
    assert said == expected and session.seen == whole.seen and ids_of(session) == ids_of(whole)
    np.testing.assert_allclose(future(session), future(whole), **CLOSE)


def test_pieces_over_several_answers_are_one_text() -> None:
    """Random bytes: characters begin and end anywhere, also over the end of an answer."""
    session, one = fresh(IDS[:4], window=300), fresh(IDS[:4], window=300)
    said = [piece for _ in range(150) for piece in session.generate(1, sampling=WARM)]
    text = "".join(said)
    assert text == "".join(one.generate(150, sampling=WARM)) and ids_of(session) == ids_of(one)
    decoded = session.loaded.tokenizer.decode(ids_of(session)[4:], clean_up_tokenization_spaces=False)
    assert decoded.startswith(text) and len(decoded) - len(text) <= 1
    assert all(said)


def test_no_tokens_at_all() -> None:
    session = fresh(IDS[:20])
    assert list(session.generate(0)) == [] and session.finish == "length" and session.seen == 20


def test_an_end_token_ends_the_answer_and_stays_in_the_stream() -> None:
    probe = fresh(IDS[:20])
    list(probe.generate(10))
    tail = ids_of(probe)[-5:]
    session = fresh(IDS[:20])
    session._ends = frozenset({tail[0]})
    list(session.generate(10))
    assert session.finish == "end" and ids_of(session)[-1] == tail[0]
    assert session.seen <= 26
    before = session.seen
    list(session.generate(10, sampling=Sampling(logit_bias={tail[0]: -math.inf})))
    assert session.seen == before + 10 and session.finish == "length"


def test_stop_strings_over_several_tokens() -> None:
    probe = fresh([65, 66, 67])
    text = "".join(probe.generate(60))
    at = next(n for n in range(5, len(text) - 3) if text.index(text[n : n + 3]) == n)
    session = fresh([65, 66, 67])
    said = list(session.generate(60, stop=[text[at : at + 3], "never to be said"]))
    assert "".join(said) == text[:at] and session.finish == "stop"
    list(session.generate(63 - session.seen))
    assert ids_of(session) == ids_of(probe)  # the stop string stayed in the stream


def test_an_old_answer_cannot_be_taken_up_again() -> None:
    session = fresh(IDS[:20])
    for use in (lambda: session.feed([1]), lambda: next(session.generate(3)), session.reset):
        answer = session.generate(30, sampling=Sampling(logit_bias={}))
        next(answer)
        use()
        with pytest.raises(CacheError, match="used otherwise"):
            next(answer)
        session.feed(IDS[:20])


def test_an_answer_that_was_never_begun_changes_nothing() -> None:
    session, other = fresh(IDS[:20]), fresh(IDS[:20])
    session.generate(5, stop=["x"], sampling=Sampling(temperature=1.0, seed=3))
    assert list(session.generate(9, sampling=WARM)) == list(other.generate(9, sampling=WARM))


def test_nothing_to_go_on_from() -> None:
    with pytest.raises(InvalidInput, match="nothing was fed"):
        opened().generate(3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"stop": [""]}, "stop=''"),
        ({"stop": [3]}, "stop=3"),
        ({"stop": None}, "stop=None: give strings"),
        ({"sampling": {"temperature": 1}}, "sampling={'temperature': 1}: give Sampling"),
        ({"sampling": None}, "sampling=None: give Sampling"),
    ],
)
def test_wrong_options_are_refused_at_once(wrong: dict, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        fresh(IDS[:5]).generate(**wrong)


@pytest.mark.usefixtures("unchecked")
def test_what_was_wrong_is_said() -> None:
    session = opened()
    with pytest.raises(InvalidInput, match="number 2 of the tokens is -1: token ids are whole numbers from 0 to 256"):
        session.feed([5, 6, -1])
    with pytest.raises(InvalidInput, match="int: token ids"):
        session.feed(7)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"on_evict=3: give a function"):
        opened(on_evict=3)
    with pytest.raises(InvalidInput, match=r"logit_bias=\[1\]: give finite numbers"):
        Sampling(logit_bias=[1])  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_a_model_of_ones_own_is_no_loaded_one() -> None:
    """The likeliest mistake of all."""
    for wrong in (tiny_loaded().model, 5):
        with pytest.raises(InvalidInput, match=f"{type(wrong).__name__}: give a model's name.* attach"):
            Session.open(wrong)  # type: ignore[arg-type]
    for nothing in (None, torch.nn.Linear(2, 2)):
        with pytest.raises(InvalidInput, match="attach takes a model of transformers"):
            attach(nothing)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"sinks": -1}, "sinks=-1 is too small"),
        ({"sinks": None}, "sinks=None is no"),
        ({"window": 0}, "window=0 is too"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_before_anything_is_pinned(sizes: dict, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        Session.open(tiny_loaded(), **sizes)


# For ever


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    """Less than half a pointer a token over some rounds: what is claimed once, by anybody in the process, is none."""
    session = opened(window=60, chunk=100, on_evict=lambda start, ids: None)
    sampling = Sampling(temperature=1.0, repetition_penalty=1.1, presence_penalty=0.1)
    sizes, held, rounds = [], set(), 4
    tracemalloc.start()
    for _ in range(3 * rounds):
        session.feed(IDS * 10)
        list(session.generate(50, sampling=sampling, stop=["never"]))
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
        held.add(session.nbytes)
    tracemalloc.stop()
    assert len(held) == 1
    assert min(after - before for before, after in zip(sizes, sizes[rounds:], strict=False)) < 4 * 850 * rounds
    assert len(session._history.recent) == 60 and len(session._history.first) == SINKS


def test_the_count_does_not_overflow() -> None:
    session = fresh(IDS)
    session._history.seen += 2**70
    assert session.evicted == 80 + 2**70 - 12
    assert session.visible.spans[1].stop == 80 + 2**70


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", [None, b"bytes", 7, "half \ud800 of a character", [True], [1.5], [[1]], ["a"]])
def test_what_is_neither_text_nor_ids_is_refused(given: object) -> None:
    session = opened()
    session.feed(IDS[:5])
    with pytest.raises(InvalidInput):
        session.feed(given)  # type: ignore[arg-type]
    assert session.seen == 5
    with pytest.raises(InvalidInput, match='or "auto"'):
        Session.open(tiny_loaded(), sinks="x")  # type: ignore[arg-type]
