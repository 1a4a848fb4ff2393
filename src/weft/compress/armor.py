"""ARMOR: a core with two of each four entries, between block-diagonal matrices that make up for what it lost.

L. Liu et al., "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization", arXiv 2510.05528.

    W = diag(r₂)·Wₙ·diag(r₁),   Wₙ ≈ A·(C ∘ M)·B      A: blocks of b_out × b_out;  B: blocks of b_in × b_in;
                                                       C: out × in;  M: two ones in each four entries of a row
    loss = Σ h_j·(A(C ∘ M)B − Wₙ)²_ij / Σ h_j·Wₙ²_ij,    h_j = E[x_j²]

r₁ are the lengths of W's columns, r₂ those of the rows of W/r₁ (each and 1e-5). The start is A = I, B = I, C = Wₙ, and
in M the two largest of Wₙ²·h: the 2:4 pruning of NoWag, whose loss the result never exceeds. Then, in each iteration,

1. an Adam step on A, B and C;
2. in every pair of an A-block and a B-block one group of four, drawn in proportion to the sum of |∂loss/∂entry| over
   its four entries (kept or not), gets the best pair of positions and the best two values, everything else fixed. This
   is a problem of four unknowns that is solved exactly; the loss cannot rise. The pairs are independent, and all are
   solved at once.

It stops after `iterations`, or when 100 of them (`patience`) have gained less than 1e-6 of the loss, or than 1e-8. Adam
steps may raise the loss, so what is kept is the best state on the way, not the last. r₂ goes into A's rows, r₁ into B's
columns.

h weighs errors of Wₙ, in normalised coordinates, without r₁² (as in NoWag): it is not the Hessian of W's error. An
input that is never seen counts as the mean of the others.

A block's side is the largest multiple of four that divides the layer's side and is at most as large as `keep` leaves
room for, up to `block_size`: the paper's 128 is for sides of thousands. With blocks of b a layer takes half of its
numbers, b·(out + in) more, and one bit an entry. So a `keep` of a half cannot be had; and one above what the largest
blocks take leaves bits unused, since a layer that can be served is not left dense to use them up. A layer stays dense
where 4 does not divide both sides, or where the wrappers would make it larger.

The paper takes 3000 to 20000 iterations with steps of 1e-4, on GPUs. The defaults here suit CPUs: 500 iterations with
steps of 2e-3. In memory are some fourteen tensors of the layer's size. `guard=False` adds one more size, out·in: the
core with all its entries, which is the layer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from weft.algebra.blocks import blocks_times
from weft.algebra.random import generator
from weft.compress._allocate import Menus, Sizes, allocate
from weft.compress._calibration import Statistics
from weft.compress._config import CompressConfig
from weft.compress._factoriser import Factoriser, Tensors
from weft.compress._layers import Layer
from weft.errors import UsageError
from weft.linear._structured import Structured
from weft.linear.block_semi_sparse import BlockSemiSparse, identities, largest
from weft.registry import Card

CARD = Card(
    title="ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization",
    arxiv="2510.05528",
    year=2025,
    summary="a 2:4-sparse core between block-diagonal matrices, found by turns of gradient and exact steps",
    knob="keep",
    needs=("data",),
    limitations="stores more than half of a layer's bits; sides must be multiples of 4",
    reasons={
        "fixed_point": "half of the entries and the largest blocks are the most that it stores of a layer; less than "
        "half it cannot store",
        "non_monotone": "not in closed form: each size of blocks is a descent of its own",
    },
)


@dataclass
class ArmorConfig(CompressConfig):
    """Options of ARMOR."""

    allocate: Literal["uniform", "block_influence"] = field(  # type: ignore[assignment]
        default="uniform", metadata={"help": "who gets how much: the same share everywhere, or by a block's influence"}
    )
    block_size: int = field(default=128, metadata={"help": "largest side of the wrappers' blocks, a multiple of 4"})
    iterations: int = field(default=500, metadata={"help": "turns of both steps, at most", "short": 10})
    lr: float = field(default=2e-3, metadata={"help": "Adam's step on the wrappers and the core"})
    patience: int = field(default=100, metadata={"help": "iterations without gain after which it stops"})
    seed: int = field(default=0, metadata={"help": "draws the groups of the exact steps"})

    def validate(self) -> None:
        super().validate()
        if self.allocate not in ("uniform", "block_influence"):
            raise UsageError(
                f"allocate={self.allocate!r} needs an error or a rank of each size, and a size of ARMOR is the side of "
                "its blocks: use uniform or block_influence"
            )
        if not isinstance(self.block_size, int) or self.block_size < 4 or self.block_size % 4:
            raise UsageError(f"block_size={self.block_size!r} must be a multiple of 4, and at least 4")
        for name in ("iterations", "patience"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if not self.lr > 0:
            raise UsageError(f"lr={self.lr!r} must be above 0")


class ArmorFactoriser(Factoriser[ArmorConfig]):
    """Σ h·(A(C ∘ M)B − Wₙ)²."""

    kind = "block_semi_sparse"
    nested = False

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("squares",)

    def allocate(self, menus: Menus) -> Sizes:
        # the menus are without what costs more than the dense layer, so nothing is left for the guard, which would
        # also leave layers dense to use up what the largest blocks leave
        return allocate(self.config.allocate, menus, self.config.keep, guard=False)

    def sizes(self, layer: Layer) -> Sequence[int]:
        """Sides of blocks; beyond them out·in, where nothing guards against it, for a core with all its entries."""
        found = (_blocks(layer, most) for most in range(4, self.config.block_size + 1, 4))
        sides = sorted({max(pair) for pair in found if all(pair)})
        smaller = [side for side in sides if self.bits(layer, side) < layer.bits]
        return smaller if self.config.guard or not smaller else [*smaller, layer.out * layer.in_]

    def bits(self, layer: Layer, size: int) -> int:
        out, in_, each = layer.out, layer.in_, layer.weight.element_size() * 8
        if size == out * in_:
            return (out * in_ + out + in_) * each
        b_out, b_in = _blocks(layer, size)
        return (out * in_ // 2 + b_out * out + b_in * in_) * each + out * in_

    def operations(self, layer: Layer) -> tuple[float, float] | None:
        sizes = [size for size in self.sizes(layer) if size < layer.out * layer.in_]
        # seven products with A or B an iteration: four forth and back, two for gradients, one after the exact step
        each = 7.0 * layer.out * layer.in_ * sum(_blocks(layer, sizes[-1])) if sizes else 0.0
        return self.config.iterations * each, 0.0

    def workspace(self, layers: Sequence[Layer]) -> float:
        # W, the core, its gradient, and what a step of the descent multiplies
        return max(8.0 * 12 * layer.out * layer.in_ for layer in layers)

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None) -> Tensors:
        assert statistics.input is not None and size is not None
        wn, rows, columns = normalised(layer.wide)
        if size == layer.out * layer.in_:
            whole = torch.ones_like(wn, dtype=torch.bool)
            left, right = identities(wn, 1, 1)
            found = Found(left, wn, whole, right, 0.0)
        else:
            found = fit(
                wn,
                importance(statistics.input.square).to(wn),
                *_blocks(layer, size),
                iterations=self.config.iterations,
                lr=self.config.lr,
                patience=self.config.patience,
                draws=generator("armor", self.config.seed, layer.name),
            )
        return {
            "left": rows.view(found.left.shape[:2])[..., None] * found.left,
            "core": found.core,
            "mask": found.mask.bool(),
            "right": found.right * columns.view(found.right.shape[0], 1, -1),
            "errors": torch.tensor(found.loss, dtype=torch.float64),
        }

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        left, core, mask, right = (tensors[name] for name in ("left", "core", "mask", "right"))
        kept = 4 if size == layer.out * layer.in_ else 2
        return BlockSemiSparse.from_parts(left, core, mask, right, layer.bias, kept=kept, dtype=layer.weight.dtype)


def _blocks(layer: Layer, most: int) -> tuple[int, int]:
    """The sides of A's and B's blocks: the largest multiples of 4 up to `most` that divide; 0 where there is none."""
    return block_of(layer.out, most), block_of(layer.in_, most)


def block_of(side: int, most: int) -> int:
    """The largest multiple of 4 that divides a side and is at most so large; 0 where there is none."""
    return next((b for b in range(most - most % 4, 0, -4) if side % b == 0), 0)


def normalised(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Wₙ (out × in), r₂ (out) and r₁ (in) of W = diag(r₂)·Wₙ·diag(r₁)."""
    columns = w.norm(dim=0) + 1e-5
    rows = (w / columns).norm(dim=1) + 1e-5
    return w / columns / rows[:, None], rows, columns


