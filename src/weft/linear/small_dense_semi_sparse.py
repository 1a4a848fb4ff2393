"""Small dense times semi-sparse: a few directions for each block of inputs, of which every output takes as many.

    W = [S₁·D₁ … S_n·D_n]       y = Σ_b S_b·(D_b·x_b) + b      D_b: k × m, together k × in, `atoms`
                                                               S_b: out × k with s entries in each row, `values`

The inputs are cut into n blocks of m, the last of which may be narrower. Stored are k·in + n·out·s numbers, and where
the values are: for each row a bit an atom, or s·n bytes (words from 257 atoms on), whichever is shorter. With
axis="out" the outputs are cut instead, and Wᵀ has the form: each input has as many entries in each block of outputs.

A block's low rank is the case k = s. What is saved is memory, not time: as `dictionary`, of whose kind of product this
is one.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from weft.algebra.blocks import column_blocks, joined, times_blocks
from weft.algebra.random import generator
from weft.algebra.sparse_coding import SparseCode, optimal_directions
from weft.errors import UsageError
from weft.linear._codes import Coded, offsets
from weft.linear._structured import computed_in

Axis = Literal["in", "out"]


class SmallDenseSemiSparse(Coded):
    """W = [S₁·D₁ … S_n·D_n], or its transpose."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        atoms: int,
        nonzeros: int,
        axis: Axis = "in",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            block_size: m.
            atoms: k of each block.
            nonzeros: s, of a row in each block.
            axis: what is cut into blocks: "in" or "out".
        """
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        if axis not in get_args(Axis):
            raise UsageError(f"axis={axis!r}: in or out, whichever is cut into blocks")
        rows, side = (out_features, in_features) if axis == "in" else (in_features, out_features)
        if not 1 <= block_size <= side:
            raise UsageError(f"block_size={block_size}: a block has from 1 to {side} of the {axis}puts")
        if not 1 <= nonzeros <= atoms:
            raise UsageError(f"nonzeros={nonzeros}, atoms={atoms}: a row takes from 1 to all of a block's atoms")
        self.block_size, self.axis = block_size, axis
        self.atoms = nn.Parameter(torch.empty(atoms, side, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._make_codes(atoms, nonzeros, device, dtype, rows=rows, blocks=-(-side // block_size))

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls,
        found: SparseCode,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        *,
        axis: Axis = "in",
        dtype: torch.dtype | None = None,
    ) -> SmallDenseSemiSparse:
        """Of the blocks' codes: atoms n × k × m, `index` (ascending) and `values` n × rows × s; in `dtype`, that of
        the atoms if not given."""
        _, k, m = found.atoms.shape
        sizes: Any = {"block_size": m, "atoms": k, "nonzeros": found.values.shape[-1], "axis": axis}
        own: Any = {"bias": bias is not None, "device": found.atoms.device, "dtype": dtype or found.atoms.dtype}
        layer = cls(in_features, out_features, **sizes, **own)
        layer.atoms.copy_(joined(found.atoms, layer.atoms.shape[1]))
        layer.set_codes(found.index, found.values)
        if bias is not None and layer.shift is not None:
            layer.shift.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        block_size: int,
        atoms: int,
        nonzeros: int,
        axis: Axis = "in",
    ) -> SmallDenseSemiSparse:
        """A W near the given one in the Frobenius norm; exact where nonzeros reaches the block's size."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        blocks = column_blocks(wide if axis == "in" else wide.mT, block_size)
        found = optimal_directions(blocks, atoms, nonzeros, generator=generator("small_dense_semi_sparse"))
        out, in_ = weight.shape
        return cls.from_codes(found, in_, out, bias, axis=axis, dtype=weight.dtype)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.shift

    @torch.no_grad()
    def set_codes(self, index: Tensor, values: Tensor) -> None:
        """S by blocks: places in a block (n × rows × s, ascending) and values there."""
        many, rows, s = index.shape
        flat = index.transpose(0, 1).reshape(rows, many * s) + offsets(len(self.atoms), s, many, index)
        self._set_codes(flat, values.transpose(0, 1).reshape(rows, many * s))

    def codes(self) -> tuple[Tensor, Tensor]:
        """What `set_codes` takes."""
        within = self.places.long() - offsets(len(self.atoms), self.nonzeros, self._blocks, self.places)
        index, values = (t.view(len(t), self._blocks, -1).transpose(0, 1) for t in (within, self.values.detach()))
        return index, values

    def dictionaries(self, dtype: torch.dtype | None = None) -> Tensor:
        """D_b, n × k × m; of a last block that is narrower the rest is zero."""
        return column_blocks(self.atoms.to(dtype or self.atoms.dtype), self.block_size)

    def options(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "atoms": len(self.atoms),
            "nonzeros": self.nonzeros,
            "axis": self.axis,
        }

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(computed_in(x))
        d = self.dictionaries(x.dtype)
        if self.axis == "in":
            x = pad(x, (0, -self.in_features % self.block_size))
            return self._times_codes(times_blocks(x, d.mT), self.shift)
        y = times_blocks(self._onto_codes(x), d)[..., : self.out_features]
        return y if self.shift is None else y + self.shift.to(y.dtype)

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.values.dtype, torch.float32)
        v = times_blocks(self._written_out(wide), self.dictionaries(wide))[:, : self.atoms.shape[1]]
        return (v if self.axis == "in" else v.mT).to(self.values.dtype)
