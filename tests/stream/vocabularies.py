"""Small tokenizers, one of each way in which vocabularies write text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.reading.tiny import tiny_tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's way: a token is bytes; with a special token, one that is text, and one that the letters cannot write."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("a b"), AddedToken("日本")])
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """Gemma's way: letters, a mark for the space, and tokens for the bytes of all else."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "▁ab", "ab"]
    model = models.BPE({name: n for n, name in enumerate(names)}, [("a", "b"), ("▁", "ab")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="never")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """T5's way: a mark for the space, and no bytes."""
    names = ["<unk>", "▁", "a", "b", "é", "▁a"]
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, [("▁", "a")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's way: words, and parts of words that carry a mark."""
    names = ["[UNK]", "hello", "world", "##ly", "##s"]
    tokenizer = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
