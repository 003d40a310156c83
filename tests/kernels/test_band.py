"""Every way through sinks and window on a GPU against the specification; Triton's also run here, interpreted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels import Rotary, Scoring, attend, attend_measured, choose
from sinks.kernels.band import attend as band_attend
from sinks.kernels.band import flash
from sinks.kernels.device import backward, forward
from sinks.kernels.device.forward import Band, Shape
from sinks.kernels.device.rows import Rows
from sinks.kernels.device.sink_part import Finished
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

needs_flash = pytest.mark.skipif(not flash.has_flash(), reason="flash-attn-4 is not installed")
gpu = pytest.mark.gpu
WAYS = [
    pytest.param("triton", marks=needs_triton),
    # flash-attn-4 warns of its own foundation, in many words.
    pytest.param("flash", marks=[gpu, needs_flash, pytest.mark.filterwarnings("ignore")]),
    pytest.param("flex", marks=gpu),
]
INTERPRETED = not HAS_GPU
pytestmark = [
    # torch.compile looks at the gradients of everything that it is handed (torch 2.11).
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, tiles are small, so that a short text has many."""
    if INTERPRETED:
        monkeypatch.setattr(forward, "SHAPES", {64: Shape(32, 16, 4, 1), 128: Shape(32, 32, 4, 1)})
        monkeypatch.setattr(backward, "KEY_SHAPES", {64: Shape(16, 32, 4, 1), 128: Shape(32, 32, 4, 1)})
        monkeypatch.setattr(backward, "QUERY_SHAPES", {64: Shape(32, 16, 4, 1), 128: Shape(32, 32, 4, 1)})


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """The compiler counts the shapes it has met, and refuses one too many."""
    torch._dynamo.reset()


@dataclass(frozen=True)
class Case:
    """One random problem, drawn afresh from its own figures."""

    sinks: int
    window: int
    length: int
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    logits: float | None = None
    ragged: bool = False
    rotary: bool = True
    batch: int = 2
    dtype: torch.dtype = torch.float16

    def leaves(self) -> list[Tensor]:
        """Query, key, value and gradient of the result, in `dtype` on the device."""
        made = torch.Generator().manual_seed(self.sinks * 1000003 + self.window * 1009 + self.length)
        shapes = [self.heads[0], self.heads[1], self.heads[1], self.heads[0]]
        drawn = [torch.randn(self.batch, h, self.length, self.head_dim, generator=made) for h in shapes]
        return [part.to(DEVICE, self.dtype) for part in drawn]

    def scoring(self, dtype: torch.dtype, device: torch.device = DEVICE) -> Scoring:
        """Distinct sink logits for every head; interleaved pairs that leave dimensions out, in every other case."""
        spread = torch.linspace(-0.5, 1.0, self.heads[0], dtype=torch.float64)
        logits = None if self.logits is None else (spread + self.logits).to(device, dtype)
        pairs = self.head_dim // 2 - 8 * (self.window % 2)
        inv_freq = (1.0 / 10000 ** (torch.arange(pairs) / pairs)).double().to(device)
        rotary = Rotary(inv_freq, interleaved=self.window % 2 == 1, first=8 * (self.window % 2))
        return Scoring(self.head_dim**-0.5, rotary if self.rotary else None, sink_logits=logits)

    def positions(self) -> Tensor | None:
        """Pads strewn anywhere, a row of pads alone at the end, if ragged."""
        if not self.ragged:
            return None
        real = torch.rand(self.batch, self.length, generator=torch.Generator().manual_seed(self.length)) < 0.7
        real[1:][-1:] = False
        return (real.cumsum(1) - 1).masked_fill(~real, -1).to(DEVICE)


def on_cpu(positions: Tensor | None) -> Tensor | None:
    return None if positions is None else positions.cpu()


def run(case: Case, impl: str, dtype: torch.dtype) -> list[Tensor]:
    """Result, gradients of query, key, value and sink logits, in float64 on the CPU."""
    *leaves, given = (part.to(dtype) for part in case.leaves())
    leaves = [part.requires_grad_() for part in leaves]
    scoring = case.scoring(torch.float64 if dtype == torch.float64 else torch.float32)
    if scoring.sink_logits is not None:
        leaves.append(scoring.sink_logits.requires_grad_())
    out = attend(
        *leaves[:3], sinks=case.sinks, window=case.window, scoring=scoring, positions=case.positions(), impl=impl
    )
    out.backward(given)
    return [part.double().cpu() for part in (out.detach(), *(leaf.grad for leaf in leaves))]


