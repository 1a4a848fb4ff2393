"""A sparse matrix with as many entries in each row: how it is stored, and how it is multiplied by.

S (out × k) has s entries in each row, v (out × s), `values`, at places that take, for each row, a bit a column, or s
whole numbers of 8, 16 or 32 bits, whichever is shorter: `support`. In memory are the whole numbers besides. Where S is
several blocks of k columns side by side, a row has s entries in each of them, and the numbers count within a block.

With many rows of x, S is written out for some of its rows at a time and multiplied as a dense matrix; a processor
multiplies by the sparse matrix where that is faster, with few rows of x, or few entries in a row of S and float32.
benchmarks/sparse_coding.py and benchmarks/low_rank_plus_sparse.py measure the ways.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.algebra.bits import pack, unpack
from weft.algebra.matmul import FASTER, eager, times
from weft.algebra.sparse_coding import spread
from weft.errors import WeftError
from weft.linear._structured import StructuredLinear

TILE = 256  # rows of S that are written out at a time: few enough to stay near the processor
FEW = 32 if FASTER else 64  # rows of x up to which the sparse product of a processor wins, and which it takes at a time
THIN = 0.125  # share of a row's entries up to which it is faster with any number, but for half the bits
SPARSE = torch.backends.mkl.is_available()  # whether there is one


class Coded(StructuredLinear):
    """A linear layer with an S (rows × k, a row for each output if nothing else is said) in it, which `_make_codes`
    makes."""

    values: nn.Parameter
    support: Tensor
    places: Tensor  # rows × s, ascending, as whole numbers; not stored

    def _make_codes(
        self,
        k: int,
        s: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        rows: int | None = None,
        blocks: int = 1,
    ) -> None:
        """S without values, for a constructor; k and s are those of a block."""
        rows = self.out_features if rows is None else rows
        self._width, self._blocks = k * blocks, blocks
        self.values = nn.Parameter(torch.empty(rows, s * blocks, device=device, dtype=dtype))
        first = (torch.arange(s, device=device) + offsets(k, 1, blocks, device)[:, None]).flatten().expand(rows, -1)
        self.register_buffer("support", stored(first, k, blocks))
        self.register_buffer("places", first.to(smallest_int(self._width)), persistent=False)
        self.register_load_state_dict_post_hook(_derived)

    @property
    def nonzeros(self) -> int:
        """s."""
        return self.values.shape[1] // self._blocks

    def _set_codes(self, index: Tensor, values: Tensor) -> None:
        """S with values (rows × s, of all blocks) at places (rows × s, ascending, among all columns)."""
        self.values.copy_(values)
        self.support.copy_(stored(index, self._width // self._blocks, self._blocks))
        self.derive()

    def derive(self) -> None:
        k, s, blocks = self._width // self._blocks, self.nonzeros, self._blocks
        narrow = smallest_int(self._width)
        if not as_bits(k, s, blocks):
            within = self.support.clone() if blocks == 1 else self.support.long() + offsets(k, s, blocks, self.support)
            self.places = within.to(narrow)
            return
        mask = unpack(self.support, self._width)
        if bool((mask.view(len(mask), blocks, k).sum(-1) != s).any()):
            raise WeftError(f"each output of this layer takes {s} of {k}, and its support names more or fewer")
        self.places = mask.nonzero()[:, 1].view(-1, s * blocks).to(narrow)

    def _times_codes(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """z·Sᵀ + b (… × out) of z (… × k), in its dtype."""
        values, bias = self.values.to(z.dtype), None if bias is None else bias.to(z.dtype)
        flat = z.reshape(-1, self._width)
        y = (_sparse if _is_faster(flat, values.shape[1]) else _Codes.apply)(flat, values, bias, self.places)
        return y.view(*z.shape[:-1], len(values))

    def _onto_codes(self, x: Tensor) -> Tensor:
        """x·S (… × k) of x (… × rows), in its dtype."""
        z = _Onto.apply(x.reshape(-1, len(self.values)), self.values.to(x.dtype), self.places, self._width)
        return z.view(*x.shape[:-1], self._width)

    def _written_out(self, dtype: torch.dtype) -> Tensor:
        """S (rows × k)."""
        return spread(self.places.long(), self.values.to(dtype), self._width)


def _is_faster(z: Tensor, s: int) -> bool:
    """Whether a sparse product is there, and faster. It knows neither gradients of the values nor autocast."""
    if not (SPARSE and eager(z) and len(z)):
        return False
    return len(z) <= FEW or (s <= THIN * z.shape[1] and z.element_size() >= 4)


def _sparse(z: Tensor, values: Tensor, bias: Tensor | None, places: Tensor) -> Tensor:
    """z·Sᵀ + b (n × out) of z (n × k), in float32 at least, for which there are sparse products."""
    out, s = values.shape
    wide = torch.promote_types(z.dtype, torch.float32)
    starts = torch.arange(0, out * s + 1, s, dtype=torch.int32)
    _ask_for_sparse()
    codes = torch.sparse_csr_tensor(starts, places.flatten().int(), values.flatten().to(wide), (out, z.shape[1]))
    if len(z) == 1:  # a vector is a case of its own, several times as fast as a matrix of one column
        y = (codes @ z[0].to(wide))[None]
    else:
        y = torch.empty(len(z), out, dtype=wide)
        for start in range(0, len(z), FEW):  # whose columns stay near the processor
            rows = slice(start, start + FEW)
            y[rows] = (codes @ z[rows].mT.to(wide).contiguous()).mT
    return (y if bias is None else y + bias).to(z.dtype)


@functools.cache
def _ask_for_sparse() -> None:
    """Hear once, and not pass on, that torch calls these tensors a beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))


