"""`measure`: every measure over texts, as one value that can be saved, drawn and compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.causes import interventions
from sinks.analysis.causes.interventions import Interventions
from sinks.analysis.findings import Finding, findings
from sinks.analysis.inputs import Condition, bare_ids, bos_of, drawn, dressed, framed, windows
from sinks.analysis.measures import entropy, massive, mixing, repetition, semantics, sink_rate
from sinks.analysis.measures.entropy import Entropy
from sinks.analysis.measures.massive import Massive
from sinks.analysis.measures.mixing import Mixing
from sinks.analysis.measures.repetition import Repetition
from sinks.analysis.measures.semantics import Semantics
from sinks.analysis.measures.sink_rate import SinkRates
from sinks.errors import InvalidInput, UnsupportedModel, UnsupportedOption
from sinks.models.attach import attach
from sinks.models.families import describe
from sinks.reading.advice import Advice, AdviceSettings, advise
from sinks.reading.tokens import stream_ids
from sinks.types import Stage, unwatched

Result = TypeVar("Result")

PARTS = (
    "sink_rates",
    "massive",
    "entropy",
    "mixing",
    "semantics",
    "repetition",
    "interventions",
    "advice",
)
LEAST = {
    "texts": 2,
    "tokens": 32,
    "long_texts": 1,
    "long_tokens": 16,
    "deep_texts": 2,
    "deep_tokens": 96,
    "mixed_texts": 2,
    "changes": 1,
    "edited_texts": 4,
    "stream_tokens": 64,
    "passages": 4,
    "questions": 2,
}
"""The least of each number that gives a result."""
CHANGED = (20, 60)
"""Positions of the text whose tokens are changed to see how far that travels."""
CLASSES = 5
"""Stretches of a text that count as classes of passages where fewer texts are given."""


@dataclass(frozen=True)
class SurveySettings:
    """What is measured, and on how much. Raises InvalidInput where it makes no sense.

    `texts` windows of `tokens` tokens give the sink rates; `long_texts` of `long_tokens` their dependence on length;
    `deep_texts` of `deep_tokens` the residual stream, entropy and mixing; `edited_texts` of as many the interventions,
    half of them for means, and `heads` tries every head by itself. In mixing, `changes` tokens of each of `mixed_texts`
    are changed, each that often. `stream_tokens` are streamed for the entropy.
    """

    parts: tuple[str, ...] = PARTS
    epsilon: float = 0.3
    texts: int = 100
    tokens: int = 64
    long_texts: int = 8
    long_tokens: int = 1024
    deep_texts: int = 16
    deep_tokens: int = 128
    mixed_texts: int = 8
    changes: int = 2
    edited_texts: int = 40
    heads: bool = True
    stream_tokens: int = 3072
    passages: int = 16
    questions: int = 12
    advice: AdviceSettings = field(default_factory=AdviceSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise InvalidInput(f"no part is called {unknown[0]!r}: the parts are {', '.join(PARTS)}")
        if not self.parts:
            raise InvalidInput(f"no part was asked for: the parts are {', '.join(PARTS)}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise InvalidInput(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.changes > len(CHANGED):
            raise InvalidInput(f"changes={self.changes}: at most {len(CHANGED)} tokens of a text are changed")
        if not 0 < self.epsilon < 1:
            raise InvalidInput(f"epsilon={self.epsilon}: give a share of attention above 0 and below 1")
        if self.seed < 0:
            raise InvalidInput(f"seed must be at least 0, got {self.seed}")

    def quick(self) -> SurveySettings:
        """The same on less: intervals are wider, and heads are not tried one by one."""
        return replace(
            self,
            texts=min(self.texts, 24),
            long_texts=2,
            long_tokens=min(self.long_tokens, 512),
            deep_texts=min(self.deep_texts, 8),
            deep_tokens=min(self.deep_tokens, 96),
            mixed_texts=min(self.mixed_texts, 4),
            changes=1,
            edited_texts=min(self.edited_texts, 8),
            heads=False,
            stream_tokens=min(self.stream_tokens, 1024),
            passages=min(self.passages, 6),
            questions=min(self.questions, 4),
            advice=AdviceSettings(128, (0, 1, 4), (64, 128, 256), 1024),
        )


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found in one model. A part that was not asked for, or does not exist for this kind of model, is None
    with its reason in `left_out`.

    `about`: model, source, texts, settings, versions, machine. `massive` has one entry without BOS and one with it,
    where the model has a BOS. `seconds` by part.
    """

    about: Mapping[str, Any]
    sink_rates: SinkRates | None
    massive: Mapping[str, Massive]
    entropy: Entropy | None
    mixing: Mixing | None
    semantics: Semantics | None
    repetition: Repetition | None
    interventions: Interventions | None
    advice: Advice | None
    findings: tuple[Finding, ...]
    left_out: Mapping[str, str]
    seconds: Mapping[str, float]


