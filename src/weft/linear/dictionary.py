"""Dictionary: every output a sum of a few atoms of its own, from a dictionary that all outputs share.

    z = x·D,    y_o = Σ_j v_oj·z_{i_oj} + b_o        D: in × k, `atoms` (as k × in);  v: out × s, `values`;  b: out

W = (D·S)ᵀ, where column o of S (k × out) holds row o of v at the places i_o. That is k·in + s·out numbers; where they
are takes, for each output, a bit an atom, or s whole numbers of 8, 16 or 32 bits, whichever is shorter: `support`. For
s near k/2 nothing can be shorter than the bits. In memory are the whole numbers besides.

With many rows of x, S is written out for some outputs at a time and multiplied as a dense matrix: at the ratios k/s in
use S is between a quarter and two thirds full, and no sparse product is faster. A processor multiplies few rows by the
sparse matrix, since to write S out would cost more than to multiply by it. benchmarks/sparse_coding.py measures the
ways. What is saved is memory, not time.
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
from weft.algebra.random import generator
from weft.algebra.sparse_coding import ksvd, spread
from weft.errors import UsageError, WeftError
from weft.linear._structured import StructuredLinear, bare_linear

TILE = 256  # outputs for which S is written out at a time: few enough to stay near the processor
FEW = 64  # rows up to which the sparse product of a processor is faster
SPARSE = torch.backends.mkl.is_available()  # whether there is one


class Dictionary(StructuredLinear):
    """W = (D·S)ᵀ."""

    support: Tensor
    places: Tensor  # out × s, ascending, as whole numbers; not stored

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        atoms: int,
        nonzeros: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        if not 1 <= nonzeros <= atoms:
            raise UsageError(f"nonzeros={nonzeros}, atoms={atoms}: an output takes from 1 to all of the atoms")
        self.nonzeros = nonzeros
        self.atoms = bare_linear(in_features, atoms, False, device, dtype)
        self.values = nn.Parameter(torch.empty(out_features, nonzeros, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        first = torch.arange(nonzeros, device=device).expand(out_features, -1)
        self.register_buffer("support", _support(first, atoms))
        self.register_buffer("places", first.to(smallest_int(atoms)), persistent=False)
        self.register_load_state_dict_post_hook(_derived)

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls,
        atoms: Tensor,
        index: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Dictionary:
        """Atoms k × in, and for each output which it takes (out × s, ascending) and how much of each (out × s).

        In `dtype`, that of `atoms` if not given.
        """
        (k, in_), (out, s) = atoms.shape, values.shape
        layer = cls(
            in_, out, atoms=k, nonzeros=s, bias=bias is not None, device=atoms.device, dtype=dtype or atoms.dtype
        )
        layer.atoms.weight.copy_(atoms)
        layer.values.copy_(values)
        if bias is not None and layer.shift is not None:
            layer.shift.copy_(bias)
        layer.support.copy_(_support(index, k))
        layer.derive()
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, atoms: int, nonzeros: int) -> Dictionary:
        """A W near the given one in the Frobenius norm, by K-SVD; exact where nonzeros reaches min(out, in)."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        found = ksvd(wide, atoms, nonzeros, generator=generator("dictionary"))
        return cls.from_codes(found.atoms, found.index, found.values, bias, weight.dtype)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.shift

    def options(self) -> dict[str, Any]:
        return {"atoms": self.atoms.out_features, "nonzeros": self.nonzeros}

    def derive(self) -> None:
        k, s = self.atoms.out_features, self.nonzeros
        if not as_bits(k, s):
            self.places = self.support.clone()
            return
        mask = unpack(self.support, k)
        if bool((mask.sum(1) != s).any()):
            raise WeftError(f"an output of this layer takes {s} of {k} atoms, and its support names more or fewer")
        self.places = mask.nonzero()[:, 1].view(-1, s).to(smallest_int(k))

    def forward(self, x: Tensor) -> Tensor:
        z = self.atoms(x)
        values, bias = self.values.to(z.dtype), None if self.shift is None else self.shift.to(z.dtype)
        flat = z.reshape(-1, z.shape[-1])
        y = (_sparse if _are_few(flat) else _Codes.apply)(flat, values, bias, self.places)
        return y.view(*z.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.values.dtype, torch.float32)
        codes = spread(self.places.long(), self.values.to(wide), self.atoms.out_features)
        return (codes @ self.atoms.weight.to(wide)).to(self.values.dtype)


def _are_few(z: Tensor) -> bool:
    """Whether a sparse product is there, and faster. It knows neither gradients of the values nor autocast."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return SPARSE and z.device.type == "cpu" and 0 < len(z) <= FEW


def _sparse(z: Tensor, values: Tensor, bias: Tensor | None, places: Tensor) -> Tensor:
    """z·S + b (n × out) of z (n × k), in float32 at least, for which there are sparse products."""
    out, s = values.shape
    wide = torch.promote_types(z.dtype, torch.float32)
    starts = torch.arange(0, out * s + 1, s, dtype=torch.int32)
    _ask_for_sparse()
    codes = torch.sparse_csr_tensor(starts, places.flatten().int(), values.flatten().to(wide), (out, z.shape[1]))
    # a vector is a case of its own, several times as fast as a matrix of one column
    y = (codes @ z[0].to(wide))[None] if len(z) == 1 else (codes @ z.mT.to(wide).contiguous()).mT.contiguous()
    return (y if bias is None else y + bias).to(z.dtype)


@functools.cache
def _ask_for_sparse() -> None:
    """Hear once, and not pass on, that torch calls these tensors a beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))


class _Codes(torch.autograd.Function):
    """z·S + b (n × out) of z (n × k). Autograd alone would keep S, written out, until the backward pass."""

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


def _derived(layer: Dictionary, keys: Any) -> None:
    """After loading by torch alone."""
    layer.derive()


def _support(index: Tensor, k: int) -> Tensor:
    """Places (out × s, ascending) as they are stored."""
    if not as_bits(k, index.shape[1]):
        return index.to(smallest_int(k))
    return pack(torch.zeros(len(index), k, dtype=torch.bool, device=index.device).scatter_(1, index, True))


def smallest_int(k: int) -> torch.dtype:
    """The smallest type that holds 0 to k − 1."""
    return next(t for t in (torch.uint8, torch.int16, torch.int32) if k - 1 <= torch.iinfo(t).max)


def as_bits(k: int, s: int) -> bool:
    """Whether k bits take less than s whole numbers."""
    return -(-k // 8) <= s * smallest_int(k).itemsize


def support_bits(k: int, s: int) -> int:
    """Bits in which the places of s values among k are stored."""
    return 8 * min(-(-k // 8), s * smallest_int(k).itemsize)
