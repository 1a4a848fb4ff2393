"""Two factors of a matrix of which one or both have no negative entry.

    W ≈ U·V        W: out × in,  U: out × r,  V: r × in

`semi_nmf`: U ≥ 0, V of any sign, for any W (Ding, Li, Jordan, "Convex and semi-nonnegative matrix factorizations",
2010). `nmf`: U ≥ 0 and V ≥ 0, for W ≥ 0 (Lee, Seung, "Algorithms for non-negative matrix factorization", 2001). Both
multiply U's entries by what is positive, so that none becomes negative and ‖W − U·V‖_F never rises.

Where they begin decides what a few updates reach. A sum A·B of r − 1 terms is also (A + t·1ᵀ)·B − t·(1ᵀ·B), of r terms
whose left sides are not negative once t is large enough in every row: so semi-NMF begins no farther from W than the
nearest matrix of rank r − 1, and ends no nearer than that of rank r. NMF begins at what of each singular pair is of one
sign (Boutsidis, Gallopoulos, "SVD based initialization", 2008).
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.algebra.svd import svd_top

REPEATS = 3  # updates for each product with W, which is most of the work
LEAST = 0.3  # of the size that all entries would have if they were equal: where NMF's entries begin at least


def semi_nmf(w: Tensor, r: int, *, iterations: int) -> tuple[Tensor, Tensor]:
    """U ≥ 0 (out × r) and V (r × in) with a small ‖w − U·V‖_F; V is the best there is for U. In w's dtype.

    An iteration takes about 4·out·in·r operations.
    """
    u = _shifted(w, r)
    for _ in range(iterations):
        v = _fitted(w, u)
        products, gram = w @ v.mT, v @ v.mT
        more = products.clamp(min=0) + u @ (-gram).clamp(min=0)
        less = (-products).clamp(min=0) + u @ gram.clamp(min=0)
        u = u * (more / less.clamp(min=torch.finfo(w.dtype).tiny)).sqrt()
    return u, _fitted(w, u)


def nmf(w: Tensor, r: int, *, iterations: int) -> tuple[Tensor, Tensor]:
    """U ≥ 0 (out × r) and V ≥ 0 (r × in) with a small ‖w − U·V‖_F, in w's dtype.

    An iteration takes about 4·out·in·r operations. Raises ValueError where w has a negative entry.
    """
    if bool((w < 0).any()):
        raise ValueError("a matrix with negative entries is no product of matrices without")
    u, v = _of_one_sign(w, r)
    for _ in range(iterations):
        v = _multiplied(v.mT, u.mT @ w, u.mT @ u).mT
        u = _multiplied(u, (w @ v.mT).mT, v @ v.mT)
    return u, v


def _multiplied(x: Tensor, products: Tensor, gram: Tensor) -> Tensor:
    """x (n × r) after some updates towards the least ‖Y − x·F‖_F, for F·Yᵀ (r × n) and F·Fᵀ (r × r)."""
    for _ in range(REPEATS):
        x = x * (products.mT / (x @ gram).clamp(min=torch.finfo(x.dtype).tiny))
    return x


def _fitted(w: Tensor, u: Tensor) -> Tensor:
    """The V of least ‖w − u·V‖_F; the normal equations are solved in float64."""
    wide = u.double()
    gram = wide.mT @ wide
    gram.diagonal().add_(gram.diagonal().max().clamp(min=torch.finfo(gram.dtype).tiny) * 1e-14)
    return torch.cholesky_solve((u.mT @ w).double(), torch.linalg.cholesky(gram)).to(w.dtype)


def _shifted(w: Tensor, r: int) -> Tensor:
    """A start for semi-NMF: r − 1 left singular vectors, made non-negative by one that is added to all."""
    u, s, _ = svd_top(w, r)
    sized = u * s.sqrt()
    first, last = sized[:, :-1], sized[:, -1:]
    shift = torch.cat([-first, last.abs()], dim=1).amax(1, keepdim=True)
    return torch.cat([first + shift, shift], dim=1)


def _of_one_sign(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A start for NMF: of each singular pair the positive or the negative entries, whichever are larger."""
    u, s, vh = svd_top(w, r)
    positive, negative = ((x * u).clamp(min=0).norm(dim=0) * (x * vh).clamp(min=0).norm(dim=1) for x in (1, -1))
    sized = torch.where(positive >= negative, 1, -1) * s.sqrt()
    least = LEAST * (w.mean() / r).sqrt()
    return (u * sized).clamp(min=least), (sized[:, None] * vh).clamp(min=least)
