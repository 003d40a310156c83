"""A chunk of any length in one call of the band kernels: against the specification, and against the ring's own way."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinks.cache import cache as cache_module
from sinks.cache.arrival import Arrival
from sinks.cache.cache import KINDS, Kind, SinkCache
from sinks.cache.plan import Plan
from sinks.cache.rings.quantized import QuantizedRing
from sinks.cache.rings.ring import Ring
from sinks.kernels import Rotary, Scoring, attend
from sinks.kernels.band import arriving, flash
from sinks.kernels.band.arriving import choose_arriving
from sinks.kernels.band.operator import Walker
from sinks.kernels.device.forward import Shape
from sinks.models.attach import attach
from tests.families.tiny import build
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

gpu = pytest.mark.gpu
WALKERS = [
    pytest.param("triton", marks=needs_triton),
    # flash-attn-4 warns of its own foundation, in many words.
    pytest.param("flash", marks=[
        gpu,
        pytest.mark.skipif(not flash.has_flash(), reason="flash-attn-4 is not installed"),
        pytest.mark.filterwarnings("ignore"),
    ]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, tiles are small, so that a short text has many."""
    if not HAS_GPU:
        monkeypatch.setattr(arriving, "SHAPES", dict.fromkeys((64, 128, 256), Shape(32, 16, 4, 1)))


@dataclass(frozen=True)
class Case:
    """A stream that is fed in chunks of these `sizes`, the last of which is looked at."""

    sinks: int
    window: int
    sizes: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    logits: float | None = None
    rotary: bool = True
    batch: int = 1
    start: int = 0
    dtype: torch.dtype = torch.float16

    @property
    def plan(self) -> Plan:
        return Plan(self.sinks, self.window)

    @property
    def length(self) -> int:
        return sum(self.sizes)

    def drawn(self) -> list[Tensor]:
        """Query, key and value of the whole stream, in `dtype`, before the axes are swapped, as models give them."""
        made = torch.Generator().manual_seed(self.sinks * 1000003 + self.window * 1009 + self.length)
        counts = (self.heads[0], self.heads[1], self.heads[1])
        drawn = [torch.randn(self.batch, self.length, h, self.head_dim, generator=made) for h in counts]
        return [part.to(DEVICE, self.dtype).transpose(1, 2) for part in drawn]

    def scoring(self, dtype: torch.dtype) -> Scoring:
        """Distinct sink logits for every head; interleaved pairs that leave dimensions out, in every other case."""
        spread = torch.linspace(-0.5, 1.0, self.heads[0], dtype=torch.float64)
        logits = None if self.logits is None else (spread + self.logits).to(DEVICE, dtype)
        pairs = self.head_dim // 2 - 8 * (self.length % 2)
        inv_freq = (1.0 / 10000 ** (torch.arange(pairs) / pairs)).double().to(DEVICE)
        rotary = Rotary(inv_freq, interleaved=self.length % 2 == 1, first=8 * (self.length % 2))
        return Scoring(self.head_dim**-0.5, rotary if self.rotary else None, sink_logits=logits)


def fed(case: Case, walker: Walker | None, ring: Ring | None = None) -> tuple[Tensor, Ring]:
    """The results of all chunks, by the kernels or block by block, in float64 on the CPU; and the ring."""
    ring, scoring, seen, found = ring or Ring(case.plan), case.scoring(torch.float32), 0, []
    for size in case.sizes:
        query, key, value = (part[:, :, seen : seen + size] for part in case.drawn())
        arrival = Arrival([seen] * case.batch, size, None, case.start)
        if walker is None:
            found.append(ring.attend(query, key, value, arrival.blocks(case.plan, DEVICE), scoring))
        else:
            block = arrival.whole(case.plan, DEVICE)
            found.append(ring.attend_whole((query, key, value), block, scoring, walker))
        seen += size
    return torch.cat(found, dim=2).double().cpu(), ring


def exact(case: Case) -> Tensor:
    """The specification, over the whole stream at once."""
    heads, scoring = [part.double() for part in case.drawn()], case.scoring(torch.float64)
    if case.length >= 300:
        return attend(*heads, sinks=case.sinks, window=case.window, scoring=scoring, impl="chunked").cpu()
    heads = [part.cpu() for part in heads]
    rotary = None if scoring.rotary is None else replace(scoring.rotary, inv_freq=scoring.rotary.inv_freq.cpu())
    logits = None if scoring.sink_logits is None else scoring.sink_logits.cpu()
    scoring = replace(scoring, rotary=rotary, sink_logits=logits)
    return attend(*heads, sinks=case.sinks, window=case.window, scoring=scoring, impl="reference")


