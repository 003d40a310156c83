"""A second oracle, for every family and any number of layers, made of nothing but stock dense forwards.

What a layer knows of an earlier token j is the hidden state h(j) that entered it when j was fed: key and value follow
from it. So StreamingLLM's rule at time t is this: run the *unchanged* dense model over the tokens that are kept
(sinks, then recent, positions 0, 1, 2, ... as for any short text), but at the door of each layer put back the hidden
states that the kept tokens had in their own time. The last row of the output is the answer for t, and the states that
it had at each door are remembered for later. The library's attention, cache and positions play no part, and neither
does any family's special case: partial rotation, NoPE layers, ALiBi, latent attention and learned sinks are whatever
transformers makes of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families.tiny import exactly
from tests.oracle.streaming_llm import visible


def frozen_at(model: PreTrainedModel, capacity: int) -> PreTrainedModel:
    """A stock copy for use inside `exactly()`, with the frequencies for `capacity` at every length.

    Frequencies, and the factor by which YaRN and LongRoPE scale cosines, stay the float32 numbers that transformers
    computes from the configuration: they belong to the model. What becomes exact is position x frequency, and all that
    follows.
    """
    copied = copy.deepcopy(model)
    rope = getattr(copied.config, "rope_parameters", None) or {}
    longrope = rope.get("rope_type") == "longrope"
    if longrope:
        chosen = "long_factor" if capacity > rope["original_max_position_embeddings"] else "short_factor"
        rope["long_factor"] = rope["short_factor"] = rope[chosen]
    for module in copied.modules():
        if longrope and "rotary" in type(module).__name__.lower():
            frequencies = type(module)(copied.config).inv_freq.double()
            module.inv_freq, module.original_inv_freq, module.long_inv_freq = frequencies, frequencies, frequencies
        for name, value in vars(module).items():
            if name.endswith("attention_scaling"):
                setattr(module, name, torch.tensor(value, dtype=torch.float32).item())
        if isinstance(getattr(module, "embed_positions", None), Tensor):  # gptj: a table of sines and cosines
            module.embed_positions = _gptj_table(copied.config.n_positions, copied.config.rotary_dim)
    return copied


def _gptj_table(length: int, dim: int) -> Tensor:
    frequencies = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.double()
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def decoder_layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The decoder layers of any transformers model: its first module list with one entry a layer."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise AssertionError("no list of decoder layers found")


def own_windows(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer, None where there is none."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        config.num_hidden_layers
    )
    return [window if kind == "sliding_attention" else None for kind in kinds]


class Restream:
    """StreamingLLM's rule for one row of any causal language model, one token a step, in float64.

    Layers with a sliding window of their own see the last tokens of the kept sequence; this is right while that
    window is at most `window` (they need nothing that was let go) or at least `sinks + window` (it hides nothing).
    """

    def __init__(self, model: PreTrainedModel, sinks: int, window: int) -> None:
        self.model = frozen_at(model, sinks + window)
        self.sinks, self.window = sinks, window
        self.ids: list[int] = []
        self.layers = decoder_layers(self.model, self.model.config.num_hidden_layers)
        self.own = [window if window and window < sinks + self.window else None for window in own_windows(self.model)]
        # per layer: stream position -> hidden state that entered, [hidden]
        self.doors: list[dict[int, Tensor]] = [{} for _ in self.layers]

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Feeds tokens one by one. Returns the logits after each, float64[len(tokens), vocabulary]."""
        return torch.stack([self.step(int(token)) for token in tokens])

    def step(self, token: int) -> Tensor:
        """Feeds one token. Returns the logits that follow it, float64[vocabulary]."""
        self.ids.append(token)
        seen = len(self.ids)
        logits = torch.empty(0)
        kept = [list(range(seen))[-own:] if own else visible(seen, self.sinks, self.window) for own in self.own]
        for positions, group in groupby(range(len(self.layers)), key=kept.__getitem__):
            with exactly(), self._history(positions, list(group)):
                output = self.model(input_ids=torch.tensor([[self.ids[j] for j in positions]]), use_cache=False)
            logits = output.logits[0, -1]
        for door, positions in zip(self.doors, kept, strict=True):
            for gone in door.keys() - set(positions):
                del door[gone]
        return logits

    @contextmanager
    def _history(self, positions: list[int], group: list[int]) -> Iterator[None]:
        """Layers of `group` find their own history; the state at the next door is remembered for the next group."""
        handles = [
            self.layers[i].register_forward_pre_hook(self._door(self.doors[i], positions, i in group), with_kwargs=True)
            for i in [*group, group[-1] + 1]
            if i < len(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _door(door: dict[int, Tensor], positions: list[int], replace: bool) -> Any:
        def put_back(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            door.setdefault(positions[-1], hidden[0, -1].clone())
            if replace:
                hidden = torch.stack([door[j] for j in positions])[None]
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return put_back


def restream(model: PreTrainedModel, tokens: Sequence[int], sinks: int, window: int) -> Tensor:
    """Logits after every token of one row, float64[len(tokens), vocabulary]."""
    return Restream(model, sinks, window).feed(tokens)
