"""Truncated singular value decompositions, weighted or not, as fast as the rank allows, with canonical signs.

Two engines: the eigendecomposition of the smaller Gram matrix in float64 (exact; faster than `torch.linalg.svd`, above
all for matrices that are not square) and a range finder with power iterations (approximate, for small ranks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weft.algebra.gram import gram, over_root, root, times_root
from weft.algebra.random import generator as generator_for

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


def svd_stack(w: Tensor, r: int | None = None, *, energy: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """As `svd_top`, of every matrix of a stack w (n × out × in): U (n × out × r), S (n × r), Vᵀ (n × r × in).

    Without r, as many triplets of each as the one that needs the most for `energy` of its own Σσ². Where there are
    several they go through LAPACK in w's dtype: of small ones the Gram matrices would save a third of the time.
    """
    if len(w) == 1:
        u, s, vh = svd_top(w[0], r, energy=energy)
        return u[None], s[None], vh[None]
    out, in_ = w.shape[1:]
    if r is not None and not 1 <= r <= min(out, in_):
        raise ValueError(f"r={r} is not within 1..{min(out, in_)}, the ranks of {out} × {in_} matrices")
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    r = max(rank_for_energy(each, energy) for each in s) if r is None else r
    u, vh = canonical_signs(u[..., :r], vh[:, :r])
    return u.contiguous(), s[:, :r].contiguous(), vh.contiguous()


def singular_values(w: Tensor) -> Tensor:
    """All singular values of w (… × out × in), descending, float64: to 2e-8 of the largest, as squares have them."""
    x = w.double() if w.shape[-2] >= w.shape[-1] else w.double().mT
    return torch.linalg.eigvalsh(x.mT @ x).flip(-1).clamp(min=0).sqrt()


def svd_sketch(
    w: Tensor, r: int, *, oversample: int, power: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """As `svd_top`, from a randomised range finder: about 4·(power + 1)·out·in·(r + oversample) operations.

    The generator lives on the CPU, so that the sketch is the same on every device.
    """
    q = min(r + oversample, *w.shape)
    basis = _range(w, q, power, generator)
    u, s, vh = svd_top(basis.mT @ w, min(r, q))
    return (basis @ u).contiguous(), s, vh


def leading_vectors(w: Tensor, r: int, *, start: Tensor | None = None, generator: torch.Generator) -> Tensor:
    """About the r leading right singular vectors of w (out × in), in descending order: orthonormal columns (in × r).

    Block power iteration on q = r + max(r/8, 16) columns, with Rayleigh-Ritz in every step, until the best r of them
    hold little more after one: a fifth from `start` (in × r), say the vectors of an earlier w, with random columns
    beside it, or a hundredth from random columns alone. Products are with w and its transpose or, where that is less
    work, with their Gram matrix: the lesser of 4·out·in·q and 1.25·out·in² + 2·in²·q operations a step. Signs are
    canonical: the largest-magnitude entry of each column is positive. Where w has fewer directions, any orthonormal
    ones complete the basis.
    """
    out, in_ = w.shape
    q = min(r + max(r // 8, 16), in_)
    w = _squarable(w.to(torch.promote_types(w.dtype, torch.float32)))
    c = gram(w) if 1.25 * out * in_ + 2 * in_ * q < 4 * out * q else None
    start, enough = (w.new_empty(in_, 0), 1.01) if start is None else (start.to(w), 1.2)
    beside = torch.randn(in_, q - start.shape[1], generator=generator, dtype=w.dtype).to(w)
    x = torch.cat([start, torch.linalg.qr(beside - start @ (start.mT @ beside)).Q], dim=1)
    while True:
        product = w.mT @ (w @ x) if c is None else c @ x
        energy, turn = torch.linalg.eigh(x.mT @ product)
        energy, stepped = energy.flip(0)[:r], product @ turn.flip(1)[:, :r]
        rounding = (torch.finfo(w.dtype).eps * energy[0]).clamp(min=torch.finfo(w.dtype).tiny)
        held = (stepped.square().sum(0) / energy.clamp(min=rounding)).sum()
        if not float(held) > enough * float(energy.sum()):
            x = _nearly_orthonormal(stepped)
            return (x * _row_signs(x.mT)).contiguous()
        x = torch.linalg.qr(product).Q


def _nearly_orthonormal(x: Tensor) -> Tensor:
    """Q of x = Q·R (n × k) whose columns are almost at right angles: orthonormal, each stays about where it is.

    By the Cholesky factor of the Gram matrix, in half of Householder's time, if that says that they are; else by his.
    """
    unit = torch.nn.functional.normalize(x, dim=0)
    lower, info = torch.linalg.cholesky_ex(unit.mT @ unit)
    if info or float(lower.diagonal().min()) < 0.3:  # rounding grows by the square of the condition
        return torch.linalg.qr(x).Q
    return torch.linalg.solve_triangular(lower.mT, unit, upper=True, left=False)


def _squarable(w: Tensor) -> Tensor:
    """w, or a multiple of it where squares of its entries would overflow or vanish."""
    largest = max(abs(float(end)) for end in w.aminmax())
    return w / largest if largest and not 1e-12 < largest < 1e12 else w


def _range(w: Tensor, q: int, power: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns (out × q) that hold most of w's q leading left singular vectors."""
    y = w @ torch.randn(w.shape[1], q, generator=generator, dtype=torch.float32).to(w)
    for _ in range(power):
        y = w @ torch.linalg.qr(w.mT @ torch.linalg.qr(y).Q).Q
    return torch.linalg.qr(y).Q


