"""Sparse coding: every row of a matrix as a combination of a few atoms of its own, and a dictionary learned for it.

    Y ≈ S·A        Y: n × d, a signal a row;  A: k × d, the atoms, rows of length one;  S: n × k, s of a row not zero

The codes S are kept as `index` and `values` (n × s): which atoms a signal takes, all different, and how much of each.

Orthogonal matching pursuit finds S for a given A (Pati, Rezaiifar, Krishnaprasad, 1993), here for all signals at once
and among inner products only, as Rubinstein, Zibulevsky and Elad do (2008). K-SVD improves A for given places in S, an
atom at a time (Aharon, Elad, Bruckstein, 2006). The method of optimal directions improves all of A at once, for given S
(Engan, Aase, Husøy, 1999): less a round, and many small dictionaries take no longer than one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weft.algebra.svd import svd_top

Start = Literal["svd", "data", "random"]
Improve = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of Y, A, places and values: A and values

BLOCK = 2**22  # numbers that a block of signals keeps at work: near the processor, and still wide enough for it


@dataclass(frozen=True)
class SparseCode:
    """Y ≈ S·A; several of one shape where there are leading dimensions.

    Attributes:
        atoms: A (k × d).
        index: places of a row's values in S (n × s), ascending.
        values: the values there (n × s).
        errors: ‖Y − S·A‖² of the first codes and after each round; never rising.
    """

    atoms: Tensor
    index: Tensor
    values: Tensor
    errors: list[float]

    def product(self) -> Tensor:
        """S·A (n × d)."""
        return spread(self.index, self.values, self.atoms.shape[-2]) @ self.atoms


def spread(index: Tensor, values: Tensor, k: int) -> Tensor:
    """S (… n × k) with these values at these places (… n × s), zero elsewhere."""
    return values.new_zeros(*values.shape[:-1], k).scatter_(-1, index, values)


def omp(gram: Tensor, products: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Codes of n signals by orthogonal matching pursuit: `index` in the order of choice, and `values`, both n × s.

    s times, each signal takes the unused atom that fits what is left of it best, and all its coefficients are fitted
    again by least squares. A signal of which nothing is left, and an atom that lies in the span of those taken, get
    the value zero.

    Args:
        gram: A·Aᵀ (… k × k) of atoms of length one; with leading dimensions, of as many dictionaries.
        products: Y·Aᵀ (… n × k).
        nonzeros: s, 1 to k.
    """
    k = gram.shape[-1]
    if not 1 <= nonzeros <= k:
        raise ValueError(f"nonzeros={nonzeros}: {k} atoms allow 1 to {k}")
    rows = max(BLOCK // (k * nonzeros), 16)
    pieces = zip(products.reshape(-1, k).split(rows), beginnings(products).split(rows))
    blocks = [_omp(gram.reshape(-1, k), each, first, nonzeros) for each, first in pieces]
    index, values = (torch.cat(each).view(*products.shape[:-1], nonzeros) for each in zip(*blocks))
    return index, values


def beginnings(products: Tensor) -> Tensor:
    """Where each signal's dictionary begins among all, one below the other; of Y·Aᵀ (… n × k)."""
    *many, n, k = products.shape
    return torch.arange(0, math.prod(many) * k, k, device=products.device).repeat_interleave(n)


def _omp(gram: Tensor, products: Tensor, first: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """`omp` of one block, of signals whose dictionaries begin at `first` among the rows of `gram`.

    Atoms are made orthonormal as they are taken, q_t = (a_{i_t} − Σ_j l_tj·q_j) / l_tt: L·Lᵀ is the Gram matrix of
    those taken, found a row at a time. Of q_t only p_t = A·q_t is kept, and c_t, its product with the signal.
    """
    n, k = products.shape
    eps = torch.finfo(products.dtype).eps
    nothing = 10 * eps * products.abs().amax(1)
    at = torch.arange(n, device=products.device)
    left = products.clone()  # products of the atoms with what is left of each signal
    free = torch.ones_like(products, dtype=torch.bool)
    p = products.new_empty(n, nonzeros, k)
    lower = products.new_zeros(n, nonzeros, nonzeros)
    c = products.new_zeros(n, nonzeros)
    index = torch.empty(n, nonzeros, dtype=torch.long, device=products.device)
    for t in range(nonzeros):
        i = left.abs().masked_fill_(~free, -1).argmax(1)
        free[at, i] = False
        index[:, t] = i
        new = gram[first + i]
        if t:
            lower[:, t, :t] = l = p[at, :t, i]
            new = torch.baddbmm(new[:, None], l[:, None], p[:, :t], alpha=-1)[:, 0]
        pivot, amount = new[at, i], left[at, i]
        counts = (pivot > 100 * eps) & (amount.abs() > nothing)
        scale = torch.where(counts, pivot.clamp(min=eps).rsqrt(), 0)
        lower[:, t, t] = torch.where(counts, 1 / scale, 1)
        c[:, t] = scale * amount
        p[:, t] = new.mul_(scale[:, None])
        left.addcmul_(c[:, t, None], new, value=-1)
    values = torch.linalg.solve_triangular(lower.mT, c[..., None], upper=True)[..., 0]
    return index, values


def fitted(gram: Tensor, products: Tensor, index: Tensor) -> Tensor:
    """Values (… n × s) at given places that fit the signals best; `gram` and `products` are those of `omp`.

    Atoms that depend on one another share what they have in common.
    """
    k, s = gram.shape[-1], index.shape[-1]
    flat = index.reshape(-1, s)
    rows = (beginnings(products)[:, None] + flat)[:, :, None]
    own = gram.reshape(-1, k)[rows, flat[:, None]]  # n × s × s
    own.diagonal(dim1=-2, dim2=-1).add_(100 * torch.finfo(gram.dtype).eps)
    wanted = products.reshape(-1, k).gather(1, flat)[..., None]
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(own)).view(index.shape)


def sweep(y: Tensor, atoms: Tensor, index: Tensor, values: Tensor, *, power: int = 2) -> tuple[Tensor, Tensor]:
    """New atoms and values for the same places: one pass of K-SVD over the atoms. ‖Y − S·A‖ never rises.

    What an atom's signals lack without it is E; the atom and its values become E's first singular pair, by `power`
    power iterations from where they are. The next atom sees the change. An atom without signals becomes the signal
    that is represented worst.
    """
    k = len(atoms)
    atoms = atoms.clone()
    codes = spread(index, values, k).mT.contiguous()
    used = spread(index, torch.ones_like(values), k).mT.contiguous()
    rest = y - codes.mT @ atoms
    idle = used.sum(1) == 0
    for j, skip in enumerate(idle.tolist()):
        if skip:
            continue
        a, g = atoms[j].clone(), codes[j].clone()
        b, u = a, torch.addmv(g, rest, a).mul_(used[j])  # E = used·(rest + g·aᵀ), never formed
        for _ in range(power):
            b = torch.addmv(a * (g @ u), rest.mT, u)
            length = b.norm()
            b = torch.where(length > 0, b / length, a)
            u = torch.addmv(g * (a @ b), rest, b).mul_(used[j])
        atoms[j], codes[j] = b, u
        rest.addmm_(torch.stack([g, -u], 1), torch.stack([a, b]))
    places = idle.nonzero()[:, 0]
    worst = rest.square().sum(1).topk(min(len(places), len(y))).indices
    worst = worst[y[worst].norm(dim=1) > 0]
    atoms[places[: len(worst)]] = _unit(y[worst])
    return atoms, codes.mT.gather(1, index)


def starting_atoms(y: Tensor, k: int, start: Start, generator: torch.Generator) -> Tensor:
    """k atoms to begin with: right singular vectors of Y and then rows of it, rows alone, or random directions."""
    n, d = y.shape
    drawn = torch.randn(k, d, generator=generator, dtype=torch.float64).to(y)
    if start == "random":
        return _unit(drawn)
    rows = y[torch.randperm(n, generator=generator)[:k].to(y.device)]
    if start == "svd":
        rows = torch.cat([svd_top(y, min(k, n, d))[2], rows])[:k]
    atoms = torch.cat([rows, drawn[len(rows) :]])  # as many as are there
    return _unit(torch.where(atoms.norm(dim=1, keepdim=True) > 0, atoms, drawn))


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def ksvd(
    y: Tensor,
    k: int,
    nonzeros: int,
    *,
    generator: torch.Generator,
    start: Start = "svd",
    rounds: int = 60,
    tolerance: float = 1e-2,
    power: int = 2,
) -> SparseCode:
    """k atoms and codes of s values for the rows of Y (n × d), such that ‖Y − S·A‖ is small.

    A round is a sweep over the atoms and a pursuit of new codes; a signal keeps its old ones where they are nearer. It
    ends after `rounds`, or once a round takes off less than `tolerance` of the error. Where s reaches the rank that Y
    can have, the result is exact.
    """
    n, d = y.shape
    if n < d:  # nothing lies outside the span of n signals
        q, r = torch.linalg.qr(y.mT)
        found = ksvd(
            r.mT, k, nonzeros, generator=generator, start=start, rounds=rounds, tolerance=tolerance, power=power
        )
        return SparseCode(found.atoms @ q.mT, found.index, found.values, found.errors)
    if nonzeros >= d:
        return _exact(y, k, nonzeros)
    atoms = starting_atoms(y, k, start, generator)
    return _alternated(y, atoms, nonzeros, functools.partial(sweep, power=power), rounds, tolerance)


def optimal_directions(
    y: Tensor, k: int, nonzeros: int, *, generator: torch.Generator, rounds: int = 20, tolerance: float = 1e-2
) -> SparseCode:
    """As `ksvd`, for many dictionaries at once: Y is b × n × d. It begins with singular vectors.

    A round is the best A for given codes and a pursuit of new ones; a signal keeps its old ones where they are nearer,
    and an atom that no signal takes becomes the signal that is represented worst.
    """
    d = y.shape[-1]
    if nonzeros >= d:
        return _exact(y, k, nonzeros)
    atoms = torch.linalg.eigh((y.mT @ y).double()).eigenvectors.flip(-1).mT[:, :k].to(y)
    if k > d:
        drawn = torch.rand(y.shape[:-1], generator=generator).argsort(-1)[:, : k - d].to(y.device)
        rows = y.gather(1, drawn[..., None].expand(-1, -1, d))
        spare = torch.randn(len(y), k - d, d, generator=generator, dtype=torch.float64).to(y)
        spare[:, : rows.shape[1]] = torch.where(rows.any(-1, keepdim=True), rows, spare[:, : rows.shape[1]])
        atoms = torch.cat([atoms, _unit(spare)], 1)
    return _alternated(y, atoms, nonzeros, best_atoms, rounds, tolerance)


def _alternated(
    y: Tensor, atoms: Tensor, nonzeros: int, improve: Improve, rounds: int, tolerance: float
) -> SparseCode:
    """Rounds of better atoms for the codes that there are, and of a pursuit of new codes, which a signal takes where
    they are nearer. Codes come out with ascending places."""
    index, values = omp(atoms @ atoms.mT, y @ atoms.mT, nonzeros)
    rest = _left(y, atoms, index, values)
    errors = [float(rest.sum())]
    for _ in range(rounds):
        atoms, values = improve(y, atoms, index, values)
        rest = _left(y, atoms, index, values)
        other, found = omp(atoms @ atoms.mT, y @ atoms.mT, nonzeros)
        left = _left(y, atoms, other, found)
        better = (left < rest)[..., None]
        index, values = torch.where(better, other, index), torch.where(better, found, values)
        errors.append(float(torch.minimum(left, rest).sum()))
        if errors[-2] - errors[-1] <= tolerance * errors[-2]:
            break
    order = index.argsort(-1)
    return SparseCode(atoms, index.gather(-1, order), values.gather(-1, order), errors)


def best_atoms(y: Tensor, atoms: Tensor, index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The A that fits Y (b × n × d) best with given codes, in rows of length one, and values to go with it."""
    k = atoms.shape[1]
    codes = spread(index, values, k).double()
    best = torch.linalg.pinv(codes.mT @ codes, hermitian=True) @ (codes.mT @ y.double())
    length = best.norm(dim=-1, keepdim=True)
    idle = length[..., 0] == 0
    new = torch.where(idle[..., None], atoms, (best / length).to(y))
    values = values * length[..., 0].to(y).gather(1, index.flatten(1)).view(values.shape)
    return reseeded(y, new, index, values, idle), values


def reseeded(y: Tensor, atoms: Tensor, index: Tensor, values: Tensor, idle: Tensor) -> Tensor:
    """A (b × k × d) with the idle atoms (b × k) in place of which are the signals that are represented worst."""
    if not bool(idle.any()):
        return atoms
    worst = _left(y, atoms, index, values).argsort(1, descending=True)
    turn = (idle.long().cumsum(1) - 1).clamp(0, y.shape[1] - 1)
    rows = y.gather(1, worst.gather(1, turn)[..., None].expand(-1, -1, y.shape[2]))
    return torch.where(idle[..., None] & rows.any(-1, keepdim=True), _unit(rows), atoms)


def _exact(y: Tensor, k: int, nonzeros: int) -> SparseCode:
    """With at least d values a signal: the axes as atoms."""
    d = y.shape[-1]
    index = torch.arange(nonzeros, device=y.device).expand(*y.shape[:-1], -1)
    basis = torch.eye(d, dtype=y.dtype, device=y.device)[torch.arange(k) % d]
    return SparseCode(
        basis.expand(*y.shape[:-2], -1, -1), index, torch.nn.functional.pad(y, (0, nonzeros - d)), [0.0]
    )


def _left(y: Tensor, atoms: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """‖y − s·A‖² of each row, in float64."""
    return (y - spread(index, values, atoms.shape[-2]) @ atoms).double().square().sum(-1)
