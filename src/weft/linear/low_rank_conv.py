"""Low-rank convolution: one of the same kernel to few channels, and one of 1 × 1 from there.

    y = conv₁ₓ₁(conv(x, A), B) + b      A: r × in × kh × kw, `down`;  B: out × r × 1 × 1, `up`;  b: out, in `up`

The weight seen as a matrix W, out × (in·kh·kw), is B·A. r·(in·kh·kw + out) numbers in place of out·in·kh·kw. Stride,
padding and dilation are those of the first; it has all of W's view.
"""

from __future__ import annotations

from torch import Tensor

from weft.linear._convolution import POINT, LowRankConvolution, Place


class LowRankConv(LowRankConvolution):
    """W = B·A, for W out × (in·kh·kw)."""

    @staticmethod
    def matrices(weight: Tensor) -> Tensor:
        return weight.flatten(1)[None]

    @staticmethod
    def folded(matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrices.reshape(shape)

    @staticmethod
    def divided(place: Place) -> tuple[Place, Place]:
        return place, POINT

    def hold(self, left: Tensor, right: Tensor) -> None:
        self.up.weight.copy_(left.reshape(self.up.weight.shape))
        self.down.weight.copy_(right.reshape(self.down.weight.shape))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up.weight.flatten(1)[None], self.down.weight.flatten(1)[None]
