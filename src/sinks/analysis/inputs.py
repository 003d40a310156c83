"""What a model is shown: windows of real text, random tokens, one token repeated; BOS left out, put first, or moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sinks.errors import TextTooShort, UnsupportedOption

Tokens = Literal["natural", "random", "repeated", "pictures"]
Bos = Literal["none", "first", "moved", "framed"]

MOVED_TO = 10
"""Where a moved BOS stands."""

_WORDS: Mapping[Bos, str] = {"none": "", "first": " + BOS", "moved": f", BOS at {MOVED_TO}", "framed": ", framed"}


@dataclass(frozen=True)
class Condition:
    """One kind of input: what the tokens are, and where BOS stands ("none": nowhere; "moved": at index 10).

    "framed" is how an encoder is fed: its class token first, its separator last. Pictures have no BOS.
    """

    tokens: Tokens
    bos: Bos

    @property
    def name(self) -> str:
        """For tables and files: `natural`, `random + BOS`, `natural, BOS at 10`."""
        return self.tokens + _WORDS[self.bos]


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, count: int, seed: int = 0
) -> Int[Tensor, "texts tokens"]:
    """`count` windows of `tokens` tokens of real text, without special tokens, none overlapping another.

    Windows are drawn at random from all there are (each text cut from its beginning); texts shorter than a window are
    left out. Raises TextTooShort if there are fewer than `count`.
    """
    return drawn(bare_ids(tokenizer, texts), tokens, count, seed)


def bare_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens. A book takes seconds."""
    return [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]


def drawn(texts: Sequence[list[int]], tokens: int, count: int, seed: int = 0) -> Int[Tensor, "texts tokens"]:
    """What `windows` gives, of texts that are tokens already."""
    found = [ids[start : start + tokens] for ids in texts for start in range(0, len(ids) - tokens + 1, tokens)]
    if len(found) < count:
        raise TextTooShort(
            f"the texts give {len(found)} windows of {tokens} tokens, and {count} are wanted: give more text, or ask "
            "for fewer or shorter windows"
        )
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.tensor([found[index] for index in chosen.tolist()])


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for the beginning of a text: BOS, or else the one that stands for a class or an end."""
    for token in (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return None


def dressed(ids: Int[Tensor, "texts tokens"], bos: Bos, token: int | None) -> Int[Tensor, "texts tokens"]:
    """`ids` with BOS where it is wanted, as many tokens as before: put first, the last token leaves; moved, it
    overwrites index 10.

    Raises UnsupportedOption if the tokenizer has no such token.
    """
    if bos == "none":
        return ids
    if token is None:
        raise UnsupportedOption("this tokenizer has no token for the beginning of a text: measure without BOS")
    if bos == "first":
        return torch.cat((torch.full_like(ids[:, :1], token), ids[:, :-1]), dim=1)
    moved = ids.clone()
    moved[:, MOVED_TO] = token
    return moved


def framed(ids: Int[Tensor, "texts tokens"], tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "texts tokens"]:
    """`ids` between the class token and the separator of an encoder, as many tokens as before: the last two leave.

    Raises UnsupportedOption if the tokenizer has no such tokens.
    """
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if not isinstance(first, int) or not isinstance(last, int):
        raise UnsupportedOption("this tokenizer has no class token and separator: measure without a frame")
    return torch.cat((torch.full_like(ids[:, :1], first), ids[:, :-2], torch.full_like(ids[:, :1], last)), dim=1)


def alike(
    natural: Int[Tensor, "texts tokens"], kind: Tokens, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> Int[Tensor, "texts tokens"]:
    """As many tokens of another kind: drawn from the vocabulary without special tokens, or one of it repeated."""
    if kind == "natural":
        return natural
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    plain = torch.tensor([token for token in range(tokenizer.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    shape = natural.shape if kind == "random" else (len(natural), 1)
    return plain[torch.randint(len(plain), shape, generator=generator)].expand(natural.shape).contiguous()
