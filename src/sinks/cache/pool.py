"""Seats for many streams, claimed once: what comes and goes is who sits where."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW, Kind, SinkCache
from sinks.cache.plan import check_whole
from sinks.cache.rings.seats import Seat, laid_open
from sinks.errors import CacheError, InvalidInput
from sinks.models.families import base_of
from sinks.models.step.slots import Seats


class Pool:
    """The rings of `size` streams of one model, `[size, kv_heads, capacity, head_dim]` a layer, and who sits in them.

    `take` gives a `SinkCache` of one row whose rings are a seat: whatever is done with it happens in that place, so
    that what a step was captured over stays true. Its `fork` is a cache with memory of its own. `put` brings such a
    cache to a seat, `away` takes one to the host.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        size: int,
        *,
        sinks: int = DEFAULT_SINKS,
        window: int = DEFAULT_WINDOW,
        start: int = 0,
        cache: Kind = "full",
    ) -> None:
        """Claim the memory. Feeds `model`, which must be attached, one token to see what its layers keep.

        Raises InvalidInput for a size that makes no sense, and what `SinkCache.for_model` raises.
        """
        check_whole("size", size, least=1)
        self.size = size
        self.pattern = SinkCache.for_model(model, sinks=sinks, window=window, start=start, cache=cache)
        first = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            base_of(model)(input_ids=first, past_key_values=self.pattern, use_cache=True)
        rings = self.pattern.rings
        try:
            with torch.inference_mode(False):
                self._parts = [
                    {name: part.new_zeros(size, *part.shape[1:]) for name, part in ring.parts.items()} for ring in rings
                ]
        except torch.OutOfMemoryError as error:
            raise CacheError(
                f"{size} seats of {sinks} + {window} tokens do not fit into the memory of {model.device}: ask for "
                'fewer, for a smaller window, or for cache="int8"'
            ) from error
        self._free = list(range(size))[::-1]
        parts = [tuple(layer.values()) for layer in self._parts]
        self.reason = self.pattern.why_no_seats()
        self.seats = None if self.reason else laid_open(rings, parts, self.pattern.rotaries, start)
        self.pattern.reset()

    pattern: SinkCache
    """An empty cache like those in the seats, in none itself."""

    seats: Seats | None
    """The rings as a captured step takes them; None where `reason` says why they cannot be."""

    @property
    def free(self) -> int:
        """How many seats nobody sits in."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all seats."""
        return sum(part.nbytes for layer in self._parts for part in layer.values())

    def take(self) -> SinkCache:
        """A cache of one row that has read nothing, in a free seat. Raises CacheError where none is free."""
        if not self._free:
            raise CacheError(f"all {self.size} seats are taken: let a stream leave, or make a larger pool")
        number = self._free.pop()
        cache = self.pattern.twin()
        leave = weakref.finalize(cache, self._free.append, number)  # also when the cache is merely dropped
        leave.atexit = False
        here = slice(number, number + 1)
        with torch.inference_mode(False):
            places = [{name: part[here] for name, part in layer.items()} for layer in self._parts]
        cache.sit(Seat(number, self.seats, self.reason, leave), places)
        return cache

    def put(self, cache: SinkCache) -> SinkCache:
        """The same moment of the same stream in a free seat; `cache` is left alone. From `away` without waiting.

        Raises CacheError where no seat is free, InvalidInput where `cache` does not fit.
        """
        pattern = self.pattern
        if (cache.plan, cache.kind, cache.start) != (pattern.plan, pattern.kind, pattern.start):
            raise InvalidInput(
                f"this cache has sinks={cache.sinks}, window={cache.window}, cache={cache.kind}, start={cache.start}, "
                f"and these seats have sinks={pattern.sinks}, window={pattern.window}, cache={pattern.kind}, "
                f"start={pattern.start}: make a pool of its sizes"
            )
        seated = self.take()
        try:
            seated.adopt(cache.dump())
        except BaseException:
            seated.leave()
            raise
        return seated


def away(cache: SinkCache) -> SinkCache:
    """The same moment in memory of the host. Where `cache` has a seat, that is free afterwards; it is used up.

    From a GPU it is pinned memory, which fills in the order of its current stream while the caller goes on; whoever
    looks into the copy waits.
    """
    kept, held = cache.twin(), cache.dump()
    devices = {part.device for part in held.values() if part.is_cuda}
    if cache.seat is None and not devices:
        return cache
    kept.adopt({name: _on_host(part) for name, part in held.items()})
    kept.landing = tuple(_now(device) for device in devices)
    cache.leave()
    return kept


def _now(device: torch.device) -> torch.cuda.Event:
    """Happens when `device` has done what its current stream was asked so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _on_host(part: Tensor) -> Tensor:
    if not part.is_cuda:
        return part.clone()
    with torch.inference_mode(False):
        return torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
