"""Every implementation of attention against the specification, and the specification against masks made by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinks.errors import InvalidInput
from sinks.kernels import Rotary, Scoring, attend, chunked

# Float64 sums of a few hundred terms of size one: 1e-11 is three orders above their rounding.
EXACT = 1e-11


def heads(seed: int, batch: int, query_heads: int, kv_heads: int, length: int, dims: tuple[int, int]) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = ((query_heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]))
    return [torch.randn(batch, h, length, d, generator=made, dtype=torch.float64) * 2 for h, d in shapes]


def ragged(batch: int, length: int, seed: int) -> Tensor:
    """Positions with pads strewn anywhere."""
    real = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    return (real.cumsum(1) - 1).masked_fill(~real, -1)


@settings(max_examples=40, deadline=None)
@given(
    sinks=st.integers(0, 6),
    window=st.integers(1, 40),
    length=st.integers(1, 60),
    groups=st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    interleaved=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    logits=st.sampled_from([None, 0.0, 5.0, 120.0, -torch.inf]),
    alibi=st.booleans(),
    padded=st.booleans(),
)
def test_chunked_equals_reference(
    sinks: int, window: int, length: int, groups: tuple[int, int], interleaved: bool, softcap: float | None,
    logits: float | None, alibi: bool, padded: bool,
) -> None:  # fmt: skip
    query_heads, kv_heads = groups
    qkv = heads(length, 2, query_heads, kv_heads, length, (16, 12))
    offsets = torch.linspace(0, 1, query_heads, dtype=torch.float64)
    scoring = Scoring(
        scale=0.3,
        rotary=Rotary(torch.tensor([1.0, 0.3, 0.1, 0.01]).double(), interleaved, first=4),
        slopes=offsets + 0.1 if alibi else None,
        softcap=softcap,
        sink_logits=None if logits is None else offsets + logits,
    )
    where = {"positions": ragged(2, length, window) if padded else None, "sinks": sinks, "window": window}
    slow = attend(*qkv, scoring=scoring, impl="reference", **where)
    fast = attend(*qkv, scoring=scoring, impl="chunked", **where)
    assert torch.isfinite(slow).all()
    assert (slow - fast).abs().max() < EXACT


@pytest.mark.parametrize("block", [1, 7, 32])
def test_blocks_meet_without_a_seam(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK", block)
    qkv = heads(0, 1, 2, 1, 90, (8, 8))
    scoring = Scoring(scale=0.3, rotary=Rotary(torch.tensor([1.0, 0.1, 0.03, 0.001]).double()))
    for sinks, window in ((4, 40), (0, 31), (4, 32), (1, 1), (3, 200)):
        pair = [attend(*qkv, sinks=sinks, window=window, scoring=scoring, impl=i) for i in ("reference", "chunked")]
        assert (pair[0] - pair[1]).abs().max() < EXACT


@pytest.mark.parametrize(("sinks", "window", "rows"), [
    (0, 1, ["1", "01", "001", "0001", "00001", "000001"]),
    (0, 3, ["1", "11", "111", "0111", "00111", "000111"]),
    (1, 2, ["1", "11", "111", "1011", "10011", "100011"]),
    (2, 2, ["1", "11", "111", "1111", "11011", "110011"]),
    (6, 1, ["1", "11", "111", "1111", "11111", "111111"]),
])  # fmt: skip
def test_the_window_counts_the_current_token(sinks: int, window: int, rows: list[str]) -> None:
    """One key in six gets a value of its own power of two, so that the output spells out who was seen."""
    query = torch.zeros(1, 1, 6, 4, dtype=torch.float64)
    value = (2.0 ** torch.arange(6, dtype=torch.float64)).view(1, 1, 6, 1)
    for impl in ("reference", "chunked"):
        out = attend(query, query, value, sinks=sinks, window=window, impl=impl)[0, 0, :, 0]
        for row, seen in enumerate(rows):
            values = [2.0**j for j, bit in enumerate(seen) if bit == "1"]
            assert out[row] == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_a_full_window_is_plain_causal_attention() -> None:
    qkv = heads(3, 2, 4, 2, 30, (8, 8))
    plain = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    assert (attend(*qkv, sinks=4, window=30) - plain).abs().max() < EXACT


def test_a_sink_logit_takes_weight_and_gives_no_value() -> None:
    qkv = heads(4, 1, 4, 2, 20, (8, 8))
    logits = torch.tensor([-torch.inf, 0.0, 3.0, 700.0], dtype=torch.float64)
    plain = attend(*qkv, sinks=2, window=5)
    drained = attend(*qkv, sinks=2, window=5, scoring=Scoring(8**-0.5, sink_logits=logits))
    assert torch.allclose(drained[:, 0], plain[:, 0], atol=EXACT)
    assert not torch.allclose(drained[:, 1], plain[:, 1], atol=1e-3)
    assert drained[:, 3].abs().max() < EXACT


def test_gradients_equal_finite_differences() -> None:
    query, key, value = (part.requires_grad_() for part in heads(5, 1, 2, 1, 9, (4, 4)))
    logits = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    rotary = Rotary(torch.tensor([1.0, 0.1]).double())

    def operator(query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
        return attend(query, key, value, sinks=2, window=3, scoring=Scoring(0.5, rotary, sink_logits=logits))

    assert torch.autograd.gradcheck(operator, (query, key, value, logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_within_twice_a_naive_one(dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of the plain reference run in the same precision, plus one rounding."""
    qkv = heads(6, 1, 4, 2, 64, (16, 16))
    scoring = Scoring(0.25, Rotary(torch.tensor([1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001]).double()))
    exact, naive, fast = (
        attend(*(part.to(d) for part in qkv), sinks=3, window=20, scoring=scoring, impl=impl).double()
        for d, impl in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "chunked"))
    )
    band = torch.finfo(dtype).eps * exact.abs().max()
    assert (fast - exact).abs().max() <= 2 * (naive - exact).abs().max() + band


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("wrong", "says"), [
    ({"sinks": -1}, "sinks=-1"), ({"window": 0}, "window=0"), ({"impl": "magic"}, "magic"),
])  # fmt: skip
def test_bad_input_is_named(wrong: dict[str, object], says: str) -> None:
    qkv = heads(0, 1, 2, 1, 3, (4, 4))
    with pytest.raises(InvalidInput, match=says):
        attend(*qkv, **({"sinks": 1, "window": 2} | wrong))  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4)
    with pytest.raises(InvalidInput, match="3 query heads"):
        attend(query, key, key, sinks=1, window=2)
    longer = torch.zeros(1, 3, 9, 4)
    with pytest.raises(InvalidInput, match="not one sequence"):
        attend(query, longer, longer, sinks=1, window=2)
    for scoring in (
        Scoring(1.0, slopes=torch.ones(1)),
        Scoring(1.0, sink_logits=torch.ones(2)),
        Scoring(1.0, Rotary(torch.ones(3))),
    ):
        with pytest.raises(InvalidInput, match="slopes|sink_logits|rotary"):
            attend(query, query, query, sinks=1, window=2, scoring=scoring)
    for positions in (torch.tensor([[0, 0]]), torch.tensor([[1, 2]]), torch.arange(3)[None]):
        with pytest.raises(InvalidInput, match="positions"):
            attend(query, query, query, sinks=1, window=2, positions=positions)


