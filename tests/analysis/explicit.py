"""Attention written out whole, T x T in float64: what every statistic of `analysis` is judged by.

Queries, keys and values are those that the layers meet (`probe(arrive=...)`); who sees whom, at which angle and with
which softmax is worked out here a second time, in the most literal way. `explicit(model, ids)` is dense attention under
the model's own masks, `explicit(model, ids, sinks=4, window=12)` what a stream through `SinkCache` attends to, and
`sinks=0` a plain window. Compare dense weights with `output_attentions=True` to 2e-6: transformers' eager softmax is in
float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinks.analysis.probe import Residual, probe
from sinks.cache.cache import SinkCache
from sinks.kernels.lens import Arrival
from sinks.models.families import base_of
from tests.oracle.restream import decoder_layers, own_windows


@dataclass(frozen=True, eq=False)
class Explicit:
    """By layer (and by depth), everything a text went through.

    `weights[layer]` is `[texts, heads, T, T]`, 0 where a query does not see a key; `visible[layer]` is `[T, T]`;
    `query`, `key`, `value` `[texts, heads | kv_heads, T, head_dim]`; `hidden[depth]` `[texts, T, width]`, depth 0
    entering block 0; `logit_mass[layer]` `[texts, heads, T]` what learned sink logits took, or None.
    """

    weights: list[Tensor]
    visible: list[Tensor]
    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    hidden: list[Tensor]
    logit_mass: list[Tensor | None]

    @property
    def stacked(self) -> Tensor:
        """All weights, `[layers, texts, heads, T, T]`."""
        return torch.stack(self.weights)

    @property
    def entropy(self) -> Tensor:
        """-sum p log p in nats, a sink logit as one more outcome: `[layers, texts, heads, T]`."""
        rows = torch.special.entr(self.stacked).sum(dim=-1)
        extra = [0.0 if mass is None else torch.special.entr(mass) for mass in self.logit_mass]
        return torch.stack([row + more for row, more in zip(rows, extra, strict=True)])

    @property
    def seen_keys(self) -> Tensor:
        """How many keys each query sees: `[layers, T]`."""
        return torch.stack(self.visible).sum(dim=-1)


@torch.no_grad()
def explicit(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    sinks: int | None = None,
    window: int | None = None,
    chunks: Iterable[int] | None = None,
    causal: bool = True,
    **inputs: Any,
) -> Explicit:
    """Run `ids` `[texts, T]` and write its attention out.

    With `window`, the (attached) model is fed through a `SinkCache` in `chunks` (None: at once). `causal=False` is for
    models like BERT. `inputs` go to the model as they are.
    """
    met = _Met(model.config.num_hidden_layers)
    with probe(model, arrive=met.arrive, residual=met.residual):
        if window is None:
            base_of(model)(ids, **inputs)
        else:
            cache = SinkCache.for_model(model, sinks=sinks or 0, window=window)
            for part in ids.split(list(chunks) if chunks else [ids.shape[1]], dim=1):
                base_of(model)(input_ids=part, past_key_values=cache, use_cache=True)
    query, key, value = (
        [torch.cat(parts, dim=2).double().cpu() for parts in layers] for layers in (met.query, met.key, met.value)
    )
    hidden = [torch.cat(parts, dim=1).double().cpu() for parts in met.hidden]
    rows = [_layer(model, index, query[index], key[index], (sinks or 0, window), causal) for index in range(len(query))]
    weights, visible, logit_mass = (list(column) for column in zip(*rows, strict=True))
    return Explicit(weights, visible, query, key, value, hidden, logit_mass)


class _Met:
    def __init__(self, layers: int) -> None:
        self.query: list[list[Tensor]] = [[] for _ in range(layers)]
        self.key: list[list[Tensor]] = [[] for _ in range(layers)]
        self.value: list[list[Tensor]] = [[] for _ in range(layers)]
        self.hidden: list[list[Tensor]] = [[] for _ in range(layers + 1)]

    def arrive(self, arrival: Arrival) -> None:
        self.query[arrival.layer].append(arrival.query)
        self.key[arrival.layer].append(arrival.key)
        self.value[arrival.layer].append(arrival.value)

    def residual(self, residual: Residual) -> None:
        self.hidden[residual.depth].append(residual.hidden)


def _layer(
    model: PreTrainedModel, index: int, query: Tensor, key: Tensor, plan: tuple[int, int | None], causal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights `[texts, heads, T, T]`, visibility `[T, T]`, and the mass of sink logits `[texts, heads, T]`."""
    config: Any = model.config
    tokens = query.shape[2]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    sinks, window = plan
    own = own_windows(model)[index] if causal else None
    if window is not None and own is not None and own < sinks + window:
        sinks, window = 0, own
    elif window is None and own is not None:
        sinks, window = 0, own
    seen = j <= i if causal else torch.ones(tokens, tokens, dtype=torch.bool)
    if window is not None:
        seen = seen & ((i - j < window) | (j < sinks))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2)
    if sinks and window is not None and tokens > sinks + window:
        # A sink is met by the query as it stands inside the cache (StreamingLLM, section 3.2).
        back = (torch.arange(tokens) - (sinks + window - 1)).clamp(min=0)
        scores[..., :sinks] = _turned(query, -back, _frequencies(model, index)) @ key[..., :sinks, :].transpose(-1, -2)
    attention = _attention(model, index)
    scores = scores * getattr(attention, "scaling", query.shape[-1] ** -0.5)
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    logits = getattr(attention, "sinks", None)
    if not isinstance(logits, Tensor):
        return scores.softmax(dim=-1), seen, None
    column = logits.double().cpu()[None, :, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)
    return weights[..., :-1], seen, weights[..., -1]


def _attention(model: PreTrainedModel, index: int) -> Any:
    block = decoder_layers(model, model.config.num_hidden_layers)[index]
    return getattr(block, "self_attn", None) or getattr(block, "attention", None)


def _frequencies(model: PreTrainedModel, index: int) -> Tensor:
    """Radians a position of one layer: half-paired RoPE without scaling."""
    rotary: Any = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    kinds = getattr(model.config, "layer_types", None)
    name = f"{kinds[index]}_inv_freq" if kinds and hasattr(rotary, f"{kinds[index]}_inv_freq") else "inv_freq"
    return getattr(rotary, name).double()


def _turned(heads: Tensor, by: Tensor, frequencies: Tensor) -> Tensor:
    angles = by[:, None] * frequencies
    first, second = heads.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )
