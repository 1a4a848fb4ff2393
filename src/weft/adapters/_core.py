"""Frozen factors with a trainable core: ΔW = B·C·A, where C is what is trained (diagonal or r × r)."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.adapters._delta import LowRankDelta, Site
from weft.adapters._kinds import Conv, Embedding


class CoreDelta(LowRankDelta):
    """B (out × r) and A (r × in) are frozen buffers, never narrowed. A method defines `core`.

    The core acts on the r hidden features, so that its gradient costs n·r (diagonal) or n·r² for n input vectors, and
    the input need not be kept for the backward pass. Where r is large, the layer multiplies once by W + ΔW instead:
    the cheaper is taken, by counted multiplications of a forward and a backward pass
        two thin products:   n·r·(in + out) each way, and thrice n·r² for a dense core
        folded:              out·in·r twice (build ΔW; project its gradient) and n·out·in (the gradient of ΔW)
    """

    A: Tensor
    B: Tensor

    def freeze_factors(self, b: Tensor, a: Tensor, saved: bool = True) -> None:
        self.register_buffer("B", b.float().contiguous(), persistent=saved)
        self.register_buffer("A", a.float().contiguous(), persistent=saved)

    def core(self) -> Tensor:
        """C: (r,) for a diagonal, else (r × r)."""
        raise NotImplementedError(f"{type(self).__name__} must define core()")

    def factors(self) -> tuple[Tensor, Tensor]:
        c = self.core()
        return self.B, (c[:, None] * self.A if c.dim() == 1 else c @ self.A)

    def _thin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x·Aᵀ·Cᵀ, and B in its dtype."""
        dtype = self._compute_dtype(x, self.A)
        h, c = self.kind.down(self._drop(x), self.A.to(dtype)), self.core()
        h = (h * c).to(h.dtype) if c.dim() == 1 else torch.nn.functional.linear(h, c.to(h.dtype))
        return h, self.B.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.kind, Conv):  # hidden features of every group would need the core
            return super().forward(x)
        h, b = self._thin(x)
        return self.kind.up(h, b)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.kind, Conv):
            return super().add(y, x)
        h, b = self._thin(x)
        return self.kind.up(h, b, onto=y) if h.dtype == y.dtype else y + self.kind.up(h, b).to(y.dtype)

    def folds(self, x: Tensor) -> bool:
        if isinstance(self.kind, Embedding) or (self.dropout and self.training):
            return False  # an embedding looks up; dropout acts on the adapter's input alone
        n, r, size = self.kind.tokens(x), self.A.shape[0], self.out * self.in_
        dense_core = 3 * n * r * r if self.core().dim() == 2 else 0
        return 2 * size * r + n * size < 2 * n * r * (self.in_ + self.out) + dense_core


def on_meta(site: Site) -> bool:
    """Whether the model is a skeleton without weights, of which only shapes are asked."""
    return site.device == torch.device("meta")
