"""Interventions: reversible edits of a running model, each with a matched control. Causes, not only correlations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.causes.edits import scaled
from sinks.analysis.causes.trials import Bench, Spot, Trial, known, others
from sinks.analysis.inputs import dressed
from sinks.analysis.probe import probe
from sinks.errors import InvalidInput, TextTooShort, UnsupportedOption
from sinks.kernels.lens import Lens, Sight, View
from sinks.models.observe import blocks_of, observe
from sinks.reading.estimate import Estimate, estimate, exponential
from sinks.reading.perplexity import surprise
from sinks.types import Listener, Stage, unwatched

EPSILON = 0.3
"""A head has a sink at a key whose importance is over this (Gu et al., arXiv 2410.10781)."""

ELEMENTS = 1 << 27
"""Logits held at a time, and as many log-probabilities of the unedited model: 512 MiB each."""

LEAST = 32
"""Tokens of the shortest text: edits in the middle must not meet those at the beginning."""


@dataclass(frozen=True)
class Effect:
    """What one edit did, against the same texts without it; the edited tokens' own predictions are not counted.

    `group` names the family of edits ("massive activation", "sink attention", "first tokens", "sink logits", "added
    keys"); `control_of` is the name of the edit that this one is the control of, or empty. `perplexity` is with the
    edit, `loss` the mean difference in nats a token, `ratio` its exp (perplexity over perplexity); `kl` from base to
    edited, nats a token; `agreement` how often the likeliest next token stays. Where tokens are dropped, moved or
    replaced, only predictions of the same token from the same token are compared. `sink_rate` is at the sink's
    position and `next_rate` at the key after it, or where the token was moved to, with the edit on (NaN: not measured).
    """

    name: str
    group: str
    control_of: str
    perplexity: Estimate
    loss: Estimate
    ratio: Estimate
    kl: Estimate
    agreement: Estimate
    sink_rate: float
    next_rate: float


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """Loss difference (nats a token) when one key is taken from one head, the rest renormalised; mean over `texts`.

    `removed` takes the sink, from `low` to `high`; `control` takes a random key soon after it, seen by nearly as many
    queries (not of the same weight: sinks hold most of it). NaN where a head was not tried.
    """

    texts: int
    tokens: int
    removed: Float[np.ndarray, "layers heads"]
    control: Float[np.ndarray, "layers heads"]
    low: Float[np.ndarray, "layers heads"]
    high: Float[np.ndarray, "layers heads"]

    @property
    def matter(self) -> Bool[np.ndarray, "layers heads"]:
        """Heads whose sink matters: the interval lies above whatever the control did in any head."""
        return self.low > np.nanmax(np.abs(self.control))


@dataclass(frozen=True, eq=False)
class Interventions:
    """All effects; the heads, if they were tried; and what it comes to in one line.

    `base` is the perplexity of the unedited model, `sink_rate` and `next_rate` its rates at the sink and at the key
    after it. `spot` is the massive activation that was edited.
    """

    base: Estimate
    sink_rate: float
    next_rate: float
    spot: Spot
    texts: int
    tokens: int
    effects: tuple[Effect, ...]
    heads: HeadEffects | None
    verdict: str


@dataclass(frozen=True)
class Settings:
    """How to intervene. `bos` is put before every text (None: nothing is); `sink` is the position of the sink.

    `spot` is the massive activation (None: found by itself). `heads`: whether every head is tried by itself, on
    `head_texts` texts cut to `head_tokens`. `batch` texts are read at a time, fewer where the vocabulary is large.
    """

    bos: int | None = None
    sink: int = 0
    spot: Spot | None = None
    heads: bool = True
    head_texts: int = 4
    head_tokens: int = 64
    seed: int = 0
    batch: int = 16


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "texts tokens"],
    settings: Settings | None = None,
    stage: Stage = unwatched,
) -> Interventions:
    """Try every edit and every control on the second half of the texts; means come from the first half.

    `ids` are texts without special tokens (see `inputs.windows`), on the model's device.

    Raises UnsupportedOption for anything but a causal language model, TextTooShort for fewer than 4 texts or 32 tokens.
    """
    settings = settings or Settings()
    _check(model, ids, settings)
    if settings.bos is not None:
        ids = dressed(ids, "first", settings.bos)
    earlier, tested = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    means = known(model, earlier, settings.sink, settings.batch)
    spot = settings.spot or means.spot(settings.sink)
    bench = Bench(model, tokenizer, tested, means, spot, settings.sink, settings.bos, settings.seed)
    base, trials = bench.base(), list(bench.trials())
    listen = stage("interventions", tested.numel() * (1 + len(trials)))
    found = _run(model, base, trials, settings.batch, listen)
    effects = tuple(_effect(trial, found[trial], settings.seed) for trial in trials)
    heads = None
    if settings.heads:
        few = tested[: settings.head_texts, : settings.head_tokens]
        heads = head_effects(model, few, settings.sink, seed=settings.seed, stage=stage)
    unedited = found[base]
    rates = float(unedited["sink"].mean()), float(unedited["next"].mean())
    perplexity = exponential(estimate(unedited["nll"], settings.seed))
    verdict = _verdict(rates[0], effects, heads)
    return Interventions(perplexity, *rates, spot, len(tested), tested.shape[1], effects, heads, verdict)


def _check(model: PreTrainedModel, ids: Tensor, settings: Settings) -> None:
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UnsupportedOption(
            f"interventions compare predictions of the next token, and {type(model).__name__} is no causal language "
            "model: give one, or leave this measure out"
        )
    if len(ids) < 4 or ids.shape[1] < LEAST:
        raise TextTooShort(
            f"interventions need 4 texts (half of them for means) of {LEAST} tokens, and got {list(ids.shape)}"
        )
    if not 0 <= settings.sink < ids.shape[1] // 4:
        raise InvalidInput(f"sink={settings.sink}: it has to stand in the first quarter of {ids.shape[1]} tokens")


Measured = dict[str, np.ndarray]
"""One number for each text, by key."""

KEYS = ("nll", "loss", "kl", "agreement", "sink", "next")


def _run(
    model: PreTrainedModel, base: Trial, trials: list[Trial], batch: int, listen: Listener
) -> dict[Trial, Measured]:
    """Every trial on every text; the base's log-probabilities live for one batch of texts."""
    parts: dict[Trial, list[Measured]] = {trial: [] for trial in (base, *trials)}
    for rows in torch.arange(len(base.ids)).split(min(batch, _rows(model, base.ids.shape[1]))):
        reference = None
        for trial, found in parts.items():
            logits, rates = _read(model, trial, rows)
            reference = _wide(logits).log_softmax(dim=-1) if reference is None else reference
            found.append(_compared(trial, base.ids[rows], logits, reference) | rates)
            listen(len(rows) * base.ids.shape[1])
    return {trial: {key: np.concatenate([part[key] for part in parts[trial]]) for key in KEYS} for trial in parts}


def _rows(model: PreTrainedModel, tokens: int) -> int:
    """How many texts' logits may be held at a time."""
    return max(1, ELEMENTS // (model.config.get_text_config().vocab_size * tokens))


def _read(model: PreTrainedModel, trial: Trial, rows: Tensor) -> tuple[Tensor, Measured]:
    """Logits of some texts under a trial, and their sink rates at the two keys that are watched."""
    ids = trial.ids[rows]
    watched = torch.tensor(trial.watch, device=ids.device)
    received: dict[tuple[int, int], Tensor] = {}

    def see(sight: Sight) -> None:
        where = sight.view.layer, sight.view.heads.start
        received[where] = received.get(where, 0) + sight.on(watched).double().sum(dim=2)

    with trial.edit(model), probe(model, see=see):
        logits = model(ids, use_cache=False).logits
    importance = torch.cat(list(received.values()), dim=1) / (ids.shape[1] - watched)
    rates = (importance > EPSILON).double().mean(dim=1).cpu().numpy()
    return logits, {"sink": rates[:, 0], "next": rates[:, 1]}


def _compared(trial: Trial, ids: Tensor, logits: Tensor, reference: Tensor) -> Measured:
    columns, earlier = trial.shared()
    found: dict[str, list[float]] = {key: [] for key in KEYS[:4]}
    for text, edited, before in zip(ids, logits, reference, strict=True):
        expected, now = before[earlier], _wide(edited[columns]).log_softmax(dim=-1)
        target = text[earlier + 1, None]
        nll = -now.gather(1, target).double()
        found["nll"].append(float(nll.mean()))
        found["loss"].append(float((nll + expected.gather(1, target).double()).mean()))
        # The difference first: where both say the same, nothing is left to round.
        found["kl"].append(float(((expected - now) * expected.exp()).sum(dim=-1, dtype=torch.float64).mean()))
        found["agreement"].append(float((expected.argmax(dim=-1) == now.argmax(dim=-1)).double().mean()))
    return {key: np.array(values) for key, values in found.items()}


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _effect(trial: Trial, found: Measured, seed: int) -> Effect:
    nll, loss, kl, agreement = (estimate(found[key], seed) for key in ("nll", "loss", "kl", "agreement"))
    rates = float(found["sink"].mean()), float(found["next"].mean())
    perplexity, ratio = exponential(nll), exponential(loss)
    return Effect(trial.name, trial.group, trial.control_of, perplexity, loss, ratio, kl, agreement, *rates)


# Head by head


def head_effects(
    model: PreTrainedModel, ids: Int[Tensor, "texts tokens"], sink: int = 0, *, seed: int = 0, stage: Stage = unwatched
) -> HeadEffects:
    """Take the sink from every head of every layer by itself, and an ordinary key soon after it as a control.

    The layers before the edit read each text once, the rest read one row for each edit.
    """
    layers, heads = len(blocks_of(model)), int(model.config.get_text_config().num_attention_heads)
    texts, tokens = ids.shape
    listen = stage("heads", 2 * layers * heads * ids.numel())
    control = others(sink, tokens, texts * layers * heads, torch.Generator().manual_seed(seed))
    control = control.view(texts, layers, heads)
    found = np.full((2, texts, layers, heads), np.nan)
    for number, text in enumerate(ids[:, None]):
        with observe(model, Lens()):  # the same arithmetic as with the edit
            base = _surprises(model, text)
        for layer in range(layers):
            pairs = torch.stack((torch.arange(heads).repeat(2), torch.full((2 * heads,), sink)), dim=1)
            pairs[heads:, 1] = control[number, layer]
            losses = []
            for some in pairs.split(_rows(model, tokens)):
                with _without_key(model, layer, some.to(ids.device), heads):
                    change = (_surprises(model, text) - base).double().cpu()
                counted = torch.arange(tokens - 1) != some[:, 1:]
                losses.append((change * counted).sum(dim=1) / counted.sum(dim=1))
                listen(len(some) * tokens)
            found[:, number, layer] = torch.cat(losses).view(2, heads).numpy()
    ends = np.array([[_ends(found[0, :, layer, head], seed) for head in range(heads)] for layer in range(layers)])
    removed, ordinary = found.mean(axis=1)
    return HeadEffects(texts, tokens, removed, ordinary, ends[..., 0], ends[..., 1])


def _ends(by_text: np.ndarray, seed: int) -> tuple[float, float]:
    sure = estimate(by_text, seed)
    return sure.low, sure.high


def _surprises(model: PreTrainedModel, text: Int[Tensor, "1 tokens"]) -> Float[Tensor, "rows predictions"]:
    logits = model(text, use_cache=False).logits
    # The last column predicts nothing that is known: it is scored like the others, and left out, to copy no logits.
    return surprise(logits.flatten(0, 1), text[0].roll(-1).repeat(len(logits))).view(len(logits), -1)[:, :-1]


@contextmanager
def _without_key(model: PreTrainedModel, layer: int, pairs: Int[Tensor, "rows 2"], heads: int) -> Iterator[None]:
    """From block `layer` on, as many rows as `pairs`, one (head, key) removed in each; renormalised."""
    chosen = torch.arange(heads, device=pairs.device) == pairs[:, :1]

    def bend(view: View, weights: Tensor) -> Tensor:
        if view.layer != layer:
            return weights
        key = view.keys[:, None] == pairs[:, 1, None, None]
        where = chosen[:, view.heads.start : view.heads.stop, None, None] & key[:, :, None]
        return scaled(weights, where, 0.0, renormalise=True)

    def spread(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0].expand(len(pairs), -1, -1), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].expand(len(pairs), -1, -1)}

    handle = blocks_of(model)[layer].register_forward_pre_hook(spread, with_kwargs=True)
    try:
        with observe(model, Lens(bend_weights=bend)):
            yield
    finally:
        handle.remove()


