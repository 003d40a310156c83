"""Which arms a comparison has: from the words on the command line to contenders that all hold equal memory."""

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.errors import InvalidInput
from sinks.evals.contenders import Contender, Dense, Newlines, Recompute, Sinks
from sinks.evals.tokens import line_break
from sinks.models.families import describe

ARMS = ("dense", "window", "recompute", "sinks", "sweep", "newlines")
SWEEP = (0, 1, 2, 4, 8)  # sinks, at equal capacity (StreamingLLM, Table 2)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a comparison measures.

    Attributes:
        sinks, window: tokens; every bounded arm holds `sinks + window` keys in all.
        arms: of `ARMS`, in that order, each once.
        seed: draws the sampled positions.
        samples: positions at which re-computation is measured.
        chunk: tokens a forward pass.
        singles: tokens at the end of the stream that are read one by one, for the latency.
        beyond_trained_length: whether dense attention reads on after the length that the model was trained on.

    Raises:
        InvalidInput: a size is too small, an arm is unknown, or the sweep does not fit into `sinks + window`.
    """

    sinks: int
    window: int
    arms: tuple[str, ...] = ARMS
    seed: int = 0
    samples: int = 64
    chunk: int = 256
    singles: int = 32
    beyond_trained_length: bool = False

    def __post_init__(self) -> None:
        for name in ("sinks", "window", "samples", "chunk", "singles"):
            if (value := getattr(self, name)) < 1:
                reason = "; the arm without sinks is 'window'" if name == "sinks" else ""
                raise InvalidInput(f"{name} must be at least 1, got {value}{reason}")
        if self.seed < 0:
            raise InvalidInput(f"seed must be at least 0, got {self.seed}")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise InvalidInput(f"unknown arm {', '.join(map(repr, unknown)) or '(none given)'}; the arms are {', '.join(ARMS)}")
        if "sweep" in self.arms and self.capacity <= max(SWEEP):
            raise InvalidInput(f"the sweep keeps up to {max(SWEEP)} sinks and needs sinks + window above that, got {self.capacity}")

    @property
    def capacity(self) -> int:
        """Keys that every bounded arm holds: C = sinks + window."""
        return self.sinks + self.window

    @property
    def first_target(self) -> int:
        """The first token that is scored: the line breaks take the place of those before it, so no arm is scored on them."""
        return self.sinks

    @property
    def needed(self) -> int:
        """Tokens of text without which the cache is not full when the single steps begin."""
        return self.capacity + self.singles + 1


def contenders(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, begins_with_bos: bool
) -> dict[str, Contender]:
    """The contenders by arm name, in the order of `ARMS`; the sweep becomes `sweep-0`, `sweep-1`, ...

    Raises:
        UnsupportedOption: the tokenizer has no line break, and the arm `newlines` was asked for.
    """
    sinks, window, capacity = settings.sinks, settings.window, settings.capacity
    found: dict[str, Contender] = {}
    for arm in (arm for arm in ARMS if arm in settings.arms):
        match arm:
            case "dense":
                found[arm] = Dense(None if settings.beyond_trained_length else describe(model).trained_length)
            case "window":
                found[arm] = Sinks(0, capacity)
            case "recompute":
                prefix = tokenizer.bos_token_id if begins_with_bos else None
                found[arm] = Recompute(capacity, settings.samples, settings.seed, prefix)
            case "sinks":
                found[arm] = Sinks(sinks, window)
            case "sweep":
                found |= {f"sweep-{kept}": Sinks(kept, capacity - kept) for kept in SWEEP}
            case "newlines":
                found[arm] = Newlines(sinks, window, line_break(tokenizer))
    return found
