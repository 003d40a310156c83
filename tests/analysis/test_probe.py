"""How a text is read for the sake of who watches it."""

from __future__ import annotations

import pytest

from sinks.analysis import probe
from sinks.models.observe import blocks_of
from tests.families.tiny import build, tokens


@pytest.fixture
def trimmed(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that the heap was trimmed; passes of 32 tokens are long."""
    found: list[None] = []
    monkeypatch.setattr(probe, "LONG", 32)
    monkeypatch.setattr(probe, "trim_heap", lambda: found.append(None))
    return found


def test_a_long_pass_trims_the_heap_behind_every_part_of_a_block(trimmed: list[None]):
    model = build("llama", layers=2)
    probe.read(model, tokens(32, batch=1))
    parts = [part for block in blocks_of(model) for part in block.children()]
    assert len(trimmed) == len(parts) == 8
    assert not any(part._forward_hooks for part in parts)


def test_a_short_pass_does_not(trimmed: list[None]):
    probe.read(build("llama", layers=2), tokens(31, batch=1))
    assert not trimmed
