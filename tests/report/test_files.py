"""Results appear whole or not at all."""

import os
from pathlib import Path

import pytest

from sinks.errors import InvalidInput
from sinks.report.files import results_folder, write_together


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
