"""Products with block-diagonal matrices, and matrices cut into blocks of columns."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x·diag(blocks) (… × n·b), for x … × n·a and n blocks of a × b."""
    count, side, wide = blocks.shape
    if side == wide == 1:
        return x * blocks.flatten()
    columns = x.reshape(-1, count, side).transpose(0, 1)
    return (columns @ blocks).transpose(0, 1).reshape(*x.shape[:-1], count * wide)


def blocks_times(blocks: Tensor, x: Tensor) -> Tensor:
    """diag(blocks)·x, for x n × m and n/b blocks of b × b."""
    count, side, _ = blocks.shape
    return (blocks @ x.reshape(count, side, -1)).view(x.shape)


def column_blocks(x: Tensor, width: int) -> Tensor:
    """The blocks of columns of x (rows × n): ⌈n/width⌉ × rows × width, the last one filled with zeros."""
    rows, n = x.shape
    return pad(x, (0, -n % width)).view(rows, -1, width).transpose(0, 1)


def joined(blocks: Tensor, n: int) -> Tensor:
    """The inverse of `column_blocks`: rows × n."""
    return blocks.transpose(0, 1).flatten(1)[:, :n]
