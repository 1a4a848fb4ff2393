"""Factored embedding: short vectors, and one map that makes long ones of them.

    z = D[id]·Uᵀ + μ        D: n × h, `table`;  U: d × h, `up`;  μ: d, `mean`, where there is one

n·h + d·h (+ d) numbers in place of n·d. The row of padding is a row as any other: it gives the vector that it stands
for, which is not zero where μ is not, and as in a stock nn.Embedding its own numbers are not trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.linear._structured import Structured, bare, bare_linear, check_rank


class FactoredEmbedding(Structured, nn.Embedding):
    """E = D·Uᵀ + 1·μᵀ (n × d)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        rank: int,
        mean: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype)
        self.rank = check_rank(rank, num_embeddings, embedding_dim, 1)
        self.table = bare(nn.Embedding, num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.up = nn.Parameter(torch.empty(embedding_dim, rank, device=device, dtype=dtype))
        self.mean = nn.Parameter(torch.empty(embedding_dim, device=device, dtype=dtype)) if mean else None
        self.embedding_dim = embedding_dim
        for name in _SHOWN:
            setattr(self, name, getattr(self.table, name))

    @classmethod
    def geometry(cls, stock: nn.Module) -> dict[str, Any]:
        if type(stock) is not nn.Embedding:  # what derives from it scales, or shifts positions
            raise UsageError(f"a {cls.kind} layer stands for an Embedding, but it is a {type(stock).__name__}")
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(stock, name):
                raise UsageError(f"an Embedding with {name}={getattr(stock, name)} has no {cls.kind} form")
        return {name: getattr(stock, name) for name in ("num_embeddings", "embedding_dim", "padding_idx")}

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        table: Tensor,
        up: Tensor,
        mean: Tensor | None = None,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> FactoredEmbedding:
        """E = table·upᵀ + mean (n × h, d × h, d), in `dtype` (that of the table if not given)."""
        (n, rank), d = table.shape, len(up)
        layer = cls(
            n, d, padding_idx, rank=rank, mean=mean is not None, device=table.device, dtype=dtype or table.dtype
        )
        layer.table.weight.copy_(table)
        layer.up.copy_(up)
        if mean is not None and layer.mean is not None:
            layer.mean.copy_(mean)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, weight: Tensor, *, rank: int, mean: bool = False, padding_idx: int | None = None
    ) -> FactoredEmbedding:
        """The nearest E of that rank in the Frobenius norm, U having orthonormal columns.

        With `mean`, μ is the mean of the rows, and the rest the nearest to what they differ from it.
        """
        rows = weight.to(torch.promote_types(weight.dtype, torch.float32))
        centre = rows.mean(0) if mean else None
        u, s, vh = svd_top(rows if centre is None else rows - centre, check_rank(rank, len(rows), rows.shape[1], 1))
        return cls.from_factors(u * s, vh.mT, centre, padding_idx=padding_idx, dtype=weight.dtype)

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "mean": self.mean is not None}

    def forward(self, input: Tensor) -> Tensor:
        return linear(self.table(input), self.up, self.mean)

    def stock_place(self) -> nn.Embedding:
        place = self.table
        return bare(nn.Embedding, place.num_embeddings, self.embedding_dim, place.padding_idx, device="meta")

    @torch.no_grad()
    def linears(self) -> tuple[nn.Module, ...]:
        up = bare_linear(self.rank, self.embedding_dim, self.mean is not None, self.up.device, self.up.dtype)
        up.weight.copy_(self.up)
        if self.mean is not None:
            up.bias.copy_(self.mean)
        return self.table, up

    def dense(self) -> Tensor:
        table, up = self.table.weight, self.up
        wide = torch.promote_types(table.dtype, torch.float32)
        return linear(table.to(wide), up.to(wide), None if self.mean is None else self.mean.to(wide)).to(table.dtype)


# what an embedding shows of itself, but for its width
_SHOWN = ("num_embeddings", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
