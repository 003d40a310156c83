"""Does a sink acquire meaning? Linear probes and retrieval from what a sink carries, against controls.

Causality answers half of it: position 0 sees itself only, so behind a fixed first token every prompt gives it the same
state, and a probe is at chance by construction. What can be asked is what the other tokens that a stream keeps tell
beyond themselves, and what a sink tells that stands behind the prompt and so has seen it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.probe import Residual, probe
from sinks.cache.cache import SinkCache
from sinks.errors import CapacityError, InvalidInput, TextTooShort
from sinks.kernels.lens import Arrival, Sight
from sinks.models.attach import attachment_of
from sinks.models.families import base_of
from sinks.models.observe import blocks_of
from sinks.reading.estimate import Estimate, estimate
from sinks.types import Listener, Stage, unwatched

PROMPT, FOLLOWING = 40, 8
"""Tokens of a passage that a sink behind it has seen, and tokens after both, whose attention is measured."""

ROWS = 16
"""Passages of one forward pass."""

KEPT, WINDOW, FILLER = 4, 60, 2000
"""The stream: sinks, window, and tokens read before the sinks are looked at again."""

RIDGE = 0.1
"""Added to the diagonal of the kernel, which is about 1."""

CONSTANT = 1e-6
"""A feature that varies by less than this times the largest mean among its kind is rounding, and left out."""

SHUFFLES = 10

SINK_LIFT = 3
"""Times the uniform share of attention that make a sink."""

TIE = 1e-9
"""Scores this close share the credit."""

CARRIERS = ("token", "value", "residual", "output")


@dataclass(frozen=True)
class Reading:
    """How well one source tells which of `classes` kinds of text its passage is of.

    `source`: "sink", "tokens 1 to 3" (the rest of what a stream keeps), "other token", "last token". `prefix`: what
    the sink is: the "text" itself, "BOS" in front, or, behind the prompt, "BOS behind", "4 x BOS behind", "null
    embedding behind" (4 of them); "content token behind" is a word in the same place (4 times), the control.
    `carrier`: "token" (its embedding: what it tells by itself), "value", "residual" (a quarter, half, three quarters
    up) or "output" (its value times the attention that each head's later tokens give it, so that it tells of them,
    even where the sink is the same for every prompt). `where`: "prompt", or "stream" after 2,000 more tokens.

    `accuracy` is of a linear probe on held-out passages, `gain` its excess over what the token tells by itself,
    `shuffled` the accuracy with shuffled labels, `retrieval` the share of passages whose nearest other one by cosine
    is of the same class, `chance` = 1 / classes. Neither trains on, nor looks at, the passage before or after.
    `attention` is the share that the later tokens give the source, over layers and heads; `lift` is how many times that
    is what uniform attention would give. A source that is no sink to the model has a `lift` of about 1. `variation` is
    the distance of passages from their mean, over the norm of that mean: a probe reads even what hardly varies.
    """

    source: str
    carrier: str
    prefix: str
    where: str
    classes: int
    accuracy: Estimate
    gain: Estimate
    shuffled: Estimate
    retrieval: Estimate
    chance: float
    attention: Estimate
    lift: float
    variation: float


@dataclass(frozen=True, eq=False)
class Semantics:
    """All readings, and the verdict: yes or no, with the size of the effect.

    `meaningful`: some sink, one with a `lift` of 3 or more, has a value that tells more of its class than its token
    does, the whole interval of its `gain` being above 0.
    `frozen`: whether keys and values of a stream's sinks are, bit for bit, still those of the start after 2,000 more
    tokens (None: the model cannot stream, or is not attached).
    """

    readings: tuple[Reading, ...]
    frozen: bool | None
    meaningful: bool
    verdict: str


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Where the prompt stands and what stands around it: `ids` -1 is a null embedding; `places` by source."""

    name: str
    ids: Int[Tensor, "passages columns"]
    places: Mapping[str, Sequence[int]]


