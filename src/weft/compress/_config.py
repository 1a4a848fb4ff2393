"""The config that every compression method's config extends: how much is kept, of what, and who decides how much."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from weft.errors import UsageError
from weft.registry import MethodConfig


@dataclass
class CompressConfig(MethodConfig):
    """Fields that all compression methods share. A method adds its own, each with `metadata={"help": ...}`.

    Raises UsageError for values that no model could serve; what depends on the model is checked when it is there.
    """

    common: ClassVar[bool] = True

    keep: float = field(
        default=0.75, metadata={"help": "share of the targeted matrices' stored bits to keep, above 0, at most 1"}
    )
    include: list[str] | str | None = field(
        default=None,
        metadata={"help": "modules to compress: name endings or one regex; none takes all that the method serves"},
    )
    exclude: list[str] | str | None = field(
        default=None, metadata={"help": "modules to leave as they are: name endings or one regex"}
    )
    allocate: Literal["uniform", "energy", "water", "threshold", "block_influence", "sweep"] = field(
        default="uniform",
        metadata={
            "help": "who gets how much: the same share everywhere, the same explained share, the least sum of errors, "
            "one threshold on singular values, by each block's influence, or by what each type of layer costs the loss"
        },
    )
    sequential: bool = field(
        default=False, metadata={"help": "calibrate each block on what the compressed blocks before it pass on"}
    )
    guard: bool = field(default=True, metadata={"help": "leave a layer as it is where no smaller form saves bits"})

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Refuse values that cannot work. A method extends it for its own fields."""
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise UsageError(f"keep={self.keep!r}: the share of stored bits to keep is above 0 and at most 1")

    @property
    def runs_the_model(self) -> bool:
        """Whether sizes depend on what the whole model makes of the calibration data."""
        return self.allocate in ("block_influence", "sweep")


@dataclass
class LowRankConfig(CompressConfig):
    """Options of methods that store two thin factors."""

    common: ClassVar[bool] = True

    round_to: int = field(default=1, metadata={"help": "ranks are multiples of this (128 suits GPUs)"})

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise UsageError(f"round_to={self.round_to!r} must be a whole number of at least 1")


@dataclass
class CalibratedConfig(CompressConfig):
    """Options of methods that weigh errors by what the layers receive."""

    shrink: float | Literal["auto"] = field(
        default=0.0,
        metadata={
            "help": "how far second moments move towards a multiple of the identity, 0 to 1, or auto (Ledoit-Wolf): "
            "guards against a calibration text that is unlike what follows"
        },
    )

    def validate(self) -> None:
        super().validate()
        if self.shrink != "auto" and not (isinstance(self.shrink, int | float) and 0 <= self.shrink <= 1):
            raise UsageError(f"shrink={self.shrink!r}: a share between 0 and 1, or 'auto'")


@dataclass
class AnewConfig(CompressConfig):
    """Options of methods that find each size anew, so that errors of all sizes are not to be had."""

    common: ClassVar[bool] = True

    allocate: Literal["uniform", "threshold", "block_influence"] = field(  # type: ignore[assignment]
        default="uniform",
        metadata={
            "help": "who gets how much: the same share everywhere, one threshold on singular values, or by each "
            "block's influence"
        },
    )

    def validate(self) -> None:
        super().validate()
        if self.allocate not in ("uniform", "threshold", "block_influence"):
            raise UsageError(
                f"allocate={self.allocate!r} needs the error of every size, and this method finds each size anew: use "
                "uniform, threshold or block_influence"
            )
