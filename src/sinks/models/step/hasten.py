"""`hasten(model)`: decode steps of a Llama-shaped model without what a module tree costs.

A step of one token through thirty blocks is a thousand small calls, and on a CPU half of its time is spent between
them. `hasten` gives the model object a `forward` of its own, which knows one case, a `SinkCache`, one new token a row
and nothing else asked for, and passes every other call on to the model's own. The same cache is driven through the
same verbs (`open_pass`, `attend`, `close_pass`), so steps and chunks, forks and snapshots mix as before.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sinks.errors import CacheError
from sinks.models.attach import LENSES, attachment_of
from sinks.models.families import base_of
from sinks.models.rotary import rotary_modules
from sinks.models.step.blocks import StepModel, step_model, why_not
from sinks.models.step.device.step import DeviceModel, DeviceStep
from sinks.models.step.device.weights import why_no_device_step
from sinks.models.step.native import NativeStep, native_reason
from sinks.models.step.slots import SeatCache, Seats, SlotCache
from sinks.types import StreamCache

PLAIN = {"input_ids", "past_key_values", "use_cache"}


def hasten(model: PreTrainedModel) -> PreTrainedModel:
    """Give `model` lean decode steps, and return it. Doing so twice is doing so once; `unhasten` undoes it.

    Before or after `attach`. Projections of one input become views of one weight: edit them in place, or replace them;
    the next prompt takes up new ones, and so does the next step once the model was moved or cast. While hooks sit on
    modules inside the model, or a lens observes it, or gradients are on, it runs as before.

    Raises UnsupportedModel, with the reason, for a model that is not Llama-shaped.
    """
    if not is_hastened(model):
        model.forward = LeanForward(model)
    return model


def unhasten(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `hasten`, and return the model. A model that is not hastened is left alone."""
    if is_hastened(model):
        del model.forward
    return model


def is_hastened(model: PreTrainedModel) -> bool:
    """Whether decode steps of this model are lean."""
    return isinstance(model.forward, LeanForward)


def steps_of(model: PreTrainedModel) -> str:
    """How this model decodes, in words: captured, compiled, lean or ordinary steps, and why no better ones."""
    if not is_hastened(model):
        reason = why_not(model) if model.device.type == "cpu" else why_no_device_step(model)
        return f"ordinary decode steps, since {reason or 'it is not hastened'}"
    if model.device.type != "cpu":
        reason = why_no_device_step(model)
        captured = "decode steps in one CUDA graph"
        return captured if reason is None else f"lean decode steps, no CUDA graph, since {reason}"
    reason = native_reason(model)
    return "compiled decode steps" if reason is None else f"lean decode steps, not compiled, since {reason}"


