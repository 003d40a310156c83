"""Massive activations: a few enormous numbers in the residual stream that act as built-in biases.

Which are they, how large against the median, on which tokens and in which dimensions, where are they born, where do
they die, and do the values and keys of the sinks drain with them? (Sun et al., arXiv 2402.17762; Gu et al., arXiv
2410.10781.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.probe import Residual, probe, read
from sinks.errors import InvalidInput, UnsupportedModel, UnsupportedOption
from sinks.kernels.lens import Arrival
from sinks.kernels.summary import states
from sinks.models.observe import blocks_of
from sinks.types import Stage, unwatched

FLAG, FLAG_MEDIANS = 100.0, 1000.0
"""What Sun et al. call massive: over 100, and at least 1,000 medians."""

ALIVE_MEDIANS, ALIVE_NORMS = 100.0, 4.0
"""What is alive: at least 100 medians, on a token at least 4 times as long as the others are on average."""

LARGEST = 4
"""The largest numbers of a text and depth that are remembered, and the most peaks of a depth."""

OUTLIER_DEVIATIONS = 3.0
"""A token is an outlier if its norm is this many standard deviations over the mean of its text."""


@dataclass(frozen=True)
class Peak:
    """One massive activation: a place where at least half of the texts have one of their 4 largest numbers of a depth.

    Largest first; where texts agree on no place, the one that most texts have their largest at. `share` is how many
    of the texts have it there, and the rest is over these: `value` is the mean, `ratio` the median of its magnitude
    over the median magnitude of that text and depth, `variation` its coefficient of variation (0 where causality makes
    it the same for every text: see `fixed`). `token` is what most of them have there; empty where there is no such
    token, or no tokenizer.
    """

    depth: int
    position: int
    dim: int
    token: str
    share: float
    value: float
    ratio: float
    variation: float


@dataclass(frozen=True, eq=False)
class Massive:
    """Massive activations by depth (0 enters block 0, b + 1 leaves block b), each text on its own.

    `largest`, `median`: magnitudes; `position`, `dim`: where the largest stands. `flagged`: share of texts that pass
    the flag of Sun et al., over 100 and at least 1,000 medians. `sink` is the position that was taken for the sink,
    and "first" is that token, position 0 unless the caller said otherwise. `first_norm`: its mean norm over the mean
    norm of the others. `kurtosis_first`, `kurtosis_rest`: over the width d, as shares of the most there can be,
    d - 2 + 1 / (d - 1): 1 is a single number among zeros. `value_ratio`, `key_ratio`: mean norm of its value (key)
    over that of the others', by layer and key head, NaN where a layer has none; a ratio below 1 is a drain.

    `lives`: runs of depths [born, dies) at which, in at least half of the texts, the largest number is at least 100
    medians and its token at least 4 times as long as the others are on average. The rule knows no global peak, so
    that a small life before a large one is seen: SmolLM2's is at depths 3 to 9, dead at 10 and 11, and reborn at 12,
    thirty times as large.

    `outliers`: share of tokens whose norm is over the mean of their text by 3 standard deviations (what high-norm
    patches are to a vision transformer); empty where it was not measured. `fixed`: the sink is in the same state in
    every text, as a BOS in front of a causal model is, so that its variation says nothing.
    """

    texts: int
    tokens: int
    sink: int
    fixed: bool
    largest: Float[np.ndarray, "texts depths"]
    median: Float[np.ndarray, "texts depths"]
    position: Int[np.ndarray, "texts depths"]
    dim: Int[np.ndarray, "texts depths"]
    flagged: Float[np.ndarray, " depths"]
    first_norm: Float[np.ndarray, " depths"]
    kurtosis_first: Float[np.ndarray, " depths"]
    kurtosis_rest: Float[np.ndarray, " depths"]
    value_ratio: Float[np.ndarray, "layers kv_heads"]
    key_ratio: Float[np.ndarray, "layers kv_heads"]
    peaks: tuple[Peak, ...]
    lives: tuple[tuple[int, int], ...]
    outliers: Float[np.ndarray, " depths"] = field(default_factory=lambda: np.empty(0))


def measure(
    model: PreTrainedModel,
    inputs: Int[Tensor, "texts tokens"] | Mapping[str, Tensor],
    *,
    sink: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch: int = 16,
    stage: Stage = unwatched,
) -> Massive:
    """Read every text once, `batch` at a time, and say what is massive in it.

    `inputs` are token ids, or the inputs of any transformer by name (`pixel_values` of a vision transformer), texts
    (images) first; texts are equally long, without pads. `sink` is where the sink stands. The work of the stage is
    counted in tokens where there are token ids, else in texts.

    Raises InvalidInput for inputs or a sink that make no sense, UnsupportedModel where the attention cannot be
    observed, UnsupportedOption where the residual stream is not finite.
    """
    named = _checked(inputs, sink, batch)
    ids = named.get("input_ids")
    texts = len(next(iter(named.values())))
    each = 1 if ids is None else ids.shape[1]
    listen = stage("massive activations", texts * each)
    depths, heads = States(sink), HeadNorms(sink)
    with probe(model, arrive=heads.arrive, residual=depths.residual):
        for part in _batches(named, texts, batch):
            read(model, part)
            listen(each * len(next(iter(part.values()))))
    if not heads.sums:
        raise UnsupportedModel(
            f"{model.config.model_type} showed none of its attention: attach(model) first, if it can stream"
        )
    found = depths.finished()
    place = found["places"][..., 0]
    alive = (found["largest"] >= ALIVE_MEDIANS * found["median"]) & (found["length"] >= ALIVE_NORMS)
    flagged = (found["largest"] > FLAG) & (found["largest"] >= FLAG_MEDIANS * found["median"])
    ratios = [heads.ratio(which, len(blocks_of(model))) for which in ("value", "key")]
    return Massive(
        texts=texts,
        tokens=depths.tokens,
        sink=sink,
        fixed=depths.fixed(),
        largest=found["largest"],
        median=found["median"],
        position=place // depths.width,
        dim=place % depths.width,
        flagged=flagged.mean(axis=0),
        first_norm=found["sink_norm"].sum(axis=0) / found["rest_norm"].sum(axis=0),
        kurtosis_first=found["sink_kurtosis"].mean(axis=0),
        kurtosis_rest=found["rest_kurtosis"].mean(axis=0),
        value_ratio=ratios[0],
        key_ratio=ratios[1],
        peaks=_peaks(found, depths.width, ids, tokenizer),
        lives=lives(alive.mean(axis=0) >= 0.5),
        outliers=found["outliers"].mean(axis=0),
    )


def lives(alive: Bool[np.ndarray, " depths"]) -> tuple[tuple[int, int], ...]:
    """Runs [born, dies) of True."""
    turns = np.flatnonzero(np.diff(np.concatenate(([False], alive, [False]))))
    return tuple((int(born), int(dies)) for born, dies in turns.reshape(-1, 2))


def _checked(inputs: Tensor | Mapping[str, Tensor], sink: int, batch: int) -> dict[str, Tensor]:
    named = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    counts = {len(value) for value in named.values()}
    if len(counts) != 1 or 0 in counts:
        raise InvalidInput(f"inputs have {sorted(counts)} texts: give at least one, and as many of every input")
    if batch < 1:
        raise InvalidInput(f"batch={batch}: read at least 1 text at a time")
    mask = named.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise InvalidInput("attention_mask marks pads: give texts of one length, without pads")
    ids = named.get("input_ids")
    if ids is not None:
        _check_sink(sink, ids.shape[1])
    return named


def _check_sink(sink: int, tokens: int) -> None:
    if not 0 <= sink < tokens or tokens < 2:
        raise InvalidInput(f"sink={sink} in a text of {tokens} tokens: there must be such a token, and another one")


def _batches(named: Mapping[str, Tensor], texts: int, batch: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, texts, batch):
        yield {name: value[start : start + batch] for name, value in named.items()}


class States:
    """What each depth of each text comes to; the states themselves are let go, but the sink's first and last."""

    def __init__(self, sink: int) -> None:
        self.sink = sink
        self.tokens = self.width = 0
        self.dtype = torch.float32
        self._found: dict[int, list[dict[str, Tensor]]] = {}
        self._ends: dict[int, list[Tensor]] = {}

    def residual(self, residual: Residual) -> None:
        """Take down one depth of one batch of texts."""
        hidden = residual.hidden
        _, self.tokens, self.width = hidden.shape
        self.dtype = hidden.dtype
        _check_sink(self.sink, self.tokens)
        self._found.setdefault(residual.depth, []).append(self._of(hidden))
        self._ends.setdefault(residual.depth, []).append(_wide(hidden[:, self.sink]).clone())  # a view would keep all

    def _of(self, hidden: Float[Tensor, "texts tokens width"]) -> dict[str, Tensor]:
        if states.takes(hidden):
            by_token, norms, kurtosis = states.token_figures(hidden).unbind(0)
            median = states.medians(hidden)
        else:
            wide = _wide(hidden)
            by_token, norms = wide.abs().amax(dim=-1), torch.linalg.vector_norm(wide, dim=-1)
            kurtosis, median = _kurtosis_share(wide), medians(hidden)
        places, values = _largest(hidden, by_token)
        norms, kurtosis = norms.double(), kurtosis.double()
        sink_norm, rest_norm = self._apart(norms)
        sink_kurtosis, rest_kurtosis = self._apart(kurtosis)
        host = norms.gather(1, places[:, :1] // self.width)[:, 0]
        over = norms.mean(dim=1, keepdim=True) + OUTLIER_DEVIATIONS * norms.std(dim=1, keepdim=True, correction=0)
        return {
            "values": values.double(),
            "places": places,
            "length": host * (self.tokens - 1) / (norms.sum(dim=1) - host),
            "sink_norm": sink_norm,
            "rest_norm": rest_norm,
            "sink_kurtosis": sink_kurtosis,
            "rest_kurtosis": rest_kurtosis,
            "outliers": (norms > over).double().mean(dim=1),
            "median": median,
        }

    def _apart(self, by_token: Float[Tensor, "texts tokens"]) -> tuple[Tensor, Tensor]:
        """The sink's, and the mean of the others'."""
        its = by_token[:, self.sink]
        return its, (by_token.sum(dim=1) - its) / (self.tokens - 1)

    def finished(self) -> dict[str, np.ndarray]:
        """Every statistic, `[texts, depths, ...]`; `largest` is the first of `values` without its sign.

        Raises UnsupportedOption where the residual stream is not finite. It is asked only now, and everything brought
        to the host at once: a GPU would be waited for at every depth.
        """
        depths = [self._found[depth] for depth in sorted(self._found)]
        found = {
            name: torch.stack([torch.cat([part[name] for part in parts]) for parts in depths], dim=1).cpu().numpy()
            for name in depths[0][0]
        }
        odd = ~np.isfinite(found["values"]).all(axis=(0, 2))
        if odd.any():
            depth = sorted(self._found)[int(odd.argmax())]
            raise UnsupportedOption(
                f"the residual stream is not finite at depth {depth} in {self.dtype}: load it as float32"
            )
        return found | {"largest": np.abs(found["values"][..., 0])}

    def fixed(self) -> bool:
        """Whether the sink is in the same state in every text, when it enters and when it leaves."""
        ends = [torch.cat(self._ends[depth]) for depth in (min(self._ends), max(self._ends))]
        # Rows of batches of different sizes differ by rounding.
        near = max(1e-3, 4 * torch.finfo(self.dtype).eps)
        return all(bool(((end - end[0]).norm(dim=-1) <= near * end[0].norm()).all()) for end in ends)


def _wide(hidden: Float[Tensor, "*places width"]) -> Float[Tensor, "*places width"]:
    """At least float32."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()


def _largest(
    hidden: Float[Tensor, "texts tokens width"], by_token: Float[Tensor, "texts tokens"]
) -> tuple[Int[Tensor, "texts some_numbers"], Float[Tensor, "texts some_numbers"]]:
    """Places in the flattened text of its largest magnitudes, falling, and what stands there.

    They are among the tokens with the largest, of which `by_token` is each one's.
    """
    width = hidden.shape[-1]
    tokens = by_token.topk(min(LARGEST, by_token.shape[1]), dim=1).indices.sort(dim=1).values
    candidates = hidden.gather(1, tokens[..., None].expand(-1, -1, width)).flatten(1)
    found = candidates.abs().topk(LARGEST, dim=1).indices
    return tokens.gather(1, found // width) * width + found % width, candidates.gather(1, found)


def medians(hidden: Float[Tensor, "texts ..."]) -> Float[Tensor, " texts"]:
    """The exact median of each text's magnitudes, in float64, the mean of the middle two if their number is even."""
    magnitude = hidden.flatten(1).abs()
    magnitude = magnitude if magnitude.dtype == torch.float64 else magnitude.float()  # numpy knows no bfloat16
    numbers = magnitude.cpu().numpy()
    half = numbers.shape[1] // 2
    # One pivot is what numpy has a vectorised selection for: twenty times as fast as torch.median, or as two pivots.
    parted = np.partition(numbers, half, axis=1)
    upper = parted[:, half].astype(np.float64)
    if numbers.shape[1] % 2 == 0:
        upper = (upper + parted[:, :half].max(axis=1)) / 2
    return torch.from_numpy(upper)


def _kurtosis_share(hidden: Float[Tensor, "texts tokens width"]) -> Float[Tensor, "texts tokens"]:
    """Kurtosis over the width as a share of its maximum; tokens without any variance have none (0)."""
    squares = (hidden - hidden.mean(dim=-1, keepdim=True)).square_()
    variance = squares.mean(dim=-1, keepdim=True)
    squares /= variance.clamp(min=torch.finfo(hidden.dtype).tiny)
    width = hidden.shape[-1]
    return squares.square_().mean(dim=-1) / (width - 2 + 1 / (width - 1))


class HeadNorms:
    """Norms of the keys and values of the sink and of the others, summed over texts."""

    def __init__(self, sink: int) -> None:
        self.sink = sink
        self.sums: dict[tuple[str, int], Tensor] = {}
        self._counts: dict[tuple[str, int], Tensor] = {}

    def arrive(self, arrival: Arrival) -> None:
        """Take down one layer's new heads."""
        sink = arrival.positions == self.sink
        rest = (arrival.positions >= 0) & ~sink
        which = torch.stack((sink, rest)).double()
        for name, heads in (("value", arrival.value), ("key", arrival.key)):
            wide = heads if heads.dtype == torch.float64 else heads.float()
            norms = torch.linalg.vector_norm(wide, dim=-1).double()
            summed = torch.einsum("wbt,bht->wh", which, norms)
            at = (name, arrival.layer)
            self.sums[at] = self.sums.get(at, 0) + summed
            self._counts[at] = self._counts.get(at, 0) + which.sum(dim=(1, 2))

    def ratio(self, name: str, layers: int) -> Float[np.ndarray, "layers kv_heads"]:
        """Mean norm of the sink's over the mean norm of the others', NaN for a layer without attention."""
        kv_heads = next(iter(self.sums.values())).shape[1]
        found = np.full((layers, kv_heads), np.nan)
        for (which, layer), sums in self.sums.items():
            if which == name:
                means = sums / self._counts[which, layer][:, None]
                found[layer] = (means[0] / means[1]).cpu().numpy()
        return found


def _peaks(
    found: Mapping[str, np.ndarray], width: int, ids: Tensor | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Peak, ...]:
    places, values = found["places"], found["values"]
    peaks: list[Peak] = []
    for depth in range(places.shape[1]):
        here, texts = np.unique(places[:, depth], return_counts=True)
        agreed = here[2 * texts >= len(places)]
        if not len(agreed):
            here, texts = np.unique(places[:, depth, 0], return_counts=True)
            agreed = here[texts.argmax()][None]
        of_depth: list[Peak] = []
        for place in agreed.tolist():
            text, rank = (places[:, depth] == place).nonzero()
            value = values[text, depth, rank]
            of_depth.append(
                Peak(
                    depth=depth,
                    position=place // width,
                    dim=place % width,
                    token=_token(ids, text, place // width, tokenizer),
                    share=len(text) / len(places),
                    value=float(value.mean()),
                    ratio=float(np.median(np.abs(value) / found["median"][text, depth])),
                    variation=float(value.std() / max(abs(value.mean()), np.finfo(np.float64).tiny)),
                )
            )
        peaks += sorted(of_depth, key=lambda peak: -abs(peak.value))[:LARGEST]
    return tuple(peaks)


def _token(
    ids: Tensor | None, texts: Int[np.ndarray, " some"], position: int, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The token that more than half of these texts have at this position, as text; empty if there is none."""
    if ids is None or tokenizer is None:
        return ""
    tokens, counts = np.unique(ids[:, position].cpu().numpy()[texts], return_counts=True)
    if 2 * counts.max() <= len(texts):
        return ""
    return str(tokenizer.decode([int(tokens[counts.argmax()])]))
