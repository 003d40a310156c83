"""The inputs of a survey."""

import pytest
import torch

from sinks.analysis.inputs import MOVED_TO, alike, bos_of, dressed, framed, windows
from sinks.errors import TextTooShort, UnsupportedOption
from tests.reading.tiny import BOS, tiny_tokenizer

TEXT = "".join(chr(97 + index % 26) + str(index) for index in range(100))


def test_windows_are_real_disjoint_and_drawn_from_all_texts():
    tokenizer = tiny_tokenizer(bos=True)
    found = windows(tokenizer, [TEXT, "too short", TEXT.upper()], 32, 10, seed=3)
    decoded = [tokenizer.decode(row) for row in found]
    assert found.shape == (10, 32) and BOS not in found
    assert len(set(decoded)) == 10
    assert all((TEXT + "|" + TEXT.upper()).index(row) % 32 in (0, (len(TEXT) + 1) % 32) for row in decoded)
    assert torch.equal(found, windows(tokenizer, [TEXT, "too short", TEXT.upper()], 32, 10, seed=3))
    assert not torch.equal(found, windows(tokenizer, [TEXT, "too short", TEXT.upper()], 32, 10, seed=4))


def test_too_little_text_is_said():
    with pytest.raises(TextTooShort, match="give 9 windows of 32 tokens, and 10 are wanted"):
        windows(tiny_tokenizer(), [TEXT], 32, 10)


def test_dressing_keeps_the_length():
    ids = torch.arange(24).view(2, 12)
    assert dressed(ids, "none", None) is ids
    first = dressed(ids, "first", 99)
    assert first[:, 0].tolist() == [99, 99] and torch.equal(first[:, 1:], ids[:, :-1])
    moved = dressed(ids, "moved", 99)
    assert moved[:, MOVED_TO].tolist() == [99, 99]
    assert (moved != ids).sum() == 2 and ids[0, MOVED_TO] == MOVED_TO
    with pytest.raises(UnsupportedOption, match="measure without BOS"):
        dressed(ids, "first", None)


def test_random_and_repeated_tokens_are_ordinary_ones():
    tokenizer = tiny_tokenizer(bos=True)
    natural = torch.zeros(40, 16, dtype=torch.int64)
    random = alike(natural, "random", tokenizer)
    repeated = alike(natural, "repeated", tokenizer)
    assert alike(natural, "natural", tokenizer) is natural
    assert BOS not in random and BOS not in repeated and len(random.unique()) > 200
    assert (repeated == repeated[:, :1]).all() and len(repeated[:, 0].unique()) > 20


def test_which_token_begins_a_text():
    assert bos_of(tiny_tokenizer(bos=True)) == BOS
    assert bos_of(tiny_tokenizer()) is None


def test_an_encoder_is_framed():
    tokenizer = tiny_tokenizer()
    with pytest.raises(UnsupportedOption, match="without a frame"):
        framed(torch.arange(12).view(1, 12), tokenizer)
    tokenizer.add_special_tokens({"cls_token": "<c>", "sep_token": "<s>"})
    found = framed(torch.arange(12).view(1, 12), tokenizer)
    assert found[0, 1:-1].tolist() == list(range(10))
    assert [found[0, 0], found[0, -1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert found.shape == (1, 12)
