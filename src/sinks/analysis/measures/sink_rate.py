"""The sink rate: which share of heads puts more than epsilon of its attention on one early token.

Gu et al. (arXiv 2410.10781), section 3.2: importance of key k is alpha_k = 1/(T - k) sum_{i >= k} p_ik, and the sink
rate the share of (text, layer, head) with alpha_k > epsilon, thresholded text by text, then averaged. It is a fraction
of heads, not of attention, and means nothing without epsilon, T, and where BOS stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.inputs import MOVED_TO, Condition, alike, bos_of, dressed
from sinks.analysis.measures.importance import Importance, Prefixes
from sinks.analysis.probe import probe, read
from sinks.reading.estimate import Estimate, estimate
from sinks.types import Listener, Stage, ignore, unwatched

EPSILON = 0.3
EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LENGTHS = tuple(2**power for power in range(4, 21))
FIRST = 16
"""Keys whose importance is kept for every head."""
LONG = 16_384
"""Tokens of a text from which on only the first keys are kept: on a GPU all others cost a second pass."""
COMMON = 0.25
"""Share of heads for which a key must pass to count as one of the model's sinks."""
PRESENT = 0.1
BATCH_TOKENS = 4096
"""Tokens in one forward pass."""

CONDITIONS = (
    Condition("natural", "none"),
    Condition("natural", "first"),
    Condition("natural", "moved"),
    Condition("random", "none"),
    Condition("random", "first"),
    Condition("repeated", "none"),
    Condition("repeated", "first"),
)


@dataclass(frozen=True, eq=False)
class SinkRate:
    """One condition. `sink` is the position that stands for the sink here: 0, or where BOS was moved to.

    `importance`: mean over texts of alpha_k for the first keys. `rate_at`: sink rate at each of the first keys.
    `rate`: sink rate at `sink`; `aggregated` is the same with the texts' mean importance thresholded instead.
    `heads`: share of texts in which a head passes at `sink`. `curve`: the rate by epsilon. `anywhere`: heads for which
    some key of the first half passes (of all keys, where attention is not causal); `sinks`: those of these keys that
    more than a quarter of all heads pass.
    `first_mass`, `first_four_mass`: mean attention on them over queries after them; `mass_by_layer` is the former.
    `sink_mass`: on all of `sinks` together (tells dispersal from loss). `argmax`: heads whose largest importance, over
    the floor of uniform attention, is at `sink`.
    """

    condition: Condition
    texts: int
    tokens: int
    epsilon: float
    sink: int
    floor: float
    importance: Float[np.ndarray, "layers heads first"]
    rate_at: Float[np.ndarray, " first"]
    heads: Float[np.ndarray, "layers heads"]
    rate: Estimate
    aggregated: float
    curve: Mapping[float, Estimate]
    anywhere: Estimate
    sinks: tuple[int, ...]
    first_mass: Estimate
    first_four_mass: Estimate
    sink_mass: Estimate
    mass_by_layer: Float[np.ndarray, " layers"]
    argmax: Estimate

    @property
    def is_natural(self) -> bool:
        """Whether it was measured on real text."""
        return self.condition.tokens == "natural"


@dataclass(frozen=True, eq=False)
class Lengths:
    """Sink rate and mass at the first token by length of the text, every length from one pass over the longest."""

    condition: Condition
    epsilon: float
    rate: Mapping[int, Estimate]
    mass: Mapping[int, Estimate]


