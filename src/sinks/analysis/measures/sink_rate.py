"""The sink rate: which share of heads puts more than epsilon of its attention on one early token.

Gu et al. (arXiv 2410.10781), section 3.2: importance of key k is alpha_k = 1/(T - k) sum_{i >= k} p_ik, and the sink
rate the share of (text, layer, head) with alpha_k > epsilon, thresholded text by text, then averaged. It is a fraction
of heads, not of attention, and means nothing without epsilon, T, and where BOS stood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.inputs import MOVED_TO, Condition, alike, bos_of, dressed
from sinks.analysis.probe import probe, read
from sinks.errors import InvalidInput
from sinks.kernels.lens import Sight
from sinks.kernels.summary import summary as summaries
from sinks.kernels.summary.summary import Summary
from sinks.reading.estimate import Estimate, estimate
from sinks.types import Listener, Stage, ignore, unwatched

EPSILON = 0.3
EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FIRST = 16
"""Keys whose importance is kept for every head."""
LONG = 16_384
"""Tokens of a text from which on only the first keys are kept: on a GPU all others cost a second pass."""
FEW = 4
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


class Importance:
    """Collects, by text, layer and head, the mean attention that each key receives from the queries that see it.

    Feed it batches of texts of one length, without pads: `probe(model, see=collector.see, sum_up=collector.sum_up)`,
    then `close` after each batch. `sink` is the key whose share of later queries' attention is wanted, `kept` how many
    of the first keys are (None: all, which on a GPU takes a second pass over queries and keys). Keeps texts x layers x
    heads x kept numbers.

    Raises InvalidInput where the sink is not among the keys that are kept.
    """

    def __init__(self, tokens: int, sink: int = 0, kept: int | None = None) -> None:
        self.tokens, self.sink, self.kept = tokens, sink, min(kept or tokens, tokens)
        if not 0 <= sink < self.kept:
            raise InvalidInput(f"sink={sink} is not among the {self.kept} keys that are kept")
        self._received: dict[tuple[int, int], Tensor] = {}
        self._on_sink: dict[tuple[int, int], Tensor] = {}
        self._on_four: dict[tuple[int, int], Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._floor: dict[int, Tensor] = {}
        self._batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def see(self, sight: Sight) -> None:
        """Add one block."""
        view, keys = sight.view, sight.view.keys[0]
        real = keys >= 0  # a key that a lens has added is nobody's token
        kept = real & (keys < self.kept)
        received = sight.received()[..., kept]  # summed in the model's own precision: half the memory on long texts
        on_sink = self._later(sight, torch.tensor([self.sink]), self.sink + 1)
        on_four = self._later(sight, torch.arange(FEW), FEW)
        for index, head in enumerate(view.heads):
            place = (view.layer, head)
            sums = self._received.setdefault(place, received.new_zeros(len(received), self.kept))
            sums.index_add_(1, keys[kept], received[:, index].to(sums.dtype))
            self._on_sink[place] = self._on_sink.get(place, 0) + on_sink[:, index]
            self._on_four[place] = self._on_four.get(place, 0) + on_four[:, index]
        if view.heads.start == 0 and not self._batches:  # who sees whom is the same for every head and text
            visible = (sight.scores[0, 0][:, real] > -torch.inf).double()
            for sums, share in ((self._seen, visible), (self._floor, visible / visible.sum(dim=-1, keepdim=True))):
                total = sums.setdefault(view.layer, visible.new_zeros(self.kept))
                total.index_add_(0, keys[kept], share[:, kept[real]].sum(dim=0))

    def _later(self, sight: Sight, keys: Tensor, first: int) -> Float[Tensor, "batch heads"]:
        """Weight on `keys` together, summed over the queries from position `first` on."""
        later = (sight.view.queries >= first).double()
        return torch.einsum("bhqw,bq->bh", sight.on(keys.to(later.device)).double(), later)

    @property
    def sum_up(self) -> Callable[[Summary], None] | None:
        """Adds one layer's summary; None where the sink is none of the keys that a summary knows one by one."""
        return self._sum_up if self.sink < summaries.FIRST else None

    def _sum_up(self, summary: Summary) -> None:
        first = summary.first_received
        received = _filled(first if self.kept <= summaries.FIRST else summary.received, self.kept)
        on_sink = first[..., self.sink] - _early(summary, self.sink, self.sink + 1)  # but for its own query
        on_four = first[..., :FEW].sum(dim=-1) - _early(summary, 0, FEW)
        for sums, more in ((self._received, received), (self._on_sink, on_sink), (self._on_four, on_four)):
            for head in range(more.shape[1]):
                place = (summary.layer, head)
                sums[place] = sums[place] + more[:, head] if place in sums else more[:, head]
        if not self._batches:
            shares = (1 / summary.visible.double()).flip(0).cumsum(dim=0).flip(0)
            for sums, more in ((self._seen, summary.visible.double().flip(0)), (self._floor, shares)):
                sums[summary.layer] = sums.get(summary.layer, 0) + _filled(more, self.kept)

    def close(self) -> None:
        """End a batch."""
        layers, heads = (1 + max(place[axis] for place in self._received) for axis in (0, 1))
        batch = []
        for sums in (self._received, self._on_sink, self._on_four):
            rows = [torch.stack([sums.pop((layer, head)) for head in range(heads)], dim=1) for layer in range(layers)]
            batch.append(torch.stack(rows, dim=1).cpu().numpy())
        self._batches.append((batch[0], batch[1], batch[2]))

    @property
    def received(self) -> Float[np.ndarray, "texts layers heads keys"]:
        """Attention that each key received, summed over queries."""
        return np.concatenate([batch[0] for batch in self._batches]).astype(np.float64)

    @property
    def alpha(self) -> Float[np.ndarray, "texts layers heads keys"]:
        """Importance of the keys that are kept: the mean over the queries that see one; 0 where nobody does."""
        return self.received / np.maximum(self.seen[:, None, :], 1)

    @property
    def seen(self) -> Float[np.ndarray, "layers keys"]:
        """How many queries see each key."""
        return _by_layer(self._seen)

    @property
    def floor(self) -> Float[np.ndarray, "layers keys"]:
        """The importance that each key would have if every query attended uniformly to what it sees."""
        return _by_layer(self._floor) / np.maximum(self.seen, 1)

    @property
    def sink_mass(self) -> Float[np.ndarray, "texts layers heads"]:
        """Mean attention on the sink, over the queries after it."""
        return np.concatenate([batch[1] for batch in self._batches]) / (self.tokens - self.sink - 1)

    @property
    def four_mass(self) -> Float[np.ndarray, "texts layers heads"]:
        """Mean attention on the first four keys together, over the queries after them."""
        return np.concatenate([batch[2] for batch in self._batches]) / (self.tokens - FEW)