@dataclass(eq=False)
class Work:
    """Runs the parts that were asked for, and remembers why the others are missing."""

    settings: SurveySettings
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, part: str, measure: Callable[[], Result]) -> Result | None:
        """The result of one part, or None where it was not asked for, or this model cannot give it."""
        if part not in self.settings.parts:
            self.left_out[part] = "not asked for"
            return None
        began = time.perf_counter()
        try:
            return measure()
        except (UnsupportedModel, UnsupportedOption) as error:
            self.left_out[part] = str(error)
            return None
        finally:
            self.seconds[part] = time.perf_counter() - began


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | Sequence[str],
    settings: SurveySettings | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    stage: Stage = unwatched,
) -> Survey:
    """Survey a causal language model on `texts`, by name or in order; `about` is kept beside the numbers.

    The model is attached on the way, if it can stream; a model that cannot is measured without its streams. Texts are
    read by the tokenizer's own convention: BOS first where it puts one.

    Raises TextTooShort where the texts are too short for the settings, InvalidInput for settings that make no sense.
    """
    settings = settings or SurveySettings()
    named = dict(texts) if isinstance(texts, Mapping) else {f"text {n}": text for n, text in enumerate(texts, start=1)}
    if not any(named.values()):
        raise InvalidInput("no text was given: a survey reads at least one")
    work, inputs = Work(settings), Inputs(model, tokenizer, named, settings)
    try:
        attach(model)
    except UnsupportedModel:
        pass  # said again, with its reason, by each part that streams
    seed, bos = settings.seed, inputs.bos_used
    rates = work.run("sink_rates", lambda: sink_rate.measure(
        model, tokenizer, inputs.windows(settings.texts, settings.tokens),
        longer=inputs.windows(settings.long_texts, settings.long_tokens),
        epsilon=settings.epsilon, seed=seed, stage=stage,
    ))  # fmt: skip
    body = work.run("massive", lambda: inputs.massive(stage)) or {}
    return Survey(
        about=dict(about or {}) | {"settings": asdict(settings), "bos": bos, "texts": list(named)},
        sink_rates=rates,
        massive=body,
        entropy=work.run("entropy", lambda: inputs.entropy(stage)),
        mixing=work.run("mixing", lambda: mixing.measure(
            model, inputs.deep[: settings.mixed_texts], bos=bos_of(tokenizer), changed=CHANGED[: settings.changes],
            seeds=tuple(range(seed, seed + settings.changes)), stage=stage,
        )),
        semantics=work.run("semantics", lambda: semantics.measure(
            model, tokenizer, inputs.passages(), bos=bos_of(tokenizer), seed=seed, stage=stage,
        )),
        repetition=work.run("repetition", lambda: repetition.measure(
            model, tokenizer, bos=bos, texts=settings.questions, seed=seed, stage=stage,
        )),
        interventions=work.run("interventions", lambda: interventions.measure(
            model, tokenizer, inputs.windows(settings.edited_texts, settings.deep_tokens),
            interventions.Settings(bos=bos, heads=settings.heads, seed=seed), stage,
        )),
        advice=work.run("advice", lambda: advise(model, inputs.stream, settings.advice, stage=stage)),
        findings=findings(rates, body),
        left_out=work.left_out,
        seconds=work.seconds,
    )  # fmt: skip


