"""`Session`: text in, text out, for ever, at constant memory and constant latency."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW, Kind, SinkCache
from sinks.cache.fingerprint import fingerprint
from sinks.cache.plan import Plan, check_whole
from sinks.cache.snapshot import read_snapshot, write_snapshot
from sinks.errors import BrokenCache, CacheError, InvalidInput
from sinks.kernels.phase import table_dtype
from sinks.models.families import base_of
from sinks.models.load import Loaded
from sinks.reading.advice import Advice
from sinks.reading.pace import CHUNK as CHUNK
from sinks.reading.pace import natural_chunk
from sinks.reading.perplexity import finite, surprise
from sinks.reading.tokens import given_ids
from sinks.stream.answer import Answer, Finish
from sinks.stream.chat import Dialogue
from sinks.stream.history import History, Listen
from sinks.stream.opening import Sinks, ends_of, loaded_from, pinned, sizes_for
from sinks.stream.parking import pack, unpack
from sinks.stream.pieces import Pieces, Vocabulary
from sinks.stream.sampling import GREEDY, Sampler, Sampling

FIRST_SEED = 0

Given = str | Sequence[int] | Tensor
"""What can be fed: a text, or token ids."""


@dataclass(frozen=True)
class Span:
    """Visible tokens without a gap between them: stream positions `start` to `stop` - 1, their ids, their text."""

    start: int
    stop: int
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Visible:
    """What the next token will be predicted from: one span, or two once something between them was let go."""

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The spans' texts, a mark between them."""
        return " [...] ".join(span.text for span in self.spans)

    @property
    def tokens(self) -> int:
        """How many tokens are visible."""
        return sum(len(span.ids) for span in self.spans)


@dataclass(frozen=True, eq=False)
class Surprise:
    """`nll[i]` is -log p(`ids[i]` | what was visible) in nats; NaN for the first token of a stream."""

    ids: tuple[int, ...]
    nll: Float[np.ndarray, " tokens"]


