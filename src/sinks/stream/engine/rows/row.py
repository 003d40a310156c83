"""One stream as a row of a batch: what a `Session` holds, without a loop of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import Kind, SinkCache
from sinks.cache.fingerprint import fingerprint
from sinks.cache.plan import Plan, check_whole
from sinks.cache.pool import Pool, away
from sinks.cache.snapshot import read_snapshot, write_snapshot
from sinks.errors import BrokenCache, InvalidInput
from sinks.kernels.phase import table_dtype
from sinks.models.families import base_of
from sinks.models.load import Loaded
from sinks.models.parallel.share import refuse_shared
from sinks.reading.pace import turn_chunk
from sinks.reading.tokens import given_ids
from sinks.stream.answer import Answer
from sinks.stream.chat import Dialogue
from sinks.stream.history import History
from sinks.stream.opening import ends_of
from sinks.stream.parking import pack, unpack
from sinks.stream.pieces import Pieces, Vocabulary
from sinks.stream.sampling import Sampler, Sampling
from sinks.stream.session import FIRST_SEED, Session

Given = str | Sequence[int] | Tensor
"""What can be fed: a text, or token ids."""


@dataclass(eq=False)
class Ground:
    """What all rows share: the model, its tokenizer, the sizes of a slot, and on a GPU the memory of all `slots`."""

    loaded: Loaded
    plan: Plan
    kind: Kind = "full"
    slots: int = 0

    def __post_init__(self) -> None:
        refuse_shared(self.loaded.model, "an engine")  # schedules that differ by process would wait for each other
        check_whole("slots", self.slots, least=0)
        self.empty_cache()  # refuses now what would be refused later
        sizes: Any = {"sinks": self.plan.sinks, "window": self.plan.window, "cache": self.kind}
        pooled = self.slots and takes_seats(self.loaded.model)
        self.pool = Pool(self.loaded.model, self.slots, **sizes) if pooled else None
        self.vocabulary = Vocabulary(self.loaded.tokenizer)
        self.ends = ends_of(self.loaded)

    @cached_property
    def fingerprint(self) -> str:
        """What a snapshot must agree with; taken when it is first needed."""
        return fingerprint(self.loaded.model)

    @cached_property
    def end_of_turn(self) -> int:
        """The token with which the model's chat template ends an answer."""
        return Dialogue(self.loaded.tokenizer, model=self.loaded.source.name).end

    @cached_property
    def tokens(self) -> int:
        """How many token ids the model knows."""
        return cast(Any, self.loaded.model.get_input_embeddings()).weight.shape[0]

    def pace(self, chunk: int | None) -> int:
        """How many tokens of prompts a step reads: what was asked for, or what suits the model's device."""
        return turn_chunk(self.loaded.model) if chunk is None else chunk

    def empty_cache(self) -> SinkCache:
        """A cache that has read nothing."""
        return SinkCache.for_model(self.loaded.model, sinks=self.plan.sinks, window=self.plan.window, cache=self.kind)

    def take_up(self, source: Path | Row | None) -> Row:
        """The stream that was put away as `source`, a file or in memory; a new one where there is none."""
        if isinstance(source, Row):
            return source
        return Row(self) if source is None else Row.load(self, source)

    def encode(self, given: Given, begins: bool) -> list[int]:
        """The ids of a text, with the tokenizer's own BOS where it `begins` a stream, or ids, checked."""
        return given_ids(self.loaded.tokenizer, given, begins, self.tokens)

    def check(self, cache: SinkCache, what: str) -> None:
        """Refuse a stream that does not fit the slots: they are all of one size."""
        if (cache.plan, cache.kind, cache.start) != (self.plan, self.kind, 0):
            raise InvalidInput(
                f"{what} has sinks={cache.sinks}, window={cache.window}, cache={cache.kind}, start={cache.start}, and "
                f"the slots of this engine have sinks={self.plan.sinks}, window={self.plan.window}, "
                f"cache={self.kind}, start=0: use an engine of that size"
            )


def takes_seats(model: PreTrainedModel) -> bool:
    """Whether streams of this model live in a pool: on a GPU, where steps are captured over fixed addresses."""
    return model.device.type == "cuda"


