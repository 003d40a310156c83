"""The rotary frequencies of a model, as it would use them for a sequence exactly as long as the cache."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Types whose frequencies depend on how long the present sequence is. A stream has no length, so they are taken once
# for a sequence of `capacity` positions, the only positions that ever occur, and never change again.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def rotary_modules(base: nn.Module) -> list[nn.Module]:
    """Every module that turns position ids into cosines and sines."""
    return [module for module in base.modules() if hasattr(module, "rope_type")]


def frequencies(
    module: Any, config: PreTrainedConfig, layer_type: str | None, capacity: int
) -> Float[Tensor, " pairs"]:
    """Radians a position for each pair of dimensions, float64 on the CPU.

    The model's own float32 buffer is taken where it is one: a fresh formula may differ in the last bit, which is
    1e-4 radians at a distance of 4,096. `model.to(torch.bfloat16)` rounds that buffer too; then it is recomputed.
    """
    rope_type = module.rope_type if layer_type is None else module.rope_type[layer_type]
    by_type = {} if layer_type is None else {"layer_type": layer_type}
    if any(name in rope_type for name in LENGTH_DEPENDENT):
        return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=capacity, **by_type)[0].double()
    buffer = getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")
    if buffer.dtype in (torch.float32, torch.float64):
        return buffer.detach().cpu().double()
    if rope_type == "default":
        with torch.device("cpu"):  # its own argument `device` is deprecated from transformers 5.17 on
            return module.compute_default_rope_parameters(config, **by_type)[0].double()
    return ROPE_INIT_FUNCTIONS[rope_type](config, device=torch.device("cpu"), **by_type)[0].double()


def sinusoid_frequencies(rotary_dim: int) -> Float[Tensor, " pairs"]:
    """GPT-J's, whose tables hold the sines of `position / 10000^(2i / rotary_dim)` (arXiv 2104.09864)."""
    exponents = torch.arange(0, rotary_dim, 2).float() / rotary_dim
    return (1.0 / 10000**exponents).double()