def check(case: Case, impl: str) -> None:
    """Against float64: at most twice the error of `chunked` in half precision, and a rounding of the largest.

    `chunked` widens to float32; the kernels round weights and score gradients to half precision before a product,
    as every fast kernel does: each is one more rounding, of sums whose terms have random signs.
    """
    exact = run(case, "chunked", torch.float64)
    rough = run(case, "chunked", case.dtype)
    found = run(case, impl, case.dtype)
    for name, want, near, got in zip(("out", "query", "key", "value", "logits"), exact, rough, found, strict=False):
        assert torch.isfinite(got).all(), name
        if name == "logits":
            band = rounding_of_logits(case, exact[0])
        else:
            size = want.square().mean().sqrt() + want.abs().max() / 8
            # A gradient may vanish by cancellation: then what is left is float32 sums of a head's products of size one.
            band = 3 * torch.finfo(case.dtype).eps * size + 1e-5
        error = (got - want).abs().max()
        assert error <= 2 * (near - want).abs().max() + band, f"{name}: {error:.2e} of {want.abs().max():.2e}"


def rounding_of_logits(case: Case, out: Tensor) -> float:
    """How far the gradient of a sink logit may be off because results are rounded: five standard deviations.

    It is minus the sum over queries of the logit's weight times delta, and delta is the sum over dimensions of a result
    times its gradient. The kernels know the result as it was stored: off by half a spacing at most, evenly spread,
    which is 0.21 eps of a number, root mean square. Weights are rounded before they meet the values, which moves the
    result by as much, and flash-attn-4 rounds the window's share once more before sinks are merged into it: three
    roundings with random signs. `chunked` keeps delta in float32 and has none of them.
    """
    query, key, value, given = (part.double() for part in case.leaves())
    where = {"sinks": case.sinks, "window": case.window, "positions": case.positions(), "impl": "chunked"}
    seen = attend(query, key, torch.ones_like(value), scoring=case.scoring(torch.float64), **where)[..., 0].cpu()
    terms = (1 - seen).square() * (given.cpu() * out).square().sum(-1)
    once = 0.21 * torch.finfo(case.dtype).eps * terms.sum((0, 2)).amax().sqrt()
    return 5 * 3**0.5 * float(once) + 1e-5


def small_cases() -> Iterator[Case]:
    for sinks, window in itertools.product((0, 1, 4, 20), (1, 17)):
        yield Case(sinks, window, 60, logits=0.0 if sinks else None, ragged=window == 17, batch=2)
    yield Case(4, 17, 19, logits=5.0)
    yield Case(4, 17, 21, heads=(3, 1), logits=8.0)
    yield Case(4, 40, 22, heads=(2, 2), logits=-torch.inf, batch=1)
    yield Case(33, 9, 80, heads=(2, 1), batch=1, rotary=False, ragged=True)
    yield Case(4, 24, 70, heads=(4, 1), head_dim=128, batch=1)
    yield Case(4, 24, 70, heads=(4, 2), head_dim=128, logits=0.5, rotary=False, ragged=True)


def large_cases() -> Iterator[Case]:
    for index, (sinks, window) in enumerate(itertools.product((0, 1, 4, 64), (1, 17, 1020))):
        length, logits = (3000, 700, 2049)[index % 3], (None, -torch.inf, 0.0, 5.0, 20.0)[index % 5]
        # At +20 all weights but the sink logit's are below what float16 can hold.
        dtype = torch.bfloat16 if logits == 20.0 else (torch.bfloat16, torch.float16)[index % 2]
        for head_dim in (64, 128):
            heads = ((8, 2), (4, 4), (6, 2))[(index + head_dim) % 3]
            yield Case(sinks, window, length, heads, head_dim, logits, index % 4 != 1, index % 5 != 2, 3, dtype)
    yield Case(4, 1020, 1023, (8, 2), 128, 0.0)
    yield Case(4, 1020, 1024, (8, 2), 128, 0.0, batch=1)
    yield Case(4, 1020, 1025, (8, 1), 64, 0.0)
    for head_dim in (64, 128):
        # Nothing turned, two heads at once or one; and scales of which hidden scores make products that round.
        yield Case(4, 1020, 2049, (8, 2), head_dim, 0.0, rotary=False, dtype=torch.bfloat16)
        yield Case(20, 300, 1500, (6, 2), head_dim, 3.0, True, rotary=False, dtype=torch.bfloat16)
        yield Case(20, 300, 1500, (8, 2), head_dim, 3.0, dtype=torch.bfloat16)


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="the large cases run here")
@pytest.mark.parametrize("case", [*small_cases()], ids=str)
def test_interpreted_kernels_equal_the_specification(case: Case) -> None:
    check(case, "triton")


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="the window itself runs here")
@pytest.mark.parametrize("case", [
    Case(4, 9, 60, logits=1.0, batch=1), Case(20, 16, 45, (2, 2), ragged=True, logits=-torch.inf),
    Case(4, 17, 60, (2, 1), 128, rotary=False, ragged=True), Case(0, 8, 20, logits=0.5), Case(3, 40, 30, batch=1),
], ids=str)  # fmt: skip
def test_what_stands_around_the_window_of_flash_is_interpreted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "window_forward", plain_window)
    monkeypatch.setattr(flash, "window_gradients", plain_gradients)
    monkeypatch.setattr(band_attend, "need_flash", lambda device: None)
    check(case, "flash")


