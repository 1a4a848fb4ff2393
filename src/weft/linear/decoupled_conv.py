"""Decoupled convolution: 1 × 1 to few channels for each output, and a depthwise one from there, summed.

    y[o] = Σ_k conv(conv₁ₓ₁(x, A[o, k]), B[o, k]) + b[o]    A: (out·r) × in × 1 × 1, `down`;  b: out, in `up`
                                                            B: out × r × kh × kw in out groups, `up`

The weight seen as a matrix for each output o, W[o]: in × (kh·kw), is A[o]ᵀ·B[o], all of rank r, which cannot exceed
the kernel's kh·kw places. r·out·(in + kh·kw) numbers in place of out·in·kh·kw. Stride, padding and dilation are those
of the second, so that the first runs at every place of the input.
"""

from __future__ import annotations

from torch import Tensor

from weft.linear._convolution import POINT, LowRankConvolution, Place


class DecoupledConv(LowRankConvolution):
    """W[o] = A[o]ᵀ·B[o], for W out × in × (kh·kw)."""

    @staticmethod
    def matrices(weight: Tensor) -> Tensor:
        return weight.flatten(2)

    @staticmethod
    def folded(matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrices.reshape(shape)

    @staticmethod
    def divided(place: Place) -> tuple[Place, Place]:
        return POINT, place

    def hold(self, left: Tensor, right: Tensor) -> None:
        self.down.weight.copy_(left.mT.reshape(self.down.weight.shape))
        self.up.weight.copy_(right.reshape(self.up.weight.shape))

    def factors(self) -> tuple[Tensor, Tensor]:
        out, r = self.up.weight.shape[:2]
        return self.down.weight.view(out, r, -1).mT, self.up.weight.flatten(2)
