"""`attach(model)`: lets a model of transformers hand its unturned queries and keys to a streaming cache.

Public hooks only. For a forward pass with a streaming cache, a hook on the model opens the pass, a hook on the rotary
module replaces the position ids by zeros (so that queries and keys arrive unturned), and the registered attention
function asks the cache. Any other pass goes to the model's own attention, bit for bit as before.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinks.errors import CacheError, InvalidInput, UnsupportedModel, UnsupportedOption
from sinks.kernels.lens import Lens
from sinks.models.families import Scheme, base_of, describe
from sinks.models.projections import PROJECTIONS, Projections, attention_modules
from sinks.models.rotary import rotary_modules
from sinks.types import StreamCache

NAME = "sinks"
OBSERVED = "sinks-observed"
"""The implementation of a model under observation (`models/observe.py`), attached or not."""

DROPOUT = "dropout in attention is not applied to a stream, or under observation: call model.eval() first"
# What the attention function may be given without its changing anything: the cache already knows the rest.
HARMLESS = frozenset(
    "position_ids use_cache output_router_logits is_causal logits_to_keep cache_position num_items_in_batch return_dict"
    " output_hidden_states sliding_window softcap s_aux output_attentions scaling dropout".split()
)
MARK = "sinks_attached"


@dataclass(eq=False)
class Attachment:
    """What `attach` did to one model, so that `detach` can undo it; `parameters` are those of its forward."""

    scheme: Scheme
    stock: str
    parameters: tuple[str, ...]
    handles: list[Any] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Pass:
    """The forward pass that is running: its model's attachment, the cache that drives it, if one does, and lenses."""

    attachment: Attachment
    cache: StreamCache | None
    lenses: tuple[Lens, ...] = ()
    caught: dict[nn.Module, Tensor] = field(default_factory=dict)


_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
_PASS: ContextVar[Pass | None] = ContextVar("sinks_pass", default=None)

LENSES: weakref.WeakKeyDictionary[nn.Module, list[Lens]] = weakref.WeakKeyDictionary()
"""What observes each model now; kept by `models/observe.py`."""


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` stream with a `SinkCache`, and return it. Attaching twice is attaching once.

    A pass without a `SinkCache` still gives exactly what it gave before. Raises UnsupportedModel with the reason,
    InvalidInput for what is no transformers model, and CacheError for a copy of an attached model.
    """
    if not (isinstance(model, nn.Module) and hasattr(model, "base_model")):
        raise InvalidInput(f"{type(model).__name__}: attach takes a model of transformers, the whole of it")
    base = base_of(model)
    if base in _ATTACHED:
        return model
    if hasattr(base, MARK):
        raise CacheError("this model is a copy of an attached one, hooks and all: detach, copy, then attach")
    parameters = tuple(inspect.signature(base.forward).parameters)
    attachment = Attachment(describe(model), str(model.config._attn_implementation), parameters)
    _ATTACHED[base] = attachment
    setattr(base, MARK, True)
    try:
        if attachment.scheme.family.route == "interface":
            _use_interface(model, attachment)
        else:
            _use_projections(base, PROJECTIONS[attachment.scheme.family.model_type], attachment)
        before = base.register_forward_pre_hook(_opener(attachment), with_kwargs=True)
        after = base.register_forward_hook(_close, with_kwargs=True, always_call=True)
        attachment.handles += [before, after]
    except BaseException:
        detach(model)
        raise
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`, and return the model. A model that is not attached is left alone."""
    attachment = _ATTACHED.pop(base_of(model), None)
    if attachment is None:
        return model
    delattr(base_of(model), MARK)
    for handle in attachment.handles:
        handle.remove()
    if attachment.scheme.family.route == "interface" and model.config._attn_implementation == NAME:
        model.set_attn_implementation(attachment.stock)
    return model


# The interface route


def _use_interface(model: PreTrainedModel, attachment: Attachment) -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    if base_of(model).config._attn_implementation != NAME:
        raise UnsupportedModel(
            f"{attachment.scheme.family.model_type} does not take a registered attention function in this version of "
            "transformers"
        )
    for module in rotary_modules(base_of(model)):
        attachment.handles.append(module.register_forward_pre_hook(_zero_positions, with_kwargs=True))


def _zero_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """At position 0 the cosine is 1 and the sine 0: the model's own rotation leaves queries and keys alone."""
    if streaming() is None:
        return None
    if "position_ids" in kwargs:
        return args, kwargs | {"position_ids": torch.zeros_like(kwargs["position_ids"])}
    return (args[0], torch.zeros_like(args[1]), *args[2:]), kwargs


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The function registered with transformers: [batch, heads, columns, head_dim] in, columns before heads out."""
    if streaming() is None:
        return _stock_attention(module)(module, query, key, value, attention_mask, **kwargs)
    return stream_attention(module, query, key, value, **kwargs)


def stream_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of a pass that a streaming cache drives, by that cache."""
    check_options(kwargs, "a SinkCache")
    if kwargs.get("is_causal") is False:
        raise UnsupportedOption("a stream is causal: is_causal=False cannot be honoured")
    running = cast(Pass, _PASS.get())
    cache = cast(StreamCache, running.cache)
    options = scoring_options(query, kwargs) | {"lenses": running.lenses}
    return cache.attend(module.layer_idx, query, key, value, **options).transpose(1, 2).contiguous(), None


