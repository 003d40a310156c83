"""Pieces of text: whole characters, whatever the tokens; stop strings, wherever they fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks.errors import InvalidInput
from sinks.stream.pieces import LONGEST_STOP, PENDING_BYTES, Pieces, Vocabulary, byte_letters
from tests.stream.vocabularies import byte_level, metaspace, sentencepiece, wordpiece

BYTES = byte_level()
LETTERS = byte_letters()
TOKEN_OF = {LETTERS[name]: token for name, token in BYTES.get_vocab().items() if name in LETTERS}
VOCABULARY = Vocabulary(BYTES)


def tokens_of(data: bytes) -> list[int]:
    return [TOKEN_OF[byte] for byte in data]


def pushed(pieces: Pieces, ids: list[int]) -> list[str]:
    """The piece that each token gives, up to a stop."""
    told: list[str] = []
    for at, token in enumerate(ids):
        told.append(pieces.push(token, ids[at - 1] if at else None))
        if pieces.stopped:
            break
    return told


def test_the_letters_are_those_of_the_tokenizers_library() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(LETTERS) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(LETTERS.values()) == list(range(256))


@given(text=st.text(max_size=30))
def test_whole_characters_and_the_whole_text(text: str) -> None:
    pieces = Pieces(VOCABULARY)
    pieces.begin()
    told = pushed(pieces, tokens_of(text.encode()))
    assert "".join(told) + pieces.finish(broken=True) == text
    assert all(len(piece) <= 1 for piece in told)  # one byte a token: a piece is one character or nothing
    assert [piece for piece in told if piece] == list(text)


@given(data=st.binary(max_size=24))
def test_bytes_that_are_no_text(data: bytes) -> None:
    pieces = Pieces(VOCABULARY)
    pieces.begin()
    text = "".join(pushed(pieces, tokens_of(data)))
    assert len(pieces.pending) <= 3
    text += pieces.finish(broken=True)
    assert text == data.decode("utf-8", "replace")
    assert text == BYTES.decode(tokens_of(data), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace, wordpiece], ids=lambda make: make.__name__)
@settings(max_examples=60)
@given(data=st.data())
def test_the_pieces_are_what_the_tokenizer_decodes(make, data: st.DataObject) -> None:
    """Behind a first word, because a decoder may treat the start of a text unlike its middle."""
    tokenizer = {"byte_level": BYTES}.get(make.__name__) or make()
    vocabulary = Vocabulary(tokenizer)
    texts = [token for token in range(len(tokenizer)) if not 2 <= token < 258] if make is sentencepiece else None
    one = st.sampled_from(texts) if texts else st.integers(0, len(tokenizer) - 1)
    ids = data.draw(st.lists(one, max_size=12))
    start = {byte_level: tokens_of(b"x"), sentencepiece: [259], metaspace: [2], wordpiece: [1]}[make]
    pieces = Pieces(vocabulary)
    pieces.begin()
    said = "".join(pieces.push(token, [*start, *ids][at]) for at, token in enumerate(ids)) + pieces.finish(True)

    def decode(each: list[int]) -> str:
        return tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    assert decode([*start, *ids]) == decode(start) + said


def test_bytes_of_a_sentencepiece_vocabulary() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer("ab é€ ab").input_ids
    assert len(ids) == 7  # the euro sign is three bytes
    pieces = Pieces(Vocabulary(tokenizer))
    pieces.begin()
    assert [piece for piece in pushed(pieces, ids) if piece] == ["ab", " ", "é", "€", " ab"]


def test_special_tokens_and_tokens_that_do_not_exist_are_no_text() -> None:
    mark, think = BYTES.convert_tokens_to_ids(["<|mark|>", "<think>"])
    pieces = Pieces(VOCABULARY)
    pieces.begin()
    assert pushed(pieces, [mark, think, 99_999, *tokens_of(b"x")]) == ["", "<think>", "", "x"]


# Stop strings


def stopped_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter, as slowly as can be."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=300)
@given(
    text=st.text("ab€", max_size=14),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 6), max_size=20),
)
def test_stop_strings_do_not_depend_on_token_boundaries(text: str, stops: list[str], cuts: list[int]) -> None:
    data, runs = text.encode(), []
    for size in [*cuts, *[1] * 60]:
        if data:
            runs, data = [*runs, data[:size]], data[size:]

    class Runs(Vocabulary):
        def bytes_of(self, token: int, previous: int | None = None) -> bytes:
            return runs[token]

    pieces = Pieces(Runs(BYTES))
    said = pieces.begin(stops)
    for token in range(len(runs)):
        said += pieces.push(token)
        assert len(pieces.pending) <= max((len(stop.encode()) for stop in stops), default=1) + 2
        if pieces.stopped:
            break
    expected, stopped = stopped_text(text, stops)
    assert (said + pieces.finish(broken=True), pieces.stopped) == (expected, stopped)


def test_text_is_said_as_soon_as_it_cannot_be_a_stop() -> None:
    pieces = Pieces(VOCABULARY)
    pieces.begin(["END."])
    assert pushed(pieces, tokens_of(b"aEND b")) == ["a", "", "", "", "END ", "b"]
    assert pushed(pieces, tokens_of(b"xEND.y")) == ["x", "", "", "", ""] and pieces.stopped
    assert pieces.pending == b""
    assert pieces.begin() == "" and not pieces.stopped


@given(data=st.binary(max_size=12), at=st.integers(0, 12))
def test_what_is_held_back_can_be_put_away(data: bytes, at: int) -> None:
    one, other = Pieces(VOCABULARY), Pieces(VOCABULARY)
    stops = ["abc", "é€"]
    one.begin(stops)
    ids = tokens_of(b"ab\xc3\xa9\xe2" + data)
    said = "".join(pushed(one, ids[:at]))
    if one.stopped:
        return
    other.pending = one.pending
    twin = one.fork()
    endings = []
    for pieces in (one, other, twin):
        text = said + (pieces.begin(stops) if pieces is not one else "")
        endings.append((text + "".join(pushed(pieces, ids[at:])) + pieces.finish(True), pieces.stopped))
    assert endings[0] == endings[1] == endings[2]


def test_the_next_answer_goes_on_inside_a_character() -> None:
    pieces = Pieces(VOCABULARY)
    pieces.begin()
    assert pushed(pieces, tokens_of("é".encode()[:1])) == [""]
    assert pieces.finish() == ""
    assert pieces.begin() == ""
    assert pushed(pieces, tokens_of("é".encode()[1:])) == ["é"]
    pushed(pieces, tokens_of(b"\xe2"))
    pieces.forget()
    assert pushed(pieces, tokens_of(b"x")) == ["x"]


def test_held_text_meets_the_stop_strings_of_the_next_answer() -> None:
    pieces = Pieces(VOCABULARY)
    pieces.begin(["abc"])
    assert pushed(pieces, tokens_of(b"xab")) == ["x", "", ""]
    assert pieces.begin(["b"]) == "a" and pieces.stopped


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("stop", ["", "x" * (LONGEST_STOP + 1), 3, None])
def test_stop_strings_that_make_no_sense(stop: object) -> None:
    with pytest.raises(InvalidInput, match="1 to 1024 characters"):
        Pieces(VOCABULARY).begin([stop])  # type: ignore[list-item]


def test_one_string_is_one_stop_and_the_bound_holds() -> None:
    pieces = Pieces(VOCABULARY)
    pieces.begin("ab")
    assert pieces.stops == ("ab",)
    longest = "\U0001f600" * LONGEST_STOP
    pieces.begin([longest])
    data = longest.encode()[:-1]
    assert "".join(pushed(pieces, tokens_of(data))) == ""
    assert pieces.pending == data and len(data) <= PENDING_BYTES
