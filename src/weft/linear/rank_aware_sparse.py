"""Rank-aware sparse: large inputs meet the whole weight, the others a low-rank part of it.

    m_j = |x_j|·c_j > τ          y = W·(m∘x) + B·A·((1 − m)∘x) + b

    W: out × in, stored as in × out, `columns`;  A: r × in, `down`;  B: out × r, `up`;  c: in, `scale`;  τ: a number

Of W only the columns with m_j = 1 are read. They are stored as rows, one after the other, so that what is active can be
gathered, and B·A, the nearest matrix of rank r, stands in for the rest. It stores more than W does, and reads less: for
one token, active columns·out + r·(in + out) numbers.

The mask is each token's own, and a constant to the gradient. c is ‖W_:j‖ unless there is no low-rank part: then plain
magnitudes are compared. c and τ are float32 whatever the layer is cast to, so that a cast moves no threshold.

| setting | what it is |
| --- | --- |
| τ = −1 | all is active: the dense layer |
| r = 0, c = 1 | sparse: small inputs are dropped |
| τ = ∞ | low rank |
| else | both |

`prefill_ratio` p says which tokens of a sequence (the last dimension but one) are treated so. With 1, sequences of more
than one token run dense and single ones sparse: a prompt, then generation. Below 1, the first int(length·(1 − p))
tokens run dense and the rest sparse, which shows on whole sequences what generation will meet; 0 turns sparsity off.

For one token on a CPU, where no gradient is asked for, the active rows of a matrix of 2048 × 2048 or more are summed
without being copied, which `benchmarks/inference.py` measures. Everything else (two tokens of a batch already, whose
active rows differ) is a product with a masked input: the same numbers, and somewhat slower than the dense layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.algebra.matmul import times
from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.linear._structured import Factor, StructuredLinear, bare, check_rank

_NUMBERS = 1 << 22  # of a matrix, below which finding what is active costs more than reading everything
_SHARE = 0.75  # of the columns, beyond which there is little to leave out
_BAGS = 8  # parts of a token's sum, for as many threads

N = TypeVar("N", int, Tensor)


def column_norms(weight: Tensor) -> Tensor:
    """‖W_:j‖ (in) of a weight (out × in), in float32."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64).float()


def dense_tokens(length: int, prefill_ratio: float) -> int:
    """How many of a sequence's first tokens run dense."""
    return length if prefill_ratio == 1 and length > 1 else int(length * (1 - prefill_ratio))


def reads(out: int, in_: int, active: N, rank: int) -> N:
    """Numbers of the weights that are read for a token with so many active columns."""
    return active * out + rank * (in_ + out)


class RankAwareSparse(StructuredLinear):
    """W for inputs above a threshold, B·A for the rest."""

    linear = False
    scale: Tensor
    tau: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        prefill_ratio: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        if not 0 <= prefill_ratio <= 1:
            raise UsageError(f"prefill_ratio={prefill_ratio}: a share of a sequence's tokens, 0 to 1")
        self.rank, self.prefill_ratio = check_rank(rank, out_features, in_features), prefill_ratio
        self.columns = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = bare(Factor, rank, out_features, bias=False, device=device, dtype=dtype)
        self.shift = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("scale", torch.empty(in_features, device=device, dtype=torch.float32))
        self.register_buffer("tau", torch.empty((), device=device, dtype=torch.float32))

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        scale: Tensor,
        tau: Tensor | float,
        bias: Tensor | None = None,
        *,
        prefill_ratio: float = 1.0,
    ) -> RankAwareSparse:
        """A layer in the dtype of the weight (out × in), with up (out × r), down (r × in) and scale (in).

        τ is rounded up to float32, so that an input which lies on it stays inactive.
        """
        (out, in_), rank = weight.shape, len(down)
        layer = cls(
            in_,
            out,
            rank=rank,
            prefill_ratio=prefill_ratio,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.columns.copy_(weight.mT)
        layer.down.weight.copy_(down)
        layer.up.weight.copy_(up)
        layer.scale.copy_(scale)
        exact = torch.as_tensor(tau, dtype=torch.float64)
        layer.tau.copy_(exact)
        if layer.tau < exact:
            layer.tau.copy_(torch.nextafter(layer.tau, layer.tau.new_tensor(torch.inf)))
        if bias is not None and layer.shift is not None:
            layer.shift.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, *, rank: int, tau: float, prefill_ratio: float = 1.0
    ) -> RankAwareSparse:
        """With the nearest B·A of that rank; inputs are compared by |x_j|·‖W_:j‖, and by |x_j| where the rank is 0."""
        if rank == 0:
            up, down, scale = weight[:, :0], weight[:0], weight.new_ones(weight.shape[1])
        else:
            u, s, down = svd_top(weight.to(torch.promote_types(weight.dtype, torch.float32)), rank)
            up, scale = u * s, column_norms(weight)
        return cls.from_factors(weight, up, down, scale, tau, bias, prefill_ratio=prefill_ratio)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.shift

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "prefill_ratio": self.prefill_ratio}

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2] if x.dim() > 1 else 1
        dense = dense_tokens(length, self.prefill_ratio)
        if dense == length:
            return times(x, self.columns.mT, self.shift)
        if dense == 0:
            return self._sparse(x)
        first = times(x[..., :dense, :], self.columns.mT, self.shift)
        return torch.cat([first, self._sparse(x[..., dense:, :])], dim=-2)

    def active(self, x: Tensor) -> Tensor:
        """Which inputs meet the whole weight (… × in, boolean), if their tokens run sparse."""
        return ~(x.detach().abs() * self.scale <= self.tau)  # what is not a number is not hidden

    def reads(self, x: Tensor) -> Tensor:
        """Numbers of the weights that are read for each token of x (…), if all run sparse."""
        return reads(self.out_features, self.in_features, self.active(x).sum(-1), self.rank)

    def _sparse(self, x: Tensor) -> Tensor:
        active = self.active(x)
        y = self._gathered(x, active) if self._may_gather(x) else None
        if y is None:
            y = times(x.masked_fill(~active, 0), self.columns.mT, self.shift)
        return y + self.up(self.down(x.masked_fill(active, 0))) if self.rank else y

    def _may_gather(self, x: Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()  # how many rows are active is not known before
            and not torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == self.columns.dtype
            and not torch.is_autocast_enabled("cpu")
            and x.numel() == self.in_features
            and self.columns.numel() >= _NUMBERS
        )

    def _gathered(self, x: Tensor, active: Tensor) -> Tensor | None:
        """W·(m∘x) + b from the active rows of `columns` alone, or None where nearly all are active."""
        (rows,) = active.flatten().nonzero(as_tuple=True)
        if len(rows) > _SHARE * self.in_features:
            return None
        starts = torch.arange(0, len(rows), max(-(-len(rows) // _BAGS), 1))
        parts = functional.embedding_bag(  # a weighted sum of rows, which are not copied for it
            rows, self.columns, starts, mode="sum", per_sample_weights=x.flatten()[rows]
        )
        y = parts.sum(0).view(*x.shape[:-1], self.out_features)
        return y if self.shift is None else y + self.shift

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankAwareSparse:
        """Cast all but what inputs are compared with: to a cast, that is whole numbers of the same bits."""
        exact = {name: getattr(self, name).view(torch.int32) for name in ("scale", "tau")}
        super()._apply(fn, recurse)
        for name, bits in exact.items():
            setattr(self, name, fn(bits).view(torch.float32))
        return self
