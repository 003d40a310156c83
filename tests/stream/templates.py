"""Chat templates in the manner of well-known ones, written for these tests, and a tiny tokenizer that has their marks.

`STEADY` can be followed turn by turn; each of `UNSTEADY` cannot, and says why.
"""

from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sinks.models.attach import attach
from sinks.models.load import Loaded, Source
from sinks.stream.sampling import Sampling
from tests.reading.tiny import tiny_tokenizer

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>")
PLAIN_MARKS = ("<turn>", "</turn>")
"""Tokens of their own that the vocabulary does not call special, as in converted checkpoints."""

VOCABULARY = 256 + len(SPECIAL) + len(PLAIN_MARKS)

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
_DATED = (
    "{{ '<s><|header|>system<|/header|>\n\nToday is ' + strftime_now('%d %b %Y %H:%M:%S') + '.\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot|>' }}{% for m in messages %}"
    "{{ '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
_INST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{{ '<s>' }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
_SPACED = _INST.replace("m.content + '</s>'", "m.content + ' </s><s>'")
_TRIMMED = (
    "{{ '<s>' }}{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (s if loop.first else '') }}"
    "{{ m.content | trim + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
_THINKING = (
    "{% set n = namespace(at=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set n.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and loop.index0 < n.at %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEADY = {
    "chatml": _CHATML,
    "default system": _DEFAULT_SYSTEM + _CHATML,
    "dated": _DATED,
    "inst": _INST.replace("' ' + m.content", "m.content"),
    "spaced": _SPACED.replace("' ' + m.content", "m.content"),
    "trimmed": _TRIMMED,
    "thinking": _THINKING,
    "begins reasoning": _CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"),
}
STRIPPING = {"thinking", "begins reasoning"}

UNSTEADY = {
    "a turn differently": _CHATML.replace("+ m.role", "+ loop.index | string + m.role"),
    "earlier turns anew": _CHATML.replace("+ m.content", "+ ('Now: ' if loop.last else '') + m.content"),
    "no token of its own": "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}",
    "leaves out the newest": _CHATML.replace("for m in messages", "for m in messages[:2]"),
    "an answer as it is": _CHATML.replace("m.content", "m.content | upper"),
    "a message as it is": _CHATML.replace("m.content", "(m.content if m.role == 'assistant' else m.content | upper)"),
}


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, and the marks of every template here; "<s>" is token 256."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in PLAIN_MARKS])
    tokenizer.chat_template = template
    return tokenizer


@cache
def chat_model(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """A random Llama of these tokens, attached."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config)
    model.to(dtype=dtype).eval()  # type: ignore[call-arg]
    assert model.generation_config is not None
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    attach(model)
    return model


def chat_loaded(name: str = "chatml") -> Loaded:
    """The model with a template of this name."""
    return Loaded(chat_model(), chat_tokenizer((STEADY | UNSTEADY)[name]), Source(name, "folder", "none", "", ""))


LETTERS = Sampling(
    temperature=1.0,
    logit_bias={token: float("-inf") for token in range(VOCABULARY) if not 97 - 33 <= token < 123 - 33},
)
"""Only a to z, which every template leaves as they are; byte-level vocabularies count from the exclamation mark."""


def ending(token: int) -> Sampling:
    """Chooses this token."""
    return Sampling(logit_bias={token: 1e6})


def user(content: str) -> dict[str, str]:
    """What a person says."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """What the model says."""
    return {"role": "assistant", "content": content}


def whole(loaded: Loaded, messages: list[dict[str, str]]) -> list[int]:
    """What transformers makes of a dialogue, and of the beginning of the next answer."""
    encoded = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return encoded.input_ids  # type: ignore[union-attr]


def undated(name: str, ids: list[int]) -> list[int]:
    """Without the time of day that one of the templates writes."""
    if name != "dated":
        return ids
    start = len(chat_tokenizer(None)("<s><|header|>system<|/header|>\n\nToday is ").input_ids)
    return ids[:start] + ids[start + len("01 Jan 2026 00:00:00") :]


def chat_folder(folder: Path, endless: bool = False) -> Path:
    """Save the model in float32, and its tokenizer with a template, as a checkpoint that commands take.

    With `endless` special tokens have logits of 0, and the likeliest of the others has never so little.
    """
    model = chat_model.__wrapped__(torch.float32)
    if endless:
        model.lm_head.weight.data[256:] = 0
    model.save_pretrained(folder)
    chat_tokenizer(STEADY["chatml"]).save_pretrained(folder)
    return folder
