"""From a text to the token ids that every arm reads, and the token of a line break."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sinks.errors import TextTooShort, UnsupportedOption

LINE_BREAKS = ("\n", "Ċ", "<0x0A>")
"""How vocabularies write it: as itself, in byte-level BPE, as a byte of sentencepiece."""


def stream_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int | None]:
    """Token ids of the whole text by the tokenizer's own convention, and the BOS that they begin with, if they do.

    A tokenizer that puts BOS before an empty text puts it here: Gemma must have it, SmolLM2 has none. EOS is never
    added, since a stream does not end.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    if isinstance(bos, int) and bos in tokenizer("").input_ids:
        return [bos, *ids], bos
    return ids, None


def cut(ids: list[int], tokens: int | None, at_most: int, needed: int) -> Int[Tensor, " tokens"]:
    """The first `tokens` of `ids`; if that is None, as many as there are up to `at_most`.

    Raises TextTooShort if there are fewer than `tokens`, or if the result would have fewer than `needed`.
    """
    if tokens is not None and len(ids) < tokens:
        raise TextTooShort(f"the text has {len(ids):,} tokens, and {tokens:,} are to be read: ask for fewer")
    stream = ids[: at_most if tokens is None else tokens]
    if len(stream) < needed:
        what = f"the text has {len(ids):,} tokens" if len(ids) < needed else f"{len(stream):,} tokens are to be read"
        raise TextTooShort(
            f"{what}, and {needed:,} are needed to fill sinks and window and see what is let go: "
            f"read {'another text' if len(ids) < needed else 'more'} or choose a smaller window"
        )
    return torch.tensor(stream)


def line_break(tokenizer: PreTrainedTokenizerBase) -> int:
    """The one token that is a line break. Raises UnsupportedOption if this tokenizer has none."""
    ids = tokenizer("\n", add_special_tokens=False).input_ids
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    vocabulary = tokenizer.get_vocab()
    for form in LINE_BREAKS:
        if form in vocabulary:
            return vocabulary[form]
    raise UnsupportedOption("this tokenizer has no token for a line break: leave 'newlines' out of the arms")
