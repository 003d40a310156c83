"""Which arms a comparison has: from words to contenders that all hold equal memory."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.cache.cache import KINDS, Kind
from sinks.errors import InvalidInput
from sinks.evals.contenders import Contender, Dense, Newlines, Recompute, Sinks
from sinks.models.families import describe
from sinks.reading.tokens import line_break

ARMS = ("dense", "window", "recompute", "sinks", "sweep", "newlines")
SWEEP = (0, 1, 2, 4, 8)
"""Sinks of the sweep, at equal capacity (StreamingLLM, Table 2)."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a comparison measures. Raises InvalidInput where it makes no sense.

    Every bounded arm holds `sinks + window` keys. `arms` are of `ARMS`. Re-computation is measured at `samples`
    positions, which `seed` draws. `chunk` tokens go into one forward pass, and the last `singles` tokens are read one
    by one, for the latency. Dense attention stops at the model's trained length unless `beyond_trained_length`.
    With a `cache` other than "full" the arm `sinks` is measured again with it, as `sinks-int8`.
    """

    sinks: int
    window: int
    arms: tuple[str, ...] = ARMS
    seed: int = 0
    samples: int = 128
    chunk: int = 256
    singles: int = 32
    beyond_trained_length: bool = False
    cache: Kind = "full"

    def __post_init__(self) -> None:
        for name in ("sinks", "window", "samples", "chunk", "singles"):
            if (value := getattr(self, name)) < 1:
                advice = ": the arm without sinks is 'window'" if name == "sinks" else ""
                raise InvalidInput(f"{name} must be at least 1, got {value}{advice}")
        if self.seed < 0:
            raise InvalidInput(f"seed must be at least 0, got {self.seed}")
        if not self.arms:
            raise InvalidInput(f"no arm was asked for: the arms are {', '.join(ARMS)}")
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise InvalidInput(f"no arm is called {unknown[0]!r}: the arms are {', '.join(ARMS)}")
        if self.cache not in KINDS:
            raise InvalidInput(f"cache={self.cache!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.cache != "full" and "sinks" not in self.arms:
            raise InvalidInput(f"cache={self.cache!r} is compared with the arm 'sinks': add it to the arms")
        if "sweep" in self.arms and self.capacity <= max(SWEEP):
            raise InvalidInput(
                f"the sweep keeps up to {max(SWEEP)} sinks, and sinks + window is only {self.capacity}: "
                "choose a larger window, or leave 'sweep' out of the arms"
            )

    @property
    def capacity(self) -> int:
        """Keys that every bounded arm holds, sinks + window."""
        return self.sinks + self.window

    @property
    def first_target(self) -> int:
        """The first token that is scored: line breaks replace those before it, so no arm is scored on them."""
        return self.sinks

    @property
    def needed(self) -> int:
        """Tokens of text below which the cache is not yet full when the single steps begin."""
        return self.capacity + self.singles + 1


def contenders(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: int | None
) -> dict[str, Contender]:
    """The contenders by arm, in the order of `ARMS`; the sweep becomes `sweep-0`, `sweep-1` and so on.

    `bos` is the token that streams of this model begin with, as `stream_ids` found it.

    Raises UnsupportedOption if the arm `newlines` is asked for and the tokenizer has no line break.
    """
    capacity = settings.capacity
    found: dict[str, Contender] = {}
    for arm in (arm for arm in ARMS if arm in settings.arms):
        match arm:
            case "dense":
                found[arm] = Dense(None if settings.beyond_trained_length else describe(model).trained_length)
            case "window":
                found[arm] = Sinks(0, capacity)
            case "recompute":
                found[arm] = Recompute(capacity, settings.samples, settings.seed, bos)
            case "sinks":
                found[arm] = Sinks(settings.sinks, settings.window)
                if settings.cache != "full":
                    found[f"{arm}-{settings.cache}"] = Sinks(settings.sinks, settings.window, settings.cache)
            case "sweep":
                found |= {f"sweep-{kept}": Sinks(kept, capacity - kept) for kept in SWEEP}
            case "newlines":
                found[arm] = Newlines(settings.sinks, settings.window, line_break(tokenizer))
    return found
