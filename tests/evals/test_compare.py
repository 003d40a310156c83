"""A whole comparison of tiny arms, and the numbers that may stand side by side."""

from collections.abc import Iterator

import numpy as np
import pytest

from sinks.evals.arms import Settings, contenders
from sinks.evals.compare import Comparison, compare
from sinks.reading.memory import SampledMeter
from sinks.types import ignore
from tests.reading.tiny import dense_nll, stream, tiny_model, tiny_tokenizer

TOKENS = 120


@pytest.fixture(scope="module")
def begun() -> list[tuple[str, int]]:
    return []


@pytest.fixture(scope="module")
def comparison(begun: list[tuple[str, int]]) -> Iterator[Comparison]:
    """All arms over 120 tokens with 2 + 14 keys; dense was trained on 60."""
    model = tiny_model(trained=60)

    def stage(name: str, work: int):
        begun.append((name, work))
        return ignore

    settings = Settings(2, 14, samples=10, chunk=16, singles=4)
    arms = contenders(settings, model, tiny_tokenizer(), bos=None)
    yield compare(model, stream(TOKENS), settings, arms, SampledMeter(), stage)


def test_equal_settings_are_measured_once(comparison: Comparison, begun: list[tuple[str, int]]):
    expected = ["dense", "window", "recompute", "sinks", "sweep-1", "sweep-4", "sweep-8", "newlines"]
    assert [name for name, _ in begun] == expected
    assert dict(begun) | {"dense": 60, "recompute": 10, "sinks": 119} == dict(begun)
    assert list(comparison.arms) == [*expected[:4], *(f"sweep-{kept}" for kept in (0, 1, 2, 4, 8)), "newlines"]
    reused = {name: arm.measured_as for name, arm in comparison.arms.items() if arm.measured_as != name}
    assert reused == {"sweep-0": "window", "sweep-2": "sinks"}
    assert comparison.arms["sweep-0"].score is comparison.arms["window"].score


def test_all_arms_are_scored_on_the_same_tokens(comparison: Comparison):
    for name in comparison.arms:
        scored = np.flatnonzero(~np.isnan(comparison.nll(name)))
        if name == "dense":
            assert scored.tolist() == list(range(2, 61))
        elif name == "recompute":
            assert len(scored) == 10
        else:
            assert scored.tolist() == list(range(2, TOKENS))


def test_dense_is_the_direct_computation(comparison: Comparison):
    expected = dense_nll(tiny_model(), stream(TOKENS)).numpy()  # expected[i] is the surprise of token i + 1
    everywhere = comparison.perplexity("dense", comparison.everywhere)
    assert everywhere == pytest.approx(np.exp(expected[1:60].mean()), rel=1e-5)
    after = comparison.perplexity("dense", comparison.after_eviction)
    assert after == pytest.approx(np.exp(expected[16:60].mean()), rel=1e-5)  # query positions 16 to 59
    assert np.isnan(comparison.perplexity_last_quarter("dense"))


def test_until_the_first_eviction_all_arms_agree(comparison: Comparison):
    for name in ("window", "sinks", "sweep-1", "sweep-4", "sweep-8"):
        np.testing.assert_allclose(comparison.nll(name)[:17], comparison.nll("dense")[:17], rtol=0, atol=1e-5)
        assert abs(comparison.nll(name)[17] - comparison.nll("dense")[17]) > 1e-4, "and from then on they do not"


def test_a_ratio_is_on_shared_tokens_only(comparison: Comparison):
    ratio = comparison.ratio("sinks", "dense")
    assert ratio is not None
    assert (ratio.first, ratio.last, ratio.targets) == (17, 60, 44)
    shared = slice(17, 61)
    difference = comparison.nll("sinks")[shared] - comparison.nll("dense")[shared]
    assert ratio.value == pytest.approx(np.exp(difference.mean()))
    assert ratio.error == pytest.approx(ratio.value * difference.std(ddof=1) / np.sqrt(44))
    own = comparison.perplexity("sinks", comparison.after_eviction)
    assert ratio.value != pytest.approx(own / comparison.perplexity("dense", comparison.after_eviction), rel=1e-3)
    sampled = comparison.ratio("recompute", "sinks")
    assert sampled is not None
    assert sampled.targets == 10
    back = comparison.ratio("dense", "sinks")
    assert back is not None
    assert back.value * ratio.value == pytest.approx(1)


def test_no_ratio_without_an_arm_or_without_shared_tokens(comparison: Comparison):
    assert comparison.ratio("sinks", "of another kind") is None
    model = tiny_model(trained=17)  # dense stops one token after the first eviction
    settings = Settings(2, 14, arms=("dense", "sinks"), singles=4)
    arms = contenders(settings, model, tiny_tokenizer(), bos=None)
    short = compare(model, stream(TOKENS), settings, arms, SampledMeter(), lambda name, work: ignore)
    assert short.ratio("sinks", "dense") is None
    assert not short.sampled.any()


def test_costs_are_measured(comparison: Comparison):
    per_token = 2 * 2 * 2 * 8 * 8  # keys and values, layers, heads, head_dim, bytes
    assert comparison.arms["dense"].cache_bytes == 60 * per_token
    assert comparison.arms["recompute"].cache_bytes == 0
    for name in ("window", "sinks", "sweep-8", "newlines"):
        assert comparison.arms[name].cache_bytes == 16 * per_token
    assert all(arm.seconds > 0 and arm.score.latency > 0 for arm in comparison.arms.values())