@dataclass(eq=False)
class Carried:
    """What one pass collects at the columns `wanted`: by layer or depth, `[rows, ..., wanted, features]`."""

    wanted: Tensor
    asking: int
    layers: tuple[int, ...]
    values: dict[int, Tensor] = field(default_factory=dict)
    masses: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def arrive(self, arrival: Arrival) -> None:
        """Keep the values; make room for the attention they will get."""
        self.values[arrival.layer] = arrival.value[:, :, self.wanted].double()
        shape = (*arrival.query.shape[:2], len(self.wanted))
        self.masses[arrival.layer] = torch.zeros(shape, dtype=torch.float64, device=arrival.query.device)

    def see(self, sight: Sight) -> None:
        """Add up the attention that the last `asking` columns give, as a mean over them."""
        columns = sight.view.queries >= self.asking
        given = torch.einsum("bhqw,bq->bhw", sight.on(self.wanted).double(), columns.double())
        heads = sight.view.heads
        self.masses[sight.view.layer][:, heads.start : heads.stop] += given / FOLLOWING

    def residual(self, residual: Residual) -> None:
        """Keep the residual stream at the depths that are asked for."""
        if residual.depth in (0, *self.layers):
            self.hidden[residual.depth] = residual.hidden[:, self.wanted].double()

    def features(self, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        """By carrier, one row of features a passage, of some of the wanted columns; and "attention", one number."""
        values = [self.values[layer][:, :, chosen] for layer in self.layers]
        masses = [self.masses[layer][:, :, chosen] for layer in self.layers]
        outputs = [
            value.repeat_interleave(mass.shape[1] // value.shape[1], dim=1) * mass[..., None]
            for value, mass in zip(values, masses, strict=True)
        ]
        found = {
            "token": [self.hidden[0][:, chosen]],
            "value": values,
            "residual": [self.hidden[layer][:, chosen] for layer in self.layers],
            "output": outputs,
        }
        share = torch.stack([mass[:, :, chosen].sum(dim=-1).mean(dim=1) for mass in self.masses.values()]).mean(dim=0)
        flat = {name: torch.cat([part.flatten(1) for part in parts], dim=1) for name, parts in found.items()}
        return {name: part.cpu().numpy() for name, part in (flat | {"attention": share}).items()}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Mapping[str, Sequence[str]],
    *,
    bos: int | None,
    seed: int = 0,
    stage: Stage = unwatched,
) -> Semantics:
    """Read every passage with sinks before and behind it, and see what these tell about its class.

    `passages` are by class, in the order of their text, and not overlapping: neighbours are kept apart. Of each, the
    first 48 tokens are read. Classes are cut to the length of the shortest, 12 or more being of use.

    Raises InvalidInput for fewer than two classes or four passages in one, TextTooShort for a passage that is.
    """
    ids, labels, orders = _encoded(tokenizer, passages)
    arrangements = _arrangements(ids, bos, seed)
    streamed = FILLER if attachment_of(model) is not None else 0
    listen = stage("semantics", sum(each.ids.numel() for each in arrangements) + streamed)
    readings: list[Reading] = []
    for arrangement in arrangements:
        for source, features in _read(model, arrangement, listen).items():
            readings += _readings(arrangement, source, features, (labels, orders), seed)
    frozen = _frozen(model, ids, bos) if streamed else None
    listen(streamed)
    if frozen:  # what has not changed by a bit reads the same
        front = "text" if bos is None else "BOS"
        kept = [each for each in readings if each.prefix == front and each.source in ("sink", "tokens 1 to 3")]
        readings += [replace(each, where="stream") for each in kept if each.carrier == "value"]
    return Semantics(tuple(readings), frozen, *_verdict(readings, frozen))


def _readings(
    arrangement: Arrangement,
    source: str,
    features: Mapping[str, np.ndarray],
    classes: tuple[Int[np.ndarray, " passages"], Int[np.ndarray, " passages"]],
    seed: int,
) -> list[Reading]:
    """One source, by carrier."""
    count = int(classes[0].max()) + 1
    own = credit(features["token"], *classes)
    attention = estimate(features["attention"], seed)
    # The mean over later tokens of the share that uniform attention gives: 1 over what each of them sees.
    columns = arrangement.ids.shape[1]
    uniform = len(arrangement.places[source]) * (1 / np.arange(columns - FOLLOWING + 1, columns + 1)).mean()
    found = []
    for carrier in CARRIERS:
        score = credit(features[carrier], *classes)
        found.append(
            Reading(
                source, carrier, arrangement.name, "prompt", count,
                estimate(score, seed),
                estimate(score - own, seed),
                estimate(shuffled_credit(features[carrier], *classes, seed), seed),
                estimate(retrieval(features[carrier], *classes), seed),
                1 / count, attention, float(attention.value / uniform), variation(features[carrier]),
            )
        )  # fmt: skip
    return found


def _encoded(
    tokenizer: PreTrainedTokenizerBase, passages: Mapping[str, Sequence[str]]
) -> tuple[Int[Tensor, "passages tokens"], Int[np.ndarray, " passages"], Int[np.ndarray, " passages"]]:
    """Tokens, class and place in its class of each passage."""
    each = min((len(texts) for texts in passages.values()), default=0)
    if len(passages) < 2 or each < 4:
        raise InvalidInput(
            f"{len(passages)} classes, the smallest of {each} passages: give at least 2 classes of 4 passages"
        )
    rows: list[list[int]] = []
    for label, texts in passages.items():
        for text in texts[:each]:
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if len(ids) < PROMPT + FOLLOWING:
                raise TextTooShort(
                    f"a passage of class {label!r} has {len(ids)} tokens, and {PROMPT + FOLLOWING} are read: give "
                    "longer passages"
                )
            rows.append(ids[: PROMPT + FOLLOWING])
    labels = np.repeat(np.arange(len(passages)), each)
    return torch.tensor(rows), labels, np.tile(np.arange(each), len(passages))


def _arrangements(ids: Int[Tensor, "passages tokens"], bos: int | None, seed: int) -> list[Arrangement]:
    generator = torch.Generator().manual_seed(seed)
    ordinary = int(torch.randint(KEPT, PROMPT - 1, (), generator=generator))
    word = int(ids.flatten()[torch.randint(ids.numel(), (), generator=generator)])
    rest = {"sink": [0], "tokens 1 to 3": [1, 2, 3]}
    found = [Arrangement("text", ids, rest | {"other token": [ordinary], "last token": [PROMPT - 1]})]
    behind = {"null embedding behind": -1, "content token behind": word}
    if bos is not None:
        found.append(Arrangement("BOS", _with(ids, 0, bos, 1), rest))
        behind = {"4 x BOS behind": bos} | behind
    for name, token in behind.items():
        source = "other token" if name == "content token behind" else "sink"
        found.append(Arrangement(name, _with(ids, PROMPT, token, KEPT), {source: range(PROMPT, PROMPT + KEPT)}))
    if bos is not None:
        found.append(Arrangement("BOS behind", _with(ids, PROMPT, bos, 1), {"sink": [PROMPT]}))
    return found


def _with(ids: Int[Tensor, "passages tokens"], place: int, token: int, count: int) -> Int[Tensor, "passages columns"]:
    return torch.cat((ids[:, :place], ids.new_full((len(ids), count), token), ids[:, place:]), dim=1)


@torch.inference_mode()
def _read(
    model: PreTrainedModel, arrangement: Arrangement, listen: Listener
) -> dict[str, dict[str, Float[np.ndarray, "passages ..."]]]:
    """Features by source and carrier."""
    blocks = len(blocks_of(model))
    layers = tuple(sorted({blocks // 4, blocks // 2, 3 * blocks // 4}))
    columns = [column for place in arrangement.places.values() for column in place]
    parts: dict[str, list[dict[str, np.ndarray]]] = {source: [] for source in arrangement.places}
    for rows in arrangement.ids.to(model.device).split(ROWS):
        carried = Carried(torch.tensor(columns, device=rows.device), rows.shape[1] - FOLLOWING, layers)
        with probe(model, see=carried.see, arrive=carried.arrive, residual=carried.residual):
            base_of(model)(**_inputs(model, rows), use_cache=False)
        for source, place in arrangement.places.items():
            parts[source].append(carried.features([columns.index(column) for column in place]))
        listen(rows.numel())
    return {
        source: {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        for source, found in parts.items()
    }


def _inputs(model: PreTrainedModel, rows: Int[Tensor, "rows columns"]) -> dict[str, Tensor]:
    if bool((rows >= 0).all()):
        return {"input_ids": rows}
    embedded = model.get_input_embeddings()(rows.clamp(min=0))
    return {"inputs_embeds": embedded.masked_fill((rows < 0)[..., None], 0)}


@torch.inference_mode()
def _frozen(model: PreTrainedModel, ids: Int[Tensor, "passages tokens"], bos: int | None) -> bool | None:
    """Whether the sinks of a stream are, bit for bit, the same after `FILLER` tokens of the other passages."""
    try:
        cache = SinkCache.for_model(model, sinks=KEPT, window=WINDOW)
    except CapacityError:
        return None
    start = ids[:1] if bos is None else _with(ids[:1], 0, bos, 1)
    filler = ids[1:].flatten().repeat(-(-FILLER // ids[1:].numel()))[:FILLER]
    base = base_of(model)

    def held() -> list[Tensor]:
        return [part[:, :, :KEPT].clone() for ring in cache.rings if ring.plan.sinks for part in ring.held]

    base(input_ids=start.to(model.device), past_key_values=cache, use_cache=True)
    before = held()
    for chunk in filler.to(model.device).split(256):
        base(input_ids=chunk[None], past_key_values=cache, use_cache=True)
    return all(torch.equal(one, other) for one, other in zip(before, held(), strict=True))


def _verdict(readings: Sequence[Reading], frozen: bool | None) -> tuple[bool, str]:
    """What the values of sinks tell beyond their tokens, those of real sinks before those of would-be ones."""
    values = [each for each in readings if each.carrier == "value" and each.where == "prompt"]
    sinks = [each for each in values if each.source == "sink"]
    real = [each for each in sinks if each.lift >= SINK_LIFT]
    telling = [each for each in real if each.gain.low > 0]
    others = [each for each in sinks if each not in real and each.gain.low > 0]
    control = next(each for each in values if each.prefix == "content token behind")
    parts = [_told(each) for each in real]
    parts = parts or ["no token that was tried is a sink to this model"]
    gain = [each for each in values if each.source == "tokens 1 to 3"][-1].gain
    parts.append(f"tokens 1 to 3, which a stream keeps too, {gain.value:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})")
    if others:
        said = ", ".join(f"{each.prefix} {each.accuracy.value:.2f} (lift {each.lift:.1f})" for each in others)
        parts.append(f"what has seen the prompt tells its class but is no sink to this model: {said}")
    if frozen:
        parts.append(f"{FILLER} tokens later, not a bit of a stream's sinks has changed")
    parts.append(f"a word behind the prompt {control.accuracy.value:.2f}, chance {control.chance:.2f}")
    return bool(telling), f"{'Yes' if telling else 'No'}: {'; '.join(parts)}."


def _told(reading: Reading) -> str:
    if reading.prefix == "BOS":
        return f"the value of BOS in front is the same for every prompt, by causality ({reading.accuracy.value:.2f})"
    place = "the first token of a text" if reading.prefix == "text" else f"the sink {reading.prefix} the prompt"
    gain = reading.gain
    return (
        f"the value of {place} tells the class {reading.accuracy.value:.2f} of the time, {gain.value:+.2f} "
        f"({gain.low:+.2f} to {gain.high:+.2f}) beyond its token (lift {reading.lift:.1f}, "
        f"{100 * reading.variation:.0f} % variation)"
    )


# The probe


def credit(
    features: Float[np.ndarray, "passages features"],
    labels: Int[np.ndarray, " passages"],
    orders: Int[np.ndarray, " passages"],
) -> Float[np.ndarray, " passages"]:
    """1 where a ridge classifier, trained on passages that are no neighbours, is right; shared where it cannot tell.

    One passage of each class is held out at a time, and their neighbours with them, so classes stay balanced.
    """
    found = np.empty(len(labels))
    targets = np.eye(labels.max() + 1)[labels]
    for order in np.unique(orders):
        test, train = orders == order, abs(orders - order) > 1
        scaled = standardised(features, train)
        kernel = scaled @ scaled[train].T / max(scaled.shape[1], 1)
        inner = kernel[train] + RIDGE * np.eye(train.sum())
        mean = targets[train].mean(axis=0)
        found[test] = shared(kernel[test] @ np.linalg.solve(inner, targets[train] - mean) + mean, targets[test] > 0)
    return found


def shuffled_credit(
    features: Float[np.ndarray, "passages features"],
    labels: Int[np.ndarray, " passages"],
    orders: Int[np.ndarray, " passages"],
    seed: int = 0,
) -> Float[np.ndarray, " passages"]:
    """The mean of `credit` over labels shuffled among the passages of one place, so that classes stay balanced."""
    generator = np.random.default_rng(seed)
    found = np.zeros(len(labels))
    for _ in range(SHUFFLES):
        drawn = labels.copy()
        for order in np.unique(orders):
            drawn[orders == order] = generator.permutation(labels[orders == order])
        found += credit(features, drawn, orders) / SHUFFLES
    return found


def retrieval(
    features: Float[np.ndarray, "passages features"],
    labels: Int[np.ndarray, " passages"],
    orders: Int[np.ndarray, " passages"],
) -> Float[np.ndarray, " passages"]:
    """1 where the nearest passage that is no neighbour, by cosine of standardised features, is of the same class."""
    scaled = standardised(features, np.ones(len(labels), dtype=bool))
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    scaled = scaled / np.where(length > 0, length, 1)
    near = np.where(abs(orders[:, None] - orders) > 1, scaled @ scaled.T, -np.inf)
    return shared(near, labels[:, None] == labels)


def standardised(
    features: Float[np.ndarray, "passages features"], train: Bool[np.ndarray, " passages"]
) -> Float[np.ndarray, "passages kept"]:
    """Zero mean and unit deviation over the passages `train`; features that are constant there are left out."""
    mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
    alive = deviation > CONSTANT * abs(mean).max()
    return (features[:, alive] - mean[alive]) / deviation[alive]


def variation(features: Float[np.ndarray, "passages features"]) -> float:
    """Root mean square distance of passages from their mean, over the norm of the mean; 0 for null embeddings."""
    mean = features.mean(axis=0)
    apart = np.sqrt(((features - mean) ** 2).sum(axis=1).mean())
    return float(apart / np.linalg.norm(mean)) if apart > 0 else 0.0


def shared(
    scores: Float[np.ndarray, "rows options"], right: Bool[np.ndarray, "rows options"]
) -> Float[np.ndarray, " rows"]:
    """The share of right ones among the best options of each row."""
    best = scores >= scores.max(axis=1, keepdims=True) - TIE
    return (best & right).sum(axis=1) / best.sum(axis=1)
