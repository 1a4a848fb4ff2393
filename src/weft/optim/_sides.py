"""Orthonormal bases of a gradient's sides: what is small along them, and what is large again.

`left` (out × r) spans columns, `right` (r × in) rows; either may be missing. Under FSDP2 g and w are row-sharded
DTensors; `left` is sharded as they are, `right` is whole on every process.
"""

from __future__ import annotations

from torch import Size, Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from weft.optim._rules import Number


def down(g: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """R = leftᵀ·g·rightᵀ. What lost g's rows is sharded by columns, or whole where both sides are small."""
    if left is not None:
        g = left.mT @ g
        if isinstance(g, DTensor):  # each process has the sum over its rows
            to = [Replicate() if right is not None or p.is_replicate() else Shard(1) for p in g.placements]
            g = g.redistribute(placements=to)
    if right is None:
        return g
    if not isinstance(g, DTensor):
        return g @ right.mT
    rank = right.shape[0]
    local, shape, stride = g.to_local() @ right.mT, Size((g.shape[0], rank)), (rank, 1)
    return DTensor.from_local(local, g.device_mesh, g.placements, run_check=False, shape=shape, stride=stride)


def lift_(w: Tensor, n: Tensor, left: Tensor | None, right: Tensor | None, alpha: Number, beta: Number) -> None:
    """w ← beta·w + alpha·left·n·right, in place, by one product into w."""
    n = n.to(w.dtype)
    if isinstance(w, DTensor):
        w = w.to_local()
        n = n.full_tensor() if left is not None else n.to_local()  # type: ignore[attr-defined]
    if left is not None:
        a = left.to_local() if isinstance(left, DTensor) else left
        b = n @ right if right is not None else n
    else:
        assert right is not None
        a, b = n, right
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        w.copy_(w * beta + alpha * (a @ b))
    else:
        w.addmm_(a, b, alpha=alpha, beta=beta)
