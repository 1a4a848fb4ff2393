"""Dictionary: every output a sum of a few atoms of its own, from a dictionary that all outputs share.

    z = x·D,    y_o = Σ_j v_oj·z_{i_oj} + b_o        D: in × k, `atoms` (as k × in);  v: out × s, `values`;  b: out

W = (D·S)ᵀ, where column o of S (k × out) holds row o of v at the places i_o. That is k·in + s·out numbers; where they
are takes, for each output, a bit an atom, or s whole numbers of 8, 16 or 32 bits, whichever is shorter: `support`. For
s near k/2 nothing can be shorter than the bits.

Layers of as many inputs can share D. One of them, their leader, has it as its `atoms`; each of the others holds on to
the leader, which stays a layer of the model and no part of theirs: D is one parameter, is stored once, and whatever is
done to the leader's `atoms` (an adapter, say) is done to all.

With many rows of x, S is written out for some outputs at a time and multiplied as a dense matrix: at the ratios k/s in
use S is between a quarter and two thirds full, and no sparse product is faster. A processor multiplies few rows by the
sparse matrix, since to write S out would cost more than to multiply by it. benchmarks/sparse_coding.py measures the
ways. What is saved is memory; time only where x has few rows, and W many numbers (benchmarks/inference.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.algebra.random import generator
from weft.algebra.sparse_coding import ksvd
from weft.errors import UsageError
from weft.linear._codes import Coded
from weft.linear._structured import Factor, bare


class Dictionary(Coded):
    """W = (D·S)ᵀ."""

    version = 2  # the first without a leader
    leader: Dictionary | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        atoms: int,
        nonzeros: int,
        bias: bool = False,
        leader: Dictionary | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        if not 1 <= nonzeros <= atoms:
            raise UsageError(f"nonzeros={nonzeros}, atoms={atoms}: an output takes from 1 to all of the atoms")
        self.__dict__["leader"] = leader  # out of torch's sight, which would store the leader with each layer
        if leader is None:
            self.atoms = bare(Factor, in_features, atoms, bias=False, device=device, dtype=dtype)
        elif not isinstance(leader, Dictionary) or leader.leader is not None:
            raise UsageError("its leader has no dictionary of its own")
        elif (leader.in_features, leader._width) != (in_features, atoms):
            raise UsageError(
                f"it takes {atoms} atoms of {in_features} inputs, and its leader has {leader._width} of "
                f"{leader.in_features}"
            )
        self.shift = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._make_codes(atoms, nonzeros, device, dtype)

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls,
        atoms: Tensor,
        index: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        leader: Dictionary | None = None,
    ) -> Dictionary:
        """Atoms k × in, and for each output which it takes (out × s, ascending) and how much of each (out × s).

        In `dtype`, that of `atoms` if not given. With a leader, whose atoms they are, no others are stored.
        """
        (k, in_), (out, s) = atoms.shape, values.shape
        own: Any = {"bias": bias is not None, "device": atoms.device, "dtype": dtype or atoms.dtype}
        layer = cls(in_, out, atoms=k, nonzeros=s, leader=leader, **own)
        if leader is None:
            layer.atoms.weight.copy_(atoms)
        if bias is not None and layer.shift is not None:
            layer.shift.copy_(bias)
        layer._set_codes(index, values)
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

    @property
    def dictionary(self) -> nn.Linear:
        """D, its own or its leader's."""
        return self.atoms if self.leader is None else self.leader.atoms

    def options(self) -> dict[str, Any]:
        return {"atoms": self._width, "nonzeros": self.nonzeros}

    def spec(self) -> dict[str, Any]:
        return super().spec() | ({"version": 1} if self.leader is None else {})

    def forward(self, x: Tensor) -> Tensor:
        return self._times_codes(self.dictionary(x), self.shift)

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.values.dtype, torch.float32)
        return (self._written_out(wide) @ self.dictionary.weight.to(wide)).to(self.values.dtype)
