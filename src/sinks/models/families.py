"""Which models stream, how, and why the others do not: one table, used by the code, the tests and `sinks models`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sinks.errors import UnsupportedModel
from sinks.kernels.phase import Rotary
from sinks.models.alibi import geometric_slopes, mpt_slopes
from sinks.models.rotary import frequencies, rotary_modules, sinusoid_frequencies

Route = Literal["interface", "projections"]


@dataclass(frozen=True)
class Family:
    """What must be known about a `model_type` beyond its config.

    `route`: "interface" families call the attention function registered with transformers; for "projections" ones,
    attention is computed between their input and output projections. `pairing`: how RoPE pairs dimensions.
    `unturned`: which layers use no RoPE ("full_attention" layers, or those that `no_rope_layers` marks with 0).
    """

    model_type: str
    route: Route = "interface"
    pairing: Literal["half", "interleaved", "none"] = "half"
    last_dims: bool = False
    unturned: Literal["", "full_attention", "no_rope_layers"] = ""
    note: str = ""

    @property
    def positions(self) -> str:
        """The position scheme in a word."""
        return "ALiBi" if self.pairing == "none" else "RoPE"

    @property
    def convention(self) -> str:
        """How dimensions are paired, for the table."""
        return "-" if self.pairing == "none" else self.pairing


_TABLE = (
    Family("arcee"),
    Family("bloom", "projections", "none", note="ALiBi by cache distance"),
    Family("cohere", pairing="interleaved"),
    Family("cohere2", pairing="interleaved", unturned="full_attention", note="full layers are NoPE and take the sinks"),
    Family("deepseek_v3", last_dims=True, note="latent attention; keys are kept expanded"),
    Family("ernie4_5", pairing="interleaved"),
    Family("falcon", "projections", note="RoPE, or ALiBi by cache distance"),
    Family("gemma"),
    Family("gemma2", note="soft cap; sliding layers keep their window"),
    Family("gemma3_text", note="sliding layers keep their window"),
    Family("glm", pairing="interleaved", note="partial rotary"),
    Family("glm4", pairing="interleaved", note="partial rotary"),
    Family("gpt_neox", note="partial rotary (Pythia)"),
    Family("gpt_oss", note="learned sink logits beside the kept tokens; sliding layers keep their window"),
    Family("gptj", "projections", "interleaved", note="partial rotary"),
    Family("granite"),
    Family("granitemoe"),
    Family("helium", pairing="interleaved"),
    Family("llama"),
    Family("mistral", note="its own window stays where it is smaller than sinks + window"),
    Family("mixtral"),
    Family("mpt", "projections", "none", note="ALiBi by cache distance"),
    Family("nemotron", note="partial rotary"),
    Family("olmo"),
    Family("olmo2"),
    Family("olmo3", note="sliding layers keep their window"),
    Family("olmoe"),
    Family("phi", note="partial rotary"),
    Family("phi3", note="LongRoPE frozen at capacity"),
    Family("qwen2", note="sliding layers keep their window"),
    Family("qwen2_moe"),
    Family("qwen3", note="sliding layers keep their window"),
    Family("qwen3_moe"),
    Family("seed_oss"),
    Family("smollm3", unturned="no_rope_layers", note="every fourth layer is NoPE"),
    Family("stablelm", note="partial rotary"),
    Family("starcoder2"),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}

_LEARNED = "its positions are learned vectors added to the input: they are baked into every key, and the table ends"
_BY_ABSOLUTE = "it scales queries by the absolute position, which grows for ever in a stream"
_THREE_D = "its positions have three axes (M-RoPE), and a stream of tokens has one"
_RECURRENT = "its recurrent layers already run at constant memory and have no sinks to keep"
_ENCODER = "it is an encoder-decoder: its decoder cross-attends to an input of fixed length"

REFUSED: dict[str, str] = {
    "gpt2": _LEARNED,
    "gpt_neo": _LEARNED,
    "gpt_bigcode": _LEARNED,
    "openai-gpt": _LEARNED,
    "opt": _LEARNED,
    "biogpt": _LEARNED,
    "llama4_text": _BY_ABSOLUTE,
    "ministral3": _BY_ABSOLUTE,
    "mistral4": _BY_ABSOLUTE,
    "qwen2_vl": _THREE_D,
    "qwen2_5_vl": _THREE_D,
    "qwen3_vl": _THREE_D,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "falcon_mamba": _RECURRENT,
    "rwkv": _RECURRENT,
    "t5": _ENCODER,
    "bart": _ENCODER,
}


@dataclass(frozen=True)
class LayerScheme:
    """One layer: its own sliding window, and which rotary turns it (None: it is not turned)."""

    own_window: int | None
    rotary: str | None


@dataclass(frozen=True, eq=False)
class Scheme:
    """Everything a cache must know of one model.

    `rotaries(capacity)` gives the rotaries of its layers, with frequencies for a sequence of that many positions.
    `trained_length` is None where no length is too long (ALiBi).
    """

    family: Family
    layers: tuple[LayerScheme, ...]
    slopes: Float[Tensor, " heads"] | None
    trained_length: int | None
    rotaries: Callable[[int], dict[str, Rotary]]


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The transformer inside a causal language model, or the model itself if it has no head."""
    return cast(PreTrainedModel, model.base_model)


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model. Raises UnsupportedModel with the reason."""
    model_type = base_of(model).config.model_type
    if model_type in REFUSED:
        raise UnsupportedModel(f"{model_type} cannot stream: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{model_type} is not among the families that pass the one-layer law: see `sinks models --supported`"
        )
    return FAMILIES[model_type]


def describe(model: PreTrainedModel) -> Scheme:
    """Read from a model what its cache must know. Raises UnsupportedModel with the reason."""
    family, base = family_of(model), base_of(model)
    config: Any = base.config
    alibi = _slopes(family, config)
    return Scheme(
        family=family,
        layers=tuple(_layer(family, config, index, alibi is not None) for index in range(config.num_hidden_layers)),
        slopes=alibi,
        trained_length=None if alibi is not None else _trained_length(config),
        rotaries=partial(_rotaries, family, weakref.ref(base)),  # an attached model must not keep itself alive
    )


def _layer(family: Family, config: Any, index: int, alibi: bool) -> LayerScheme:
    layer_types = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None)
    kind = layer_types[index] if layer_types else ("sliding_attention" if sliding else "full_attention")
    if kind not in ("full_attention", "sliding_attention"):
        raise UnsupportedModel(f"layer {index} of this {family.model_type} is {kind}, which has no keys to keep")
    turned = not alibi and kind != family.unturned
    if family.unturned == "no_rope_layers":
        turned = bool(config.no_rope_layers[index])
    return LayerScheme(
        own_window=sliding if kind == "sliding_attention" else None,
        rotary=(kind if _is_nested(config) else "all") if turned else None,
    )


def _is_nested(config: Any) -> bool:
    """Whether each type of layer has rotary parameters of its own (Gemma 3, OLMo 3)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return any(isinstance(value, dict) for value in parameters.values())


