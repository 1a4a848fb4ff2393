"""The config that every optimiser's config extends: what the command line and `weft.optim.for_trainer` take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from weft.errors import UsageError, nearest


@dataclass
class OptimConfig:
    """Fields that all optimisers share. A method adds its own, each with `metadata={"help": ...}`."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"help": "decay of the two moments"})
    eps: float = field(default=1e-8, metadata={"help": "added to √v"})

    @classmethod
    def slug(cls) -> str:
        """The method's name, which is its file's name."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def own_fields(cls) -> list[dataclasses.Field[Any]]:
        """The fields a user sets: the method's own first, then what all optimisers share."""
        shared = {f.name for f in dataclasses.fields(OptimConfig)}
        return sorted(dataclasses.fields(cls), key=lambda f: f.name in shared)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> OptimConfig:
        """Build from user-given options; an unknown key raises UsageError with the nearest name."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in options:
            if key not in known:
                raise UsageError(f"{cls.slug()} has no option {key!r}: {nearest(key, known)}")
        return cls(**options)


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


