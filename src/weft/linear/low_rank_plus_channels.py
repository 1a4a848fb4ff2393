"""Low rank plus channels: a bottleneck for all of the input, and a dense part for a few of its channels.

    y = γ·B·σ(A·x) + (1 − γ)·V·x_I + b      A: r × in, `down`;  B: out × r, `up`;  b: out, in `up`
                                            V: out × k, `columns`;  I: k of the in channels, `index`, which never change

r·(in + out) + k·out numbers in place of in·out, and k whole numbers of the smallest type that holds them; as many
multiplications a token. σ is silu, gelu, relu or "none". With none the layer is a linear map, W = γ·B·A with
(1 − γ)·V added to its columns I; with any other no weight describes it, so it has no dense form and takes no merge.

For a gradient, x and A·x are kept and nothing else: x_I and σ(A·x) are cheaper made again than held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.linear._codes import smallest_int
from weft.linear._structured import Factor, StructuredLinear, bare, check_rank, computed_in, plain

aten = torch.ops.aten
# σ, and what comes of a gradient g of σ(h)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, aten.silu_backward),
    "gelu": (functional.gelu, aten.gelu_backward),
    "relu": (functional.relu, lambda g, h: g * (h > 0)),
    "none": (lambda h: h, lambda g, h: g),
}


def heaviest(w: Tensor, k: int, norm: int = 2) -> Tensor:
    """The k columns of w (out × in) with the largest norms, ascending; of equal ones the first."""
    sizes = torch.linalg.vector_norm(w, norm, dim=0)
    return sizes.argsort(descending=True, stable=True)[:k].sort().values


class LowRankPlusChannels(StructuredLinear):
    """γ·B·σ(A·x) + (1 − γ)·V·x_I."""

    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        channels: int,
        gamma: float,
        activation: str = "none",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            channels: k, 0 to in.
            gamma: γ, 0 to 1.
            activation: σ, one of ACTIVATIONS.
        """
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.rank = check_rank(rank, out_features, in_features)
        if not 0 <= channels <= in_features:
            raise UsageError(f"channels={channels}: an input of {in_features} has 0 to {in_features}")
        if not 0 <= gamma <= 1:
            raise UsageError(f"gamma={gamma}: the low-rank part's share of the output is 0 to 1")
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
        self.channels, self.gamma, self.activation = channels, gamma, activation
        self.linear = activation == "none"
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = bare(Factor, rank, out_features, bias=bias, device=device, dtype=dtype)
        self.columns = bare(Factor, channels, out_features, bias=False, device=device, dtype=dtype)
        self.register_buffer("index", torch.arange(channels, device=device).to(smallest_int(in_features)))

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        rank: int,
        channels: int,
        gamma: float,
        activation: str = "none",
    ) -> LowRankPlusChannels:
        """γ·B·A the nearest of that rank to a weight, and (1 − γ)·V what is left of it where most is left.

        A part with a share of 0 starts at 0. With an activation the values are those that it would have without.
        """
        out, in_ = weight.shape
        options: Any = {"rank": rank, "channels": channels, "gamma": gamma, "activation": activation}
        layer = cls(in_, out, **options, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        rest = weight.to(torch.promote_types(weight.dtype, torch.float32))
        up, down = rest.new_zeros(out, rank), rest.new_zeros(rank, in_)
        if rank and gamma:
            u, s, vh = svd_top(rest, rank)
            root = (s / gamma).sqrt()
            up, down = u * root, root[:, None] * vh
            rest = rest - gamma * up @ down
        index = heaviest(rest, channels)
        layer.set_parts(up, down, index, rest[:, index] / (1 - gamma) if gamma < 1 else 0 * rest[:, index])
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def set_parts(self, up: Tensor, down: Tensor, index: Tensor, columns: Tensor) -> None:
        """B (out × r), A (r × in), I (k, ascending) and V (out × k)."""
        self.up.weight.copy_(up)
        self.down.weight.copy_(down)
        self.index.copy_(index)
        self.columns.weight.copy_(columns)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias

    def options(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "channels": self.channels,
            "gamma": self.gamma,
            "activation": self.activation,
        }

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.down, self.up, self.columns)
        if not plain(*parts):
            y = self.up(self.gamma * ACTIVATIONS[self.activation][0](self.down(x)))
            return y + (1 - self.gamma) * self.columns(x.index_select(-1, self.index.long()))
        dtype = computed_in(x)
        flat = x.to(dtype).reshape(-1, self.in_features)
        weights = [None if t is None else t.to(dtype) for t in (*(part.weight for part in parts), self.bias)]
        y = _Mix.apply(flat, *weights, self.index, self.gamma, self.activation)
        return y.view(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        if not self.linear:
            return super().dense()
        up, down, columns = self.up.weight, self.down.weight, self.columns.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        low = self.gamma * (up.to(wide) @ down.to(wide))
        return low.index_add_(1, self.index.long(), columns.to(wide), alpha=1 - self.gamma).to(up.dtype)


class _Mix(torch.autograd.Function):
    """γ·σ(x·Aᵀ)·Bᵀ + (1 − γ)·x_I·Vᵀ + b (n × out) of x (n × in)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        columns: Tensor,
        bias: Tensor | None,
        index: Tensor,
        gamma: float,
        activation: str,
    ) -> Tensor:
        h = x @ down.mT
        ctx.save_for_backward(x, h, down, up, columns, index)
        ctx.gamma, ctx.activation = gamma, activation
        first = x.new_zeros(len(up)) if bias is None else bias
        y = torch.addmm(first, ACTIVATIONS[activation][0](h), up.mT, alpha=gamma)
        return y.addmm_(x.index_select(1, index.long()), columns.mT, alpha=1 - gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, down, up, columns, index = ctx.saved_tensors
        wants_x, wants_down, wants_up, wants_columns, wants_bias, *_ = ctx.needs_input_grad
        act, back = ACTIVATIONS[ctx.activation]
        chosen, gamma, rest = index.long(), ctx.gamma, 1 - ctx.gamma
        of_x = of_down = of_up = of_columns = None
        if wants_x or wants_down:
            of_h = back((grad @ up).mul_(gamma), h)
            of_down = of_h.mT @ x if wants_down else None
        if wants_x:
            of_x = of_h @ down
            of_x.index_copy_(1, chosen, torch.addmm(of_x.index_select(1, chosen), grad, columns, alpha=rest))
        if wants_up:
            of_up = (grad.mT @ act(h)).mul_(gamma)
        if wants_columns:
            of_columns = (grad.mT @ x.index_select(1, chosen)).mul_(rest)
        return of_x, of_down, of_up, of_columns, grad.sum(0) if wants_bias else None, None, None, None
