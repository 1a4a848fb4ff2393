"""Quantised plus low rank: a matrix in codes of few bits that rests, and a product of two thin ones that is trained.

    y = x·Wqᵀ + c·(x·Aᵀ)·Bᵀ + b      Wq = (Q − Z)·S: out × in, a step and a zero for each group of a row's entries
                                      A: r × in, `down`;  B: out × r, `up`;  b: out, in `up`;  c: `scale`

Q are codes of 2, 3, 4 or 8 bits, packed without gaps: `codes`, out × ⌈in·bits/8⌉ bytes. `zeros` are packed alike, and
`steps` are float16 by their bits, so that no cast of the model changes Wq. Beside r·(in + out) numbers it stores
bits·out·in bits, and 16 + bits for each group.

Made for training: Wq is written out for some of its rows at a time, each time it is needed, the backward pass included,
and freed. For that pass autograd keeps x and x·Aᵀ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.algebra.matmul import times
from weft.algebra.quantise import WIDTHS, decode, nearest, pack, packed_size, unpack
from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.linear._structured import Factor, StructuredLinear, bare, check_rank, computed_in

TILE = 2**20  # entries of Wq that are written out at a time


class QuantisedPlusLowRank(StructuredLinear):
    """Wq + c·B·A."""

    codes: Tensor
    steps: Tensor
    zeros: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        rank: int,
        scale: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            group_size: entries of a row that share a grid; the last group may have fewer.
            rank: r; 0 leaves the codes alone.
        """
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        check_grid(bits, group_size)
        self.bits, self.group_size = bits, group_size
        self.rank, self.scale = check_rank(rank, out_features, in_features), scale
        groups = -(-in_features // group_size)

        def stored(columns: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return torch.empty(out_features, columns, dtype=dtype, device=device)

        self.register_buffer("codes", stored(packed_size(in_features, bits)))
        self.register_buffer("steps", stored(groups, torch.int16))
        self.register_buffer("zeros", stored(packed_size(groups, bits)))
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = bare(Factor, rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_parts(
        cls,
        coded: tuple[Tensor, Tensor, Tensor],
        up: Tensor,
        down: Tensor,
        bias: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> QuantisedPlusLowRank:
        """Of codes (out × in), steps (numbers of float16) and zeros (out × groups), as `algebra.quantise` gives them;
        c·up·down (out × r, r × in) beside them, in `dtype` (that of `up` if not given)."""
        codes, step, zero = coded
        (out, in_), rank, dtype = codes.shape, up.shape[1], dtype or up.dtype
        options: Any = {"bits": bits, "group_size": group_size, "rank": rank, "scale": scale, "bias": bias is not None}
        layer = cls(in_, out, **options, device=up.device, dtype=dtype)
        layer.codes.copy_(pack(codes, bits))
        layer.steps.copy_(step.half().view(torch.int16))
        layer.zeros.copy_(pack(zero.to(torch.uint8), bits))
        layer.up.weight.copy_(up)
        layer.down.weight.copy_(down)
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, *, bits: int, group_size: int, rank: int
    ) -> QuantisedPlusLowRank:
        """Each entry at the nearest point of its grid, and B·A the nearest of that rank to what is lost; c = 1."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        coded = nearest(wide, bits, group_size)
        up, down = nearest_factors(wide - decode(*coded, group_size, wide.dtype), rank)
        return cls.from_parts(coded, up, down, bias, bits=bits, group_size=group_size, dtype=weight.dtype)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias

    def options(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "rank": self.rank, "scale": self.scale}

    def quantised(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of Wq, rounded once."""
        return _written_out(self.codes[rows], self.steps[rows], self.zeros[rows], self._form, dtype)

    @property
    def _form(self) -> tuple[int, int, int]:
        return self.bits, self.group_size, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        flat = x.to(computed_in(x)).reshape(-1, self.in_features)
        y = _Product.apply(flat, self.codes, self.steps, self.zeros, self._form)
        return y.view(*x.shape[:-1], self.out_features) + self.up(self.scale * self.down(x))

    def dense(self) -> Tensor:
        up = self.up.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        whole = self.quantised(wide)
        return whole.addmm_(up.to(wide), self.down.weight.to(wide), alpha=self.scale).to(up.dtype)


def _written_out(codes: Tensor, steps: Tensor, zeros: Tensor, form: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Rows of Wq from the same rows of what is stored; `form` has bits, group and columns."""
    bits, group, columns = form
    zero = unpack(zeros, bits, steps.shape[1])
    return decode(unpack(codes, bits, columns), steps.view(torch.float16), zero, group, dtype)


class _Product(torch.autograd.Function):
    """x·Wqᵀ (n × out) of x (n × in). For the backward pass it keeps the codes, which are there anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, steps: Tensor, zeros: Tensor, form: tuple[int, int, int]
    ) -> Tensor:
        ctx.save_for_backward(codes, steps, zeros)
        ctx.form = form
        y = x.new_empty(len(x), len(codes))
        for rows in _tiles(len(codes), form[2]):
            y[:, rows] = times(x, _written_out(codes[rows], steps[rows], zeros[rows], form, x.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, steps, zeros = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        wide = torch.promote_types(grad.dtype, torch.float32)
        of_x = grad.new_zeros(len(grad), ctx.form[2], dtype=wide)
        for rows in _tiles(len(codes), ctx.form[2]):
            of_x += grad[:, rows] @ _written_out(codes[rows], steps[rows], zeros[rows], ctx.form, grad.dtype)
        return of_x.to(grad.dtype), None, None, None, None


def _tiles(out: int, in_: int) -> list[slice]:
    """Rows of Wq that are written out together."""
    rows = max(1, TILE // in_)
    return [slice(start, min(start + rows, out)) for start in range(0, out, rows)]


def nearest_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up (out × r) and down (r × in) of the nearest product, each singular value shared evenly."""
    if rank == 0:
        return error[:, :0], error[:0]
    u, s, vh = svd_top(error, rank)
    root = s.sqrt()
    return u * root, root[:, None] * vh


def coded_bits(out: int, in_: int, bits: int, group_size: int) -> int:
    """Bits of the codes, and of each group's step and zero."""
    groups = -(-in_ // group_size)
    return out * (8 * packed_size(in_, bits) + 16 * groups + 8 * packed_size(groups, bits))


def check_grid(bits: int, group_size: int) -> None:
    """Raise UsageError for what is no grid."""
    if isinstance(bits, bool) or bits not in WIDTHS:
        raise UsageError(f"bits={bits!r}: codes have 2, 3, 4 or 8 bits")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise UsageError(f"group_size={group_size!r} must be a whole number of at least 1")
