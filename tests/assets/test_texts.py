"""Reading texts: the one of every Python, files of all kinds, and the formats of the packages."""

import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinks.assets import folder, readers
from sinks.assets.progress import reporting, silent
from sinks.assets.texts import read_text
from sinks.errors import AssetError, InvalidInput, UnknownName


def test_the_default_text_is_the_reference_of_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SINKS_CACHE", str(tmp_path / "none"))
    text = read_text()
    assert text == read_text("python-reference")
    assert text.characters == len(text.text) > 400_000
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert text.text.startswith('The "assert" statement') and "CPython" in text.source
    assert not (tmp_path / "none").exists()


def test_a_python_without_its_reference_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(AssetError, match="pydoc_data.topics.*austen.*give a file"):
        read_text()


def test_a_file_is_read_as_it_is(tmp_path: Path):
    path = tmp_path / "story.txt"
    path.write_bytes("Grüße\r\nfrom afar\n".encode())
    text = read_text(str(path))
    assert (text.name, text.text, text.characters) == ("story.txt", "Grüße\r\nfrom afar\n", 17)
    assert text == read_text(path) and text.source == str(path)


def test_a_byte_order_mark_is_no_first_token(tmp_path: Path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfOnce")
    assert read_text(tmp_path / "bom.txt").text == "Once"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"abc\xff\xfe", "not UTF-8 text .byte 0xff at offset 3.*iconv"),
        (b"abc\0def", "NUL byte at offset 3"),
        (b" \n", "holds no text"),
        (b"", "holds no text"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes, complaint: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidInput, match=complaint):
        read_text(tmp_path / "file")


def test_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(InvalidInput, match="is a folder"):
        read_text(tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownName, match=r"did you mean 'austen'\?\).*python-reference, austen, bible"):
        read_text("austin")


def r_record(lines: list[str | None]) -> bytes:
    """A character vector as R writes it: format X, version 3."""
    head = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8" + struct.pack(">ii", 0x10, len(lines))
    strings = ((b"", -1) if line is None else (line.encode(), len(line.encode())) for line in lines)
    stream = zlib.compress(head + b"".join(struct.pack(">ii", 0x09, size) + text for text, size in strings))
    return struct.pack(">I", len(head)) + stream


def test_novels_come_out_of_an_r_database(tmp_path: Path):
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(r_record(["EMMA", "", "Café society."]) + r_record(["PERSUASION", None, "The end."]))
    assert readers.read_austen(path) == "EMMA\n\nCafé society.\n\n\nPERSUASION\n\nThe end."


def test_another_r_object_is_refused(tmp_path: Path):
    path = tmp_path / "Rdata.rdb"
    head = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8" + struct.pack(">ii", 0x0D, 1)
    path.write_bytes(struct.pack(">I", len(head)) + zlib.compress(head + b"\0\0\0\1"))
    with pytest.raises(ValueError, match="kind 13"):
        readers.read_austen(path)


def pack_lzw(data: bytes) -> bytes:
    """The compressor that belongs to `readers._lzw`, written from compress(1)'s description."""
    table = {bytes([value]): value for value in range(256)}
    codes, known = [], b""
    for value in data:
        longer = known + bytes([value])
        if longer in table:
            known = longer
            continue
        codes.append(table[known])
        table[longer] = len(table) + 1  # 256 stands for the code that empties the table
        known = bytes([value])
    codes += [table[known]] if known else []
    packed, block, width, entries = b"", [], 9, 257
    for code in [*codes, 256]:
        block.append(code)
        if len(block) == 8:
            packed, block = packed + pack_block(block, width), []
        entries += len(packed) + len(block) > 1  # the decoder makes no entry for the first code
        if entries >= 1 << width and width < 16:
            packed, block, width = (
                packed + (pack_block(block + [0] * (8 - len(block)), width) if block else b""),
                [],
                width + 1,
            )
    return packed + pack_block(block, width)


def pack_block(codes: list[int], width: int) -> bytes:
    bits = sum(code << (width * index) for index, code in enumerate(codes))
    return bits.to_bytes(-(-width * len(codes) // 8), "little")


@given(st.binary(max_size=200) | st.text("ab", max_size=3000).map(str.encode))
def test_lzw_comes_back(data: bytes):
    assert readers._lzw(pack_lzw(data)) == data


def test_lzw_comes_back_over_several_widths():
    data = b" ".join(str(number * number).encode() for number in range(5000))
    assert readers._lzw(pack_lzw(data)) == data


def test_verses_come_out_of_their_windows(tmp_path: Path):
    windows = [b"Holy Bible, edition\nGe1:1 In the begin", b"ning God created.\nGe1:2 And the earth"]
    packed = [pack_lzw(window) for window in windows]
    edges = [92 + 4 * 3]
    for window in packed:
        edges.append(edges[-1] + len(window))
    head = bytes(84) + struct.pack(">II", 65536, len(packed)) + struct.pack(">3I", *edges)
    (tmp_path / "bible.data").write_bytes(head + b"".join(packed))
    assert readers.read_bible(tmp_path / "bible.data") == "Ge1:1 In the beginning God created.\nGe1:2 And the earth"


def test_summaries_and_conversations(tmp_path: Path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"Moon": {"extract": "It orbits."}, "Sun": {"extract": "It shines."}}))
    assert readers.read_wikipedia(path) == "Moon\nIt orbits.\n\nSun\nIt shines."
    turns = [[{"text": "Hi", "sender": "x"}, {"text": "there", "sender": "x"}], [{"text": "Hello", "sender": "y"}]]
    path.write_text(json.dumps({"1": {"messages": turns}, "2": {"messages": turns[1:]}}))
    assert readers.read_dialogues(path) == "A: Hi there\nB: Hello\n\nA: Hello"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"SINKS_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ("linux", {"SINKS_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/sinks"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "~/.cache/sinks"),
        ("linux", {}, "~/.cache/sinks"),
        ("darwin", {}, "~/Library/Caches/sinks"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/sinks/Cache"),
        ("win32", {}, "~/AppData/Local/sinks/Cache"),
    ],
)
def test_the_cache_folder(platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("SINKS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert folder.cache_folder() == Path(expected).expanduser()


def test_without_a_terminal_nothing_is_drawn(capfd: pytest.CaptureFixture[str]):
    with reporting(None) as report:
        assert report is silent
        report("download", 1, 2)
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_a_bar_is_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with reporting(None):
        pass
    assert capsys.readouterr().err == ""
    with reporting(None) as report:
        report("download", 0, 0)
        report("download", 5, 10)
    assert "download" in capsys.readouterr().err
