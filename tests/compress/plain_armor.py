"""ARMOR as its paper states it, a block at a time, with gradients by autograd: what the batched one is held against."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def product(a: list[Tensor], s: Tensor, b: list[Tensor]) -> Tensor:
    return torch.block_diag(*a) @ s @ torch.block_diag(*b)


def proxy_loss(what: Tensor, wn: Tensor, h: Tensor) -> Tensor:
    return (h * (what - wn).square()).sum() / (h * wn.square()).sum()


def pruned(wn: Tensor, h: Tensor) -> Tensor:
    """The mask of NoWag-P: the two largest of w²·h in each four of a row, 1 or 0."""
    mask = torch.zeros_like(wn)
    for i, row in enumerate((wn.square() * h).tolist()):
        for c in range(0, len(row), 4):
            for j in sorted(range(c, c + 4), key=lambda j: -row[j])[:2]:
                mask[i, j] = 1
    return mask


def fit(
    wn: Tensor, h: Tensor, block_out: int, block_in: int, iterations: int, lr: float, draws: torch.Generator
) -> tuple[float, Tensor]:
    """The least loss on the way, and its A·S·B."""
    out, in_ = wn.shape
    a = [torch.eye(block_out, dtype=wn.dtype, requires_grad=True) for _ in range(out // block_out)]
    b = [torch.eye(block_in, dtype=wn.dtype, requires_grad=True) for _ in range(in_ // block_in)]
    c = wn.clone().requires_grad_(True)
    mask = pruned(wn, h)
    adam = torch.optim.Adam([*a, *b, c], lr=lr)
    best = float(proxy_loss(wn * mask, wn, h)), wn * mask
    for _ in range(iterations):
        adam.zero_grad()
        proxy_loss(product(a, c * mask, b), wn, h).backward()
        adam.step()
        core = (c * mask).detach().requires_grad_(True)
        proxy_loss(product(a, core, b), wn, h).backward()
        with torch.no_grad():
            uniform = torch.rand(len(a) * len(b), generator=draws)
            for q in range(len(b)):
                for p in range(len(a)):
                    rows = slice(p * block_out, (p + 1) * block_out)
                    columns = slice(q * block_in, (q + 1) * block_in)
                    _one_block(
                        a[p], b[q], c[rows, columns], mask[rows, columns], core.grad[rows, columns],
                        wn[rows, columns], h[columns], uniform[q * len(a) + p],
                    )  # fmt: skip
            what = product(a, c * mask, b)
            loss = float(proxy_loss(what, wn, h))
        if loss < best[0]:
            best = loss, what.detach()
    return best


def _one_block(
    a: Tensor, b: Tensor, c: Tensor, mask: Tensor, grad: Tensor, wn: Tensor, h: Tensor, uniform: Tensor
) -> None:
    """The discrete step on one block, in place of c and mask."""
    norms = grad.unflatten(1, (-1, 4)).abs().sum(-1).flatten().cumsum(0)
    found = int((norms <= uniform.to(norms) * norms[-1]).sum().clamp(max=len(norms) - 1))
    i, first = found // (c.shape[1] // 4), 4 * (found % (c.shape[1] // 4))
    group = slice(first, first + 4)
    mask[i, group] = 0
    residual = (a @ (c * mask) @ b - wn) * h.sqrt()
    by_b = b[group] * h.sqrt()
    g = by_b @ residual.mT @ a[:, i]
    scores = {}
    for pair in combinations(range(4), 2):
        k = by_b[list(pair)] @ by_b[list(pair)].mT + 1e-9 * torch.eye(2, dtype=a.dtype)
        solved = torch.linalg.solve(k, g[list(pair)])
        scores[float(g[list(pair)] @ solved)] = pair, -solved / (a[:, i].square().sum() + 1e-8)
    pair, values = scores[max(scores)]
    c[i, group] = 0
    for j, value in zip(pair, values):
        c[i, first + j], mask[i, first + j] = value, 1
