"""A cache in a file: the same stream afterwards, and no file that is not exactly what was written."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache import snapshot
from sinks.cache.cache import SinkCache
from sinks.cache.fingerprint import fingerprint
from sinks.cache.snapshot import read_snapshot, write_snapshot
from sinks.errors import (
    BrokenCache,
    DamagedSnapshot,
    InvalidInput,
    OtherModel,
    OtherVersion,
    SnapshotError,
)
from sinks.models.attach import attach, detach
from tests.families.tiny import build, tokens
from tests.law.tree import ROOT

MODEL = attach(build("llama", layers=2))
PRINT = fingerprint(MODEL)
EXTRAS = {"beside.it": torch.arange(5, dtype=torch.uint8)}


def cache_of(model: PreTrainedModel, length: int, sinks: int = 3, window: int = 7, rows: int = 1) -> SinkCache:
    cache = SinkCache.for_model(model, sinks=sinks, window=window)
    if length:
        model(tokens(length, rows, seed=length), past_key_values=cache)
    return cache


def go_on(model: PreTrainedModel, cache: SinkCache, rows: int = 1) -> Tensor:
    parts = tokens(30, rows, seed=9).split(4, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "stream.sinks"
    write_snapshot(path, cache_of(MODEL, 25), PRINT, EXTRAS)
    return path


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 3, 10, 11, 57])
def test_the_stream_goes_on_bit_for_bit(length: int, rows: int, tmp_path: Path) -> None:
    cache = cache_of(MODEL, length, rows=rows)
    write_snapshot(tmp_path / "s", cache, PRINT, EXTRAS)
    again, extras = read_snapshot(tmp_path / "s", MODEL, PRINT)
    assert (again.plan, again.seen, again.nbytes) == (cache.plan, cache.seen, cache.nbytes)
    assert again.get_seq_length() == cache.get_seq_length()
    assert extras.keys() == EXTRAS.keys() and torch.equal(extras["beside.it"], EXTRAS["beside.it"])
    assert torch.equal(go_on(MODEL, cache, rows), go_on(MODEL, again, rows))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3", "bloom", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_families_and_data_types(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = attach(build(name, layers=2, dtype=dtype))
    cache = cache_of(model, 25)
    write_snapshot(tmp_path / "s", cache, fingerprint(model), {})
    again, _ = read_snapshot(tmp_path / "s", model, fingerprint(model))
    assert torch.equal(go_on(model, cache), go_on(model, again))


def test_the_size_is_constant_and_the_file_is_safetensors(tmp_path: Path) -> None:
    sizes = set()
    for length in (1, 9, 10, 11, 400):
        write_snapshot(tmp_path / "s", cache_of(MODEL, length), PRINT, EXTRAS)
        sizes.add((tmp_path / "s").stat().st_size)
    assert len(sizes) == 1
    with safe_open(tmp_path / "s", "pt") as file:
        assert file.metadata()["format"] == "sinks.snapshot" and file.metadata()["model"] == PRINT
        assert "keys.0" in file.keys()  # noqa: SIM118 (it is no dict)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_positions_beyond_every_integer_type_but_the_widest(tmp_path: Path) -> None:
    cache = cache_of(MODEL, 25)
    held = cache.dump() | {"cache.seen": torch.tensor([2**40 + 25])}
    cache.adopt({name: tensor.clone() for name, tensor in held.items()})
    write_snapshot(tmp_path / "s", cache, PRINT, {})
    again, _ = read_snapshot(tmp_path / "s", MODEL, PRINT)
    assert again.seen == [2**40 + 25]
    assert torch.equal(go_on(MODEL, cache), go_on(MODEL, again))


# Forks


def test_a_fork_shares_nothing() -> None:
    cache = cache_of(MODEL, 25, rows=2)
    twin = cache.fork()
    ours, theirs = cache.dump(), twin.dump()
    storages = {tensor.untyped_storage().data_ptr() for tensor in ours.values()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in theirs.values()}
    before = {name: tensor.clone() for name, tensor in theirs.items()}
    first = go_on(MODEL, cache, rows=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.dump().items())
    assert torch.equal(go_on(MODEL, twin, rows=2), first)


def test_what_cannot_be_forked_or_dumped() -> None:
    cache = SinkCache.for_model(MODEL, sinks=3, window=7)
    cache.open_pass(MODEL.base_model, (1, 1), None, None)
    for use in (cache.dump, cache.fork):
        with pytest.raises(BrokenCache, match="half-way"):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("keys.1"), "keys.1"),
        (lambda held: held.update({"cache.offsets": torch.tensor([0, 0])}), "do not agree"),
        (lambda held: held.update({"cache.columns": torch.tensor([3])}), "do not agree"),
        (lambda held: held.update({"cache.seen": torch.tensor([-3])}), "do not agree"),
        (lambda held: held.update({"keys.0": held["keys.0"][:, :, :5]}), "do not fit a ring of 10"),
        (lambda held: held.update({"values.0": held["values.0"][:, :, :5]}), "do not fit a ring of 10"),
        (lambda held: held.update({"keys.0": torch.cat([held["keys.0"]] * 2)}), "do not fit a ring of 10 in 1 rows"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_left(change: Callable, message: str) -> None:
    held = cache_of(MODEL, 25).dump()
    change(held)
    cache = SinkCache.for_model(MODEL, sinks=3, window=7)
    with pytest.raises(InvalidInput, match=message):
        cache.adopt(held)
    assert cache.seen == [] and cache.nbytes == 0 and cache.get_seq_length() == 0


# Fingerprints


def test_a_fingerprint_is_of_the_weights_and_of_where_tokens_stand() -> None:
    assert fingerprint(build("llama", layers=2)) == PRINT
    others = [build("llama", layers=2, seed=1), build("llama", layers=1), build("llama", layers=2, dtype=torch.float32)]
    other_theta = {"rope_theta": 5e5, "rope_type": "default"}
    others += [build("mistral", layers=2), build("llama", layers=2, rope_parameters=other_theta)]
    changed = build("llama", layers=2)
    changed.lm_head.weight.data[-1, -1] += 1e-12
    swapped = build("llama", layers=2)
    weight = swapped.model.layers[0].self_attn.q_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    prints = [fingerprint(model) for model in (*others, changed, swapped)]
    assert len({PRINT, *prints}) == 1 + len(prints)
    detach(MODEL)
    assert fingerprint(MODEL) == PRINT
    attach(MODEL)


def test_another_model_is_refused_by_name(saved: Path) -> None:
    other = attach(build("llama", layers=2, seed=1))
    with pytest.raises(OtherModel, match="saved from another model"):
        read_snapshot(saved, other, fingerprint(other))


# Damage


def with_metadata(path: Path, **changes: str) -> None:
    """Write the header anew, and leave the rest."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"].update(changes)
    raw = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def test_another_version_is_refused_by_name(saved: Path) -> None:
    with_metadata(saved, version="3")
    with pytest.raises(OtherVersion, match="format version '3', and this version of sinks reads 2"):
        read_snapshot(saved, MODEL, PRINT)


