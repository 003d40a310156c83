"""Plain text out of the formats that the packages use. Each reader takes a verified file and returns the whole text."""

import json
import struct
import zlib
from pathlib import Path

_R_HEADER = b"X\n"  # a serialised R object, XDR form
_R_STRINGS = 0x10
_LZW_CLEAR = 256
_LZW_WIDEST = 16


def read_austen(path: Path) -> str:
    """Six novels from an R lazy-load database: records of a four-byte length and a zlib stream.

    Each record is one character vector, one string a line (R Internals, section 1.8, "Serialization Formats").
    """
    data, novels, at = path.read_bytes(), [], 0
    while at < len(data):
        stream = zlib.decompressobj()
        novels.append("\n".join(_r_strings(stream.decompress(data[at + 4 :]))))
        at = len(data) - len(stream.unused_data)
    return "\n\n\n".join(novels)


def _r_strings(record: bytes) -> list[str]:
    # Format line, three integers (version, writer, oldest reader), then the native encoding with its length.
    (name_length,) = struct.unpack_from(">i", record, len(_R_HEADER) + 12)
    at = len(_R_HEADER) + 16 + name_length
    kind, count = struct.unpack_from(">ii", record, at)
    if not record.startswith(_R_HEADER) or kind & 0xFF != _R_STRINGS:
        raise ValueError(f"an R record of kind {kind & 0xFF}, where a character vector was expected")
    at, strings = at + 8, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", record, at + 4)  # after four bytes of flags; -1 marks a missing string
        end = at + 8 + max(length, 0)
        strings.append(record[at + 8 : end].decode("utf-8"))
        at = end
    return strings


def read_bible(path: Path) -> str:
    """31,102 verses, one a line ("Ge1:1 In the beginning ..."), from the file format of the Bible Retrieval System.

    From byte 88, big-endian: the number of windows, then where each begins and the last one ends. A window is 65,536
    characters, compressed on its own with LZW. The first line of the whole names the edition and is dropped.
    """
    data = path.read_bytes()
    (count,) = struct.unpack_from(">I", data, 88)
    edges = struct.unpack_from(f">{count + 1}I", data, 92)
    windows = (_lzw(data[start:end]) for start, end in zip(edges, edges[1:], strict=False))
    _, _, verses = b"".join(windows).decode("ascii").partition("\n")
    return verses


def _lzw(packed: bytes) -> bytes:
    """Decode the body of a compress(1) file: codes of 9 to 16 bits, low bit first, eight codes of one width a block.

    Stops at the code that empties the table, since here a new window begins.
    """
    table = [bytes([value]) for value in range(256)] + [b""]  # the last is the code that empties the table
    pieces: list[bytes] = []
    width, bit, block = 9, 0, 0
    while bit + width <= 8 * len(packed):
        byte = bit >> 3
        code = (int.from_bytes(packed[byte : byte + 4], "little") >> (bit & 7)) & ((1 << width) - 1)
        if code == _LZW_CLEAR:
            break
        bit += width
        if pieces:
            last = pieces[-1]
            # A code that is not yet in the table stands for the entry being made by it.
            table.append(last + (table[code] if code < len(table) else last)[:1])
        pieces.append(table[code])
        if len(table) >= 1 << width and width < _LZW_WIDEST:
            size = 8 * width
            bit = block = block + -(-(bit - block) // size) * size
            width += 1
    return b"".join(pieces)


def read_wikipedia(path: Path) -> str:
    """Article summaries as "Title", a line break, and the summary; articles are separated by an empty line."""
    articles = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join(f"{title}\n{article['extract']}" for title, article in articles.items())


def read_dialogues(path: Path) -> str:
    """Conversations separated by an empty line, one line a turn: "A: ...", "B: ..." in order of first appearance."""
    conversations = json.loads(path.read_text(encoding="utf-8")).values()
    return "\n\n".join("\n".join(_turns(conversation["messages"])) for conversation in conversations)


def _turns(messages: list[list[dict[str, str]]]) -> list[str]:
    letters: dict[str, str] = {}
    lines = []
    for turn in messages:
        letter = letters.setdefault(turn[0]["sender"], chr(ord("A") + len(letters)))
        lines.append(f"{letter}: {' '.join(message['text'] for message in turn)}")
    return lines
