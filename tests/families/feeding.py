"""Ways to feed a stream to a model that was given a `SinkCache`."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.models.attach import attach
from tests.families.tiny import build


def pair(name: str, layers: int = 2, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock model of case `name` and an attached copy of it."""
    plain = build(name, layers=layers, **options)
    return plain, attach(copy.deepcopy(plain))


def feed(model: PreTrainedModel, cache: SinkCache, ids: Tensor, sizes: Iterable[int]) -> Tensor:
    """Feeds int64[batch, length] in chunks of `sizes`. Returns all logits, [batch, length, vocabulary]."""
    pieces = [model(input_ids=chunk, past_key_values=cache).logits for chunk in ids.split(list(sizes), dim=1)]
    return torch.cat(pieces, dim=1)


def feed_masked(model: PreTrainedModel, cache: SinkCache, ids: Tensor, mask: Tensor, sizes: Iterable[int]) -> Tensor:
    """The same with a padding mask int64[batch, length]; each call gets its columns so far, as in `generate`."""
    pieces, start = [], 0
    for size in sizes:
        end = start + size
        chunk = ids[:, start:end]
        pieces.append(model(input_ids=chunk, attention_mask=mask[:, :end], past_key_values=cache).logits)
        start = end
    assert start == ids.shape[1]
    return torch.cat(pieces, dim=1)


def generate(model: PreTrainedModel, **options: Any) -> Any:
    """`model.generate`, which type checkers take for a tensor."""
    return cast(Any, model).generate(**options)


def one_by_one(length: int) -> list[int]:
    return [1] * length


def odd_chunks(length: int, seed: int = 0, largest: int = 23) -> list[int]:
    """Chunk sizes from 1 to `largest` that add up to `length`."""
    generator = random.Random(seed)
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min(generator.choice([1, 2, 3, 5, 7, 11, largest]), length - sum(sizes)))
    return sizes


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as int64[batch, longest] with the padding on the left, and their 2-D mask."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