@pytest.mark.parametrize("change", [{"sinks": "4"}, {"model": "0" * 64}, {"window": "x"}, {"format": "pt"}])
def test_changed_metadata_are_refused(saved: Path, change: dict[str, str]) -> None:
    with_metadata(saved, **change)
    with pytest.raises(DamagedSnapshot):
        read_snapshot(saved, MODEL, PRINT)


def test_every_kind_of_cut_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    for size in [*range(12), length - 1, length, length + 1, *range(length, len(data), 997), len(data) - 1]:
        saved.write_bytes(data[:size])
        with pytest.raises(DamagedSnapshot, match="cut short"):
            read_snapshot(saved, MODEL, PRINT)


def test_what_is_too_long_is_refused_before_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(saved, 1 << 40)  # a terabyte of nothing: a sparse file
    monkeypatch.setattr(snapshot, "_check_digest", lambda *_: pytest.fail("it was read"))
    with pytest.raises(DamagedSnapshot, match="longer than what was written: 1,099,511,627,776 bytes"):
        read_snapshot(saved, MODEL, PRINT)


def test_a_header_that_claims_to_be_endless_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(DamagedSnapshot, match="no safetensors header"):
        read_snapshot(tmp_path / "s", MODEL, PRINT)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_refused(saved: Path, data: st.DataObject) -> None:
    whole = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(whole) - 1)))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = saved.with_name("damaged")
    damaged.write_bytes(whole)
    with pytest.raises((DamagedSnapshot, OtherVersion)):
        read_snapshot(damaged, MODEL, PRINT)


