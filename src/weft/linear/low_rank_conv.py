"""Low-rank convolution: one of the same kernel to few channels, and one of 1 × 1 from there.

    y = conv₁ₓ₁(conv(x, A), B) + b      A: r × in × kh × kw, `down`;  B: out × r × 1 × 1, `up`;  b: out, in `up`

The weight seen as a matrix W, out × (in·kh·kw), is B·A. r·(in·kh·kw + out) numbers in place of out·in·kh·kw. Stride,
padding and dilation are those of the first; it has all of W's view. One group only: the many groups of a depthwise
convolution have little to share.

It is no nn.Conv2d itself: PEFT's LoRA makes its factors of the class of the layer that it meets, which would be this
one again. PEFT refuses it by name, as weft's adapters do, and serves the two inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.linear._structured import Structured, bare, check_rank


class LowRankConv(Structured):
    """W = B·A, for W out × (in·kh·kw)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        padding_mode: str = "zeros",
        *,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype)
        check_rank(rank, out_channels, in_channels * kernel_size[0] * kernel_size[1], 1)
        on: Any = {"device": device, "dtype": dtype}
        place = (stride, padding, dilation, 1, False, padding_mode)
        self.down = bare(nn.Conv2d, in_channels, rank, kernel_size, *place, **on)
        self.up = bare(nn.Conv2d, rank, out_channels, 1, bias=bias, **on)
        self.rank = rank

    @classmethod
    def geometry(cls, stock: nn.Module) -> dict[str, Any]:
        if type(stock) is not nn.Conv2d:  # what derives from it pads, or standardises, in its own way
            raise UsageError(f"a {cls.kind} layer stands for a Conv2d, but it is a {type(stock).__name__}")
        if stock.groups != 1:
            raise UsageError(f"a Conv2d with groups={stock.groups} has no {cls.kind} form: leave it dense")
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
        return {name: getattr(stock, name) for name in names}

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls, up: Tensor, down: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None, *, like: nn.Conv2d
    ) -> LowRankConv:
        """W = up·down (out × r, r × (in·kh·kw)), in `dtype` (that of `up` if not given).

        It has the shape of `like`, the convolution in whose place it stands; values of that are not read.
        Raises UsageError where it has groups.
        """
        options: Any = {"rank": len(down), "bias": bias is not None}
        layer = cls(**cls.geometry(like), **options, device=up.device, dtype=dtype or up.dtype)
        layer.up.weight.copy_(up.view_as(layer.up.weight))
        layer.down.weight.copy_(down.reshape(layer.down.weight.shape))
        if bias is not None and layer.up.bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int, like: nn.Conv2d) -> LowRankConv:
        """The nearest W of that rank in the Frobenius norm, each singular value shared evenly between its factors."""
        w = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        u, s, vh = svd_top(w, check_rank(rank, len(w), w.shape[1], 1))
        root = s.sqrt()
        return cls.from_factors(u * root, root[:, None] * vh, bias, weight.dtype, like=like)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias  # type: ignore[return-value]

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def stock(self) -> nn.Conv2d:
        first: Any = self.down
        place = (first.kernel_size, first.stride, first.padding, first.dilation, 1, self.bias is not None)
        return bare(nn.Conv2d, first.in_channels, self.up.out_channels, *place, first.padding_mode, device="meta")

    def linears(self) -> tuple[nn.Module, ...]:
        return self.down, self.up

    def dense(self) -> Tensor:
        up, down = self.up.weight, self.down.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        return (up.flatten(1).to(wide) @ down.flatten(1).to(wide)).view(-1, *down.shape[1:]).to(up.dtype)
