"""From logits to a token: what `transformers` applies, in its order, over a history that is bounded.

Order of application, that of `GenerationMixin._get_logits_processor` (transformers 5.23): logit bias, repetition
penalty, presence penalty (which transformers lacks; as OpenAI and vLLM define it), then, when sampling, temperature,
top-k, top-p, min-p. Every filter sees what the one before it left.

On a CPU tokens are those that `generate` of transformers draws. On a GPU the same tokens are kept, with the same
probabilities, and the noise that draws one of them is a function of the seed, of the token's place in the stream, and
of the token: another sample than a CPU's, and the same one whoever shares the batch, captured in a graph or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.errors import InvalidInput, SinksError, UnsupportedOption
from sinks.kernels.device.language import why_no_triton
from sinks.models.step.device.choice.draws import BIASES, HISTORY, Drawing, Draws, on_device
from sinks.models.step.device.choice.noise import noise

COLDEST = 1e-4
"""Colder than this, logits divided by the temperature could overflow; 0 says greedy."""


_ASKED = {
    "temperature": f"give 0 or at least {COLDEST}",
    "top_k": "give a whole number of 0 or more",
    "top_p": "give a number above 0 and at most 1",
    "min_p": "give a number from 0 to 1",
    "repetition_penalty": "give a number above 0",
    "presence_penalty": "give a finite number",
    "history": "give a whole number of 0 or more",
    "seed": "give a whole number from 0 to 2^63 - 1, or None",
    "logit_bias": "give finite numbers or -inf by token id",
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; with nothing said, the likeliest (greedy).

    temperature: 0 is greedy; larger is flatter. The three filters below act only when it is above 0.
    top_k: only the k likeliest tokens (0: all). Ties with the k-th stay.
    top_p: only the likeliest tokens that together reach this probability (1: all).
    min_p: only tokens at least this fraction as probable as the likeliest (0: all).
    repetition_penalty: logits of tokens of the history are divided by it where positive, multiplied where negative
        (CTRL, arXiv 1909.05858); 1 is none.
    presence_penalty: subtracted from the logit of each token of the history, once; 0 is none.
    history: how many of the newest visible tokens, prompt and answer alike, the two penalties look at.
    seed: begins the random numbers anew with each answer; None goes on with those of the session. On a GPU they depend
        on where in the stream a token stands, so that an answer is the same again only in the same place.
    logit_bias: added to the logits of these token ids; minus infinity forbids one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    history: int = 256
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidInput(f"logit_bias={self.logit_bias!r}: {_ASKED['logit_bias']}, as {{id: number}}")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        wrong = [name for name, allowed in self._allowed().items() if not allowed]
        if wrong:
            raise InvalidInput("; ".join(f"{name}={getattr(self, name)!r}: {_ASKED[name]}" for name in wrong))

    def _allowed(self) -> dict[str, bool]:
        bias = self.logit_bias.items()
        return {
            "temperature": _is_number(self.temperature) and (self.temperature == 0 or self.temperature >= COLDEST),
            "top_k": _is_whole(self.top_k),
            "top_p": _is_number(self.top_p) and 0 < self.top_p <= 1,
            "min_p": _is_number(self.min_p) and 0 <= self.min_p <= 1,
            "repetition_penalty": _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "presence_penalty": _is_number(self.presence_penalty),
            "history": _is_whole(self.history),
            "seed": self.seed is None or (_is_whole(self.seed) and self.seed < 2**63),
            "logit_bias": all(_is_whole(token) and (_is_number(value) or value == -math.inf) for token, value in bias),
        }

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken of the logits as they are."""
        return self.greedy and not self.logit_bias and not self.lookback

    @property
    def filters(self) -> tuple[float, int, float, float]:
        """What turns logits into probabilities: rows that agree in it are computed together."""
        return (0.0, 0, 1.0, 0.0) if self.greedy else (self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def lookback(self) -> int:
        """How many tokens of history this sampling asks for."""
        return self.history if self.repetition_penalty != 1 or self.presence_penalty != 0 else 0


GREEDY = Sampling()


def check_sampling(sampling: Sampling) -> None:
    """Raises InvalidInput for what is no `Sampling`."""
    if not isinstance(sampling, Sampling):
        raise InvalidInput(f"sampling={sampling!r}: give Sampling(temperature=...), or GREEDY")


def no_choice(dtype: torch.dtype) -> UnsupportedOption:
    """What is raised where the best of all logits is not finite."""
    return UnsupportedOption(
        f"no token is left to choose: the logits are not finite in {dtype}, or logit_bias forbids them all; load the "
        "model as float32, or forbid less"
    )


class Sampler:
    """Chooses the tokens of one row: the settings of one answer, and random numbers of the row's own.

    The generator lives on the CPU whatever the model's device, so that its state can be saved and moved. A GPU takes
    no numbers of it but the seed that it was begun with.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        check_sampling(sampling)
        self.sampling = sampling
        self.generator = generator
        self._bias: tuple[Tensor, Tensor] | None = None
        self._ahead: torch.Generator | None = None

    def begin(self) -> None:
        """Begin an answer: the random numbers begin anew where the settings give a seed."""
        if self.sampling.seed is not None:
            self.generator.manual_seed(self.sampling.seed)

    @property
    def seed(self) -> int:
        """What a GPU's noise is made of, beside places and tokens."""
        return self.generator.initial_seed() & (2**63 - 1)

    def fits_graph(self, window: int, vocab: int) -> bool:
        """Whether a captured step can choose so for a stream of this window."""
        bias = self.sampling.logit_bias
        return self.sampling.lookback <= min(window, HISTORY) and len(bias) <= BIASES and max(bias, default=0) < vocab

    @property
    def drawing(self) -> Drawing:
        """The same settings, as a captured step takes them."""
        own = self.sampling
        kept, weakened = own.filters, (own.repetition_penalty, own.presence_penalty, own.lookback)
        return Drawing(*kept, *weakened, self.seed, own.logit_bias)

    def choose(self, logits: Float[Tensor, " vocab"], history: Sequence[int] = (), place: int = 0) -> int:
        """The next token after `history`, the newest tokens in order; it will be token number `place` of its stream.

        Raises UnsupportedOption where the model's logits are not finite or the settings leave no token.
        """
        token = Choices([(self, logits, history, place)]).of(0)
        self.advance()
        return token

    def ahead(self) -> torch.Generator:
        """The random numbers that decide the next token; the same again until `advance`."""
        self._ahead = self.generator.clone_state()
        return self._ahead

    def advance(self) -> None:
        """A token was chosen: what decided it is used up."""
        if self._ahead is not None:
            self.generator.set_state(self._ahead.get_state())
            self._ahead = None

    def penalised(self, scores: Float[Tensor, " vocab"], history: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Logits after bias and penalties; `scores` itself is left alone."""
        sampling = self.sampling
        if sampling.logit_bias:
            tokens, values = self._bias_for(scores)
            scores = scores.index_add(0, tokens, values)
        recent = sorted({token for token in history[max(0, len(history) - sampling.history) :] if token < len(scores)})
        if not recent or not sampling.lookback:
            return scores
        chosen = on_device(torch.tensor(recent), scores.device)
        found = scores[chosen]
        penalty = sampling.repetition_penalty
        found = torch.where(found < 0, found * penalty, found / penalty) - sampling.presence_penalty
        return scores.index_copy(0, chosen, found)

    def _bias_for(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The biased tokens and their bias, beside the scores; made once."""
        if self._bias is None:
            bias = self.sampling.logit_bias
            if max(bias) >= len(scores):
                raise InvalidInput(f"logit_bias names token {max(bias)}, and this model has {len(scores)} tokens")
            values = torch.tensor(list(bias.values()), dtype=scores.dtype)
            self._bias = on_device(torch.tensor(list(bias)), scores.device), on_device(values, scores.device)
        return self._bias


Asked = tuple[Sampler, Float[Tensor, " vocab"], Sequence[int], int]
"""A row's sampler, logits, newest tokens, and the place in its stream of the token to be chosen."""


class Choices:
    """The next token of many rows, each with settings, random numbers and a history of its own.

    They are found on the logits' device when this is made, and fetched from there, once, when the first is asked for:
    whoever does other work in between does not wait for a GPU. A row's random number is only looked at: `advance` its
    sampler when the token is taken.
    """

    def __init__(self, asked: Sequence[Asked]) -> None:
        self._dtypes = [logits.dtype for _, logits, _, _ in asked]
        self._wrong: dict[int, SinksError] = {}
        self._places: dict[int, int] = {}
        alike: dict[object, list[tuple[Sampler, Tensor, int]]] = {}
        numbers: dict[object, list[int]] = {}
        for number, (sampler, logits, history, place) in enumerate(asked):
            sampling = sampler.sampling
            try:
                scores = logits if sampling.plain else sampler.penalised(wide(logits), history)
            except SinksError as error:
                self._wrong[number] = error
                continue
            key = (sampling.filters, scores.dtype)
            alike.setdefault(key, []).append((sampler, scores, place))
            numbers.setdefault(key, []).append(number)
        self._found = [_found(rows) for rows in alike.values()]
        for place, number in enumerate(number for group in numbers.values() for number in group):
            self._places[number] = place

    @cached_property
    def _told(self) -> list[list[float]]:
        return torch.cat(self._found, dim=1).tolist()

    def of(self, row: int) -> int:
        """That of one row. Raises UnsupportedOption where its logits are not finite or its settings leave no token."""
        if row in self._wrong:
            raise self._wrong[row]
        token, best = (each[self._places[row]] for each in self._told)
        if not math.isfinite(best):
            raise no_choice(self._dtypes[row])
        return int(token)


def _found(rows: Sequence[tuple[Sampler, Tensor, int]]) -> Float[Tensor, "2 rows"]:
    """Tokens, and the best of all logits, of rows whose filters agree."""
    samplers, scores = [sampler for sampler, _, _ in rows], torch.stack([scores for _, scores, _ in rows])
    sampling, device = samplers[0].sampling, scores.device
    best, tokens = scores.max(dim=-1)
    if not sampling.greedy and device.type == "cpu":
        drawing = zip(samplers, scores, best, strict=True)
        tokens = torch.stack([_drawn_as_transformers_does(*row) for row in drawing])
    elif not sampling.greedy:
        places = [place for _, _, place in rows]
        if why_no_triton(device) is None:
            tokens = drawn_by_kernels([sampler.drawing for sampler in samplers], scores, places)
        else:
            seeds = on_device(torch.tensor([sampler.seed for sampler in samplers]), device)
            tokens = drawn(filtered(sampling, wide(scores)), seeds, on_device(torch.tensor(places), device))
    return torch.stack((tokens.double(), best.double()))


def _drawn_as_transformers_does(sampler: Sampler, scores: Tensor, best: Tensor) -> Tensor:
    if not best.isfinite():
        return torch.zeros((), dtype=torch.int64)  # nobody takes it
    shares = filtered(sampler.sampling, wide(scores)).softmax(dim=-1)
    return torch.multinomial(shares, 1, generator=sampler.ahead())[0]


def drawn_by_kernels(
    drawings: Sequence[Drawing], scores: Float[Tensor, "rows vocab"], places: Sequence[int]
) -> Int[Tensor, " rows"]:
    """What a captured step draws of these logits, which are penalised already."""
    rows, vocab = scores.shape
    draws = Draws(rows, rows, vocab, scores.device)
    bare = [replace(each, lookback=0, bias={}) for each in drawings]
    draws.install(range(rows), bare, [()] * rows, [0] * rows)
    control = torch.tensor([[0] * rows, list(range(rows)), [place - 1 for place in places]])
    draws.launch(scores.float().contiguous(), on_device(control, scores.device), None)
    return draws.told[0]


def filtered(sampling: Sampling, scores: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """Logits at this temperature, minus infinity where a filter has taken a token out."""
    scores = scores / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort()
        out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        out[..., -1] = False  # the likeliest always stays
        scores = scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -math.inf)
    if sampling.min_p > 0:
        probabilities = scores.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -math.inf)
    return scores


def drawn(
    scores: Float[Tensor, "rows vocab"], seeds: Int[Tensor, " rows"], places: Int[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """A token of each row by its softmax: the largest of logit and noise, as the kernels of a captured step draw."""
    below = scores - scores.amax(dim=-1, keepdim=True)
    return (below + noise(seeds, places, torch.arange(scores.shape[-1]))).argmax(dim=-1)


def wide(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """Logits in at least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
