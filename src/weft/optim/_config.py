"""The config that every optimiser's config extends: what the command line and `weft.optim.for_trainer` take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from weft.errors import UsageError
from weft.registry import MethodConfig


@dataclass
class OptimConfig(MethodConfig):
    """Fields that all optimisers share. A method adds its own, each with `metadata={"help": ...}`."""

    common: ClassVar[bool] = True

    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"help": "decay of the two moments"})
    eps: float = field(default=1e-8, metadata={"help": "added to √v"})


@dataclass
class ProjectedConfig(OptimConfig):
    """Options of optimisers that project the gradients of a model's linear layers."""

    rank: int = field(default=128, metadata={"help": "r, directions of each gradient in which moments are kept"})
    update_proj_gap: int = field(default=200, metadata={"help": "steps between two choices of the directions"})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "layers to project: name endings or one regex; none takes every linear layer but the head"},
    )

    def __post_init__(self) -> None:
        for name in ("rank", "update_proj_gap"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")