Split = Literal["left", "right", "even"]
_SHARE_OF_B = {"left": 1.0, "right": 0.0, "even": 0.5}


@dataclass(frozen=True)
class WeightedSvd:
    """W (out × in) decomposed once, for `factors` of any rank that minimise ‖L·(W − B·A)·R‖_F.

    Attributes:
        spectrum: singular values of L·W·R, descending, float64: all of them, or those that a sketch found.
        rest: the sum of squares of the others.
    """

    spectrum: Tensor
    rest: float
    # The problem, transposed where W is tall: with U the left singular vectors, U·Uᵀ·(L·W) is the nearest to L·W
    # whatever R is, and no weight has to be inverted but the short side's.
    _vectors: Tensor  # U: short × k
    _weighted: Tensor  # L·W: short × long
    _root: Tensor | None  # Lᵀ, as `gram.root` returns it
    _transposed: bool
    _dtype: torch.dtype

    def error(self, r: int) -> float:
        """‖L·(W − B·A)·R‖_F of the factors of rank r; r = 0 is the norm of L·W·R."""
        self._check(r, len(self.spectrum))
        return math.sqrt(self.rest + float(self.spectrum[r:].square().sum()))

    def factors(self, r: int, *, split: Split = "even") -> tuple[Tensor, Tensor]:
        """B (out × r) and A (r × in), in W's dtype, for any r from 0 to the rank that was asked for.

        split: where the singular values are: in B ("left": the rows of A·R are orthonormal, where σ exceeds rounding),
        in A ("right": the columns of L·B are), or their roots in both ("even"). The product is the same.
        """
        self._check(r, self._vectors.shape[1])
        if split not in _SHARE_OF_B:
            raise ValueError(f"split={split!r} is not one of {', '.join(_SHARE_OF_B)}")
        share = 1 - _SHARE_OF_B[split] if self._transposed else _SHARE_OF_B[split]
        u = self._vectors[:, :r]
        # nothing is divided by what is only rounding; the product is the same, as one factor undoes the other's
        least = torch.finfo(u.dtype).eps * self.spectrum[:1].clamp(min=torch.finfo(u.dtype).tiny)
        size = torch.maximum(self.spectrum[:r], least) ** share
        b = over_root(u.double(), self._root) * size
        a = (u.mT @ self._weighted) / size[:, None]
        if self._transposed:
            a, b = b.mT, a.mT
        return b.to(self._dtype).contiguous(), a.to(self._dtype).contiguous()

    def _check(self, r: int, most: int) -> None:
        if not 0 <= r <= most:
            raise ValueError(f"r={r} is not within 0..{most}, the ranks that were computed")


