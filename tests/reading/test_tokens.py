"""What a stream is made of."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sinks.errors import TextTooShort, UnsupportedOption
from sinks.reading.tokens import PASSAGE, cut, forgotten_repeats, line_break, plain_ids, stream_ids
from tests.reading.tiny import BOS, tiny_tokenizer


@pytest.mark.parametrize("bos", [False, True])
def test_a_stream_begins_as_its_tokenizer_says(bos: bool):
    tokenizer = tiny_tokenizer(bos)
    ids, found = stream_ids(tokenizer, "a\nb" * 1000)
    assert found == (BOS if bos else None)
    assert len(ids) == 3000 + bos
    assert (ids[0] == BOS) == bos
    assert BOS not in ids[1:]


@pytest.mark.parametrize("bos", [False, True])
def test_special_tokens_in_a_plain_text_are_letters(bos: bool):
    tokenizer = tiny_tokenizer(bos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    letters = [tokenizer("<|mark|").input_ids[-1], *tokenizer(">").input_ids[bos:]]
    for begins in (False, True):
        ids = plain_ids(tokenizer, "a<|mark|>", begins)
        assert len(ids) == 9 + (bos and begins) and ids[-2:] == letters
    assert len(stream_ids(tokenizer, "a<|mark|>")[0]) == 2 + bos, "elsewhere it is still a token"


def test_cut_takes_what_is_asked_for_or_all_there_is():
    ids = list(range(100))
    assert cut(ids, 40, at_most=8, needed=10).tolist() == ids[:40]
    assert cut(ids, None, at_most=60, needed=10).tolist() == ids[:60]
    assert cut(ids, None, at_most=600, needed=10).tolist() == ids


@pytest.mark.parametrize(
    ("tokens", "needed", "says"),
    [
        (101, 10, "the text has 100 tokens, and 101 are to be read"),
        (None, 101, "the text has 100 tokens, and 101 are needed .* read another text or choose a smaller window"),
        (50, 51, "50 tokens are to be read, and 51 are needed .* read more or choose a smaller window"),
        (50, 200, "the text has 100 tokens, and 200 are needed"),
        (None, 90, "80 tokens are to be read, and 90 are needed"),
    ],
)
def test_a_text_too_short_says_how_much_there_is_and_is_needed(tokens: int | None, needed: int, says: str):
    with pytest.raises(TextTooShort, match=says):
        cut(list(range(100)), tokens, at_most=80, needed=needed)


def test_line_break_in_byte_level_vocabularies():
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode([line_break(tokenizer)]) == "\n"


@pytest.mark.parametrize("form", ["\n", "<0x0A>"])
def test_line_break_that_encodes_as_more_than_one_token(form: str):
    """As Llama 2's does: `▁` comes before it."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, form: 1}, unk_token="<unk>"))
    assert line_break(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")) == 1


def test_no_line_break():
    with pytest.raises(UnsupportedOption, match="no token for a line break"):
        line_break(tiny_tokenizer(line_break=False))


@pytest.mark.parametrize("keys", [40, 60, 61])
def test_a_repeat_counts_once_its_first_copy_has_left_the_window(keys: int):
    random = torch.randint(0, 1000, (100,), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([random[:60], random[:20], random[60:]])  # 20 tokens, again after 60
    found = np.flatnonzero(forgotten_repeats(ids, keys)).tolist()
    assert found == (list(range(60 + PASSAGE - 1, 80)) if keys <= 60 else [])


def test_a_repeat_whose_last_copy_is_still_visible_does_not_count():
    passage = torch.arange(PASSAGE)
    ids = torch.cat([passage, torch.arange(100, 150), passage, torch.arange(200, 210), passage])
    assert np.flatnonzero(forgotten_repeats(ids, keys=40)).tolist() == [2 * PASSAGE + 50 - 1]


def test_a_stream_shorter_than_a_passage_repeats_nothing():
    assert not forgotten_repeats(torch.zeros(PASSAGE - 1, dtype=torch.int64), keys=1).any()
    assert forgotten_repeats(torch.zeros(PASSAGE + 1, dtype=torch.int64), keys=1).sum() == 1
