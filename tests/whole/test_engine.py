"""The built-in model in a batch: greedy float32 text of ragged rows, word for word what each session says alone."""

import pytest

from sinks.models.load import load
from sinks.stream.engine.engine import Engine
from sinks.stream.session import Session

PROMPTS = (
    "The history of the lighthouse begins long before",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, " * 12,
    "Water boils at",
    "The three laws of thermodynamics state that energy cannot be created, and " * 5,
)
WINDOW = 60
"""So short that three of the five rows have let something go by the end."""


@pytest.mark.slow
def test_ragged_rows_say_word_for_word_what_they_say_alone():
    """A product for five rows may round otherwise than for one: 1e-4 of a logit, and no tie here is as near as that."""
    engine = Engine(load(), slots=5, window=WINDOW, chunk=100)
    requests = [engine.submit(prompt, max_tokens=40) for prompt in PROMPTS]
    engine.run()
    for request, prompt in zip(requests, PROMPTS, strict=True):
        session = Session(engine._ground.loaded, window=WINDOW, chunk=100)
        session.feed(prompt)
        assert request.text() == "".join(session.generate(40))
