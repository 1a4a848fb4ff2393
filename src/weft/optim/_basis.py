"""The basis of a gradient's leading subspace, fitted by a decomposition or by power steps from the last one."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

from torch import Size, Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from weft.algebra.random import generator
from weft.algebra.svd import leading_vectors, svd_top
from weft.errors import UsageError, nearest
from weft.optim._config import ProjectedConfig
from weft.optim._optimizer import Group, State, whole
from weft.optim._rules import Number
from weft.optim._sides import down, lift_

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


@dataclass
class BasisConfig(ProjectedConfig):
    """Options of optimisers that project on such a basis."""

    scale: float = field(default=1.0, metadata={"help": "multiplies the lifted update"})
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = field(
        default="std", metadata={"help": "which side is projected: the shorter (std), the longer, a fixed one, or both"}
    )
    inner: Literal["adamw", "adamw8bit", "adafactor", "sgd"] = field(
        default="adamw", metadata={"help": "the rule inside of the subspace"}
    )
    svd: Literal["warm", "exact"] = field(
        default="warm", metadata={"help": "how it is found: power steps from the last one, or a whole decomposition"}
    )
    eps: float = field(default=1e-6, metadata={"help": "added to √v"})


def check_basis(name: str, group: Group) -> None:
    """Raise UsageError for a `proj_type` or `svd` that the group of this optimiser cannot have."""
    for key, known in (("proj_type", PROJ_TYPES), ("svd", ("warm", "exact"))):
        if group[key] not in known:
            raise UsageError(f"{name}: unknown {key} {group[key]!r}: {nearest(str(group[key]), known)}")


def basis(proj_type: str, rank: int, svd: str, shape: Size) -> Basis:
    """The projector of a matrix (out × in): "std" is the basis of its shorter side, "reverse_std" of its longer one."""
    if proj_type in ("std", "reverse_std"):
        proj_type = "right" if (shape[0] >= shape[1]) == (proj_type == "std") else "left"
    return _basis(proj_type, rank, svd)


@functools.cache
def _basis(kind: str, rank: int, svd: str) -> Basis:
    return Basis(kind, rank, svd)


@dataclass(frozen=True)
class Basis:
    """Orthonormal bases of the gradient's sides: rows P (r × in) on the right, columns Q (out × r) on the left."""

    kind: str
    rank: int
    svd: str

    def fit(self, state: State, g: Tensor, like: Tensor, key: tuple[object, ...]) -> None:
        sides = ("left", "right") if self.kind == "full" else (self.kind,)
        if all(side in state for side in sides) and not bool(g.any()):
            return  # nothing to choose by
        exact = svd_top(g, self.rank) if self.svd == "exact" else None
        for side in sides:
            turned = g if side == "right" else g.mT
            if exact is not None:
                basis = exact[2].mT if side == "right" else exact[0]
            else:
                last = whole(state[side]).to(turned.device) if side in state else None
                last = last.mT if last is not None and side == "right" else last
                basis = leading_vectors(turned, self.rank, start=last, generator=generator(*key, side))
            basis = (basis.mT if side == "right" else basis).to(g.dtype).contiguous()
            if side == "left" and isinstance(like, DTensor):  # its rows go where W's rows are
                basis = distribute_tensor(basis, like.device_mesh, like.placements, src_data_rank=None)
            state[side] = basis

    def down(self, state: State, g: Tensor) -> Tensor:
        return down(g, state.get("left"), state.get("right"))

    def lift_(self, state: State, w: Tensor, n: Tensor, alpha: Number, beta: Number) -> None:
        lift_(w, n, state.get("left"), state.get("right"), alpha, beta)