def check(case: Case, walker: Walker) -> None:
    """Against float64 at most twice the error of the ring's own way, which widens to float32, and three roundings.

    The ring that is left must hold what the other way leaves, keys turned to within a rounding.
    """
    want, (near, other), (got, ring) = exact(case), fed(case, None), fed(case, walker)
    assert torch.isfinite(got).all()
    band = 3 * torch.finfo(case.dtype).eps * (want.square().mean().sqrt() + want.abs().max() / 8) + 1e-5
    assert (got - want).abs().max() <= 2 * (near - want).abs().max() + band
    for mine, theirs in zip(ring.held, other.held, strict=True):
        assert torch.allclose(mine, theirs, rtol=2 * torch.finfo(case.dtype).eps, atol=1e-3)


def fills() -> Iterator[Case]:
    """Every state of the ring before the chunk, chunks from 1 to three windows; each slot of 17 is a seam once."""
    for sinks, window in itertools.product((0, 1, 4, 64), (1, 17)):
        capacity = sinks + window
        for seen in (0, 1, capacity - 1, capacity, capacity + 1, 5 * capacity + 3):
            for count in (1, window, 3 * window):
                sizes = (seen, count) if seen else (count,)
                yield Case(sinks, window, sizes, batch=1 + (seen + count) % 2)


def seams() -> Iterator[Case]:
    for offset in range(17):
        yield Case(4, 17, (40, 1 + offset, 9), heads=(3, 1), logits=0.0)


def odds() -> Iterator[Case]:
    for index, logits in enumerate((-torch.inf, 0.0, 5.0, 20.0)):
        yield Case(4, 17, (30, 40, 2), logits=logits, heads=((4, 1), (3, 3), (6, 2), (2, 2))[index])
    yield Case(4, 17, (7, 50), rotary=False)
    yield Case(4, 17, (2, 1, 1, 3, 60, 5), start=2**31 - 20)
    yield Case(4, 17, (25, 30), start=2**40 + 1, batch=3)
    yield Case(4, 24, (33, 50), head_dim=128, logits=1.0)
    yield Case(33, 9, (20, 40, 50))
    yield Case(150, 9, (20, 100, 90))
    yield Case(4, 17, (30, 40), head_dim=96)
    yield Case(4, 17, (30, 40), head_dim=256, heads=(2, 1))
    yield Case(4, 17, (30, 40), head_dim=48)


SMALL = [*fills(), *seams(), *odds()]


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="the whole list runs here, with larger ones")
@pytest.mark.parametrize("case", SMALL[::7] + [*odds()], ids=str)
def test_interpreted_a_chunk_equals_the_specification(case: Case) -> None:
    check(case, "triton")


