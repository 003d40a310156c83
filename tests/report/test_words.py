"""Words follow numbers: each claim appears where it is true, and not where it is not."""

import pytest

from sinks.evals.arms import SWEEP
from sinks.report.words import headline, notes, reading, size
from tests.report.fake import fake_comparison


def test_all_arms():
    assert reading(fake_comparison()) == (
        "After the first eviction a plain window of 256 keys has 2.01 times the perplexity of four sinks and 252 "
        "recent tokens (24.53 against 12.18). Dense attention reaches 9.97 on the same tokens with a cache that "
        "grows to 94.3 MB; sinks stay at 11.8 MB, and are 22 % above it. One sink is enough for this model on "
        "this text. With four line breaks in place of the sinks perplexity is 1.01 times theirs: it is the place "
        "that makes a sink, not the token. Computing the window afresh for every token gives 1.00 ± 0.00 times "
        "the sinks' perplexity at 16 sampled positions, and takes 28 times as long a token. What leaves the 256 "
        "keys is forgotten: the stream has no end, but the window is no longer than before."
    )


def test_only_what_was_measured():
    everything = {"dense", "window", "recompute", "newlines", *(f"sweep-{kept}" for kept in SWEEP)}
    alone = fake_comparison(leave_out=tuple(everything))
    assert reading(alone).startswith("What leaves the 256 keys")
    assert reading(fake_comparison(leave_out=("sinks", "sweep-2"))).startswith("What leaves the 256 keys")


def test_a_window_that_does_as_well_is_not_talked_down():
    harmless = fake_comparison({"window": 2.51, "sweep-0": 2.51})
    assert "On this text a plain window of 256 keys does as well as four sinks and 252 recent" in reading(harmless)
    assert "line break" not in reading(harmless), "what is not needed shows nothing about its place"
    assert "needs no sink on this text" in reading(harmless)
    assert headline(harmless) == "Reading 2,048 tokens with 256 keys"


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ({"sweep-1": 2.6}, "Two sinks are enough for this model on this text."),
        ({"sweep-1": 2.6, "sweep-2": 2.6}, "Four sinks are enough for this model on this text."),
        ({"sweep-8": 2.3}, "Even eight sinks are better than fewer."),
        ({"newlines": 3.0}, "1.65 times theirs: the token matters too."),
        ({"window": 2.4}, "a plain window of 256 keys does better than four sinks and 252 recent tokens"),
        ({"dense": 2.5}, "and are level with it."),
        ({"dense": 2.6}, "and are 10 % below it."),
        ({"recompute": 2.6}, "gives 1.11 ± 0.00 times the sinks' perplexity"),
    ],
)
def test_other_numbers_other_words(levels: dict[str, float], says: str):
    assert says in reading(fake_comparison(levels))


def test_where_dense_stopped_is_said_and_perplexities_are_on_shared_tokens():
    stopped = fake_comparison(limit=1000)
    assert "grows to 46.1 MB; it stops at 1,000 tokens, its trained length; sinks stay" in reading(stopped)
    assert notes(stopped)[0].startswith("dense stops at 1,000 tokens")
    assert not any(note.startswith("dense") for note in notes(fake_comparison()))


def test_what_dense_attention_copies_is_not_held_against_the_window():
    repeating = fake_comparison(repeats=slice(1600, 1779))
    repeating.arms["dense"].score.nll[1600:1779] = 0.1
    assert (
        "and are 52 % above it. Of these tokens 10 % repeat, word for word, a passage that has left the window, which "
        "only dense attention can copy; on the others sinks are 22 % above it." in reading(repeating)
    )
    hardly = fake_comparison(repeats=slice(1600, 1610))
    assert "repeat" not in reading(hardly)


def test_notes_say_over_how_many_samples():
    (note,) = (note for note in notes(fake_comparison()) if note.startswith("*"))
    assert note.startswith("* over 16 sampled tokens (seed 0), on which the others have dense 10.41, window 25.59")
    assert not any(note.startswith("*") for note in notes(fake_comparison(leave_out=("recompute",))))


def test_the_headline_is_a_claim_only_where_it_holds():
    assert headline(fake_comparison()) == "Four kept tokens hold the line"
    assert headline(fake_comparison(leave_out=("dense",))) == "Four kept tokens hold the line"
    far_from_dense = fake_comparison({"dense": 2.0})
    assert (
        headline(far_from_dense)
        == headline(fake_comparison(leave_out=("window",)))
        == ("Reading 2,048 tokens with 256 keys")
    )


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (11_796_480, "11.8 MB"), (99_960_000, "100 MB"),
     (377_487_360, "377 MB"), (999_600_000, "1.0 GB"), (2.5e12, "2500 GB")],
)  # fmt: skip
def test_sizes(count: float, words: str):
    assert size(count) == words


def test_dense_attention_alone_is_told_of_nobody_else():
    others = {"window", "recompute", "sinks", "newlines", *(f"sweep-{kept}" for kept in SWEEP)}
    alone = fake_comparison(leave_out=tuple(others))
    assert reading(alone) == ""
    assert headline(alone) == "Reading 2,048 tokens with dense attention"
    assert "sinks" not in " ".join(notes(alone))