def scoring_options(query: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What transformers says of the scores, in the words of `Scoring`."""
    scale = kwargs.get("scaling")
    return {
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": kwargs.get("softcap"),
        "sink_logits": kwargs.get("s_aux"),
    }


def check_options(kwargs: dict[str, Any], who: str) -> None:
    """Refuse, in the name of `who`, what an attention function was asked for and would not do."""
    if kwargs.get("dropout"):
        raise UnsupportedOption(DROPOUT)
    unknown = [name for name, value in kwargs.items() if value is not None and name not in HARMLESS]
    if unknown:
        raise UnsupportedOption(f"{who} cannot honour {', '.join(unknown)}: leave it out")


def _stock_attention(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(_stock_name(module.config), eager)


def _stock_name(config: Any) -> str:
    """What an attached model attends with when it does not stream.

    Also asked outside of any pass: `generate` builds masks for static caches beforehand, and gradient checkpointing
    runs single layers again afterwards.
    """
    running = _PASS.get()
    if running is not None:
        return running.attachment.stock
    for base, attachment in _ATTACHED.items():
        if base.config is config:
            return attachment.stock
    raise CacheError("this model is a copy of an attached one, hooks and all: detach, copy, then attach")


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The mask function registered with transformers: a stream needs none, anything else gets its own."""
    if streaming() is not None:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[_stock_name(kwargs["config"])](*args, **kwargs)


# The projections route


def _use_projections(base: nn.Module, projections: Projections, attachment: Attachment) -> None:
    for module in attention_modules(base, projections):
        for name in projections.inputs:
            attachment.handles.append(module.get_submodule(name).register_forward_hook(_catch))
        attachment.handles.append(module.register_forward_pre_hook(_sparer(projections), with_kwargs=True))
        output = module.get_submodule(projections.output)
        attachment.handles.append(output.register_forward_pre_hook(_replacer(module, projections)))


def _sparer(projections: Projections) -> Callable[..., Any]:
    def spare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        return None if streaming() is None else (args, kwargs | dict.fromkeys(projections.spared))

    return spare


def _catch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    running = _PASS.get()
    if running is not None and running.cache is not None:
        running.caught[module] = output


def _replacer(module: Any, projections: Projections) -> Callable[..., Any]:
    def replace(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        running = _PASS.get()
        if running is None or running.cache is None:
            return None
        if module.training and attrgetter(projections.dropout)(module):
            raise UnsupportedOption(DROPOUT)
        caught = [running.caught.pop(module.get_submodule(name)) for name in projections.inputs]
        query, key, value = projections.split(module, caught)
        options = {"scale": projections.scale(module), "softcap": None, "sink_logits": None, "lenses": running.lenses}
        out = running.cache.attend(module.layer_idx, query, key, value, **options)
        return (out.transpose(1, 2).flatten(2),)

    return replace


# The pass


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """What `attach` did to this model, if it did."""
    return _ATTACHED.get(base_of(model))


def streaming() -> StreamCache | None:
    """The streaming cache that drives the forward pass now running, if one does."""
    running = _PASS.get()
    return None if running is None else running.cache


def _opener(attachment: Attachment) -> Callable[..., Any]:
    def open_pass(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        kwargs = dict(zip(attachment.parameters, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        lenses = tuple(LENSES.get(base, ()))
        if not isinstance(cache, StreamCache):
            if lenses and attachment.scheme.family.route == "projections":
                raise UnsupportedOption(
                    "this model computes its attention itself, so only a stream of it can be observed: read it through "
                    "a SinkCache with a window at least as long as the text, which is the same attention"
                )
            _PASS.set(Pass(attachment, None))
            return None
        _PASS.set(None)
        inputs = _inputs(kwargs)
        _check_pass(base, attachment, kwargs)
        rows, columns = inputs.shape[:2]
        mask = _new_columns(kwargs.get("attention_mask"), rows, columns, cache)
        cache.open_pass(base, (rows, columns), mask, kwargs.get("position_ids"))
        _PASS.set(Pass(attachment, cache, lenses))
        return (), kwargs | _stand_ins(attachment, inputs)

    return open_pass


def _inputs(kwargs: dict[str, Any]) -> Tensor:
    """Token ids or embeddings, whichever the model was given."""
    given = [kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
    if len(given) != 1:
        raise InvalidInput("give the model either input_ids or inputs_embeds")
    return given[0]


def _stand_ins(attachment: Attachment, inputs: Tensor) -> dict[str, Any]:
    """What the model itself is shown in a stream: no mask, since the cache knows the pads."""
    if attachment.scheme.family.route == "interface":
        return {"attention_mask": None}
    # On the second route the model runs the chunk as if alone, so it must not meet the past at all.
    shown: dict[str, Any] = {"attention_mask": None, "past_key_values": None, "use_cache": False}
    if attachment.scheme.family.pairing != "none":
        shown["position_ids"] = torch.zeros(1, inputs.shape[1], dtype=torch.int64, device=inputs.device)
    return shown


def _check_pass(base: Any, attachment: Attachment, kwargs: dict[str, Any]) -> None:
    implementation = base.config._attn_implementation
    if attachment.scheme.family.route == "interface" and implementation not in (NAME, OBSERVED):
        raise CacheError(
            f"the attention implementation was set to {implementation!r} after attach(model), so a SinkCache would not "
            "be asked: call detach(model), then attach(model)"
        )
    asked = kwargs.get("output_attentions")
    if base.config.output_attentions if asked is None else asked:
        raise UnsupportedOption(
            "output_attentions needs the whole attention matrix, which a stream never builds: leave it out"
        )
    asked = kwargs.get("return_dict")
    as_tuple = (base.config.return_dict if asked is None else asked) is False
    if as_tuple and attachment.scheme.family.route == "projections":
        raise UnsupportedOption("return_dict=False gives a tuple, which cannot carry the cache back: leave it out")


def _new_columns(mask: Any, rows: int, columns: int, cache: StreamCache) -> Tensor | None:
    """The part of a padding mask that belongs to the new columns, as booleans."""
    fed = cache.get_seq_length()
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UnsupportedOption(
            "a SinkCache decides itself who sees whom: give a 2-D attention_mask that marks pads, or none"
        )
    if mask.shape[0] != rows or mask.shape[1] not in (columns, fed + columns):
        raise InvalidInput(
            f"attention_mask has {mask.shape[0]} rows and {mask.shape[1]} columns: give {rows} rows, and {columns} "
            f"columns for the new tokens or {fed + columns} for everything fed"
        )
    new = mask[:, -columns:]
    if not bool(((new == 0) | (new == 1)).all()):
        raise InvalidInput("attention_mask holds values that are neither 0 nor 1: mark real tokens by 1 and pads by 0")
    if mask.shape[1] > columns and mask[:, :-columns].bool().sum(dim=1).tolist() != cache.seen:
        raise UnsupportedOption(
            "attention_mask marks other pads than when those tokens were fed, and a stream takes nothing back: give "
            "the mask of the new tokens"
        )
    return new.bool()


def _close(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    running = _PASS.get()
    _PASS.set(None)
    if running is None or running.cache is None:
        return None
    running.cache.close_pass(complete=output is not None)
    if output is not None and running.attachment.scheme.family.route == "projections":
        output.past_key_values = running.cache
    return output
