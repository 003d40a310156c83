"""How a session begins: by name, by what `load` gave, and with sizes that a short reading chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinks.errors import CapacityError, InvalidInput, TextTooShort
from sinks.models.attach import attach, detach
from sinks.reading.advice import AdviceSettings, advise
from sinks.stream.session import Session
from tests.reading.tiny import stream, tiny_folder, tiny_model
from tests.stream.opened import opened, tiny_loaded


def test_open_by_folder_and_by_what_load_gave(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    session = Session.open(folder, sinks=2, window=30, dtype="float64")
    assert session.loaded.model.dtype == torch.float64 and (session.plan.sinks, session.plan.window) == (2, 30)
    session.feed("hello")
    assert len(list(session.generate(5))) <= 5 and session.advice is None
    assert Session.open(session.loaded, window=30).loaded is session.loaded
    with pytest.raises(InvalidInput, match="give them to load"):
        Session.open(session.loaded, device="cpu")
    with pytest.raises(CapacityError, match="trained on 512"):
        Session.open(session.loaded)


def test_open_attaches() -> None:
    loaded = tiny_loaded(layers=1)
    detach(loaded.model)
    Session.open(loaded, window=30).feed("hello")
    attach(loaded.model)


def test_auto_takes_the_advice_of_a_short_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded(layers=1)
    text = "".join(chr(97 + token % 26) for token in stream(1400).tolist())
    monkeypatch.setattr("sinks.stream.opening.COMPARED", 200)
    session = Session.open(loaded, sinks="auto", advice_text=text)
    ids = torch.tensor(loaded.tokenizer(text).input_ids)
    expected = advise(loaded.model, ids, AdviceSettings(256, (0, 1, 2, 4, 8), (128, 256, 512), 713))
    assert session.advice == expected
    assert (session.plan.sinks, session.plan.window) == (expected.sinks, expected.window)
    session = Session.open(loaded, sinks="auto", window=40, advice_text=text)
    assert session.plan.window == 40 and session.advice is not None and session.advice.capacity == 44
    assert set(session.advice.by_capacity) == {44}
    with pytest.raises(TextTooShort):
        Session.open(loaded, sinks="auto", advice_text="too short")
    with pytest.raises(InvalidInput, match="only where"):
        Session.open(loaded, window=40, advice_text=text)


def test_a_model_trained_on_few_positions_gets_advice_too() -> None:
    loaded = tiny_loaded(layers=1)
    short = type(loaded)(tiny_model(1, trained=100), loaded.tokenizer, loaded.source)
    session = Session.open(short, sinks="auto", advice_text="abcdefgh" * 200)
    assert session.plan.capacity <= 100


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="chunk=0 is too small"):
        opened(chunk=0)
