"""Results appear whole or not at all."""

import os
from pathlib import Path

import pytest

from sinks.errors import InvalidInput
from sinks.report.files import results_file, results_folder, write_together
from tests.nodes import NODES, kind_of, make


def test_folders_are_made_and_stay(tmp_path: Path):
    with results_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_folders_made_for_nothing_are_taken_away(tmp_path: Path, error: type[BaseException]):
    (tmp_path / "a").mkdir()
    with pytest.raises(error), results_folder(tmp_path / "a" / "b" / "c"):
        raise error
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), results_folder(tmp_path / "a") as folder:
        (folder / "of someone else").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "a" / "of someone else").exists()


def test_where_nothing_can_be_written_no_work_begins(tmp_path: Path):
    (tmp_path / "file").touch()
    for impossible in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match="no result can be written to .*: choose another folder"):
            with results_folder(impossible):
                pytest.fail("work began")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInput, match="Permission denied"), results_folder(tmp_path):
        pytest.fail("work began")
    tmp_path.chmod(0o700)


def test_files_replace_only_their_own_names(tmp_path: Path):
    for name in ("ours.json", "theirs.json"):
        (tmp_path / name).write_text("old")
    paths = write_together(tmp_path, {"ours.json": b"new", "ours.png": b"picture"})
    assert paths == [tmp_path / "ours.json", tmp_path / "ours.png"]
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"ours.json": "new", "ours.png": "picture", "theirs.json": "old"}
    (tmp_path / "plain").touch()
    assert paths[0].stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_half_way_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").write_text("old")
    chmod = os.chmod

    def fail_on_the_second(path: str, mode: int) -> None:
        if ".b." in path:
            raise KeyboardInterrupt
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", fail_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path, {"a": b"new", "b": b"new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize("kind", NODES)
def test_what_is_no_file_stops_the_work_before_it_begins(kind: str, tmp_path: Path):
    path = make(kind, tmp_path / "ours.json")
    before = kind_of(path)
    with pytest.raises(InvalidInput, match=f"which is a {kind}"), results_folder(tmp_path, ["a", "ours.json"]):
        pytest.fail("work began")
    with pytest.raises(InvalidInput, match=f"which is a {kind}"), results_file(path, "mark"):
        pytest.fail("work began")
    with pytest.raises(InvalidInput, match=f"which is a {kind}"):
        write_together(tmp_path, {"a": b"new", "ours.json": b"new"})
    assert kind_of(path) == before and list(tmp_path.iterdir()) == [path], "nor is anything left of its neighbours"


def test_links_stay_and_modes_too(tmp_path: Path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old").touch(0o640)
    (tmp_path / "link").symlink_to("far/old")
    assert write_together(tmp_path, {"link": b"new"}) == [tmp_path / "link"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "old").read_bytes() == b"new"
    assert (tmp_path / "far" / "old").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["old"]


def test_a_folder_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with results_folder(Path("~/results")) as folder:
        assert folder == tmp_path / "results" and folder.is_dir()


def test_one_file_is_written_again_and_again(tmp_path: Path):
    with results_file(tmp_path / "new" / "r.json", "mark") as write:
        for text in ('{"mark": 1}', '{"mark": 2}'):
            write(text)
            assert (tmp_path / "new" / "r.json").read_text() == text


def test_no_file_needs_no_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sinks.report.files.results_folder", lambda *_: pytest.fail("it looked for a place"))
    with results_file(None, "mark") as write:
        write("{}")


@pytest.mark.parametrize(
    "content", ["import os\n", '{"other": 1}', '["mark"]', '"mark"', '{"mark": ', "[" * 100_000, " "]
)
def test_what_is_no_such_document_is_never_replaced(content: str, tmp_path: Path):
    path = tmp_path / "r1.py"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=r"r1\.py' is no earlier result of this kind, and stays as it is"):
        with results_file(path, "mark"):
            pytest.fail("work began")
    assert path.read_text() == content


@pytest.mark.parametrize("content", ["", '{"mark": []}'])
def test_such_a_document_and_an_empty_file_are_replaced(content: str, tmp_path: Path):
    path = tmp_path / "r.json"
    path.write_text(content)
    with results_file(path, "mark") as write:
        assert path.read_text() == content, "not before there is something better"
        write("{}")
    assert path.read_text() == "{}"
