"""Entropy and heads against attention written out whole: dense, in a plain window, and in a window with sinks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinks.analysis.measures import entropy
from sinks.analysis.measures.entropy import KINDS, cut, ends_of, judge, measure, repeated_tokens
from sinks.analysis.measures.rows import Rows
from sinks.errors import InvalidInput, NotAttached, TextTooShort
from sinks.kernels.lens import Sight, View
from sinks.models.attach import attach
from tests.analysis.explicit import Explicit, explicit
from tests.families.tiny import build, tokens

SINKS, WINDOW = 4, 9
LENGTH = 3 * (SINKS + WINDOW)


def rows(whole: Explicit, sink: tuple[int, ...]) -> dict[str, Tensor]:
    """Entropy, normalised, without the sink, and mass on it: float64 `[layers, texts, heads, T]`, NaN: none."""
    weights = whole.stacked
    extra = torch.stack([torch.zeros_like(row[..., 0]) if mass is None else mass
                         for row, mass in zip(whole.weights, whole.logit_mass, strict=True)])  # fmt: skip
    outcomes = (whole.seen_keys + torch.tensor([mass is not None for mass in whole.logit_mass])[:, None]).double()
    normalised = whole.entropy / outcomes.log()[:, None, None]
    rest = weights.clone()
    rest[..., list(sink)] = 0
    left = rest.sum(dim=-1, keepdim=True)
    without = torch.special.entr(rest / left).sum(dim=-1)
    return {
        "entropy": whole.entropy,
        "normalised": normalised.where(outcomes[:, None, None] > 1, torch.nan),
        "without_sink": without,
        "sink_mass": weights[..., list(sink)].sum(dim=-1) + extra,
    }


def check_profile(found: entropy.Profile, whole: Explicit, sink: tuple[int, ...]) -> None:
    for name, values in rows(whole, sink).items():
        got, begin = getattr(found, name), 0
        for index, end in enumerate(found.ends.tolist()):
            expected = values[..., begin:end].movedim(1, -1).flatten(2).nanmean(dim=-1)
            np.testing.assert_allclose(got[..., index], expected.numpy(), atol=1e-9, err_msg=f"{name} {end}")
            begin = end


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_the_oracle_agrees_with_transformers(name: str) -> None:
    model, ids = build(name, layers=2, attention="eager"), tokens(20, batch=2)
    expected = model(ids, output_attentions=True).attentions
    for weights, theirs in zip(explicit(model, ids).weights, expected, strict=True):
        torch.testing.assert_close(weights, theirs.double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("sink", [(0,), (0, 2)])
def test_dense_profiles_are_those_of_the_whole_matrix(name: str, sink: tuple[int, ...]) -> None:
    model, ids = build(name, layers=2), tokens(19, batch=5)
    found = measure(model, ids, sink_keys=sink, batch=2)
    (dense,) = found.profiles
    assert found.folklore == ()
    check_profile(dense, explicit(model, ids), sink)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("sink", [(0,), (0, 1, 2, 3)])
def test_profiles_of_a_stream_are_those_of_the_whole_matrix(
    name: str, sink: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy, "CHUNK", 7)
    model, ids = attach(build(name, layers=2)), tokens(19, batch=3)
    stream = tokens(3 * LENGTH + 5)[0]
    found = measure(model, ids, stream, sinks=SINKS, window=WINDOW, sink_keys=sink)
    dense, kept, plain = found.profiles
    segments = stream[: 3 * LENGTH].view(3, LENGTH)
    check_profile(dense, explicit(model, ids), sink)
    check_profile(kept, explicit(model, segments, sinks=SINKS, window=WINDOW), sink)
    whole = explicit(model, segments, sinks=0, window=SINKS + WINDOW)
    check_profile(plain, whole, sink)
    begins = np.concatenate(([0], plain.ends[:-1]))
    later = plain.sink_mass[..., begins >= SINKS + WINDOW + max(sink)]
    assert later.shape[-1] and ((later == 0).all() or name == "gpt_oss")  # a sink logit is never let go
    normalised = rows(whole, sink)["normalised"].mean(dim=(0, 2))  # segments positions
    capacity, quarter = SINKS + WINDOW, (SINKS + WINDOW) // 4
    ratio = normalised[:, capacity : capacity + quarter].mean() / normalised[:, capacity - quarter : capacity].mean()
    cliff = next(part for part in found.folklore if "cliff" in part.claim and "plain" in part.claim)
    assert cliff.measured == pytest.approx(float(ratio), rel=1e-9)


def sight_of(scores: Tensor, bent: bool = False) -> Sight:
    """One block of one head whose keys stand at 0, 1, ... and whose queries stand behind them."""
    batch, heads, queries, keys = scores.shape
    places = torch.arange(keys).expand(batch, -1)
    view = View(0, range(heads), 1, places[:, keys - queries :], places)
    query, key = (torch.zeros(batch, heads, count, 2) for count in (queries, keys))
    visible = (scores > -torch.inf).sum(dim=-1)
    return Sight(view, scores, scores.softmax(dim=-1), None, bent, 0, visible, query, key, key)


@pytest.mark.parametrize("bent", [False, True])
def test_what_is_left_of_a_row_that_the_sink_takes_keeps_its_digits(bent: bool) -> None:
    scores = torch.randn(2, 3, 4, 9)
    scores[..., 0] += 30
    found = Rows(sight_of(scores, bent), torch.tensor([0]))
    exact = scores[..., 1:].double().softmax(dim=-1)
    expected = torch.special.entr(exact).sum(dim=-1)
    assert float((1 - scores.softmax(dim=-1)[..., 0]).max()) == 0  # 1 - m has no digit left in float32
    torch.testing.assert_close(found.without_sink, expected, atol=1e-5, rtol=0)


def test_entropy_without_the_sinks_obeys_its_identity() -> None:
    scores = torch.randn(2, 3, 4, 9).double()
    found = Rows(sight_of(scores), torch.tensor([0, 3]))
    mass = found.sink_mass
    inside = scores[..., [0, 3]].softmax(dim=-1)
    binary = torch.special.entr(mass) + torch.special.entr(1 - mass)
    inner = torch.special.entr(inside).sum(dim=-1)
    torch.testing.assert_close(
        found.without_sink, (found.entropy - binary - mass * inner) / (1 - mass), atol=1e-12, rtol=0
    )


def test_a_row_of_nothing_but_sinks_has_nothing_left() -> None:
    found = Rows(sight_of(torch.randn(1, 1, 2, 2).double()), torch.tensor([0, 1]))
    assert found.without_sink.isnan().all() and found.mean_distance.isnan().all()
    torch.testing.assert_close(found.sink_mass, torch.ones(1, 1, 2).double())


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_measures_of_heads_are_those_of_the_whole_matrix(name: str) -> None:
    sink, length = [0, 1], 40
    model, ids = build(name, layers=2), tokens(length, batch=3)
    heads = measure(model, ids, sink_keys=sink, batch=2).heads
    whole = explicit(model, ids)
    weights = whole.stacked[..., length // 2 :, :]
    rest = weights.clone()
    rest[..., sink] = 0
    distance = torch.arange(length)[length // 2 :, None] - torch.arange(length)
    expected = {
        "sink_mass": weights[..., sink].sum(-1),
        "previous_mass": (rest * (distance == 1)).sum(-1),
        "local_mass": (rest * ((distance >= 0) & (distance < 16))).sum(-1),
        "normalised_entropy": rows(whole, (0,))["normalised"][..., length // 2 :],
        "mean_distance": (rest * distance).sum(-1) / rest.sum(-1),
    }
    for measured, values in expected.items():
        np.testing.assert_allclose(getattr(heads, measured), values.mean(dim=(1, 3)), atol=1e-9, err_msg=measured)
    repeated, back = repeated_tokens(ids, ids[0, :0])
    copies = explicit(model, repeated).stacked.clone()
    copies[..., sink] = 0
    queries = range(back + 1, repeated.shape[1])
    mass = torch.stack([copies[..., query, query - back] for query in queries]).mean(dim=(0, 2))
    np.testing.assert_allclose(heads.induction_mass, mass, atol=1e-9)


@pytest.mark.parametrize("bos", [False, True])
def test_repeated_tokens_say_where_to_copy_from(bos: bool) -> None:
    ids = tokens(30, batch=4)
    if bos:
        ids[:, 0] = 70
    texts, back = repeated_tokens(ids, ids[0, :bos])
    assert len(texts) == entropy.REPEATS and set(texts.unique().tolist()) <= set(ids.unique().tolist())
    half = texts.shape[1] // 2
    assert texts.shape[1] == 2 * half + bos
    assert not bos or bool((texts[:, 0] == 70).all() and (texts[:, 1:] != 70).all())
    for text in texts.tolist():
        assert len(set(text[bos : bos + half])) == half
        for query in range(bos + half, len(text) - 1):
            before = max(place for place in range(query) if text[place] == text[query])
            assert query - back == before + 1 and text[query - back] == text[query + 1]


def test_every_head_is_of_the_first_kind_that_fits() -> None:
    # sink mass, normalised entropy, distance, previous, local, induction -> kind
    cases = [
        ((0.9, 0.1, 5, 0.0, 0.1, 0.1), "sink"),
        ((0.3, 0.5, 5, 0.2, 0.69, 0.1), "sink"),
        ((0.2, 0.4, 1, 0.3, 0.7, 0.1), "previous"),
        ((0.5, 0.4, 1, 0.3, 0.4, 0.1), "previous"),
        ((0.9, 0.1, 5, 0.4, 0.1, 0.3), "induction"),
        ((0.1, 0.95, 5, 0.1, 0.5, 0.1), "local"),
        ((0.1, 0.95, 30, 0.1, 0.3, 0.1), "uniform"),
        ((0.29, 0.89, 30, 0.29, 0.49, 0.29), "mixed"),
        ((0.1, 0.5, 5, 0.1, 0.3, np.nan), "mixed"),
    ]
    measures = np.array([case for case, _ in cases]).T[:, None]  # statistics, one layer, heads
    copies = np.stack([np.zeros_like(measures[0])] * 3 + [measures[5]])
    found = entropy._heads(measures[:5], copies)
    assert [KINDS[kind] for kind in found.kind[0]] == [kind for _, kind in cases]


def test_a_uniform_model_has_uniform_heads() -> None:
    model = build("llama", layers=1)
    for parameter in model.model.layers[0].self_attn.q_proj.parameters():
        parameter.zero_()
    found = measure(model, tokens(64, batch=2))
    assert (found.heads.kind == KINDS.index("uniform")).all()
    np.testing.assert_allclose(found.heads.normalised_entropy, 1)
    np.testing.assert_allclose(found.profiles[0].normalised, 1)


def shaped(segments: int, **levels: float) -> np.ndarray:
    """Segments of capacity 64: start, early (to 32), plateau (to 64), after; with a wobble that segments share."""
    along = np.full((segments, 192), levels["after"])
    along[:, :64], along[:, :32], along[:, :16] = levels["plateau"], levels["early"], levels["start"]
    along[:, 0] = np.nan
    return along * np.linspace(0.9, 1.1, segments)[:, None]


@pytest.mark.parametrize(
    ("levels", "measured", "holds"),
    [
        ({"start": 0.9, "early": 0.5, "plateau": 0.5, "after": 0.4}, (1.8, 1.0, 0.8), (True, True, True)),
        ({"start": 0.5, "early": 0.5, "plateau": 0.5, "after": 0.6}, (1.0, 1.0, 1.2), (False, True, False)),
        ({"start": 0.5, "early": 0.5, "plateau": 0.4, "after": 0.37}, (1.153846, 0.8, 0.925), (True, False, False)),
    ],
)
def test_the_saying_is_judged_part_by_part(
    levels: dict[str, float], measured: tuple[float, ...], holds: tuple[bool, ...]
) -> None:
    found = judge("a reader", shaped(5, **levels), 64)
    assert [part.measured for part in found] == pytest.approx(measured, rel=1e-6)
    assert tuple(part.holds for part in found) == holds
    assert all(part.low <= part.measured + 1e-12 and part.measured <= part.high + 1e-12 for part in found)
    alone = judge("a reader", shaped(1, **levels), 64)
    assert tuple(part.holds for part in alone) == holds and all(np.isnan(part.low) for part in alone)


def test_a_part_that_segments_do_not_agree_on_does_not_hold() -> None:
    along = shaped(4, start=0.5, early=0.5, plateau=0.5, after=0.4)
    along[0, 64:] *= 1.35
    cliff = judge("a reader", along, 64)[2]
    assert cliff.measured < 0.9 < cliff.high and not cliff.holds


def test_bins_end_where_the_first_token_goes() -> None:
    assert ends_of(64).tolist() == [2, 4, 8, 16, 32, 64]
    assert ends_of(19).tolist() == [2, 4, 8, 16, 19]
    assert ends_of(768, 256).tolist() == [2, 4, 8, 16, 32, 64, 128, 256, 272, 288, 320, 384, 512, 768]


def test_a_stream_is_cut_into_segments_that_let_something_go() -> None:
    stream = torch.arange(1000)
    assert torch.equal(cut(stream, 100), stream[:900].view(3, 300))
    assert torch.equal(cut(stream[:125], 100), stream[None, :125])
    with pytest.raises(TextTooShort, match="125"):
        cut(stream[:124], 100)
    first = torch.tensor([5000])
    expected = torch.cat((first.expand(3, 1), stream[: 3 * 299].view(3, 299)), dim=1)
    assert torch.equal(cut(stream, 100, first), expected)
    assert torch.equal(cut(torch.cat((first, stream)), 100, first), expected)  # a stream that has it already
    with pytest.raises(InvalidInput, match="at least 8"):
        cut(stream, 7)


def test_what_all_texts_begin_with_begins_every_segment() -> None:
    model, ids, stream = attach(build("llama", layers=1)), tokens(19, batch=3), tokens(2 * LENGTH)[0]
    ids[:, 0] = 70
    found = measure(model, ids, stream, sinks=SINKS, window=WINDOW)
    segments = cut(stream, SINKS + WINDOW, torch.tensor([70]))
    assert (segments[:, 0] == 70).all() and segments.shape == (2, LENGTH)
    check_profile(found.profiles[1], explicit(model, segments, sinks=SINKS, window=WINDOW), (0,))


def test_work_is_counted_in_tokens() -> None:
    model, ids, stream = attach(build("llama", layers=1)), tokens(19, batch=5), tokens(2 * LENGTH)[0]
    told: list[int] = []
    measure(model, ids, stream, sinks=SINKS, window=WINDOW, batch=2,
            stage=lambda name, work: [told.append(-work), told.append][1])  # fmt: skip
    assert len(told) > 5 and sum(told) == 0


@pytest.mark.parametrize("ids", [tokens(1), tokens(9)[:0], torch.full((2, 9), 3)])
def test_texts_without_anything_to_see_are_refused(ids: Tensor) -> None:
    with pytest.raises(InvalidInput, match="give"):
        measure(build("llama", layers=1), ids)


def test_a_stream_needs_an_attached_model() -> None:
    model: Any = build("llama", layers=1)
    with pytest.raises(NotAttached):
        measure(model, tokens(19, batch=2), tokens(LENGTH)[0], sinks=SINKS, window=WINDOW)
