"""What the low-rank forms of a convolution share: two convolutions, one after the other, in the place of one.

The weight, out × in × kh × kw, is seen as one matrix, or as one for each output channel, n × a × b in all; each has the
rank r. What the first convolution holds of them is `down`, what the second does `up`, which has the bias. One group
only: the many groups of a depthwise convolution have little to share.

They are no nn.Conv2d themselves: PEFT's LoRA makes its factors of the class of the layer that it meets, which would be
this one again. PEFT refuses them by name, as weft's adapters do, and serves the two inside.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from weft.algebra.svd import svd_stack
from weft.errors import UsageError
from weft.linear._structured import Structured, bare, check_rank

Place = tuple[tuple[int, int], tuple[int, int], tuple[int, int] | str, tuple[int, int], str]
POINT: Place = ((1, 1), (1, 1), (0, 0), (1, 1), "zeros")


class LowRankConvolution(Structured):
    """A convolution of low rank. A kind says as what matrices it sees the weight, and which factor goes where."""

    share: ClassVar[float] = 0.5  # the power of a singular value that `from_dense` puts into the left factor

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
        count, a, b = self.matrices(torch.empty(out_channels, in_channels, *kernel_size, device="meta")).shape
        self.rank = check_rank(rank, a, b, 1)
        first, second = self.divided((kernel_size, stride, padding, dilation, padding_mode))
        self.down = _convolution(in_channels, count * rank, first, 1, False, device, dtype)
        self.up = _convolution(count * rank, out_channels, second, count, bias, device, dtype)

    # --- for kinds ----------------------------------------------------------------------------------------------------

    @staticmethod
    def matrices(weight: Tensor) -> Tensor:
        """The weight (out × in × kh × kw) as the matrices whose rank it is: n × a × b."""
        raise NotImplementedError

    @staticmethod
    def folded(matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The weight of that shape whose matrices these are."""
        raise NotImplementedError

    @staticmethod
    def divided(place: Place) -> tuple[Place, Place]:
        """Kernel, stride, padding, dilation and the padding's mode of the first and of the second convolution."""
        raise NotImplementedError

    def hold(self, left: Tensor, right: Tensor) -> None:
        """Take the factors of the matrices, (n ×) a × r and (n ×) r × b; of one matrix they may have no n."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors that it holds, n × a × r and n × r × b."""
        raise NotImplementedError

    # --- for all ------------------------------------------------------------------------------------------------------

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
        cls,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        like: nn.Conv2d,
    ) -> Self:
        """The layer whose matrices are left·right, as `hold` takes them, in `dtype` (that of `left` if not given).

        It has the shape of `like`, the convolution in whose place it stands; values of that are not read.
        Raises UsageError where it has groups.
        """
        options: Any = {"rank": right.shape[-2], "bias": bias is not None}
        layer = cls(**cls.geometry(like), **options, device=left.device, dtype=dtype or left.dtype)
        layer.hold(left, right)
        if bias is not None and layer.up.bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int, like: nn.Conv2d) -> Self:
        """The nearest of that rank in the Frobenius norm; `share` divides each singular value between the factors."""
        cls.geometry(like)
        matrices = cls.matrices(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        _, a, b = matrices.shape
        u, s, vh = svd_stack(matrices, check_rank(rank, a, b, 1))
        left, right = u * s[:, None] ** cls.share, s[..., None] ** (1 - cls.share) * vh
        return cls.from_factors(left, right, bias, weight.dtype, like=like)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias  # type: ignore[return-value]

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def stock_place(self) -> nn.Conv2d:
        first, second = self.down, self.up
        kernel, stride = (
            tuple(a * b for a, b in zip(getattr(first, name), getattr(second, name)))
            for name in ("kernel_size", "stride")
        )
        pads: list[Any] = [first.padding, second.padding]
        words = [each for each in pads if isinstance(each, str)]
        padding = words[0] if words else tuple(a + b for a, b in zip(*pads))
        dilation = tuple(map(max, first.dilation, second.dilation))
        mode = first.padding_mode if second.padding_mode == "zeros" else second.padding_mode
        place: Any = (kernel, stride, padding, dilation, mode)
        return _convolution(first.in_channels, second.out_channels, place, 1, self.bias is not None, "meta", None)

    def linears(self) -> tuple[nn.Module, ...]:
        return self.down, self.up

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.up.weight.dtype, torch.float32)
        left, right = (factor.to(wide) for factor in self.factors())
        kernel = (math.prod(sides) for sides in zip(self.down.kernel_size, self.up.kernel_size))
        shape = (self.up.out_channels, self.down.in_channels, *kernel)
        return self.folded(left @ right, shape).to(self.up.weight.dtype).contiguous()


def _convolution(
    in_: int, out: int, place: Place, groups: int, bias: bool, device: Any, dtype: torch.dtype | None
) -> nn.Conv2d:
    kernel, stride, padding, dilation, mode = place
    sizes: Any = (in_, out, kernel, stride, padding, dilation, groups, bias, mode)
    return bare(nn.Conv2d, *sizes, device=device, dtype=dtype)
