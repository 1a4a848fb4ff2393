"""Truncated singular value decompositions, as fast as the rank allows, with canonical signs.

Three engines: the eigendecomposition of the smaller Gram matrix in float64 (all ranks; several times faster than
`torch.linalg.svd`), a range finder with power iterations (small ranks) and LAPACK's SVD (when the Gram matrix has lost
the small singular values that were asked for).
"""

from __future__ import annotations

import torch
from torch import Tensor

# The Gram matrix squares the condition number: a left vector u = W v / σ carries an error of eps·(σ₁/σ)², so in float64
# ratios below 1e-6 would cost float32's precision.
GRAM_FLOOR = 1e-6


def svd_top(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of w (out × in): U (out × r), S (r,) descending, Vᵀ (r × in), in w's dtype.

    Exact to the working precision. Signs are canonical: the largest-magnitude entry of each row of Vᵀ is positive.
    """
    out, in_ = w.shape
    if not 1 <= r <= min(out, in_):
        raise ValueError(f"r={r} is not within 1..{min(out, in_)}, the ranks of a {out} × {in_} matrix")
    x = w.double()
    tall = out >= in_
    gram = x.mT @ x if tall else x @ x.mT
    values, vectors = torch.linalg.eigh(gram)  # ascending
    s = values[-r:].flip(0).clamp(min=0).sqrt()
    if s[-1] <= GRAM_FLOOR * s[0]:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    elif tall:
        v = vectors[:, -r:].flip(1)
        u, vh = (x @ v) / s, v.mT
    else:
        u = vectors[:, -r:].flip(1)
        vh = (u.mT @ x) / s[:, None]
    u, vh = canonical_signs(u, vh)
    return u.to(w.dtype).contiguous(), s.to(w.dtype), vh.to(w.dtype).contiguous()


def svd_sketch(w: Tensor, r: int, *, oversample: int, power: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As `svd_top`, from a randomised range finder: about 4·(power + 1)·out·in·(r + oversample) operations.

    The generator lives on the CPU, so that the sketch is the same on every device.
    """
    out, in_ = w.shape
    q = min(r + oversample, out, in_)
    y = w @ torch.randn(in_, q, generator=generator, dtype=torch.float32).to(w)
    for _ in range(power):
        y = w @ torch.linalg.qr(w.mT @ torch.linalg.qr(y).Q).Q
    basis = torch.linalg.qr(y).Q  # out × q
    u, s, vh = svd_top(basis.mT @ w, min(r, q))
    u, vh = canonical_signs(basis @ u, vh)
    return u.contiguous(), s, vh.contiguous()


def canonical_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs (u_i, v_i) so that the largest-magnitude entry of every v_i is positive."""
    pivot = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)  # (r,)
    sign = torch.where(pivot < 0, -1.0, 1.0).to(vh)
    return u * sign, vh * sign[:, None]


def rank_for_energy(s: Tensor, energy: float) -> int:
    """The smallest r whose Σ_{i≤r} s_i² reaches `energy` of the whole; s descending.

    >>> rank_for_energy(torch.tensor([10.0, 1.0, 1.0, 1.0]), 0.99)
    3
    """
    share = s.double().square().cumsum(0) / s.double().square().sum()
    return int((share < energy).sum().item()) + 1 if energy < 1 else len(s)
