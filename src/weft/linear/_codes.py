"""A sparse matrix with as many entries in each row: how it is stored, and how it is multiplied by.

S (out × k) has s entries in each row, v (out × s), `values`, at places that take, for each row, a bit a column, or s
whole numbers of 8, 16 or 32 bits, whichever is shorter: `support`. In memory are the whole numbers besides.

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
from torch.nn.functional import linear

from weft.algebra.bits import pack, unpack
from weft.algebra.sparse_coding import spread
from weft.errors import WeftError
from weft.linear._structured import StructuredLinear

TILE = 256  # rows of S that are written out at a time: few enough to stay near the processor
FEW = 64  # rows of x up to which the sparse product of a processor is faster, and which it takes at a time
THIN = 0.125  # share of a row's entries up to which it is faster with any number, but for half the bits
SPARSE = torch.backends.mkl.is_available()  # whether there is one


class Coded(StructuredLinear):
    """A linear layer with an S (out × k) in it, which `_make_codes` makes."""

    values: nn.Parameter
    support: Tensor
    places: Tensor  # out × s, ascending, as whole numbers; not stored

    def _make_codes(self, k: int, s: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """S without values, for a constructor."""
        self._width = k
        self.values = nn.Parameter(torch.empty(self.out_features, s, device=device, dtype=dtype))
        first = torch.arange(s, device=device).expand(self.out_features, -1)
        self.register_buffer("support", stored(first, k))
        self.register_buffer("places", first.to(smallest_int(k)), persistent=False)
        self.register_load_state_dict_post_hook(_derived)

    @property
    def nonzeros(self) -> int:
        """s."""
        return self.values.shape[1]

    def _set_codes(self, index: Tensor, values: Tensor) -> None:
        """S with values (out × s) at places (out × s, ascending)."""
        self.values.copy_(values)
        self.support.copy_(stored(index, self._width))
        self.derive()

    def derive(self) -> None:
        k, s = self._width, self.nonzeros
        if not as_bits(k, s):
            self.places = self.support.clone()
            return
        mask = unpack(self.support, k)
        if bool((mask.sum(1) != s).any()):
            raise WeftError(f"each output of this layer takes {s} of {k}, and its support names more or fewer")
        self.places = mask.nonzero()[:, 1].view(-1, s).to(smallest_int(k))

    def _times_codes(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """z·Sᵀ + b (… × out) of z (… × k), in its dtype."""
        values, bias = self.values.to(z.dtype), None if bias is None else bias.to(z.dtype)
        flat = z.reshape(-1, self._width)
        y = (_sparse if _is_faster(flat, self.nonzeros) else _Codes.apply)(flat, values, bias, self.places)
        return y.view(*z.shape[:-1], self.out_features)

    def _written_out(self, dtype: torch.dtype) -> Tensor:
        """S (out × k)."""
        return spread(self.places.long(), self.values.to(dtype), self._width)


def _is_faster(z: Tensor, s: int) -> bool:
    """Whether a sparse product is there, and faster. It knows neither gradients of the values nor autocast."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not SPARSE or z.device.type != "cpu" or len(z) == 0:
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
            parts.append(linear(z, tile, None if bias is None else bias[rows]))
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


def _derived(layer: Coded, keys: Any) -> None:
    """After loading by torch alone."""
    layer.derive()


def stored(index: Tensor, k: int) -> Tensor:
    """Places (out × s, ascending) as they are stored."""
    if not as_bits(k, index.shape[1]):
        return index.to(smallest_int(k))
    return pack(torch.zeros(len(index), k, dtype=torch.bool, device=index.device).scatter_(1, index, True))


def smallest_int(k: int) -> torch.dtype:
    """The smallest type that holds 0 to k − 1."""
    return next(t for t in (torch.uint8, torch.int16, torch.int32, torch.int64) if k - 1 <= torch.iinfo(t).max)


def as_bits(k: int, s: int) -> bool:
    """Whether k bits take less than s whole numbers."""
    return -(-k // 8) <= s * smallest_int(k).itemsize


def support_bits(k: int, s: int) -> int:
    """Bits in which the places of s values among k are stored."""
    return 8 * min(-(-k // 8), s * smallest_int(k).itemsize)