class _Codes(torch.autograd.Function):
    """z·Sᵀ + b (n × out) of z (n × k). Autograd alone would keep S, written out, until the backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor, bias: Tensor | None, places: Tensor) -> Tensor:
        ctx.save_for_backward(z, values, places)
        parts = []
        for start in range(0, len(values), TILE):
            rows = slice(start, start + TILE)
            tile = spread(places[rows].long(), values[rows], z.shape[1])
            parts.append(times(z, tile, None if bias is None else bias[rows]))
        return torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, values, places = ctx.saved_tensors
        wants_z, wants_values, wants_bias, _ = ctx.needs_input_grad
        of_z = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32)) if wants_z else None
        of_values = torch.empty_like(values) if wants_values else None
        for start in range(0, len(values), TILE):
            rows = slice(start, start + TILE)
            g, index = grad[:, rows], places[rows].long()
            if of_z is not None:
                of_z += g @ spread(index, values[rows], z.shape[1])
            if of_values is not None:
                of_values[rows] = (g.mT @ z).gather(1, index)
        return None if of_z is None else of_z.to(z.dtype), of_values, grad.sum(0) if wants_bias else None, None


class _Onto(torch.autograd.Function):
    """x·S (n × k) of x (n × rows), of which S is kept as little as by `_Codes`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(x, values, places)
        z = torch.zeros(len(x), k, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for start in range(0, len(values), TILE):
            rows = slice(start, start + TILE)
            z += x[:, rows] @ spread(places[rows].long(), values[rows], k)
        return z.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, places = ctx.saved_tensors
        wants_x, wants_values, *_ = ctx.needs_input_grad
        of_x = torch.empty_like(x) if wants_x else None
        of_values = torch.empty_like(values) if wants_values else None
        for start in range(0, len(values), TILE):
            rows = slice(start, start + TILE)
            index = places[rows].long()
            if of_x is not None:
                of_x[:, rows] = grad @ spread(index, values[rows], grad.shape[1]).mT
            if of_values is not None:
                of_values[rows] = (x[:, rows].mT @ grad).gather(1, index)
        return of_x, of_values, None, None


def _derived(layer: Coded, keys: Any) -> None:
    """After loading by torch alone."""
    layer.derive()


def stored(index: Tensor, k: int, blocks: int = 1) -> Tensor:
    """Places (rows × s·blocks, ascending, among all columns) as they are stored."""
    rows, many = index.shape
    if not as_bits(k, many // blocks, blocks):
        return (index - offsets(k, many // blocks, blocks, index)).to(smallest_int(k))
    return pack(torch.zeros(rows, k * blocks, dtype=torch.bool, device=index.device).scatter_(1, index, True))


def offsets(k: int, s: int, blocks: int, like: Tensor | torch.device | str | None) -> Tensor:
    """Where the block begins of each of a row's places (s·blocks)."""
    device = like.device if isinstance(like, Tensor) else like
    return torch.arange(0, k * blocks, k, device=device).repeat_interleave(s)


def smallest_int(k: int) -> torch.dtype:
    """The smallest type that holds 0 to k − 1."""
    return next(t for t in (torch.uint8, torch.int16, torch.int32, torch.int64) if k - 1 <= torch.iinfo(t).max)


def as_bits(k: int, s: int, blocks: int = 1) -> bool:
    """Whether a bit for each of k columns takes less than s whole numbers, a row."""
    return -(-k * blocks // 8) <= s * blocks * smallest_int(k).itemsize


def support_bits(k: int, s: int, blocks: int = 1) -> int:
    """Bits in which the places of a row's values are stored, s among k in each block."""
    return 8 * min(-(-k * blocks // 8), s * blocks * smallest_int(k).itemsize)
