"""What a stream is made of."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sinks.errors import TextTooShort, UnsupportedOption
from sinks.evals.tokens import cut, line_break, stream_ids
from tests.evals.tiny import BOS, tiny_tokenizer


@pytest.mark.parametrize("bos", [False, True])
def test_a_stream_begins_as_its_tokenizer_says(bos: bool):
    tokenizer = tiny_tokenizer(bos)
    ids, found = stream_ids(tokenizer, "a\nb" * 1000)
    assert found == (BOS if bos else None)
    assert len(ids) == 3000 + bos
    assert (ids[0] == BOS) == bos
    assert BOS not in ids[1:]


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
