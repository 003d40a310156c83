"""How far a change spreads, against plain passes under masks written out; geometry against singular values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from sinks import attach
from sinks.analysis.measures import mixing
from sinks.analysis.measures.mixing import KEPT, distances, geometry, measure, replaced, shapes
from sinks.errors import InvalidInput
from tests.analysis.explicit import explicit
from tests.families.tiny import build, exactly, tokens

EXACT = 1e-9
BOS = 3


class WideSoftmax(TorchFunctionMode):
    """Transformers' eager softmax in float64; its angles stay in float32, as they are in an observed pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.softmax:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def depths(model: PreTrainedModel, ids: Tensor, seen: Tensor, precision: Any = WideSoftmax) -> Tensor:
    """Residual stream by depth, `[depths, texts, T, width]`: transformers' own code under the mask `seen` `[T, T]`."""
    blocks = model.model.layers
    found: list[Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, args, out: found.append(out)) for block in blocks]
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf).expand(len(ids), 1, -1, -1)
    with precision(), torch.no_grad():
        model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def expected(
    model: PreTrainedModel, ids: Tensor, altered: Tensor, seen: Tensor, precision: Any = WideSoftmax
) -> np.ndarray:
    before, after = depths(model, ids, seen, precision), depths(model, altered, seen, precision)
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).transpose(0, 1).numpy()


def led(ids: Tensor) -> Tensor:
    return torch.cat((torch.full_like(ids[:, :1], BOS), ids), dim=1)


@pytest.mark.parametrize("rows", [3, 100])
def test_distances_equal_hidden_states(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixing, "ROWS", rows)
    model, ids = build("llama", layers=3), tokens(19, batch=5)
    altered = torch.stack([replaced(ids, 4, 0), replaced(ids, 9, 1)], dim=1)
    found = distances(model, ids, altered)
    assert found.shape == (5, 2, 4, 19)
    for variant in range(2):
        wanted = expected(model, ids, altered[:, variant], causal(19))
        # the model's own attention, whose eager softmax is in float32
        assert np.abs(found[:, variant] - wanted).max() < 2e-6
    with torch.no_grad():
        states = [model(each, output_hidden_states=True).hidden_states[:-1] for each in (ids, altered[:, 0])]
    by_hand = [(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in zip(*states, strict=True)]
    assert np.abs(found[:, 0, :-1] - torch.stack(by_hand, dim=1).numpy()).max() < EXACT


def test_every_condition_equals_a_pass_under_its_mask():
    model, ids, changed = attach(build("llama", layers=3)), tokens(24, batch=4), 7
    found = {each.condition: each for each in measure(model, ids, bos=BOS, changed=[changed], seeds=[5, 6]).spreads}
    first = torch.zeros(25, 25, dtype=torch.bool)
    first[changed + 1 :, 0] = True
    band = causal(25) & ~causal(25).tril(-12)
    late = 12 + 3
    settings = {
        "BOS kept": (led, causal(25), 1, changed),
        "BOS removed": (lambda each: each, causal(24), 0, changed),
        "sink hidden": (led, causal(25) & ~first, 1, changed),
        "stream, sinks evicted": (led, band, 1, late),
    }
    for name, (dress, seen, lead, position) in settings.items():
        precision = exactly if name.startswith("stream") else WideSoftmax
        each = [
            expected(model, dress(ids), dress(replaced(ids, position, seed)), seen, precision)[..., lead:]
            for seed in (5, 6)
        ]
        wanted = np.mean(each, axis=0)
        spread = found[name]
        tolerance = 2e-6 if name.startswith("BOS") else EXACT
        assert spread.changed == position
        assert np.abs(spread.by_depth - wanted.mean(axis=0)).max() < tolerance
        assert (spread.by_depth[:, :position] == 0).all()
        assert spread.by_depth[0, position] > 0.1
        later = wanted[..., position + 1 :].mean(axis=-1)
        assert np.abs(spread.overall - later.mean(axis=0)).max() < tolerance
        assert spread.middle.value == pytest.approx(later[:, 1].mean(), abs=tolerance)
        assert spread.late.value == pytest.approx(later[:, 2].mean(), abs=tolerance)
        assert spread.late.low < spread.late.value < spread.late.high
        assert spread.late.texts == 4
    before, after = (
        torch.stack(explicit(model, led(each), sinks=KEPT, window=12 - KEPT, chunks=[7, 13, 5]).hidden)
        for each in (ids, replaced(ids, late, 5))
    )
    ratio = ((after - before).norm(dim=-1) / before.norm(dim=-1))[..., 1:].mean(dim=1)
    one = measure(model, ids, bos=BOS, changed=[changed], seeds=[5]).spreads[3]
    assert one.condition == "stream, sinks kept"
    assert np.abs(one.by_depth - ratio.numpy()).max() < EXACT


def test_hiding_the_first_token_from_everyone_is_removing_it():
    model, ids = build("llama", layers=2), tokens(16, batch=2)
    hidden = causal(17)
    hidden[1:, 0] = False
    with_it = expected(model, led(ids), led(replaced(ids, 5, 0)), hidden)[..., 1:]
    assert np.abs(with_it - expected(model, ids, replaced(ids, 5, 0), causal(16))).max() < 1e-6


def test_conditions_are_those_that_the_model_has():
    ids = tokens(20, batch=2)
    plain = measure(build("llama"), ids, bos=None, changed=[3, 6], seeds=[0])
    assert [(each.condition, each.changed) for each in plain.spreads] == [
        ("BOS removed", 3), ("BOS removed", 6), ("sink hidden", 3), ("sink hidden", 6),
    ]  # fmt: skip
    assert plain.geometry.condition == "BOS removed"
    assert "BOS removed" not in plain.verdict and "sink hidden" in plain.verdict
    own = measure(attach(build("mistral", sliding_window=4)), ids, bos=BOS, changed=[3], seeds=[0])
    assert [each.condition for each in own.spreads] == ["BOS kept", "BOS removed", "sink hidden"]


def test_work_announced_is_work_done():
    told: list[tuple[str, int]] = []
    done: list[int] = []

    def stage(name: str, work: int):
        told.append((name, work))
        return done.append

    measure(attach(build("llama")), tokens(20, batch=3), bos=BOS, changed=[3, 6], seeds=[0, 1], stage=stage)
    assert [name for name, _ in told] == ["mixing"]
    assert sum(done) == told[0][1]


def test_a_replacement_is_another_token_of_the_texts_and_all_are_drawn():
    ids = torch.tensor([[5, 7, 9]] * 3000)
    altered = replaced(ids, 1, 0)
    assert (altered[:, [0, 2]] == ids[:, [0, 2]]).all()
    drawn, counts = altered[:, 1].unique(return_counts=True)
    assert drawn.tolist() == [5, 9] and abs(int(counts[0]) - 1500) < 150
    assert not torch.equal(altered, replaced(ids, 1, 1))


@pytest.mark.parametrize("rows, width", [(12, 30), (30, 12)])
def test_shapes_equal_singular_values(rows: int, width: int):
    hidden = torch.randn(4, rows, width, dtype=torch.float64)
    hidden[:, 0] *= 300
    found = {name: values.numpy() for name, values in shapes(hidden).items()}
    for text, matrix in enumerate(hidden.numpy()):
        squares = np.linalg.svd(matrix, compute_uv=False) ** 2
        share = squares / squares.sum()
        entropy = -(share * np.log(share)).sum()
        unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(rows, 1)]
        assert found["matrix_entropy"][text] == pytest.approx(entropy / np.log(12), abs=EXACT)
        assert found["effective_rank"][text] == pytest.approx(np.exp(entropy), abs=EXACT)
        assert found["similarity"][text] == pytest.approx(cosines.mean(), abs=EXACT)
        spread = np.linalg.norm(matrix - matrix.mean(axis=0)) / np.linalg.norm(matrix)
        assert found["spread"][text] == pytest.approx(spread, abs=EXACT)


