"""Where a snapshot may be written and read: what is refused, where links lead, and what stays of the file before."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinks.cache.cache import SinkCache
from sinks.cache.fingerprint import fingerprint
from sinks.cache.snapshot import check_target, look_at, read_snapshot, write_snapshot
from sinks.errors import SnapshotError
from sinks.models.attach import attach
from tests.families.tiny import build, tokens
from tests.nodes import NODES, kind_of, make

MODEL = attach(build("llama", layers=2))
PRINT = fingerprint(MODEL)


def cache_of(length: int) -> SinkCache:
    cache = SinkCache.for_model(MODEL, sinks=3, window=7)
    MODEL(tokens(length, 1, seed=length), past_key_values=cache)
    return cache


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "stream.sinks"
    write_snapshot(path, cache_of(25), PRINT, {})
    return path


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="in no folder that exists"):
        write_snapshot(tmp_path / "none" / "s", cache_of(3), PRINT, {})


def test_a_file_that_is_no_snapshot_is_never_overwritten(saved: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    for target, why in ((mine, "is no saved session"), (tmp_path, "is a folder"), (tmp_path / "no" / "x", "no folder")):
        with pytest.raises(SnapshotError, match=why):
            check_target(target)
    assert mine.read_text() == "precious"
    saved.write_bytes(saved.read_bytes()[:-100])
    check_target(saved)  # damaged, but ours
    (tmp_path / "empty").touch()
    check_target(tmp_path / "empty")


@pytest.mark.parametrize("kind", NODES)
def test_what_is_no_file_is_neither_written_nor_opened(kind: str, tmp_path: Path) -> None:
    """A device was replaced by a file, and a FIFO waited for ever for somebody at its other end."""
    path = make(kind, tmp_path / "node")
    before = kind_of(path)
    with pytest.raises(SnapshotError, match=f"nothing can be written to .*, which is a {kind}: name a file"):
        write_snapshot(path, cache_of(3), PRINT, {})
    for read in (lambda: look_at(path), lambda: read_snapshot(path, MODEL, PRINT)):
        with pytest.raises(SnapshotError, match=f"cannot be read, for it is a {kind}: give a saved session"):
            read()
    assert kind_of(path) == before and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_what_it_leads_to_is_replaced(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    saved.rename(folder / "p.sinks").chmod(0o644)
    (tmp_path / "link.sinks").symlink_to("elsewhere/p.sinks")
    write_snapshot(tmp_path / "link.sinks", cache_of(40), PRINT, {})
    assert (tmp_path / "link.sinks").is_symlink() and [path.name for path in folder.iterdir()] == ["p.sinks"]
    assert (folder / "p.sinks").stat().st_mode & 0o777 == 0o644
    assert read_snapshot(folder / "p.sinks", MODEL, PRINT)[0].seen == [40]


def test_a_new_file_is_private(saved: Path) -> None:
    assert saved.stat().st_mode & 0o777 == 0o600


def test_a_link_to_somebody_elses_file(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "link").symlink_to("mine.txt")
    with pytest.raises(SnapshotError, match="link' is no saved session, and stays as it is"):
        check_target(tmp_path / "link")


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_snapshot("~/s", cache_of(3), PRINT, {})
    assert (tmp_path / "s").is_file() and look_at("~/s").size == (tmp_path / "s").stat().st_size
    assert read_snapshot("~/s", MODEL, PRINT)[0].seen == [3]
    for use in (look_at, check_target):
        with pytest.raises(SnapshotError, match="begins with a home folder that is not known here"):
            use("~nobody-at-all/s")
