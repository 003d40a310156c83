"""Attention entropy by layer, head and position; and what kind of head each one is, by a stated rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sinks.analysis.measures.rows import Bins, Masses, Profile
from sinks.analysis.probe import probe, read
from sinks.cache.cache import SinkCache
from sinks.errors import InvalidInput, TextTooShort
from sinks.models.families import base_of
from sinks.models.observe import blocks_of
from sinks.reading.estimate import ratio_of_means
from sinks.types import Listener, Stage, unwatched

KINDS = ("sink", "previous", "local", "induction", "uniform", "mixed")

INDUCTION, PREVIOUS, SINK, LOCAL, UNIFORM = 0.3, 0.3, 0.3, 0.5, 0.9
"""The least of its measure that makes a head of a kind; on one key, it is the epsilon of Gu et al."""

NEAR = 16
"""Keys that count as local, the query's own included."""

REPEATED, REPEATS = 48, 16
"""Random tokens that are repeated once to find induction heads, and how many such texts are read."""

TURNS = 3
"""A stream is cut into segments of this many capacities, each read from an empty cache."""

LEAST = 8
"""Keys of the smallest window whose start, plateau and end can be told apart."""

START = 16
"""Queries that count as the start of a stream."""

SPIKE, FLAT, CLIFF = 1.1, 0.05, 0.9
"""What is held to be a spike at least, a plateau's change at most, and a cliff's ratio at most."""

CHUNK = 128
"""Columns of a stream that are fed at a time."""

RULE = (
    f"The first that fits: induction, at least {INDUCTION:.0%} of attention on the token after the last occurrence of "
    f"the current one, when random tokens are repeated; previous, at least {PREVIOUS:.0%} on the token before; sink, "
    f"at least {SINK:.0%} on the sink; local, at least {LOCAL:.0%} on the last {NEAR} tokens, sink left out; uniform, "
    f"entropy at least {UNIFORM:.0%} of its maximum; mixed, none of these. Masses are means over the second half of "
    "each text, the induction mass over the repetition."
)
"""How a head's kind follows from its measures."""


@dataclass(frozen=True, eq=False)
class Heads:
    """What each head does: the measures, and the kind that follows from them (`KINDS`, by index; see `RULE`).

    The first that fits, in this order: "induction" if `induction_mass` is at least 0.3, "previous" if `previous_mass`
    is at least 0.3, "sink" if `sink_mass` is at least 0.3, "local" if `local_mass` is at least 0.5, "uniform" if
    `normalised_entropy` is at least 0.9, else "mixed". Induction comes first because such heads rest on the sink
    wherever there is nothing to copy.

    Measures are means over the queries of the second half of each text, under dense attention: `sink_mass` on the sink
    keys (and a learned sink logit), `previous_mass` on the token before, `local_mass` on the last 16 tokens without
    the sink, `mean_distance` of what is not on the sink, in tokens. `induction_mass` is on the token after the last
    occurrence of the current one, in texts of 48 different random tokens, repeated once; the queries are those of the
    repetition.
    """

    kind: Int[np.ndarray, "layers heads"]
    sink_mass: Float[np.ndarray, "layers heads"]
    previous_mass: Float[np.ndarray, "layers heads"]
    local_mass: Float[np.ndarray, "layers heads"]
    induction_mass: Float[np.ndarray, "layers heads"]
    normalised_entropy: Float[np.ndarray, "layers heads"]
    mean_distance: Float[np.ndarray, "layers heads"]


@dataclass(frozen=True)
class Folklore:
    """The saying that entropy along a stream has a spike at the start, a plateau, and a cliff when the first token is
    let go: each part as a number, and whether it holds, by the stated rule.

    Each number is a ratio of mean normalised entropies (over heads, layers and queries) of two stretches of a stream;
    `low` and `high` are the ends of its 95 % interval, segments of the stream drawn as pairs (NaN: one segment).
    """

    claim: str
    measured: float
    low: float
    high: float
    holds: bool
    rule: str


@dataclass(frozen=True, eq=False)
class Entropy:
    """Profiles of dense attention, of a stream with sinks and of a plain window; the heads; the folklore.

    Without a stream there is only the first profile, and no folklore.
    """

    profiles: tuple[Profile, ...]
    heads: Heads
    folklore: tuple[Folklore, ...]


