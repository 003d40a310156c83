"""The fused step against the specification, token by token; Triton's kernel also runs here, interpreted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sinks.cache.rings.quantized import encode
from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels import Cut, Rotary, Scoring, Step, attend_step
from sinks.kernels.phase import rotate
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton
from tests.kernels.stepping import Stream, check, expected, normed, play

pytestmark = needs_triton

WHOLE = Cut(64, 1)
SMALL = [
    Stream(4, 12, 50, logits=0.5, cut=Cut(16, 1)),
    Stream(0, 5, 23, seats=(3, 0), tables=True, start=2**40 + 7),
    Stream(1, 1, 9, norms="qwen"),
    Stream(4, 7, 30, heads=(3, 1), head_dim=96, norms="gemma", start=2**31),
    Stream(20, 9, 40, heads=(2, 2), head_dim=128, logits=5.0, ragged=False),
    Stream(3, 150, 170, heads=(2, 1), cut=Cut(64, 3), logits=-torch.inf),
    Stream(3, 150, 160, heads=(2, 1), cut=Cut(64, 2), ragged=False, dtype=torch.float16, tables=True),
    Stream(2, 70, 80, heads=(1, 1), head_dim=256),
    Stream(4, 33, 50, heads=(3, 1), logits=0.5, seats=(0, 2), norms="qwen", dtype=torch.float16),
    Stream(3, 12, 40, coded=True, logits=20.0, seats=(1, 0), start=5, cut=Cut(16, 1)),
    Stream(0, 17, 40, coded=True, cut=Cut(16, 2), tables=True, ragged=False),
    Stream(20, 44, 90, heads=(2, 1), coded=True, cut=Cut(16, 2), dtype=torch.float16, norms="gemma"),
]
"""The interpreter multiplies no matrices of bfloat16: those are for the GPU."""

LOGITS = (None, -torch.inf, 0.0, 5.0, 20.0)
CUTS = (None, Cut(64, 1), Cut(32, 2, 2), Cut(32, 7), Cut(128, 2, 8, 2), Cut(16, 64, 1))
GRID = [
    Stream(
        sinks, window, sinks + window + 150, ((8, 2), (4, 4), (9, 3))[index % 3], (64, 128, 64, 96, 64, 256)[index % 6],
        LOGITS[(index + coded) % 5], True, CUTS[(index + 2 * coded) % 6],
        (torch.bfloat16, torch.float32, torch.float16)[(index + coded) % 3], coded, index % 2 == 0,
        (2, 0) if index % 4 < 2 else None, ("", "qwen", "gemma")[index % 7 % 3], (0, 2**31, 2**40)[index % 5 % 3],
    )
    for index, (sinks, window) in enumerate(itertools.product((0, 1, 4, 64), (1, 17, 300, 1020)))
    for coded in (False, True)
]  # fmt: skip
OVERLAPPED = [replace(stream, cut=Cut(32, 64, overlap=True), tables=True) for stream in (SMALL[5], SMALL[9], GRID[23])]


@pytest.mark.skipif(HAS_GPU, reason="the large streams run here")
@pytest.mark.parametrize("stream", SMALL, ids=str)
def test_interpreted_every_step_equals_the_specification(stream: Stream) -> None:
    check(stream)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [*SMALL, *GRID, *OVERLAPPED], ids=str)
def test_every_step_equals_the_specification(stream: Stream) -> None:
    check(stream)


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_any_number_of_splits_gives_one_answer(splits: int) -> None:
    stream = Stream(4, 500, 12, heads=(2, 1), logits=1.0, cut=Cut(64, splits))
    one = play(replace(stream, cut=Cut(64, 1)))
    assert (play(stream) - one).abs().max() < 1e-5


@pytest.mark.parametrize("first", [0, 2])
def test_statistics_are_those_of_the_weights(first: int) -> None:
    """A value that is one-hot by slot spells the weights out."""
    sinks, window, length = 3, 61, 90
    made = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, h, length, 64, generator=made).to(DEVICE) for h in (2, 1))
    logits = torch.tensor([0.3, 2.0], device=DEVICE)
    scoring = Scoring(0.125, Rotary((1.0 / 10000 ** (torch.arange(32) / 32)).double().to(DEVICE)), sink_logits=logits)
    keys = torch.zeros(1, 1, sinks + window, 64, device=DEVICE)
    values = torch.zeros_like(keys)
    step = Step.prepare(query[:, :, 0], keys, sinks=sinks, window=window, scoring=scoring, first_keys=first, cut=WHOLE)
    for now in range(length):
        slot = now if now < sinks else sinks + (now - sinks) % window
        value = torch.nn.functional.one_hot(torch.tensor([[slot]]), 64).float().to(DEVICE)
        where = torch.tensor([now], device=DEVICE)
        weights, found = attend_step(step, query[:, :, now], key[:, :, now], value, keys, values, where)
        assert found is not None
        outcomes = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), dim=-1).double().clamp(min=0)
        assert (found.mass - weights[..., :first].sum(-1)).abs().max() < 1e-5
        assert (found.maximum - weights.amax(-1)).abs().max() < 1e-5
        assert (found.entropy - torch.special.entr(outcomes).sum(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("far", [2**24, 2**31, 2**40])
def test_a_stream_far_on_gives_the_same(far: int) -> None:
    """A full ring, moved by a multiple of the window: the same slots, the same distances, other phases."""
    sinks, window = 2, 16
    made = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, h, 30, 64, generator=made).to(DEVICE) for h in (2, 1, 1))
    scoring = Scoring(0.125, Rotary((1.0 / 10000 ** (torch.arange(32) / 32)).double().to(DEVICE)))
    outs: dict[int, list[Tensor]] = {0: [], far // window * window: []}
    full = sinks + window - 1
    for origin, found in outs.items():
        keys = torch.zeros(1, 1, sinks + window, 64, device=DEVICE)
        values = torch.zeros_like(keys)
        step = Step.prepare(query[:, :, 0], keys, sinks=sinks, window=window, scoring=scoring)
        for column in range(30):
            if column == full:  # a ring fills near the beginning; only a full one can be far on
                keys[:, :, sinks:] = moved(keys[:, :, sinks:], origin, scoring)
            where = torch.tensor([column + origin * (column >= full)], device=DEVICE)
            new = (part[:, :, column] for part in (query, key, value))
            found.append(attend_step(step, *new, keys, values, where)[0])
    near, away = outs.values()
    for one, other in zip(near, away, strict=True):
        assert (one - other).abs().max() < 2e-5


def moved(keys: Tensor, origin: int, scoring: Scoring) -> Tensor:
    """Kept keys as they would be, had they come `origin` positions later."""
    assert scoring.rotary is not None
    where = torch.full((1, keys.shape[2]), origin, device=keys.device)
    return rotate(keys.double(), *scoring.rotary.tables(where, torch.float64), scoring.rotary).to(keys.dtype)


@pytest.mark.gpu
def test_one_graph_serves_every_position() -> None:
    stream = Stream(4, 60, 200, ragged=False)
    query, key, value = stream.heads_of()
    keys = torch.zeros(2, 2, 64, 64, device=DEVICE)
    values, now = torch.zeros_like(keys), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    new = [part[:, :, 0].contiguous() for part in (query, key, value)]
    step = Step.prepare(new[0], keys, sinks=4, window=60, scoring=stream.scoring())
    attend_step(step, *new, keys, values, now)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend_step(step, *new, keys, values, now)
        now += 1
    now.zero_()
    outs = []
    for column in range(stream.length):
        for part, held in zip((query, key, value), new, strict=True):
            held.copy_(part[:, :, column])
        graph.replay()
        outs.append(out.clone())
    assert (torch.stack(outs, dim=2).double().cpu() - expected(stream)).abs().max() < 1e-4


def test_nobody_writes_where_no_row_sits() -> None:
    stream = Stream(4, 12, 20, seats=(3, 0))
    ring = stream.ring()
    play(stream, ring)
    for (part,) in ring:
        assert part[1:3].isnan().all() and part[4:].isnan().all() and not part[::3, :, :4].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_int8_ring_is_written_as_the_cache_writes_it(dtype: torch.dtype) -> None:
    """Sinks in full, the window coded; a turned key may be one rounding off, and its codes one off with it."""
    stream = Stream(3, 12, 40, coded=True, ragged=False, dtype=dtype)
    ring = stream.ring()
    play(stream, ring)
    (_, key, value), rotary = normed(stream), stream.scoring(torch.device("cpu")).rotary
    assert rotary is not None
    turned = rotate(key, *rotary.tables(stream.positions().cpu(), torch.float32), rotary)
    last = [max(t for t in range(40) if (t - 3) % 12 == slot) for slot in range(12)]
    for part, new, off in zip(ring, (turned, value), (1, 0), strict=True):
        sinks, codes, scales = (each.cpu() for each in part)
        want_codes, want_scales = encode(new[:, :, last])
        torch.testing.assert_close(sinks, new[:, :, :3], rtol=2e-2 * off if dtype.itemsize == 2 else 0, atol=1e-6 * off)
        assert (codes.int() - want_codes.int()).abs().max() <= off
        torch.testing.assert_close(scales, want_scales, rtol=1e-2 * off, atol=0)


def test_a_number_that_is_none_is_not_taken_for_a_sound_one() -> None:
    """An int8 ring has no code for it: the scale must tell."""
    stream = Stream(0, 4, 1, heads=(1, 1), coded=True, ragged=False)
    keys, values = stream.ring()
    query, key, value = (part[:, :, 0] for part in stream.heads_of())
    step = Step.prepare(query, keys, sinks=0, window=4, scoring=stream.scoring())
    value[0, 0, 7], value[1, 0, 0] = torch.inf, torch.nan
    attend_step(step, query, key, value, keys, values, torch.zeros(2, dtype=torch.int64, device=DEVICE))
    assert not values[2][:, 0, 0].isfinite().any() and keys[2][:, 0, 0].isfinite().all()


def test_what_the_step_cannot_do_is_named() -> None:
    query, keys = torch.zeros(1, 2, 64, device=DEVICE), torch.zeros(1, 1, 6, 64, device=DEVICE)
    for scoring in (Scoring(1.0, softcap=1.0), Scoring(1.0, slopes=torch.ones(2))):
        with pytest.raises(UnsupportedOption, match="SinkCache"):
            Step.prepare(query, keys, sinks=2, window=4, scoring=scoring)
    with pytest.raises(UnsupportedOption, match="64, 96, 128 or 256"):
        Step.prepare(query[..., :32], keys[..., :32], sinks=2, window=4, scoring=Scoring(1.0))
    with pytest.raises(InvalidInput, match="does not fit"):
        Step.prepare(query, keys, sinks=2, window=5, scoring=Scoring(1.0))
    with pytest.raises(InvalidInput, match="first_keys=3"):
        Step.prepare(query, keys, sinks=2, window=4, scoring=Scoring(1.0), first_keys=3)
