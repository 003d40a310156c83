"""One token of every row, in one kernel a layer: what is claimed once, and the launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.kernels.device.forward import Statistics
from sinks.kernels.device.language import LOG2E, need_triton, on
from sinks.kernels.device.step.angles import write_tables
from sinks.kernels.device.step.kernel import step_kernel
from sinks.kernels.scoring import Scoring

HEAD_DIMS = (64, 96, 128, 256)
PROGRAMS = 264
"""Programs that fill a Hopper GPU: two for each of 132 multiprocessors."""

Parts = tuple[Tensor, Tensor, Tensor]
"""Keys or values of an int8 ring: sinks in full `[seats, kv_heads, sinks, head_dim]`, the window's codes, scales."""


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMS norms over each head of the query and of the key, before they are turned.

    `unit_offset` multiplies by `1 + weight` and rounds once (Gemma 3); otherwise the normed head is rounded to its own
    type before the weight and after it (Qwen 3).
    """

    query: Float[Tensor, " head_dim"]
    key: Float[Tensor, " head_dim"]
    epsilon: float
    unit_offset: bool = False


@dataclass(frozen=True)
class Cut:
    """How the kernel is cut: `slots` a tile, `splits` programs for the window of a row and key head, `warps` a program.

    Where there are several, one more has the sinks. `stages` tiles are loaded ahead where a program has more than one.
    `overlap` launches the kernel while the one before still runs: that one may write anything but this layer's older
    slots and `seats`.
    """

    slots: int
    splits: int
    warps: int = 4
    stages: int = 3
    overlap: bool = False


def choose_cut(
    batch: int, heads: int, kv_heads: int, head_dim: int, capacity: int, coded: bool = False
) -> Cut:  # fmt: skip
    """How to cut a step of these sizes: what was fastest on an H200, of 140 ways. `coded`: the ring is an int8 one."""
    slots = 32 if head_dim > 128 else 64
    tiles, share = -(-capacity // slots), PROGRAMS // (batch * kv_heads)
    if share < 2 and coded:
        return Cut(slots, 1, warps=2)
    if share < 2 and head_dim > 64:
        return Cut(slots, 1, stages=2)
    if share < 2:
        return Cut(slots, 1, warps=2, stages=4) if share else Cut(slots, 1)
    if head_dim <= 128 and 32 < tiles <= 2 * min(share, 33):
        return Cut(2 * slots, -(-tiles // 2))
    return Cut(slots, min(tiles, share, 32))


@dataclass(frozen=True, eq=False)
class Step:
    """What every step of a stream has in common, claimed once: nothing is allocated for a token but its result.

    `first_keys`, at most `sinks`, asks for statistics and says how many first tokens `mass` counts; None: none. Token j
    of a stream has the phase of position `start + j`. Layers that differ in `scoring` or `norms` alone may share the
    rest (`dataclasses.replace`), so long as they run one after the other.
    """

    sinks: int
    window: int
    scoring: Scoring
    norms: HeadNorms | None
    first_keys: int | None
    start: int
    cut: Cut
    steps: Int[Tensor, " pairs"]
    partials: Float[Tensor, " numbers"]
    arrivals: Int[Tensor, " pairs_of_row_and_head"]

    @staticmethod
    def prepare(
        query: Float[Tensor, "batch heads head_dim"],
        keys: Float[Tensor, "seats kv_heads slots head_dim"] | Parts,
        *,
        sinks: int,
        window: int,
        scoring: Scoring,
        norms: HeadNorms | None = None,
        first_keys: int | None = None,
        start: int = 0,
        cut: Cut | None = None,
    ) -> Step:
        """Check what will be asked for, and claim the memory of the parts, for as many rows as `query` has.

        Raises UnsupportedOption, naming another way, for what the kernel cannot do; InvalidInput for wrong sizes.
        """
        _refuse(query, keys, sinks, window, scoring)
        if first_keys is not None and not 0 <= first_keys <= sinks:
            raise InvalidInput(f"first_keys={first_keys}: mass is counted on sinks, of which there are {sinks}")
        (batch, heads, head_dim), kv_heads = query.shape, (keys if isinstance(keys, Tensor) else keys[0]).shape[1]
        coded = not isinstance(keys, Tensor)
        cut = choose_cut(batch, heads, kv_heads, head_dim, sinks + window, coded) if cut is None else cut
        tiles = -(-window // cut.slots)
        cut = replace(cut, splits=-(-tiles // -(-tiles // cut.splits)))
        rows = batch * kv_heads * (cut.splits + 1) * _power_of_two(heads // kv_heads) if cut.splits > 1 else 0
        device, rotary = query.device, scoring.rotary
        return Step(
            sinks, window, scoring, norms, first_keys, start, cut,
            torch.zeros(1, dtype=torch.int64, device=device) if rotary is None else rotary.steps.to(device),
            torch.empty(rows * (_power_of_two(head_dim) + 4) + 1, dtype=torch.float32, device=device),
            torch.zeros(batch * kv_heads, dtype=torch.int32, device=device),
        )  # fmt: skip

    def tables(
        self, positions: Int[Tensor, " batch"], out: Float32[Tensor, "batch 4 pairs"] | None = None
    ) -> Float32[Tensor, "batch 4 pairs"]:
        """Cosine and sine at each row's position, then at its position in the cache: the same for all alike layers.

        For a token of a model that is one small kernel instead of the same arithmetic in every layer.
        """
        pairs = 0 if self.scoring.rotary is None else self.scoring.rotary.width // 2
        if out is None:
            out = torch.empty(len(positions), 4, pairs, dtype=torch.float32, device=positions.device)
        if pairs:
            with on(positions.device):
                write_tables[(len(positions),)](
                    out, positions, self.steps, pairs, self.sinks + self.window, self.start,
                    PAIRS=_power_of_two(pairs), num_warps=1,
                )  # fmt: skip
        return out


def attend_step(
    step: Step,
    query: Float[Tensor, "batch heads head_dim"],
    key: Float[Tensor, "batch kv_heads head_dim"],
    value: Float[Tensor, "batch kv_heads head_dim"],
    keys: Float[Tensor, "seats kv_heads slots head_dim"] | Parts,
    values: Float[Tensor, "seats kv_heads slots head_dim"] | Parts,
    positions: Int[Tensor, " batch"],
    seats: Int[Tensor, " batch"] | None = None,
    out: Float[Tensor, "batch heads head_dim"] | None = None,
    tables: Float32[Tensor, "batch 4 pairs"] | None = None,
) -> tuple[Float[Tensor, "batch heads head_dim"], Statistics | None]:
    """Turn the new token of every row, write it into its slot of `keys` and `values`, and attend; no gradient.

    `query` and `key` arrive unturned, all three as they lie (views of one buffer, say) so long as a head is dense; the
    ring holds keys turned by their stream positions, sinks in the first slots, an int8 one as `Parts`. `positions`,
    int64 on the device, count each row's tokens from 0; -1 leaves a row alone and gives zeros. Row i works on seat
    `seats[i]` of the ring, or on seat i; no two rows on one; a row that rests may have any seat there is, or -1. The
    result goes into `out`, contiguous, if there is one. `tables` are `step.tables(positions)`, if they are at hand.
    Nothing is read back, so the call can be captured in a CUDA graph that also advances `positions`.
    """
    scoring, (batch, heads, head_dim), kv_heads = step.scoring, query.shape, key.shape[1]
    new = tuple(part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    figures = step.partials.new_empty((4, batch, heads) if step.first_keys is not None else (1,))
    constants = _constants(step, heads // kv_heads, head_dim)
    with on(query.device):
        step_kernel[(constants["SPLITS"], kv_heads, batch)](
            new, (keys, values) if isinstance(keys, Tensor) else (*keys, *values), out, figures, step.partials,
            step.arrivals, positions, positions if seats is None else seats, step.steps if tables is None else tables,
            figures if scoring.sink_logits is None else scoring.sink_logits, *_normed(step),
            scoring.scale * LOG2E, step.start, tuple(stride for part in new for stride in part.stride()[:2]),
            HEADS=heads, GROUP=heads // kv_heads, DIM=head_dim, **constants,
            SEATED=seats is not None, TABLES=tables is not None, CODED=not isinstance(keys, Tensor),
        )  # fmt: skip
    if step.first_keys is None:
        return out, None
    log_sum_exp, mass, entropy, maximum = figures
    return out, Statistics(mass, entropy, maximum, log_sum_exp)


def _normed(step: Step) -> Sequence[Any]:
    if step.norms is None:
        return [(step.steps, step.steps, 0.0)]
    return [(step.norms.query, step.norms.key, step.norms.epsilon)]


def _constants(step: Step, group: int, head_dim: int) -> dict[str, Any]:
    """What the compiler must know, apart from how many heads there are."""
    cut, padded, members = step.cut, _power_of_two(head_dim), _power_of_two(group)
    tiles, apart = -(-step.window // cut.slots), int(cut.splits > 1 and step.sinks > 0)
    norms, rotary = step.norms, step.scoring.rotary
    return {
        "PADDED": padded, "MEMBERS": members, "SINKS": step.sinks, "WINDOW": step.window, "FIRST": step.first_keys or 0,
        "APART": apart, "SPAN": -(-tiles // cut.splits) * cut.slots, "SLOTS": cut.slots, "SPLITS": cut.splits + apart,
        "TURNED": 0 if rotary is None else rotary.first, "PAIRS": 0 if rotary is None else rotary.width // 2,
        "INTERLEAVED": rotary is not None and rotary.interleaved,
        "NORMED": 0 if norms is None else 1 + norms.unit_offset, "LOGITS": step.scoring.sink_logits is not None,
        "STATISTICS": step.first_keys is not None, "OVERLAP": cut.overlap,
        "AHEAD": tiles == cut.splits and (step.sinks <= cut.slots if apart else step.sinks == 0),
        "num_warps": cut.warps, "num_stages": cut.stages, **({"launch_pdl": True} if cut.overlap else {}),
    }  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _refuse(query: Tensor, keys: Tensor | Parts, sinks: int, window: int, scoring: Scoring) -> None:
    for name, option in (("slopes", scoring.slopes), ("softcap", scoring.softcap)):
        if option is not None:
            raise UnsupportedOption(f"the fused step knows no {name}: stream through sinks.SinkCache instead")
    if query.shape[-1] not in HEAD_DIMS:
        raise UnsupportedOption(
            f"the fused step takes heads of 64, 96, 128 or 256 dimensions, not {query.shape[-1]}: stream through "
            "sinks.SinkCache instead"
        )
    whole = isinstance(keys, Tensor)
    for part, slots in [(keys, sinks + window)] if whole else zip(keys, (sinks, window, window), strict=True):
        if part.shape[2] != slots or not part.is_contiguous() or query.shape[1] % part.shape[1]:
            raise InvalidInput(
                f"a ring of shape {list(part.shape)} does not fit {sinks} sinks, a window of {window} and a query of "
                f"shape {list(query.shape)}: give contiguous [seats, kv_heads, sinks + window, head_dim], or the "
                "sinks, codes and scales of an int8 ring"
            )
    if scoring.scale <= 0:
        raise InvalidInput(f"scale={scoring.scale}: a score is scaled by a number above 0")
    need_triton(query.device, "stream through sinks.SinkCache instead")
