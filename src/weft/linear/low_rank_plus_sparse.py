"""Low rank plus sparse: what is common to all of a matrix, and the single entries that stand out.

    y = (x·Aᵀ)·Bᵀ + x·Sᵀ + b        A: r × in, `down`;  B: out × r, `up`;  b: out, in `up`
                                    S: out × in, with s entries in each row, v: out × s, `values`

W = B·A + S. r·(in + out) + s·out numbers in place of in·out, and where the s·out are: for each row a bit a column, or s
whole numbers, whichever is shorter. Every row of S has as many entries, so that no output is left without.

Where no gradient is asked for, a processor multiplies by S without writing it out. In float32 that takes less time than
the dense layer does, for an S up to a tenth full. In bfloat16, whose dense products are fast on many processors, and
wherever else S is written out for some of its rows at a time, what is saved is memory alone.
benchmarks/low_rank_plus_sparse.py measures it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.algebra.sparse_coding import spread
from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.linear._codes import Coded
from weft.linear._structured import Factor, bare, check_rank


class LowRankPlusSparse(Coded):
    """W = B·A + S."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        nonzeros: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.rank = check_rank(rank, out_features, in_features)
        _check_nonzeros(nonzeros, in_features)
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = bare(Factor, rank, out_features, bias=bias, device=device, dtype=dtype)
        self._make_codes(in_features, nonzeros, device, dtype)

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        up: Tensor,
        down: Tensor,
        index: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> LowRankPlusSparse:
        """W = up·down (out × r, r × in) + S, with values (out × s) at places (out × s, ascending).

        In `dtype`, that of `up` if not given.
        """
        (out, rank), in_ = up.shape, down.shape[1]
        options: Any = {"rank": rank, "nonzeros": values.shape[1], "bias": bias is not None}
        layer = cls(in_, out, **options, device=up.device, dtype=dtype or up.dtype)
        layer.up.weight.copy_(up)
        layer.down.weight.copy_(down)
        if bias is not None:
            layer.up.bias.copy_(bias)
        layer._set_codes(index, values)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, *, rank: int, density: float, rounds: int = 20
    ) -> LowRankPlusSparse:
        """A W near the given one in the Frobenius norm, of that rank but for that share of each row's entries."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        nonzeros = _check_nonzeros(round(density * wide.shape[1]), wide.shape[1])
        factors = split(wide, check_rank(rank, *wide.shape), nonzeros, rounds)
        return cls.from_factors(*factors, bias, weight.dtype)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "nonzeros": self.nonzeros}

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x))
        return y + self._times_codes(x.to(y.dtype))

    def dense(self) -> Tensor:
        up, down = self.up.weight, self.down.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        return torch.addmm(self._written_out(wide), up.to(wide), down.to(wide)).to(up.dtype)


def split(w: Tensor, rank: int, nonzeros: int, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B, A, and the places and values of S, with B·A + S near w (out × in): in turn each the best for the other.

    A round takes the nearest B·A to w − S, and for S the largest entries of what is then left in each row. So what is
    left never grows; rounds end before their time where it shrinks by less than a thousandth.
    """
    sparse, before = torch.zeros_like(w), torch.inf
    for _ in range(rounds):
        up, down = w[:, :0], w[:0]
        if rank:
            u, s, vh = svd_top(w - sparse, rank)
            root = s.sqrt()
            up, down = u * root, root[:, None] * vh
        rest = w - up @ down
        index = rest.abs().topk(nonzeros, dim=1).indices.sort(1).values
        values = rest.gather(1, index)
        sparse = spread(index, values, w.shape[1])
        left = float((rest - sparse).norm())
        if left >= 0.999 * before:
            break
        before = left
    return up, down, index, values


def _check_nonzeros(nonzeros: int, in_: int) -> int:
    if not 1 <= nonzeros <= in_:
        raise UsageError(f"nonzeros={nonzeros}: of a row's {in_} entries the sparse part stores 1 to all")
    return nonzeros
