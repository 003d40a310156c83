"""`SinkCache`: endless streaming for a model of transformers, through its ordinary `past_key_values=`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinks.cache.arrival import Arrival, Block
from sinks.cache.plan import Plan, check_whole
from sinks.cache.rings.quantized import QuantizedRing
from sinks.cache.rings.ring import Gate, Ring
from sinks.cache.rings.seats import Seat, laid_open, why_not_open
from sinks.cache.rings.slots import open_slots
from sinks.errors import BrokenCache, CacheError, CapacityError, InvalidInput, UnsupportedOption
from sinks.kernels.band.arriving import choose_arriving
from sinks.kernels.lens import Lens
from sinks.kernels.phase import Rotary
from sinks.kernels.scoring import Scoring
from sinks.models.families import Scheme, base_of, describe
from sinks.models.step.slots import Seating, Seats, StepSlots

DEFAULT_SINKS = 4
DEFAULT_WINDOW = 1020

Kind = Literal["full", "int8"]
"""How recent keys and values are held: as the model made them, or as int8 with a scale for each token and head."""

KINDS: tuple[Kind, ...] = get_args(Kind)

RINGS: Mapping[Kind, type[Ring]] = {"full": Ring, "int8": QuantizedRing}


class SinkCache(Cache):
    """The first `sinks` tokens and the last `window` of each row, for ever, in constant memory.

    Make it with `SinkCache.for_model` and pass it as `past_key_values=` to `model(...)` or `model.generate(...)` of a
    model on which `sinks.attach` was called. Feed it chunks of any size: the logits are those of feeding the tokens
    one by one under StreamingLLM's rule (arXiv 2309.17453, section 3.2), which re-assigns positions inside the cache.
    Rows are independent: a pad is never a key and never a sink. What has left the window is gone.

    The cache is of constant size; `generate` itself is not, since it keeps every token id and mask column. For a stream
    without end, feed the model in a loop of your own. Half-precision keys are widened, one layer at a time, to attend,
    unless kernels take the chunk: see `choose_arriving`.
    """

    def __init__(self, scheme: Scheme, plan: Plan, owner: PreTrainedModel, start: int, kind: Kind = "full") -> None:
        super().__init__(layers=[RINGS[kind](layer_plan(plan, layer.own_window)) for layer in scheme.layers])
        self._gate = Gate()
        for ring in self.rings:
            ring.gate = self._gate
        self.plan = plan
        self.kind: Kind = kind
        self.start = start
        self._scheme = scheme
        self._rotaries = scheme.rotaries(plan.capacity)
        self._owner = weakref.ref(owner)
        self._seen: list[int] = []
        self._offsets: list[int | None] = []
        self._arrival: Arrival | None = None
        self._broken = False
        self._seats: Seats | None = None
        self.seat: Seat | None = None
        self.landing: tuple[torch.cuda.Event, ...] = ()

    seat: Seat | None
    """Where it sits in a `Pool`; None: its memory is its own."""

    landing: tuple[torch.cuda.Event, ...]
    """When what it holds has arrived from each GPU that it is on its way from: see `pool.away`."""

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        sinks: int = DEFAULT_SINKS,
        window: int = DEFAULT_WINDOW,
        start: int = 0,
        cache: Kind = "full",
    ) -> SinkCache:
        """An empty cache for `model`: `sinks` first tokens and `window` recent ones, the current one included.

        `start` is the stream position of the first token, 0 or more; wherever it begins, a stream gives the same
        logits. A layer with a sliding window of its own that is smaller than sinks + window keeps that window, and no
        sinks.

        With `cache="int8"` the window takes about a quarter of its bytes in float32, half of those in bfloat16: keys
        and values are rounded to 8 bits, each token of each head with a scale of its own, and the sinks are not.

        Raises InvalidInput for sizes that make no sense, CapacityError where sinks + window exceed what the model was
        trained on, UnsupportedModel with the reason where the model cannot stream.
        """
        plan = Plan(sinks, window)
        check_whole("start", start, least=0)
        if cache not in KINDS:
            raise InvalidInput(f"cache={cache!r} is unknown: choose one of {', '.join(KINDS)}")
        scheme = describe(model)
        if scheme.trained_length is not None and plan.capacity > scheme.trained_length:
            raise CapacityError(
                f"sinks={sinks} + window={window} is {plan.capacity} positions, and this model was trained on "
                f"{scheme.trained_length}: choose a window of at most {scheme.trained_length - sinks}"
            )
        made = cls(scheme, plan, base_of(model), start, cache)
        if sinks and all(ring.plan.sinks == 0 for ring in made.rings):
            raise CapacityError(
                f"every layer of this model has its own sliding window, smaller than sinks + window = {plan.capacity}, "
                "so none would keep a sink: choose a smaller window"
            )
        return made

    # What is held

    @property
    def rings(self) -> list[Ring]:
        """The layers, by their own name."""
        return self.layers  # type: ignore[return-value]

    @property
    def sinks(self) -> int:
        """First tokens kept for ever."""
        return self.plan.sinks

    @property
    def window(self) -> int:
        """Most recent tokens kept, the current one included."""
        return self.plan.window

    @property
    def capacity(self) -> int:
        """Most keys a layer ever holds, and a layer with a smaller window of its own holds fewer: sinks + window."""
        return self.plan.capacity

    @property
    def seen(self) -> list[int]:
        """Real tokens fed so far, by row; empty before the first pass."""
        return list(self._seen)

    @property
    def evicted(self) -> list[int]:
        """Tokens let go so far, by row."""
        return [self.plan.evicted(seen) for seen in self._seen]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in all layers, scales included; constant from the first pass on."""
        return sum(ring.nbytes for ring in self.rings)

    @property
    def rotaries(self) -> list[Rotary | None]:
        """How each layer is turned; None: it is not."""
        return [None if layer.rotary is None else self._rotaries[layer.rotary] for layer in self._scheme.layers]

    def visible(self, row: int = 0) -> list[int]:
        """Which tokens of a row the newest one sees, counted from 0 in order of arrival, whatever `start` was."""
        if not self._seen:
            return []
        if not 0 <= row < len(self._seen):
            raise InvalidInput(f"row={row}: this cache holds rows 0 to {len(self._seen) - 1}")
        return self.plan.visible(self._seen[row])

    # One forward pass, as an attached model drives it

    def open_pass(self, model: object, shape: tuple[int, int], mask: Tensor | None, positions: Tensor | None) -> None:
        """Begin a forward pass of `shape` = (rows, new columns). Called by the hooks of `attach`.

        `mask` `[rows, columns]` is False at pads; `positions` `[1 | rows, columns]` are the model's own position ids,
        if it was given any, and are only checked: the cache counts for itself.
        """
        rows, columns = shape
        if self._owner() is not model:
            raise CacheError("this SinkCache was made for another model: make one with SinkCache.for_model(model)")
        if self._broken or self._arrival is not None:
            self._broken = True
            raise BrokenCache("an earlier forward pass failed half-way: reset() this cache and feed the stream again")
        if self._seen and rows != len(self._seen):
            raise InvalidInput(f"this cache holds {len(self._seen)} rows and was fed {rows}: reset() it first")
        if self.seat is not None and rows != 1:
            raise InvalidInput(f"this cache has a seat for one row, and was fed {rows}: take a seat for each")
        arrival = Arrival(self._seen or [0] * rows, columns, mask, self.start)
        self._offsets = check_positions(positions, arrival, self._offsets or [None] * rows)
        self._arrival = arrival
        self._gate.is_open = True

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, lenses: Sequence[Lens] = (), **options: Any
    ) -> Tensor:
        """Attention of one layer's new tokens, `[rows, heads, columns, value_dim]`; then keep their keys and values.

        `query` and `key` arrive unturned. `options` are `scale`, `softcap` and `sink_logits` of `Scoring`; `lenses`
        see, and bend, every block.
        """
        if self._arrival is None:
            raise CacheError("no forward pass is open on this SinkCache: only an attached model may drive it")
        ring, scoring = self.rings[layer], self.scoring(layer, **options)
        if self._arrival.is_even and not lenses:
            walker = choose_arriving(query, value, window=ring.plan.window, scoring=scoring)
            if walker is not None:
                block = self._arrival.whole(ring.plan, query.device)
                return ring.attend_whole((query, key, value), block, scoring, walker)
        blocks = self._arrival.blocks(ring.plan, query.device)
        return ring.attend(query, key, value, blocks, scoring, (layer, lenses) if lenses else None)

    def scoring(self, layer: int, **options: Any) -> Scoring:
        """How one layer scores; `options` as for `attend`."""
        scheme = self._scheme.layers[layer]
        rotary = None if scheme.rotary is None else self._rotaries[scheme.rotary]
        return Scoring(rotary=rotary, slopes=self._scheme.slopes, **options)

    def step_of(self, layer: int, device: torch.device) -> Block:
        """The token of the open pass, which must be one token a row, as a layer meets it. For the rows of a `Group`."""
        if self._arrival is None or self._arrival.columns != 1:
            raise CacheError("no forward pass of one token a row is open on this SinkCache")
        return self._arrival.blocks(self.rings[layer].plan, device)[0]

    def step_slots(self) -> StepSlots | None:
        """The slots for the pass now open, for a step that reads and writes them by itself; None where it cannot."""
        kinds = {layer.rotary for layer in self._scheme.layers}
        if self._arrival is None or self._scheme.slopes is not None or len(kinds) != 1 or None in kinds:
            return None
        (kind,) = kinds
        return open_slots(self.rings, self.plan, self._arrival, self._rotaries[str(kind)])

    def step_seats(self) -> Seating | None:
        """The seats for the pass now open, for a step that was captured over them; None where it cannot be."""
        arrival = self._arrival
        if arrival is None or arrival.columns != 1 or arrival.mask is not None:
            return None
        seats = self.seats
        rows = range(len(arrival.seen)) if self.seat is None else [self.seat.number]
        return None if seats is None else Seating(seats, rows, arrival.seen)

    @property
    def seats(self) -> Seats | None:
        """The rings as a captured step takes them, for as long as they stay where they are; see `why_no_seats`."""
        if self.seat is not None:
            self.claim()
            return self.seat.seats
        if self._seats is None and self.why_no_seats() is None:
            parts = [tuple(ring.parts.values()) for ring in self.rings]
            self._seats = laid_open(self.rings, parts, self.rotaries, self.start)
        return self._seats

    def why_no_seats(self) -> str | None:
        """What keeps a captured step from this cache, as half a sentence; None if nothing does."""
        if self.seat is not None:
            return self.seat.reason
        if not all(ring.is_initialized for ring in self.rings):
            return "it has read nothing yet, so that its memory is not claimed"
        return why_not_open(self.rings, [tuple(ring.parts.values()) for ring in self.rings], self._scheme.slopes)

    def close_pass(self, complete: bool) -> None:
        """End the pass: count its tokens, or, if the model raised on the way, refuse any further use."""
        arrival, self._arrival = self._arrival, None
        self._gate.is_open = False
        if arrival is None or not complete:
            self._broken = True
            return
        self._seen = arrival.seen_after
        for ring in self.rings:
            ring.columns_fed += arrival.columns

    def retract_pass(self) -> None:
        """End a pass of one token a row that was broken off as if it had never begun; feed that same token next.

        Nothing is lost, however far it got: the slot that the token takes held the key that leaves the window with it,
        which no later token sees, and feeding it again writes the same slot.
        """
        if self._arrival is not None and (self._arrival.columns != 1 or self._arrival.mask is not None):
            raise CacheError("only a pass of one token a row, without pads, can be retracted")
        self._arrival = None
        self._gate.is_open = False

    def take_back(self, seen: list[int]) -> None:
        """End a pass of one token a row, if it was counted, as if it had never begun: rows then had read `seen`.

        For a step that fails behind the last layer; feed that same token next. Nothing is lost: see `retract_pass`.
        """
        self.retract_pass()
        if self._seen != seen:
            self._seen = list(seen)
            for ring in self.rings:
                ring.columns_fed -= 1

    def count_on(self, seen: int) -> None:
        """Count what a captured step has read by itself: the one row of this cache has now read `seen` tokens."""
        (before,) = self._seen  # the first token of a stream claims its memory, in a pass of its own
        self._seen = [seen]
        for ring in self.rings:
            ring.columns_fed += seen - before

    # What may be copied and put away

    def fork(self) -> SinkCache:
        """Another cache at the same moment of the same stream; from here on each goes its own way, sharing nothing.

        Its memory is its own, also where this one sits in a `Pool`.
        """
        twin = self.twin()
        twin.adopt({name: held.clone() for name, held in self.dump().items()})
        return twin

    def twin(self) -> SinkCache:
        """An empty cache of the same sizes for the same model."""
        owner = self._owner()
        if owner is None:
            raise CacheError("the model of this SinkCache is gone")
        return SinkCache(self._scheme, self.plan, owner, self.start, self.kind)

    def sit(self, seat: Seat, places: Sequence[Mapping[str, Tensor]]) -> None:
        """Live in the memory of a `Pool` from now on: `places[layer]` are that layer's parts, for one row. Forgets."""
        self.reset()
        self.seat = seat
        for ring, place in zip(self.rings, places, strict=True):
            ring.seat = place

    def claim(self) -> None:
        """Begin in the seat, where there is one and nothing was read."""
        for ring in () if self._seen else self.rings:
            ring.sit()

    def leave(self) -> None:
        """Give the seat back, if there is one, and be an empty cache with memory of its own."""
        self.reset()
        seat, self.seat = self.seat, None
        for ring in self.rings:
            ring.seat = None
        if seat is not None:
            seat.give_back()

    def dump(self) -> dict[str, Tensor]:
        """All that this cache holds, by name: its own tensors, not copies. It has keys and values only once fed."""
        if self._broken or self._arrival is not None:
            raise BrokenCache("an earlier forward pass failed half-way: this cache holds no moment of the stream")
        for arrived in self.landing:
            arrived.synchronize()
        self.landing = ()
        fed = [ring.columns_fed for ring in self.rings]
        offsets = [-1 if offset is None else offset for offset in self._offsets]
        counts = {"seen": self._seen, "offsets": offsets, "columns": fed}
        held = {f"cache.{name}": torch.tensor(values, dtype=torch.int64) for name, values in counts.items()}
        for layer, ring in enumerate(self.rings):
            if ring.is_initialized:
                held |= {f"{name}.{layer}": part for name, part in ring.parts.items()}
        return held

    def adopt(self, held: Mapping[str, Tensor]) -> None:
        """Become what `dump` gave of a cache of the same model and sizes. The tensors become this cache's own memory,
        or are copied into its seat.

        Raises InvalidInput where they do not fit; this cache is then as `reset` leaves it.
        """
        self.reset()
        try:
            seen, offsets, columns = (held[f"cache.{name}"].tolist() for name in ("seen", "offsets", "columns"))
            if len(offsets) != len(seen) or len(columns) != len(self.rings) or min([*seen, *columns], default=0) < 0:
                raise InvalidInput("its counts of rows, layers or tokens do not agree")
            for layer, ring in enumerate(self.rings if seen else ()):
                ring.adopt({name: held[f"{name}.{layer}"] for name in ring.names}, len(seen), columns[layer])
        except (KeyError, InvalidInput) as error:
            self.reset()
            raise InvalidInput(f"these tensors are no state of this SinkCache: {error}") from error
        self._seen, self._offsets = seen, [None if offset < 0 else offset for offset in offsets]

    # What transformers asks of a cache

    def reset(self) -> None:
        """Forget the stream and give its memory back, but for a seat; the cache can be used again."""
        self._seen, self._offsets, self._arrival, self._broken = [], [], None, False
        self._seats, self.landing = None, ()
        for ring in self.rings:
            ring.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue the present row `beam_idx[i]` (beam search)."""
        chosen = beam_idx.tolist()
        if self.seat is not None and chosen != [0]:
            raise UnsupportedOption("a cache with a seat in a pool is one row: choose rows of a cache without one")
        self._seats = None
        self._seen = [self._seen[row] for row in chosen] if self._seen else []
        self._offsets = [self._offsets[row] for row in chosen] if self._offsets else []
        for ring in self.rings:
            ring.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies side by side."""
        self.reorder_cache(torch.arange(len(self._seen)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Refused: what a ring has overwritten cannot be taken back."""
        raise UnsupportedOption(
            "a SinkCache cannot take tokens back: generate without assisted, speculative or prompt-lookup decoding"
        )


def layer_plan(plan: Plan, own_window: int | None) -> Plan:
    """A layer keeps its own sliding window where the cache would show it more; elsewhere it is a full layer."""
    if own_window is None or own_window >= plan.capacity:
        return plan
    return Plan(0, own_window)


def check_positions(positions: Tensor | None, arrival: Arrival, offsets: list[int | None]) -> list[int | None]:
    """Refuse position ids that do not count each row's real tokens on by one (packed rows, a prompt fed twice).

    A constant offset is welcome, since only differences matter, but a negative one would mean that a token came
    earlier than the tokens before it. Returns the offset of each row.
    """
    if positions is None:
        return offsets
    here = arrival.positions
    if positions.ndim != 2 or positions.shape[0] not in (1, here.shape[0]) or positions.shape[1] != here.shape[1]:
        raise InvalidInput(f"position_ids have shape {list(positions.shape)} for {list(here.shape)} tokens")
    ahead = positions.to(here.device) - here
    real, far = here >= 0, torch.iinfo(torch.int64).max
    bounds = torch.stack((ahead.where(real, far).amin(dim=1), ahead.where(real, -far).amax(dim=1)), dim=1)
    checked: list[int | None] = []
    for row, (known, (least, most)) in enumerate(zip(offsets, bounds.tolist(), strict=True)):
        if least > most:  # nothing but pads
            checked.append(known)
            continue
        if least != most or least < 0 or known not in (None, least):
            raise UnsupportedOption(
                f"position_ids of row {row} do not count on by one from the {arrival.seen[row]} tokens already seen: "
                "feed each token once, in order, packed sequences as rows of their own, and generate with use_cache on"
            )
        checked.append(least)
    return checked
