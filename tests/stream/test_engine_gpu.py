"""Engines and sessions on a GPU: the captured step over seats against ordinary passes, in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sinks.cache.cache import SinkCache
from sinks.models.attach import attach
from sinks.models.load import Loaded, Source
from sinks.models.step.hasten import hasten
from sinks.stream.engine import steps as room
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.flight import Flights
from sinks.stream.engine.rows.row import Row
from sinks.stream.sampling import GREEDY, Sampling
from sinks.stream.session import Session
from tests.reading.tiny import tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SINKS, WINDOW, FAR = 4, 60, 10_000_000
IDS = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPTS = [IDS[n : n + size] for n, size in enumerate((1, 5, 63, 64, 65, 200, 30, 99))]


def small(dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama with heads of 64, its weights rounded to bfloat16 whatever its type."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.08,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    settings = model.generation_config
    assert settings is not None
    settings.eos_token_id, settings.pad_token_id = None, 0
    model.to(dtype=torch.bfloat16).eval()  # type: ignore[call-arg]
    return model.to(device="cuda", dtype=dtype)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def plain() -> Loaded:
    return Loaded(attach(small(torch.bfloat16)), tiny_tokenizer(), Source("small", "folder", "none", "", ""))


@pytest.fixture(scope="module")
def exact(plain: Loaded) -> Loaded:
    return replace(plain, model=attach(small(torch.float32)))


@pytest.fixture(scope="module")
def captured(plain: Loaded) -> Loaded:
    return replace(plain, model=hasten(attach(small(torch.bfloat16))))


def token_by_token(loaded: Loaded, ids: list[int], **options: Any) -> Tensor:
    """Logits `[tokens, vocab]` behind every token, each fed alone, float32."""
    cache = SinkCache.for_model(loaded.model, sinks=SINKS, window=WINDOW, **options)
    with torch.inference_mode():
        found = [
            loaded.model(input_ids=torch.tensor([[token]], device="cuda"), past_key_values=cache, use_cache=True).logits
            for token in ids
        ]
    return torch.cat([each[0, -1:].float() for each in found])


@contextmanager
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Row, list[tuple[int, Tensor]]]]:
    """Inside, what engines predict: by row, (the token that was read, the logits behind it).

    So that there is something to hear, no step is launched before the host has read the tokens of the last.
    """
    found: dict[Row, list[tuple[int, Tensor]]] = {}
    reading = room.read_newest

    def heard(rows: list[Row], size: int) -> None:
        reading(rows, size)
        for row in rows:
            assert row.logits is not None and row.history.newest is not None
            found.setdefault(row, []).append((row.history.newest, row.logits.float().clone()))

    with monkeypatch.context() as patch:
        patch.setattr(room, "read_newest", heard)
        patch.setattr(Flights, "can_take", lambda *_: False)
        yield found


def run(loaded: Loaded, slots: int, count: int, sampling: Sampling) -> list[str]:
    """The texts of all prompts, asked at once."""
    engine = Engine(loaded, slots, SINKS, WINDOW, chunk=50)
    requests = [engine.submit(prompt, max_tokens=count, sampling=sampling) for prompt in PROMPTS]
    engine.run()
    said = [request.text() for request in requests]
    engine.close()
    return said


def test_logits_of_an_engine_are_as_near_the_truth_as_those_of_a_session(
    captured: Loaded, plain: Loaded, exact: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 against float32 of the same weights: at most twice the error of ordinary passes, and one rounding."""
    engine = Engine(captured, 8, SINKS, WINDOW, chunk=50)
    with listening(monkeypatch) as found:
        for prompt in PROMPTS:
            request = engine.submit(prompt, max_tokens=40)
            while not request.tokens:
                engine.step()
        engine.run()
    assert len(found) == len(PROMPTS)
    for prompt, heard in zip(PROMPTS, found.values(), strict=True):
        ids = [*prompt[:-1], *(token for token, _ in heard)]
        truth, ordinary = token_by_token(exact, ids), token_by_token(plain, ids)
        own = torch.stack([logits for _, logits in heard])
        band = torch.finfo(torch.bfloat16).eps * truth.abs().max()
        begin = len(prompt) - 1
        error = (own - truth[begin:]).abs().max()
        assert error <= 2 * (ordinary - truth).abs().max() + band


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_p=0.95, repetition_penalty=1.1, seed=3)])
def test_texts_are_those_of_a_session_in_float32(exact: Loaded, sampling: Sampling) -> None:
    said = run(replace(exact, model=small(torch.float32)), 8, 30, sampling)
    for prompt, text in zip(PROMPTS, said, strict=True):
        session = Session(exact, SINKS, WINDOW, chunk=50)
        session.feed(prompt)
        assert text == "".join(session.generate(30, sampling=sampling))


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_streams_that_share_seats_through_the_host_say_the_same(captured: Loaded, kind: Any) -> None:
    """A steady engine: every step is of one size, so that a row is the same to the last bit in any company."""
    said = []
    for slots in (8, 3):
        engine = Engine(captured, slots, SINKS, WINDOW, chunk=500, steady=True, cache=kind)
        streams, texts = [engine.join() for _ in PROMPTS], []
        for turn in range(3):
            requests = [
                stream.submit(prompt[: 9 + turn], max_tokens=12)
                for stream, prompt in zip(streams, PROMPTS, strict=True)
            ]
            engine.run()
            texts.append([request.text() for request in requests])
        said.append(texts)
        assert engine.held == slots
        engine.close()
    # Batches of 8 and of 3: bfloat16 products may round differently, and a near tie fall otherwise.
    same = [one == other for a, b in zip(*said, strict=True) for one, other in zip(a, b, strict=True)]
    assert sum(same) >= 0.75 * len(same), said


