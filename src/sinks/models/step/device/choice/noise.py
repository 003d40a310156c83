"""Random numbers that are a function of who asks: of a stream's seed, of the token's place in it, of the token itself.

Philox 4x32-10 (Salmon et al., SC 2011; the generator of Random123), whose four words of one counter go to four tokens
side by side. A word becomes Gumbel noise, and whoever has the largest sum of logit and noise is a draw from their
softmax (Gumbel 1954; Maddison et al., arXiv 1411.0030). Nothing is held and nothing advances: a stream draws the same
in any company, and after any pause. Once in Triton, and once in PyTorch, which agree to float32's rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinks.kernels.device.language import Value, constexpr, jit, tl

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@jit
def gumbel_of(words: Value) -> Value:
    """The noise that 32 random bits stand for: -log(-log(1 - u)), where small u, of which large noise is made, keep
    all of float32's digits."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    small = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, small, -tl.log(1.0 - u)))


@jit
def words_of(seed: Value, position: Value, quad: Value) -> Value:
    """The four words of tokens 4 * quad to 4 * quad + 3."""
    zero = quad.to(tl.uint32) * 0
    near = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    far = zero + (position >> 32).to(tl.uint32)
    return tl.philox(seed, quad.to(tl.uint32), zero, near, far)


@jit
def noise_between(seed: Value, position: Value, start: Value, COUNT: constexpr) -> Value:
    """Noise of tokens `start` to `start + COUNT - 1`, in order; both multiples of 4."""
    first, second, third, fourth = words_of(seed, position, start // 4 + tl.arange(0, COUNT // 4))
    return gumbel_of(tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth)))


@jit
def noise_at(seed: Value, position: Value, token: Value) -> Value:
    """Noise of these tokens, in whatever order."""
    first, second, third, fourth = words_of(seed, position, token // 4)
    place = token % 4
    low, high = tl.where(place == 0, first, second), tl.where(place == 2, third, fourth)
    return gumbel_of(tl.where(place < 2, low, high))


def noise(
    seeds: Int[Tensor, " rows"], positions: Int[Tensor, " rows"], tokens: Int[Tensor, " tokens"]
) -> Float[Tensor, "rows tokens"]:
    """The same noise of some tokens of some rows, float32, on the device of the seeds."""
    rows, place = len(seeds), (tokens % 4).to(seeds.device)
    quads = (tokens // 4).to(seeds.device).expand(rows, -1)
    near, far = (each[:, None].expand(quads.shape) for each in (positions & WORD, positions >> 32 & WORD))
    words = _philox([quads, torch.zeros_like(quads), near, far], seeds[:, None] & WORD, seeds[:, None] >> 32 & WORD)
    chosen = torch.stack(words, dim=-1).gather(-1, place.expand(rows, -1)[..., None])[..., 0]
    u = ((chosen.float() + 0.5) * 2.0**-32).clamp(max=0.99999994)
    small = u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    return -torch.log(torch.where(u < 0.015625, small, -torch.log(1 - u)))


def _philox(counter: list[Tensor], low: Tensor, high: Tensor) -> list[Tensor]:
    """Four words from four, each of 32 bits in an int64."""
    a, b, c, d = counter
    for _ in range(_ROUNDS):
        (left, one), (right, two) = (_product(each, by) for each, by in zip((a, c), _MULTIPLIERS, strict=True))
        a, b, c, d = right ^ b ^ low, two, left ^ d ^ high, one
        low, high = (low + _STEPS[0]) & WORD, (high + _STEPS[1]) & WORD
    return [a, b, c, d]


def _product(words: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of a product of two: int64 holds its two halves, and not the whole."""
    low, high = words * (by & 0xFFFF), words * (by >> 16)
    middle = (low >> 16) + high
    return middle >> 16, (((middle & 0xFFFF) << 16) | (low & 0xFFFF)) & WORD