@gpu
@pytest.mark.parametrize("walker", WALKERS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_chunk_equals_the_specification(case: Case, walker: Walker) -> None:
    check(case, walker)


def large() -> Iterator[Case]:
    logits = itertools.cycle((None, -torch.inf, 0.0, 5.0))
    dtypes = itertools.cycle((torch.bfloat16, torch.float16))
    for sinks, head_dim in itertools.product((0, 1, 4, 64), (64, 128)):
        for sizes in ((3000,), (1000, 40, 3000), (2500, 2), (1019 + sinks, 1, 1, 700)):
            shape = ((8, 2), (4, 4), (6, 2))[len(sizes) % 3]
            yield Case(sinks, 1020, sizes, shape, head_dim, next(logits), batch=2, dtype=next(dtypes))
    yield Case(4, 1020, (1500, 900), (8, 1), 128, 20.0, dtype=torch.bfloat16)


@gpu
@pytest.mark.parametrize("walker", WALKERS)
@pytest.mark.parametrize("case", [*large()], ids=str)
def test_a_long_chunk_equals_the_specification(case: Case, walker: Walker) -> None:
    check(case, walker)


@needs_triton
@pytest.mark.parametrize(("sizes", "sinks"), [((60,), 4), ((20, 3, 40), 0), ((2, 2, 2, 30, 9), 5)], ids=str)
def test_an_int8_ring_meets_its_own_decoded_numbers(sizes: tuple[int, ...], sinks: int) -> None:
    """The same codes as block by block, but for a key whose rounded turn fell otherwise; results a rounding apart."""
    case = Case(sinks, 17, sizes, batch=2, head_dim=48 if sinks else 64)
    (near, other), (got, ring) = (fed(case, way, QuantizedRing(case.plan)) for way in (None, "triton"))
    for name, mine in ring.parts.items():
        theirs = other.parts[name]
        if mine.dtype == torch.int8:
            assert (mine.int() - theirs.int()).abs().max() <= 1
            assert (mine != theirs).float().mean() < 0.01
        else:
            assert torch.allclose(mine, theirs, rtol=2e-3, atol=1e-3)
    if not sinks:  # values are not turned
        assert torch.equal(ring.parts["value_codes"], other.parts["value_codes"])
        assert torch.equal(ring.parts["value_scales"], other.parts["value_scales"])
    # Decoded numbers are rounded to 11 bits for the kernel; a code that differs is 1/127 of a key's largest number.
    assert (got - near).abs().max() < 2e-2
    assert (got - near).square().mean().sqrt() < 2e-3


@needs_triton
def test_a_sink_logit_is_honoured() -> None:
    outs = [fed(Case(4, 17, (30, 20), logits=logit), "triton")[0] for logit in (-torch.inf, 0.0, 5.0)]
    for one, other in itertools.combinations(outs, 2):
        assert (one - other).abs().max() > 1e-2


def test_what_is_no_chunk_for_the_kernels_goes_block_by_block() -> None:
    query, _, value = Case(4, 17, (8,)).drawn()
    here = {"window": 17, "scoring": Scoring(0.125)}
    assert choose_arriving(query.float(), value.float(), **here) is None
    assert choose_arriving(query[:, :, :1], value[:, :, :1], **here) is None
    assert choose_arriving(query, value, window=17, scoring=Scoring(0.125, softcap=5.0)) is None
    assert choose_arriving(query, value[..., :32], **here) is None
    assert (choose_arriving(query, value, **here) is None) == (not HAS_GPU)


class OnGpu(torch.Tensor):
    """Stands for heads on a GPU, of which only shape and type are asked."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "window", "expected"),
    [
        (4096, 128, 4092, "flash"),
        (8192, 80, 2048, "flash"),
        (8192, 128, 1020, "triton"),
        (4095, 128, 4092, "triton"),
        (8192, 64, 4092, "triton"),
        (8192, 256, 4092, "triton"),
    ],
)
def test_flash_attention_walks_long_chunks_through_long_windows(
    tokens: int, head_dim: int, window: int, expected: Walker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arriving, "need_triton", lambda device: None)
    has_flash = [True, False]
    monkeypatch.setattr(arriving.flash, "has_flash", lambda: has_flash[0])
    heads = torch.empty(1, 8, tokens, head_dim, dtype=torch.bfloat16, device="meta").as_subclass(OnGpu)
    given = {"window": window, "scoring": Scoring(0.125)}
    assert choose_arriving(heads, heads, **given) == expected
    del has_flash[0]
    assert choose_arriving(heads, heads, **given) == "triton"


@gpu
@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_model_is_as_exact_as_block_by_block(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in bfloat16 against float64: the two ways round alike, through any sizes of chunks."""
    ids = torch.randint(0, 60, (2, 200), generator=torch.Generator().manual_seed(0))
    exact = logits_of(attach(build(name, layers=2)), ids, kind)
    model = attach(copy.deepcopy(build(name, layers=2)).to("cuda", torch.bfloat16))
    errors = []
    for way in (choose_arriving, lambda *given, **options: None):
        monkeypatch.setattr(cache_module, "choose_arriving", way)
        errors.append((logits_of(model, ids.cuda(), kind) - exact).square().mean().sqrt())
    assert errors[0] <= 1.3 * errors[1] + 2**-9 * exact.square().mean().sqrt()


def logits_of(model: Any, ids: Tensor, kind: Kind) -> Tensor:
    """Of all tokens, read through 3 + 9 slots in chunks longer and shorter than that."""
    cache, found = SinkCache.for_model(model, sinks=3, window=9, cache=kind), []
    with torch.no_grad():
        for part in ids.split((90, 1, 5, 104), dim=1):
            found.append(model(part, past_key_values=cache).logits.double().cpu())
    return torch.cat(found, dim=1)