class LeanForward:
    """The `forward` of one hastened model: a lean step where it is one, the model's own forward otherwise."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.__signature__ = inspect.signature(model.forward)  # transformers asks what a model can be given
        self._take(model)

    def _take(self, model: PreTrainedModel) -> None:
        self.lean = step_model(model)
        on_gpu = model.device.type != "cpu"
        self.device = DeviceModel(model) if on_gpu and why_no_device_step(model) is None else None
        self.native = NativeStep(model) if not on_gpu and native_reason(model) is None else None
        base = base_of(model)
        spared = {model, base, *rotary_modules(base)}  # `attach` hooks these, and means no other computation by it
        inside = [module for module in model.modules() if module not in spared]
        self._hooks = [held for module in inside for held in (module._forward_hooks, module._forward_pre_hooks)]
        self._place = _place(model)
        owners = [held for module in model.modules() for held in (module._parameters, module._modules)]
        self._parts = [(held, name, part) for held in owners for name, part in held.items()]

    def _is_current(self, model: PreTrainedModel, closely: bool) -> bool:
        """Whether the model is where it was; `closely`: and made of the same modules and weights."""
        if _place(model) != self._place:
            return False
        return not closely or all(held.get(name) is part for held, name, part in self._parts)

    def captured(self, seats: Seats) -> DeviceStep | None:
        """The captured step over these seats, for whoever drives it himself; None where this call would not take it."""
        model: Any = self._model()
        if self.device is None or not is_plain(model) or any(self._hooks) or not self._is_current(model, closely=False):
            return None
        return self.device.step(seats)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        lean = not args and is_step(model, kwargs) and not any(self._hooks)
        # Every prompt looks closely at the weights; a step, which takes no longer than that look, only where they are.
        if not self._is_current(model, closely=not lean):
            if why_not(model) is not None:
                unhasten(model)
                lean = False
            else:
                self._take(model)
        if not lean:
            return type(model).forward(model, *args, **kwargs)
        cache = kwargs["past_key_values"]
        logits = step(self, base_of(model), kwargs["input_ids"], cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise CacheError("a copy of a hastened model would compute with the original's weights: unhasten it first")

    def __reduce__(self) -> NoReturn:
        raise CacheError("a hastened model cannot be pickled: unhasten it first")


def _place(model: PreTrainedModel) -> tuple[Any, ...]:
    weight: Any = model.get_input_embeddings().weight
    return weight.data_ptr(), weight.device, weight.dtype


def is_step(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """One new token a row into a streaming cache, nothing else asked for, nobody looking."""
    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1 or not isinstance(cache, StreamCache):
        return False
    more = [name for name, value in kwargs.items() if name not in PLAIN and value is not None]
    return not more and kwargs.get("use_cache") is not False and is_plain(model)


def is_plain(model: PreTrainedModel) -> bool:
    """Whether nothing is asked of this model's passes but logits, and nobody looks at them."""
    if torch.is_grad_enabled() or model.training:
        return False
    config: Any = model.config
    asked = config.output_attentions or config.output_hidden_states or config.return_dict is False
    return not asked and attachment_of(model) is not None and not LENSES.get(base_of(model))


def step(
    steps: LeanForward, owner: nn.Module, ids: Int[Tensor, "rows 1"], cache: StreamCache
) -> Float[Tensor, "rows 1 vocab"]:
    """Feed one token a row to the `cache` of the model `owner`; the logits behind them.

    In one CUDA graph, or by the compiled step of a CPU, where the model has one and the cache lays open what it works
    on; else through `cache.attend`.
    """
    cache.open_pass(owner, (len(ids), 1), None, None)
    complete = False
    try:
        seating = cache.step_seats() if steps.device is not None and isinstance(cache, SeatCache) else None
        slots = cache.step_slots() if steps.native is not None and isinstance(cache, SlotCache) else None
        if steps.device is not None and seating is not None:
            # The step writes its next logits over these.
            logits = steps.device.step(seating.seats)(ids[:, 0], seating.rows, seating.positions).clone()
        elif steps.native is not None and slots is not None:
            logits = steps.native(steps.lean.embed(ids[:, 0]), slots)
        else:
            lean = steps.lean
            logits = lean.head(lean.norm(_through_blocks(lean, ids, cache)))
        complete = True
    finally:
        cache.close_pass(complete)
    return logits.unsqueeze(1)


def _through_blocks(lean: StepModel, ids: Tensor, cache: StreamCache) -> Tensor:
    rows, dim = len(ids), lean.head_dim
    queries, keys = lean.heads
    options = {"scale": lean.scale, "softcap": None, "sink_logits": None}
    states = lean.embed(ids[:, 0])
    for layer, block in enumerate(lean.blocks):
        heads = block.qkv(block.before_attention(states)).view(rows, queries + 2 * keys, 1, dim)
        query, key, value = heads.split((queries, keys, keys), dim=1)
        if block.head_norms is not None:
            query, key = block.head_norms[0](query), block.head_norms[1](key)
        seen = cache.attend(layer, query, key, value, **options)
        states = states + block.after_attention(block.out(seen.reshape(rows, -1)))
        gate, up = block.gate_up(block.before_mlp(states)).chunk(2, dim=-1)
        states = states + block.after_mlp(block.down(block.activation(gate) * up))
    return states
