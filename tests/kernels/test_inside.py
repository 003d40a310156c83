"""The sinks merged inside flash-attn-4's kernel: against float64, and against the separate merge."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinks.kernels import Scoring, attend
from sinks.kernels.band import flash
from sinks.kernels.band.inside import launch
from sinks.kernels.band.inside.build import Build
from sinks.kernels.device.forward import Band
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.sink_part import merge_sinks
from tests.kernels.interpreted import DEVICE, HAS_GPU

HOPPER = HAS_GPU and flash.has_flash() and launch.why_not_inside(DEVICE) is None
gpu = pytest.mark.gpu
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and flash-attn-4 as it is known")
# flash-attn-4 warns of its own foundation, in many words.
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """Packed heads of rows of some lengths, drawn afresh from their own figures; nothing is turned."""

    sinks: int
    window: int
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 128
    logits: float | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def band(self) -> Band:
        return Band(self.sinks, self.window, self.head_dim**-0.5)

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value [tokens, heads, head_dim]."""
        made = torch.Generator().manual_seed(self.sinks * 1009 + self.window + sum(self.lengths))
        sizes = (self.heads[0], self.heads[1], self.heads[1])
        drawn = [torch.randn(sum(self.lengths), count, self.head_dim, generator=made) for count in sizes]
        query, key, value = (part.to(DEVICE, self.dtype) for part in drawn)
        return query, key, value

    def rows(self) -> Rows:
        begins = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=DEVICE)
        return Rows(begins, None, len(self.lengths), max(self.lengths), max(self.lengths))

    def sink_logits(self) -> Tensor | None:
        """Distinct ones."""
        if self.logits is None:
            return None
        return torch.linspace(-0.5, 1.0, self.heads[0], device=DEVICE) + self.logits