@given(junk=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_is_refused(tmp_path: Path, junk: bytes) -> None:
    for data in (junk, struct.pack("<Q", len(junk)) + junk):
        (tmp_path / "junk").write_bytes(data)
        with pytest.raises(DamagedSnapshot):
            read_snapshot(tmp_path / "junk", MODEL, PRINT)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"[" * 4000,
        b'{"__metadata__":3}',
        b'{"__metadata__":{"format":"sinks.snapshot","version":"2"}}',
        b'{"__metadata__":{"format":"sinks.snapshot","version":"2"},"a":{"data_offsets":[0]}}',
        b'{"__metadata__":{"format":"sinks.snapshot","version":"2"},"a":{"data_offsets":"x"}}',
        b'{"__metadata__":{"format":"sinks.snapshot","version":"2"},"a":7}',
    ],
)
def test_headers_that_are_none_are_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(DamagedSnapshot):
        read_snapshot(tmp_path / "s", MODEL, PRINT)


def test_no_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(SnapshotError, match="cannot be read"):
            read_snapshot(path, MODEL, PRINT)


# Being killed


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


STEPS = ("write", "fsync", "replace")


class Disk:
    """Counts the calls that touch the disk, and dies in the one with a given number, before it acts."""

    def __init__(self, patched: pytest.MonkeyPatch, die_at: int = 0, death: BaseException | None = None) -> None:
        self.steps: list[str] = []
        for name in STEPS:
            patched.setattr(os, name, self.wrapped(name, getattr(os, name), die_at, death))

    def wrapped(self, name: str, true: Callable, die_at: int, death: BaseException | None) -> Callable:
        def step(*args: object) -> object:
            self.steps.append(name)
            if death is not None and len(self.steps) == die_at:
                raise death
            return true(*args)

        return step


@pytest.mark.parametrize("death", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_dying_at_any_step_leaves_a_readable_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, death: BaseException
) -> None:
    monkeypatch.setattr(snapshot, "CHUNK", 500)
    old, new = cache_of(MODEL, 25), cache_of(MODEL, 40)
    with monkeypatch.context() as patched:
        disk = Disk(patched)
        write_snapshot(saved.with_name("other"), new, PRINT, EXTRAS)
        saved.with_name("other").unlink()
    writes = len(disk.steps) - 3
    assert disk.steps == ["write"] * writes + ["fsync", "replace", "fsync"] and writes > 10
    for die_at in range(1, len(disk.steps) + 1):
        write_snapshot(saved, old, PRINT, EXTRAS)
        with monkeypatch.context() as patched, pytest.raises((Killed, SnapshotError)) as told:
            Disk(patched, die_at, death)
            write_snapshot(saved, new, PRINT, EXTRAS)
        assert told.type is Killed or "No space left" in str(told.value)
        # Only the last step, which makes the new name durable, comes after the new file is in its place.
        assert read_snapshot(saved, MODEL, PRINT)[0].seen == ([40] if die_at == len(disk.steps) else [25])
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]


KILLED = """
import os, signal, sys
from sinks.cache import snapshot
from sinks.cache.cache import SinkCache
from sinks.models.attach import attach
from tests.families.tiny import build, tokens

model = attach(build("llama", layers=2))
cache = SinkCache.for_model(model, sinks=3, window=7)
model(tokens(40), past_key_values=cache)
true, count = os.write, 0

def write(handle, data):
    global count
    count += 1
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return true(handle, data)

os.write, snapshot.CHUNK = write, 500
snapshot.write_snapshot(sys.argv[1], cache, "0" * 64, {})
"""


def test_a_killed_process_leaves_the_file_before(saved: Path) -> None:
    """For real: SIGKILL in the middle of the writes."""
    before = saved.read_bytes()
    result = subprocess.run([sys.executable, "-c", KILLED, str(saved)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert saved.read_bytes() == before
    (left,) = (path for path in saved.parent.iterdir() if path != saved)
    assert left.name.startswith(".stream.sinks.") and left.name.endswith(".saving")
    assert 0 < left.stat().st_size < len(before)
