"""A captured step's stand-in: one token of each row through a Llama, in plain PyTorch over `Seats`, float64.

A second route: the slot by counting, the angles by multiplication, every row and head on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from sinks.models.families import base_of
from sinks.models.step.slots import SeatCache, Seating, Seats


def turned(heads: Tensor, position: int, rotary: Any) -> Tensor:
    """Heads `[..., head_dim]`, first half against second, at a position."""
    angles = position * rotary.inv_freq.double()
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


def written(ring: tuple[Tensor, ...], seat: int, slot: int, sinks: int, new: tuple[Tensor, Tensor]) -> None:
    """Put a key and a value `[kv_heads, head_dim]` into a slot, of a full ring or of one of 8 bits."""
    if len(ring) == 2:
        for held, one in zip(ring, new, strict=True):
            held[seat, :, slot] = one
        return
    for (full, codes, scales), one in zip((ring[:3], ring[3:]), new, strict=True):
        if slot < sinks:
            full[seat, :, slot] = one
        else:
            scale = (one.abs().amax(-1, keepdim=True) / 127).float()
            codes[seat, :, slot - sinks] = (one / scale).round().clamp(-127, 127).to(torch.int8)
            scales[seat, :, slot - sinks] = scale


def numbers(ring: tuple[Tensor, ...], seat: int, count: int) -> list[Tensor]:
    """Keys and values `[kv_heads, count, head_dim]`."""
    if len(ring) == 2:
        return [held[seat, :, :count] for held in ring]
    whole = (torch.cat((full[seat], codes[seat] * scales[seat]), dim=1) for full, codes, scales in (ring[:3], ring[3:]))
    return [each[:, :count] for each in whole]


def attended(seats: Seats, layer: int, row: tuple[int, int], heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`row` is (seat, position); heads are `[heads | kv_heads, head_dim]`, unturned."""
    (seat, position), (query, key, value) = row, heads
    (sinks, window), rotary, ring = seats.sizes[layer], seats.rotaries[layer], seats.rings[layer]
    slot = position
    while slot >= sinks + window:
        slot -= window
    written(ring, seat, slot, sinks, (turned(key, seats.start + position, rotary), value))
    count = min(position + 1, sinks + window)
    keys, values = numbers(ring, seat, count)
    near = turned(query, seats.start + position, rotary)
    far = turned(query, seats.start + min(position, sinks + window - 1), rotary)
    out = []
    for head in range(len(query)):
        own = head // (len(query) // len(key))
        scores = torch.stack([(far if n < sinks else near)[head] @ keys[own, n] for n in range(count)])
        out.append((scores / query.shape[-1] ** 0.5).softmax(-1) @ values[own])
    return torch.cat(out)


def step(model: Any, ids: Tensor, seating: Seating) -> Tensor:
    """The logits `[rows, vocab]` behind the tokens `ids` [rows]; NaN for rows that take no part."""
    base, found = model.model, []
    for token, seat, position in zip(ids.tolist(), seating.rows, seating.positions, strict=True):
        states = base.embed_tokens.weight[token]
        if position < 0:
            found.append(torch.full_like(model.lm_head.weight[:, 0], torch.nan))
            continue
        for layer, block in enumerate(base.layers):
            own = block.self_attn
            given = block.input_layernorm(states[None, None])[0, 0]
            query, key, value = (part(given).view(-1, own.head_dim) for part in (own.q_proj, own.k_proj, own.v_proj))
            seen = attended(seating.seats, layer, (seat, position), (query, key, value))
            states = states + own.o_proj(seen)
            states = states + block.mlp(block.post_attention_layernorm(states[None, None]))[0, 0]
        found.append(model.lm_head(base.norm(states[None, None])[0, 0]))
    return torch.stack(found)


@contextmanager
def standing_in(model: Any) -> Iterator[list[Seating]]:
    """Inside, passes of one token over seats go by `step`; what it was given is listed."""
    taken: list[Seating] = []
    ordinary = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        if ids.shape[1] != 1 or not isinstance(cache, SeatCache):
            return ordinary(*args, **kwargs)
        cache.open_pass(base_of(model), (len(ids), 1), None, None)  # type: ignore[attr-defined]
        seating, complete = cache.step_seats(), False
        if seating is None:
            cache.retract_pass()  # type: ignore[attr-defined]
            return ordinary(*args, **kwargs)
        try:
            logits = step(model, ids[:, 0], seating)
            complete = True
        finally:
            cache.close_pass(complete)  # type: ignore[attr-defined]
        taken.append(seating)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)  # type: ignore[arg-type]

    model.forward = forward
    try:
        yield taken
    finally:
        del model.forward
