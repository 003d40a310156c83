"""Streams for the fused step, and what every step must give, worked out by another route in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sinks.cache.rings.quantized import encode
from sinks.kernels import Cut, HeadNorms, Rotary, Scoring, Step, attend, attend_step
from sinks.kernels.phase import rotate
from sinks.kernels.scoring import visible
from tests.kernels.interpreted import DEVICE

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stream:
    """Rows that begin at different moments, some of which rest now and then, and all that a step may be told."""

    sinks: int
    window: int
    length: int
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    logits: float | None = None
    ragged: bool = True
    cut: Cut | None = None
    dtype: torch.dtype = torch.float32
    coded: bool = False
    tables: bool = False
    seats: tuple[int, int] | None = None
    norms: str = ""
    start: int = 0

    def heads_of(self) -> list[Tensor]:
        """Query, key and value [2, heads, length, head_dim], as they come."""
        made = torch.Generator().manual_seed(self.sinks * 101 + self.window)
        shapes = (self.heads[0], self.heads[1], self.heads[1])
        drawn = [torch.randn(2, h, self.length, self.head_dim, generator=made) for h in shapes]
        return [part.to(DEVICE, self.dtype) for part in drawn]

    def positions(self) -> Tensor:
        """Of each row's tokens [2, length]; -1 where it rests."""
        real = torch.ones(2, self.length, dtype=torch.bool)
        if self.ragged:
            real = torch.rand(2, self.length, generator=torch.Generator().manual_seed(self.length)) < 0.8
        return (real.cumsum(1) - 1).masked_fill(~real, -1).to(DEVICE)

    def scoring(self, device: torch.device = DEVICE) -> Scoring:
        """Interleaved and partial where the window is odd."""
        odd = self.window % 2
        pairs = self.head_dim // 2 - 8 * odd
        inv_freq = (1.0 / 10000 ** (torch.arange(pairs) / pairs)).double().to(device)
        rotary = Rotary(inv_freq, interleaved=odd == 1, first=8 * odd)
        logits = None if self.logits is None else torch.linspace(-1, 1, self.heads[0], device=device) + self.logits
        return Scoring(self.head_dim**-0.5, rotary, sink_logits=logits)

    def head_norms(self) -> HeadNorms | None:
        """With weights of either sign."""
        if not self.norms:
            return None
        drawn = torch.randn(2, self.head_dim, generator=torch.Generator().manual_seed(5)).to(DEVICE, self.dtype)
        return HeadNorms(drawn[0], drawn[1], 1e-5, unit_offset=self.norms == "gemma")

    def ring(self) -> tuple[tuple[Tensor, ...], ...]:
        """Keys, then values: nothing in any slot is a number yet, where it can be none."""
        shape = (2 if self.seats is None else max(self.seats) + 2, self.heads[1])

        def empty(slots: int, width: int, dtype: torch.dtype) -> Tensor:
            return torch.full((*shape, slots, width), torch.nan, dtype=dtype, device=DEVICE)

        if not self.coded:
            return tuple((empty(self.sinks + self.window, self.head_dim, self.dtype),) for _ in range(2))
        codes = torch.full((*shape, self.window, self.head_dim), 99, dtype=torch.int8, device=DEVICE)
        return tuple(
            (empty(self.sinks, self.head_dim, self.dtype), codes.clone(), empty(self.window, 1, torch.float32))
            for _ in range(2)
        )