class Session:
    """One endless stream through one model: the first `sinks` tokens and the last `window`, never more.

    `Session.open()` makes one. What it holds does not grow: keys and values of sinks + window tokens, the ids of those
    tokens, one row of logits. The model is shared by all its sessions and never changed; a session belongs to one
    thread at a time. If a forward pass is broken off (Ctrl-C), the session refuses to go on with BrokenCache:
    `reset()` it or `load` a snapshot. Between two pieces of an answer it may be left at any time.

    The newest token is read by the model only when something must be predicted from it, so that nothing is read twice.
    """

    def __init__(
        self,
        loaded: Loaded,
        sinks: int = DEFAULT_SINKS,
        window: int = DEFAULT_WINDOW,
        *,
        system: str | None = None,
        advice: Advice | None = None,
        on_evict: Listen | None = None,
        chunk: int | None = None,
        cache: Kind = "full",
    ) -> None:
        """As `open` with a model that is loaded and attached.

        `chunk` tokens are fed in one forward pass; None is what suits the device (`natural_chunk`).
        """
        if chunk is not None:
            check_whole("chunk", chunk, least=1)
        self.loaded = loaded
        self.system = system
        self.advice = advice
        self.chunk = natural_chunk(loaded.model) if chunk is None else chunk
        self._cache = SinkCache.for_model(loaded.model, sinks=sinks, window=window, cache=cache)
        self._history = History(self._cache.plan, on_evict)
        self._pieces = Pieces(Vocabulary(loaded.tokenizer))
        self._generator = torch.Generator().manual_seed(FIRST_SEED)
        self._ends = ends_of(loaded)
        self._logits: Tensor | None = None  # behind the newest token, from when it is read to when one is chosen
        self._answer: Answer | None = None
        self._turn = 0
        self._in_dialogue = False

    @classmethod
    def open(
        cls,
        model: Loaded | str | Path | None = None,
        *,
        sinks: Sinks = DEFAULT_SINKS,
        window: int | None = None,
        system: str | None = None,
        pin: Literal["system"] | None = None,
        cache: Kind = "full",
        advice_text: str | None = None,
        on_evict: Listen | None = None,
        **options: Any,
    ) -> Session:
        """A session that has read nothing.

        Args:
            model: what `load` takes (None: the built-in model), or what it gave.
            sinks: first tokens kept for ever; "auto" lets `advise` choose, and the window too if none is given. It
                reads part of a text, which takes tens of seconds on a CPU; `advice` then holds what it found.
            window: most recent tokens kept, the newest included; None is 1,020.
            system: the system prompt of a dialogue, which the first `say` puts before its message; None leaves it to
                the template. It is the caller's own: special tokens written in it are read as such.
            pin: "system" keeps the tokens of the system prompt for ever: they are the sinks, `sinks` or more of them,
                and the window is counted beside them.
            cache: "int8" keeps the window in a quarter of its bytes: see `SinkCache.for_model`.
            advice_text: the text that "auto" reads; None is the default text of `read_text`.
            on_evict: told what is let go, at once: the stream position of the first token, and the ids.
            options: what else `load` takes, such as `device` or `dtype`, unless the model is loaded.

        Raises what `load`, `attach` and `SinkCache.for_model` raise, and, with `system` or `pin`, what `dialogue` does.
        """
        loaded = loaded_from(model, options)
        least = pinned(loaded, system, pin)
        sizes = sizes_for(loaded, sinks, window, advice_text)
        kept = max(Plan(sizes.sinks, sizes.window).sinks, least)
        return cls(loaded, kept, sizes.window, system=system, advice=sizes.advice, on_evict=on_evict, cache=cache)

    # What it holds

    @property
    def plan(self) -> Plan:
        """How many sinks, and how long a window."""
        return self._cache.plan

    @property
    def seen(self) -> int:
        """Tokens of the stream so far, fed and generated."""
        return self._history.seen

    @property
    def evicted(self) -> int:
        """Tokens that were let go, for ever; `on_evict` is told which."""
        return self._history.evicted

    @property
    def visible(self) -> Visible:
        """What the next token will be predicted from."""
        spans = [Span(start, start + len(ids), tuple(ids), self._text(ids)) for start, ids in self._history.spans]
        return Visible(tuple(spans))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; constant once something was read."""
        return self._cache.nbytes

    @property
    def finish(self) -> Finish | None:
        """Why the last answer is over: "end", "stop" or "length"; None where none is, or it was left early."""
        return None if self._answer is None else self._answer.finish

    @property
    def in_dialogue(self) -> bool:
        """Whether the stream is a dialogue, which `say` began."""
        return self._in_dialogue

    @property
    def answering(self) -> bool:
        """Whether a dialogue stands inside an answer, with which `generate` would go on."""
        return self._in_dialogue and self._history.newest not in (None, self.dialogue.end)

    @cached_property
    def dialogue(self) -> Dialogue:
        """How `say` writes turns. Raises UnsupportedOption where the model has no template to follow."""
        return Dialogue(self.loaded.tokenizer, self.system, self.loaded.source.name)

    @cached_property
    def fingerprint(self) -> str:
        """What a snapshot must agree with; taken when it is first needed."""
        return fingerprint(self.loaded.model)

    # What it does

    def feed(self, given: Given) -> None:
        """Read a text or token ids, of any length; the stream goes on behind them.

        A text at the beginning of the stream gets the BOS token that the tokenizer would give it; ids are taken as they
        are. What an answer held back (see `generate`) is dropped.
        """
        self._read(self._ids(given), None)

    def score(self, given: Given) -> Surprise:
        """Read as `feed` does, and say how surprising each token was."""
        ids = self._ids(given)
        nll = np.full(len(ids), np.nan)
        self._read(ids, nll)
        return Surprise(tuple(ids), nll)

    def generate(
        self, max_tokens: int | None = None, *, stop: Iterable[str] = (), sampling: Sampling = GREEDY
    ) -> Iterator[str]:
        """Go on with the stream, and hand out the text piece by piece, whole characters only; never an empty piece.

        The answer ends after `max_tokens` tokens (None: no limit), at the model's end token (to forbid it, give it a
        `logit_bias` of minus infinity), or at a stop string; `finish` says which. A stop string is not handed out, but
        stays in the stream as the model wrote it, and so does an end token.

        The iterator may be left at any piece. All tokens written by then belong to the stream; text held back at that
        moment (a character begun, the beginning of a stop string) comes first in the next answer, unless something is
        fed in between. Once the session was used otherwise, resuming an old iterator raises CacheError.
        """
        if not self.seen:
            self._read(self._ids(""), None)
        if not self.seen:
            raise InvalidInput("nothing was fed, and this model's texts begin with no token of their own: feed a text")
        self._turn += 1
        self._answer = self._new_answer(max_tokens, stop, sampling)
        return self._write(self._answer, self._turn)

    def say(
        self,
        message: str,
        *,
        role: str = "user",
        max_tokens: int | None = None,
        stop: Iterable[str] = (),
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """Read one message of a dialogue, in the model's own chat template, and hand out the answer as `generate` does.

        Only what is new is read, and the message is in the stream once this returns. Until something is let go, the
        stream is what the template makes of the whole dialogue, answers as the model wrote them. An answer may be left,
        or cut by `max_tokens`; `generate` and `feed` go on with it, and the next message ends it. Special tokens
        written in `message` are read as text: no message can forge a turn.

        Raises InvalidInput where the stream began otherwise, and what `dialogue` and `Dialogue.opening` raise; nothing
        is read then.
        """
        if self.seen and not self._in_dialogue:
            raise InvalidInput(
                "this stream began with other text, and a dialogue begins at the beginning of a stream: reset() it, or "
                "go on with feed() and generate()"
            )
        if self.seen:
            ids = self.dialogue.following(message, self._history.newest, role)
        else:
            ids = self.dialogue.opening(message, role)
        answer = self._new_answer(max_tokens, stop, sampling, in_dialogue=True)
        self._in_dialogue = True
        self._read(ids, None)
        self._turn, self._answer = self._turn + 1, answer
        return self._write(answer, self._turn)

    def resized(self, window: int, on_evict: Listen | None = None) -> Session:
        """A session with another window that has read what is visible here, as one text, and goes on from there.

        Where something was let go, what is left of the stream is read anew without it: positions, `seen` and `evicted`
        count from the new beginning. System prompt, dialogue and random numbers go on.
        """
        self._check_moment()
        options: Any = {"system": self.system, "advice": self.advice, "on_evict": on_evict, "chunk": self.chunk}
        twin = Session(self.loaded, self.plan.sinks, window, cache=self._cache.kind, **options)
        twin.feed([token for _, ids in self._history.spans for token in ids])
        twin._in_dialogue = self._in_dialogue
        twin._pieces = self._pieces.fork()
        twin._generator = self._generator.clone_state()
        return twin

    def fork(self, on_evict: Listen | None = None) -> Session:
        """Another session at the same moment, random numbers included; from here on they share the model alone."""
        self._check_moment()
        twin = copy.copy(self)
        twin._cache = self._cache.fork()
        twin._history = self._history.fork(on_evict)
        twin._pieces = self._pieces.fork()
        twin._generator = self._generator.clone_state()
        twin._logits = None if self._logits is None else self._logits.clone()
        twin._answer = None
        return twin

    def save(self, path: str | Path) -> None:
        """Write this moment to one file, which has one size for ever (once something was read). See `write_snapshot`.

        Raises SnapshotError if it cannot be written; an earlier file of that name is then untouched.
        """
        self._check_moment()
        no_logits = torch.zeros(self._vocabulary_size, dtype=table_dtype(self.loaded.model.dtype))
        extras = pack(self._history, self._pieces, self._generator, self._logits, no_logits, self._in_dialogue)
        write_snapshot(path, self._cache, self.fingerprint, extras)

    def load(self, path: str | Path) -> None:
        """Go on from a saved moment, with the sinks and window it was saved with, exactly as without saving.

        Raises SnapshotError (DamagedSnapshot, OtherVersion, OtherModel) for a file that cannot be taken up; the session
        is then as it was.
        """
        cache, extras = read_snapshot(path, self.loaded.model, self.fingerprint)
        parked = unpack(path, extras, cache, self._vocabulary_size)
        self._turn, self._answer = self._turn + 1, None
        self._cache = cache
        self._in_dialogue = parked.in_dialogue
        self._logits = parked.restore(self._history, self._pieces, self._generator, self.loaded.model.device)

    def reset(self) -> None:
        """Forget the stream, random numbers included, and give its memory back: as just opened."""
        self._turn, self._answer, self._logits = self._turn + 1, None, None
        self._in_dialogue = False
        self._cache.reset()
        self._history.adopt(History(self.plan))
        self._pieces.forget()
        self._generator.manual_seed(FIRST_SEED)

    # How

    def _new_answer(
        self, max_tokens: int | None, stop: Iterable[str], sampling: Sampling, in_dialogue: bool = False
    ) -> Answer:
        """An answer not yet begun; in a dialogue, the template's end of an answer ends it too."""
        ends = self._ends | {self.dialogue.end} if in_dialogue or self._in_dialogue else self._ends
        return Answer(Sampler(sampling, self._generator), self._pieces, ends, max_tokens, stop)

    def _write(self, answer: Answer, turn: int) -> Iterator[str]:
        """The answer as it is written. In a dialogue an end is noted as the template's, whichever the model chose."""
        self._check_turn(turn)
        if held := answer.begin():
            yield held
        while answer.finish is None:
            self._check_turn(turn)
            token, piece = answer.take(self._next_logits(), self._history)
            self._logits = None
            self._history.extend([self.dialogue.end if answer.finish == "end" and self._in_dialogue else token])
            if piece:
                yield piece

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise CacheError("this answer is over, since its session was used otherwise: call generate() again")

    def _check_moment(self) -> None:
        """Refuse to go on if something was broken off between the model's reading of tokens and our noting of them."""
        read = self._cache.seen[0] if self._cache.seen else 0
        if read != max(0, self.seen - (self._logits is None)):
            raise BrokenCache(
                f"an earlier step was broken off: {read} tokens were read of {self.seen}; reset() this session or "
                "load() a snapshot"
            )

    def _next_logits(self) -> Float[Tensor, " vocab"]:
        """Logits behind the newest token, which is read now if it was not yet."""
        if self._logits is None:
            newest = self._history.newest
            assert newest is not None  # nothing is generated from an empty stream
            self._logits = self._forward([newest], logits=True)[-1]
        return self._logits

    def _read(self, ids: list[int], nll: np.ndarray | None) -> None:
        """Take `ids` into the stream, all read but the last; fill `nll` with their surprise where it is given."""
        self._turn, self._answer = self._turn + 1, None
        self._pieces.forget()
        for begin in range(0, len(ids), self.chunk):
            part = ids[begin : begin + self.chunk]
            unread = [] if self._history.newest is None or self._logits is not None else [self._history.newest]
            fed = [*unread, *part[:-1]]
            rows = [] if self._logits is None else [self._logits[None]]
            if fed:
                rows.append(self._forward(fed, logits=nll is not None))
            self._logits = None
            self._history.extend(part)
            if nll is None:
                continue
            at = begin + len(part) - sum(len(each) for each in rows)  # the first token of a stream has no surprise
            for logits in rows:
                told = surprise(logits, torch.tensor(ids[at : at + len(logits)], device=logits.device)).cpu()
                nll[at : at + len(logits)] = finite(told, at, self.loaded.model.dtype)
                at += len(logits)

    @torch.inference_mode()
    def _forward(self, ids: list[int], logits: bool) -> Tensor:
        """Feed these tokens; their logits `[tokens, vocab]`, or, without the output head, nothing of use."""
        self._check_moment()
        model = self.loaded.model
        fed = torch.tensor([ids], device=model.device)
        if logits:
            return model(input_ids=fed, past_key_values=self._cache, use_cache=True).logits[0]
        base_of(model)(input_ids=fed, past_key_values=self._cache, use_cache=True)
        return fed

    def _ids(self, given: Given) -> list[int]:
        return given_ids(self.loaded.tokenizer, given, not self.seen, self._vocabulary_size)

    @cached_property
    def _vocabulary_size(self) -> int:
        return cast(Any, self.loaded.model.get_input_embeddings()).weight.shape[0]

    def _text(self, ids: list[int]) -> str:
        return str(self.loaded.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
