"""The shapes of known models, filled with random numbers: how fast a model writes does not depend on what it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sinks.cache.plan import Plan

LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model; `heads` are query and key heads, `tied` whether the output head is the input table."""

    name: str
    hidden: int
    layers: int
    heads: tuple[int, int]
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool

    def config(self) -> LlamaConfig:
        """As transformers describes it."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "head_dim": self.head_dim,
        }
        return LlamaConfig(
            **sizes, tie_word_embeddings=self.tied, max_position_embeddings=131_072, rope_parameters=LLAMA_3,
            eos_token_id=None, bos_token_id=None,
        )  # fmt: skip

    def build(self, device: str = "cuda", seed: int = 0) -> PreTrainedModel:
        """A bfloat16 model of this shape; the same weights for the same seed on the same kind of device."""
        torch.manual_seed(seed)
        with torch.device(device):
            model: nn.Module = AutoModelForCausalLM.from_config(self.config(), dtype=torch.bfloat16)
        return model.eval().requires_grad_(False)  # type: ignore[return-value]


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 576, 30, (9, 3), 64, 1536, 49_152, True),
        Shape("Llama-3.2-1B", 2048, 16, (32, 8), 64, 8192, 128_256, True),
        Shape("Llama-3-8B", 4096, 32, (32, 8), 128, 14_336, 128_256, False),
    )
}


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one step reads: all, but of a table that is not the head only the tokens' rows, a few."""
    table: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()
    tied = getattr(head, "weight", None) is table
    whole = sum(each.nbytes for each in model.parameters())
    return whole if tied else whole - table.nbytes


def ring_bytes(model: PreTrainedModel, plan: Plan, rows: int) -> int:
    """Bytes of keys and values that one step of so many rows reads, in the model's own data type."""
    config: Any = model.config
    each = config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return 2 * rows * config.num_hidden_layers * plan.capacity * each


def ceiling(read: int, rows: int, rate: float) -> float:
    """Tokens a second of `rows` rows if a step reads `read` bytes once, at `rate` TB/s, and nothing else takes time."""
    return rows * rate * 1e12 / read
