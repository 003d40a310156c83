"""The advice: each number against a reading of its own, and the rule that makes advice of numbers."""

import numpy as np
import pytest
import torch

from sinks import SinkCache
from sinks.errors import CapacityError, InvalidInput, TextTooShort
from sinks.reading.advice import Advice, AdviceSettings, advise, compared, fewest
from sinks.reading.perplexity import score
from tests.reading.tiny import dense_nll, stream, tiny_model

SETTINGS = AdviceSettings(capacity=24, counts=(0, 1, 4), capacities=(16, 24, 32, 4096), tokens=400, chunk=16)


def test_the_numbers_are_those_of_separate_readings():
    model, ids = tiny_model(), stream(400)
    settings = AdviceSettings(24, (0, 1, 4), (16, 24, 32), 400, 16)
    told: list[str] = []

    def stage(name: str, work: int):
        told.append(name)
        assert work == 399
        return lambda _: None

    found = advise(model, ids, settings, stage=stage)
    first = 33
    for count, value in found.perplexity.items():
        nll = score(model, ids, SinkCache.for_model(model, sinks=count, window=24 - count), chunk=7).nll[first:]
        assert value == pytest.approx(np.exp(nll.mean()), rel=1e-9)
    assert found.dense == pytest.approx(np.exp(float(dense_nll(model, ids)[first - 1 :].mean())), rel=1e-6)
    assert found.by_capacity[24] == found.perplexity[found.sinks]
    assert found.tokens == 400 - first
    assert told[0] == "advice: dense" and len(told) == 1 + 3 + 2


def test_capacities_the_model_was_not_trained_on_are_left_out():
    with pytest.raises(TextTooShort, match="4225 are needed"):
        advise(tiny_model(), stream(400), SETTINGS)
    with pytest.raises(CapacityError, match="trained on 12"):
        advise(tiny_model(trained=12), stream(400), AdviceSettings(24, (0, 1), (16, 24), 400))


def test_the_rule():
    assert fewest({0: 20.0, 1: 10.05, 2: 10.0, 4: 10.2}, within=1.01) == 1
    assert fewest({0: 10.0, 1: 10.0}, within=1.01) == 0


def test_the_interval_is_over_segments():
    generator = np.random.default_rng(0)
    over = generator.normal(2.0, 1.0, 64 * 50)
    found = compared(over + 0.5, over)
    assert found.value == pytest.approx(np.exp(0.5)) and found.texts == 50
    assert found.low == pytest.approx(found.high)


def advice_of(without: float, monkeypatch: pytest.MonkeyPatch) -> Advice:
    """Advice for a model whose surprise is `without` a token when no sink is kept, and 1 when any is."""
    from sinks.reading import advice

    def read(self, cache, name):
        generator = np.random.default_rng(0)
        kept = getattr(cache, "sinks", 1)
        return generator.normal(1.0, 0.3, 640) + (without - 1.0 if kept == 0 else 0.0)

    monkeypatch.setattr(advice.Stream, "_read", read)
    return advise(tiny_model(), stream(400), AdviceSettings(24, (0, 1, 4), (16, 24, 32), 400))


def test_a_model_that_needs_a_sink_is_told_so(monkeypatch: pytest.MonkeyPatch):
    found = advice_of(1.7, monkeypatch)
    assert (found.sinks, found.window, found.dependent) == (1, 15, True)
    assert found.ratio == pytest.approx(np.exp(0.7))
    assert found.reason.startswith("Sink-dependent: yes. Without sinks 2.01 times the perplexity [2.01, 2.01]")


def test_a_model_that_needs_none_is_told_so(monkeypatch: pytest.MonkeyPatch):
    found = advice_of(1.0, monkeypatch)
    assert (found.sinks, found.window, found.dependent) == (0, 16, False)
    assert found.reason.startswith("Sink-dependent: no.")


@pytest.mark.parametrize("counts", [(1, 2), (0,), (0, -1)])
def test_counts_that_compare_nothing_are_refused(counts: tuple[int, ...]):
    with pytest.raises(InvalidInput, match="give 0 and at least one other"):
        AdviceSettings(counts=counts)


def test_sinks_without_a_window_are_refused():
    with pytest.raises(InvalidInput, match="leave no window within 16 keys"):
        AdviceSettings(capacity=16)
    assert torch.tensor(AdviceSettings().first_scored) == 1025