def importance(squares: Tensor) -> Tensor:
    """h (in): mean squares of the inputs, those that are 0 or not finite replaced by the mean of the others; mean 1."""
    good = torch.isfinite(squares) & (squares > 0)
    if not bool(good.any()):
        return torch.ones_like(squares)
    h = torch.where(good, squares, squares[good].mean())
    return h / h.mean()


@dataclass
class Found:
    """A·(C ∘ M)·B and its loss; the core is zero where the mask is false."""

    left: Tensor
    core: Tensor
    mask: Tensor
    right: Tensor
    loss: float


def fit(
    wn: Tensor,
    h: Tensor,
    block_out: int,
    block_in: int,
    *,
    iterations: int,
    lr: float,
    patience: int,
    draws: torch.Generator,
) -> Found:
    """The best of what the descent passes through; wn is out × in, h (in) has mean 1."""
    at = Descent(wn, h, block_out, block_in)
    if at.loss == 0:
        return at.found()
    adam = torch.optim.Adam([at.a, at.b, at.c], lr=lr, fused=wn.device.type in ("cpu", "cuda"))
    best = at.found()
    mark, waited = best.loss, 0
    for _ in range(iterations):
        at.gradients()
        adam.step()
        at.evaluate()
        at.core_step(torch.rand(at.pairs, generator=draws).to(wn.device))
        loss = at.loss
        if loss < best.loss:
            at.found(best)
        gained = mark - loss > max(1e-6 * mark, 1e-8)
        mark, waited = (loss, 0) if gained else (mark, waited + 1)
        if waited == patience:
            break
    return best


