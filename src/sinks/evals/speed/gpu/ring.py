"""A stream whose rings lie open on the device: a step of a model's own modules that a CUDA graph can hold.

`OpenStream` is a streaming cache as an attached model drives it, one token a row, through `attend_step`. Positions are
counted on the device, so one captured pass serves every moment of the stream. It works for a model that is shared
between processes too: what arrives are the heads of this process's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinks.cache.plan import Plan
from sinks.cache.rings.ring import Ring
from sinks.errors import CacheError, UnsupportedOption
from sinks.evals.speed.gpu.clock import captured
from sinks.kernels import Scoring, Step, attend_step
from sinks.models.attach import attach, attachment_of, detach
from sinks.models.families import describe

Rings = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of every layer, `[rows, kv_heads, sinks + window, head_dim]`."""


class OpenStream(Cache):
    """Rings of `rows` streams of an attached model, random to begin with, that stand at `position`.

    For measuring, and for passes of one token a row alone. `rings` are given where they are there already.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, rows: int, position: int, rings: Rings | None = None
    ) -> None:
        scheme = describe(model)
        if scheme.slopes is not None or any(layer.own_window is not None for layer in scheme.layers):
            raise UnsupportedOption("an open stream is for models with one rotary and no window of their own")
        layers = [Ring(plan) for _ in scheme.layers]  # they hold nothing: transformers asks them how long they are
        for layer in layers:
            layer.gate.is_open = True  # every pass of this stream is ours
        super().__init__(layers=list(layers))
        self.plan = plan
        self.positions = torch.full((rows,), position, dtype=torch.int64, device=model.device)
        self.rings: list[tuple[Tensor, Tensor] | None] = list(rings or [None] * len(scheme.layers))
        self._steps: list[Step | None] = [None] * len(scheme.layers)
        self._rotary = scheme.rotaries(plan.capacity)[str(scheme.layers[0].rotary)]

    @property
    def seen(self) -> list[int]:
        """Nobody asks on the host: the count is on the device."""
        return []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are counted on the device."""
        return 0

    def open_pass(self, model: object, shape: tuple[int, int], mask: Tensor | None, positions: Tensor | None) -> None:
        """Begin a pass of one token a row."""
        if shape != (len(self.positions), 1) or mask is not None:
            raise CacheError(f"an open stream takes one token for each of {len(self.positions)} rows, not {shape}")

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, lenses: Sequence[object] = (), **options: Any
    ) -> Tensor:
        """Attention of one layer's new tokens, `[rows, heads, 1, head_dim]`."""
        query, key, value = (part[:, :, 0] for part in (query, key, value))
        keys, values = self._ring(layer, key)
        step = self._steps[layer]
        if step is None:
            scoring = Scoring(rotary=self._rotary, **options)
            sizes: dict[str, Any] = {"sinks": self.plan.sinks, "window": self.plan.window}
            self._steps[layer] = step = Step.prepare(query, keys, scoring=scoring, **sizes)
        return attend_step(step, query, key, value, keys, values, self.positions)[0].unsqueeze(2)

    def close_pass(self, complete: bool) -> None:
        """End the pass: every row stands one further."""
        self.positions += 1

    def _ring(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        held = self.rings[layer]
        if held is None:
            shape = (len(key), key.shape[1], self.plan.capacity, key.shape[2])
            made: dict[str, Any] = {"dtype": key.dtype, "device": key.device}
            self.rings[layer] = held = torch.randn(shape, **made), torch.randn(shape, **made)
        return held


class ModuleSteps:
    """Greedy steps of a model's own modules over an `OpenStream`, in one CUDA graph."""

    def __init__(
        self, model: PreTrainedModel, plan: Plan, rows: int, position: int, rings: Rings | None = None
    ) -> None:
        mine = attachment_of(model) is None
        self.stream = OpenStream(attach(model), plan, rows, position, rings)
        self.ids = torch.randint(model.config.vocab_size, (rows, 1), device=model.device)
        self.logits: Tensor = torch.empty(0)
        self._model = model
        with torch.no_grad():
            self._graph = captured(self._step)
        if mine:
            detach(model)  # the graph needs the modules no more, and others may want them as they were

    def _step(self) -> None:
        self.logits = self._model(input_ids=self.ids, past_key_values=self.stream, use_cache=True).logits[:, -1]
        self.ids.copy_(self.logits.argmax(dim=-1, keepdim=True))

    def run(self, steps: int) -> None:
        """Replay so many steps; the host only launches them."""
        for _ in range(steps):
            self._graph.replay()
