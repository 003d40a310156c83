"""From words to contenders."""

from typing import Any

import pytest

from sinks.errors import CapacityError, InvalidInput, UnsupportedOption
from sinks.evals.arms import ARMS, SWEEP, Settings, contenders
from sinks.evals.contenders import Dense, Newlines, Pace, Recompute, Sinks
from tests.reading.tiny import BOS, TRAINED, stream, tiny_model, tiny_tokenizer


def test_all_bounded_arms_hold_equal_memory_and_equal_settings_are_one_contender():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = contenders(Settings(4, 12), model, tokenizer, bos=None)
    line_break = tokenizer("\n").input_ids[0]
    assert found == {
        "dense": Dense(TRAINED),
        "window": Sinks(0, 16),
        "recompute": Recompute(16, 128, 0),
        "sinks": Sinks(4, 12),
        **{f"sweep-{kept}": Sinks(kept, 16 - kept) for kept in SWEEP},
        "newlines": Newlines(4, 12, line_break),
    }
    assert found["sweep-0"] == found["window"]
    assert found["sweep-4"] == found["sinks"]
    assert len(set(found.values())) == 8


def test_arms_keep_one_order_whatever_the_order_they_are_asked_in():
    settings = Settings(4, 12, arms=("sinks", "dense", "sinks"), beyond_trained_length=True)
    found = contenders(settings, tiny_model(), tiny_tokenizer(), bos=None)
    assert list(found.items()) == [("dense", Dense(None)), ("sinks", Sinks(4, 12))]


def test_another_cache_stands_beside_the_sinks_and_not_in_their_place():
    settings = Settings(4, 12, arms=("sinks", "window"), cache="int8")
    found = contenders(settings, tiny_model(), tiny_tokenizer(), bos=None)
    expected = [("window", Sinks(0, 16)), ("sinks", Sinks(4, 12)), ("sinks-int8", Sinks(4, 12, "int8"))]
    assert list(found.items()) == expected
    full, coded = (found[name].read(tiny_model(), stream(), Pace(chunk=16)) for name in ("sinks", "sinks-int8"))
    assert full.nll[1:5] == pytest.approx(coded.nll[1:5], abs=1e-12), "sinks are not rounded"
    assert 0 < abs(full.nll[20:] - coded.nll[20:]).max() < 0.5
    assert coded.cache_bytes.max() < full.cache_bytes.max() / 2


def test_recomputation_begins_as_streams_do():
    found = contenders(Settings(4, 12, arms=("recompute",)), tiny_model(), tiny_tokenizer(bos=True), bos=BOS)
    assert found == {"recompute": Recompute(16, 128, 0, bos=BOS)}


def test_a_tokenizer_without_line_breaks_is_named_only_where_it_matters():
    model, tokenizer = tiny_model(), tiny_tokenizer(line_break=False)
    assert contenders(Settings(4, 12, arms=("sinks",)), model, tokenizer, bos=None)
    with pytest.raises(UnsupportedOption, match="no token for a line break"):
        contenders(Settings(4, 12, arms=("newlines",)), model, tokenizer, bos=None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sinks": -1}, "sinks must be at least 1, got -1"),
        ({"sinks": 0}, "the arm without sinks is 'window'"),
        ({"window": -5}, "window must be at least 1, got -5"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"arms": ()}, "no arm was asked for: the arms are dense, window"),
        ({"arms": ("dense", "windw")}, "no arm is called 'windw': the arms are dense, window, recompute, sinks, sweep"),
        ({"cache": "int8", "arms": ("dense", "window")}, "compared with the arm 'sinks': add it to the arms"),
        ({"sinks": 1, "window": 7}, "the sweep keeps up to 8 sinks, and sinks \\+ window is only 8"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], says: str):
    sensible: dict[str, Any] = {"sinks": 4, "window": 12}
    with pytest.raises(InvalidInput, match=says):
        Settings(**(sensible | changes))


def test_a_small_window_needs_no_sweep():
    settings = Settings(1, 3, arms=tuple(arm for arm in ARMS if arm != "sweep"))
    assert settings.capacity == 4


def test_sinks_and_window_must_fit_the_model():
    with pytest.raises(CapacityError):
        Sinks(4, TRAINED).read(tiny_model(), stream(), Pace())
