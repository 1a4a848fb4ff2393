"""Frozen factors with a trainable core: ΔW = B·C·A, where C is what is trained (diagonal, r × r, …)."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.adapters._delta import LowRankDelta, Site
from weft.adapters._kinds import Embedding


class CoreDelta(LowRankDelta):
    """B (out × r) and A (r × in) are persistent buffers: frozen, saved, never narrowed. A method defines `core`.

    Where r is large the two thin products cost more than one product with W + ΔW, whose ΔW is built once a forward:
    the cheaper is taken, by counted multiplications of a forward and backward pass with n input vectors
        two thin products:   n·r·(in + out) each way (the factors are frozen)
        folded:              out·in·r twice (build ΔW; project its gradient) and n·out·in (the gradient of ΔW)
    """

    A: Tensor
    B: Tensor

    def freeze_factors(self, b: Tensor, a: Tensor) -> None:
        self.register_buffer("B", b.float().contiguous())
        self.register_buffer("A", a.float().contiguous())

    def core(self) -> Tensor:
        """C: (r,) for a diagonal, else (r × r)."""
        raise NotImplementedError(f"{type(self).__name__} must define core()")

    def factors(self) -> tuple[Tensor, Tensor]:
        c = self.core()
        return self.B, (c[:, None] * self.A if c.dim() == 1 else c @ self.A)

    def folds(self, x: Tensor) -> bool:
        if self.dropout and self.training:
            return False  # dropout acts on the adapter's input alone
        n, r = self.kind.tokens(x), self.A.shape[0]
        thin = 2 * n * r * (self.in_ + self.out)
        folded = 2 * self.out * self.in_ * r + n * self.out * self.in_
        return not isinstance(self.kind, Embedding) and folded < thin


def empty_factors(site: Site, r: int) -> tuple[Tensor, Tensor]:
    """B and A to be filled from a file."""
    return site.empty(site.out, r), site.empty(r, site.in_)


def on_meta(site: Site) -> bool:
    """Whether the model is a skeleton without weights, of which only shapes are asked."""
    return site.device == torch.device("meta")
