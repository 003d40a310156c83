"""The surprise of a token in one reading, against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch

from sinks.kernels import surprise as module
from sinks.kernels.surprise import can_read_once, surprise_read_once
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("words", [1, 31, 4096, 5000, 9001])
def test_every_row_is_as_in_float64(dtype: torch.dtype, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        monkeypatch.setattr(module, "WORDS", 512)
    logits = (torch.randn(7, words) * 20).to(dtype)
    logits[2], logits[3, 0], logits[4, 1:] = 300.0, 90.0, -torch.inf  # level rows; one that stands out; the only one
    targets = torch.randint(0, words, (7,))
    targets[4] = 0
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    found = surprise_read_once(logits.to(DEVICE), targets.to(DEVICE)).double().cpu()
    # Logits below 2^9 and so their log-sum-exp: one rounding of it, and one each of two exponents and a logarithm.
    assert torch.allclose(found, want, rtol=1e-6, atol=4 * 2**-15)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(wrong: float) -> None:
    logits = torch.randn(2, 100, dtype=torch.float32)
    logits[1, 7] = wrong
    found = surprise_read_once(logits.to(DEVICE), torch.tensor([3, 3], device=DEVICE)).cpu()
    assert found.isfinite().tolist() == [True, False]


def test_only_a_gpu_reads_once() -> None:
    assert can_read_once(torch.randn(2, 5, device=DEVICE)) == HAS_GPU
    assert not can_read_once(torch.randn(2, 5, dtype=torch.float64, device=DEVICE))
    assert not can_read_once(torch.randn(5, 2, device=DEVICE).T)
