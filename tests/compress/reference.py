"""What the tests of single methods hold against: everything written out in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rows_of(layer: nn.Linear, count: int = 400) -> Tensor:
    """Inputs with a mean and with directions that matter more than others."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(layer.in_features, layer.in_features, generator=generator, dtype=torch.float64)
    scale = torch.linspace(2, 0.05, layer.in_features, dtype=torch.float64)
    x = torch.randn(count, layer.in_features, generator=generator, dtype=torch.float64) * scale
    return x @ mixing + 0.7


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, in_: int, out: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layer = nn.Linear(in_, out, bias=bias, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def rank_one_sums(w: Tensor, r: int) -> Tensor:
    """The nearest matrix of rank r, from LAPACK."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]
