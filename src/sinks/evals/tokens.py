"""From a text to the token ids that every arm reads, and the token of a line break."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sinks.errors import TextTooShort, UnsupportedOption

LINE_BREAKS = ("\n", "Ċ", "<0x0A>")  # as itself; in byte-level BPE; as a byte of sentencepiece


def stream_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], bool]:
    """Token ids of the whole text by the tokenizer's own convention, and whether they begin with BOS.

    A tokenizer that puts BOS before an empty text puts it here (Gemma must have it, SmolLM2 has none); EOS is never added, since a stream
    does not end.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    begins = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("").input_ids
    return ([tokenizer.bos_token_id, *ids] if begins else ids), begins


def cut(ids: list[int], tokens: int | None, at_most: int, needed: int, name: str) -> Tensor:
    """The first `tokens` ids, or by default as many as there are up to `at_most`.

    Returns:
        int64 [tokens].

    Raises:
        TextTooShort: the text has fewer than `tokens`, or the stream has fewer than `needed`.
    """
    if tokens is not None and len(ids) < tokens:
        raise TextTooShort(f"text {name!r} has {len(ids):,} tokens and --tokens asks for {tokens:,}; give a longer text or ask for fewer")
    stream = ids[: tokens or at_most]
    if len(stream) < needed:
        given = f"text {name!r} has {len(ids):,} tokens" if tokens is None else f"--tokens is {tokens:,}"
        raise TextTooShort(f"{given} and {needed:,} are needed to evict anything and time what follows; give more, or a smaller --window")
    return torch.tensor(stream)


def line_break(tokenizer: PreTrainedTokenizerBase) -> int:
    """The one token that is a line break.

    Raises:
        UnsupportedOption: this tokenizer has none.
    """
    ids = tokenizer("\n", add_special_tokens=False).input_ids
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    vocabulary = tokenizer.get_vocab()
    for form in LINE_BREAKS:
        if form in vocabulary:
            return vocabulary[form]
    raise UnsupportedOption("this tokenizer has no token for a line break, which the arm 'newlines' needs; leave it out of --arms")