def play(stream: Stream, ring: tuple[tuple[Tensor, ...], ...] | None = None) -> Tensor:
    """Result of every step, [batch, heads, length, head_dim]; query, key and value are views of one buffer."""
    held = stream.ring() if ring is None else ring
    keys, values = (part if stream.coded else part[0] for part in held)
    query, key, value = stream.heads_of()
    positions, outs = stream.positions(), []
    seats = None if stream.seats is None else torch.tensor(stream.seats, device=DEVICE)
    step = Step.prepare(
        query[:, :, 0], keys, sinks=stream.sinks, window=stream.window, scoring=stream.scoring(),
        norms=stream.head_norms(), start=stream.start, cut=stream.cut,
    )  # fmt: skip
    for column in range(stream.length):
        buffer = torch.cat([part[:, :, column] for part in (query, key, value)], dim=1)
        new = buffer.split([part.shape[1] for part in (query, key, value)], dim=1)
        now = positions[:, column].contiguous()
        tables = step.tables(now) if stream.tables else None
        out, into = torch.full_like(query[:, :, 0], torch.nan), torch.full_like(query[:, :, 0], torch.nan)
        out, _ = attend_step(step, *new, keys, values, now, seats, into, tables)
        assert out is into
        outs.append(out)
    assert not step.arrivals.any(), "the count must be clear for the next step"
    return torch.stack(outs, dim=2)


def expected(stream: Stream) -> Tensor:
    """What `play` must give, in float64: the specification, or for an int8 ring its keys and values as decoded."""
    query, key, value = normed(stream)
    scoring, positions = stream.scoring(CPU), stream.positions().cpu()
    if not stream.coded:
        seen = {"sinks": stream.sinks, "window": stream.window, "scoring": scoring, "positions": positions}
        return attend(query.double(), key.double(), value.double(), impl="chunked", **seen)
    assert scoring.rotary is not None
    in_cache = positions.clamp(max=stream.sinks + stream.window - 1)
    tables, sink_tables = (scoring.rotary.tables(each + stream.start, torch.float64) for each in (positions, in_cache))
    turned = rotate(key.double(), *tables, scoring.rotary)
    is_sink = (positions < stream.sinks)[:, None, :, None]
    keys, values = (part.double().where(is_sink, decoded(part, stream.dtype)) for part in (turned, value))
    group = stream.heads[0] // stream.heads[1]
    keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
    recent, sinks = (
        rotate(query.double(), *each, scoring.rotary) @ keys.transpose(2, 3) for each in (tables, sink_tables)
    )
    scores = sinks.where(is_sink.transpose(2, 3), recent) * scoring.scale
    hidden = ~visible(positions, positions, stream.sinks, stream.window)[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    level = torch.full_like(scores[..., :1], -torch.inf)
    if scoring.sink_logits is not None:
        level = scoring.sink_logits.double()[None, :, None, None].expand_as(level)
    weights = torch.cat((scores, level), dim=-1).softmax(-1)[..., :-1]
    return (weights @ values).masked_fill((positions < 0)[:, None, :, None], 0.0)


def normed(stream: Stream) -> list[Tensor]:
    """Query and key normed as transformers does it, and the value: on the CPU, in the stream's own type."""
    query, key, value = (part.cpu() for part in stream.heads_of())
    norms = stream.head_norms()
    if norms is None:
        return [query, key, value]

    def norm(heads: Tensor, weight: Tensor) -> Tensor:
        wide = heads.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norms.epsilon)
        if norms.unit_offset:
            return (wide * (1.0 + weight.float())).to(heads.dtype)
        return weight * wide.to(heads.dtype)

    return [norm(query, norms.query.cpu()), norm(key, norms.key.cpu()), value]


def decoded(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads as an int8 ring gives them back."""
    codes, scales = encode(heads.to(dtype))
    return codes.double() * scales.double()


def check(stream: Stream) -> None:
    """Float32: sums of a hundred terms. Half precision: one rounding each of keys, query, weights and result.

    An int8 ring may round a number that lies between two codes the other way: one code of 127, among many.
    """
    found, want = play(stream).double().cpu(), expected(stream)
    band = 2e-5 if stream.dtype == torch.float32 else 6 * torch.finfo(stream.dtype).eps
    band += 2e-3 if stream.coded else 0.0
    if stream.norms:  # weights of a norm are factors of the scores: so are their errors
        band *= 10
    assert torch.isfinite(found).all()
    assert (found - want).abs().max() <= band * want.abs().max()
