"""Figures of states and medians of their numbers against PyTorch and numpy; Triton's kernels also run interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinks.kernels.summary import states
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

pytestmark = needs_triton
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * HAS_GPU]  # the interpreter has no bfloat16
LARGE = [200_001, 1_000_000] * HAS_GPU


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, tiles are small, so that a few numbers have many."""
    monkeypatch.setattr(states, "DEVICES", ("cuda", "cpu"))
    if not HAS_GPU:
        monkeypatch.setattr(states, "ELEMENTS", 64)
        monkeypatch.setattr(states, "RUN", 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", [1, 2, 7, 8, 1001, *LARGE])
def test_medians_are_exact(numbers: int, dtype: torch.dtype) -> None:
    hidden = (torch.randn(5, numbers) * 10 ** torch.randn(5, 1)).to(dtype)
    hidden[1, : numbers // 2] = 0
    hidden[2] = hidden[2, :1]
    hidden[3, : numbers // 2 + 1] = torch.finfo(dtype).max
    hidden[4, -1] = -torch.inf
    assert states.takes(hidden.to(DEVICE)[..., None])
    found = states.medians(hidden.to(DEVICE)).cpu().numpy()
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found, np.median(hidden.abs().double().numpy(), axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 70, 3), (1, 3, 576), (3, 1, 64)])
def test_figures_of_tokens_are_those_of_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden = torch.randn(shape)
    hidden[0, 0, 1] = 3000.0
    hidden[-1, -1] = 2.0
    hidden = hidden.to(dtype)
    largest, norms, kurtosis = states.token_figures(hidden.to(DEVICE)).cpu().double()
    exact, width = hidden.double(), shape[2]
    assert torch.equal(largest, exact.abs().amax(dim=-1))
    assert torch.allclose(norms, exact.norm(dim=-1), rtol=1e-6)
    apart = exact - exact.mean(dim=-1, keepdim=True)
    variance = apart.square().mean(dim=-1)
    share = apart.pow(4).mean(dim=-1) / variance.square().where(variance > 0, 1) / (width - 2 + 1 / (width - 1))
    # A token of equal numbers has no variance but the rounding of its mean.
    equal = variance == 0
    assert equal.any() and torch.allclose(kurtosis[~equal], share[~equal], atol=1e-5)


def test_what_is_no_number_is_not_overlooked() -> None:
    hidden = torch.randn(1, 4, 20)
    hidden[0, 2, 3] = torch.nan
    assert states.token_figures(hidden.to(DEVICE))[0, 0, 2] == torch.inf


def test_what_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not states.takes(torch.zeros(1, 2, 3, dtype=torch.float64, device=DEVICE))
    assert not states.takes(torch.zeros(1, 1, states.MOST_WIDTH + 1, device=DEVICE))
    monkeypatch.setattr(states, "DEVICES", ())
    assert not states.takes(torch.zeros(1, 2, 3, device=DEVICE))
