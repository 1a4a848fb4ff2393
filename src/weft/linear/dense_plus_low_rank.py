"""Dense plus low rank: a matrix that rests, and a product of two thin ones that is trained in its stead.

    y = x·Wᵀ + c·(x·Aᵀ)·Bᵀ + b      W: out × in, `base`;  A: r × in, `down`;  B: out × r, `up`;  b: out, in `up`

Made for training: it stores r·(in + out) numbers more than the dense layer, and has gradients of those alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.algebra.matmul import times
from weft.algebra.svd import svd_top
from weft.linear._structured import Factor, StructuredLinear, bare, check_rank


class DensePlusLowRank(StructuredLinear):
    """W + c·B·A; c is `scale`."""

    base: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.rank, self.scale = check_rank(rank, out_features, in_features), scale
        self.register_buffer("base", torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = bare(Factor, rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int) -> DensePlusLowRank:
        """B·A the nearest of that rank to a weight, and W what is left of it; c = 1."""
        out, in_ = weight.shape
        layer = cls(in_, out, rank=rank, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, vh = svd_top(wide, rank)
        root = s.sqrt()
        layer.up.weight.copy_(u * root)
        layer.down.weight.copy_(root[:, None] * vh)
        layer.base.copy_(wide - layer.up.weight.to(wide) @ layer.down.weight.to(wide))
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def absorb(self) -> None:
        """W ← W + c·B·A, rounded once, and B ← 0: the same map."""
        self.base.copy_(self.dense())
        self.up.weight.zero_()

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale}

    def forward(self, x: Tensor) -> Tensor:
        return times(x, self.base) + self.up(self.scale * self.down(x))

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.base.dtype, torch.float32)
        up, down = self.up.weight.to(wide), self.down.weight.to(wide)
        return torch.addmm(self.base.to(wide), up, down, alpha=self.scale).to(self.base.dtype)