@dataclass(frozen=True, eq=False)
class SinkRates:
    """All conditions, the dependence on length, and what binds the sink: "position", "token", "none" or "both"."""

    conditions: tuple[SinkRate, ...]
    lengths: tuple[Lengths, ...]
    bound_to: str
    verdict: str


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    natural: Int[Tensor, "texts tokens"],
    *,
    longer: Int[Tensor, "few_texts more_tokens"] | None = None,
    epsilon: float = EPSILON,
    seed: int = 0,
    stage: Stage = unwatched,
) -> SinkRates:
    """Sink rates of every condition on texts like `natural`, and their dependence on length on `longer`.

    Without BOS, with BOS first (the last token dropped), and, for natural tokens, with BOS overwriting index 10. A
    model whose tokenizer has no such token is measured without.
    """
    bos = bos_of(tokenizer)
    conditions = [condition for condition in CONDITIONS if bos is not None or condition.bos == "none"]
    listen = stage("sink rates", natural.numel() * len(conditions))
    found = []
    for condition in conditions:
        ids = dressed(alike(natural, condition.tokens, tokenizer, seed), condition.bos, bos)
        sink = MOVED_TO if condition.bos == "moved" else 0
        found.append(sink_rate(collect(model, ids, sink, listen), condition, epsilon, seed))
    lengths = []
    if longer is not None:
        ways = [condition for condition in conditions if condition.tokens == "natural" and condition.bos != "moved"]
        listen = stage("sink rate by length", longer.numel() * len(ways))
        lengths = [by_length(model, dressed(longer, way.bos, bos), way, epsilon, seed, listen) for way in ways]
    bound_to, verdict = binding({condition.condition.bos: condition for condition in found if condition.is_natural})
    return SinkRates(tuple(found), tuple(lengths), bound_to, verdict)


def measure_encoder(
    model: PreTrainedModel,
    inputs: Mapping[Condition, Tensor | Mapping[str, Tensor]],
    *,
    epsilon: float = EPSILON,
    seed: int = 0,
    stage: Stage = unwatched,
) -> SinkRates:
    """Sink rates of a model that reads its whole input at once (BERT-like, or a vision transformer), by condition.

    Every query sees every key, so importance is the mean over all of them, its floor is 1 / T, and any key may be a
    sink, not only one of the first half.
    """
    found = []
    for condition, given in inputs.items():
        count = len(given if isinstance(given, Tensor) else next(iter(given.values())))
        listen = stage(f"sink rates: {condition.name}", count)
        found.append(sink_rate(collect(model, given, 0, lambda _, listen=listen: listen(1)), condition, epsilon, seed))
    told = "; ".join(f"{one.condition.name}: {_percent(one.rate)} of heads at the first place" for one in found)
    return SinkRates(tuple(found), (), "not asked", told)