def exact(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Result, log-sum-exp and scores of the sinks, every weight written out, in float64."""
    group, band, logits = case.heads[0] // case.heads[1], case.band, case.sink_logits()
    outs, sums, met = [], [], []
    for query, key, value in zip(*(part.double().split(case.lengths) for part in case.packed()), strict=True):
        count = len(query)
        products = torch.einsum("thd,shd->hts", query, key.repeat_interleave(group, 1))
        place = torch.arange(count, device=DEVICE)
        apart = place[:, None] - place[None, :]
        seen = (apart >= 0) & ((apart < band.window) | (place < band.sinks)[None, :])
        scores = (products * band.scale).masked_fill(~seen, -torch.inf)
        if logits is not None:
            scores = torch.cat((scores, logits.double()[:, None, None].expand(-1, count, 1)), dim=-1)
        weights = scores.softmax(-1)[..., :count]
        outs.append(torch.einsum("hts,shd->thd", weights, value.repeat_interleave(group, 1)))
        sums.append(scores.logsumexp(-1))
        met.append(torch.nn.functional.pad(products[..., : band.sinks], (0, max(0, band.sinks - count))))
    return torch.cat(outs), torch.cat(sums, dim=1), torch.cat(met, dim=1)


def cases() -> Iterator[Case]:
    shapes = ((3000,), (700, 1, 2, 63, 1100), (2049, 0, 5), (129, 128, 127), (1,), (4, 3, 2, 1, 0))
    heads = ((8, 2), (4, 4), (6, 2), (8, 1), (14, 2))
    for index, (sinks, window) in enumerate(itertools.product((1, 4, 9, 64), (1, 17, 1020))):
        logits = (None, -torch.inf, 0.0, 20.0)[index % 4]
        # At +20 all weights but the sink logit's are below what float16 can hold.
        dtype = torch.bfloat16 if logits == 20.0 else (torch.bfloat16, torch.float16)[index % 2]
        yield Case(
            sinks, window, shapes[(5 * index + 1) % 6], heads[index % 5], (64, 128)[index // 2 % 2], logits, dtype
        )


def merged_after(case: Case, scores: Tensor) -> tuple[Tensor, Tensor]:
    """By the pass over the result, which `inside` is to spare."""
    rows, band = case.rows(), case.band
    query, key, value = case.packed()
    window = flash.window_forward(query, key, value, rows, band)
    merge_sinks(scores, value, case.sink_logits(), window, rows, band)
    return window


@gpu
@needs_hopper
@pytest.mark.parametrize("given", [True, False], ids=["scores given", "scores found"])
@pytest.mark.parametrize("case", [*cases()], ids=str)
def test_the_result_is_as_near_to_float64_as_that_of_a_separate_merge(case: Case, given: bool) -> None:
    """Weights of sinks are rounded to half precision, once: a rounding of the largest value more than the merge has."""
    want, want_sums, met = exact(case)
    scores = met.float()
    after = merged_after(case, scores)
    out, sums, found = launch.whole_forward(
        case.packed(), scores if given else None, case.sink_logits(), case.rows(), case.band
    )
    band = torch.finfo(case.dtype).eps * want.abs().max()
    assert (out - want).abs().max() <= (after[0] - want).abs().max() + band
    # float32, a logarithm by the hardware's approximation (2^-22 of its argument), of sums of up to 20
    assert (sums - want_sums).abs().max() < 1e-4
    token = torch.cat([torch.arange(length, device=DEVICE) for length in case.lengths])
    apart = token[:, None] - case.window >= torch.arange(case.sinks, device=DEVICE)
    # float32 sums of up to 128 products of size one
    assert ((found - met) * apart).abs().max() < 128 * torch.finfo(torch.float32).eps * (1 + met.abs().max())


@gpu
@needs_hopper
def test_a_sink_that_the_window_covers_counts_once() -> None:
    """Equal scores everywhere: every value has the same weight, sinks inside the window too."""
    case = Case(4, 64, (200,))
    query, key, value = case.packed()
    out, sums, _ = launch.whole_forward((query * 0, key, value), None, None, case.rows(), case.band)
    token = torch.arange(200, device=DEVICE)
    seen = (token + 1).clamp(max=64) + (token - 63).clamp(min=0, max=4)
    assert torch.allclose(sums, seen.float().log().expand_as(sums), atol=1e-5)
    mean = (
        value[:66].double().mean(0).repeat_interleave(4, 0)
    )  # token 65 sees its window, from token 2 on, and two sinks
    assert (out[65] - mean).abs().max() < torch.finfo(case.dtype).eps * mean.abs().max()


@gpu
@needs_hopper
@pytest.mark.parametrize("sinks", [4, 20])
def test_gradients_are_those_after_a_separate_merge(sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is turned, what the backward pass gets was found inside: the same but for roundings."""
    made = torch.Generator().manual_seed(7)
    heads = [torch.randn(2, count, 900, 64, generator=made).to(DEVICE, torch.bfloat16) for count in (8, 2, 2, 8)]
    logits = torch.linspace(-1, 1, 8, device=DEVICE)

    def run() -> list[Tensor]:
        leaves = [part.clone().requires_grad_() for part in (*heads[:3], logits)]
        scoring = Scoring(0.125, sink_logits=leaves[3])
        out = attend(*leaves[:3], sinks=sinks, window=100, scoring=scoring, impl="flash")
        out.backward(heads[3])
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    found = run()
    monkeypatch.setattr(flash, "merges_inside", lambda device, band: False)
    after = run()
    assert len(found) == len(after) == 5
    for name, one, other in zip(("out", "query", "key", "value", "logits"), found, after, strict=True):
        # Rounded to 8 bits on both sides, from inputs (result and weights) that are too.
        assert (one.float() - other.float()).abs().max() <= 2**-7 * other.float().abs().max(), name


@pytest.mark.skipif(HOPPER, reason="here it does merge inside")
def test_elsewhere_the_merge_is_a_pass_of_its_own() -> None:
    assert launch.why_not_inside(DEVICE) is not None
    assert not flash.merges_inside(DEVICE, Band(4, 8, 1.0))


def known(arguments: list[str]) -> Any:
    """Something that takes `arguments` by name."""
    return eval(f"lambda self, {', '.join(arguments)}: None")  # noqa: S307


def told(version: str | None, name: str) -> str:
    """`importlib.metadata.version`, of a package that may have none."""
    if version is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return version


@pytest.mark.parametrize(("change", "says"), [
    ({}, None),
    ({"capability": (10, 0)}, "only the kernel for Hopper GPUs"),
    ({"version": "4.1"}, "flash-attn-4 4.1 is none of 4.0.0b36"),
    ({"version": None}, "flash-attn-4 of no version is none of 4.0.0b36"),
    ({"mma": launch.MMA[1:]}, "mma takes other arguments"),
    ({"epilogue": [*launch.EPILOGUE, "more"]}, "epilogue takes other arguments"),
])  # fmt: skip
def test_only_what_is_known_is_overridden(
    change: dict[str, Any], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"capability": (9, 0), "version": "4.0.0b36", "mma": launch.MMA, "epilogue": launch.EPILOGUE} | change
    kernel = type("Kernel", (), {name: known(there[name]) for name in ("mma", "epilogue")})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: there["capability"])
    monkeypatch.setattr(importlib.metadata, "version", partial(told, there["version"]))
    monkeypatch.setattr(launch, "tools", lambda: SimpleNamespace(kernel=kernel))
    launch.why_not_inside.cache_clear()
    try:
        found = launch.why_not_inside(torch.device("cuda", 0))
    finally:
        launch.why_not_inside.cache_clear()
    assert found is None if says is None else says in str(found)


@pytest.mark.parametrize(
    ("sinks", "depth", "chunks", "met"), [(1, 8, 1, 1), (8, 8, 1, 1), (9, 16, 1, 2), (64, 16, 4, 8)]
)
def test_instructions_are_as_deep_as_the_sinks_need(sinks: int, depth: int, chunks: int, met: int) -> None:
    build = Build("BFloat16", 128, 4, False, sinks, False, False)
    assert (build.depth, len(build.chunks), len(build.met)) == (depth, chunks, met)
