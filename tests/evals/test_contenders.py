"""Each contender against a direct computation of the same number."""

import numpy as np
import pytest
import torch

from sinks.evals.contenders import Contender, Dense, Newlines, Pace, Recompute, Sinks
from sinks.reading.perplexity import Score
from tests.reading.tiny import BOS, dense_nll, stream, tiny_model

IDS = stream()
TOKENS = len(IDS)
LINE_BREAK = 10
ATOL = 1e-5  # transformers' norms and softmax stay in float32 even in a float64 model


def read(contender: Contender, layers: int = 2, ids: torch.Tensor = IDS) -> Score:
    return contender.read(tiny_model(layers), ids, Pace(chunk=16, singles=4))


@pytest.mark.parametrize("contender", [Dense(None), Dense(TOKENS), Sinks(0, TOKENS), Sinks(4, TOKENS - 4)])
def test_where_everything_is_visible_all_are_dense(contender: Contender):
    expected = dense_nll(tiny_model(), IDS).numpy()
    found = read(contender)
    assert np.isnan(found.nll[0])
    np.testing.assert_allclose(found.nll[1:], expected, rtol=0, atol=ATOL)


def test_dense_stops_at_its_limit_and_still_predicts_the_next_token():
    contender = Dense(40)
    found = read(contender)
    assert contender.stops_at(TOKENS) == contender.work(TOKENS) == found.read[-1] == 40
    assert np.flatnonzero(found.scored).tolist() == list(range(1, 41))
    np.testing.assert_allclose(found.nll[1:41], dense_nll(tiny_model(), IDS).numpy()[:40], rtol=0, atol=ATOL)


def test_dense_need_not_stop():
    assert Dense(None).stops_at(TOKENS) is None
    assert Dense(TOKENS - 1).stops_at(TOKENS) is None  # the last token is never read
    assert Dense(TOKENS - 2).stops_at(TOKENS) == TOKENS - 2


def test_newlines_are_dense_over_replaced_tokens():
    replaced = IDS.clone()
    replaced[:3] = LINE_BREAK
    found = read(Newlines(3, TOKENS - 3, LINE_BREAK))
    assert not found.scored[:3].any()
    assert found.scored[3:].all()
    np.testing.assert_allclose(found.nll[3:], dense_nll(tiny_model(), replaced).numpy()[2:], rtol=0, atol=ATOL)
    assert IDS[0] != LINE_BREAK, "the stream itself must stay as it is"


def test_recompute_is_a_fresh_pass_over_the_last_keys():
    contender = Recompute(keys=20, samples=6, seed=3)
    found = read(contender)
    positions = contender.positions(TOKENS)
    assert np.flatnonzero(found.scored).tolist() == (positions + 1).tolist()
    for t in positions.tolist():
        expected = dense_nll(tiny_model(), IDS[t - 19 : t + 2])[-1].item()
        assert found.nll[t + 1] == pytest.approx(expected, abs=ATOL)
    assert found.singles == contender.work(TOKENS) == len(found.milliseconds) == 6
    assert not found.cache_bytes.any()


def test_recompute_begins_with_bos_where_streams_do():
    contender = Recompute(keys=20, samples=2, seed=3, bos=BOS)
    found = read(contender)
    t = int(contender.positions(TOKENS)[0])
    visible = torch.cat([torch.tensor([BOS]), IDS[t - 18 : t + 2]])
    assert found.nll[t + 1] == pytest.approx(dense_nll(tiny_model(), visible)[-1].item(), abs=ATOL)


def test_in_one_layer_a_plain_window_is_recomputation():
    """A key of the first layer knows its own token alone, so a fresh pass finds the very keys that the window kept."""
    fresh, kept = (read(contender, layers=1) for contender in (Recompute(16, 1000, 0), Sinks(0, 16)))
    assert np.flatnonzero(fresh.scored).tolist() == list(range(17, TOKENS))
    np.testing.assert_allclose(kept.nll[17:], fresh.nll[17:], rtol=0, atol=ATOL)
    deep = read(Sinks(0, 16), layers=2)
    assert np.nanmax(np.abs(deep.nll - read(Recompute(16, 1000, 0)).nll)) > 0.1, "in two layers it is not"


@pytest.mark.parametrize("samples", [1, 7, 60, 69, 500])
@pytest.mark.parametrize("seed", [0, 1])
def test_samples_are_spread_over_the_stream_after_the_first_eviction(samples: int, seed: int):
    contender = Recompute(keys=20, samples=samples, seed=seed)
    positions = contender.positions(TOKENS)
    assert len(positions) == min(samples, TOKENS - 1 - 20)
    assert (np.diff(positions) > 0).all()
    assert positions[0] >= 20
    assert positions[-1] <= TOKENS - 2
    assert (positions == contender.positions(TOKENS)).all()
    edges = np.linspace(20, TOKENS - 1, len(positions) + 1)
    assert (np.abs(positions - edges[:-1]) <= np.diff(edges).max() + 1).all()


def test_seeds_draw_different_samples():
    first, second = (Recompute(20, 7, seed).positions(1000) for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize(
    "contender", [Dense(40), Dense(None), Sinks(2, 14), Newlines(2, 14, LINE_BREAK), Recompute(16, 5, 0)]
)
def test_listeners_hear_of_all_the_work(contender: Contender):
    heard: list[int] = []
    contender.read(tiny_model(), IDS, Pace(chunk=16, singles=4, listen=heard.append))
    assert sum(heard) == contender.work(TOKENS)
    assert len(contender.keeps) <= 10
