"""The summary of a dense causal pass against weights written out in float64; Triton's kernels also run interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinks.errors import UnsupportedOption
from sinks.kernels.device.forward import Shape
from sinks.kernels.scoring import Scoring
from sinks.kernels.summary import columns, distances, forward
from sinks.kernels.summary.attend import attend_summarised
from sinks.kernels.summary.summary import FIRST
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

Case = tuple[int, tuple[int, int], int, int, torch.dtype]
CASES: list[Case] = [
    # the interpreter has no bfloat16; length, heads, head_dim, batch, dtype
    (1, (2, 1), 64, 1, torch.float16),
    (7, (2, 2), 64, 2, torch.float16),
    (16, (3, 1), 64, 1, torch.float16),
    (17, (2, 1), 128, 2, torch.float16),
    (75, (4, 2), 64, 2, torch.float16),
    (64, (2, 1), 128, 1, torch.float16),
    (113, (2, 1), 64, 1, torch.float16),
]
LARGE: list[Case] = [
    (1, (2, 1), 64, 1, torch.float16),
    (15, (2, 1), 128, 3, torch.bfloat16),
    (127, (9, 3), 64, 2, torch.bfloat16),
    (129, (4, 4), 128, 2, torch.float16),
    (1000, (9, 3), 64, 3, torch.bfloat16),
    (2049, (8, 2), 128, 2, torch.float16),
    (4096, (9, 3), 64, 1, torch.float16),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, tiles are small, so that a short text has many."""
    if not HAS_GPU:
        monkeypatch.setattr(forward, "SHAPES", {64: Shape(32, 16, 4, 1), 128: Shape(16, 32, 4, 1)})
        for walk in (columns, distances):
            monkeypatch.setattr(walk, "SHAPES", {64: Shape(32, 16, 4, 1), 128: Shape(16, 32, 4, 1)})


def heads_of(case: Case, spread: float = 1.0) -> list[Tensor]:
    length, (heads, kv_heads), head_dim, batch, dtype = case
    made = torch.Generator().manual_seed(length)
    shapes = [(batch, count, length, head_dim) for count in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=made) for shape in shapes)
    return [part.to(DEVICE, dtype) for part in (query * spread, key, value)]


def written_out(heads: list[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Result, weights and log-sum-exp, in float64 on the CPU."""
    query, key, value = (part.double().cpu() for part in heads)
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    length = query.shape[2]
    scores = query @ key.transpose(-1, -2) * scale
    scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ value, weights, scores.logsumexp(dim=-1)


def check(case: Case, spread: float) -> None:
    """Inputs are rounded alike, so what is left is float32: of scores, about 2^-22 of a sum of 64 or 128 terms."""
    heads, scale = heads_of(case, spread), case[2] ** -0.5
    out, weights, log_sum_exp = written_out(heads, scale)
    found, summary = attend_summarised(*heads, layer=5, scoring=Scoring(scale))
    within = 3e-6 * (1 + 6 * spread)
    assert summary.layer == 5 and summary.queries == case[0]
    first = torch.nn.functional.pad(weights[..., :FIRST], (0, max(FIRST - case[0], 0)))
    rest, counts = weights[..., FIRST:], torch.arange(1, case[0] + 1)
    away = counts[:, None] - counts
    for name, got, want in (
        ("log_sum_exp", summary.log_sum_exp, log_sum_exp),
        ("maximum", summary.maximum, weights.amax(dim=-1)),
        ("first", summary.first, first),
        ("rest", summary.rest, rest.sum(dim=-1)),
        ("rest_entropy", summary.rest_entropy, entropy_of_rest(rest)),
        ("entropy", summary.entropy, torch.special.entr(weights).sum(dim=-1)),
        ("received", summary.received(case[0]) / counts.flip(0).to(DEVICE), weights.sum(dim=-2) / counts.flip(0)),
        ("at distance 1", summary.at_distance(1, 2), (weights * (away == 1)).sum(dim=-1)),
        ("near", summary.at_distance(0, 21), (weights * (away < 21)).sum(dim=-1)),
        ("far", summary.at_distance(30, 95), (weights * ((away >= 30) & (away < 95))).sum(dim=-1)),
        ("reach", summary.reach(), (rest * away[:, FIRST:]).sum(dim=-1)),
        ("first_received", summary.first_received / case[0], first.sum(dim=2) / case[0]),
    ):
        assert got.shape == want.shape, name
        error = (got.double().cpu() - want).abs() / (1 + want.abs())
        assert error.max() < within, f"{name}: {error.max():.2e} of at most {within:.2e}"
    assert torch.equal(summary.visible.cpu(), counts)
    # Weights are rounded before they meet the values, and the result once more.
    assert (found.double().cpu() - out).abs().max() < 3 * torch.finfo(case[-1]).eps * (1 + out.abs().max())


def entropy_of_rest(rest: Tensor) -> Tensor:
    left = rest.sum(dim=-1, keepdim=True)
    return torch.special.entr(rest / left.where(left > 0, 1)).sum(dim=-1)


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="the large cases run here")
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_summaries_equal_the_whole_matrix(case: Case, spread: float) -> None:
    check(case, spread)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_summaries_equal_the_whole_matrix(case: Case, spread: float) -> None:
    check(case, spread)


@needs_triton
def test_what_a_sink_leaves_keeps_its_digits() -> None:
    """Where key 0 takes all but 1e-5, one minus its weight has two digits left; what is summed by itself has five."""
    case: Case = (60, (2, 1), 64, 1, torch.float16)
    query, key, value = heads_of(case)
    key[:, :, 0] = 0
    key[:, :, 0, 0], query[..., 0] = 12.0, 12.0
    _, weights, _ = written_out([query, key, value], 0.125)
    _, summary = attend_summarised(query, key, value, layer=0, scoring=Scoring(0.125))
    rest = weights[..., 20:, FIRST:].sum(dim=-1)
    assert rest.max() < 1e-2 and rest.min() < 1e-5
    assert (summary.rest[..., 20:].double().cpu() / rest - 1).abs().max() < 5e-5
    entropy = entropy_of_rest(weights[..., 20:, FIRST:])
    assert (summary.rest_entropy[..., 20:].double().cpu() - entropy).abs().max() < 5e-5


@needs_triton
def test_the_second_pass_gives_the_same_sums_every_time() -> None:
    heads = heads_of((90, (4, 2), 64, 2, torch.float16))
    found = [attend_summarised(*heads, layer=0, scoring=Scoring(0.125))[1] for _ in range(2)]
    whole = found[0].received(90)
    assert torch.equal(found[1].received(90), whole)
    assert torch.equal(found[1].received(33), whole[..., :33]), "and the same of fewer keys"


@pytest.mark.parametrize(("case", "scoring", "says"), [
    ((5, (2, 1), 32, 1, torch.float16), Scoring(0.1), "64 or 128 dimensions"),
    ((5, (2, 1), 64, 1, torch.float32), Scoring(0.1), "bfloat16 or float16"),
    ((5, (2, 1), 64, 1, torch.float16), Scoring(0.1, softcap=5.0), "softcap"),
    ((5, (2, 1), 64, 1, torch.float16), Scoring(0.1, sink_logits=torch.zeros(2)), "sink logits"),
])  # fmt: skip
def test_what_a_summary_cannot_be_made_of_is_named(case: Case, scoring: Scoring, says: str) -> None:
    with pytest.raises(UnsupportedOption, match=f"{says}.*choose impl="):
        attend_summarised(*heads_of(case), layer=0, scoring=scoring)
