"""A session put away: forks that share nothing, snapshots that go on word for word, and steps that were broken off."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sinks.errors import BrokenCache, DamagedSnapshot, OtherModel, SnapshotError, UnsupportedOption
from sinks.stream import session as session_module
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.stream.opened import CLOSE, IDS, SINKS, WARM, WINDOW, fresh, future, ids_of, opened, tiny_loaded


def test_forks_share_nothing_but_the_model() -> None:
    session = fresh(IDS[:30])
    list(session.generate(3, sampling=WARM))
    twin = session.fork()
    assert ids_of(twin) == ids_of(session)
    before = future(twin)
    expected = "".join(session.generate(20, sampling=WARM))
    session.feed(IDS)
    np.testing.assert_array_equal(future(twin), before)
    assert "".join(twin.generate(20, sampling=WARM)) == expected  # random numbers go on alike


def test_only_the_fork_of_a_listener_is_silent() -> None:
    told: list[int] = []
    session = opened(on_evict=lambda start, ids: told.append(start))
    session.feed(IDS[:12])
    session.fork().feed(IDS)
    assert not told
    other: list[int] = []
    session.fork(on_evict=lambda start, ids: other.append(start)).feed([1])
    assert other == [3] and not told


@pytest.mark.parametrize("fed", [0, 1, 5, 12, 70])
def test_the_next_200_tokens_after_a_snapshot(fed: int, tmp_path: Path) -> None:
    session = fresh(IDS[:fed])
    sampling = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1)
    if fed:
        answer = session.generate(9, sampling=sampling, stop=["ab"])
        next(answer)
    session.save(tmp_path / "s")
    again = opened()
    again.feed(IDS[:7])
    again.load(tmp_path / "s")
    assert (again.seen, ids_of(again)) == (session.seen, ids_of(session))
    if not fed:
        session.feed([3]), again.feed([3])
    assert list(again.generate(200, sampling=sampling)) == list(session.generate(200, sampling=sampling))
    assert ids_of(again) == ids_of(session)
    np.testing.assert_array_equal(future(again), future(session))


def test_a_snapshot_brings_its_sizes_and_its_text(tmp_path: Path) -> None:
    session = fresh([*IDS[:30], 65], sinks=1, window=20)
    euro = session.loaded.tokenizer("€").input_ids
    list(session.generate(1, sampling=Sampling(logit_bias={euro[0]: 1e4})))
    session.save(tmp_path / "s")
    told: list[int] = []
    again = opened(on_evict=lambda start, ids: told.append(start))
    again.load(tmp_path / "s")
    assert (again.plan.sinks, again.plan.window) == (1, 20)
    rest = [next(again.generate(1, sampling=Sampling(logit_bias={token: 1e4})), "") for token in euro[1:]]
    assert rest == ["", "€"] and told


def test_a_snapshot_has_one_size(tmp_path: Path) -> None:
    sizes = set()
    session = opened()
    for _ in range(6):
        session.feed(IDS[:7])
        next(session.generate(sampling=WARM))
        session.save(tmp_path / "s")
        sizes.add((tmp_path / "s").stat().st_size)
    assert len(sizes) == 1


def test_a_snapshot_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    session = fresh(IDS[:30])
    session.save(tmp_path / "s")
    other = Session(tiny_loaded(dtype=torch.float32), SINKS, WINDOW)
    other.feed(IDS[:5])
    with pytest.raises(OtherModel):
        other.load(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-1])
    for path, error in ((tmp_path / "cut", DamagedSnapshot), (tmp_path / "none", SnapshotError)):
        before = future(session)
        with pytest.raises(error):
            session.load(path)
        np.testing.assert_array_equal(future(session), before)
    assert other.seen == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.pop("session.seen"),
        lambda held: held["session.seen"].add_(1),
        lambda held: held["session.recent"].fill_(-1),
        lambda held: held["session.recent"].fill_(257),
        lambda held: held["session.pending"].fill_(256),
        lambda held: held["session.generator"].resize_(3),
        lambda held: held["session.has_logits"].fill_(True),
    ],
)
def test_a_state_that_does_not_agree_with_itself_is_refused(
    change: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a right checksum: as another program, or a mistake of ours, would write it."""
    true = session_module.pack

    def pack(*args: object) -> dict[str, torch.Tensor]:
        held = {name: tensor.clone() for name, tensor in true(*args).items()}  # type: ignore[arg-type]
        change(held)
        return held

    monkeypatch.setattr(session_module, "pack", pack)
    session = fresh(IDS[:30])
    session.save(tmp_path / "s")
    with pytest.raises(DamagedSnapshot, match="no state of a session"):
        session.load(tmp_path / "s")
    np.testing.assert_allclose(future(session), future(fresh(IDS[:30])), **CLOSE)


def test_reset_is_as_just_opened() -> None:
    session, other = fresh(IDS), opened()
    list(session.generate(5, sampling=WARM))
    session.reset()
    assert session.seen == session.nbytes == session.evicted == 0 and session.visible.spans == ()
    session.feed(IDS[:9]), other.feed(IDS[:9])
    assert list(session.generate(30, sampling=WARM)) == list(other.generate(30, sampling=WARM))


def test_a_choice_that_fails_can_be_made_again(tmp_path: Path) -> None:
    session, other = fresh(IDS[:20]), fresh(IDS[:20])
    forbidden = Sampling(logit_bias=dict.fromkeys(range(257), -math.inf))
    with pytest.raises(UnsupportedOption, match="no token is left"):
        list(session.generate(3, sampling=forbidden))
    session.save(tmp_path / "s")  # the newest token was read, and none was chosen behind it
    loaded = opened()
    loaded.load(tmp_path / "s")
    twin = session.fork()
    expected = list(other.generate(9))
    assert all(list(each.generate(9)) == expected for each in (session, loaded, twin))
    session.reset()
    session.feed(IDS[:20])
    assert list(session.generate(9)) == expected


def test_a_step_that_was_broken_off_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = fresh(IDS[:20])
    session.save(tmp_path / "s")
    monkeypatch.setattr(session._history, "extend", lambda ids: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(session.generate(3))
    monkeypatch.undo()
    for use in (lambda: session.feed([1, 2]), lambda: session.save(tmp_path / "t"), session.fork):
        with pytest.raises(BrokenCache, match="reset"):
            use()
    with pytest.raises(BrokenCache, match="reset"):
        list(session.generate(3))
    session.load(tmp_path / "s")
    np.testing.assert_allclose(future(session), future(fresh(IDS[:20])), **CLOSE)
