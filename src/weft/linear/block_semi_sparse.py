"""Block semi-sparse: a core with two of each four entries between two block-diagonal matrices.

    y = A·C·B·x + b     A: out/b_out blocks of b_out × b_out, `left`;  B: in/b_in blocks of b_in × b_in, `right`
                        C: out × in, of each four consecutive entries of a row `kept` are stored;  b: out, `offset`

out·in·kept/4 + b_out·out + b_in·in numbers and out·in bits in place of out·in numbers. Two of four is what the sparse
tensor cores of GPUs multiply; four of four is a plain matrix, without the bits. Where 4 does not divide in, the last
entries of a row are a group of fewer.

The bits say which entries are kept: one an entry, which is what two positions of two bits take for a group of four.
They lie row by row, eight in a byte, the lowest bit first; `values` (out × kept of a row) are in that order.

What is in memory beside the stored tensors: the core unpacked to out × in, as large as W, from the first forward pass
that does not train the values; on GPUs that multiply it (float16 or bfloat16, out a multiple of 32 and in of 64), the
compressed core as well, from the first pass without a gradient. Values that were written through `.data`, which torch
does not notice, are unpacked anew after `derive()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.algebra.bits import pack, unpack
from weft.algebra.blocks import blocks_times, times_blocks
from weft.algebra.matmul import times
from weft.errors import UsageError
from weft.linear._structured import StructuredLinear


class BlockSemiSparse(StructuredLinear):
    """W = A·C·B."""

    bits: Tensor
    offset: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_out: int,
        block_in: int,
        kept: int = 2,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        for name, block, side in (("block_out", block_out, out_features), ("block_in", block_in, in_features)):
            if block < 1 or side % block:
                raise UsageError(f"{name}={block}: blocks must divide the side of {side} that they lie along")
        if not 1 <= kept <= 4:
            raise UsageError(f"kept={kept}: of four entries 1 to 4 are kept")
        self.block_out, self.block_in, self.kept = block_out, block_in, kept

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.left = parameter(out_features // block_out, block_out, block_out)
        self.right = parameter(in_features // block_in, block_in, block_in)
        self.values = parameter(out_features, kept_of(in_features, kept))
        many = 0 if kept == 4 else -(-out_features * in_features // 8)
        self.register_buffer("bits", torch.empty(many, device=device, dtype=torch.uint8))
        self.register_parameter("offset", parameter(out_features) if bias else None)
        self._unpacked: tuple[Any, Tensor, Tensor | None] | None = None

    @classmethod
    @torch.no_grad()
    def from_parts(
        cls,
        left: Tensor,
        core: Tensor,
        mask: Tensor,
        right: Tensor,
        bias: Tensor | None = None,
        *,
        kept: int = 2,
        dtype: torch.dtype | None = None,
    ) -> BlockSemiSparse:
        """W = diag(left)·(core ∘ mask)·diag(right), in `dtype` (that of the core if not given).

        The mask (out × in, boolean) must have `kept` ones in each four entries of a row.
        """
        (out, in_), dtype = core.shape, dtype or core.dtype
        options = {"block_out": left.shape[1], "block_in": right.shape[1], "kept": kept}
        layer = cls(in_, out, **options, bias=bias is not None, device=core.device, dtype=dtype)
        layer.left.copy_(left)
        layer.right.copy_(right)
        layer.values.copy_(core[mask].view_as(layer.values))
        layer.bits.copy_(packed(mask)[: len(layer.bits)])
        if bias is not None and layer.offset is not None:
            layer.offset.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, *, block_out: int, block_in: int, kept: int = 2
    ) -> BlockSemiSparse:
        """The largest entries of each four, between identities."""
        left, right = identities(weight, block_out, block_in)
        return cls.from_parts(left, weight, largest(weight.abs(), kept), right, bias, kept=kept)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.offset

    def options(self) -> dict[str, Any]:
        return {"block_out": self.block_out, "block_in": self.block_in, "kept": self.kept}

    def forward(self, x: Tensor) -> Tensor:
        x = times_blocks(x, self.right.mT)
        x = times_blocks(times(x, self._core(x)), self.left.mT)
        return x if self.offset is None else x + self.offset

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.values.dtype, torch.float32)
        rows = blocks_times(self.left.to(wide), self._unpack().to(wide))
        return times_blocks(rows, self.right.to(wide)).to(self.values.dtype)

    def derive(self) -> None:
        self._unpacked = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": None}  # copies and pickles carry what is stored

    def _unpack(self) -> Tensor:
        """C, out × in; gradients reach the values."""
        if self.kept == 4:
            return self.values
        mask = unpacked(self.bits, self.out_features, self.in_features)
        return self.values.new_zeros(mask.shape).masked_scatter(mask, self.values)

    def _core(self, x: Tensor) -> Tensor:
        """C as it is multiplied fastest by x: as unpacked before, as long as the values have not changed."""
        v = self.values
        if self.kept == 4 or (v.requires_grad and torch.is_grad_enabled()):
            return self._unpack()
        if torch.compiler.is_compiling() or v.is_inference():
            return self._unpack()
        stamp = (v._version, v.data_ptr(), self.bits._version)
        if self._unpacked is None or self._unpacked[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():
                self._unpacked = (stamp, self._unpack(), None)
        _, core, compressed = self._unpacked
        if not _on_tensor_cores(core, self.kept) or (x.requires_grad and torch.is_grad_enabled()):
            return core
        if compressed is None:
            with torch.inference_mode(False), torch.no_grad():
                compressed = torch.sparse.to_sparse_semi_structured(core)
            self._unpacked = (stamp, core, compressed)
        return compressed


def _on_tensor_cores(core: Tensor, kept: int) -> bool:
    return (
        kept <= 2
        and core.is_cuda
        and core.dtype in (torch.float16, torch.bfloat16)
        and core.shape[0] % 32 == 0
        and core.shape[1] % 64 == 0
        and torch.cuda.get_device_capability(core.device) >= (8, 0)
    )


def kept_of(in_: int, kept: int) -> int:
    """How many entries of a row are kept."""
    return in_ // 4 * kept + min(in_ % 4, kept)


def largest(size: Tensor, kept: int) -> Tensor:
    """Where the `kept` largest of each four entries of a row are: boolean, out × in; the first ones where they tie."""
    out, in_ = size.shape
    short = -in_ % 4
    groups = torch.nn.functional.pad(size, (0, short), value=-1.0).view(out, -1, 4)
    order = groups.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (order < kept).view(out, -1)[:, :in_]


def identities(like: Tensor, block_out: int, block_in: int) -> tuple[Tensor, Tensor]:
    """Blocks of A and B that change nothing of a matrix (out × in), in its dtype."""
    return tuple(  # type: ignore[return-value]
        torch.eye(block, dtype=like.dtype, device=like.device).repeat(side // block, 1, 1)
        for block, side in zip((block_out, block_in), like.shape)
    )


def packed(mask: Tensor) -> Tensor:
    """A mask's bits in reading order, eight in a byte (uint8), the lowest first; the last byte is filled with zeros."""
    return pack(mask.flatten()[None])[0]


def unpacked(bits: Tensor, out: int, in_: int) -> Tensor:
    """The mask (out × in, boolean) that was packed."""
    return unpack(bits[None], out * in_)[0].view(out, in_)
