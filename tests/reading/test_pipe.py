"""Lines of any bytes, against Python's own splitting; the rule for unusual lines, against numpy's medians."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks.errors import InvalidInput
from sinks.reading.pipe import LONGEST, Line, Lines, Rule, Usual

PARTS = [b"\n", b"\r\n", b"\r", b"a", b"bc ", "é".encode(), "🗼".encode(), b"\xff", b"\xe2", b""]
BYTES = st.lists(st.sampled_from(PARTS))


def cut(chunks: list[bytes], longest: int = LONGEST) -> list[Line]:
    lines = Lines(longest)
    found = [line for chunk in chunks for line in lines.push(chunk)]
    return [*found, *lines.finish()]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(parts=BYTES, cuts=st.lists(st.integers(0, 40)))
def test_lines_do_not_depend_on_how_the_bytes_arrive(parts: list[bytes], cuts: list[int]):
    data = b"".join(parts)
    edges = sorted({0, len(data), *(at for at in cuts if at < len(data))})
    found = cut([data[begin:end] for begin, end in pairwise(edges)])
    expected = data.split(b"\n")
    last = expected.pop()
    texts = [line.removesuffix(b"\r").decode(errors="replace") for line in expected]
    assert [line.text for line in found if line.ends] == texts
    assert [line.text for line in found if not line.ends] == ([last.decode(errors="replace")] if last else [])
    assert [(line.number, line.part) for line in found] == [(number + 1, 1) for number in range(len(found))]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(parts=BYTES, longest=st.integers(4, 12))
def test_long_lines_come_in_bounded_parts_and_lose_nothing(parts: list[bytes], longest: int):
    data = b"".join(parts).replace(b"\r", b"")
    found = cut([data], longest)
    if b"\xff" not in data and data.decode(errors="ignore").encode() == data:
        assert "".join(line.fed for line in found).encode() == data, "no character is cut in two"
    assert all(len(line.text) <= longest for line in found)
    assert sum(line.ends for line in found) == data.count(b"\n")
    for a, b in pairwise(found):
        assert (b.number, b.part) == ((a.number + 1, 1) if a.ends else (a.number, a.part + 1))


def test_what_is_held_back_is_bounded():
    lines = Lines(64)
    told = sum(len(lines.push(b"x" * 1000)) for _ in range(200))
    assert told >= 200_000 // 64 - 1
    assert len(lines._held) <= 64


def test_a_part_has_room_for_a_character():
    with pytest.raises(InvalidInput, match="at least 4 bytes"):
        Lines(3)


# Unusual


def by_numpy(values: np.ndarray, at: int, rule: Rule) -> tuple[float | None, bool]:
    past = values[max(0, at - rule.past) : at]
    if len(past) < rule.warm_up:
        return None, False
    middle = np.median(past)
    z = (values[at] - middle) / max(1.4826 * np.median(np.abs(past - middle)), rule.floor)
    return z, z >= rule.threshold and np.mean(past >= values[at]) <= rule.rare


@pytest.mark.parametrize(
    "rule", [Rule(past=50, warm_up=10), Rule(3.0, past=51, warm_up=2, rare=0.2), Rule(1.0, 7, 7, floor=2.0, rare=1.0)]
)
def test_the_rule(rule: Rule):
    generator = np.random.default_rng(0)
    values = generator.normal(2, 0.6, 400).round(1)  # ties too
    values[::37] += 5
    usual, found = Usual(rule), []
    for at, value in enumerate(values.tolist()):
        verdict, (z, unusual) = usual.judge(value), by_numpy(values, at, rule)
        assert verdict.unusual == unusual
        assert verdict.z is None if z is None else verdict.z == pytest.approx(z, abs=1e-9)
        found.append(verdict.unusual)
    assert any(found) and not all(found)
    assert len(usual._past) == len(usual._sorted) == rule.past


def test_two_kinds_of_lines_do_not_flag_the_rarer_kind():
    """A package manager's log: every eighth line names a new package, and the other seven repeat it."""
    usual = Usual(Rule())
    verdicts = [usual.judge(2.4 if at % 8 == 0 else 0.3) for at in range(400)]
    assert not any(verdict.unusual for verdict in verdicts)
    assert max(verdict.z or 0 for verdict in verdicts) > 8, "the z-score alone would have"
    assert usual.judge(3.3).unusual


def test_equal_lines_do_not_flag_a_comma():
    usual = Usual(Rule())
    assert not any(usual.judge(0.1).unusual for _ in range(100))
    assert not usual.judge(0.9).unusual
    assert usual.judge(1.2).unusual


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": 0.0}, {"threshold": float("nan")}, {"floor": 0.0}, {"rare": 1.1}, {"warm_up": 1}, {"past": 9}],
)
def test_rules_that_make_no_sense(wrong: dict[str, float]):
    with pytest.raises(InvalidInput):
        Rule(**wrong)  # type: ignore[arg-type]
