"""What a captured step draws, against the kept set and the noise written out in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sinks.models.step.device.choice.draws import HISTORY, Drawing, Draws
from sinks.models.step.device.choice.noise import _philox, noise
from sinks.stream.sampling import Sampler, Sampling, filtered
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

pytestmark = needs_triton

VOCABULARIES = (49_152, 128_256, 262_144) if HAS_GPU else (40, 300, 5000)
TRIALS = 12 if HAS_GPU else 5


def drawing(sampling: Sampling) -> Drawing:
    return Sampler(sampling, torch.Generator().manual_seed(sampling.seed or 0)).drawing


def choose(
    logits: Tensor, samplings: Sequence[Sampling], histories: Sequence[list[int]], places: Sequence[int],
    seats: Sequence[int] | None = None,
) -> tuple[Draws, Tensor]:  # fmt: skip
    """Let the kernels choose token number `places[i]` of every row, behind its history; their state, and its logits."""
    rows, vocab = logits.shape
    seats = range(rows) if seats is None else seats
    draws = Draws(max(seats) + 1, rows, vocab, DEVICE)
    before = [place - 1 for place in places]
    draws.install(seats, [drawing(each) for each in samplings], [history[:-1] for history in histories], before)
    control = torch.tensor([[history[-1] for history in histories], list(seats), before], device=DEVICE)
    given = logits.to(DEVICE, copy=True)
    draws.launch(given, control, None)
    assert control[2].tolist() == [place if real else -1 for place, real in zip(places, draws.told[1], strict=True)]
    assert control[0].tolist() == draws.told[0].tolist()
    return draws, given


def standing(sampling: Sampling, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are kept, float64, and which of them only just are or are not: the sums of float32 may differ."""
    x = scores.double()
    weights = ((x - x.max()) / sampling.temperature).exp()
    if sampling.top_k:
        weights = weights.masked_fill(x < x.topk(min(sampling.top_k, len(x))).values[-1], 0)
    order = x.sort(stable=True).indices
    upto = weights[order].cumsum(0)
    above = torch.empty_like(upto).scatter(0, order, upto[-1] - upto)
    kept = (weights > 0) & ((above < sampling.top_p * upto[-1]) | (sampling.top_p == 1))
    kept &= weights >= sampling.min_p
    near = (above / upto[-1] - sampling.top_p).abs() < 1e-5
    near |= ((weights / max(sampling.min_p, 1e-9) - 1).abs() < 1e-5) & (weights < 1)
    return kept, near & (weights > 0)


def check(sampling: Sampling, scores: Tensor, place: int, token: int) -> None:
    """That `token` is what these penalised scores give there."""
    if sampling.greedy:
        assert token == int(scores.argmax())
        return
    kept, near = standing(sampling, scores)
    seeds, places = torch.tensor([sampling.seed]), torch.tensor([place])
    keys = scores.double() / sampling.temperature + noise(seeds, places, torch.arange(len(scores)))[0]
    assert kept[token] or near[token]
    assert keys[token] >= keys[kept & ~near].max() - 1e-4


def some(number: int) -> tuple[Tensor, list[Sampling], list[list[int]]]:
    """Rows of logits, many of them equal, each with settings and a history of its own."""
    dice, rows = random.Random(number), 8
    vocab = dice.choice(VOCABULARIES)
    logits = dice.choice([0.02, 1.0, 3.0]) * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(number))
    if number % 2:
        logits = logits.round(decimals=dice.choice([0, 1]))
    samplings = [
        Sampling(
            temperature=dice.choice([0.0, 0.3, 0.8, 1.7]),
            top_k=dice.choice([0, 1, 3, 17, 50, 400, 10**7]),
            top_p=dice.choice([1.0, 0.95, 0.5, 0.01]),
            min_p=dice.choice([0.0, 0.0, 0.05, 0.6, 1.0]),
            repetition_penalty=dice.choice([1.0, 1.3, 0.7]),
            presence_penalty=dice.choice([0.0, 0.4, -2.0]),
            history=dice.choice([0, 1, 5, HISTORY]),
            seed=dice.randrange(2**63),
            logit_bias=dice.choice([{}, {3: -math.inf, 5: 3.0}]),
        )
        for _ in range(rows)
    ]
    histories = [[dice.randrange(vocab) for _ in range(dice.choice([1, 3, HISTORY + 80]))] for _ in range(rows)]
    return logits, samplings, histories


