"""K-SVD as textbooks have it, a signal and an atom at a time: what the batched one is held against."""

from __future__ import annotations

import torch
from torch import Tensor


def omp(y: Tensor, atoms: Tensor, s: int) -> tuple[list[int], Tensor]:
    """One signal: the atom that fits best, then least squares on all so far."""
    taken: list[int] = []
    rest = y
    for _ in range(s):
        fits = (atoms @ rest).abs()
        fits[taken] = -1
        taken.append(int(fits.argmax()))
        amounts = torch.linalg.lstsq(atoms[taken].mT, y[:, None]).solution[:, 0]
        rest = y - amounts @ atoms[taken]
    return taken, amounts


def sweep(y: Tensor, atoms: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """New atoms and codes (n × k), by a singular value decomposition for each atom, one after the other."""
    atoms, codes = atoms.clone(), codes.clone()
    for j in range(len(atoms)):
        of_j = codes[:, j].nonzero()[:, 0]
        without = y[of_j] - codes[of_j] @ atoms + codes[of_j, j, None] * atoms[j]
        u, s, vh = torch.linalg.svd(without, full_matrices=False)
        atoms[j], codes[of_j, j] = vh[0], s[0] * u[:, 0]
    return atoms, codes
