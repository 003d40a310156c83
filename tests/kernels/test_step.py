"""The fused step against the specification, token by token; Triton's kernel also runs here, interpreted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels import Rotary, Scoring, Step, attend, attend_step
from sinks.kernels.phase import rotate
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

pytestmark = needs_triton


@dataclass(frozen=True)
class Stream:
    """Rows that begin at different moments, some of which rest now and then."""

    sinks: int
    window: int
    length: int
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    logits: float | None = None
    ragged: bool = True
    splits: int | None = None
    dtype: torch.dtype = torch.float32

    def heads_of(self) -> list[Tensor]:
        made = torch.Generator().manual_seed(self.sinks * 101 + self.window)
        shapes = (self.heads[0], self.heads[1], self.heads[1])
        drawn = [torch.randn(2, h, self.length, self.head_dim, generator=made) for h in shapes]
        return [part.to(DEVICE, self.dtype) for part in drawn]

    def positions(self) -> Tensor:
        real = torch.ones(2, self.length, dtype=torch.bool)
        if self.ragged:
            real = torch.rand(2, self.length, generator=torch.Generator().manual_seed(self.length)) < 0.8
        return (real.cumsum(1) - 1).masked_fill(~real, -1).to(DEVICE)

    def scoring(self, device: torch.device = DEVICE) -> Scoring:
        pairs = self.head_dim // 2 - 8 * (self.window % 2)
        inv_freq = (1.0 / 10000 ** (torch.arange(pairs) / pairs)).double().to(device)
        rotary = Rotary(inv_freq, interleaved=self.window % 2 == 1, first=8 * (self.window % 2))
        logits = None if self.logits is None else torch.linspace(-1, 1, self.heads[0], device=device) + self.logits
        return Scoring(self.head_dim**-0.5, rotary, sink_logits=logits)


def play(stream: Stream) -> Tensor:
    """Result of every step, [batch, heads, length, head_dim]."""
    query, key, value = stream.heads_of()
    keys = torch.full((2, stream.heads[1], stream.sinks + stream.window, stream.head_dim), torch.nan)
    keys = keys.to(DEVICE, stream.dtype)
    values, positions, outs = keys.clone(), stream.positions(), []
    step = Step.prepare(
        query[:, :, 0], keys, sinks=stream.sinks, window=stream.window, scoring=stream.scoring(),
        splits=stream.splits,
    )  # fmt: skip
    for column in range(stream.length):
        new = (part[:, :, column] for part in (query, key, value))
        outs.append(attend_step(step, *new, keys, values, positions[:, column].contiguous())[0])
    assert not step.arrivals.any(), "the count must be clear for the next step"
    return torch.stack(outs, dim=2)


def expected(stream: Stream) -> Tensor:
    heads = [part.double().cpu() for part in stream.heads_of()]
    scoring, positions = stream.scoring(torch.device("cpu")), stream.positions().cpu()
    return attend(
        *heads, sinks=stream.sinks, window=stream.window, scoring=scoring, positions=positions, impl="chunked"
    )


def check(stream: Stream) -> None:
    """Float32: sums of a hundred terms. Half precision: one rounding each of keys, query, weights and result."""
    found, want = play(stream).double().cpu(), expected(stream)
    band = 2e-5 if stream.dtype == torch.float32 else 6 * torch.finfo(stream.dtype).eps
    assert torch.isfinite(found).all()
    assert (found - want).abs().max() <= band * want.abs().max()


SMALL = [
    Stream(4, 12, 50, logits=0.5),
    Stream(0, 5, 23),
    Stream(1, 1, 9),
    Stream(4, 7, 30, heads=(3, 1), head_dim=96),
    Stream(20, 9, 40, heads=(2, 2), head_dim=128, logits=5.0, ragged=False),
    Stream(3, 150, 170, heads=(2, 1), splits=3, logits=-torch.inf),
    Stream(3, 150, 160, heads=(2, 1), splits=2, ragged=False, dtype=torch.float16),
    Stream(2, 70, 80, heads=(1, 1), head_dim=256),
]
LARGE = [
    Stream(sinks, window, window + 200, heads, head_dim, logits, True, splits, dtype)
    for index, (sinks, window) in enumerate([(0, 17), (1, 1), (4, 1020), (64, 300), (4, 124)])
    for head_dim in (64, 96, 128, 256)
    for heads, logits, splits, dtype in [
        [((8, 2), 0.0, None, torch.bfloat16), ((4, 4), None, 7, torch.float16), ((9, 3), 20.0, 1, torch.float32)][
            (index + head_dim // 32) % 3
        ]
    ]
]


@pytest.mark.skipif(HAS_GPU, reason="the large streams run here")
@pytest.mark.parametrize("stream", SMALL, ids=str)
def test_interpreted_every_step_equals_the_specification(stream: Stream) -> None:
    check(stream)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [*SMALL, *LARGE], ids=str)
def test_every_step_equals_the_specification(stream: Stream) -> None:
    check(stream)


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_any_number_of_splits_gives_one_answer(splits: int) -> None:
    stream = Stream(4, 500, 12, heads=(2, 1), logits=1.0, splits=splits)
    one = play(Stream(**{**vars(stream), "splits": 1}))
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
    step = Step.prepare(query[:, :, 0], keys, sinks=sinks, window=window, scoring=scoring, first_keys=first, splits=1)
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


@pytest.mark.parametrize("start", [0, 3, 2**31, 2**40 + 7])
def test_rows_sit_where_they_are_told_and_heads_may_lie_in_one_buffer(start: int) -> None:
    """Rows on seats 3 and 0 of four, views of one buffer, phases from `start` on: the same as without all that."""
    stream = Stream(4, 12, 40, logits=0.5)
    query, key, value = stream.heads_of()
    keys = torch.full((4, 2, 16, 64), torch.nan, device=DEVICE)
    values, positions, plain = keys.clone(), stream.positions(), play(stream)
    step = Step.prepare(query[:, :, 0], keys, sinks=4, window=12, scoring=stream.scoring(), start=start)
    seats, out = torch.tensor([3, 0], device=DEVICE), torch.empty(2, 4, 64, device=DEVICE)
    for column in range(stream.length):
        new = torch.cat([part[:, :, column] for part in (query, key, value)], dim=1).split([4, 2, 2], dim=1)
        given, _ = attend_step(step, *new, keys, values, positions[:, column].contiguous(), seats, out)
        assert given is out and (out - plain[:, :, column]).abs().max() < 2e-5
    assert keys[1:3].isnan().all() and values[1:3].isnan().all(), "nobody sat there"


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