class Row:
    """A stream: its cache, the ids that are visible, text held back, random numbers, and logits once they were read.

    As in a session, the newest token is read by the model only when something must be predicted from it.
    """

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self._cache = ground.empty_cache()
        self._read = 0
        self.history = History(ground.plan)
        self.pieces = Pieces(ground.vocabulary)
        self.generator = torch.Generator().manual_seed(FIRST_SEED)
        self.logits: Tensor | None = None
        self.in_dialogue = False  # a session's own: kept for the session that takes the stream up again

    @property
    def cache(self) -> SinkCache:
        """Keys and values, which have counted all that captured steps have read."""
        if self._read:
            self._cache.count_on(self._read)
            self._read = 0
        return self._cache

    @cache.setter
    def cache(self, cache: SinkCache) -> None:
        self._cache, self._read = cache, 0

    @property
    def seat(self) -> int:
        """Where it sits in the engine's pool."""
        seat = self._cache.seat
        assert seat is not None  # it was admitted
        return seat.number

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._cache.nbytes

    def note_read(self, seen: int) -> None:
        """A captured step has read the first `seen` tokens of this stream in all; `cache` hears of it when asked."""
        self._read = seen

    @classmethod
    def load(cls, ground: Ground, path: str | Path) -> Row:
        """The stream that `save`, or `Session.save`, wrote. Raises SnapshotError, or InvalidInput for other sizes."""
        row = cls(ground)
        cache, extras = read_snapshot(path, ground.loaded.model, ground.fingerprint)
        ground.check(cache, str(path))
        parked = unpack(path, extras, cache, ground.tokens)
        row.cache = cache
        row.in_dialogue = parked.in_dialogue
        row.logits = parked.restore(row.history, row.pieces, row.generator, ground.loaded.model.device)
        return row

    @classmethod
    def of_session(cls, ground: Ground, session: Session) -> Row:
        """A copy of this moment of a session; they share the model alone."""
        if session.loaded.model is not ground.loaded.model:
            raise InvalidInput("this session has another model than the engine: open both with one loaded model")
        twin = session.fork()
        ground.check(twin._cache, "this session")
        row = cls(ground)
        row.cache, row.history, row.generator = twin._cache, twin._history, twin._generator
        row.pieces.pending = twin._pieces.pending
        row.logits, row.in_dialogue = twin._logits, twin._in_dialogue
        return row

    def sit(self) -> None:
        """Take a seat, where slots are seats, and bring there what is in memory of its own or of the host."""
        if self.logits is not None:
            self.logits = self.logits.to(self.ground.loaded.model.device)
        if self.ground.pool is not None and self.cache.seat is None:
            self.cache = self.ground.pool.put(self.cache)

    def away(self) -> None:
        """Go on in memory of the host; the seat is free."""
        self.check_moment()
        self.cache = away(self.cache)
        if self.logits is not None:
            self.logits = self.logits.cpu()

    def stand_up(self) -> None:
        """Give the seat back, if there is one; the stream is then gone."""
        if self._cache.seat is not None:
            self.cache.leave()

    def check_moment(self) -> None:
        """Refuse to go on if something was broken off between the model's reading of tokens and our noting of them."""
        read, unread = sum(self.cache.seen), self.logits is None and self.history.seen > 0
        if read != self.history.seen - unread:
            raise BrokenCache(
                f"an earlier step was broken off: {read} tokens of this stream were read of {self.history.seen}; let "
                "it leave, and resume it from a file"
            )

    def fork(self) -> Row:
        """The same moment, to go its own way, random numbers included."""
        self.check_moment()
        twin = Row(self.ground)
        twin.cache, twin.history, twin.pieces = self.cache.fork(), self.history.fork(), self.pieces.fork()
        twin.generator = self.generator.clone_state()
        twin.logits = None if self.logits is None else self.logits.clone()
        twin.in_dialogue = self.in_dialogue
        return twin

    def save(self, path: str | Path) -> None:
        """Write this moment, in the format of `Session.save`."""
        self.check_moment()
        no_logits = torch.zeros(self.ground.tokens, dtype=table_dtype(self.ground.loaded.model.dtype))
        extras = pack(self.history, self.pieces, self.generator, self.logits, no_logits, self.in_dialogue)
        write_snapshot(path, self.cache, self.ground.fingerprint, extras)

    @torch.inference_mode()
    def read(self, ids: list[int]) -> None:
        """Take these tokens into the stream, in one pass of all but the last."""
        self.check_moment()
        unread = [] if self.history.newest is None or self.logits is not None else [self.history.newest]
        if fed := [*unread, *ids[:-1]]:
            model = self.ground.loaded.model
            given = torch.tensor([fed], device=model.device)
            base_of(model)(input_ids=given, past_key_values=self.cache, use_cache=True)
        self.logits = None
        self.history.extend(ids)

    def answer(self, sampling: Sampling, max_tokens: int | None, stop: Iterable[str]) -> Answer:
        """An answer of this stream, not begun; in a dialogue, the template's end of an answer ends it too."""
        ends = self.ground.ends | {self.ground.end_of_turn} if self.in_dialogue else self.ground.ends
        return Answer(Sampler(sampling, self.generator), self.pieces, ends, max_tokens, stop)

    def take(self, answer: Answer, token: int) -> str:
        """Go on with this token, which was chosen for `answer`; returns the text that can be said with it."""
        answer.sampler.advance()
        try:
            return answer.accept(token, self.history)
        finally:  # it belongs to the stream whatever its text is
            self.logits = None
            self.history.extend([self.ground.end_of_turn if answer.finish == "end" and self.in_dialogue else token])
