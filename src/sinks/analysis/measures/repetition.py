"""Repetition: softmax gives r equal keys r times the weight, relevant or not. Does the model undo that?

A context states a fact and, r times, a sentence about somebody else; a cue then asks for the fact. Equal keys hold
r e^s / (r e^s + Z) of a query, so the log-odds of attention grow with log r at slope 1 unless the model does something
about it, such as turning the copies away by their distance. Weston et al. (arXiv 2311.11829) say that soft attention
over-weights what is repeated, without measuring it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from sinks.analysis.probe import probe
from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.lens import Lens, Sight, View
from sinks.models.families import base_of
from sinks.models.observe import observe
from sinks.reading.estimate import Estimate, estimate
from sinks.types import Stage, unwatched

REPEATS = (1, 2, 4, 8, 16, 32)

OPENING = "Here is a list of facts.\n"

NAMES = (
    "Anna Peter Mary John David Sarah Tom Laura James Emma Paul Alice Mark Lucy Robert Jack Helen George Susan Henry "
    "Maria Frank"
).split()

TEMPLATES = {
    "The car of {name} is": "red blue green black white yellow orange brown pink purple silver".split(),
    "The home of {name} is": "Paris London Berlin Rome Madrid Vienna Moscow Tokyo Boston Chicago Dublin Sydney".split(),
    "The pet of {name} is a": "cat dog horse bird fish snake rabbit mouse lion bear pig wolf".split(),
}
"""Cues, and the words that may follow; a sentence is a cue, its answer and a full stop, on a line of its own."""

SINK = 0


@dataclass(frozen=True, eq=False)
class Dose:
    """One kind of repetition: "repeated" (one sentence r times), "different" (that sentence, then r - 1 different ones
    of equal length), each with the sink "kept" or "masked": the first token hidden from those that ask, so that their
    attention has to go elsewhere. (Hidden from all, it would be as good as removed, and the next token take its place.)

    `attention[r]` is the share of attention on the repeated span, over layers, heads, the tokens of the cue and texts;
    `log_odds[r]` the logit of the distractor's answer minus that of the right one; by number of repeats.
    `attention_slope` is that of log m / (1 - m) of each single head and token, averaged: 1 is pure softmax over equal
    keys, above 1 the model amplifies, below 1 it discounts. `answer_slope` is in nats. Both per unit of log r.
    """

    kind: str
    sink: str
    repeats: Int[np.ndarray, " doses"]
    attention: Float[np.ndarray, " doses"]
    log_odds: Float[np.ndarray, " doses"]
    attention_slope: Estimate
    answer_slope: Estimate


@dataclass(frozen=True, eq=False)
class Repetition:
    """All doses and what they say in one line."""

    doses: tuple[Dose, ...]
    verdict: str


@dataclass(frozen=True, eq=False)
class Question:
    """One context in pieces, all tokens: `head`, then the first r of `span`'s sentences, then `tail`, whose last `cue`
    tokens ask for `right`, while the span's first sentence says `wrong`."""

    head: list[int]
    span: list[list[int]]
    tail: list[int]
    cue: int
    right: int
    wrong: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Questions of one shape are read together."""
        return len(self.head), len(self.span[0]), len(self.tail)


@dataclass(frozen=True, eq=False)
class Answers:
    """One kind of questions, one treatment of the sink: share and log-odds of attention, log-odds of answers."""

    share: Float[np.ndarray, "texts doses"]
    odds: Float[np.ndarray, "texts doses"]
    answer: Float[np.ndarray, "texts doses"]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos: int | None,
    repeats: Sequence[int] = REPEATS,
    texts: int = 18,
    seed: int = 0,
    stage: Stage = unwatched,
) -> Repetition:
    """Ask `texts` questions, in half of which the fact stands before the span and in half behind it, at every dose.

    Raises InvalidInput for doses that make no slope or texts that make no interval, UnsupportedOption where the
    tokenizer cuts the words up, so that answers are not one token.
    """
    doses = np.array(sorted(set(repeats)))
    if len(doses) < 2 or doses[0] < 1 or texts < 2:
        raise InvalidInput(f"repeats={tuple(repeats)}, texts={texts}: give two different counts from 1 up, and 2 texts")
    pairs = questions(tokenizer, int(doses[-1]), texts, bos, seed)
    fed = [len(each.head) + doses[-1] * len(each.span[0]) + 2 * len(doses) * len(each.tail) for each, _ in pairs]
    listen = stage("repetition", 2 * int(sum(fed)))
    answers: dict[tuple[str, str], Answers] = {}
    for index, kind in enumerate(("repeated", "different")):
        for sink, each in ask(model, [pair[index] for pair in pairs], doses).items():
            answers[kind, sink] = each
        listen(int(sum(fed)))
    found = {key: _dose(*key, doses, each, seed) for key, each in answers.items()}
    return Repetition(tuple(found.values()), _verdict(found, answers, doses, seed))


def _hide_sink(view: View, scores: Tensor) -> Tensor:
    hidden = (view.keys == SINK)[:, None, None, :] & (view.queries > SINK)[:, None, :, None]
    return scores.masked_fill(hidden, -torch.inf)


def questions(
    tokenizer: PreTrainedTokenizerBase, most: int, texts: int, bos: int | None, seed: int = 0
) -> list[tuple[Question, Question]]:
    """Questions with `most` sentences in their span: one sentence repeated, and that one before different ones."""
    generator = np.random.default_rng(seed)
    opening = [] if bos is None else [bos]
    opening += tokenizer(OPENING, add_special_tokens=False).input_ids
    parsed = [_sentences(tokenizer, cue, most) for cue in TEMPLATES]
    found = []
    for text in range(texts):
        cues, sentences = parsed[text % len(parsed)]
        names, words = ([*dict.fromkeys(key[part] for key in sentences)] for part in (0, 1))
        asked, other = generator.permutation(names)[:2].tolist()
        right, wrong = generator.permutation(words)[:2].tolist()
        fact, distractor, cue = sentences[asked, right], sentences[other, wrong], cues[asked]
        taken = {asked, other, right, wrong}
        rest = [ids for pair, ids in sentences.items() if taken.isdisjoint(pair)]
        chosen = generator.permutation(len(rest))[: most - 1]
        before = text // len(parsed) % 2 == 0
        head, tail = (opening + fact, cue) if before else (opening, fact + cue)
        spans = ([distractor] * most, [distractor, *(rest[index] for index in chosen)])
        made = partial(Question, cue=len(cue), right=fact[len(cue)], wrong=distractor[len(cue)])
        found.append((made(head, spans[0], tail), made(head, spans[1], tail)))
    return found


def _sentences(
    tokenizer: PreTrainedTokenizerBase, cue: str, most: int
) -> tuple[dict[str, list[int]], dict[tuple[str, str], list[int]]]:
    """Cues by name and sentences by (name, word): those in which both words are single tokens, so all are as long."""
    words = TEMPLATES[cue]
    cues = {name: tokenizer(cue.format(name=name), add_special_tokens=False).input_ids for name in NAMES}
    least = min(len(ids) for ids in cues.values())
    cues = {name: ids for name, ids in cues.items() if len(ids) == least}
    pairs = [(name, word) for name in cues for word in words]
    made = tokenizer([f"{cue.format(name=name)} {word}.\n" for name, word in pairs], add_special_tokens=False).input_ids
    apart = {pair: ids for pair, ids in zip(pairs, made, strict=True) if ids[:least] == cues[pair[0]]}
    endings = Counter(tuple(ids[least + 1 :]) for ids in apart.values())
    ending = endings.most_common(1)[0][0] if endings else ()
    kept = {pair: ids for pair, ids in apart.items() if tuple(ids[least + 1 :]) == ending}
    whole = [word for word in words if all((name, word) in kept for name in cues)]
    if len(cues) < 4 or len(whole) < 4 or (len(cues) - 2) * (len(whole) - 2) < most - 1:
        raise UnsupportedOption(
            f"this tokenizer keeps {len(cues)} of {len(NAMES)} names and {len(whole)} of {len(words)} answers to "
            f"{cue!r} in one token each, too few for {most} different sentences: ask for fewer repeats"
        )
    return cues, {pair: ids for pair, ids in kept.items() if pair[1] in whole}


@dataclass(eq=False)
class _Gaze:
    """Attention of the last `cue` columns on the keys of a span, added up over heads by layer."""

    begin: int
    end: int
    cue: int
    share: dict[int, list[Tensor]] = field(default_factory=dict)
    odds: dict[int, list[Tensor]] = field(default_factory=dict)

    def see(self, sight: Sight) -> None:
        keys = sight.view.keys
        inside = ((keys >= self.begin) & (keys < self.end))[:, None, None, :]
        scores = sight.scores[:, :, -self.cue :].double()
        on = scores.masked_fill(~inside, -torch.inf).logsumexp(dim=-1)
        off = scores.masked_fill(inside, -torch.inf).logsumexp(dim=-1)
        if sight.logit_mass is not None:
            taken = sight.log_sum_exp + sight.logit_mass.log()
            off = torch.logaddexp(off, taken[..., -self.cue :].double())
        # A layer whose window does not reach over the whole span says nothing about repeats.
        whole = ((scores > -torch.inf) & inside).sum(dim=-1) == self.end - self.begin
        odds = (on - off).masked_fill(~whole, torch.nan)
        self.odds.setdefault(sight.view.layer, []).append(odds.mean(dim=-1))
        weights = sight.weights[:, :, -self.cue :].double().masked_fill(~inside, 0)
        self.share.setdefault(sight.view.layer, []).append(weights.sum(dim=-1).mean(dim=-1))

    def by_layer(self, found: dict[int, list[Tensor]]) -> Float[Tensor, "rows layers"]:
        """The mean over heads."""
        return torch.stack([torch.cat(found[layer], dim=1).mean(dim=1) for layer in sorted(found)], dim=1)


@torch.inference_mode()
def ask(model: PreTrainedModel, asked: Sequence[Question], doses: Int[np.ndarray, " doses"]) -> dict[str, Answers]:
    """Read each context once with its whole span, and ask at every dose, with the sink "kept" and with it "masked"."""
    found = {sink: Answers(*(np.empty((len(asked), len(doses))) for _ in range(3))) for sink in ("kept", "masked")}
    for shape in dict.fromkeys(each.shape for each in asked):
        rows = [index for index, each in enumerate(asked) if each.shape == shape]
        some = [asked[index] for index in rows]
        head, length, _ = shape
        context = torch.tensor([each.head + sum(each.span, []) for each in some], device=model.device)
        # Without a configuration, every layer keeps all it read, so the end can be taken off again.
        cache = DynamicCache()
        base_of(model)(input_ids=context, past_key_values=cache, use_cache=True)
        by_layer: dict[str, list[Tensor]] = {sink: [] for sink in found}
        for place in reversed(range(len(doses))):
            span = range(head, head + length * int(doses[place]))
            for sink, answers in found.items():
                with observe(model, Lens(bend_scores=_hide_sink)) if sink == "masked" else nullcontext():
                    gaze, answer = _tail(model, some, cache, span)
                answers.share[rows, place] = gaze.by_layer(gaze.share).mean(dim=1).cpu().numpy()
                answers.answer[rows, place] = answer
                by_layer[sink].append(gaze.by_layer(gaze.odds))
        for sink, answers in found.items():
            odds = torch.stack(by_layer[sink][::-1], dim=2)
            reached = ~odds.isnan().any(dim=2).any(dim=0)
            answers.odds[rows] = odds[:, reached].mean(dim=1).cpu().numpy()
    return found


def _tail(
    model: PreTrainedModel, some: Sequence[Question], cache: DynamicCache, span: range
) -> tuple[_Gaze, Float[np.ndarray, " rows"]]:
    """Ask, after the context up to the end of `span`; the attention on it, and the log-odds of the wrong answer."""
    if cache.get_seq_length() > span.stop:
        cache.crop(span.stop - cache.get_seq_length())
    gaze = _Gaze(span.start, span.stop, some[0].cue)
    tail = torch.tensor([each.tail for each in some], device=model.device)
    with probe(model, see=gaze.see):
        logits = model(input_ids=tail, past_key_values=cache, use_cache=True).logits[:, -1].double().cpu().numpy()
    right, wrong = ([getattr(each, name) for each in some] for name in ("right", "wrong"))
    return gaze, logits[range(len(some)), wrong] - logits[range(len(some)), right]


def slopes(of: Float[np.ndarray, "texts doses"], doses: Int[np.ndarray, " doses"]) -> Float[np.ndarray, " texts"]:
    """Least-squares slope against the log of the dose, text by text."""
    centred = np.log(doses) - np.log(doses).mean()
    return of @ centred / (centred @ centred)


def _dose(kind: str, sink: str, doses: Int[np.ndarray, " doses"], answers: Answers, seed: int) -> Dose:
    return Dose(
        kind,
        sink,
        doses,
        answers.share.mean(axis=0),
        answers.answer.mean(axis=0),
        estimate(slopes(answers.odds, doses), seed),
        estimate(slopes(answers.answer, doses), seed),
    )


def _verdict(
    found: dict[tuple[str, str], Dose],
    answers: dict[tuple[str, str], Answers],
    doses: Int[np.ndarray, " doses"],
    seed: int,
) -> str:
    """Decided by intervals: the slopes against 1 and 0, and against different sentences text by text."""
    repeated, masked = found["repeated", "kept"], found["repeated", "masked"]
    attention, answer = repeated.attention_slope, repeated.answer_slope
    law = "discounts repeats" if attention.high < 1 else "amplifies repeats" if attention.low > 1 else "is pure softmax"
    apart = estimate(
        slopes(answers["repeated", "kept"].odds, doses) - slopes(answers["different", "kept"].odds, doses), seed
    )
    word = "slower than" if apart.high < 0 else "faster than" if apart.low > 0 else "as fast as"
    pull = "moves towards" if answer.low > 0 else "moves away from" if answer.high < 0 else "does not follow"
    right = 100 * (answers["repeated", "kept"].answer < 0).mean(axis=0)
    other = found["different", "kept"].attention_slope.value
    return (
        f"{doses[0]} to {doses[-1]} copies of an irrelevant sentence raise its attention from "
        f"{100 * repeated.attention[0]:.0f} to {100 * repeated.attention[-1]:.0f} %. The log-odds of single heads grow "
        f"by {_slope(attention)} per log of the copies, where pure softmax over equal keys has 1: the model {law}; "
        f"they grow {word} over as many different sentences ({other:.2f}). The answer {pull} the repeated one "
        f"({_slope(answer)} nats per log; right in {right[0]:.0f} and {right[-1]:.0f} % of texts). With the sink "
        f"masked the slopes are {_slope(masked.attention_slope)} and {_slope(masked.answer_slope)}."
    )


def _slope(of: Estimate) -> str:
    return f"{of.value:.2f} ({of.low:.2f} to {of.high:.2f})"
