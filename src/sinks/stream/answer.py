"""One row's answer while it is written: logits in, a token and a piece of text out. Knows no model and no cache.

A decode loop holds one `Answer` a row. Each step gives it the logits behind the row's newest token, and feeds the token
that comes back: `Session` does so with one row, and an engine may with many.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sinks.cache.plan import check_whole
from sinks.stream.history import History
from sinks.stream.pieces import Pieces, check_stops
from sinks.stream.sampling import Sampler

Finish = Literal["end", "stop", "length"]
"""Why an answer is over: the model ended it, a stop string came, or it has as many tokens as were asked for."""


class Answer:
    """At most `max_tokens` tokens (None: no limit), chosen by `sampler`, until a token of `ends` or a stop string.

    `begin` comes first, then `take` once a token; `finish` is None while the answer goes on.
    """

    def __init__(
        self, sampler: Sampler, pieces: Pieces, ends: Collection[int], max_tokens: int | None, stop: Iterable[str]
    ) -> None:
        if max_tokens is not None:
            check_whole("max_tokens", max_tokens, least=0)
        self.sampler = sampler
        self.pieces = pieces
        self.ends = ends
        self.left = max_tokens
        self.stops = check_stops(stop)
        self.finish: Finish | None = None

    def begin(self) -> str:
        """Begin; returns what an earlier answer held back and can now be said. May already be the end."""
        if self.left == 0:
            self.finish = "length"
            return ""
        self.sampler.begin()
        held = self.pieces.begin(self.stops)
        if self.pieces.stopped:
            self.finish = "stop"
        return held

    def take(self, logits: Float[Tensor, " vocab"], history: History) -> tuple[int, str]:
        """The next token behind `history`, and the text that can be said with it, which may be empty.

        The token belongs to the stream whatever it is: also one that ends the answer, or that completes a stop string.
        """
        token = self.sampler.choose(logits, history.last(self.sampler.sampling.lookback), history.seen)
        return token, self.accept(token, history)

    def accept(self, token: int, history: History) -> str:
        """The text that can be said with this token, which was chosen to stand behind `history`; see `take`."""
        if self.left is not None:
            self.left -= 1
        if token in self.ends:
            self.finish = "end"
            return self.pieces.finish(broken=True)
        piece = self.pieces.push(token, history.newest)
        if self.pieces.stopped:
            self.finish = "stop"
        elif self.left == 0:
            self.finish = "length"
            piece += self.pieces.finish()
        return piece
