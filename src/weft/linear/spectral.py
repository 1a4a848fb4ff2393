"""Spectral: a matrix by its singular vectors, and its singular values apart.

    y = ((x·V) ∘ s)·Uᵀ + b      V: in × r, `down` (as r × in);  s: r, `values`;  U: out × r, `up`;  b: out, in `up`

W = U·diag(s)·Vᵀ. r·(in + out + 1) numbers in place of in·out. For methods that train or prune singular values.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from weft.algebra.svd import svd_top
from weft.linear._structured import Factor, StructuredLinear, bare, check_rank


class Spectral(StructuredLinear):
    """W = U·diag(s)·Vᵀ."""

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
        self.rank = check_rank(rank, out_features, in_features, 1)
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.values = nn.Parameter(torch.empty(rank, device=device, dtype=dtype))
        self.up = bare(Factor, rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls, u: Tensor, s: Tensor, vh: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Spectral:
        """W = u·diag(s)·vh (out × r, r, r × in), in `dtype` (that of `u` if not given)."""
        (out, rank), in_ = u.shape, vh.shape[1]
        layer = cls(in_, out, rank=rank, bias=bias is not None, device=u.device, dtype=dtype or u.dtype)
        layer.up.weight.copy_(u)
        layer.values.copy_(s)
        layer.down.weight.copy_(vh)
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int) -> Spectral:
        """The nearest W of that rank in the Frobenius norm, s descending."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, vh = svd_top(wide, check_rank(rank, len(wide), wide.shape[1], 1))
        return cls.from_factors(u, s, vh, bias, weight.dtype)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        return self.up(z * self.values.to(z.dtype))

    @torch.no_grad()
    def linears(self) -> tuple[nn.Module, ...]:
        up = copy.deepcopy(self.up)
        up.weight.mul_(self.values)
        return self.down, up

    def dense(self) -> Tensor:
        u, s, vh = self.up.weight, self.values, self.down.weight
        wide = torch.promote_types(u.dtype, torch.float32)
        return ((u.to(wide) * s.to(wide)) @ vh.to(wide)).to(u.dtype)
