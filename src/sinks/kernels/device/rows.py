"""Ragged rows without pads: the real tokens of a batch, one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the tokens of each row stand once the pads are left out.

    `begins` holds the first token of each row and the count of all, int32. `source` is the place of each token in the
    batch, row times columns plus column (None: there are no pads, so it is its own place). `longest` is on the host.
    """

    begins: Int[Tensor, " rows_and_one"]
    source: Int[Tensor, " tokens"] | None
    batch: int
    columns: int
    longest: int

    @property
    def tokens(self) -> int:
        """Real tokens of the whole batch."""
        return self.batch * self.columns if self.source is None else len(self.source)

    @staticmethod
    def whole(batch: int, columns: int, device: torch.device) -> Rows:
        """The rows of a batch without pads; nothing waits for the device."""
        begins = torch.arange(0, (batch + 1) * columns, max(columns, 1), dtype=torch.int32, device=device)
        return Rows(begins[: batch + 1], None, batch, columns, columns)

    @staticmethod
    def of(positions: Int[Tensor, "batch queries"]) -> Rows:
        """The rows of a batch whose pads have position -1."""
        real = positions >= 0
        lengths = real.sum(dim=1, dtype=torch.int32)
        begins = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        batch, columns = positions.shape
        if bool(real.all()):
            return Rows(begins, None, batch, columns, columns)
        return Rows(begins, real.flatten().nonzero().flatten(), batch, columns, int(lengths.max()))

    def pack(self, heads: Float[Tensor, "batch heads queries dims"]) -> Float[Tensor, "tokens heads dims"]:
        """[batch, heads, queries, dims] -> [tokens, heads, dims], contiguous."""
        flat = heads.transpose(1, 2).reshape(self.batch * self.columns, heads.shape[1], heads.shape[3])
        return flat.contiguous() if self.source is None else flat[self.source]

    def unpack(self, heads: Float[Tensor, "tokens heads dims"]) -> Float[Tensor, "batch heads queries dims"]:
        """The other way; a pad gives zeros."""
        if self.source is not None:
            whole = heads.new_zeros(self.batch * self.columns, *heads.shape[1:])
            heads = whole.index_copy(0, self.source, heads)
        return heads.view(self.batch, self.columns, *heads.shape[1:]).transpose(1, 2)

    def spread(self, figures: Float[Tensor, "heads tokens"]) -> Float[Tensor, "batch heads queries"]:
        """One figure a token and head, back in the batch; a pad gives 0."""
        return self.unpack(figures.t().unsqueeze(-1).contiguous()).squeeze(-1)
