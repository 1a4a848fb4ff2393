"""Tensor rings: large matrices as a trace of products of small ones, applied without being formed.

An index of a long axis is several short ones, the first the fastest: i = i_1 + i_2·I_1 + i_3·I_1·I_2 + … A tensor-ring
matrix T (n × n, n = I_1·…·I_D) has one core A^d (I_d × I_d × R × R) a mode, and

    T[i, j] = trace(A^1[i_1, j_1]·A^2[i_2, j_2]·…·A^D[i_D, j_D])

It is held by deviations E^d from cores that give the identity, A^d[:, :, r, s] = I / R + E^d[:, :, r, s]. So T = I for
zeros, and what little T differs from I is not rounded away beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def balanced(n: int, modes: int) -> tuple[int, ...]:
    """I_1 ≤ … ≤ I_D, the largest at most twice the smallest, whose product is n or little more.

    What is above n is padding; every value of every short index still occurs among the first n.

    >>> balanced(768, 2), balanced(768, 3), balanced(37, 2)
    ((24, 32), (8, 8, 12), (5, 8))
    """
    for padded in itertools.count(n):
        found = _split(padded, modes, 1)
        if found is not None and padded - padded // found[-1] < n:
            return found
    raise AssertionError("unreachable")


def _split(n: int, modes: int, least: int) -> tuple[int, ...] | None:
    """The most equal rising factors of n, each at least `least`."""
    if modes == 1:
        return (n,)
    for first in range(int(n ** (1 / modes) + 1e-9), least - 1, -1):
        rest = _split(n // first, modes - 1, first) if n % first == 0 else None
        if rest is not None and rest[-1] <= 2 * first:
            return (first, *rest)
    return None


def identity_cores(sizes: Sequence[int], rank: int) -> list[Tensor]:
    """The cores A^d that give I, float32: I_d × I_d × R × R."""
    return [torch.eye(size)[:, :, None, None].expand(size, size, rank, rank) / rank for size in sizes]


def products(sizes: Sequence[int], rank: int) -> int:
    """Multiplications of `deviation` for one vector."""
    n, (first, *others) = math.prod(sizes), sizes
    if not others:
        return n * first
    *inner, last = others
    return n * (rank**2 * (first + last) + rank**3 * sum(inner))


def deviation(x: Tensor, e: Sequence[Tensor]) -> Tensor:
    """(T − I)·x for vectors x (… × n), one core after the other; E^d is I_d × I_d × R × R.

    Carried along is P (R × R of vectors), the product of the cores so far less its identity part, and x itself. A step
    multiplies the sum of both by E^d and averages P over the ring index, which is the core's identity part.
    """
    sizes, rank, modes = [len(core) for core in e], e[0].shape[-1], len(e)
    if modes == 1:
        return _times(x, e[0].diagonal(dim1=2, dim2=3).sum(-1).mT)
    x_rest = x.reshape(-1, *reversed(sizes))  # n × I_D × … × I_1: the mode that is next comes last
    p = x_rest.reshape(-1, sizes[0]) @ e[0].permute(1, 2, 0, 3).reshape(sizes[0], -1)
    p = p.view(*x_rest.shape[:-1], rank, sizes[0], rank)  # … × (first ring index) × I_d × (last ring index)
    for core in e[1:]:
        p, x_rest = _next_mode(p), x_rest.movedim(-1, 1)
        total = (p + x_rest[..., None, :, None] / rank).flatten(-2)  # … × R × I_d·R
        kept = p.mean(-1)  # … × R × I_d
        if core is e[-1]:  # the ring closes
            step = _times(total.flatten(-2), core.permute(3, 1, 2, 0).reshape(-1, len(core)))
            return (step + kept.sum(-2)).movedim(-1, 1).reshape(x.shape)
        step = _times(total, core.permute(1, 2, 0, 3).reshape(total.shape[-1], -1))
        p = step.unflatten(-1, (len(core), rank)) + kept[..., None]
    raise AssertionError("unreachable")


def _times(x: Tensor, m: Tensor) -> Tensor:
    """x·M for x (… × k) and M (k × j), by one product of matrices.

    `@` chooses between one product and a batch of them by whether M wants a gradient, and on some processors the two
    differ in their last bits: a loaded adapter would not be the trained one.
    """
    return (x.reshape(-1, len(m)) @ m).view(*x.shape[:-1], -1)


def _next_mode(p: Tensor) -> Tensor:
    """n × (modes) × R × I_d × R with the finished mode d in front and the next one in its place."""
    return p.movedim(-2, 1).movedim(-3, -2)


def turned(x: Tensor, e: Sequence[Tensor]) -> Tensor:
    """T·x for vectors x (… × n)."""
    if e[0].shape[-1] > 1:
        return x + deviation(x, e)
    y, right = x, 1  # a Kronecker product: every mode by itself, in place of three passes over x two
    for core in e:
        m = core[:, :, 0, 0]
        if right == 1:
            flat = y.reshape(-1, len(m))
            y = torch.addmm(flat, flat, m.mT)
        else:
            blocks = y.reshape(-1, len(m), right)
            y = torch.baddbmm(blocks, m.expand(len(blocks), -1, -1), blocks)
        right *= len(m)
    return y.reshape(x.shape)


def chain(cores: Sequence[Tensor]) -> Tensor:
    """M[k] = C^1[k_1]·C^2[k_2]·…: n × R × R from cores I_d × R × R."""
    made = cores[0]
    for core in cores[1:]:
        made = torch.einsum("krs,lst->lkrt", made, core).flatten(0, 1)
    return made


def gram(core: Tensor) -> Tensor:
    """The core of T·Tᵀ, Σ_l A[i, l] ⊗ A[j, l]: I_d × I_d × R² × R²."""
    made = torch.einsum("ilrs,jlpq->ijrpsq", core, core)
    return made.flatten(4, 5).flatten(2, 3)