def collect(
    model: PreTrainedModel,
    inputs: Tensor | Mapping[str, Tensor],
    sink: int,
    listen: Listener = ignore,
    *,
    kept: int | None = None,
) -> Importance:
    """The importance of keys in dense passes over inputs of one length, some at a time; `listen` hears tokens.

    Of the first `kept` keys; None: of every key, or of the first 16 where there are more than `LONG`.

    `inputs` are token ids `[texts, tokens]`, or named inputs of a model that takes others.
    """
    named = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    tokens = tokens_of(model, named)
    found = Importance(tokens, sink, kept or (tokens if tokens <= LONG else FIRST))
    size = max(1, BATCH_TOKENS // tokens)
    with probe(model, see=found.see, sum_up=found.sum_up):
        for batch in zip(*(value.split(size) for value in named.values()), strict=True):
            read(model, dict(zip(named, batch, strict=True)))
            found.close()
            listen(len(batch[0]) * tokens)
    return found


def tokens_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> int:
    """How many tokens the first block of the model gets for one of `inputs`: a picture becomes patches and more."""
    if "input_ids" in inputs:
        return inputs["input_ids"].shape[1]
    widths: list[int] = []
    with probe(model, residual=lambda residual: widths.append(residual.hidden.shape[1])):
        read(model, {name: value[:1] for name, value in inputs.items()})
    return widths[0]


def sink_rate(found: Importance, condition: Condition, epsilon: float = EPSILON, seed: int = 0) -> SinkRate:
    """The sink rate and its relatives from what was collected under one condition."""
    alpha, sink, tokens = found.alpha, found.sink, found.tokens
    passes = alpha > epsilon
    is_causal = found.seen[0, 0] != found.seen[0, -1]  # the last keys of a causal text are seen by too few to tell
    half = tokens // 2 if is_causal else tokens
    rate_at = passes.mean(axis=(0, 1, 2))
    sinks = tuple(int(key) for key in np.flatnonzero(rate_at[:half] > COMMON))
    lift = alpha[..., :half] / found.floor[:, None, :half].clip(min=np.finfo(float).tiny)
    on_sinks = found.received[..., list(sinks)].sum(axis=-1) / tokens
    return SinkRate(
        condition=condition,
        texts=len(alpha),
        tokens=tokens,
        epsilon=epsilon,
        sink=sink,
        floor=float(found.floor[:, sink].mean()),
        importance=alpha[..., :FIRST].mean(axis=0),
        rate_at=rate_at[:FIRST],
        heads=passes[..., sink].mean(axis=0),
        rate=_over_texts(passes[..., sink], seed),
        aggregated=float((alpha[..., sink].mean(axis=0) > epsilon).mean()),
        curve={level: _over_texts(alpha[..., sink] > level, seed) for level in EPSILONS},
        anywhere=_over_texts(np.asarray(passes[..., :half].any(axis=-1)), seed),
        sinks=sinks,
        first_mass=_over_texts(found.sink_mass, seed),
        first_four_mass=_over_texts(found.four_mass, seed),
        sink_mass=_over_texts(on_sinks, seed),
        mass_by_layer=found.sink_mass.mean(axis=(0, 2)),
        argmax=_over_texts(np.asarray(lift.argmax(axis=-1) == sink), seed),
    )


def by_length(
    model: PreTrainedModel,
    ids: Int[Tensor, "texts tokens"],
    condition: Condition,
    epsilon: float = EPSILON,
    seed: int = 0,
    listen: Listener = ignore,
) -> Lengths:
    """Sink rate and mass at key 0 of every prefix of 16, 32, ... tokens: attention is causal, so one pass gives all.

    In layers with a window of their own, the queries that no longer see key 0 count as giving it nothing.
    """
    lengths = [length for length in LENGTHS if length <= ids.shape[1]]
    found = Prefixes(lengths)
    with probe(model, see=found.see, sum_up=found.sum_up):
        for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
            read(model, batch)
            found.close()
            listen(batch.numel())
    own, *sums = np.moveaxis(found.sums, -1, 0)
    by = dict(zip(lengths, sums, strict=True))
    return Lengths(
        condition,
        epsilon,
        rate={length: _over_texts(total / length > epsilon, seed) for length, total in by.items()},
        mass={length: _over_texts((total - own) / (length - 1), seed) for length, total in by.items()},
    )


def binding(natural: Mapping[str, SinkRate]) -> tuple[str, str]:
    """What binds the sink, and that in words. `natural`: the conditions with natural tokens, by where BOS stands.

    A sink is present where the low end of its rate's interval is over 10 %. Bound to the position: present without
    BOS, and BOS elsewhere does not attract it. Bound to the token: absent without BOS, present at BOS wherever it is.
    """
    without = natural["none"].rate
    place = _present(without)
    told = f"{_percent(without)} of heads without BOS"
    if "first" not in natural:
        return ("position" if place else "none"), told + "; this tokenizer has no BOS to try"
    first, moved = natural["first"].rate, natural["moved"].rate
    token = _present(moved)
    told += f", {_percent(first)} with it, {_percent(moved)} at index {MOVED_TO} when it is moved there"
    bound = {(True, True): "both", (True, False): "position", (False, True): "token", (False, False): "none"}
    return bound[place, token], told


def _present(rate: Estimate) -> bool:
    return (rate.value if np.isnan(rate.low) else rate.low) > PRESENT


def _percent(rate: Estimate) -> str:
    return f"{100 * rate.value:.0f} %"


def _over_texts(by_text: np.ndarray, seed: int) -> Estimate:
    """Mean over everything but the texts, then over the texts."""
    return estimate(by_text.reshape(len(by_text), -1).mean(axis=1), seed)
