"""StreamingLLM, written down a second time in the most literal way, to judge the library by.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), section 3.2: keep the keys
and values of the first `sinks` tokens and of the `window` most recent ones (the current token included); a position
is the place in the cache, not in the text.

One token a step, everything in float64 from the checkpoint's own tensors (or, to learn what a lower precision costs,
all of it in that precision). Keys are kept as they were *before* rotation, in a plain list, oldest first. At every
step each key is rotated afresh by (its index in the list) x (inverse frequency). The inverse frequencies are the
model's own, the float32 numbers that transformers computes; from there on angles are float64. There are no phases, no
ring, no second angle and no mask here: nothing of what the library does to be fast.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel


class StreamingLLM:
    """Llama-shaped models (llama, and mistral or qwen2 without windows of their own), plain RoPE, one row.

    Args:
        model: where the weights and the configuration come from; nothing of its code is used.
        sinks, window: as in the paper, the current token counted in `window`.
        dtype: of all arithmetic but the angles, which are float64 and rounded once, as cosines and sines.
    """

    def __init__(self, model: PreTrainedModel, sinks: int, window: int, dtype: torch.dtype = torch.float64) -> None:
        config = model.config
        self.weights = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps: float = config.rms_norm_eps
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        self.inv_freq = (1.0 / config.rope_parameters["rope_theta"] ** exponent).double()
        self.sinks, self.window = sinks, window
        self.positions: list[int] = []  # stream positions of the kept tokens, the same in every layer
        self.keys: list[list[Tensor]] = [
            [] for _ in range(self.layers)
        ]  # per layer, per kept token: [kv_heads, head_dim]
        self.values: list[list[Tensor]] = [[] for _ in range(self.layers)]
        self.seen = 0

    def feed(self, tokens: Iterable[int]) -> Tensor:
        """Feeds tokens one by one. Returns the logits after each, [len(tokens), vocabulary]."""
        return torch.stack([self.step(int(token)) for token in tokens])

    def step(self, token: int) -> Tensor:
        """Feeds one token. Returns the logits that follow it, [vocabulary]."""
        self.positions.append(self.seen)
        self.seen += 1
        full = len(self.positions) > self.sinks + self.window
        if full:
            del self.positions[self.sinks]
        hidden = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            hidden = hidden + self._attention(layer, self._norm(at + "input_layernorm", hidden), full)
            inner = self._norm(at + "post_attention_layernorm", hidden)
            gate, up = self._linear(at + "mlp.gate_proj", inner), self._linear(at + "mlp.up_proj", inner)
            hidden = hidden + self._linear(at + "mlp.down_proj", silu(gate) * up)
        return self._linear("lm_head", self._norm("model.norm", hidden))

    def _attention(self, layer: int, hidden: Tensor, full: bool) -> Tensor:
        at = f"model.layers.{layer}.self_attn."
        query = self._linear(at + "q_proj", hidden).view(self.heads, self.head_dim)
        self.keys[layer].append(self._linear(at + "k_proj", hidden).view(self.kv_heads, self.head_dim))
        self.values[layer].append(self._linear(at + "v_proj", hidden).view(self.kv_heads, self.head_dim))
        if full:  # the oldest token that is not a sink makes room
            del self.keys[layer][self.sinks]
            del self.values[layer][self.sinks]
        kept = len(self.keys[layer])
        query = self._rotate(query, kept - 1)
        keys = [self._rotate(key, index) for index, key in enumerate(self.keys[layer])]
        outputs = []
        for head in range(self.heads):
            shared = head // (self.heads // self.kv_heads)
            scores = torch.stack([query[head] @ key[shared] for key in keys]) / self.head_dim**0.5
            weights = scores.softmax(0)
            outputs.append(
                sum(weight * value[shared] for weight, value in zip(weights, self.values[layer], strict=True))
            )
        return self._linear(at + "o_proj", torch.cat(outputs))

    def _rotate(self, vectors: Tensor, index: int) -> Tensor:
        """Turns each pair (i, i + head_dim/2) of `vectors` by index * inv_freq[i] radians."""
        first, second = vectors.chunk(2, dim=-1)
        angles = index * self.inv_freq
        cosine, sine = torch.cos(angles).to(vectors.dtype), torch.sin(angles).to(vectors.dtype)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    def _norm(self, name: str, vector: Tensor) -> Tensor:
        return vector / torch.sqrt(vector.pow(2).mean() + self.eps) * self.weights[name + ".weight"]

    def _linear(self, name: str, vector: Tensor) -> Tensor:
        result = self.weights[name + ".weight"] @ vector
        bias = self.weights.get(name + ".bias")
        return result if bias is None else result + bias


def stream(
    model: PreTrainedModel, tokens: Iterable[int], sinks: int, window: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Logits after every token of one row, [len(tokens), vocabulary]."""
    return StreamingLLM(model, sinks, window, dtype).feed(tokens)


def visible(seen: int, sinks: int, window: int) -> list[int]:
    """Stream positions that the last of `seen` tokens attends to, by going through all of them."""
    last = seen - 1
    return [j for j in range(seen) if j < sinks or last - j < window]
