"""From token ids to pieces of text: whole characters only, and stop strings wherever token boundaries fall.

A token is a run of bytes, which may begin or end inside a character. So tokens are turned into bytes one at a time and
an incremental UTF-8 decoder makes characters of them: however the bytes fall into tokens, the pieces together are the
text of all bytes. What is held back is less than one character and less than one stop string.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from sinks.errors import InvalidInput

LONGEST_STOP = 1024
"""Characters of a stop string at most, so that what is held back stays small."""

PENDING_BYTES = 4 * LONGEST_STOP + 3
"""Bytes that can be held back at most: of a stop string, and of one unfinished character behind it."""


def byte_letters() -> dict[str, int]:
    """How byte-level BPE writes each byte as a printable letter (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Vocabulary:
    """The bytes of each token of one tokenizer, as its decoder would write them in the middle of a text.

    Byte-level and sentencepiece vocabularies are read token by token. Any other decoder (WordPiece) is asked what a
    token adds behind the one before it. Special tokens are no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {token: str(each) for token, each in added.items()}
        self._silent = {token for token, each in added.items() if each.special} | set(tokenizer.all_special_ids)
        kinds = _decoder_parts(tokenizer)
        self._letters = byte_letters() if "ByteLevel" in kinds else None
        # The sentencepiece mark stands for a space; a decoder drops it at the start of a text only, and this is none.
        self._marked = bool({"ByteFallback", "Metaspace"} & set(kinds))
        self._byte_tokens = "ByteFallback" in kinds
        self._known: dict[int, bytes] = {}  # grows to the vocabulary at most

    def bytes_of(self, token: int, previous: int | None = None) -> bytes:
        """What `token` adds to a text behind the token `previous`."""
        if token in self._known:
            return self._known[token]
        if self._letters is None and not self._marked and token not in self._silent:
            return self._added_behind(token, previous)
        self._known[token] = found = self._bytes_anywhere(token)
        return found

    def _bytes_anywhere(self, token: int) -> bytes:
        """What a token adds to any text, whatever comes before it."""
        if token in self._silent:
            return b""
        if token in self._added:
            return self._added[token].encode()
        name: Any = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):  # models have more rows than tokenizers have tokens
            return b""
        if self._letters is not None:
            found = [self._letters.get(letter) for letter in name]
            return name.encode() if None in found else bytes(byte for byte in found if byte is not None)
        if self._byte_tokens and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace("▁", " ").encode()

    def _added_behind(self, token: int, previous: int | None) -> bytes:
        before = [] if previous is None else [previous]
        whole, start = self._decode([*before, token]), self._decode(before)
        return whole.removeprefix(start).encode()

    def _decode(self, ids: list[int]) -> str:
        text: Any = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""
        return text


class Pieces:
    """The text of one row's stream, handed out piece by piece.

    `pending` is what has been written and not handed out: it stays over the end of an answer that was broken off, so
    that the next answer goes on inside the same character.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.stops: tuple[str, ...] = ()
        self.stopped = False
        self._decoder = _utf8()
        self._held = ""

    def begin(self, stops: Iterable[str] = ()) -> str:
        """Begin an answer that ends at any of `stops`; returns what an earlier one held back and can now be said."""
        self.stops = check_stops(stops)
        self.stopped = False
        return self._release("")

    def push(self, token: int, previous: int | None = None) -> str:
        """The text that can be said once `token` is there; sets `stopped` where a stop string is complete.

        The stop string and what follows it are not handed out. Where several are complete, the one that ends first
        counts, so that the result does not depend on token boundaries.
        """
        return self._release(self._decoder.decode(self.vocabulary.bytes_of(token, previous)))

    def finish(self, broken: bool = False) -> str:
        """What was held back for a stop string that did not come; with `broken`, an unfinished character as U+FFFD."""
        text, self._held = self._held, ""
        if broken:
            text += self._decoder.decode(b"", final=True)
        return text

    def fork(self) -> Pieces:
        """The same text held back, to go its own way."""
        twin = Pieces(self.vocabulary)
        twin.pending = self.pending
        return twin

    def forget(self) -> None:
        """Drop what is held back: the stream has gone on without it."""
        self._held, self._decoder = "", _utf8()

    @property
    def pending(self) -> bytes:
        """Bytes that were written and not handed out."""
        return self._held.encode() + self._decoder.getstate()[0]

    @pending.setter
    def pending(self, held: bytes) -> None:
        self.forget()
        self._held = self._decoder.decode(held)

    def _release(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        if not self.stops:
            return text
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.forget()
            self.stopped = True
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def check_stops(stops: Iterable[str]) -> tuple[str, ...]:
    """The stop strings as a tuple. Raises InvalidInput for an empty or overlong one; one string counts as one."""
    if not isinstance(stops, Iterable):
        raise InvalidInput(f"stop={stops!r}: give strings, or () for none")
    given = (stops,) if isinstance(stops, str) else tuple(stops)
    for stop in given:
        if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
            raise InvalidInput(f"stop={stop!r}: a stop string has 1 to {LONGEST_STOP} characters")
    return given


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _utf8() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _decoder_parts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The steps of a tokenizer's decoder by name; none for a tokenizer without one (written in Python)."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(backend, "decoder", None) is None:
        return []
    described = json.loads(backend.decoder.__getstate__())
    return [part["type"] for part in described.get("decoders", [described])]
