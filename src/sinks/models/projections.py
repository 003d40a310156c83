"""The second route: families whose attention calls no registered function.

The model runs each chunk as if it were alone. What its input projections produce is caught, and what enters its
output projection is replaced by attention over the sinks and the window. The model's own attention, over the chunk
only, is thrown away: wasteful for a long chunk, nothing for a single token, exact always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Projections:
    """Names of the projections of an attention module, and how their outputs become query, key and value heads.

    `split(module, outputs)` gives three `[batch, heads, columns, head_dim]`; `scale(module)` multiplies the scores.
    `dropout` names what holds the probability of dropping a weight. `spared` names keywords that the module is not
    given in a stream: its own attention, which is thrown away, would only fail on them.
    """

    inputs: tuple[str, ...]
    output: str
    split: Callable[[Any, list[Tensor]], Heads]
    scale: Callable[[Any], float]
    dropout: str
    spared: tuple[str, ...] = ()


def _swap(*heads: Tensor) -> Heads:
    query, key, value = (part.transpose(1, 2) for part in heads)
    return query, key, value


def _split_falcon(module: Any, outputs: list[Tensor]) -> Heads:
    (fused,) = outputs
    if module.new_decoder_architecture:
        per_group = module.num_heads // module.num_kv_heads
        grouped = fused.unflatten(-1, (module.num_kv_heads, per_group + 2, module.head_dim))
        return _swap(grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :])
    if module.multi_query:
        heads = fused.unflatten(-1, (module.num_heads + 2, module.head_dim))
        return _swap(heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :])
    return _split_interleaved(module, outputs)


def _split_interleaved(module: Any, outputs: list[Tensor]) -> Heads:
    (fused,) = outputs
    return _swap(*fused.unflatten(-1, (module.num_heads, 3, module.head_dim)).unbind(-2))


def _split_gptj(module: Any, outputs: list[Tensor]) -> Heads:
    return _swap(*(part.unflatten(-1, (module.num_attention_heads, module.head_dim)) for part in outputs))


def _split_mpt(module: Any, outputs: list[Tensor]) -> Heads:
    (fused,) = outputs
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    return _swap(*(part.unflatten(-1, (module.n_heads, module.head_dim)) for part in fused.chunk(3, dim=-1)))


def _root(module: Any) -> float:
    return module.head_dim**-0.5


PROJECTIONS: dict[str, Projections] = {
    "bloom": Projections(("query_key_value",), "dense", _split_interleaved, _root, "attention_dropout.p"),
    "falcon": Projections(("query_key_value",), "dense", _split_falcon, _root, "attention_dropout.p"),
    "gptj": Projections(("q_proj", "k_proj", "v_proj"), "out_proj", _split_gptj, _root, "attn_dropout.p"),
    # MPT's table of biases ends at the trained length, and with it the chunk that its own attention can take.
    "mpt": Projections(
        ("Wqkv",), "out_proj", _split_mpt, attrgetter("softmax_scale"), "attn_dropout_p", spared=("position_bias",)
    ),
}


def attention_modules(base: nn.Module, projections: Projections) -> list[nn.Module]:
    """The modules of a model that own all of these projections."""
    names = (*projections.inputs, projections.output)
    return [module for module in base.modules() if all(hasattr(module, name) for name in names)]
