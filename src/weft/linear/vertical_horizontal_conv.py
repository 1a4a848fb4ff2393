"""Vertical and horizontal: a convolution of kh × 1 to few channels, and one of 1 × kw from there.

    y = conv(conv(x, A), B) + b         A: r × in × kh × 1, `down`;  B: out × r × 1 × kw, `up`;  b: out, in `up`

The weight seen as a matrix W, (in·kh) × (out·kw), is of rank r: W[(i, y), (o, x)] = Σ_k A[k, i, y]·B[o, k, x].
r·(in·kh + out·kw) numbers in place of out·in·kh·kw. Of stride, padding and dilation the first has the vertical part
and the second the horizontal one. From a dense weight all singular values go into B, and A's kernels are orthonormal.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from weft.linear._convolution import POINT, LowRankConvolution, Place


class VerticalHorizontalConv(LowRankConvolution):
    """W of rank r, for W (in·kh) × (out·kw)."""

    share: ClassVar[float] = 0.0

    @staticmethod
    def matrices(weight: Tensor) -> Tensor:
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)[None]

    @staticmethod
    def folded(matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
        out, in_, kh, kw = shape
        return matrices.reshape(in_, kh, out, kw).permute(2, 0, 1, 3)

    @staticmethod
    def divided(place: Place) -> tuple[Place, Place]:
        *sides, mode = place
        # what is said in a word, "same" or "valid", fits both
        vertical = [side if isinstance(side, str) else (side[0], none[1]) for side, none in zip(sides, POINT)]
        horizontal = [side if isinstance(side, str) else (none[0], side[1]) for side, none in zip(sides, POINT)]
        return (*vertical, mode), (*horizontal, mode)  # type: ignore[return-value]

    def hold(self, left: Tensor, right: Tensor) -> None:
        out, r, _, kw = self.up.weight.shape
        self.down.weight.copy_(left.mT.reshape(self.down.weight.shape))
        self.up.weight.copy_(right.reshape(r, out, 1, kw).transpose(0, 1))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down.weight.flatten(1).mT[None], self.up.weight.transpose(0, 1).flatten(1)[None]
