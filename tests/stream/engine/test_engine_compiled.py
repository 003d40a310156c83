"""An engine of a model whose steps are compiled for one row: a few rows take them one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sinks.errors import RequestFailed
from sinks.models.attach import attach
from sinks.models.load import Loaded
from sinks.models.step.hasten import hasten
from sinks.models.weights.quantize import quantize
from sinks.stream.engine.engine import Engine
from sinks.stream.engine.rows.batch import ALONE
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.families.tiny import build
from tests.reading.tiny import BOS, tiny_tokenizer
from tests.stream.opened import IDS, SINKS, WINDOW, tiny_loaded

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
PROMPTS = [IDS[:1], IDS[5:8], IDS[10:22], IDS[:60], IDS[20:33]]
WARM = Sampling(temperature=1.0, seed=3)
RARE = 4


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model: Any = build("llama", layers=2, dtype=torch.float32, vocab_size=BOS + 1, **WIDE)
    hasten(attach(quantize(model, "int8")))
    if model.forward.native is None:
        pytest.skip("no C compiler here")
    model.generation_config.eos_token_id = None
    return Loaded(model, tiny_tokenizer(), tiny_loaded().source)


@pytest.fixture
def steps(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What every compiled step was fed; one that is fed `RARE` fails."""
    forward: Any = loaded.model.forward
    native: Callable[..., Tensor] = forward.native
    rare, fed = loaded.model.get_input_embeddings().weight[RARE], list[Tensor]()

    def step(states: Tensor, slots: object) -> Tensor:
        fed.append(states)
        if torch.equal(states[0], rare):
            raise RuntimeError("no")
        return native(states, slots)

    monkeypatch.setattr(forward, "native", step)
    return fed


def alone(loaded: Loaded, prompt: list[int], count: int) -> str:
    session = Session(loaded, SINKS, WINDOW)
    session.feed(prompt)
    return "".join(session.generate(count, sampling=WARM))


@pytest.mark.parametrize("steady", [False, True])
def test_a_few_rows_say_what_sessions_say_alone(loaded: Loaded, steps: list[Tensor], steady: bool):
    expected = [alone(loaded, prompt, 30) for prompt in PROMPTS]
    del steps[:]
    with Engine(loaded, ALONE, SINKS, WINDOW, steady=steady) as together:
        requests = [together.submit(prompt, max_tokens=30, sampling=WARM) for prompt in PROMPTS]
        assert [request.text() for request in requests] == expected
    assert len(steps) >= 29 * len(PROMPTS), "a step for every row"


def test_many_rows_go_through_one_pass(loaded: Loaded, steps: list[Tensor]):
    with Engine(loaded, ALONE + 1, SINKS, WINDOW, steady=True) as together:
        together.submit(PROMPTS[0], max_tokens=5).text()
    assert not steps


def test_rounded_rings_go_through_one_pass(loaded: Loaded, steps: list[Tensor]):
    with Engine(loaded, 2, SINKS, WINDOW, cache="int8") as together:
        together.submit(PROMPTS[0], max_tokens=5).text()
    assert not steps


def test_a_row_that_fails_takes_back_what_others_have_read(loaded: Loaded, steps: list[Tensor]):
    expected = [alone(loaded, prompt, 30) for prompt in PROMPTS]
    with Engine(loaded, ALONE, SINKS, WINDOW) as together:
        requests = [together.submit(prompt, max_tokens=30, sampling=WARM) for prompt in PROMPTS]
        failing = together.submit(IDS[:20], max_tokens=9, sampling=Sampling(logit_bias={RARE: 1e6}))
        with pytest.raises(RequestFailed, match="RuntimeError: no"):
            failing.text()
        assert [request.text() for request in requests] == expected
