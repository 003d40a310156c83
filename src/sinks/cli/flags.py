"""Flags that several commands share, so that they are called and explained alike."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from sinks.cache.cache import Kind
    from sinks.stream.session import Session

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="Number format of weights and arithmetic.")]
AcceptTerms = Annotated[
    bool, typer.Option("--accept-terms", help="Accept the licence terms of a model that asks for it.")
]
Quant = Annotated[
    str, typer.Option(help="Linear weights: none (as they are), int8 or int4 (CPU only; decoding is faster).")
]
CacheKind = Annotated[str, typer.Option(help="What keys and values are kept as: full, or int8 for a quarter of that.")]


def kind_of(name: str) -> "Kind":
    """The kind of cache of this name. Raises InvalidInput for an unknown one."""
    from sinks.cache.cache import KINDS
    from sinks.errors import InvalidInput

    kinds = dict(zip(map(str, KINDS), KINDS, strict=True))
    if name not in kinds:
        raise InvalidInput(f"cache {name!r} is unknown: choose one of {', '.join(kinds)}")
    return kinds[name]


def check_saved(path: "Path") -> None:
    """Raises InvalidInput for what is plainly no saved moment: before a model is loaded to go on from it."""
    from sinks.cache.snapshot import look_at
    from sinks.errors import InvalidInput, SnapshotError

    try:
        look_at(path)
    except SnapshotError as error:
        raise InvalidInput(str(error)) from error


def take_up(session: "Session", path: "str | Path") -> None:
    """Go on from a saved moment. Raises InvalidInput where it cannot be: the person named the wrong file or model."""
    from sinks.errors import InvalidInput, SnapshotError

    try:
        session.load(path)
    except SnapshotError as error:
        raise InvalidInput(str(error)) from error