_PAIRS = torch.combinations(torch.arange(4))  # 6 × 2: which two of a group of four


class Descent:
    """The state between two steps, and what the next one needs of it.

    Columns are weighted by √h, which then appears nowhere else: B̃ = B·diag(√h), the residual is R = A·S·B̃ − Wₙ·diag(√h)
    with S = C ∘ M, and loss = ‖R‖² / ‖Wₙ·diag(√h)‖². Kept beside are T = A·S, U = R·B̃ᵀ and G = Aᵀ·U: the gradients of
    ‖R‖²/2 are U·Sᵀ to A, Tᵀ·R to B̃ and G to S, of the first two the diagonal blocks. S, T and G are out × in; R and U
    hold one block of columns after the other, in/b_in × out × b_in.
    """

    def __init__(self, wn: Tensor, h: Tensor, block_out: int, block_in: int) -> None:
        self.root = h.sqrt().view(-1, 1, block_in)
        self.a, self.b = identities(wn, block_out, block_in)
        self.c = wn.clone()
        self.mask = largest(wn.abs() * h.sqrt(), 2).to(wn)  # 0 and 1: a product with booleans would convert them
        self.target = (self.by_columns(wn) * self.root).contiguous()
        self.whole = float(self.target.double().square().sum())
        self.pairs = len(self.a) * len(self.b)
        self.evaluate()

    @property
    def loss(self) -> float:
        return float(self.r.norm(dim=2).double().square().sum()) / max(self.whole, 1e-300)

    def found(self, into: Found | None = None) -> Found:
        """This state, copied."""
        if into is None:
            return Found(self.a.clone(), self.s.clone(), self.mask.clone(), self.b.clone(), self.loss)
        into.left.copy_(self.a)
        into.core.copy_(self.s)
        into.mask.copy_(self.mask)
        into.right.copy_(self.b)
        into.loss = self.loss
        return into

    def by_rows(self, x: Tensor) -> Tensor:
        """One block of rows after the other: out/b_out × b_out × in, of a matrix out × in."""
        return x.view(len(self.a), -1, x.shape[1])

    def by_columns(self, x: Tensor) -> Tensor:
        """One block of columns after the other: in/b_in × out × b_in, of a matrix out × in."""
        return x.view(len(x), len(self.b), -1).transpose(0, 1)

    def evaluate(self) -> None:
        """Everything that follows from A, B, C and M."""
        self.s = self.c * self.mask
        self.weighted = self.b * self.root
        self.t = blocks_times(self.a, self.s)
        self.r = (self.by_columns(self.t) @ self.weighted).sub_(self.target)
        self.u = self.r @ self.weighted.mT
        self.pull_back()

    def pull_back(self) -> None:
        """G, and U as a matrix, from U."""
        self.whole_u = self.u.transpose(0, 1).reshape(self.s.shape)
        self.g = blocks_times(self.a.mT, self.whole_u)

    def gradients(self) -> None:
        """Of the loss to A, B and C, into their `grad`."""
        scale = 2 / self.whole
        self.a.grad = (self.by_rows(self.whole_u) @ self.by_rows(self.s).mT).mul_(scale)
        self.b.grad = (self.by_columns(self.t).mT @ self.r).mul_(scale * self.root)
        self.c.grad = (self.g * self.mask).mul_(scale)

    def core_step(self, uniform: Tensor) -> None:
        """The exact minimum over one group of four in each pair of blocks, drawn by `uniform` (pairs, in [0, 1))."""
        p, q, row, group = self.draw(uniform)
        of_a = self.a[p, :, row]  # pairs × b_out: what the group's row becomes in the product
        of_b = self.weighted.unflatten(1, (-1, 4))[q, group]  # pairs × 4 × b_in: what multiplies its four values
        columns = (q * self.b.shape[1] + 4 * group)[:, None] + torch.arange(4, device=q.device)
        where = (p * self.a.shape[1] + row)[:, None], columns
        # R without the group is R − a·(s·B̃) with its old values s; with values c instead, ‖R‖² changes by
        # |a|²·c·K·cᵀ + 2·c·l. In float64, as rows of B̃ may be nearly parallel; values far larger than what they add
        # up to would be rounded, so they are damped by as much as the rows were rounded
        wide = of_b.double()
        k = wide @ wide.mT
        old = self.s[where].double()
        size = of_a.double().square().sum(1, keepdim=True)
        linear = self.g[where].double() - size * (k @ old[..., None])[..., 0]
        new, kept = best_pair(k, linear, size, torch.finfo(of_b.dtype).eps)
        new = new.to(of_b.dtype).double()

        def change(c: Tensor) -> Tensor:
            return (c * (size * (k @ c[..., None])[..., 0] + 2 * linear)).sum(1, keepdim=True)

        better = change(new) < change(old)  # else it is where it was, up to rounding
        new = torch.where(better, new, old).to(self.s)
        delta = new - self.s[where]
        self.s[where] = new
        self.c[where] = torch.where(better, new, self.c[where])
        self.mask[where] = torch.where(better, kept.to(self.mask), self.mask[where])
        # each block of the product changes by a matrix of rank one, which is cheaper than the product
        rows = p[:, None] * self.a.shape[1] + torch.arange(self.a.shape[1], device=p.device)
        self.t[rows[:, :, None], columns[:, None]] += of_a[:, :, None] * delta[:, None]
        moved = delta[:, None] @ of_b
        blocks = (self.pairs, self.a.shape[1], self.b.shape[1])
        self.r.view(blocks).baddbmm_(of_a[:, :, None], moved)
        moved = (moved.view(len(self.b), len(self.a), -1) @ self.weighted.mT).view(moved.shape)
        self.u.view(blocks).baddbmm_(of_a[:, :, None], moved)
        self.pull_back()

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each pair its block of rows, its block of columns, and a row and a group in there (pairs each)."""
        rows, groups = self.a.shape[1], self.b.shape[1] // 4
        size = self.g.abs().view(-1, 4) @ self.g.new_ones(4)
        size = size.view(len(self.a), rows, len(self.b), groups).permute(2, 0, 1, 3)
        summed = size.reshape(self.pairs, -1).cumsum(1)
        aim = uniform.to(summed)[:, None] * summed[:, -1:]
        found = torch.searchsorted(summed, aim, right=True)[:, 0].clamp_(max=summed.shape[1] - 1)
        pair = torch.arange(self.pairs, device=found.device)
        return pair % len(self.a), pair // len(self.a), found // groups, found % groups


def best_pair(k: Tensor, linear: Tensor, size: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The two of four unknowns, and their values, that make size·c·K·cᵀ + 2·c·l least; all float64.

    k: n × 4 × 4, positive semi-definite, its diagonal raised by the share `damping` and by 1e-9; linear: n × 4, l;
    size: n × 1. Returns the values (n × 4, zero beside the pair) and the pair as a mask.
    """
    pairs = _PAIRS.to(k.device)
    first, second = pairs[:, 0], pairs[:, 1]
    one, two = (k[:, i, i] * (1 + damping) + 1e-9 for i in (first, second))
    across = k[:, first, second]
    l1, l2 = linear[:, first], linear[:, second]
    det = one * two - across.square()
    c1, c2 = (two * l1 - across * l2) / det, (one * l2 - across * l1) / det
    found = (l1 * c1 + l2 * c2).nan_to_num(-1.0).argmax(1, keepdim=True)
    values = -torch.cat([c1.gather(1, found), c2.gather(1, found)], 1) / (size + 1e-8)
    at = pairs[found[:, 0]]
    return torch.zeros_like(linear).scatter(1, at, values), torch.zeros_like(linear).bool().scatter(1, at, True)
