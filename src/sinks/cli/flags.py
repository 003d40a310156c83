"""Flags that several commands share, so that they are called and explained alike."""

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="Number format of weights and arithmetic.")]
AcceptTerms = Annotated[
    bool, typer.Option("--accept-terms", help="Accept the licence terms of a model that asks for it.")
]