def weighted_svd(
    w: Tensor, *, left: Tensor | None = None, right: Tensor | None = None, rank: int | None = None
) -> WeightedSvd:
    """Decompose w (out × in) for factors that minimise tr((W − BA)ᵀ·left·(W − BA)·right).

    Args:
        left, right: None (the identity), a vector of weights of rows or columns, or a symmetric positive semi-definite
            matrix, say a Gram matrix: left = LᵀL is out × out, right = RRᵀ in × in; a vector stands for diag(vector).
            `gram.root` says what a dead or rank-deficient one counts as.
        rank: the largest rank that will be asked for; None is all.

    The engine is chosen by the rank; d is the shorter side of w, D the longer, q = 1.5·rank + 16:

        4·q > d   eigenvectors of the d × d Gram matrix, d²·D + 9·d³ operations. In float32 as long as the singular
                  values beyond `rank` stand clear of its rounding, which the first ones set; else, and at once where a
                  weight is a matrix, in float64, in twice the time. The error is within 0.1 % of the best.
        4·q ≤ d   a range finder with two power iterations, about 12·d·D·q operations; within 2 % of the best. Its
                  randomness is a function of the shape.

    A float64 w goes through `svd_top`, which does not square what is small. Weights that are matrices take d³/3 and
    D³/3 in float64 for their roots, and d²·D and d·D² to be multiplied by w.
    """
    short = min(w.shape)
    if rank is not None and not 1 <= rank <= short:
        raise ValueError(f"rank={rank} is not within 1..{short}, the ranks of a {w.shape[0]} × {w.shape[1]} matrix")
    for side, weight, size in (("left", left, w.shape[0]), ("right", right, w.shape[1])):
        if weight is not None and tuple(weight.shape) not in {(size,), (size, size)}:
            raise ValueError(f"{side} of {tuple(weight.shape)} is neither of ({size},) nor of ({size}, {size})")
    transposed = w.shape[0] > w.shape[1]
    if transposed:
        w, left, right = w.mT, right, left
    if not bool(torch.isfinite(w).all()):
        raise ValueError(f"a matrix of {w.shape[0]} × {w.shape[1]} has entries that are not finite")
    x = w.detach().to(torch.promote_types(w.dtype, torch.float32))
    near, far = (None if weight is None else root(weight.to(x.device)) for weight in (left, right))
    weighted = times_root(x, near)
    m = times_root(weighted.mT, far).mT
    # inputs share directions: their Gram matrices rarely leave a spectrum that float32 could square
    squares = x.dtype if all(c is None or c.dim() == 1 for c in (near, far)) else torch.float64
    norm = torch.linalg.vector_norm(m, dtype=torch.float64)
    unit = m / norm.clamp(min=torch.finfo(m.dtype).tiny).to(m)
    u, s = _left_vectors(unit, short if rank is None else rank, squares)
    rest = max(float(norm**2 * (1 - s.square().sum())), 0.0) if len(s) < short else 0.0
    return WeightedSvd(norm * s, rest, u, weighted, near, transposed, w.dtype)


def svd_operations(out: int, in_: int, rank: int) -> tuple[float, float]:
    """What `weighted_svd` of an unweighted matrix takes: operations in matrix products, and in eigenvectors."""
    short, long = sorted((out, in_))
    q = 1.5 * rank + 16
    return (12.0 * short * long * q, 9 * q**3) if 4 * q <= short else (1.0 * short**2 * long, 9.0 * short**3)


def _left_vectors(m: Tensor, k: int, squares: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k leading left singular vectors (short × k, m's dtype) of a wide m of norm 1.

    And its singular values (float64): all of them, or k where k is so small that m is sketched.
    """
    q = k + k // 2 + 16
    if 4 * q > len(m):
        u, s = _all_left_vectors(m, k, squares)
        u = u[:, :k]
    else:
        basis = _range(m, q, 2, generator_for("weighted_svd", *m.shape))
        u, s = _all_left_vectors(basis.mT @ m, k, torch.float64)
        u, s = basis @ u[:, :k], s[:k]
    return canonical_signs(u, u.mT)[0], s


def _all_left_vectors(m: Tensor, k: int, squares: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `_left_vectors`, all of them, of which the first k and the error without the others are to be right."""
    if m.dtype == torch.float64:
        u, s, _ = svd_top(m)
        return u, s
    values, u = torch.linalg.eigh(gram(m.mT.to(squares)))
    # the first k vectors give away eps·σ₁² at most for each that is left out: measured on spectra of many forms
    left_out = values[: max(len(m) - k, 1)].clamp(min=0).mean()
    if squares != torch.float64 and torch.finfo(squares).eps * values[-1] > 1e-3 * left_out:
        return _all_left_vectors(m, k, torch.float64)
    return u.flip(1).to(m.dtype), values.flip(0).clamp(min=0).double().sqrt()


def canonical_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs (u_i, v_i) so that the largest-magnitude entry of every v_i is positive."""
    sign = _row_signs(vh)
    return u * sign[..., None, :], vh * sign[..., None]


def _row_signs(vh: Tensor) -> Tensor:
    """The sign of each row's largest-magnitude entry, 1 for a zero row."""
    pivot = vh.gather(-1, vh.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    return torch.where(pivot < 0, -1.0, 1.0).to(vh)


def rank_for_energy(s: Tensor, energy: float) -> int:
    """The smallest r whose Σ_{i≤r} s_i² reaches `energy` of the whole; s descending.

    >>> rank_for_energy(torch.tensor([10.0, 1.0, 1.0, 1.0]), 0.99)
    3
    """
    share = s.double().square().cumsum(0) / s.double().square().sum()
    return int((share < energy).sum().item()) + 1 if energy < 1 else len(s)
