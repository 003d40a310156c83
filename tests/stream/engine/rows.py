"""Engines of a tiny random model, what a session of its own would say, and passes that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sinks.stream.engine.engine import Engine
from sinks.stream.session import Session
from tests.stream.opened import IDS, SINKS, WINDOW, opened, tiny_loaded

PROMPTS = [IDS[:1], IDS[5:8], IDS[10:22], IDS[20:33], IDS[:60], "a text, not ids", IDS[3:6] * 9, [7]]
"""Shorter than the sinks, than the window, as long as both, longer."""

RARE = 4
"""A token that nobody writes here unless it is made to."""


def engine(slots: int = 8, **options: object) -> Engine:
    """Of the tiny model in float64, with so small a window that everything is let go soon."""
    return Engine(tiny_loaded(), slots, SINKS, WINDOW, **{"chunk": 5, "queue": 20, **options})  # type: ignore[arg-type]


def alone(prompt: object, count: int, **options: object) -> str:
    """What a session of its own says."""
    session = opened()
    session.feed(prompt)  # type: ignore[arg-type]
    return "".join(session.generate(count, **options))  # type: ignore[arg-type]


def spans(session: Session) -> list[tuple[int, list[int]]]:
    return [(span.start, list(span.ids)) for span in session.visible.spans]


@contextmanager
def failing_on(token: int, error: BaseException, part: str = "model.layers.1.mlp") -> Iterator[None]:
    """Inside, a pass that has this token in it fails in a part of the model: half-way, in the second layer."""
    model = tiny_loaded().model
    seen: list[torch.Tensor] = []

    def note(_: object, args: tuple[torch.Tensor]) -> None:
        seen[:] = args

    def fail(*_: object) -> None:
        if bool((seen[0] == token).any()):
            raise error

    handles = [
        model.get_input_embeddings().register_forward_pre_hook(note),
        model.get_submodule(part).register_forward_pre_hook(fail),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
