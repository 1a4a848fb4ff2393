"""Truncated singular value decompositions, as fast as the rank allows, with canonical signs.

Two engines: the eigendecomposition of the smaller Gram matrix in float64 (exact; faster than `torch.linalg.svd`, above
all for matrices that are not square) and a range finder with power iterations (approximate, for small ranks).
"""

from __future__ import annotations

import torch
from torch import Tensor

# The Gram matrix squares the condition number: u = W v / σ is off by eps·(σ₁/σ)². Values below this share of σ₁ are
# found again without squaring: float32 keeps its 1e-8, float64 1e-13.
_FLOOR = {torch.float64: 0.03}
_FLOOR_NARROW = 1e-4


def svd_top(w: Tensor, r: int | None = None, *, energy: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of w (out × in): U (out × r), S (r,) descending, Vᵀ (r × in), in w's dtype.

    Without r, the fewest triplets that hold `energy` of Σσ². Exact to w's precision, orthonormal for any w (zero too).
    Signs are canonical: the largest-magnitude entry of each row of Vᵀ is positive.
    """
    out, in_ = w.shape
    if r is not None and not 1 <= r <= min(out, in_):
        raise ValueError(f"r={r} is not within 1..{min(out, in_)}, the ranks of a {out} × {in_} matrix")
    x = w.double() if out >= in_ else w.double().mT  # tall: m × k
    values, v = torch.linalg.eigh(x.mT @ x)  # ascending
    s, v = values.flip(0).clamp(min=0).sqrt(), v.flip(1)
    r = rank_for_energy(s, energy) if r is None else r
    head = int((s > _FLOOR.get(w.dtype, _FLOOR_NARROW) * s[0]).sum())
    if r <= head:
        s, v = s[:r], v[:, :r]
        u = (x @ v) / s
    else:
        u, s, v = (t[..., :r] for t in _without_squaring(x, s, v, head))
    u, vh = (u, v.mT) if out >= in_ else (v, u.mT)
    u, vh = canonical_signs(u.to(w.dtype), vh.to(w.dtype))
    return u.contiguous(), s.to(w.dtype), vh.contiguous()


def _without_squaring(x: Tensor, s: Tensor, v: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets of x (m × k, tall), those from `head` on by LAPACK in the space that the first ones leave free.

    What is neglected, the overlap of x·v_tail with the head's left vectors, is below eps·σ₁/floor.
    """
    u = (x @ v[:, :head]) / s[:head]
    q, t = torch.linalg.qr(torch.cat([u, x @ v[:, head:]], dim=1))  # Householder: orthonormal whatever the rank
    ut, st, vt = torch.linalg.svd(t[head:, head:])
    return (
        torch.cat([u, q[:, head:] @ ut], dim=1),
        torch.cat([s[:head], st]),
        torch.cat([v[:, :head], v[:, head:] @ vt.mT], dim=1),
    )


def svd_sketch(
    w: Tensor, r: int, *, oversample: int, power: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
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
    return (basis @ u).contiguous(), s, vh


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