def _rotaries(family: Family, model: weakref.ref[PreTrainedModel], capacity: int) -> dict[str, Rotary]:
    base = model()
    if base is None:
        raise UnsupportedModel("this model is gone: describe a model that is still in use")
    config: Any = base.config
    if _slopes(family, config) is not None:
        return {}
    if family.model_type == "gptj":
        found = {"all": sinusoid_frequencies(config.rotary_dim or config.n_embd)}
    else:
        module = rotary_modules(base)[0]
        kinds = sorted(set(config.layer_types)) if _is_nested(config) else [None]
        found = {kind or "all": frequencies(module, config, kind, capacity) for kind in kinds}
    first = config.qk_nope_head_dim if family.last_dims else 0
    return {kind: Rotary(inv_freq, family.pairing == "interleaved", first) for kind, inv_freq in found.items()}


def _slopes(family: Family, config: Any) -> Float[Tensor, " heads"] | None:
    if family.model_type == "bloom":
        return geometric_slopes(config.n_head)
    if family.model_type == "mpt":
        return mpt_slopes(config.n_heads)
    if family.model_type == "falcon" and config.alibi:
        # Falcon rounds its slopes to bfloat16 and scales them together with the product.
        head_dim = config.hidden_size // config.num_attention_heads
        return geometric_slopes(config.num_attention_heads).bfloat16().double() / head_dim**0.5
    return None


def _trained_length(config: Any) -> int:
    length = config.max_position_embeddings
    parameters = getattr(config, "rope_parameters", None) or {}
    if "dynamic" in str(parameters.get("rope_type")):
        return int(length * parameters["factor"])
    return length
