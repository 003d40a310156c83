"""The shared words: what one room promises another without knowing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Listener = Callable[[int], None]
"""Hears, after each step, how much more work is done."""

Stage = Callable[[str, int], Listener]
"""Told the name of a stage that begins and its amount of work, returns who listens to it."""


def ignore(_: int) -> None:
    """A listener for those who do not watch."""


def unwatched(_name: str, _work: int) -> Listener:
    """A stage for those who do not watch."""
    return ignore


@runtime_checkable
class StreamCache(Protocol):
    """A cache that computes the attention itself, because only it knows where its keys now stand.

    One forward pass of a model is `open_pass`, then one `attend` a layer, then `close_pass`.
    """

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, pads included."""
        ...

    @property
    def seen(self) -> list[int]:
        """Real tokens fed so far, by row."""
        ...

    def open_pass(self, model: object, shape: tuple[int, int], mask: Tensor | None, positions: Tensor | None) -> None:
        """Begin a pass of `shape` = (rows, new columns); `mask` is False at pads, `positions` are only checked."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        """Attention of one layer's new tokens; takes unturned heads, [rows, heads, columns, head_dim]."""
        ...

    def close_pass(self, complete: bool) -> None:
        """End the pass; `complete` is False if the model raised on the way."""
        ...
