"""How many tokens go into one forward pass, where nobody says."""

from __future__ import annotations

from transformers import PreTrainedModel

CHUNK = 256
"""On a CPU: the hidden states of so many tokens stay in its cache."""

DEVICE_CHUNK = 16_384
"""On a GPU: enough work that launching it takes no longer than doing it."""

TURN_CHUNK = 2_048
"""On a GPU, while others wait for their next token: as many as one pass reads in the time that launching it takes."""

LOGIT_BYTES = 1 << 31
"""Most that the logits of one chunk may take."""


def natural_chunk(model: PreTrainedModel) -> int:
    """Tokens fed at a time: a few on a CPU, many on a GPU, fewer where a large vocabulary makes logits of each."""
    if model.device.type != "cuda":
        return CHUNK
    vocabulary = model.config.get_text_config().vocab_size
    fitting = LOGIT_BYTES // (vocabulary * model.dtype.itemsize)
    return max(CHUNK, min(DEVICE_CHUNK, fitting // CHUNK * CHUNK))


def turn_chunk(model: PreTrainedModel) -> int:
    """Tokens of new prompts that an engine reads between two tokens of everybody else."""
    return CHUNK if model.device.type != "cuda" else TURN_CHUNK