def _filled(sums: Float[Tensor, "*places some"], count: int) -> Float[Tensor, "*places count"]:
    """The first `count` sums, zeros where there are fewer."""
    return torch.nn.functional.pad(sums[..., :count], (0, max(count - sums.shape[-1], 0)))


def _early(summary: Summary, begin: int, end: int) -> Float[Tensor, "batch heads"]:
    """Weight that the keys from `begin` to `end` have among themselves."""
    return summary.first[:, :, begin:end, begin:end].sum(dim=(2, 3), dtype=torch.float64)


def _by_layer(sums: Mapping[int, Tensor]) -> Float[np.ndarray, "layers keys"]:
    return torch.stack([sums[layer] for layer in sorted(sums)]).cpu().numpy()


class Prefixes:
    """Collects the attention on key 0 of every query, so that each prefix of a text gives its own importance."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._weights: dict[tuple[int, int], Tensor] = {}
        self._batches: list[np.ndarray] = []

    def see(self, sight: Sight) -> None:
        """Add one block."""
        view = sight.view
        weights = sight.on(view.queries.new_zeros(1))[..., 0]
        rows = slice(int(view.queries[0, 0]), int(view.queries[0, -1]) + 1)
        for index, head in enumerate(view.heads):
            place = (view.layer, head)
            self._weights.setdefault(place, weights.new_zeros(len(weights), self.tokens))[:, rows] = weights[:, index]

    def sum_up(self, summary: Summary) -> None:
        """Add one layer."""
        # A view would keep the weights on all of the first keys.
        on_first = _filled(summary.first[..., 0].clone(), self.tokens)
        for head in range(on_first.shape[1]):
            self._weights[summary.layer, head] = on_first[:, head]

    def close(self) -> None:
        """End a batch."""
        places = sorted(self._weights)
        self._batches.append(torch.stack([self._weights.pop(place) for place in places], dim=1).cpu().numpy())

    @property
    def weights(self) -> Float[np.ndarray, "texts layers_times_heads queries"]:
        """Attention of every query on key 0."""
        return np.concatenate(self._batches).astype(np.float64)


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
    model: PreTrainedModel, inputs: Tensor | Mapping[str, Tensor], sink: int, listen: Listener = ignore
) -> Importance:
    """The importance of keys in dense passes over inputs of one length, some at a time; `listen` hears tokens.

    Of every key, or of the first 16 where there are more than `LONG`.

    `inputs` are token ids `[texts, tokens]`, or named inputs of a model that takes others.
    """
    named = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    tokens = tokens_of(model, named)
    found = Importance(tokens, sink, None if tokens <= LONG else FIRST)
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
    found = Prefixes(ids.shape[1])
    with probe(model, see=found.see, sum_up=found.sum_up):
        for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
            read(model, batch)
            found.close()
            listen(batch.numel())
    sums = found.weights.cumsum(axis=-1)
    lengths = [length for length in LENGTHS if length <= ids.shape[1]]
    return Lengths(
        condition,
        epsilon,
        rate={length: _over_texts(sums[..., length - 1] / length > epsilon, seed) for length in lengths},
        mass={
            length: _over_texts((sums[..., length - 1] - sums[..., 0]) / (length - 1), seed) for length in lengths
        },
    )  # fmt: skip


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
