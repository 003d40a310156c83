"""Mixing: do sinks keep tokens from blending into each other? (Barbero et al., arXiv 2504.02732.)

One token is replaced by another, and |h - h'| / |h| is followed through depths and positions: with BOS, without it,
with the sink hidden half-way, and in a stream that keeps its first tokens or lets them go. If sinks are there to
prevent over-mixing, a change travels further without them.

Hiding the first token from every later query is no condition of its own: where positions are relative, it is removing
that token, to the last digit, and a position-bound sink moves to the next one. Hidden only from the changed token and
those after it, it has a successor no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sinks.analysis.probe import Residual, probe
from sinks.cache.cache import SinkCache
from sinks.errors import CapacityError, InvalidInput
from sinks.kernels.lens import Lens, View
from sinks.models.attach import attachment_of
from sinks.models.families import base_of
from sinks.models.observe import observe
from sinks.reading.estimate import Estimate, estimate
from sinks.types import Listener, Stage, ignore, unwatched

ROWS = 20
"""Sequences of one forward pass."""

KEPT = 4
"""Sinks of the stream that keeps some."""


@dataclass(frozen=True, eq=False)
class Spread:
    """How far the change of one token travels, under one condition.

    `by_depth[d, p]` is the mean over texts and seeds of |h - h'| / |h| at depth d and position p of the text (BOS is
    not counted; positions before the changed token are 0 by causality); `overall` the mean over later positions by
    depth; `middle` and `late` its estimates at the middle depth and at the last but one.
    """

    condition: str
    changed: int
    by_depth: Float[np.ndarray, "depths positions"]
    overall: Float[np.ndarray, " depths"]
    middle: Estimate
    late: Estimate


@dataclass(frozen=True, eq=False)
class Geometry:
    """Shape of the residual stream by depth, mean over texts, with all rows and without the sink's.

    Matrix entropy is -sum p log p / log min(T, d) with p = sigma^2 / sum sigma^2 (not centred); effective rank is
    exp(-sum p log p); similarity is the mean cosine of pairs; `spread` is |X - mean|_F / |X|_F. `condition` says how
    the texts were read, as in `Spread`.
    """

    condition: str
    matrix_entropy: Float[np.ndarray, " depths"]
    matrix_entropy_without: Float[np.ndarray, " depths"]
    effective_rank: Float[np.ndarray, " depths"]
    effective_rank_without: Float[np.ndarray, " depths"]
    similarity: Float[np.ndarray, " depths"]
    similarity_without: Float[np.ndarray, " depths"]
    spread: Float[np.ndarray, " depths"]
    spread_without: Float[np.ndarray, " depths"]


@dataclass(frozen=True, eq=False)
class Mixing:
    """Spreads by condition and changed token, geometry, and what the comparison says in one line.

    Conditions: "BOS kept" and "BOS removed"; "sink hidden", read as the first of those that the model has, but from the
    first changed token on, no query sees the sink; "stream, sinks kept" and "stream, sinks evicted", which hold as many
    keys, half as many as there are tokens.
    """

    spreads: tuple[Spread, ...]
    geometry: Geometry
    verdict: str


@dataclass(frozen=True, eq=False)
class _Condition:
    """How texts are read: what stands in front of them, which tokens are changed, and in which surroundings."""

    name: str
    prefix: tuple[int, ...]
    changed: tuple[int, ...]
    lens: Lens | None = None
    cache: Callable[[], SinkCache | None] = field(default=lambda: None)


def measure(
    model: PreTrainedModel,
    ids: Int[Tensor, "texts tokens"],
    *,
    bos: int | None,
    sink: int = 0,
    changed: Sequence[int] = (20, 60),
    seeds: Sequence[int] = (0, 1),
    stage: Stage = unwatched,
) -> Mixing:
    """Change one token of each text, see how far that travels under each condition, and measure the geometry.

    `ids` come without special tokens. `bos` is put in front of them (None: the model has none, so nothing is removed
    either). `sink` is the position, BOS counted, that is hidden in one condition and left out in half of the geometry.
    `changed` are positions of the text; the new token is drawn from all tokens of `ids`. The streams are read if the
    model is attached, and their changed token is one after the eviction of the first.

    Raises InvalidInput for a single text, positions that the texts do not have, or texts of one token only.
    """
    ids = ids.to(model.device)
    texts, tokens = ids.shape
    if texts < 2:
        raise InvalidInput("one text gives no interval, so nothing could be decided: give at least 2, better 8 or more")
    if not changed or not seeds or min(changed) < 0 or max(changed) > tokens - 2:
        raise InvalidInput(
            f"changed={tuple(changed)} and seeds={tuple(seeds)}: give at least one of each, and positions from 0 to "
            f"{tokens - 2} for texts of {tokens} tokens, so that some token follows"
        )
    if len(ids.unique()) < 2:
        raise InvalidInput("the texts are one token repeated, so there is nothing to put in its place: give real text")
    conditions = tuple(_conditions(model, tokens, bos, sink, tuple(changed)))
    work = [(1 + len(each.changed) * len(seeds)) * (len(each.prefix) + tokens) for each in conditions]
    listen = stage("mixing", texts * (sum(work) + len(conditions[0].prefix) + tokens))
    spreads: list[Spread] = []
    by_text: dict[str, Float[np.ndarray, "texts depths"]] = {}
    for condition in conditions:
        found = _spreads(model, ids, condition, seeds, listen)
        spreads += [_summary(condition.name, position, each) for position, each in found.items()]
        by_text[condition.name] = np.mean([_later(each, position) for position, each in found.items()], axis=0)
    first = conditions[0]
    dressed = _prefixed(ids, first.prefix)
    shape = geometry(model, dressed, sink, first.name)
    listen(dressed.numel())
    return Mixing(tuple(spreads), shape, _verdict(by_text))


def _conditions(
    model: PreTrainedModel, tokens: int, bos: int | None, sink: int, changed: tuple[int, ...]
) -> Iterator[_Condition]:
    prefix = () if bos is None else (bos,)
    if prefix:
        yield _Condition("BOS kept", prefix, changed)
    yield _Condition("BOS removed", (), changed)
    yield _Condition("sink hidden", prefix, changed, Lens(bend_scores=_hider(sink, min(changed) + len(prefix))))
    capacity = tokens // 2
    if attachment_of(model) is None or capacity < 2 * KEPT:
        return
    try:
        SinkCache.for_model(model, sinks=KEPT, window=capacity - KEPT)
    except CapacityError:  # every layer has a window of its own that is smaller: there is no such stream
        return
    late = (capacity + tokens // 8,)
    for name, sinks in (("stream, sinks kept", KEPT), ("stream, sinks evicted", 0)):
        yield _Condition(name, prefix, late, cache=_maker(model, sinks, capacity - sinks))


def _maker(model: PreTrainedModel, sinks: int, window: int) -> Callable[[], SinkCache]:
    return lambda: SinkCache.for_model(model, sinks=sinks, window=window)


def _hider(sink: int, since: int) -> Callable[[View, Tensor], Tensor]:
    def hide(view: View, scores: Tensor) -> Tensor:
        hidden = (view.keys == sink)[:, None, None, :] & (view.queries >= max(since, sink + 1))[:, None, :, None]
        return scores.masked_fill(hidden, -torch.inf)

    return hide


def _prefixed(ids: Int[Tensor, "texts tokens"], prefix: tuple[int, ...]) -> Int[Tensor, "texts longer"]:
    return torch.cat((ids.new_tensor(prefix).expand(len(ids), -1), ids), dim=1)


def _spreads(
    model: PreTrainedModel,
    ids: Int[Tensor, "texts tokens"],
    condition: _Condition,
    seeds: Sequence[int],
    listen: Listener,
) -> dict[int, Float[np.ndarray, "texts depths positions"]]:
    """Distances by changed position, mean over seeds, positions counted in the text."""
    variants = [replaced(ids, position, seed) for position in condition.changed for seed in seeds]
    rows = torch.stack([_prefixed(each, condition.prefix) for each in (ids, *variants)], dim=1)
    with ExitStack() as stack:
        if condition.lens is not None:
            stack.enter_context(observe(model, condition.lens))
        found = distances(model, rows[:, 0], rows[:, 1:], condition.cache, listen)
    found = found[..., len(condition.prefix) :]
    by_position = found.reshape(len(ids), len(condition.changed), len(seeds), *found.shape[2:]).mean(axis=2)
    return {position: by_position[:, index] for index, position in enumerate(condition.changed)}


def replaced(ids: Int[Tensor, "texts tokens"], position: int, seed: int) -> Int[Tensor, "texts tokens"]:
    """`ids` with the token at `position` of each text replaced by another, drawn from all different tokens of `ids`."""
    pool = ids.unique()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(pool) - 1, (len(ids),), generator=generator).to(ids.device)
    # Skipping the present token's place in the pool draws evenly from all others.
    draws = draws + (draws >= torch.searchsorted(pool, ids[:, position].contiguous()))
    altered = ids.clone()
    altered[:, position] = pool[draws]
    return altered


@torch.inference_mode()
def distances(
    model: PreTrainedModel,
    ids: Int[Tensor, "texts tokens"],
    altered: Int[Tensor, "texts variants tokens"],
    cache: Callable[[], SinkCache | None] = lambda: None,
    listen: Listener = ignore,
) -> Float[np.ndarray, "texts variants depths tokens"]:
    """|h - h'| / |h| of every variant against its text, at every depth and position; each pass reads a new `cache`."""
    rows = torch.cat((ids[:, None], altered), dim=1)
    parts: list[np.ndarray] = []
    for some in rows.split(max(1, ROWS // rows.shape[1])):
        by_depth: list[Tensor] = []
        with probe(model, residual=_follower(len(some), by_depth)):
            held = cache()
            base_of(model)(input_ids=some.flatten(0, 1), past_key_values=held, use_cache=held is not None)
        parts.append(torch.stack(by_depth, dim=2).cpu().numpy())
        listen(some.numel())
    return np.concatenate(parts)


def _follower(texts: int, by_depth: list[Tensor]) -> Callable[[Residual], None]:
    def follow(residual: Residual) -> None:
        hidden = residual.hidden.unflatten(0, (texts, -1))
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        apart = torch.linalg.vector_norm(hidden[:, 1:] - hidden[:, :1], dim=-1, dtype=torch.float64)
        by_depth.append(apart / torch.linalg.vector_norm(hidden[:, :1], dim=-1, dtype=torch.float64))

    return follow


def _later(found: Float[np.ndarray, "texts depths positions"], changed: int) -> Float[np.ndarray, "texts depths"]:
    return found[..., changed + 1 :].mean(axis=-1)


def _marks(depths: int) -> dict[str, int]:
    """The depths that stand for the whole: after half of the blocks, and after all but the last."""
    return {"middle": (depths - 1) // 2, "late": max(depths - 2, 0)}


def _summary(name: str, changed: int, found: Float[np.ndarray, "texts depths positions"]) -> Spread:
    later = _later(found, changed)
    at = {mark: estimate(later[:, depth]) for mark, depth in _marks(later.shape[1]).items()}
    return Spread(name, changed, found.mean(axis=0), later.mean(axis=0), **at)


def _verdict(by_text: dict[str, Float[np.ndarray, "texts depths"]]) -> str:
    """Each condition without a sink against the same with it, decided by the interval of the difference by text."""
    usual = next(iter(by_text))
    pairs = (
        ("with BOS removed", "BOS removed", usual),
        ("with the sink hidden", "sink hidden", usual),
        ("in a stream that lets its sinks go", "stream, sinks evicted", "stream, sinks kept"),
    )
    parts = []
    for what, without, kept in pairs:
        if without == kept or without not in by_text:
            continue
        numbers = []
        for mark, depth in _marks(by_text[kept].shape[1]).items():
            before, after = by_text[kept][:, depth], by_text[without][:, depth]
            difference = estimate(after - before)
            word = "more" if difference.low > 0 else "less" if difference.high < 0 else "as much"
            numbers.append(
                f"{word} {'half-way up' if mark == 'middle' else 'before the last block'} ({after.mean():.3f} against "
                f"{before.mean():.3f}, difference {difference.low:+.3f} to {difference.high:+.3f})"
            )
        parts.append(f"{what}, {numbers[0]} and {numbers[1]}")
    return f"The change of one token spreads: {'; '.join(parts)}."


@torch.inference_mode()
def geometry(model: PreTrainedModel, ids: Int[Tensor, "texts tokens"], sink: int, condition: str) -> Geometry:
    """Shape of the residual stream of `ids` as they are, by depth, mean over texts; `sink` is a position in them."""
    found: list[list[dict[str, np.ndarray]]] = []
    for some in ids.split(ROWS):
        by_depth: list[dict[str, np.ndarray]] = []
        with probe(model, residual=_shaper(sink, by_depth)):
            base_of(model)(input_ids=some, use_cache=False)
        found.append(by_depth)
    names = found[0][0].keys()
    return Geometry(
        condition,
        **{
            name: np.array(
                [np.concatenate([part[depth][name] for part in found]).mean() for depth in range(len(found[0]))]
            )
            for name in names
        },
    )


def _shaper(sink: int, by_depth: list[dict[str, np.ndarray]]) -> Callable[[Residual], None]:
    def shape(residual: Residual) -> None:
        hidden = residual.hidden.double()
        rest = torch.cat((hidden[:, :sink], hidden[:, sink + 1 :]), dim=1)
        without = {f"{name}_without": values for name, values in shapes(rest).items()}
        by_depth.append({name: values.cpu().numpy() for name, values in (shapes(hidden) | without).items()})

    return shape


def shapes(hidden: Float[Tensor, "texts rows width"]) -> dict[str, Float[Tensor, " texts"]]:
    """Matrix entropy, effective rank, similarity and spread of each text's rows, as `Geometry` defines them."""
    rows, width = hidden.shape[1:]
    gram = hidden @ hidden.mT if rows <= width else hidden.mT @ hidden
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    entropy = torch.special.entr(squares / squares.sum(dim=-1, keepdim=True)).sum(dim=-1)
    directions = torch.nn.functional.normalize(hidden, dim=-1).sum(dim=1)
    centred = hidden - hidden.mean(dim=1, keepdim=True)
    whole = torch.linalg.vector_norm(hidden, dim=(1, 2))
    return {
        "matrix_entropy": entropy / np.log(min(rows, width)),
        "effective_rank": entropy.exp(),
        "similarity": (directions.square().sum(dim=-1) - rows) / (rows * (rows - 1)),
        "spread": torch.linalg.vector_norm(centred, dim=(1, 2)) / whole,
    }