def measure(
    model: PreTrainedModel,
    ids: Int[Tensor, "texts tokens"],
    stream: Int[Tensor, " stream_tokens"] | None = None,
    *,
    sinks: int = 4,
    window: int = 252,
    sink_keys: Sequence[int] = (0,),
    batch: int = 16,
    stage: Stage = unwatched,
) -> Entropy:
    """Read texts densely, `batch` at a time, and a stream through `sinks` + `window` and through a plain window.

    The plain window holds as many keys. The stream is cut into as many segments of 3 (sinks + window) tokens as it
    has (or is one, if it is shorter), read side by side, each from an empty cache: every one has a start and lets its
    first token go. `sink_keys` are the positions whose keys count as sinks. If all texts begin with the same token, as
    with a BOS, so do the segments, and the random texts, which are made of tokens of the texts. The model must be
    attached to read a stream.

    Raises InvalidInput for sizes that make no sense, TextTooShort where no segment would let anything go.
    """
    sink = torch.tensor(sorted(set(sink_keys)))
    texts, tokens = ids.shape
    if tokens < 2 or texts < 1 or batch < 1:
        raise InvalidInput(f"{texts} texts of {tokens} tokens, {batch} at a time: give at least 1 text of 2 tokens")
    first = ids[0, :1] if texts > 1 and bool((ids[:, 0] == ids[0, 0]).all()) else ids[0, :0]
    segments = None if stream is None else cut(stream, sinks + window, first)
    repeated, distance = repeated_tokens(ids, first)
    streamed = 0 if segments is None else 2 * segments.numel()
    listen = stage("attention entropy", ids.numel() + repeated.numel() + streamed)
    layers = len(blocks_of(model))

    dense = Bins(layers, ends_of(tokens), sink)
    masses = Masses(sink, tokens // 2, ((1, 2), (0, NEAR)))
    with probe(model, see=dense.see, sum_up=dense.sum_up), probe(model, see=masses.see, sum_up=masses.sum_up):
        _read(model, ids, batch, listen)
    copies = Masses(sink, repeated.shape[1] - distance - 1, ((distance, distance + 1),))
    with probe(model, see=copies.see, sum_up=copies.sum_up):
        _read(model, repeated, batch, listen)
    heads = _heads(masses.means(layers), copies.means(layers))
    profiles, folklore = [dense.profile("dense attention")], []
    if segments is not None:
        for kept, name in ((sinks, f"{sinks} sinks + {window}"), (0, f"plain window of {sinks + window}")):
            cache = SinkCache.for_model(model, sinks=kept, window=sinks + window - kept)
            found = Bins(layers, ends_of(segments.shape[1], cache.capacity), sink, segments.shape)
            with probe(model, see=found.see):
                _stream(model, segments, cache, listen)
            profiles.append(found.profile(name))
            folklore += judge(name, found.along(), cache.capacity)
    return Entropy(tuple(profiles), heads, tuple(folklore))


def cut(
    stream: Int[Tensor, " tokens"], capacity: int, first: Int[Tensor, " some"] | None = None
) -> Int[Tensor, "segments length"]:
    """The stream as segments of `TURNS` capacities, each behind `first`; a shorter stream is one segment.

    Raises TextTooShort where less than a quarter of the capacity would be read after the first token is let go.
    """
    if capacity < LEAST:
        raise InvalidInput(f"sinks + window = {capacity}: a stream to be judged keeps at least {LEAST} keys")
    first = stream[:0] if first is None else first.to(stream)
    if len(first) and torch.equal(stream[: len(first)], first):
        stream = stream[len(first) :]
    needed = capacity + capacity // 4 - len(first)
    if len(stream) < needed:
        raise TextTooShort(
            f"the stream has {len(stream)} tokens, and {needed} are needed to see what happens when the first one is "
            "let go: give a longer one, or choose a smaller window"
        )
    length = min(TURNS * capacity - len(first), len(stream))
    count = len(stream) // length
    return torch.cat((first.expand(count, -1), stream[: count * length].view(count, length)), dim=1)


def repeated_tokens(
    ids: Int[Tensor, "texts tokens"], first: Int[Tensor, " some"], seed: int = 0
) -> tuple[Int[Tensor, "repeats length"], int]:
    """Texts of different random tokens, repeated once, behind `first`; and how far back the token to copy stands.

    The tokens are those of `ids`, drawn without return.
    """
    known = torch.unique(ids)
    known = known[~torch.isin(known, first)]
    if len(known) < 2:
        raise InvalidInput("all tokens of the texts are the same: give texts of different tokens")
    count = min(REPEATED, len(known))
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([known[torch.randperm(len(known), generator=generator)[:count]] for _ in range(REPEATS)])
    return torch.cat((first.expand(REPEATS, -1), once, once), dim=1), count - 1


def ends_of(tokens: int, capacity: int | None = None) -> Int[np.ndarray, " bins"]:
    """Where bins of positions end: powers of two, counted afresh (from 16) once the first token has been let go."""
    turn = tokens if capacity is None else min(capacity, tokens)
    ends = [2**power for power in range(1, tokens.bit_length() + 1) if 2**power < turn] + [turn]
    ends += [turn + 2**power for power in range(4, tokens.bit_length() + 1) if turn + 2**power < tokens]
    return np.array(sorted({*ends, tokens}))


def _read(model: PreTrainedModel, ids: Tensor, batch: int, listen: Listener) -> None:
    for part in ids.split(batch):
        read(model, part)
        listen(part.numel())


@torch.inference_mode()
def _stream(model: PreTrainedModel, segments: Tensor, cache: SinkCache, listen: Listener) -> None:
    for part in segments.split(CHUNK, dim=1):
        base_of(model)(input_ids=part.to(model.device), past_key_values=cache, use_cache=True)
        listen(part.numel())


def _heads(masses: Float[np.ndarray, "5 layers heads"], copies: Float[np.ndarray, "4 layers heads"]) -> Heads:
    sink_mass, normalised, distance, previous, local = masses
    induction = copies[3]
    fits = {
        "induction": induction >= INDUCTION,
        "previous": previous >= PREVIOUS,
        "sink": sink_mass >= SINK,
        "local": local >= LOCAL,
        "uniform": normalised >= UNIFORM,
    }
    kind = np.select(list(fits.values()), [KINDS.index(name) for name in fits], KINDS.index("mixed"))
    return Heads(kind, sink_mass, previous, local, induction, normalised, distance)


def judge(reader: str, along: Float[np.ndarray, "segments positions"], capacity: int) -> list[Folklore]:
    """The three parts of the saying, for one reader of `capacity` keys."""
    quarter = capacity // 4
    start = max(min(START, quarter), 2)

    def part(claim: str, over: slice, under: slice, rule: str, bounds: tuple[float, float]) -> Folklore:
        means = [np.nanmean(along[:, stretch], axis=1) for stretch in (over, under)]
        found = ratio_of_means(means[0], means[1])
        least, most = bounds
        # One segment has no interval: the number alone must do.
        low, high = (found.value if np.isnan(end) else end for end in (found.low, found.high))
        holds = least <= low and high <= most
        return Folklore(f"{claim} ({reader})", found.value, found.low, found.high, holds, rule)

    before, after = slice(capacity - quarter, capacity), slice(capacity, capacity + quarter)
    infinity = float("inf")
    return [
        part("a spike at the start", slice(1, start), slice(quarter, capacity),
             f"normalised entropy of tokens 1 to {start - 1} over tokens {quarter} to {capacity - 1}, over segments: "
             f"the interval is above {SPIKE}", (SPIKE, infinity)),
        part("then a plateau", slice(2 * quarter, capacity), slice(quarter, 2 * quarter),
             f"tokens {2 * quarter} to {capacity - 1} over tokens {quarter} to {2 * quarter - 1}: the interval is "
             f"within {FLAT:.0%} of 1", (1 - FLAT, 1 + FLAT)),
        part("a cliff when the first token is let go", after, before,
             f"the {quarter} tokens from {capacity} on over the {quarter} before: the interval is below {CLIFF}",
             (0.0, CLIFF)),
    ]  # fmt: skip