# What it comes to


def _verdict(rate: float, effects: tuple[Effect, ...], heads: HeadEffects | None) -> str:
    said = []
    for group in ("massive activation", "sink attention", "first tokens"):
        edit = next(effect for effect in effects if effect.group == group and "embedded" not in effect.name)
        controls = [effect.ratio.value for effect in effects if effect.control_of == edit.name]
        said.append(f"{edit.name}: perplexity x {edit.ratio.value:.4g} (controls at most x {max(controls):.4g})")
        if group == "massive activation":
            said[-1] += f", sink rate {rate:.1%} -> {edit.sink_rate:.1%}"
        if group == "sink attention":
            moved = rate > 0 and edit.next_rate > rate / 2
            said[-1] += f", the sink {'moves to' if moved else 'does not move to'} the next key ({edit.next_rate:.1%})"
    if heads is not None:
        said.append(_about_heads(heads))
    return "; ".join(said)


def _about_heads(heads: HeadEffects) -> str:
    matter = heads.matter
    order = [divmod(int(index), matter.shape[1]) for index in np.argsort(-heads.removed, axis=None)]
    named = [f"L{layer}H{head} {heads.removed[layer, head]:+.3f}" for layer, head in order if matter[layer, head]]
    if not named:
        return f"no single head's sink matters (of {matter.size}; the most is {heads.removed.max():+.3f} nats a token)"
    by_layer = np.where(matter, heads.removed, 0).sum(axis=1)
    layers = [int(layer) for layer in np.argsort(-by_layer)[:3] if by_layer[layer] > 0]
    return (
        f"the sink of {len(named)} of {matter.size} heads matters by itself, most in layers "
        f"{', '.join(map(str, layers))}: {', '.join(named[:5])} nats a token"
    )
