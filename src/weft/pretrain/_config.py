"""The config that every factorised parametrisation's config extends: which layers, and what draws its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.errors import UsageError
from weft.registry import MethodConfig


@dataclass
class PretrainConfig(MethodConfig):
    """Fields that all factorised parametrisations share. A method adds its own, each with `metadata={"help": ...}`."""

    common: ClassVar[bool] = True
    convolutions: ClassVar[bool] = False  # whether the method serves Conv2d too

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "layers to factorise: name endings or one regex; none takes all linear ones of the blocks"},
    )
    seed: int = field(default=0, metadata={"help": "draws what starts at random"})

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Refuse values that cannot work. A method extends it for its own fields; `rank` is checked here."""
        rank = getattr(self, "rank", 1)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise UsageError(f"rank={rank!r} must be a whole number of at least 1")

    def choose(self, layers: dict[str, Any]) -> list[str]:
        """Which of the matching layers, by name in the model's order, are factorised."""
        return list(layers)