def plain_window(query: Tensor, key: Tensor, value: Tensor, rows: Rows, band: Band) -> tuple[Tensor, Tensor]:
    """What flash-attn-4 gives for a plain window: result and log-sum-exp, every weight written out."""
    scores, group = window_scores(query, key, rows, band), query.shape[1] // key.shape[1]
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), value.double().repeat_interleave(group, 1))
    return out.to(query.dtype).contiguous(), scores.logsumexp(-1).float()


def window_scores(query: Tensor, key: Tensor, rows: Rows, band: Band) -> Tensor:
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    place, starts = torch.arange(query.shape[0]), rows.begins[1:].contiguous()
    row = torch.searchsorted(starts, place, right=True)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance < band.window) & (row[:, None] == row[None, :])
    return (torch.einsum("thd,shd->hts", query.double(), keys) * band.scale).masked_fill(~seen, -torch.inf)


def plain_gradients(done: Finished, given: Tensor, rows: Rows, band: Band) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of flash-attn-4's backward, given result and log-sum-exp of more columns than the window's."""
    group, wide = done.query.shape[1] // done.key.shape[1], given.double()
    weights = (window_scores(done.query, done.key, rows, band) - done.log_sums.double()[..., None]).exp()
    keys, values = (part.double().repeat_interleave(group, 1) for part in (done.key, done.value))
    delta = (wide * done.out.double()).sum(-1).t()[..., None]
    slopes = weights * (torch.einsum("thd,shd->hts", wide, values) - delta) * band.scale
    query = torch.einsum("hts,shd->thd", slopes, keys)
    key = torch.einsum("hts,thd->shd", slopes, done.query.double()).unflatten(1, (-1, group)).sum(2)
    value = torch.einsum("hts,thd->shd", weights, wide).unflatten(1, (-1, group)).sum(2)
    return tuple(part.to(given.dtype).contiguous() for part in (query, key, value))  # type: ignore[return-value]


@gpu
@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", [*large_cases()], ids=str)
def test_every_way_equals_the_specification(case: Case, impl: str) -> None:
    check(case, impl)


@pytest.mark.parametrize("case", [Case(4, 17, 60, logits=1.0, ragged=True), Case(0, 9, 30), Case(3, 8, 9)], ids=str)
def test_flex_equals_the_specification_without_a_gpu(case: Case) -> None:
    heads = [part.double().cpu() for part in case.leaves()[:3]]
    where = {"sinks": case.sinks, "window": case.window, "positions": on_cpu(case.positions())}
    scoring = case.scoring(torch.float64, torch.device("cpu"))
    slow, fast = (attend(*heads, impl=impl, scoring=scoring, **where) for impl in ("chunked", "flex"))
    assert (slow - fast).abs().max() < 1e-10


@needs_triton
@pytest.mark.parametrize("case", [
    Case(4, 17, 60, logits=0.5, ragged=True), Case(5, 40, 30), Case(0, 9, 40), Case(1, 1, 1, batch=1),
    Case(4, 17, 60, head_dim=128, logits=0.5, rotary=False),
], ids=str)  # fmt: skip
def test_statistics_equal_those_of_written_out_weights(case: Case) -> None:
    heads, positions = case.leaves()[:3], case.positions()
    scoring, first = case.scoring(torch.float32), min(case.sinks, 2)
    out, found = attend_measured(
        *heads, sinks=case.sinks, window=case.window, scoring=scoring, positions=positions, first_keys=first
    )
    weights = written_out(case, heads, positions)
    stands = torch.arange(case.length).expand(case.batch, -1) if positions is None else positions.cpu()
    real, keys = (stands >= 0)[:, None, :], weights[..., : case.length]
    counted = ((stands >= 0) & (stands < first))[:, None, None, :]
    want = {
        "mass": (keys * counted).sum(-1),
        "entropy": torch.special.entr(weights).sum(-1),
        "maximum": keys.amax(-1),
    }
    for name, exact in want.items():
        got = getattr(found, name).double().cpu()
        # Scores come from heads rounded to 11 bits after turning: 2^-11 of scores of size 5, all in all.
        assert (got - exact.where(real, 0)).abs().max() < 2e-2 * (1 + exact.abs().max()), name
        assert (got - exact.where(real, 0)).square().mean().sqrt() < 2e-3 * (1 + exact.abs().max()), name
    plain = attend(*heads, sinks=case.sinks, window=case.window, scoring=scoring, positions=positions, impl="triton")
    assert torch.equal(out, plain)


def written_out(case: Case, heads: list[Tensor], positions: Tensor | None) -> Tensor:
    """Weights [batch, heads, queries, keys (and sink logit)], from values that spell them out, in float64."""
    query, key = (part.double().cpu() for part in heads[:2])
    length = query.shape[2]
    spelled = torch.eye(length, dtype=torch.float64).expand(*key.shape[:2], -1, -1)
    scoring = case.scoring(torch.float64, torch.device("cpu"))
    keys = attend(
        query, key, spelled, sinks=case.sinks, window=case.window, scoring=scoring, positions=on_cpu(positions),
        impl="chunked",
    )  # fmt: skip
    return torch.cat((keys, (1 - keys.sum(-1, keepdim=True)).clamp(min=0)), dim=-1)


@needs_triton
def test_a_sink_logit_is_honoured() -> None:
    outs = [run(Case(4, 17, 40, logits=logit), "triton", torch.float16)[0] for logit in (-torch.inf, 0.0, 5.0)]
    for one, other in itertools.combinations(outs, 2):
        assert (one - other).abs().max() > 1e-2


@needs_triton
def test_one_token_alone() -> None:
    """Sizes of one become constants of the compilation."""
    check(Case(1, 1, 1, (2, 1), logits=0.0, batch=1), "triton")


@needs_triton
def test_the_gradient_is_the_same_every_time() -> None:
    first, second = (run(Case(4, 17, 60, ragged=True, logits=0.0), "triton", torch.float16) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("change", "says"), [
    ({"head_dim": 32}, "64 or 128 dimensions.*'flex' or 'chunked'"),
    ({"dtype": torch.float32}, "bfloat16 or float16.*'chunked'"),
    ({"sinks": 65}, "at most 64 sinks.*'chunked'"),
])  # fmt: skip
@pytest.mark.parametrize("impl", ["triton", "flash"])
def test_what_a_kernel_cannot_do_is_named(impl: str, change: dict[str, int], says: str) -> None:
    case = Case(**({"sinks": 1, "window": 2, "length": 3} | change))
    with pytest.raises(UnsupportedOption, match=says):
        attend(*case.leaves()[:3], sinks=case.sinks, window=2, impl=impl)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["triton", "flash", "flex"])
def test_soft_caps_slopes_and_odd_scales_are_refused(impl: str) -> None:
    heads = Case(1, 2, 3).leaves()[:3]
    for scoring in (Scoring(1.0, softcap=5.0), Scoring(1.0, slopes=torch.ones(4)), Scoring(-1.0)):
        if impl == "flex" and scoring.scale < 0:
            continue  # it takes any
        with pytest.raises(UnsupportedOption, match="choose impl='chunked'"):
            attend(*heads, sinks=1, window=2, scoring=scoring, impl=impl)  # type: ignore[arg-type]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_flash_is_refused_and_auto_is_chunked() -> None:
    heads = Case(1, 2, 3).leaves()[:3]
    with pytest.raises(UnsupportedOption, match="choose impl="):
        attend(*heads, sinks=1, window=2, impl="flash")
    assert choose(heads[0], heads[2], sinks=1, scoring=Scoring(1.0)) == "chunked"
    with pytest.raises(UnsupportedOption, match="no gradient on a CPU"):
        attend(heads[0].requires_grad_(), *heads[1:], sinks=1, window=2, impl="flex")


@gpu
@needs_triton
def test_on_a_gpu_auto_takes_the_fastest_that_can() -> None:
    heads, fastest = Case(1, 2, 3).leaves()[:3], "flash" if flash.has_flash() else "triton"
    assert choose(heads[0], heads[2], sinks=1, scoring=Scoring(1.0)) == fastest
    assert choose(heads[0], heads[2], sinks=1, scoring=Scoring(1.0, softcap=1.0)) == "chunked"


def test_mass_is_counted_on_sinks_only() -> None:
    with pytest.raises(InvalidInput, match="first_keys=3"):
        attend_measured(*Case(1, 2, 3).leaves()[:3], sinks=2, window=2, first_keys=3)
