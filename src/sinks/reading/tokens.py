"""From a text to the token ids that every arm reads; the token of a line break; where a stream repeats itself."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sinks.errors import InvalidInput, TextTooShort, UnsupportedOption

LINE_BREAKS = ("\n", "Ċ", "<0x0A>")
"""How vocabularies write it: as itself, in byte-level BPE, as a byte of sentencepiece."""

PASSAGE = 16
"""Tokens that must recur word for word to count as a repeated passage."""


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


def given_ids(
    tokenizer: PreTrainedTokenizerBase, given: str | Sequence[int] | Tensor, begins: bool, vocabulary: int
) -> list[int]:
    """The ids of a text, by `stream_ids` where it `begins` a stream, or ids below `vocabulary` as they are.

    Raises InvalidInput for anything else, and for a text that is no Unicode (half of a surrogate pair).
    """
    if isinstance(given, str):
        check_text(given)
        if begins:
            return stream_ids(tokenizer, given)[0]
        return tokenizer(given, add_special_tokens=False, verbose=False).input_ids
    ids: Any = None
    if isinstance(given, Tensor):
        ids = given.tolist()
    elif isinstance(given, Iterable) and not isinstance(given, bytes | bytearray):
        ids = list(given)
    wanted = f"token ids are whole numbers from 0 to {vocabulary - 1}, in one row"
    if not isinstance(ids, list):
        raise InvalidInput(
            f"{type(given).__name__}: {wanted}: give a list of them, a tensor of one dimension, or a text"
        )
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise InvalidInput(f"number {place} of the tokens is {reprlib.repr(token)}: {wanted}")
    return ids


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, begins: bool) -> list[int]:
    """Token ids of a text that somebody else wrote: special tokens in it are the letters they are written with.

    A text that `begins` a stream gets the BOS that `stream_ids` gives it.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return [*(stream_ids(tokenizer, "")[0] if begins else []), *ids]


def check_text(text: str) -> None:
    """Raises InvalidInput where a text cannot be written as UTF-8, which tokenizers need."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"character {error.start:,} of this text is half of a surrogate pair, as undecodable bytes leave one: "
            'decode them with errors="replace"'
        ) from error


def cut(ids: list[int], tokens: int | None, at_most: int, needed: int) -> Int[Tensor, " tokens"]:
    """The first `tokens` of `ids`; if that is None, as many as there are up to `at_most`.

    Raises TextTooShort if there are fewer than `tokens`, or if the result would have fewer than `needed`.
    """
    if tokens is not None and len(ids) < tokens:
        raise TextTooShort(
            f"the text has {len(ids):,} tokens, and {tokens:,} are to be read: ask for fewer, or give a longer text"
        )
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


def forgotten_repeats(ids: Int[Tensor, " tokens"], keys: int) -> Bool[np.ndarray, " tokens"]:
    """Tokens that end a passage of 16 whose last occurrence is at least `keys` tokens back.

    Attention that sees everything copies such a passage; a reader of `keys` tokens has let it go. Passages are compared
    by a 64-bit hash.
    """
    stream = ids.cpu().numpy().astype(np.uint64)
    marks = np.zeros(len(stream), bool)
    count = max(len(stream) - PASSAGE + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset in range(PASSAGE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + stream[offset : offset + count] + np.uint64(1)
    order = np.argsort(hashes, kind="stable")  # equal passages side by side, in the order of the stream
    again = (np.diff(hashes[order]) == 0) & (np.diff(order) >= keys)
    marks[order[1:][again] + PASSAGE - 1] = True
    return marks