def test_parked_streams_go_on_to_the_last_bit(captured: Loaded, tmp_path: Path) -> None:
    said = []
    for way in ("stays", "host", "file"):
        engine = Engine(captured, 2, SINKS, WINDOW, chunk=50)
        stream, texts = engine.join(), []
        for turn in range(4):
            texts.append(stream.submit(IDS[60 * turn : 60 * turn + 45], max_tokens=10).text())
            if way != "stays":
                stream.park(tmp_path / "parked" if way == "file" else None)
                assert engine._ground.pool is not None and engine._ground.pool.free == 2
                engine.submit(IDS[100:180], max_tokens=3).text()  # somebody else sits in its seat
        said.append(texts)
        engine.close()
    assert said[0] == said[1] == said[2]


def test_joining_and_leaving_captures_nothing_anew(captured: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []
    begin = torch.cuda.CUDAGraph.capture_begin
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "capture_begin", lambda self, *args, **kw: captures.append(1) or begin(self, *args, **kw)
    )
    engine = Engine(captured, 8, SINKS, WINDOW, chunk=50)
    engine.start()
    before = len(captures)
    if not before:
        pytest.skip("this model has no captured step")
    assert before == 8  # batches of 1, 2, 4 and 8, for the likeliest tokens and for others
    for _ in range(3):
        requests = [
            engine.submit(prompt, max_tokens=5 + 3 * n, sampling=Sampling(n % 3 / 2, top_k=n))
            for n, prompt in enumerate(PROMPTS)
        ]
        assert all(request.text() and request.finish == "length" for request in requests)
    engine.close()
    assert len(captures) == before


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_a_session_steps_as_near_the_truth_as_ordinary_passes(
    captured: Loaded, plain: Loaded, exact: Loaded, kind: Any
) -> None:
    ids = IDS[:150]
    truth, ordinary, own = (token_by_token(each, ids, cache=kind) for each in (exact, plain, captured))
    band = torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (own - truth).abs().max() <= 2 * (ordinary - truth).abs().max() + band


def test_sessions_fork_save_load_and_reset(captured: Loaded, tmp_path: Path) -> None:
    session = Session(captured, SINKS, WINDOW, chunk=40)
    session.feed(IDS[:130])
    twin = session.fork()
    session.save(tmp_path / "moment")
    said = "".join(session.generate(20))
    again = Session(captured, SINKS, WINDOW, chunk=40)
    again.load(tmp_path / "moment")
    assert "".join(twin.generate(20)) == said == "".join(again.generate(20))
    expected = session.score(IDS[:50]).nll
    np.testing.assert_array_equal(again.score(IDS[:50]).nll, expected)
    session.reset()
    session.feed(IDS[:130])
    assert "".join(session.generate(20)) == said


def test_a_stream_that_begins_far_out_is_the_same(captured: Loaded, exact: Loaded, plain: Loaded) -> None:
    ids = IDS[:150]
    near, far = token_by_token(exact, ids), token_by_token(exact, ids, start=FAR)
    assert (near - far).abs().max() <= 1e-4 * near.abs().max()
    # bfloat16: no worse than a row in a batch of another size.
    own, moved = token_by_token(captured, ids), token_by_token(captured, ids, start=FAR)
    spread = (token_by_token(plain, ids) - near).abs().max()
    band = torch.finfo(torch.bfloat16).eps * near.abs().max()
    assert (own - moved).abs().max() <= 2 * spread + band
