"""flash-attn-4's kernel with two methods overridden: when it may be, its compilation, its launch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cache, partial
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sinks.kernels.band.inside.build import Build, tools
from sinks.kernels.band.inside.parked import Parked
from sinks.kernels.band.inside.tile import Tile
from sinks.kernels.device.forward import Band
from sinks.kernels.device.rows import Rows

if TYPE_CHECKING:
    Kernel: TypeAlias = Any
else:
    Kernel = object

VERSIONS = ("4.0.0b36",)
"""Those of flash-attn-4 whose kernel this was written for."""

MMA: Sequence[str] = (
    "tiled_mma_qk tiled_mma_pv mO mLSE sQ sK sVt sP sO learnable_sink pipeline_k pipeline_v pipeline_q "
    "gmem_tiled_copy_O tma_atom_O tidx softmax_scale_log2 softmax_scale block_info SeqlenInfoCls AttentionMaskCls "
    "TileSchedulerCls blocksparse_tensors aux_data fastdiv_mods"
).split()
EPILOGUE: Sequence[str] = (
    "acc_O lse mO mLSE sO seqlen gmem_tiled_copy_O tma_atom_O tiled_mma tidx m_block head_idx batch_idx"
).split()
"""What its kernel gives to the two methods that are overridden."""

NAMES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
"""Types as CuTe calls them."""


@cache
def why_not_inside(device: torch.device) -> str | None:
    """What keeps the sinks from being merged inside flash-attn-4's kernel on `device`; None: nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"only the kernel for Hopper GPUs is overridden, and this is {device}"
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:  # it can be imported, so somebody has put it there by hand
        version = "of no version"
    if version not in VERSIONS:
        return f"flash-attn-4 {version} is none of {', '.join(VERSIONS)}"
    try:
        kernel = tools().kernel
    except (ImportError, AttributeError) as error:  # another version of what flash-attn-4 stands on
        return f"what its kernel is made of is not where it was known to be ({error})"
    for name, known in (("mma", MMA), ("epilogue", EPILOGUE)):
        if [*signature(getattr(kernel, name)).parameters][1:] != known:
            return f"{kernel.__name__}.{name} takes other arguments than those known"
    return None


class MergesSinks(Kernel):
    """Mixed into flash-attn-4's kernel, two methods of which it overrides; `build` is set before it is compiled."""

    build: Build

    def mma(self, *given: Any) -> None:
        """The window of a tile; before that, what its sinks need is found."""
        named: dict[str, Any] = dict(zip(MMA, given, strict=True))
        self.parked = Parked.room(self)
        work = named["TileSchedulerCls"]().initial_work_tile_info()
        if isinstance(work.is_valid_tile, bool):
            self.park(named, work)
        else:  # a program of ragged rows may have no tile
            tools().language.if_generate(work.is_valid_tile, partial(self.park, named, work))
        # To the rest of the kernel there are no other tensors, which it would keep divisors for.
        super().mma(**named | {"aux_data": type(named["aux_data"])(), "fastdiv_mods": None})

    def park(self, given: Mapping[str, Any], work: Any) -> None:
        """All threads that multiply do so together."""
        Tile.of(self, given, work).park(self.parked)
        barrier = int(tools().barriers.NamedBarrierFwd.Epilogue)
        tools().cute.arch.barrier(barrier_id=barrier, number_of_threads=self.num_mma_threads)

    def epilogue(self, *given: Any) -> None:
        """The tile leaves its registers, sinks and all."""
        named = dict(zip(EPILOGUE, given, strict=True))
        self.parked.merge(named["acc_O"], named["lse"], named["tidx"])
        super().epilogue(*given)


def _compile(build: Build, options: str = "--enable-tvm-ffi") -> Any:
    """The kernel, for tensors of any length; nothing of it is looked at, so that it compiles without a GPU too."""
    calls, cutlass, sym, made = tools().calls, tools().cutlass, tools().cute.sym_int, tools().fake.make_fake_tensor
    kind, (batch, tokens, packed, heads, kv_heads) = getattr(cutlass, build.kind), (sym() for _ in range(5))
    rows, dims = (tokens,) if build.several else (batch, tokens), build.head_dim
    query, out = (made(kind, (*rows, heads, dims), divisibility=8) for _ in range(2))
    key, value = (made(kind, (*rows, kv_heads, dims), divisibility=8) for _ in range(2))
    sums = made(cutlass.Float32, (heads, tokens) if build.several else (batch, heads, tokens), divisibility=1)
    begins = made(cutlass.Int32, (sym(),), divisibility=1) if build.several else None
    beside = [made(cutlass.Float32, (heads, packed, sym()), divisibility=1)]
    beside += [made(kind, (packed, kv_heads, dims), divisibility=8)]
    if build.meets:
        beside += [made(cutlass.Int32, (packed, kv_heads, dims // 2), divisibility=4)]
    if build.logits:
        beside += [made(cutlass.Float32, (heads,), divisibility=1)]
    cut = calls._tile_size_fwd_sm90(dims, dims, False, True)
    kernel = type("MergingForward", (MergesSinks, tools().kernel), {"build": build})(
        kind, dims, dims, build.group, is_causal=False, is_local=True, pack_gqa=build.group > 1,
        tile_m=cut.m_block_size, tile_n=cut.n_block_size, num_stages=2, num_threads=384,
        intra_wg_overlap=cut.intra_wg_overlap, mma_pv_is_rs=cut.mma_pv_is_rs,
    )  # fmt: skip
    stream = tools().cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return tools().cute.compile(
        kernel, query, key, value, out, sums, 1.0, begins, begins, None, None, None, 1, 0, None, None,
        calls.AuxData(beside), None, None, stream, options=options,
    )  # fmt: skip


_compiled = cache(_compile)


def whole_forward(
    heads: tuple[Tensor, Tensor, Tensor],
    scores: Float[Tensor, "heads tokens sinks"] | None,
    logits: Float[Tensor, " heads"] | None,
    rows: Rows,
    band: Band,
) -> tuple[Float[Tensor, "tokens heads head_dim"], Float[Tensor, "heads tokens"], Float[Tensor, "heads tokens sinks"]]:
    """Result, log-sum-exp and scores of window, sinks and sink logits; `heads` are query, key and value, packed.

    `scores` are `Turned.scores`, or None where no head is turned: then they are found on the way. Of a sink that the
    window covers, or the row is too short for, found ones say nothing.
    """
    query, key, value = (tools().calls.maybe_contiguous(part) for part in heads)  # aligned, that is
    tokens, count, head_dim = query.shape
    build = Build(
        NAMES[query.dtype], head_dim, count // key.shape[1], rows.batch > 1, band.sinks, scores is None,
        logits is not None,
    )  # fmt: skip
    found: Tensor = query.new_empty(count, tokens, band.sinks, dtype=torch.float32) if scores is None else scores
    beside = [found, value]
    if scores is None:
        beside.append(key.view(torch.int32))
    if logits is not None:
        beside.append(logits.float())
    out, log_sums = torch.empty_like(query), query.new_empty(count, tokens, dtype=torch.float32)
    begins, given = (rows.begins if build.several else None), (query, key, value, out, log_sums)
    _compiled(build)(
        *(given if build.several else (part.unsqueeze(0) for part in given)), band.scale, begins, begins,
        None, None, None, band.window - 1, 0, None, None, tools().calls.AuxData(beside), None, None,
    )  # fmt: skip
    return out, log_sums, found
