"""Files that a person names: what is refused, where links lead, and what stays of the file that is replaced."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sinks import files
from sinks.assets.pictures import read_pictures
from sinks.assets.texts import read_text
from sinks.errors import InvalidInput
from sinks.files import expanded, node, writable
from sinks.models.encoders import load_encoder
from sinks.models.load import load
from tests.nodes import NODES, kind_of, make


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", NODES)
def test_what_is_no_file_is_never_written_to(kind: str, linked: bool, tmp_path: Path):
    path = make(kind, tmp_path / "node")
    before, named = kind_of(path), path
    if linked:
        named = tmp_path / "link"
        named.symlink_to("node")
    assert node(named) == f"a {kind}"
    with pytest.raises(InvalidInput, match=f"nothing can be written to '{named}', which is a {kind}: name a file"):
        writable(named)
    assert kind_of(path) == before


def test_a_new_file_and_an_old_one(tmp_path: Path):
    new = writable(tmp_path / "new")
    assert (new.path, new.mode) == (tmp_path / "new", None) and not new.path.exists()
    new.path.touch(0o640)
    assert writable(str(tmp_path / "new")).mode == 0o640
    assert node(new.path) is None and node(tmp_path / "none") is None


@pytest.mark.parametrize("there", [True, False])
def test_a_link_leads_to_what_is_written(there: bool, tmp_path: Path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    if there:
        (tmp_path / "far" / "file").touch()
    target = writable(tmp_path / "link")
    assert target.path == tmp_path / "far" / "file"
    assert target.beside([b"x"]).parent == tmp_path / "far"


def test_links_that_lead_nowhere(tmp_path: Path):
    (tmp_path / "lost").symlink_to("no/such/folder")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidInput, match="in no folder that exists: make it first"):
        writable(tmp_path / "lost")
    with pytest.raises(InvalidInput, match="nothing can be written to .*loop.*choose another name"):
        writable(tmp_path / "loop")


def test_no_permission_to_write_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch(0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InvalidInput, match="which you may not write: choose another name, or change its permissions"):
        writable(tmp_path / "file")


def test_no_permission_to_write_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "prove", refuse)
    with pytest.raises(InvalidInput, match="(Permission denied).*choose another name or folder"):
        writable(tmp_path / "file")


def test_content_beside_the_file(tmp_path: Path):
    (tmp_path / "old").touch(0o604)
    for name, mode in (("old", 0o604), ("new", 0o600)):
        beside = writable(tmp_path / name).beside([b"a", memoryview(b"bc")], suffix=".s", durable=True)
        assert beside.read_bytes() == b"abc" and beside.stat().st_mode & 0o777 == mode
        assert beside.name.startswith(f".{name}.") and beside.suffix == ".s"
    assert (tmp_path / "old").read_bytes() == b""


def test_nothing_is_left_of_what_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        writable(tmp_path / "file").beside([b"x"])
    assert list(tmp_path.iterdir()) == []


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x" and expanded("a/~") == Path("a/~")
    assert writable("~/x").path == tmp_path / "x"
    with pytest.raises(InvalidInput, match="'~nobody-at-all/x' begins with a home folder that is not known here"):
        expanded("~nobody-at-all/x")


@pytest.mark.parametrize("use", [read_text, read_pictures, load, load_encoder])
def test_whoever_takes_a_path_knows_the_home_of_nobody(use: Callable[[str], object]):
    with pytest.raises(InvalidInput, match="begins with a home folder that is not known here: write it out"):
        use("~nobody-at-all/x")
