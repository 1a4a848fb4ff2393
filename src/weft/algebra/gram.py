"""Gram matrices xᵀ·x, formed with half of the products, and roots of any, dead and rank-deficient ones included."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512  # columns: wide enough for the matrix product to run at full speed, narrow enough to skip a triangle

_RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀ·x for rows x (n × d), in the blocks of `total` (d × d) that touch the lower triangle.

    The product is taken in x's dtype, the sum in total's.
    """
    for start in range(0, x.shape[1], BLOCK):
        total[start:, start : start + BLOCK] += x[:, start:].mT @ x[:, start : start + BLOCK]


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle; what is above the diagonal is not read."""
    return lower.tril() + lower.tril(-1).mT


def gram(x: Tensor) -> Tensor:
    """xᵀ·x (d × d) of x (n × d), exactly symmetric, in x's dtype."""
    total = x.new_zeros(x.shape[1], x.shape[1])
    add_gram(total, x)
    return mirrored(total)


def root(g: Tensor) -> Tensor:
    """C with C·Cᵀ = g + ridge·(diag g + mean(diag g)·I), float64. A vector g (d) is a diagonal, and so is its C.

    The ridge is the smallest of 0, 1e-10, 1e-8, 1e-6 and 1e-4 for which no pivot vanishes, so C is always invertible;
    an input that was never seen counts 1e-10 of an average one. It is relative to every diagonal entry because rounding
    is: one huge channel does not drown the others. All zeros count as equal weights.
    """
    g = g.double()
    if not bool(torch.isfinite(g).all()):
        raise ValueError(f"a weight of {tuple(g.shape)} has entries that are not finite")
    diagonal = g if g.dim() == 1 else g.diagonal()
    scale = diagonal.mean() if bool(diagonal.any()) else diagonal.new_ones(())
    for ridge in _RIDGES:
        lift = ridge * (diagonal + scale)
        if g.dim() == 1:
            pivots = g + lift
            c = pivots.clamp(min=0).sqrt()
        else:
            lifted = g.clone()
            lifted.diagonal().add_(lift)
            c, info = torch.linalg.cholesky_ex(lifted)
            pivots = c.diagonal().square() if info == 0 else c.new_zeros(1)
        if bool((pivots > 0.5 * _RIDGES[1] * scale).all()):
            return c
    shape = tuple(g.shape)
    raise ValueError(f"a weight of {shape} is not positive semi-definite, by more than {_RIDGES[-1]} of its diagonal")


def times_root(x: Tensor, c: Tensor | None) -> Tensor:
    """Cᵀ·x in x's dtype, for C as `root` returns it; None is I."""
    if c is None:
        return x
    c = c.to(x)
    if c.dim() == 1:
        return c[:, None] * x
    starts = range(0, len(x), BLOCK)  # half of the products, as C is lower triangular
    return torch.cat([c[start:, start : start + BLOCK].mT @ x[start:] for start in starts])


def over_root(x: Tensor, c: Tensor | None) -> Tensor:
    """C⁻ᵀ·x, for C as `root` returns it, x in float64 as well; None is I."""
    if c is None:
        return x
    return x / c[:, None] if c.dim() == 1 else torch.linalg.solve_triangular(c.mT, x, upper=True)