def test_shapes_of_one_direction_and_of_all():
    same = {name: float(values) for name, values in shapes(torch.ones(1, 6, 9, dtype=torch.float64)).items()}
    assert same == pytest.approx({"matrix_entropy": 0, "effective_rank": 1, "similarity": 1, "spread": 0}, abs=1e-7)
    apart = {name: float(values) for name, values in shapes(torch.eye(6, dtype=torch.float64)[None]).items()}
    assert apart == pytest.approx(
        {"matrix_entropy": 1, "effective_rank": 6, "similarity": 0, "spread": (5 / 6) ** 0.5}, abs=EXACT
    )


def test_geometry_is_the_mean_over_texts_with_and_without_the_sink(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixing, "ROWS", 2)
    model, ids = build("llama", layers=2), tokens(11, batch=5)
    found = geometry(model, ids, 2, "as they are")
    for depth, hidden in enumerate(explicit(model, ids).hidden):
        rest = hidden[:, [place for place in range(11) if place != 2]]
        for name in ("matrix_entropy", "effective_rank", "similarity", "spread"):
            # the oracle observes the attention, which then is in float64; the geometry's pass is as the model has it
            assert getattr(found, name)[depth] == pytest.approx(float(shapes(hidden)[name].mean()), abs=2e-6)
            wanted = float(shapes(rest)[name].mean())
            assert getattr(found, f"{name}_without")[depth] == pytest.approx(wanted, abs=2e-6)


def test_the_verdict_is_by_intervals():
    generator = np.random.default_rng(0)
    usual = generator.uniform(0.1, 0.2, size=(9, 5))
    noise = generator.normal(0, 1e-3, size=(9, 5))
    noise -= noise.mean(axis=0)
    further = usual + noise
    further[:, 3] += 0.1
    verdict = mixing._verdict(
        {"BOS kept": usual, "BOS removed": further, "sink hidden": usual - 0.05 + noise, "stream, sinks kept": usual,
         "stream, sinks evicted": usual + 0.2 + noise}
    )  # fmt: skip
    parts = verdict.split("; ")
    assert "as much half-way up" in parts[0] and "more before the last block" in parts[0]
    assert "less half-way up" in parts[1] and "less before the last block" in parts[1]
    assert "more half-way up" in parts[2] and "stream" in parts[2]


@pytest.mark.parametrize(
    "options", [{"changed": [19]}, {"changed": [-1]}, {"changed": []}, {"changed": [3], "seeds": []}]
)
def test_positions_that_nobody_follows_are_refused(options: dict[str, list[int]]):
    with pytest.raises(InvalidInput, match="positions from 0 to 18"):
        measure(build("llama"), tokens(20, batch=2), bos=None, **options)


def test_one_text_is_refused():
    with pytest.raises(InvalidInput, match="no interval"):
        measure(build("llama"), tokens(20, batch=1), bos=None, changed=[3])


def test_one_token_repeated_is_refused():
    with pytest.raises(InvalidInput, match="repeated"):
        measure(build("llama"), torch.full((2, 20), 4), bos=None, changed=[3])