def test_the_default_scale_is_that_of_the_query() -> None:
    qkv = heads(8, 1, 4, 2, 20, (16, 12))
    assert torch.equal(attend(*qkv, sinks=2, window=5), attend(*qkv, sinks=2, window=5, scoring=Scoring(16**-0.5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    """Inputs rounded once, everything after them in float32: what is left is the rounding of keys and of the result."""
    q, k, v = (part.to(dtype) for part in heads(9, 1, 4, 2, 300, (64, 64)))
    scoring = Scoring(0.125, Rotary(1.0 / 10000 ** (torch.arange(0, 64, 2).double() / 64)))
    where: dict[str, object] = {"sinks": 4, "window": 100, "scoring": scoring}
    exact = attend(q.double(), k.double(), v.double(), impl="reference", **where)  # type: ignore[arg-type]
    naive, fast = (attend(q, k, v, impl=impl, **where).double() for impl in ("reference", "chunked"))  # type: ignore[arg-type]
    assert (fast - exact).square().mean().sqrt() <= 0.6 * (naive - exact).square().mean().sqrt()


def test_no_block_meets_more_keys_than_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    real = chunked.attend_block
    monkeypatch.setattr(chunked, "BLOCK", 8)
    monkeypatch.setattr(chunked, "attend_block", lambda *a, **k: met.append(a[2].shape[2]) or real(*a, **k))
    attend(*heads(10, 1, 2, 1, 90, (8, 8)), sinks=3, window=10)
    assert max(met) <= 3 + 10 - 1 + 8


def test_wrong_code_would_be_noticed() -> None:
    """Sinks, window, rotary and the second angle each change the result once something has been evicted."""
    qkv = heads(7, 1, 2, 1, 30, (8, 8))
    rotary = Rotary(torch.tensor([1.0, 0.3, 0.1, 0.03]).double())
    settings_ = itertools.product((0, 3), (5, 8), (None, rotary))
    outs = [attend(*qkv, sinks=s, window=w, scoring=Scoring(0.5, r))[:, :, -1] for s, w, r in settings_]
    for a, b in itertools.combinations(outs, 2):
        assert (a - b).abs().max() > 1e-3


def test_numbers_of_heads_may_be_views() -> None:
    """A logit for all heads, a column of a table: kernels read one number behind the other."""
    for views in (torch.zeros(1).expand(4), torch.arange(8.0).view(4, 2)[:, 1]):
        scoring = Scoring(1.0, slopes=views, sink_logits=views)
        for kept in (scoring.slopes, scoring.sink_logits):
            assert kept is not None and kept.is_contiguous() and torch.equal(kept, views)