def measure_encoder(
    model: PreTrainedModel,
    inputs: Mapping[Condition, Tensor | Mapping[str, Tensor]],
    settings: SurveySettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    about: Mapping[str, Any] | None = None,
    stage: Stage = unwatched,
) -> Survey:
    """Survey a model that reads its whole input at once: sink rates and massive activations, by condition."""
    settings = settings or SurveySettings()
    work = Work(settings)
    rates = work.run(
        "sink_rates",
        lambda: sink_rate.measure_encoder(model, inputs, epsilon=settings.epsilon, seed=settings.seed, stage=stage),
    )
    body = work.run("massive", lambda: {
        condition.name: massive.measure(model, given, tokenizer=tokenizer, batch=4, stage=stage)
        for condition, given in inputs.items()
    })  # fmt: skip
    for part in PARTS[2:]:
        work.left_out[part] = "this model reads its whole input at once: it has no stream and predicts no next token"
    return Survey(
        about=dict(about or {}) | {"settings": asdict(settings)},
        sink_rates=rates,
        massive=body or {},
        entropy=None,
        mixing=None,
        semantics=None,
        repetition=None,
        interventions=None,
        advice=None,
        findings=(),
        left_out=work.left_out,
        seconds=work.seconds,
    )


def encoder_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: SurveySettings
) -> dict[Condition, Int[Tensor, "texts tokens"]]:
    """What an encoder of text is shown: windows, between class token and separator if it has them, and bare.

    They have `settings.tokens` tokens, or as many as the model has positions for; the result says how many.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or settings.tokens
    natural = windows(tokenizer, texts, min(settings.tokens, positions), settings.texts, settings.seed)
    bare = {Condition("natural", "none"): natural}
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        return bare
    return {Condition("natural", "framed"): framed(natural, tokenizer)} | bare


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a causal language model is shown in each part."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, str]
    settings: SurveySettings

    @property
    def bos_used(self) -> int | None:
        """The token that the tokenizer itself puts before a text, if it does."""
        return stream_ids(self.tokenizer, "")[1]

    @cached_property
    def ids(self) -> list[list[int]]:
        """The tokens of each text, without special tokens."""
        return bare_ids(self.tokenizer, list(self.texts.values()))

    def windows(self, count: int, tokens: int) -> Int[Tensor, "count tokens"]:
        """Windows of all texts, without special tokens, on the model's device."""
        return drawn(self.ids, tokens, count, self.settings.seed).to(self.model.device)

    @cached_property
    def deep(self) -> Int[Tensor, "texts tokens"]:
        """The texts that are looked at in depth."""
        return self.windows(self.settings.deep_texts, self.settings.deep_tokens)

    @cached_property
    def stream(self) -> Int[Tensor, " tokens"]:
        """The first text that is long enough to be streamed, or else the longest."""
        wanted = max(self.settings.stream_tokens, self.settings.advice.tokens)
        streams = [stream_ids(self.tokenizer, text)[0] for text in self.texts.values()]
        chosen = next((ids for ids in streams if len(ids) >= wanted), max(streams, key=len))
        return torch.tensor(chosen, device=self.model.device)

    def massive(self, stage: Stage) -> dict[str, Massive]:
        """Massive activations without BOS and, if there is one, with it."""
        bos = bos_of(self.tokenizer)
        found = {"without BOS": massive.measure(self.model, self.deep, tokenizer=self.tokenizer, stage=stage)}
        if bos is not None:
            with_bos = dressed(self.deep, "first", bos)
            found["with BOS"] = massive.measure(self.model, with_bos, tokenizer=self.tokenizer, stage=stage)
        return found

    def entropy(self, stage: Stage) -> Entropy:
        """Entropy of texts by the tokenizer's own convention, and of a stream where the model can stream."""
        ids = self.deep if self.bos_used is None else dressed(self.deep, "first", self.bos_used)
        try:
            describe(self.model)
        except UnsupportedModel:
            return entropy.measure(self.model, ids, stage=stage)
        return entropy.measure(self.model, ids, self.stream[: self.settings.stream_tokens], stage=stage)

    def passages(self) -> dict[str, list[str]]:
        """Passages by class: the texts, or stretches of the first one where there are fewer than three."""
        count = self.settings.passages
        if len(self.texts) >= 3:
            return {name: _cut(text, count) for name, text in self.texts.items()}
        text = max(self.texts.values(), key=len)
        size = len(text) // CLASSES
        return {f"stretch {n + 1}": _cut(text[n * size : (n + 1) * size], count) for n in range(CLASSES)}


def _cut(text: str, count: int) -> list[str]:
    """`count` passages of equal length from one text."""
    size = len(text) // count
    return [text[index * size : (index + 1) * size] for index in range(count)]
