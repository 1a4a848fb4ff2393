"""Low rank: a matrix as the product of two thin ones.

    y = (x·Aᵀ)·Bᵀ + b          A: r × in, `down`;  B: out × r, `up`;  b: out, in `up`

r·(in + out) numbers in place of in·out. With r = 0 nothing is stored, and y = b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.algebra.svd import svd_top
from weft.linear._structured import Factor, StructuredLinear, bare, check_rank


class LowRank(StructuredLinear):
    """W = B·A."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.rank = check_rank(rank, out_features, in_features)
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = bare(Factor, rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls, up: Tensor, down: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> LowRank:
        """W = up·down (out × r, r × in), in `dtype` (that of `up` if not given)."""
        (out, rank), in_ = up.shape, down.shape[1]
        layer = cls(in_, out, rank=rank, bias=bias is not None, device=up.device, dtype=dtype or up.dtype)
        layer.up.weight.copy_(up)
        layer.down.weight.copy_(down)
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int) -> LowRank:
        """The nearest W of that rank in the Frobenius norm, each singular value shared evenly between its factors."""
        if rank == 0:
            return cls.from_factors(weight[:, :0], weight[:0], bias)
        u, s, vh = svd_top(weight.to(torch.promote_types(weight.dtype, torch.float32)), rank)
        root = s.sqrt()
        return cls.from_factors(u * root, root[:, None] * vh, bias, weight.dtype)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def linears(self) -> tuple[nn.Module, ...]:
        return self.down, self.up

    def dense(self) -> Tensor:
        up, down = self.up.weight, self.down.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        return (up.to(wide) @ down.to(wide)).to(up.dtype)
