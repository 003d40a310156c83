"""Attention written out, block by block: what blocks write into is used again, and nobody can tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinks.kernels import written
from sinks.kernels.lens import Lens, Room, Sight
from sinks.kernels.scoring import Scoring
from sinks.kernels.written import Meeting, attend_dense

TOKENS, HEADS, KV_HEADS, DIM = 36, 4, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(written.QUERIES, "cpu", (4, 4))
    monkeypatch.setitem(written.ELEMENTS, "cpu", 64)


def heads(count: int) -> Tensor:
    return torch.randn(1, count, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def causal(begin: int, end: int) -> Tensor:
    return (torch.arange(TOKENS) <= torch.arange(begin, end)[:, None])[None, None]


def attended(query: Tensor, scoring: Scoring, seen: list[Sight]) -> Tensor:
    positions = torch.arange(TOKENS)[None]
    meeting, lens = Meeting(positions, positions, causal), Lens(see=seen.append)
    return attend_dense(
        query, heads(KV_HEADS), heads(KV_HEADS) + 1, layer=0, meeting=meeting, scoring=scoring, lenses=[lens]
    )


def explicit(query: Tensor, logits: Tensor | None) -> Tensor:
    scores = query @ heads(KV_HEADS).repeat_interleave(2, dim=1).mT / DIM**0.5
    scores = scores.masked_fill(~causal(0, TOKENS), -torch.inf)
    if logits is not None:
        scores = torch.cat((scores, logits[None, :, None, None].expand(1, HEADS, TOKENS, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :TOKENS]
    return weights @ (heads(KV_HEADS) + 1).repeat_interleave(2, dim=1)


@pytest.mark.parametrize("logits", [None, torch.linspace(-2, 2, HEADS, dtype=torch.float64)])
@pytest.mark.parametrize("learning", [False, True])
def test_blocks_over_one_another_give_what_the_whole_matrix_gives(logits: Tensor | None, learning: bool) -> None:
    query = heads(HEADS).requires_grad_(learning)
    with torch.set_grad_enabled(learning):
        found = attended(query, Scoring(DIM**-0.5, sink_logits=logits), [])
    torch.testing.assert_close(found, explicit(query, logits), atol=1e-13, rtol=1e-12)


def test_gradients_pass_through_blocks() -> None:
    query = heads(HEADS).requires_grad_()
    given = torch.randn(1, HEADS, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, wanted = (
        torch.autograd.grad(out, query, given)[0]
        for out in (attended(query, Scoring(DIM**-0.5), []), explicit(query, None))
    )
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=1e-12)


def test_later_blocks_write_over_earlier_ones() -> None:
    seen: list[Sight] = []
    with torch.no_grad():
        attended(heads(HEADS), Scoring(DIM**-0.5), seen)
    assert len({sight.scores.data_ptr() for sight in seen}) == 1 < len(seen)
    assert len({sight.weights.data_ptr() for sight in seen}) == 1
    assert seen[0].scores.data_ptr() != seen[0].weights.data_ptr()


def test_room_grows_and_is_used_again() -> None:
    room, like = Room(), torch.zeros(1)
    small = room.of("scores", (2, 3), like)
    large = room.of("scores", (4, 5), like)
    assert large.shape == (4, 5)
    assert room.of("scores", (2, 3), like).data_ptr() == large.data_ptr() != small.data_ptr()
    assert room.of("weights", (4, 5), like).data_ptr() != large.data_ptr()


def test_room_is_of_one_kind() -> None:
    room = Room()
    room.of("scores", (3,), torch.zeros(1, dtype=torch.float64))
    assert room.of("scores", (2,), torch.zeros(1)).dtype == torch.float32