@pytest.mark.parametrize("number", range(TRIALS))
def test_the_kernels_draw_from_the_kept_tokens_by_their_noise(number: int) -> None:
    """Every row with settings of its own, in seats of another order; and the logits are left as they were."""
    logits, samplings, histories = some(number)
    places = [len(history) + 2**33 * (row == 2) for row, history in enumerate(histories)]
    seats = random.Random(number).sample(range(11), len(logits))
    draws, given = choose(logits, samplings, histories, places, seats)
    assert torch.equal(given.cpu(), logits)
    assert draws.newest[list(seats)].tolist() == draws.told[0].tolist()
    for row, sampling in enumerate(samplings):
        scores = Sampler(sampling, torch.Generator()).penalised(logits[row], histories[row])
        check(sampling, scores, places[row], int(draws.told[0, row]))
    together = draws.told[0].tolist()
    for row in (0, 5):
        here = slice(row, row + 1)
        alone, _ = choose(logits[here], samplings[here], histories[here], places[here])
        assert alone.told[0].tolist() == together[here], "whoever shares the batch"


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("top_k", [0, 20])
def test_the_kept_set_is_that_of_the_ordinary_path_and_the_draws_follow_its_probabilities(
    top_p: float, top_k: int
) -> None:
    rows, times = (512, 40) if HAS_GPU else (32, 12)
    sampling = Sampling(0.8, top_k=top_k, top_p=top_p, min_p=0.01)
    logits = 1.5 * torch.randn(60, generator=torch.Generator().manual_seed(5))
    expected = filtered(sampling, logits).double().softmax(-1)
    draws = Draws(rows, rows, 60, DEVICE)
    draws.install(
        range(rows), [drawing(Sampling(0.8, top_k=top_k, top_p=top_p, min_p=0.01, seed=n)) for n in range(rows)],
        [()] * rows, [0] * rows,
    )  # fmt: skip
    control = torch.stack((torch.zeros(rows), torch.arange(rows), torch.zeros(rows))).long().to(DEVICE)
    many, counts = logits.expand(rows, -1).contiguous().to(DEVICE), torch.zeros(60)
    for _ in range(times):
        draws.launch(many, control, None)
        counts += torch.bincount(draws.told[0].cpu(), minlength=60)
    assert control[2].tolist() == [times] * rows
    kept = expected > 0
    assert counts[~kept].sum() == 0
    wanted = expected[kept] * rows * times
    degrees = int((wanted >= 5).sum())
    chi = float(((counts[kept] - wanted) ** 2 / wanted)[wanted >= 5].sum())
    assert chi < degrees + 5 * math.sqrt(2 * degrees)  # five standard deviations


def test_of_equals_the_later_tokens_stay_as_in_a_stable_sort() -> None:
    rows = 64
    logits = torch.zeros(rows, 30)
    draws, _ = choose(logits, [Sampling(1.0, top_p=0.5, seed=n) for n in range(rows)], [[0]] * rows, [1] * rows)
    drawn = set(draws.told[0].tolist())
    assert min(drawn) >= 15 and len(drawn) > 10
    draws, _ = choose(logits, [Sampling(1.0, top_k=3, seed=n) for n in range(rows)], [[0]] * rows, [1] * rows)
    assert len(set(draws.told[0].tolist())) > 20, "equals of the k-th all stay"


@pytest.mark.parametrize("worst", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=3, top_p=0.5, seed=1)])
def test_a_row_that_leaves_no_choice_rests_and_the_others_go_on(worst: float, sampling: Sampling) -> None:
    logits = torch.randn(3, 300)
    logits[1, 7] = worst
    draws, _ = choose(logits, [sampling] * 3, [[1, 2]] * 3, [2, 2, 2])
    assert draws.told[1].tolist() == [1, 0, 1]
    assert draws.newest[1] == -1
    none = torch.full((1, 300), -math.inf)
    assert choose(none, [sampling], [[1]], [1])[0].told[1].tolist() == [0]


def test_philox_is_that_of_its_authors() -> None:
    """The known answers of Random123 (kat_vectors, philox4x32-10)."""
    zero, ones = [torch.tensor([0])] * 4, [torch.tensor([0xFFFFFFFF])] * 4
    assert [int(word) for word in _philox(zero, zero[0], zero[0])] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word) for word in _philox(ones, ones[0], ones[0])] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_noise_is_gumbels_and_no_two_tokens_places_or_seeds_share_it() -> None:
    many = noise(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), torch.arange(200_000))
    assert many.isfinite().all()
    for mean, variance in zip(many.mean(1).tolist(), many.var(1).tolist(), strict=True):
        assert abs(mean - 0.5772157) < 0.02 and abs(variance - math.pi**2 / 6) < 0.04
    correlations = torch.corrcoef(torch.cat((many, many[:1].roll(1))))
    assert (correlations - torch.eye(4)).abs().max() < 0.015
