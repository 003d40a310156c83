"""The same stream on a GPU and on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from sinks.cache.cache import SinkCache
from sinks.kernels import Rotary, Scoring, attend
from sinks.models.attach import attach
from tests.families.tiny import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES = {"token by token": [1] * 60, "chunks": [7, 1, 30, 22], "all at once": [60]}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "falcon_alibi", "deepseek_v3"])
def test_a_stream_is_the_same_on_both(name: str) -> None:
    on_cpu = attach(build(name, layers=2))
    on_gpu = attach(copy.deepcopy(build(name, layers=2)).to("cuda"))
    ids = torch.randint(0, 60, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    expected = on_cpu(ids, attention_mask=mask, past_key_values=SinkCache.for_model(on_cpu, sinks=3, window=9)).logits
    for sizes in SIZES.values():
        cache, logits, fed = SinkCache.for_model(on_gpu, sinks=3, window=9), [], 0
        for size in sizes:
            columns, fed = slice(fed, fed + size), fed + size
            out = on_gpu(ids[:, columns].cuda(), attention_mask=mask[:, : columns.stop].cuda(), past_key_values=cache)
            logits.append(out.logits.cpu())
        difference = (torch.cat(logits, dim=1) - expected).abs()[mask.bool()].max()
        # Float64 on both: sums of at most a few hundred terms in another order.
        assert difference < 1e-9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between flash-attn-4 and what it stands on
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_operator_in_lower_precision(dtype: torch.dtype, head_dim: int) -> None:
    """Error against float64 at most twice that of a naive implementation in the same precision, plus one rounding."""
    made = torch.Generator().manual_seed(head_dim)
    q, k, v = (torch.randn(1, h, 200, head_dim, generator=made, dtype=torch.float64) for h in (4, 2, 2))
    rotary = Rotary(1.0 / 10000 ** (torch.arange(0, head_dim, 2).double() / head_dim))
    scoring = Scoring(head_dim**-0.5, rotary)
    exact = attend(q, k, v, sinks=4, window=50, scoring=scoring, impl="reference")
    naive = attend(q.to(dtype), k.to(dtype), v.to(dtype), sinks=4, window=50, scoring=scoring, impl="reference")
    fast = attend(
        q.to("cuda", dtype), k.to("cuda", dtype), v.to("cuda", dtype), sinks=4, window=50, scoring=scoring
    ).cpu()
    band = torch.finfo(dtype).eps * exact.abs().max()
    assert (fast.double() - exact).abs().max() <= 2 * (naive.double() - exact).abs().max() + band
