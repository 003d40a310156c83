"""The built-in model as a session: word for word what transformers generates, and the text of its own tokenizer."""

from pathlib import Path

import pytest
import torch

from sinks.models.load import Loaded, load
from sinks.stream.pieces import Pieces, Vocabulary
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session

TEXT = "A lighthouse, café, naïve; 東京の灯台 🗼🏽 маяк\n\tdef f(x):  return {x: 'ﷺ'}\r\n"
TEXT += "".join(map(chr, range(256, 400)))


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """The built-in model, once."""
    return load()


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers_until_something_is_let_go(loaded: Loaded):
    """Greedy float32: a rounding error could change a near tie, and over these tokens there is none."""
    session = Session.open(loaded, window=252)
    prompt = "The history of the lighthouse begins long before"
    session.feed(prompt)
    text = "".join(session.generate(100))
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        expected = loaded.model.generate(ids, attention_mask=mask, max_new_tokens=100, do_sample=False)
    assert [token for span in session.visible.spans for token in span.ids] == expected[0].tolist()
    assert text == loaded.tokenizer.decode(expected[0, ids.shape[1] :])
    assert session.visible.text == prompt + text


def test_its_pieces_are_the_text(loaded: Loaded):
    pieces = Pieces(Vocabulary(loaded.tokenizer))
    pieces.begin()
    told = [pieces.push(token) for token in loaded.tokenizer(TEXT).input_ids]
    assert "".join(told) + pieces.finish(broken=True) == TEXT
    assert "" in told and not any("\ufffd" in piece for piece in told)


@pytest.mark.slow
def test_a_snapshot_of_a_full_window_goes_on_word_for_word(loaded: Loaded, tmp_path: Path):
    session = Session.open(loaded, window=60)
    session.feed(TEXT)
    sampling = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1)
    list(session.generate(20, sampling=sampling))
    session.save(tmp_path / "s")
    again = Session.open(loaded)
    again.load(tmp_path / "s")
    assert "".join(again.generate(40, sampling=sampling)) == "".join(session.generate(40, sampling=sampling))
    assert again.evicted == session.evicted > 0
